"""The path through the book, read from `_toc.yml`: its parts with their chapters."""

from __future__ import annotations

import itertools
from functools import lru_cache
from pathlib import Path

import yaml

from tools.book import ROOT, Chapter, labels, read_chapter

__all__ = ["COLORS", "parts", "path"]

# Dark enough to be read as text on white, and told apart by colour-blind readers.
COLORS = ("#0072B2", "#007A59", "#B84F00", "#AA4499", "#7A6000")


@lru_cache
def parts(root: Path = ROOT, numbered: bool = True) -> list[tuple[str, list[Chapter]]]:
    """The numbered parts of the book with their chapters, in the order of reading; or
    those without numbers.
    """
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    return [
        (
            part["caption"],
            [read_chapter(root / f"{p['file']}.md", root) for p in part["chapters"]],
        )
        for part in toc["parts"]
        if "caption" in part and part.get("numbered", False) is numbered
    ]


def path(about: dict[str, str], root: Path = ROOT) -> str:
    """All parts in Markdown: a part's name, one sentence about it, its chapters.

    Raises:
        ValueError: a part has no sentence, or a sentence no part.
    """
    numbered, other = parts(root), parts(root, numbered=False)
    captions = [caption for caption, _ in numbered + other]
    if sorted(about) != sorted(captions):
        raise ValueError(
            f"sentences about {sorted(about)}: expected one about each part of "
            f"_toc.yml, {sorted(captions)}"
        )
    text, count = [], itertools.count(1)
    for caption, pages in numbered + other:
        text.append(f":::{{container}} part\n**{caption}.** {about[caption]}\n")
        for page in pages:
            mark = f"{next(count)}." if (caption, pages) in numbered else "-"
            label = labels(page.path.read_text(encoding="utf-8"))[0]
            text.append(f"{mark} {{ref}}`{label}`")
        text.append(":::\n")
    return "\n".join(text)
