"""Pages are read and written by as many processes as there are cores."""

from __future__ import annotations

import os

from sphinx.application import Sphinx
from sphinx.config import Config

# The first numbers sections when all pages have been read, the second is for LaTeX.
# Neither keeps anything of a page, and neither says so.
SAFE = ("sphinx_multitoc_numbering", "sphinx_jupyterbook_latex")


def use_all_cores(app: Sphinx, _: Config) -> None:
    """Say what `jupyter-book build` has no option for."""
    app.parallel = len(os.sched_getaffinity(0))
    for name in SAFE:
        app.extensions[name].parallel_read_safe = True


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("config-inited", use_all_cores)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
