"""Format the chapters' code, and store them as jupytext does.

``python -m tools.tidy`` rewrites what differs, ``--check`` only reports it. Name
chapters to tidy only those.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
from jupytext.config import load_jupytext_config
from ruff import find_ruff_bin

from tools.book import ROOT

__all__ = ["main", "tidied"]

# As JupyterLab writes it into a notebook that it runs
KERNEL = {
    "display_name": "Python 3 (ipykernel)",
    "language": "python",
    "name": "python3",
}


def tidied(path: Path) -> str:
    """A chapter as jupytext writes it; each caption is one paragraph."""
    config = load_jupytext_config(str(path))
    notebook = jupytext.read(path, config=config)
    notebook.metadata["kernelspec"] = dict(KERNEL)
    for cell in notebook.cells:
        settings = cell.metadata.get("mystnb", {})
        for owner, key in (("figure", "caption"), ("image", "alt")):
            if key in settings.get(owner, {}):
                settings[owner][key] = " ".join(settings[owner][key].split())
    formatted = _formatted(nbformat.writes(notebook))
    for cell, done in zip(notebook.cells, formatted.cells, strict=True):
        cell.source = done.source
    text: str = jupytext.writes(notebook, fmt="md:myst", config=config)
    return text


def _formatted(text: str) -> nbformat.NotebookNode:
    """The notebook with its code as ruff formats it."""
    command = [
        find_ruff_bin(),
        "format",
        "--quiet",
        "--stdin-filename=chapter.ipynb",
        "-",
    ]
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, cwd=ROOT, check=True
    )
    notebook: nbformat.NotebookNode = nbformat.reads(done.stdout, as_version=4)
    return notebook


def main() -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.tidy", description="Store chapters as jupytext does."
    )
    parser.add_argument(
        "chapters",
        nargs="*",
        type=Path,
        help="only these, such as book/11_state_space.md",
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; name what differs"
    )
    options = parser.parse_args()
    different = 0
    for path in options.chapters or sorted((ROOT / "book").glob("[0-9][0-9]_*.md")):
        text = tidied(path)
        if text.rstrip("\n") == path.read_text(encoding="utf-8").rstrip("\n"):
            continue
        different += 1
        if options.check:
            print(
                f"{path.name} is not as jupytext writes it: run `make tidy`",
                file=sys.stderr,
            )
        else:
            path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
            print(f"tidy: wrote {path.name}")
    return int(options.check and different > 0)


if __name__ == "__main__":
    raise SystemExit(main())
