"""Execute and render one page of the book, quickly: ``make page P=training``.

References to other pages stay open; ``make book`` resolves them. What the page puts out
is kept, so that ``make book`` need not run it again.
"""

from __future__ import annotations

import argparse
import difflib
import subprocess
import sys
from pathlib import Path

from tools.book import ROOT

__all__ = ["find", "main"]


def find(name: str, root: Path = ROOT) -> str:
    """The page that a name means: `34_training`, `training` or `book/34_training.md`.

    Raises:
        ValueError: there is none; the nearest is named.
    """
    word = Path(name).stem
    pages = sorted(path.stem for path in (root / "book").glob("*.md"))
    found = [page for page in pages if word in (page, page.lstrip("0123456789_"))]
    if not found:
        topics = {page.lstrip("0123456789_"): page for page in pages}
        near = difflib.get_close_matches(word, [*pages, *topics], 1, 0.0)
        raise ValueError(f"no page {name!r} in book/; the nearest is {near[0]}")
    return f"book/{found[0]}"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.page", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("page", help="such as 34_training, or training")
    try:
        page = find(parser.parse_args(arguments).page)
    except ValueError as error:
        print(f"page: {error}", file=sys.stderr)
        return 2
    # One folder a page: Sphinx then keeps what it has read of this one only.
    build = ROOT / "_build" / "page" / Path(page).name
    build.mkdir(parents=True, exist_ok=True)
    toc = build / "toc.yml"
    toc.write_text(f"format: jb-book\nroot: {page}\n", encoding="utf-8")
    options = ["--toc", str(toc), "--path-output", str(build), "--quiet"]
    command = [
        str(Path(sys.executable).with_name("jupyter-book")),
        "build",
        str(ROOT),
        *options,
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    said = (done.stdout + done.stderr).splitlines()
    if done.returncode == 0:  # else all of it may help
        unresolved = ("[myst.xref", "[ref.", "undefined label")
        said = [line for line in said if "WARNING" in line or "ERROR" in line]
        said = [line for line in said if not any(kind in line for kind in unresolved)]
    print("\n".join(said), end="\n" if said else "")
    if done.returncode == 0:
        print(f"open file://{build / '_build' / 'html' / page}.html")
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
