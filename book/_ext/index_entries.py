"""The index lists symbols and sources too, not only terms, functions and classes."""

from __future__ import annotations

import re
import sys
import unicodedata
from typing import Any

from docutils import nodes
from pybtex.richtext import Text
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform

Entry = tuple[str, str, str, str, str | None]

NOTATION, HEADING = "book/notation", "Symbols"
BRACKET = "\ue000"  # stands for one of a formula, where words end at a bracket
HIDDEN = {ord("("): BRACKET}
ACCENTS = {"bar": "\u0304", "overline": "\u0304", "tilde": "\u0303"}
SIGNS = {
    "dots": "…",
    "downarrow": "↓",
    "leftarrow": "←",
    "mathbf": "",
    "mid": "| ",
    "rightarrow": "→",
    "uparrow": "↑",
    "varepsilon": "ε",
}


def _sign(command: str) -> str:
    """What a command of TeX stands for: a sign of the list, or a Greek letter."""
    if command in SIGNS:
        return SIGNS[command]
    size = "CAPITAL" if command[0].isupper() else "SMALL"
    return unicodedata.lookup(f"GREEK {size} LETTER {command.upper()}")


def plain(formula: str) -> str:
    r"""A symbol without TeX, as an index has it: ``\bar\alpha_t`` is ᾱ_t."""
    accents = "|".join(ACCENTS)
    text = re.sub(
        rf"\\(?!(?:{accents})\b)([A-Za-z]+) ?", lambda m: _sign(m[1]), formula
    )
    text = re.sub(rf"\\({accents}) ?(\w)", lambda m: m[2] + ACCENTS[m[1]], text)
    return unicodedata.normalize("NFC", text)


def _meaning(cell: nodes.Element) -> str:
    """The words of a cell, up to a semicolon, a colon or a bracket."""
    shown = cell.deepcopy()
    for formula in list(shown.findall(nodes.math)):
        try:
            text = plain(formula.astext())
        except KeyError:  # more than an index can show
            text = ""
        formula.replace_self(nodes.Text(text.translate(HIDDEN)))
    said = re.split(r"[;:(]", shown.astext())[0].strip(" ,")
    return said.replace(BRACKET, "(")


def symbols(table: nodes.table) -> list[Entry]:
    """The entries of a table of symbols; none if it is another table."""
    head, *rows = table.findall(nodes.row)
    if head.children[0].astext() != "symbol":
        return []
    shown = [
        f"{plain(formula.astext())} ({_meaning(row[2])})"
        for row in rows
        for formula in row[0].findall(nodes.math)
    ]
    return [("single", text, table["ids"][0], "", HEADING) for text in shown]


class ListSymbols(SphinxTransform):
    """Put the entries of the page of notation into it."""

    default_priority = 800  # before Sphinx collects the entries of a page

    def apply(self, **_: Any) -> None:
        """Called by Sphinx, once a page."""
        if self.env.docname != NOTATION:
            return
        for table in list(self.document.findall(nodes.table)):
            if found := symbols(table):
                index = addnodes.index(entries=found)
                table.parent.insert(table.parent.index(table), index)


def list_sources(app: Sphinx, env: BuildEnvironment) -> None:
    """Add the sources that are cited; they are known when all pages have been read."""
    from tools.readable import readable

    listed = env.get_domain("index").data["entries"]
    for page in {c.bibliography_key.docname for c in env.get_domain("cite").citations}:
        listed[page] = []
    for source in env.get_domain("cite").citations:
        who = readable(f"{{cite}}`{source.key}`", suffix="")
        title = str(Text.from_latex(source.entry.fields["title"])).replace(";", ",")
        entry: Entry = ("single", f"{who}: {title}", source.citation_id, "", None)
        listed[source.bibliography_key.docname].append(entry)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    sys.path.insert(0, str(app.srcdir))
    app.add_transform(ListSymbols)
    app.connect("env-updated", list_sources, priority=900)  # bibtex's is 500
    return {"parallel_read_safe": True, "parallel_write_safe": True}
