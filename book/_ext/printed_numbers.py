"""Numbers that a page computes are printed as the text around them writes numbers.

Python formats -5.0, 6e-06, 1500 and 2026-11-23. In a sentence, and alone in the cell
of a table, they become −5.0, 6 · 10⁻⁶, 1,500, and a date that does not break.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

NUMBER = re.compile(r"([+-]?)(\d[\d,]*)(\.\d+)?(?:e([+-]\d+))?( ?%)?")
DATE = re.compile(r"\b\d{4}-\d\d-\d\d\b")
HYPHEN = "\N{NON-BREAKING HYPHEN}"
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def printed(text: str) -> str:
    """A number, or the dates in a text, as they are printed; all else as it is."""
    number = NUMBER.fullmatch(text)
    if number is None:
        return DATE.sub(lambda date: date[0].replace("-", HYPHEN), text)
    sign, whole, rest, power, unit = number.groups(default="")
    if "," not in whole and len(whole) > 3 and not whole.startswith("0"):
        whole = f"{int(whole):,}"
    scale = f" · 10{str(int(power)).translate(RAISED)}" if power else ""
    return sign.replace("-", "−") + whole + rest + scale.replace(" ", "\xa0") + unit


class PrintNumbers(SphinxPostTransform):
    """Rewrite what is glued into a sentence, and what is alone in a cell."""

    default_priority = 500  # when what cells show is on the page

    def run(self, **_: Any) -> None:
        """Called by Sphinx, once a page."""
        glued = [
            node
            for node in self.document.findall(nodes.inline)
            if "pasted-text" in node["classes"]
        ]
        for place in [*glued, *self.document.findall(nodes.entry)]:
            for text in list(place.findall(nodes.Text)):
                if not isinstance(text.parent, nodes.literal | nodes.math):
                    text.parent.replace(text, nodes.Text(printed(text.astext())))


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_post_transform(PrintNumbers)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
