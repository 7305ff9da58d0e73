"""Outputs of a quick run (`QUICK=1`) have a cache of their own."""

from __future__ import annotations

import sys

from sphinx.application import Sphinx
from sphinx.config import Config


def keep_apart(app: Sphinx, config: Config) -> None:
    """Name another cache. It is a setting, so that pages are read again as well."""
    from tools.book import is_quick

    if is_quick():
        config.nb_execution_cache_path += "_quick"


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    sys.path.insert(0, str(app.srcdir))
    app.connect("config-inited", keep_apart)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
