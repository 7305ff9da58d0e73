"""Who imports whom in the package, and which public names nobody takes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tools.book import ROOT, chapters, read_chapter

__all__ = ["imports", "unused_names"]


def imports(root: Path = ROOT) -> dict[str, set[str]]:
    """Which modules of the package each module imports, wherever the import stands."""
    found: dict[str, set[str]] = {}
    names = {path.stem for path in (root / "diffussm").glob("[!_]*.py")}
    for name in sorted(names):
        tree = ast.parse((root / "diffussm" / f"{name}.py").read_text(encoding="utf-8"))
        found[name] = {
            part
            for node in ast.walk(tree)
            for imported in _imported(node)
            for part in imported.split(".")[1:2]
            if part in names
        }
    return found


def _imported(node: ast.AST) -> Iterator[str]:
    """The full names that an import of the package binds."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        names = []
    yield from (name for name in names if name.partition(".")[0] == "diffussm")


def unused_names(root: Path = ROOT) -> list[str]:
    """Public names that nobody imports and no public signature mentions."""
    used: dict[str, set[str]] = {}  # "model.DiffuSSM" -> where
    for folder in ("diffussm", "book", "tests", "tools", "benchmarks", "."):
        for path in (root / folder).glob("*.*"):
            for name in _uses(path, root):
                used.setdefault(name, set()).add(path.stem)
    unused = []
    for chapter in chapters(root):
        if chapter.module:
            own = {chapter.path.stem, chapter.module}
            path = root / "diffussm" / f"{chapter.module}.py"
            tree = ast.parse(path.read_text(encoding="utf-8"))
            told = set(_told(tree))
            unused += [
                f"{chapter.module}.{name}"
                for name in _public(tree)
                if name not in told
                and not used.get(f"{chapter.module}.{name}", set()) - own
            ]
    return unused


def _public(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def _told(tree: ast.Module) -> Iterator[str]:
    """The names in bases, fields, and signatures of public functions."""
    for node in ast.walk(tree):
        told: list[ast.expr | None] = []
        if isinstance(node, ast.ClassDef):
            told += node.bases
            if any(ast.unparse(base).endswith("Error") for base in node.bases):
                yield node.name  # whoever catches it may not be written yet
        elif isinstance(node, ast.AnnAssign):
            told.append(node.annotation)
        elif isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef
        ) and not node.name.startswith("_"):
            told += [
                *(a.annotation for a in ast.walk(node.args) if isinstance(a, ast.arg))
            ]
            told.append(node.returns)
        for expression in filter(None, told):
            yield from re.findall(r"\w+", ast.unparse(expression))


def _uses(path: Path, root: Path) -> Iterator[str]:
    """What a file takes from the package, in strings too, as "module.name"."""
    if path.suffix not in (".py", ".md"):
        return
    text = path.read_text(encoding="utf-8")
    yield from re.findall(r"\bdiffussm\.(\w+\.\w+)", text)
    # what is imported late or by a registry, "sharing:load_run"
    late = re.findall(r"""["'](?:diffussm\.)?(\w+):(\w+)["']""", text)
    yield from (f"{module}.{name}" for module, name in late)
    # modules by another name: also by `y = importorskip("diffussm.x")`
    aliases = {new: old for old, new in re.findall(r"diffussm\.(\w+) as (\w+)", text)}
    aliases |= dict(re.findall(r"""(\w+) = [\w.]+\(["']diffussm\.(\w+)["']\)""", text))
    for names in re.findall(r"from diffussm import ([\w, ]+)", text):
        for name in names.split(", "):
            aliases[name.split(" as ")[-1]] = name.split(" as ")[0]
    for alias, module in aliases.items():
        for name in re.findall(rf"\b{alias}\.(\w+)", text):
            yield f"{module}.{name}"
    for node in _trees(path, text, root):
        if isinstance(node, ast.ImportFrom) and str(node.module)[:9] == "diffussm.":
            yield from (f"{str(node.module)[9:]}.{name.name}" for name in node.names)


def _trees(path: Path, text: str, root: Path) -> Iterator[ast.AST]:
    """The nodes of a program, or of the cells of a page."""
    if path.suffix == ".py":
        sources = [text]
    else:
        sources = [cell.source for cell in read_chapter(path, root).cells]
    for source in sources:
        try:
            yield from ast.walk(ast.parse(source))
        except SyntaxError:  # %magic
            continue
