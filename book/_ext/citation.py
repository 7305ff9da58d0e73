"""How to cite: what `CITATION.cff` says, as BibTeX on the page.

The directive `how-to-cite` shows the paper and this book; there is no second copy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

FILE = "CITATION.cff"
KINDS = {"article": "article", "software": "misc"}
FIELDS = "title", "journal", "year", "doi", "url"


def bibtex(key: str, work: dict[str, Any]) -> str:
    """A work of the Citation File Format as an entry of BibTeX.

    The name of an author who is no person stands in braces: it has no first name.
    """
    people = [
        f"{one['family-names']}, {one['given-names']}"
        if "family-names" in one
        else f"{{{one['name']}}}"
        for one in work["authors"]
    ]
    said = {"author": " and ".join(people)}
    said |= {name: work[name] for name in FIELDS if work.get(name)}
    rows = "".join(f"  {name} = {{{text}}},\n" for name, text in said.items())
    return f"@{KINDS[work['type']]}{{{key},\n{rows}}}"


def entries(root: Path, year: str, url: str = "") -> str:
    """The paper, and this book with the year and the address of its settings."""
    book = yaml.safe_load((root / FILE).read_text(encoding="utf-8"))
    paper = bibtex("diffussm", book["preferred-citation"])
    return f"{paper}\n\n{bibtex('diffussm-book', book | {'year': year, 'url': url})}"


class HowToCite(SphinxDirective):
    """A block of BibTeX."""

    def run(self) -> list[nodes.Node]:
        """Called by the parser."""
        self.env.note_dependency(str(Path(self.env.srcdir, FILE)))
        config = self.config
        url = config.html_theme_options.get("repository_url", "")
        text = entries(Path(self.env.srcdir), config.copyright, url)
        return [nodes.literal_block(text, text, language="bibtex")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("how-to-cite", HowToCite)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
