"""Figures in the colours of the page, and of the width of a phone.

A drawing comes with a narrow one inside (`plotting.narrow`). Both become two files, for
the light and for the dark theme, and the page shows one of the four. A figure without a
narrow drawing has two.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

# The dark theme's background and text, and what a colour on that background needs.
PAGE, INK, CONTRAST = "#121212", "#ced6dd", 4.5
PHONE = 600  # pixels: a screen up to this width gets the narrow drawing

NARROW = re.compile(r'<metadata id="narrow">(.*)</metadata>\s*</svg>\s*$', re.DOTALL)
COLOUR = re.compile(r"#(?:[0-9a-f]{6}|[0-9a-f]{3})\b", re.IGNORECASE)
PAINT = re.compile(rf'((?:fill|stroke)(?:: ?|="))({COLOUR.pattern})', re.IGNORECASE)
# The ground of a whole drawing: matplotlib's, and that of the diagrams.
GROUND = re.compile(
    r'(<g id="patch_1">\s*<path d="[^"]*" style="fill: |<rect width="\d+" height="\d+" '
    r'fill=")#ffffff'
)


def _channels(colour: str) -> list[float]:
    """`#0072b2` or `#07b` as three numbers from 0 to 1."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    return [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]


def _mixed(one: str, other: str, share: float) -> str:
    """One colour with a share of another."""
    pairs = zip(_channels(one), _channels(other), strict=True)
    return "#" + "".join(f"{round(255 * (a + share * (b - a))):02x}" for a, b in pairs)


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, as in WCAG 2."""
    light = []
    for colour in (one, other):
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in _channels(colour)
        ]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(light) + 0.05) / (min(light) + 0.05)


def dark(colour: str) -> str:
    """The colour that stands for this one on a dark page.

    Greys run from the ink to the page as they did from black to white. Others stay, or
    become as much lighter as they need to be seen.
    """
    channels = _channels(colour)
    if max(channels) - min(channels) < 0.08:
        return _mixed(INK, PAGE, (sum(channels) / 3) ** 1.2)  # dim is weaker on dark
    tints = (_mixed(colour, "#ffffff", k / 20) for k in range(21))
    return next(tint for tint in tints if contrast(tint, PAGE) >= CONTRAST)


def _kept(svg: str) -> list[tuple[int, int]]:
    """Where the groups `keep...` begin and end: they lie on a picture or a colour."""
    spans = []
    for start in re.finditer(r'<g id="keep[^"]*"', svg):
        depth = 0
        for tag in re.finditer(r"<g\b|</g>", svg[start.start() :]):
            depth += 1 if tag[0] == "<g" else -1
            if not depth:
                spans.append((start.start(), start.start() + tag.end()))
                break
    return spans


def recoloured(svg: str) -> str:
    """A drawing for the dark theme. Raster images in it stay as they are."""

    def paint(text: str) -> str:
        return PAINT.sub(lambda found: found[1] + dark(found[2]), text)

    done, last = [], 0
    for start, end in _kept(svg):
        kept = svg[start:end].replace("<g ", '<g fill="#000000" ', 1)
        done += [paint(svg[last:start]), kept]
        last = end
    # What names no colour is black in SVG; here it inherits the ink.
    return "".join([*done, paint(svg[last:])]).replace(
        "<svg ", f'<svg fill="{INK}" ', 1
    )


def drawings(svg: str) -> dict[str, str]:
    """The files of a figure by the end of their names, on transparent ground."""
    found = NARROW.search(svg)
    wide = GROUND.sub(r"\1none", svg[: found.start()] + "</svg>\n" if found else svg, 1)
    files = {"": wide, "-dark": recoloured(wide)}
    if found:
        narrow = GROUND.sub(r"\1none", found[1], 1)
        files |= {"-narrow": narrow, "-narrow-dark": recoloured(narrow)}
    return files


def measures(svg: str) -> dict[str, str]:
    """Attributes of an image: its size, and its smallest text as a share of the width.

    Matplotlib scales glyphs of 100 units to a text's size; those of an exponent or an
    index once more. Diagrams say `font-size`.
    """
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
    unit = 96 / 72 if f'width="{width}pt"' in svg else 1.0
    found = {
        "width": f"{float(width) * unit:.0f}",
        "height": f"{float(height) * unit:.0f}",
    }
    texts = re.findall(r"scale\(([\d.]+) -[\d.]+\)(.*?)</g>", svg, re.DOTALL)
    sizes = [
        100
        * float(size)
        * min(map(float, re.findall(r" scale\((0[\d.]+)\)", glyphs)), default=1)
        for size, glyphs in texts
    ]
    sizes += map(float, re.findall(r'font-size(?:="|: ?)([\d.]+)', svg))
    if sizes:
        found["data-smallest-text"] = f"{min(sizes) / float(width):.5f}"
    return found


def _html(attributes: dict[str, str]) -> str:
    return " ".join(f'{name}="{value}"' for name, value in attributes.items())


def visit_image(writer: Any, node: nodes.image) -> None:
    """Write a drawing once for each theme; the theme's style shows one of them."""
    write = type(writer).visit_image
    if not node["uri"].endswith(".svg"):
        node["classes"].append("dark-light")  # else the dark theme would dim it
        write(writer, node)
        return
    source = Path(writer.builder.srcdir, node["uri"])
    files = drawings(source.read_text(encoding="utf-8"))
    themes = {"only-light": "", "only-dark": "-dark"}
    for theme, end in themes.items():
        one = node.copy()
        one["classes"].append(theme)
        write(writer, one)
        shown = {"loading": "lazy"} | measures(files[end])
        tag = writer.body.pop().strip().replace("<img ", f"<img {_html(shown)} ", 1)
        name = re.findall(r'src="([^"]*)\.svg"', tag)[0]
        tag = tag.replace(f"{name}.svg", f"{name}{end}.svg")
        if "-narrow" in files:
            narrow = measures(files["-narrow"]) | {
                "media": f"(max-width: {PHONE}px)",
                "srcset": f"{name}-narrow{end}.svg",
            }
            tag = f"<source {_html(narrow)}>{tag}"
        writer.body.append(f"<picture>{tag}</picture>\n")


def write_drawings(app: Sphinx, failed: Exception | None) -> None:
    """Put the files of all figures beside each other, when the pages are written."""
    if failed or app.builder.format != "html":
        return
    for uri, name in app.builder.images.items():
        if name.endswith(".svg"):
            svg = Path(app.srcdir, uri).read_text(encoding="utf-8")
            file = Path(app.outdir, app.builder.imagedir, name)
            for end, drawing in drawings(svg).items():
                file.with_stem(file.stem + end).write_text(drawing, encoding="utf-8")


def with_dark_colours(player: str) -> str:
    """A player of frames that knows which colours its drawings have in the dark."""
    colours = {paint[1].lower() for paint in PAINT.findall(player)} | {"#000000"}
    told = html.escape(json.dumps({colour: dark(colour) for colour in sorted(colours)}))
    return player.replace('data-dark="{}"', f'data-dark="{told}"', 1)


def colour_players(app: Sphinx, page: nodes.document, _: str) -> None:
    """Tell the players of a page the colours of the dark theme."""
    for node in page.findall(nodes.raw):
        if 'class="drawing"' in node.astext():
            node.children = [nodes.Text(with_dark_colours(node.astext()))]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_node(nodes.image, override=True, html=(visit_image, None))
    app.connect("doctree-resolved", colour_players)
    app.connect("build-finished", write_drawings)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
