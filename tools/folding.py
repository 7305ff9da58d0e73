"""A class continues over cells: functions under ``@method_of(Class)`` go into its body.

``book/literate.py`` does the same to a running notebook.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from textwrap import indent

__all__ = ["Method", "faults", "fold", "is_marked", "is_overload", "members", "owner"]

MARK = "method_of"
Method = ast.FunctionDef | ast.AsyncFunctionDef


def _called(decorator: ast.expr) -> str:
    return ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)


def is_marked(node: ast.stmt) -> bool:
    """Whether ``@method_of`` stands above a definition."""
    return MARK in map(_called, getattr(node, "decorator_list", []))


def is_overload(node: ast.stmt) -> bool:
    """Whether a definition is only one of several signatures, for type checkers."""
    decorators = getattr(node, "decorator_list", [])
    return any(_called(d).split(".")[-1] == "overload" for d in decorators)


def owner(node: ast.stmt) -> str:
    """The class that a marked function goes to, or '' if the mark does not name one."""
    mark = getattr(node, "decorator_list", [None])[0]
    if (
        isinstance(mark, ast.Call)
        and _called(mark) == MARK
        and len(mark.args) == 1
        and isinstance(mark.args[0], ast.Name)
        and not mark.keywords
    ):
        return mark.args[0].id
    return ""


def members(node: ast.ClassDef) -> Iterator[tuple[str, int]]:
    """The names that a class's own cell gives to its members, with their lines."""
    for child in node.body:
        if isinstance(child, Method | ast.ClassDef):
            if not is_overload(child):
                yield child.name, child.lineno
        elif isinstance(child, ast.Assign | ast.AnnAssign):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            yield from ((t.id, t.lineno) for t in targets if isinstance(t, ast.Name))


def is_accessor(node: Method) -> bool:
    """Whether a function adds a setter or the like to a property of the same name."""
    accessors = [f"{node.name}.{kind}" for kind in ("getter", "setter", "deleter")]
    return any(
        _called(d).removeprefix(f"{owner(node)}.") in accessors
        for d in node.decorator_list
    )


def faults(node: ast.stmt) -> Iterator[tuple[int, str]]:
    """What is wrong with a marked definition itself, each with its line.

    What would mean one thing in a notebook's cell and another in the body of a class is
    refused as well.
    """
    if not isinstance(node, Method):
        yield node.lineno, f"`@{MARK}` makes methods of functions, this is a class"
        return
    if not owner(node) or [_called(d) for d in node.decorator_list].count(MARK) > 1:
        yield (
            node.lineno,
            f"write `@{MARK}(Class)`, once, with the name of a class, as the first "
            "decorator",
        )
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call) and ast.unparse(inner) == "super()":
            yield (
                inner.lineno,
                "`super()` knows no class outside of one: write `super(Class, self)`",
            )
        name = getattr(inner, "attr", getattr(inner, "id", ""))
        if name.startswith("__") and not name.endswith("__"):
            yield (
                getattr(inner, "lineno", node.lineno),
                f"Python renames `{name}` inside a class: use one underscore",
            )


def fold(text: str) -> str:
    """The module with every marked function at the end of its class, in order."""
    lines = text.split("\n")
    methods: dict[str, list[str]] = {}
    dropped: set[int] = set()
    classes: dict[str, ast.ClassDef] = {}
    for node in ast.parse(text).body:
        if isinstance(node, Method) and is_marked(node):
            first, last = _extent(node, lines)
            methods.setdefault(owner(node), []).append(_as_method(node, lines, first))
            dropped.update(range(first, last + 1))
        elif isinstance(node, ast.ClassDef):
            classes[node.name] = node
    ends: dict[int, list[str]] = {}
    for name, texts in methods.items():
        dropped |= _open(classes[name], lines)
        ends[_end(classes[name], lines)] = texts
    kept: list[str] = []
    for number, line in enumerate(lines, 1):
        if number not in dropped:
            kept.append(line)
        for method in ends.get(number, []):
            kept += ["", method]
    return "\n".join(kept)


def _extent(node: Method, lines: list[str]) -> tuple[int, int]:
    """The first line of a function, comments above included, and the last."""
    first = min(d.lineno for d in node.decorator_list)
    while first > 1 and lines[first - 2].startswith("#"):
        first -= 1
    return first, node.end_lineno or node.lineno


def _as_method(node: Method, lines: list[str], first: int) -> str:
    """The function without the mark, indented; of strings only docstrings are."""
    mark = node.decorator_list[0]
    docstrings = {
        inner.body[0].value
        for inner in ast.walk(node)
        if isinstance(inner, Method | ast.ClassDef)
        and isinstance(inner.body[0], ast.Expr)
    }
    within = {
        line
        for inner in ast.walk(node)
        if isinstance(inner, ast.Constant | ast.JoinedStr) and inner not in docstrings
        for line in range(inner.lineno + 1, (inner.end_lineno or 0) + 1)
    }
    text = []
    for number in range(first, (node.end_lineno or first) + 1):
        line = lines[number - 1]
        if mark.lineno <= number <= (mark.end_lineno or 0):
            continue
        if (
            number < node.lineno
        ):  # `@Class.width.setter` is the notebook's way to say it
            line = line.replace(f"@{owner(node)}.{node.name}.", f"@{node.name}.")
        text.append(line if number in within else indent(line, "    "))
    return "\n".join(text)


def _open(node: ast.ClassDef, lines: list[str]) -> set[int]:
    """Make room in a class: drop its `pass` or `...`, open a one-line body."""
    start, column = node.body[0].lineno, node.body[0].col_offset
    head = lines[start - 1].encode()[:column].decode()
    placeholders = [
        child
        for child in node.body
        if isinstance(child, ast.Pass) or ast.unparse(child) == "..."
    ]
    if head.strip():
        body = lines[start - 1].encode()[column:].decode()
        lines[start - 1] = head if placeholders else f"{head}\n    {body}"
        return set()
    return {child.lineno for child in placeholders}


def _end(node: ast.ClassDef, lines: list[str]) -> int:
    """The last line of a class, with the comments that close it."""
    end = last = node.end_lineno or node.lineno
    while last < len(lines) and (not lines[last].strip() or lines[last][0] == " "):
        last += 1
        if lines[last - 1].strip():
            end = last
    return end
