"""What a page says to a screen reader, and where a line breaks, where the theme and
docutils have it wrong.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

# A heading without words is none; a list's items are not bibliographic entries, and a
# role that is not allowed there hides what the element is.
SPOKEN = (
    (re.compile(r"<th([^>]*)>\s*(?:<p>\s*</p>)?\s*</th>"), r"<td\1></td>"),
    (re.compile(r' role="(?:list|doc-biblioentry|doc-backlink)"'), ""),
)
# To a browser a formula is a picture, and the full stop behind it begins a line.
UNBROKEN = (
    re.compile(r'(<span class="math[^"]*">\\\([^<]*\\\)</span>[.,;:!?)\]’”]+)'),
    r'<span class="unbroken">\1</span>',
)
# It also begins a line inside --steps and 1e-4, behind a hyphen.
PRINTED = re.compile(r'<div class="output [^>]*highlight-.*?</pre>', re.DOTALL)
HYPHENED = re.compile(r"(?<=[\s(;])(?:--\w[\w.-]*|[\d.]+e-\d+)(?![^<]*>)")


def keep_hyphened(body: str) -> str:
    """The HTML of a page, options and powers of ten in what is printed unbroken."""
    mark = partial(HYPHENED.sub, r'<span class="unbroken">\g<0></span>')
    return PRINTED.sub(lambda output: mark(output[0]), body)


GAP = re.compile(r"\S {2,}\S")


class KeepColumns(SphinxPostTransform):
    """Mark what a cell has printed in columns, which scrolls on a phone."""

    default_priority = 500  # when what cells show is on the page

    def run(self, **_: Any) -> None:
        """Called by Sphinx, once a page."""
        for block in self.document.findall(nodes.literal_block):
            gaps = sum(bool(GAP.search(row)) for row in block.astext().splitlines())
            if "output" in block["classes"] and gaps > 1:
                block["classes"].append("columns")


def mend(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Called by Sphinx for each page, with its text as HTML."""
    for wrong, right in (*SPOKEN, UNBROKEN):
        context["body"] = wrong.sub(right, context.get("body", ""))
    context["body"] = keep_hyphened(context["body"])


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_post_transform(KeepColumns)
    app.connect("html-page-context", mend, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
