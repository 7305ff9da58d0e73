"""How long each chapter runs: ``python -m benchmarks.chapters`` after `make chapters`.

`make chapters` runs two chapters at a time and keeps with their outputs how long each
took. The line under a chapter's title is made from the record.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jupyter_cache import get_cache

from benchmarks.common import command, report
from tools.book import ROOT

CACHE = ROOT / "_build" / ".jupyter_cache"


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    told = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser("python -m benchmarks.chapters", description=told)
    parser.parse_args(argv)
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
