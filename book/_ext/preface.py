"""A line under each numbered chapter's title: how long it is, what it builds on."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx


def add_preface(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the line into the text, before it is parsed; called by Sphinx."""
    from tools.preface import preface

    line = preface(page, Path(app.srcdir))
    if line:
        lines = source[0].split("\n")
        title = next(i for i, text in enumerate(lines) if text.startswith("# "))
        lines.insert(title + 1, f"\n```{{container}} preface\n{line}\n```")
        source[0] = "\n".join(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    sys.path.insert(0, str(app.srcdir))
    app.connect("source-read", add_preface)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
