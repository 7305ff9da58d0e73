"""A badge with the module's name on every cell that belongs to the package.

It leads to the module's reference; and the reference leads to the badge.
"""

from __future__ import annotations

from typing import Any

from api_reference import definitions
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform


class AddBadges(SphinxPostTransform):
    """Put a small text node in front of the code of each exported cell of a page.

    It comes after cells that are folded have been: myst-nb looks for the code in the
    first place.
    """

    default_priority = 250

    def run(self, **_: Any) -> None:
        """Called by Sphinx, once a page."""
        module = self.env.metadata[self.env.docname].get("module")
        if not module:
            return
        for cell in self.document.findall(nodes.container):
            if (
                cell.get("nb_element") == "cell_code"
                and "tag_export" in cell["classes"]
            ):
                badge = nodes.container(classes=["export-badge"])
                name = f"diffussm.{module}"
                address = f"api.html#{nodes.make_id(f'api {name}')}"
                link = nodes.reference("", name, refuri=address, internal=True)
                badge += nodes.inline("", "", link)
                code = next(cell.findall(nodes.literal_block))
                badge["ids"] = [f"def-{name}" for name in definitions(code.astext())]
                cell.insert(0, badge)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_post_transform(AddBadges)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
