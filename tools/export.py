"""Write the package: tagged cells of every chapter become its module.

``python -m tools.export`` writes what differs, ``--check`` only reports it. Every
chapter is read and judged before anything is written; if one of them is refused,
nothing is. Name chapters to export only those.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ruff import find_ruff_bin

from tools import folding
from tools.book import ROOT, Cell, Chapter, chapters
from tools.references import Book, read_book, resolve

__all__ = ["ExportError", "build", "main"]

PACKAGE = "diffussm"
HAND_WRITTEN = {"__init__.py", "__main__.py"}
Import = ast.Import | ast.ImportFrom


class ExportError(Exception):
    """What is wrong with the book, one line a fault."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


def _where(chapter: Chapter, cell: Cell, lineno: int | None = 1) -> str:
    return f"{chapter.name}, cell {cell.number}, line {cell.line + (lineno or 1) - 1}"


def _diffussm_modules(node: Import) -> Iterator[str]:
    """The modules that an import names; '' stands for the package itself."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif node.module == PACKAGE:
        names = [f"{PACKAGE}.{alias.name}" for alias in node.names]
    else:
        names = [node.module or ""]
    for name in names:
        head, _, rest = name.partition(".")
        if head == PACKAGE:
            yield rest.partition(".")[0]


def _is_type_checking(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.If)
        and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        and not node.orelse
        and all(isinstance(child, Import) for child in node.body)
    )


def _is_program(node: ast.stmt) -> bool:
    """What `python -m` alone would run."""
    return isinstance(node, ast.If) and ast.unparse(node.test).startswith(
        "__name__ == '__main__'"
    )


@dataclass
class _Module:
    """What is collected from one chapter."""

    chapter: Chapter
    book: Book
    helpers: set[
        str
    ]  # modules of the book's own folder, which no user of the package has
    imports: list[str] = field(default_factory=list)
    typing_imports: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    defined: dict[str, str] = field(default_factory=dict)  # name -> where
    imported: dict[str, tuple[str, str]] = field(
        default_factory=dict
    )  # name -> (origin, where)
    members: dict[str, dict[str, str]] = field(
        default_factory=dict
    )  # class -> name of a member -> where
    faults: list[str] = field(default_factory=list)

    def add(self, cell: Cell) -> None:
        """Sort the statements of an exported cell into imports and body."""
        for i, line in enumerate(cell.source.splitlines(), 1):
            if re.match(r"\s*(%|!|\?)", line):
                self.faults.append(
                    f"{_where(self.chapter, cell, i)}: an IPython command in an "
                    "exported cell"
                )
                return
        try:
            tree = ast.parse(cell.source)
        except SyntaxError as error:
            self.faults.append(
                f"{_where(self.chapter, cell, error.lineno)}: syntax error: {error.msg}"
            )
            return
        self.faults += [
            f"{_where(self.chapter, cell, line)}: {message}"
            for line, message in self.book.faults(cell.source)
        ]
        lines = cell.source.splitlines()
        moved: set[int] = set()
        last = 0
        for node in tree.body:
            if node.lineno <= last:
                self.faults.append(
                    f"{_where(self.chapter, cell, node.lineno)}: two statements on "
                    "one line"
                )
            last = node.end_lineno or node.lineno
            self._judge(cell, node)
            if isinstance(node, Import):
                first = node.lineno
                while first > 1 and lines[first - 2].startswith("#"):
                    first -= 1  # a comment above an import goes with it
                self.imports.append("\n".join(lines[first - 1 : last]))
                moved.update(range(first, last + 1))
            elif _is_type_checking(node):
                self.typing_imports += lines[node.lineno : last]
                moved.update(range(node.lineno, last + 1))
        self.body.append(
            "\n".join(line for i, line in enumerate(lines, 1) if i not in moved).strip(
                "\n"
            )
        )

    def _judge(self, cell: Cell, node: ast.stmt) -> None:
        where = _where(self.chapter, cell, node.lineno)
        if isinstance(node, Import):
            self._judge_import(node, where)
        elif _is_type_checking(node):
            for child in ast.walk(node):
                if isinstance(child, Import):
                    self._judge_import(child, where)
        elif folding.is_marked(node):
            self._judge_method(cell, node)
        elif isinstance(node, folding.Method | ast.ClassDef):
            if not folding.is_overload(node):
                self._define(node.name, where)
            if isinstance(node, ast.ClassDef):
                self.members[node.name] = {
                    name: _where(self.chapter, cell, line)
                    for name, line in folding.members(node)
                }
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            self._judge_assignment(node, where)
        elif not (
            _is_program(node)
            or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        ):
            self.faults.append(
                f"{where}: `{ast.unparse(node).splitlines()[0]}` would run on "
                "import; only imports, "
                "functions, classes and constants are exported"
            )

    def _judge_assignment(self, node: ast.Assign | ast.AnnAssign, where: str) -> None:
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name) and re.fullmatch(
                r"_{0,2}[A-Z]\w*", target.id
            ):
                self._define(target.id, where)
            else:
                self.faults.append(
                    f"{where}: `{ast.unparse(target)} = ...` at the top of a "
                    "module; only constants "
                    "(UPPER_CASE) and type aliases (CamelCase) are exported"
                )

    def _judge_method(self, cell: Cell, node: ast.stmt) -> None:
        """A method needs a class of an exported cell above, and a name of its own."""
        faults = [
            f"{_where(self.chapter, cell, line)}: {message}"
            for line, message in folding.faults(node)
        ]
        self.faults += faults
        name = folding.owner(node)
        if faults or not isinstance(node, folding.Method):
            return
        where = _where(self.chapter, cell, node.lineno)
        if name not in self.members:
            near = difflib.get_close_matches(name, self.members, 1, 0.0)
            reason = (
                f"{self.imported[name][0]} continues only in its own chapter"
                if name in self.imported
                else f"no exported cell above defines the class `{name}`"
                + (f"; the nearest is `{near[0]}`" if near else "")
            )
            self.faults.append(f"{where}: a method of another class: {reason}")
        elif not folding.is_overload(node) and not folding.is_accessor(node):
            earlier = self.members[name].setdefault(node.name, where)
            if earlier != where:
                self.faults.append(
                    f"{where}: `{name}.{node.name}` is defined twice; first at "
                    f"{earlier}"
                )

    def _define(self, name: str, where: str) -> None:
        earlier = self.defined.get(name) or self.imported.get(name, ("", ""))[1]
        if earlier:
            self.faults.append(
                f"{where}: `{name}` is defined twice; first at {earlier}"
            )
        self.defined.setdefault(name, where)

    def _judge_import(self, node: Import, where: str) -> None:
        if isinstance(node, ast.ImportFrom) and node.level:
            self.faults.append(
                f"{where}: a relative import; write `from {PACKAGE}.... import ...`"
            )
            return
        home = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        if (home or "").partition(".")[0] in self.helpers:
            self.faults.append(
                f"{where}: `{home}` belongs to the book and not to the package; "
                "import it in a cell "
                "that is not exported"
            )
        for alias in node.names:
            if alias.name == "*":
                self.faults.append(
                    f"{where}: `import *` hides where names come from; name them"
                )
                continue
            origin = (
                alias.name
                if isinstance(node, ast.Import)
                else f"{node.module}.{alias.name}"
            )
            plain = (
                alias.name.partition(".")[0]
                if isinstance(node, ast.Import)
                else alias.name
            )
            name = alias.asname or plain
            if isinstance(node, ast.Import) and not alias.asname:
                origin = plain  # `import a.b` binds `a`
            if name in self.defined:
                self.faults.append(
                    f"{where}: `{name}` is defined twice; first at {self.defined[name]}"
                )
            earlier = self.imported.setdefault(name, (origin, where))
            if earlier[0] != origin:
                self.faults.append(
                    f"{where}: `{name}` is imported twice, from {earlier[0]} "
                    f"({earlier[1]}) and from {origin}"
                )

    def source(self) -> str:
        """The module before formatting."""
        title = self.chapter.title.rstrip(".")
        note = f"Generated from {self.chapter.name} by `make export`: edit there."
        docstring = f'{"r" if chr(92) in title else ""}"""{title}.\n\n{note}\n"""'
        public = [name for name in self.defined if not name.startswith("_")]
        typing = (
            ["if TYPE_CHECKING:", *dict.fromkeys(self.typing_imports)]
            if self.typing_imports
            else []
        )
        # A comment in front of the very first import would not move with it when
        # imports are sorted.
        imports = sorted(
            dict.fromkeys(self.imports), key=lambda text: text.startswith("#")
        )
        parts = [
            docstring,
            "\n".join(imports),
            "\n".join(typing),
            f"__all__ = {public!r}",
            resolve(folding.fold("\n\n".join(self.body)), self.book),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"


def _order_faults(book: list[Chapter], complete: bool) -> Iterator[tuple[Chapter, str]]:
    """Imports of the chapter's own module, of a later one, or of none."""
    position = {chapter.module: i for i, chapter in enumerate(book) if chapter.module}
    for i, chapter in enumerate(book):
        for cell in chapter.cells:
            try:
                tree = ast.parse(cell.source)
            except SyntaxError:
                # refused elsewhere if exported; otherwise its execution says so
                continue
            for node in ast.walk(tree):
                if not isinstance(node, Import) or (
                    isinstance(node, ast.ImportFrom) and node.level
                ):
                    continue
                for module in _diffussm_modules(node):
                    where = _where(chapter, cell, node.lineno)
                    if module == chapter.module and module:
                        yield (
                            chapter,
                            f"{where}: imports its own module {PACKAGE}.{module}",
                        )
                    elif module in position and position[module] > i:
                        later = book[position[module]].name
                        yield (
                            chapter,
                            f"{where}: imports {PACKAGE}.{module} of a later "
                            f"chapter, {later}",
                        )
                    elif (
                        complete
                        and module not in position
                        and module not in ("", "__version__")
                    ):
                        yield (
                            chapter,
                            f"{where}: imports {PACKAGE}.{module}, which no chapter "
                            "exports",
                        )


def _ruff(root: Path, *arguments: str, source: str) -> str:
    command = [find_ruff_bin(), *arguments, "-"]
    done = subprocess.run(
        command, input=source, capture_output=True, text=True, cwd=root, check=False
    )
    if done.returncode > 1 or (done.returncode == 1 and not done.stdout):
        raise RuntimeError(f"ruff failed: {done.stderr.strip()}")
    return done.stdout


def _format(root: Path, module: _Module) -> str:
    """Sort imports, drop unused ones, format; refuse undefined names."""
    name = f"--stdin-filename={PACKAGE}/{module.chapter.module}.py"
    fix = ["check", "--quiet", "--fix-only", "--select=I,F401", name]
    text = _ruff(root, "format", name, source=_ruff(root, *fix, source=module.source()))
    report = _ruff(
        root,
        "check",
        "--quiet",
        "--select=F821",
        "--output-format=json",
        name,
        source=text,
    )
    for finding in json.loads(report or "[]"):
        undefined = re.findall(r"`(.+?)`", finding["message"])[0]
        cell = next(
            c
            for c in module.chapter.exported
            if re.search(rf"\b{re.escape(undefined)}\b", c.source)
        )
        line = next(
            i for i, s in enumerate(cell.source.splitlines(), 1) if undefined in s
        )
        module.faults.append(
            f"{_where(module.chapter, cell, line)}: `{undefined}` is used, but no "
            "exported cell of this "
            "chapter defines or imports it"
        )
    return text


def _chapter_faults(chapter: Chapter) -> Iterator[str]:
    """What is wrong with a chapter's header, title and tags."""
    module = chapter.module
    for cell in chapter.exported:
        target = cell.metadata.get("export-to", module)
        if target is None or str(target).removeprefix(f"{PACKAGE}.") != module:
            yield (
                f"{_where(chapter, cell)}: exports to {target}, but the module of "
                "the chapter, `module:` "
                f"in its front matter, is {module}"
            )
    if not module:
        return
    expected = chapter.path.stem[3:]  # the file's name after its number
    if module != expected:
        yield f"{chapter.name}: `module: {module}`, expected {expected}"
    if not chapter.title:
        yield (
            f"{chapter.name}: no title (a line `# ...`), it becomes the module's "
            "docstring"
        )
    if not chapter.exported:
        yield f"{chapter.name}: `module: {module}`, but no cell is tagged `export`"


def build(root: Path = ROOT, only: list[str] | None = None) -> dict[Path, str]:
    """The text of every module, by path; `only` names chapters (`11_state_space`).

    Raises ExportError with all that is wrong, each fault with its chapter, cell and
    line.
    """
    book = chapters(root)
    pages = read_book(root)
    helpers = {path.stem for path in (root / "book").glob("*.py")}
    known = {chapter.path.stem for chapter in book}
    selected = {Path(name).stem for name in only or known}
    faults = [f"book/{name}.md: no such chapter" for name in sorted(selected - known)]
    faults += [
        fault
        for chapter, fault in _order_faults(book, only is None)
        if chapter.path.stem in selected
    ]
    owners: dict[str, str] = {}
    modules: list[_Module] = []
    for chapter in book:
        if chapter.module:
            earlier = owners.setdefault(chapter.module, chapter.name)
            if earlier != chapter.name:
                faults.append(
                    f"{chapter.name}: exports to {PACKAGE}.{chapter.module}, as "
                    f"does {earlier}"
                )
        if chapter.path.stem not in selected:
            continue
        faults += _chapter_faults(chapter)
        if chapter.module and chapter.exported:
            module = _Module(chapter, pages, helpers)
            for cell in chapter.exported:
                module.add(cell)
            modules.append(module)
            faults += module.faults
    if only is None:
        faults += [
            f"{PACKAGE}/{path.name}: no chapter exports it; delete it"
            for path in sorted((root / PACKAGE).glob("*.py"))
            if path.stem not in owners and path.name not in HAND_WRITTEN
        ]
    if not faults:
        texts = {
            root / PACKAGE / f"{module.chapter.module}.py": _format(root, module)
            for module in modules
        }
        faults = [fault for module in modules for fault in module.faults]
    if faults:
        raise ExportError(faults)
    return texts


def _write(path: Path, text: str) -> None:
    """Replace a file in one step: no half of a module is ever there."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.export", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "chapters", nargs="*", help="export only these, such as book/11_state_space.md"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; show what differs"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    root = options.root.resolve()
    try:
        texts = build(root, options.chapters or None)
    except ExportError as error:
        print(error, file=sys.stderr)
        print(f"export: {len(error.faults)} faults, nothing written", file=sys.stderr)
        return 1
    changed = 0
    for path, text in texts.items():
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if old == text:
            continue
        changed += 1
        name = path.relative_to(root).as_posix()
        if options.check:
            diff = difflib.unified_diff(
                old.splitlines(True),
                text.splitlines(True),
                name,
                f"{name} as the book has it",
            )
            sys.stdout.writelines(diff)
        else:
            _write(path, text)
            print(f"export: wrote {name}")
    if options.check and changed:
        print(
            f"export: {changed} modules differ from the book; run `make export`",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
