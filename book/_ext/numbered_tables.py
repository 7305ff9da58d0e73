"""Tables that cells show are tables of the book: with a number and a title.

A cell's metadata can give its output a caption and a name, and that makes a *figure* of
it. Where the name begins with `tab-` and the output holds a table, the table gets both,
as with the directive `{table}`.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform


class NumberTables(SphinxTransform):
    """Move the caption of a figure `tab-...` into its table, and drop the figure.

    It comes before the labels of a page are collected.
    """

    default_priority = 840

    def apply(self, **_: Any) -> None:
        """Called by Sphinx, once a page."""
        for figure in list(self.document.findall(nodes.figure)):
            if not any(name.startswith("tab-") for name in figure["names"]):
                continue
            table = next(figure.findall(nodes.table), None)
            caption = next(figure.findall(nodes.caption), None)
            if table is None or caption is None:
                raise ValueError(
                    f"{figure['names'][0]} of {self.env.docname}: expected a caption "
                    "and a table in the output of the cell"
                )
            table.insert(0, nodes.title("", "", *caption.children))
            for key in ("ids", "names"):
                table[key] = figure[key]
            for label in table["ids"]:
                self.document.ids[label] = table
            figure.remove(caption)
            figure.replace_self(figure.children)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_transform(NumberTables)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
