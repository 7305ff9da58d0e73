"""The house in figures: lengths of cells, pages, modules, and guards.

``python -m tools.house`` prints them with their limits; ``tests/test_house.py`` holds
them.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.book import ROOT, Cell, read_chapter
from tools.references import NUMBER

__all__ = ["LIMITS", "Measured", "main", "measure"]

WIDTH = 88
Function = ast.FunctionDef | ast.AsyncFunctionDef

# The figure's name, what it must hold, and how it is written.
LIMITS: dict[str, tuple[float, str]] = {
    "visible exported cell, median lines": (8, ".0f"),
    "visible exported cell, 90th percentile": (20, ".0f"),
    "visible exported cell, longest": (40, ".0f"),
    "share of exported lines in cells of more than 20": (0.15, ".0%"),
    "other visible cell, median lines": (8, ".0f"),
    "other visible cell, longest": (25, ".0f"),
    f"visible code lines over {WIDTH} characters": (0, ".0f"),
    "share of exported code that is folded": (1 / 3, ".0%"),
    "longest page": (700, ".0f"),
    "longest module": (350, ".0f"),
    "share of guards": (0.12, ".1%"),
    "chapters named by number in the package": (0, ".0f"),
}


@dataclass(frozen=True)
class Measured:
    """The figures, named as in LIMITS, and the largest: (lines, place)."""

    figures: dict[str, float]
    cells: list[tuple[int, str]]
    modules: list[tuple[int, str]]
    pages: list[tuple[int, str]]

    @property
    def broken(self) -> list[str]:
        """The limits that do not hold."""
        return [
            f"{name}: {value:{LIMITS[name][1]}}, at most "
            f"{LIMITS[name][0]:{LIMITS[name][1]}}"
            for name, value in self.figures.items()
            if value > LIMITS[name][0]
        ]


def _span(node: ast.AST) -> range:
    return range(node.lineno, node.end_lineno + 1)  # type: ignore[attr-defined]


def _code(source: str) -> set[int]:
    """The lines of a source that hold code: no comment, no docstring, not blank."""
    silent = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in silent
        for line in range(token.start[0], token.end[0] + 1)
    }
    return lines - set(_docstrings(ast.parse(source)))


def _docstrings(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                yield from _span(first)


def _imports(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from _span(node)


def _guards(tree: ast.Module) -> Iterator[int]:
    """Lines that refuse: raise, assert, the `if` before, handlers, calls of guards,
    also those that open a `with`.
    """
    helpers = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("guards")
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.withitem) and _call(node.context_expr) in helpers:
            yield from _span(node.context_expr)
        elif isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise):
            yield from range(node.lineno, (node.body[-1].end_lineno or 0) + 1)
        elif (
            isinstance(node, ast.Raise | ast.Assert | ast.ExceptHandler)
            or (isinstance(node, ast.Expr) and _call(node.value) in helpers)
            or (isinstance(node, ast.FunctionDef) and _only_checks(node.name))
        ):
            yield from _span(node)


def _call(node: ast.expr) -> str:
    """The last word of what an expression calls: `expect` for `guards.expect(...)`."""
    return ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else ""


def _only_checks(name: str) -> bool:
    return bool(re.match(r"_?check_|_check|__post_init__", name)) or "flaw" in name


def _size(cell: Cell) -> int:
    """The lines of a cell that are code, imports left out."""
    try:
        return len(_code(cell.source) - set(_imports(ast.parse(cell.source))))
    except SyntaxError:
        return 0  # %magic


def _hidden(cell: Cell) -> bool:
    return any(tag.startswith(("hide-", "remove-")) for tag in cell.tags)


def _largest(sizes: dict[str, int]) -> list[tuple[int, str]]:
    return sorted(((size, name) for name, size in sizes.items()), reverse=True)


def measure(root: Path = ROOT) -> Measured:
    """Measure the chapters and the package that lie under `root`."""
    pages: dict[str, int] = {}
    exported: dict[str, int] = {}
    others: dict[str, int] = {}
    folded = wide = 0
    for path in sorted((root / "book").glob("*.md")):
        page = read_chapter(path, root)
        if page.cells:
            pages[page.name] = len(path.read_text(encoding="utf-8").splitlines())
        for cell in page.cells:
            size = _size(cell)
            if _hidden(cell):
                folded += size * ("export" in cell.tags)
            elif size:
                wide += sum(len(line) > WIDTH for line in cell.source.splitlines())
                place = f"{page.name}, cell {cell.number}, line {cell.line}"
                (exported if "export" in cell.tags else others)[place] = size
    modules: dict[str, int] = {}
    code = guards = numbers = 0
    for path in (root / "diffussm").rglob("*.yaml"):
        numbers += len(NUMBER.findall(path.read_text(encoding="utf-8")))
    for path in sorted((root / "diffussm").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        modules[path.relative_to(root).as_posix()] = len(text.splitlines())
        numbers += len(NUMBER.findall(text))
        if path.stem != "guards":
            lines = _code(text)
            code += len(lines)
            guards += len(lines & set(_guards(ast.parse(text))))
    shown, rest = sorted(exported.values()), sorted(others.values())
    values = (
        statistics.median(shown or [0]),
        shown[int(0.9 * (len(shown) - 1))] if shown else 0,
        max(shown, default=0),
        sum(size for size in shown if size > 20) / max(sum(shown), 1),
        statistics.median(rest or [0]),
        max(rest, default=0),
        wide,
        folded / max(folded + sum(shown), 1),
        max(pages.values(), default=0),
        max(modules.values(), default=0),
        guards / max(code, 1),
        numbers,
    )
    return Measured(
        dict(zip(LIMITS, values, strict=True)),
        _largest(exported),
        _largest(modules),
        _largest(pages),
    )


def main() -> int:
    """The command; returns the exit status."""
    measured = measure()
    for name, value in measured.figures.items():
        limit, form = LIMITS[name]
        mark = "" if value <= limit else "   <- too much"
        print(f"{name:52} {value:>7{form}}  (at most {limit:{form}}){mark}")
    for what in ("cells", "modules", "pages"):
        print(f"the longest {what}:")
        for size, place in getattr(measured, what)[:8]:
            print(f"  {size:5}  {place}")
    return int(bool(measured.broken))


if __name__ == "__main__":
    raise SystemExit(main())
