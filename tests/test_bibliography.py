"""The sources: each has a link, each is cited, and what is cited is there."""

from __future__ import annotations

import re
from urllib.parse import urlparse

import pytest
from pybtex.database import BibliographyData, parse_file

from tools.book import ROOT

CITE = re.compile(r"\{cite(?::\w+)?\}`([^`]+)`")


@pytest.fixture(scope="module")
def sources() -> BibliographyData:
    return parse_file(str(ROOT / "book" / "references.bib"), bib_format="bibtex")


def test_every_source_has_a_link(sources: BibliographyData) -> None:
    without = [
        key
        for key, entry in sources.entries.items()
        if "doi" not in entry.fields
        and urlparse(entry.fields.get("url", "")).scheme != "https"
    ]
    assert not without, "give these a `doi`, or a `url` that begins with https"


def test_what_is_cited_is_there_and_the_other_way_round(
    sources: BibliographyData,
) -> None:
    pages = sorted((ROOT / "book").glob("*.md"))
    cited = {
        key.strip()
        for page in pages
        for keys in CITE.findall(page.read_text(encoding="utf-8"))
        for key in keys.split(",")
    }
    assert cited == set(sources.entries)
