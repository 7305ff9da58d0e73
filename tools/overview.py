"""Draw the path through the book from `_toc.yml`: one numbered box a chapter.

``python -m tools.overview`` writes ``book/figures/overview.svg`` where it differs,
``--check`` only reports it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import textwrap
from html import escape
from pathlib import Path

import yaml

from tools.book import ROOT, Chapter, read_chapter

__all__ = ["draw", "main", "parts"]

# Dark enough to be read as text on white, and told apart by colour-blind readers.
COLORS = ("#0072B2", "#007A59", "#B84F00", "#AA4499", "#7A6000")
COLUMNS = 4
BOX, GAP, MARGIN = (112, 50), (12, 34), 8  # pixels: width and height
LETTERS = 14  # that fit into a box


def parts(root: Path = ROOT) -> list[tuple[str, list[Chapter]]]:
    """The numbered parts of the book with their chapters, in the order of reading."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    return [
        (
            part["caption"],
            [read_chapter(root / f"{p['file']}.md", root) for p in part["chapters"]],
        )
        for part in toc["parts"]
        if part.get("numbered")
    ]


def draw(root: Path = ROOT) -> str:
    """The figure. A part goes on in a row only if all of it fits there."""
    body: list[str] = []
    column = row = number = 0
    before: tuple[int, int] | None = None
    for color, (caption, pages) in zip(
        itertools.cycle(COLORS), parts(root), strict=False
    ):
        if column and column + len(pages) > COLUMNS:
            column, row = 0, row + 1
        for index, page in enumerate(pages):
            if column == COLUMNS:
                column, row = 0, row + 1
            x = MARGIN + column * (BOX[0] + GAP[0])
            y = 30 + row * (BOX[1] + GAP[1])
            number, column = number + 1, column + 1
            if before:
                body.append(_arrow(*before, x, y))
            if index == 0:
                shift = 0 if before is None or before[1] == y else BOX[0] // 2 + 8
                body.append(
                    f'<text x="{x + shift}" y="{y - 8}" fill="{color}" '
                    f'font-weight="600">{escape(caption)}</text>'
                )
            body += _box(x, y, color, number, page.title.partition(":")[0])
            before = x, y
    width = 2 * MARGIN + COLUMNS * BOX[0] + (COLUMNS - 1) * GAP[0]
    height = 30 + row * (BOX[1] + GAP[1]) + BOX[1] + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" role="img" font-family="system-ui, sans-serif" '
            'font-size="13">',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *body,
            "</svg>\n",
        ]
    )


def _box(x: int, y: int, color: str, number: int, title: str) -> list[str]:
    """A rounded box: the number in its corner, the title in the middle."""
    lines = textwrap.wrap(title, LETTERS)
    top = y + BOX[1] / 2 + 6 - 7 * (len(lines) - 1)
    return [
        f'<rect x="{x}" y="{y}" width="{BOX[0]}" height="{BOX[1]}" rx="6" '
        f'fill="{color}" '
        f'fill-opacity="0.08" stroke="{color}" stroke-width="1.4"/>',
        f'<text x="{x + 5}" y="{y + 11}" font-size="10" fill="{color}">{number}</text>',
        *(
            f'<text x="{x + BOX[0] // 2}" y="{top + 14 * i:.0f}" text-anchor="middle" '
            f'fill="#222">{escape(line)}</text>'
            for i, line in enumerate(lines)
        ),
    ]


def _arrow(x0: int, y0: int, x1: int, y1: int) -> str:
    """From one box to the next, in the row or at the start of the row below."""
    if y0 == y1:
        path = f"M{x0 + BOX[0]} {y0 + BOX[1] // 2} H{x1 - 3} m-4 -4 l4 4 l-4 4"
    else:
        middle = BOX[0] // 2
        path = (
            f"M{x0 + middle} {y0 + BOX[1]} v8 H{x1 + middle} V{y1 - 3} m-4 -4 l4 "
            "4 l4 -4"
        )
    return f'<path d="{path}" stroke="#555" fill="none"/>'


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.overview", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    path = options.root / "book" / "figures" / "overview.svg"
    text = draw(options.root)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return 0
    if options.check:
        print(
            f"{path.name} is not what _toc.yml says: run `make export`", file=sys.stderr
        )
        return 1
    path.write_text(text, encoding="utf-8")
    print(f"overview: wrote {path.relative_to(options.root)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
