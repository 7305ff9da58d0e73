"""Read the chapters: front matter, title, and code cells with their lines."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from markdown_it import MarkdownIt
from mdit_py_plugins.front_matter import front_matter_plugin

__all__ = [
    "ROOT",
    "Cell",
    "Chapter",
    "chapters",
    "is_quick",
    "labels",
    "prose",
    "read_chapter",
    "reading_order",
]

ROOT = Path(__file__).resolve().parent.parent


def is_quick() -> bool:
    """Whether pages are asked for in their quick mode, as `book/quick.py` has it."""
    return os.environ.get("QUICK", "") not in ("", "0")


_PARSER = MarkdownIt("commonmark").use(front_matter_plugin)


@dataclass(frozen=True)
class Cell:
    """A code cell.

    ``number`` counts the chapter's code cells from 1, ``line`` is where its code
    starts.
    """

    number: int
    line: int
    source: str
    metadata: dict[str, Any]

    @property
    def tags(self) -> list[str]:
        """The cell's tags, such as ``export``."""
        return list(self.metadata.get("tags") or [])


@dataclass(frozen=True)
class Chapter:
    """A page of the book.

    ``name`` is relative to the root, for messages: ``book/11_state_space.md``.
    """

    path: Path
    name: str
    title: str
    front_matter: dict[str, Any]
    cells: tuple[Cell, ...]

    @property
    def module(self) -> str | None:
        """The module that the chapter says it exports, ``state_space``."""
        return self.front_matter.get("module")

    @property
    def exported(self) -> list[Cell]:
        """The cells tagged ``export``."""
        return [cell for cell in self.cells if "export" in cell.tags]


def reading_order(root: Path = ROOT) -> list[str]:
    """All pages in the order in which they are read, as `book/11_state_space`."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    files = [page["file"] for part in toc["parts"] for page in part["chapters"]]
    return [toc["root"], *files]


def read_chapter(path: Path, root: Path = ROOT) -> Chapter:
    """Read one MyST Markdown page; its cells are those that jupytext finds."""
    front_matter: dict[str, Any] = {}
    title = ""
    cells: list[Cell] = []
    tokens = _PARSER.parse(path.read_text(encoding="utf-8"))
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "front_matter":
            front_matter = yaml.safe_load(token.content) or {}
        elif token.type == "heading_open" and token.tag == "h1" and not title:
            title = following.content if following else ""
        elif (
            token.type == "fence" and token.info.startswith("{code-cell}") and token.map
        ):
            metadata, skipped, source = _split_options(token.content)
            cells.append(
                Cell(len(cells) + 1, token.map[0] + 2 + skipped, source, metadata)
            )
    name = path.resolve().relative_to(root.resolve()).as_posix()
    return Chapter(path, name, title, front_matter, tuple(cells))


def _split_options(content: str) -> tuple[dict[str, Any], int, str]:
    """A cell's metadata (YAML, or lines `:key: value`), its lines, and the code."""
    lines = content.splitlines()
    start = 0
    options: list[str] = []
    if lines and lines[0].startswith("---"):
        start = (
            next(
                (i for i, line in enumerate(lines[1:], 1) if line.startswith("---")),
                len(lines) - 1,
            )
            + 1
        )
        options = lines[1 : start - 1]
    else:
        while start < len(lines) and re.match(r":[\w-]+:", lines[start]):
            options.append(lines[start][1:])
            start += 1
    while start < len(lines) and not lines[start].strip():
        start += 1
    return (
        yaml.safe_load("\n".join(options)) or {},
        start,
        "\n".join(lines[start:]).rstrip(),
    )


def labels(text: str) -> list[str]:
    """The labels that a page gives to its titles, equations, figures and tables."""
    found = re.findall(
        r"^\(([\w-]+)\)=$|^\s*:?(?:label|name):\s*(\w+(?:-\w+)+)\s*$",
        text,
        re.MULTILINE,
    )
    return [a or b for a, b in found]


def prose(path: Path, root: Path = ROOT) -> Iterator[tuple[int, str]]:
    """A page without code, formulas, roles' labels and addresses, and the captions and
    descriptions of its figures; each with the line where it begins.
    """
    lines: list[str] = []
    fences: list[tuple[str, bool]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        fence = re.match(r"(`{3,})(.*)", line)
        if fence and fences and fence[0] == fences[-1][0]:
            fences.pop()
        elif fence:
            prosaic = re.match(r"\{(?!code-cell|math|bibliography)", fence[2])
            fences.append((fence[1], bool(prosaic)))
        lines.append(line if all(prosaic for _, prosaic in fences) else "")
    text = "\n".join(lines)
    for silent in (
        r"\A---\n.*?^---\n",
        r"\$[^$\n]*(?:\n[^$\n]+)?\$",
        r"`[^`\n]+`",
        r"\]\([^)]*\)|https?://\S+|^\([\w-]+\)=$",
        r"^:(?:class|color|name|ref-type):[^\n]*$",
    ):
        text = re.sub(
            silent,
            lambda found: "\n" * found[0].count("\n"),
            text,
            flags=re.DOTALL | re.MULTILINE,
        )
    yield 1, text
    for cell in read_chapter(path, root).cells:
        shown = cell.metadata.get("mystnb", {})
        yield cell.line, str(shown.get("figure", {}).get("caption", ""))
        yield cell.line, str(shown.get("image", {}).get("alt", ""))


def chapters(root: Path = ROOT) -> list[Chapter]:
    """Every numbered chapter, in the order in which it is read."""
    return [
        read_chapter(path, root)
        for path in sorted((root / "book").glob("[0-9][0-9]_*.md"))
    ]
