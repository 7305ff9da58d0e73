"""All pages are read again when what makes them has changed.

Sphinx compares a page's text, and the settings. So the makers are a setting.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from sphinx.application import Sphinx

# The extensions, what they call, and how long the chapters took.
MAKERS = (
    "book/_ext/*.py",
    "tools/*.py",
    "benchmarks/results/chapters.json",
    "benchmarks/results/quick.json",
)


def digest(root: Path) -> str:
    """A number for what the makers are now."""
    files = sorted(file for pattern in MAKERS for file in root.glob(pattern))
    parts = [file.name.encode() + file.read_bytes() for file in files]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_config_value("page_makers", digest(Path(app.srcdir)), "env", [str])
    return {"parallel_read_safe": True, "parallel_write_safe": True}
