"""How long each chapter runs: ``python -m benchmarks.chapters`` after `make chapters`.

`make chapters` runs two chapters at a time and keeps with their outputs how long each
took. ``--quick`` runs those that have a quick mode in it (`QUICK=1`), one after the
other. The line under a chapter's title is made from the two records.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from jupyter_cache import get_cache

from benchmarks.common import command, report
from tools.book import ROOT, Chapter, chapters
from tools.preface import has_quick_mode

CACHE = ROOT / "_build" / ".jupyter_cache"


def quick_seconds(chapter: Chapter) -> int:
    """How long a chapter runs in quick mode."""
    import jupytext
    from nbclient import NotebookClient

    os.environ["QUICK"] = "1"
    notebook, folder = jupytext.read(chapter.path), str(chapter.path.parent)
    start = time.monotonic()
    NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": folder}}
    ).execute()
    return round(time.monotonic() - start)


def quick() -> int:
    """Run and record the quick modes; returns the exit status."""
    rows = [
        {"chapter": chapter.path.stem, "seconds": quick_seconds(chapter)}
        for chapter in filter(has_quick_mode, chapters())
    ]
    title = "Seconds that each chapter runs in quick mode, one at a time"
    return report("quick", title, rows, by="chapters --quick")


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    told = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser("python -m benchmarks.chapters", description=told)
    parser.add_argument("--quick", action="store_true", help="measure the quick modes")
    if parser.parse_args(argv).quick:
        return quick()
    if not CACHE.is_dir():
        parser.error(f"{CACHE} is not there: run `make chapters` first")
    took = {
        Path(record.uri).stem: round(record.data["execution_seconds"])
        for record in get_cache(str(CACHE)).list_cache_records()
    }
    rows = [{"chapter": name, "seconds": took[name]} for name in sorted(took)]
    return report("chapters", "Seconds that each chapter runs, two at a time", rows)


if __name__ == "__main__":
    raise SystemExit(command(main))
