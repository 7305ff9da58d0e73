"""Pages that load what they show, and nothing else.

The theme loads two megabytes of icons: `_templates` and `_static/icons.css` have the
two dozen that are used. Jupyter Book loads MathJax on every page.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

FORMULA = 'class="math '


def drop_mathjax(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Leave MathJax out where there is no mathematics."""
    if FORMULA not in context.get("body", ""):
        context["script_files"] = [
            script
            for script in context.get("script_files", [])
            if "mathjax" not in f"{script} {getattr(script, 'attributes', '')}".lower()
        ]


def drop_icons(app: Sphinx, failed: Exception | None) -> None:
    """Do not publish what no page asks for."""
    shutil.rmtree(Path(app.outdir, "_static", "vendor"), ignore_errors=True)
    for path in Path(app.outdir, "_static").glob("*/*.map"):
        path.unlink()


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("html-page-context", drop_mathjax, priority=900)
    app.connect("build-finished", drop_icons)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
