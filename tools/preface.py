"""What stands under a chapter's title: what it builds on, how long it is, what it runs.

Nothing of it is typed: it is read from the chapter's imports, words and cells, and from
the record of `benchmarks.chapters`.
"""

from __future__ import annotations

import ast
import json
import math
import re
from functools import lru_cache
from pathlib import Path

from tools.book import ROOT, Chapter, labels, prose
from tools.overview import parts

__all__ = ["builds_on", "has_quick_mode", "minutes", "preface", "running", "trains"]

WORDS_PER_MINUTE = 200
# A faster way to the same numbers, and a helper that many take.
MAY_SKIP = {"two_level"}
STEPS = re.compile(r"(?<!def )\b(?:optimi[sz]er\.step|training_step|train|train_vae)\(")


@lru_cache
def _numbered(root: Path) -> dict[str, Chapter]:
    """The numbered chapters in the order in which they are read, by their file."""
    return {
        chapter.name.removesuffix(".md"): chapter
        for _, part in parts(root)
        for chapter in part
    }


def _imports(chapter: Chapter) -> set[str]:
    """The modules of the package that the chapter takes; a module's, for export."""
    cells = chapter.exported if chapter.module else chapter.cells
    source = "\n".join(c.source for c in cells)
    source = re.sub(r"^\s*[%!].*$", "pass", source, flags=re.MULTILINE)
    return {
        str(node.module).split(".")[1]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "")[:9] == "diffussm."
    }


@lru_cache
def _direct(name: str, root: Path) -> frozenset[str]:
    """The earlier chapters whose modules a chapter takes."""
    pages = list(_numbered(root))
    page_of = {c.module: page for page, c in _numbered(root).items() if c.module}
    taken = {page_of.get(m, "") for m in _imports(_numbered(root)[name]) - MAY_SKIP}
    return frozenset(taken & set(pages[: pages.index(name)]))


@lru_cache
def _all(name: str, root: Path) -> frozenset[str]:
    """And those that these take, and so on."""
    direct = _direct(name, root)
    return direct.union(*(_all(page, root) for page in direct))


def builds_on(name: str, root: Path = ROOT) -> list[str]:
    """The earlier chapters that one must have read, less those that they build on."""
    direct = _direct(name, root)
    implied = frozenset().union(*(_all(page, root) for page in direct))
    return [page for page in _numbered(root) if page in direct - implied]


def minutes(chapter: Chapter, root: Path = ROOT) -> int:
    """Minutes to read the words, formulas and code left out."""
    words = sum(len(text.split()) for _, text in prose(chapter.path, root))
    return math.ceil(words / WORDS_PER_MINUTE)


def running(chapter: Chapter, root: Path = ROOT) -> list[str]:
    """How long the chapter ran when that was last recorded, rounded up."""
    seconds = _recorded("chapters", chapter, root)
    if seconds is None:
        return []
    quick = _recorded("quick", chapter, root) if has_quick_mode(chapter) else None
    quickly = f", {_rounded(quick)} with `QUICK=1`" if quick else ""
    return [f"{_rounded(seconds)} to run{quickly}"]


def has_quick_mode(chapter: Chapter) -> bool:
    """Whether a cell asks if the page is run quickly (`book/quick.py`)."""
    return any(re.search(r"^from quick import", c.source, re.M) for c in chapter.cells)


def _recorded(name: str, chapter: Chapter, root: Path) -> int | None:
    """The seconds of a chapter in a record of `benchmarks.chapters`."""
    record = root / "benchmarks" / "results" / f"{name}.json"
    rows = json.loads(record.read_text())["rows"] if record.exists() else []
    took = {row["chapter"]: int(row["seconds"]) for row in rows}
    return took.get(chapter.path.stem)


def _rounded(seconds: int) -> str:
    if seconds > 90:
        return f"{math.ceil(seconds / 60)} min"
    return f"{10 * max(math.ceil(seconds / 10), 1)} s"


def trains(chapter: Chapter) -> bool:
    """Whether the chapter, when it is run, makes steps of an optimiser."""
    cells = (cell.source for cell in chapter.cells if "export" not in cell.tags)
    return any(STEPS.search(cell) for cell in cells)


def preface(name: str, root: Path = ROOT) -> str:
    """One sentence or two in Markdown; nothing for a page that has no number."""
    chapter = _numbered(root).get(name)
    if chapter is None:
        return ""
    said = [f"{minutes(chapter, root)} min to read", *running(chapter, root)]
    before = [
        f"{{ref}}`{labels(_numbered(root)[page].path.read_text(encoding='utf-8'))[0]}`"
        for page in builds_on(name, root)
    ]
    if before:
        said.append(f"builds on {', '.join(before)}")
    if trains(chapter):
        said.append("its cells train a network")
    return f"{'; '.join(said)}."
