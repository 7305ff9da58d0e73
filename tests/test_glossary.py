"""No page uses a term before it is explained, or it links to the glossary."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.book import ROOT, labels, prose, reading_order

BOOK = ROOT / "book"
ENTRY = re.compile(r"^(\S.*)\n  (.*?)\{ref\}`([\w-]+)`$", re.MULTILINE)
NEXT = "\n"
# The front page says what the book is about; the other two are looked things up in.
AT_HAND = ("index", "notation", "glossary")


def order() -> list[Path]:
    """The pages in the order in which they are read."""
    return [ROOT / f"{name}.md" for name in reading_order()]


def entries() -> dict[str, str]:
    """Each term of the glossary, with the label of the page that explains it."""
    text = (BOOK / "glossary.md").read_text(encoding="utf-8")
    block = text.split("```{glossary}\n")[1].split("\n```")[0]
    found = {term: label for term, _, label in ENTRY.findall(block)}
    terms = [line for line in block.splitlines() if re.match(r"\S", line)]
    assert list(found) == terms, "a term, and one line that ends with its page"
    return found


def uses(term: str) -> re.Pattern[str]:
    """A name with capitals is looked for as it is written, a word in any case."""
    words = re.escape(term).replace(r"\ ", r"\s+").replace(r"\-", r"[-\s]\s*")
    flags = 0 if re.search("[A-Z]", term[1:]) else re.IGNORECASE
    return re.compile(rf"(?<![\w-]){words}(?:s|es)?(?![\w-])", flags)


def links(text: str) -> set[str]:
    """The terms that a page links to the glossary."""
    return set(re.findall(r"\{term\}`(?:[^`<]*<)?([^`<>]+)>?`", text))


def early(
    pages: dict[str, tuple[str, str]], terms: dict[str, str], explains: dict[str, str]
) -> list[str]:
    """Uses of a term on a page before the one that explains it, without a link; a page
    is its prose and its source.
    """
    names = list(pages)
    return [
        f"{name} uses {term!r} before {explains[label]}: link it, {{term}}`{term}`"
        for term, label in terms.items()
        for name in names[: names.index(explains[label])]
        if name not in AT_HAND
        and uses(term).search(pages[name][0])
        and term not in links(pages[name][1])
    ]


@pytest.fixture(scope="module")
def explains() -> dict[str, str]:
    """The page of each label."""
    found: dict[str, str] = {}
    for path in order():
        text = path.read_text(encoding="utf-8")
        found |= dict.fromkeys(labels(text), path.stem)
    return found


def test_terms_stand_in_order_and_their_pages_use_them(
    explains: dict[str, str],
) -> None:
    terms = entries()
    assert list(terms) == sorted(terms, key=str.lower)
    for term, label in terms.items():
        page = BOOK / f"{explains[label]}.md"
        assert uses(term).search(page.read_text(encoding="utf-8")), (term, page.name)


def test_no_page_uses_a_term_before_it_is_explained(explains: dict[str, str]) -> None:
    pages = {
        path.stem: (
            NEXT.join(text for _, text in prose(path)),
            path.read_text(encoding="utf-8"),
        )
        for path in order()
    }
    assert not early(pages, entries(), explains)


def test_the_search_finds_an_early_use_and_accepts_a_link() -> None:
    text = {
        "a": "Its FID is\nlow, and a micro-\nbatch.",
        "b": "The {term}`FID`, later FID again; {term}`scores <KID>`, KID; kid, Fids",
        "c": "FIDs, KID and micro-batches",
    }
    pages = {name: (written, written) for name, written in text.items()}
    terms = dict.fromkeys(("FID", "KID", "micro-batch"), "ch-c")
    found = early(pages, terms, {"ch-c": "c"})
    assert [fault.split(" before")[0] for fault in found] == [
        "a uses 'FID'",
        "a uses 'micro-batch'",
    ]
