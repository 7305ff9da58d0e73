"""A badge with the module's name on every cell that belongs to the package."""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx


def add_badges(app: Sphinx, doctree: nodes.document) -> None:
    """Put a small text node in front of the code of each exported cell of the page just read."""
    module = app.env.metadata[app.env.docname].get("module")
    if not module:
        return
    for cell in doctree.findall(nodes.container):
        if cell.get("nb_element") == "cell_code" and "tag_export" in cell["classes"]:
            badge = nodes.container(classes=["export-badge"])
            badge += nodes.inline(text=f"diffussm.{module}")
            cell.insert(0, badge)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect(
        "doctree-read", add_badges, priority=900
    )  # after the page's metadata has been collected
    return {"parallel_read_safe": True, "parallel_write_safe": True}
