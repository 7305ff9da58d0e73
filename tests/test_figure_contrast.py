"""What is written in the figures of the rendered book can be read, in both themes.

Matplotlib draws letters as curves, so no browser's check of contrast sees them.
"""

from __future__ import annotations

import base64
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from visits import PAGES, the_book  # noqa: F401 (the fixture)

from tools.book import ROOT

sys.path.insert(0, str(ROOT / "book" / "_ext"))
import figures  # type: ignore[import-not-found]

TEXT = re.compile(
    r'<!-- (?P<said>.+?) -->\s*<g(?: style="(?P<style>[^"]*)")? transform='
    r"|<text (?P<attributes>[^>]*)>(?P<words>[^<]*)",
    re.DOTALL,
)
FILL = re.compile(r'fill(?:: ?|=")(#[0-9a-f]{3,6})', re.IGNORECASE)
OPACITY = re.compile(r'(?<![-\w])opacity(?:: ?|=")([\d.]+)')


def texts(svg: str, dark: bool = False) -> Iterator[tuple[str, str]]:
    """The texts of a drawing on the page's ground, with their colours."""
    kept = figures._kept(svg)  # what lies on a picture or a colour
    for found in TEXT.finditer(svg):
        if any(start <= found.start() < end for start, end in kept):
            continue
        look = found["style"] or found["attributes"] or ""
        fill, opacity = FILL.search(look), OPACITY.search(look)
        colour = fill[1] if fill else figures.INK if dark else "#000000"
        if opacity:
            ground = figures.PAGE if dark else "#ffffff"
            colour = figures._mixed(ground, colour, float(opacity[1]))
        yield found["said"] or found["words"], colour


def faint(svg: str, dark: bool = False) -> set[tuple[str, str]]:
    """Those of them that have too little contrast."""
    ground = figures.PAGE if dark else "#ffffff"
    return {
        (text, colour)
        for text, colour in texts(svg, dark)
        if figures.contrast(colour, ground) < figures.CONTRAST
    }


def drawing(**looks: str) -> str:
    """As matplotlib writes texts."""
    shapes = (
        f'<g id="text_{k}"> <!-- {text} -->\n<g{look} transform="scale(1)"></g></g>'
        for k, (text, look) in enumerate(looks.items())
    )
    return f'<svg width="9pt">{"".join(shapes)}</svg>'


def test_faint_texts_are_found() -> None:
    orange, pale = ' style="fill: #d55e00"', ' style="opacity: 0.4"'
    svg = drawing(plain="", orange=orange, pale=pale, blue=' style="fill: #0072b2"')
    assert {text for text, _ in faint(svg)} == {"orange", "pale"}
    assert {text for text, _ in faint(figures.recoloured(svg), dark=True)} == {"pale"}
    assert len(list(texts(svg))) == 4
    diagram = (
        '<svg><text x="1" fill="#999999">weak</text><text x="2">strong</text></svg>'
    )
    assert faint(diagram) == {("weak", "#999999")}
    assert not faint(f'<svg><g id="keep1">{drawing(orange=orange)}</g></svg>')


@pytest.mark.end_to_end
def test_texts_in_figures_can_be_read(book: Path) -> None:
    faults, seen = {}, 0
    for page in PAGES:
        rendered = (book / f"{page}.html").read_text(encoding="utf-8")
        files = set(re.findall(r'_images/([^"\s]+\.svg)', rendered))
        drawings = {name: (book / "_images" / name).read_text() for name in files}
        stills = re.findall(r'svg\+xml;base64,([^"]+)"', rendered)
        drawings |= {
            f"still {k}": base64.b64decode(still).decode()
            for k, still in enumerate(stills)
        }
        for name, svg in drawings.items():
            seen += len(list(texts(svg)))
            if found := faint(svg, dark=Path(name).stem.endswith("-dark")):
                faults[page, name] = found
    assert seen > 1000 and faults == {}
