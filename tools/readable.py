"""References as words and links, for notebooks: Sphinx's roles mean nothing there.

`readable` and `restored` are inverse to each other, so that a chapter that was opened
and saved in JupyterLab is the text that it was. What was a role is kept in the link's
title, which a browser shows on hover.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tools.book import ROOT, labels, read_chapter, reading_order
from tools.overview import parts

__all__ = ["Place", "places", "readable", "restored"]

ROLES = "ref|numref|eq|cite|term|glue:text"
ROLE = re.compile(rf"(?<!`)\{{({ROLES})\}}`([^`\"()]+)`")
LINK = re.compile(rf'\[[^\]]*\]\([^\s()]+ "\{{({ROLES})\}} ([^`"()]+)"\)')
NAMED = re.compile(r"(.+?)\s*<([^<>]+)>", re.DOTALL)
KINDS = {"fig": "Fig.", "tab": "Table", "eq": ""}


@dataclass(frozen=True)
class Place:
    """Where a label is: a page, by its file's name, and the words that name it."""

    page: str
    words: str


@lru_cache
def places(root: Path = ROOT) -> dict[str, Place]:
    """The labels of all pages."""
    numbered = [c.path.stem for _, part in parts(root) for c in part]
    found: dict[str, Place] = {}
    for page in map(Path, reading_order(root)):
        file = root / f"{page}.md"
        text = file.read_text(encoding="utf-8")
        titles = dict(re.findall(r"^\(([\w-]+)\)=\n+#+ (.+)$", text, re.MULTILINE))
        seen = dict.fromkeys(KINDS, 0)
        for label in labels(text):
            kind = label.partition("-")[0]
            words = titles.get(label, read_chapter(file, root).title)
            if kind in KINDS and label not in titles:
                seen[kind] += 1
                words = f"{KINDS[kind]} of “{words}”".strip()
                if page.stem in numbered:
                    number = f"{numbered.index(page.stem) + 1}.{seen[kind]}"
                    words = (
                        f"{KINDS[kind]}\xa0{number}" if kind != "eq" else f"({number})"
                    )
            found[label] = Place(page.stem, words)
    return found


@lru_cache
def _sources(root: Path) -> dict[str, str]:
    """What the bibliography's keys stand for: `Gu et al., 2022`."""
    from pybtex.database import parse_file

    said = {}
    for key, entry in parse_file(str(root / "book" / "references.bib")).entries.items():
        names = [
            " ".join(p.prelast_names + p.last_names) for p in entry.persons["author"]
        ]
        who = names[0] if len(names) == 1 else " and ".join(names)
        who = f"{names[0]} et al." if len(names) > 2 else who
        said[key] = f"{re.sub('[{}]', '', who)}, {entry.fields.get('year', '')}"
    return said


def _words(role: str, target: str, root: Path) -> tuple[str, str]:
    """What a role is read as, and the page that it leads to."""
    given = NAMED.fullmatch(target)
    words, label = (given[1], given[2]) if given else ("", target)
    if role == "cite":
        keys = [key.strip() for key in label.split(",")]
        return "; ".join(_sources(root)[key] for key in keys), "bibliography"
    if role == "term":
        return words or label, "glossary"
    if role == "glue:text":
        key = label.partition(":")[0].partition("-")[2]  # without the page's name
        return f"⟨{key.replace('-', ' ')}⟩", ""
    place = places(root)[label]
    return words or place.words, place.page


def readable(
    text: str, *, suffix: str = ".md", keep: str = "", root: Path = ROOT
) -> str:
    """Markdown with its roles as links to pages.

    suffix: of the linked files; "" makes plain text. keep: a page whose equations are
    left as they are, because JupyterLab numbers those of the open one by itself.
    """

    def link(found: re.Match[str]) -> str:
        role, target = found[1], found[2]
        try:
            words, page = _words(role, target, root)
        except KeyError:
            return found[0]
        if role == "eq" and page == keep:
            return found[0]
        words = re.sub(r"[\[\]]", "", words)
        if not suffix:
            return words
        address = f"{page}{suffix}" if page else "#"
        return f'[{words}]({address} "{{{role}}} {target}")'

    changed = ROLE.sub(link, text)
    return changed if not suffix or restored(changed) == text else text


def restored(text: str) -> str:
    """What `readable` was given."""
    return LINK.sub(lambda found: f"{{{found[1]}}}`{found[2]}`", text)
