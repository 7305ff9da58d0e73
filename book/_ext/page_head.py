"""What a page says of itself: one title, a description, a picture for a shared link.

Beside the pages there are the front door, `index.html`, which leads on to the first
page, and `404.html`, for an address that does not exist.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from PIL import Image, ImageDraw, ImageFont
from sphinx.application import Sphinx
from sphinx.config import Config

CARD = "_static/card.png"
FORMULA = "\ue000"  # stands for one, while sentences are told apart
LENGTH = 200  # characters of a description: search engines show no more
# Pages that Sphinx makes, and what a search engine shows of them.
MADE = {
    "genindex": (
        "Index",
        "Where the symbols, terms, sources, functions and classes of the book stand.",
    ),
    "py-modindex": (
        "Modules",
        "The modules of the package diffussm, each exported from a chapter.",
    ),
    "search": ("Search", "Find a word in the chapters of the book."),
}
DOOR = """<!DOCTYPE html>
<html lang="en">
  <head>
    <meta charset="utf-8" />
    <meta name="viewport" content="width=device-width, initial-scale=1" />
    <title>{title}</title>
    <meta name="description" content="{description}" />
    <meta property="og:title" content="{title}" />
    <meta property="og:description" content="{description}" />
    <meta property="og:image" content="{base}{card}" />
    <link rel="icon" href="{base}_static/logo.svg" />
    {refresh}
    <style>
      :root {{ color-scheme: light dark; }}
      body {{ font: 1.125rem/1.6 system-ui, sans-serif; }}
      main {{ margin: 15vh auto; max-width: 36rem; padding: 0 1rem; }}
    </style>
  </head>
  <body>
    <main>
      <h1>{heading}</h1>
      <p>{words}</p>
      <p><a href="{base}{first}">Read the book</a></p>
    </main>
  </body>
</html>
"""


def describe(doctree: nodes.document) -> str:
    """The first sentences of a page, as many as a search engine shows.

    A sentence with a formula is left out: there it would be raw TeX.
    """
    said = ""
    for paragraph in doctree.findall(nodes.paragraph):
        parents = paragraph.parent["classes"]
        if "preface" in parents or "cell_output" in parents:
            continue
        shown = paragraph.deepcopy()
        for formula in list(shown.findall(nodes.math)):
            formula.replace_self(nodes.Text(FORMULA))
        text = re.sub(r"\s+", " ", shown.astext())
        for sentence in re.split(r"(?<=[.?!]) (?=[A-Z*])", text):
            if FORMULA in sentence or (said and len(said) + len(sentence) >= LENGTH):
                continue
            said = f"{said} {sentence}".strip()
        if len(said) > LENGTH / 2:
            break
    if len(said) <= LENGTH:
        return said
    return said[:LENGTH].rpartition(" ")[0].rstrip(",;: ") + " …"


def published(url: str) -> str:
    """Where GitHub publishes the pages of a repository; nothing for another host."""
    found = re.fullmatch(r"https://github\.com/([\w-]+)/([\w.-]+?)/?", url)
    if not found:
        return ""
    host = f"{found[1].lower()}.github.io"
    return f"https://{host}/" if found[2] == host else f"https://{host}/{found[2]}/"


def set_address(app: Sphinx, config: Config) -> None:
    """The pages' address: `baseurl` of the settings, or what the repository's says.

    A shared link has a picture only where its address is whole.
    """
    url = config.html_theme_options.get("repository_url") or ""
    config.html_baseurl = config.html_baseurl or published(url)


def address(app: Sphinx) -> str:
    """Where the pages are published, with a slash at the end; nothing if unknown."""
    base = app.config.html_baseurl.rstrip("/")
    return f"{base}/" if base else ""


def add_head(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Give the layout what it puts into the head of a page."""
    book = app.config.html_title
    said = describe(doctree) if doctree else ""
    if page in MADE:
        context["title"], said = MADE[page]
        context["pagetitle"] = context["title"]  # above it on paper
    title = re.sub(r"<[^>]*>", "", context["title"])
    context["page_title"] = title if title == book else f"{title} — {book}"
    context["description"] = said or f"{title}. {book}."
    base = address(app)
    context["card"] = base + CARD if base else context["pathto"](CARD, 1)
    # docutils adds a second viewport.
    context["metatags"] = re.sub(
        r'\s*<meta name="viewport"[^>]*>', "", context.get("metatags", "")
    )


def draw_card(title: str, picture: Path) -> Image.Image:
    """The picture that goes with a shared link: the title, and drawn digits."""
    card = Image.new("RGB", (1200, 630), "#101820")
    with Image.open(picture) as drawn:
        digits = drawn.convert("RGB").crop((22, 0, drawn.width, drawn.height))
    scale = card.height / digits.height
    size = round(digits.width * scale), card.height
    digits = digits.resize(size, Image.Resampling.NEAREST)
    card.paste(digits, (card.width - digits.width, 0))
    draw = ImageDraw.Draw(card)
    for line, word in enumerate(title.split()):
        draw.text((60, 150 + 104 * line), word, "#ffffff", ImageFont.load_default(92))
    return card.quantize(32)


def write_doors(app: Sphinx, failed: Exception | None) -> None:
    """Write `index.html`, `404.html` and the card."""
    if failed or app.builder.format != "html":
        return
    out, first = Path(app.outdir), f"{app.config.root_doc}.html"
    title = app.config.html_title
    said = {
        "title": escape(title),
        "base": escape(address(app)),
        "card": CARD,
        "first": first,
        "description": "Diffusion models without attention, built again from the first "
        "equation: a book that is its own Python package.",
    }
    door = DOOR.format(
        **said,
        refresh=f'<meta http-equiv="refresh" content="0; url={first}" />',
        heading=escape(title),
        words=said["description"],
    )
    (out / "index.html").write_text(door, encoding="utf-8")
    lost = DOOR.format(
        **said,
        refresh='<meta name="robots" content="noindex" />',
        heading="There is no such page",
        words="It may have moved: the list of all chapters is on the first page.",
    )
    (out / "404.html").write_text(lost, encoding="utf-8")
    picture = Path(app.srcdir, "book", "figures", "samples.png")
    draw_card(title, picture).save(out / CARD, optimize=True)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("config-inited", set_address)
    app.connect("html-page-context", add_head, priority=900)
    app.connect("build-finished", write_doors, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
