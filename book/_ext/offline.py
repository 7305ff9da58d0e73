"""Pages that ask no other host for anything.

MathJax comes out of an installed package, and the scripts that would start a kernel
elsewhere are left out.
"""

from __future__ import annotations

import re
import shutil
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

# 1.2 MB of the package's 24: TeX as input, HTML as output with its fonts, and MathML
# beside it for screen readers. Its menu alone would be 0.4, and every formula with one
# is a stop of the tab key.
MATHJAX = "sphinx-mathjax-offline"
USED = (
    "startup.js",
    "core.js",
    "input/tex.js",
    "output/chtml.js",
    "output/chtml/fonts",
    "a11y/assistive-mml.js",
)


def copy_mathjax(app: Sphinx) -> None:
    """Put MathJax where ``mathjax_path`` points to."""
    source = Path(str(distribution(MATHJAX).locate_file(f"{MATHJAX}/static/mathjax")))
    target = Path(app.outdir, "_static", "mathjax")
    for name in USED:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
        else:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)


def drop_scripts(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Leave out Thebe, which names a CDN and which Jupyter Book always adds.

    And the state of widgets, for they are shown at a kernel only.
    """
    context["script_files"] = [
        script
        for script in context.get("script_files", [])
        if not re.search(
            "thebe|widget-state",
            f"{script} {getattr(script, 'attributes', '')}".lower(),
        )
    ]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", copy_mathjax)
    app.connect("html-page-context", drop_scripts, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
