"""The front page's path through the book: each part, a sentence, its chapters.

The directive `path` holds the sentences, a line `Part: sentence` each; the rest is read
from `_toc.yml`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class PathThroughTheBook(SphinxDirective):
    """A card for each part, every chapter a link."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Called by the parser."""
        from tools.overview import path

        sentences = dict(line.split(": ", 1) for line in self.content if line)
        self.env.note_dependency(str(Path(self.env.srcdir, "_toc.yml")))
        cards = self.parse_text_to_nodes(path(sentences, Path(self.env.srcdir)))
        return [nodes.container("", *cards, classes=["path"])]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    sys.path.insert(0, str(app.srcdir))
    app.add_directive("path", PathThroughTheBook)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
