"""What the package says about the book: titles and labels that exist."""

from __future__ import annotations

import difflib
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.book import ROOT, labels, read_chapter

__all__ = ["NUMBER", "Book", "read_book", "resolve"]

# A number says nothing once a chapter has moved.
NUMBER = re.compile(r"\b(?:chapters?\s|ch\.\s?)\d+", re.IGNORECASE)
TITLE = re.compile(r'\b(?:chapter|ch\.)\s(?:\s*#?\s*)\\?"([^"\\]+)\\?"')
LABEL = re.compile(r"(?<![\w/.-])(?:eq|ch|fig)-[a-z0-9]+(?:-[a-z0-9]+)*\b")
ROLE = re.compile(r"\{(ref|eq|numref)\}`([\w-]+)`")


@dataclass(frozen=True)
class Book:
    """The titles of its pages, and its labels, each with the title of its page."""

    titles: tuple[str, ...]
    labels: dict[str, str]

    def faults(self, source: str) -> Iterator[tuple[int, str]]:
        """What a cell says of the book that is not so: (line, message)."""
        for found in NUMBER.finditer(source):
            yield (
                source.count("\n", 0, found.start()) + 1,
                f'`{found[0]}`: chapters move; write ch. "Title"',
            )
        for found in TITLE.finditer(source):
            title = re.sub(r"\s*\n\s*#?\s*", " ", found[1])
            if title not in self.titles:
                yield (
                    source.count("\n", 0, found.start()) + 1,
                    f'no chapter has the title "{title}"{_nearest(title, self.titles)}',
                )
        for line, text, _ in _prose(source):
            for found in LABEL.finditer(text):
                if found[0] not in self.labels:
                    yield (
                        line + text.count("\n", 0, found.start()),
                        "the book has no label "
                        f"{found[0]}{_nearest(found[0], self.labels)}",
                    )


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), 1, 0.0)
    return f"; the nearest is {near[0]}" if near else ""


def read_book(root: Path = ROOT) -> Book:
    """Every page of the book, numbered or not."""
    titles: list[str] = []
    found: dict[str, str] = {}
    for path in sorted((root / "book").glob("*.md")):
        title = read_chapter(path, root).title
        titles.append(title)
        found |= dict.fromkeys(labels(path.read_text(encoding="utf-8")), title)
    return Book(tuple(filter(None, titles)), found)


def _prose(source: str) -> Iterator[tuple[int, str, int]]:
    """The comments and plain strings of a module: line, text, offset."""
    starts = [0]
    for text in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(text))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT or (
            token.type == tokenize.STRING and "f" not in token.string[:2].lower()
        ):
            line, column = token.start
            yield line, token.string, starts[line - 1] + column


def resolve(source: str, book: Book) -> str:
    """Roles become words: {ref} to a chapter its title, others their label."""

    def words(role: re.Match[str]) -> str:
        label = role[2]
        if role[1] == "ref" and label.startswith("ch-") and label in book.labels:
            return f'ch. "{book.labels[label]}"'
        return label

    for _, text, start in reversed(list(_prose(source))):
        source = source[:start] + ROLE.sub(words, text) + source[start + len(text) :]
    return source
