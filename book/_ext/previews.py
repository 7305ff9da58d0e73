"""What `preview.js` shows beside a link: collected here, page by page.

Each page that is written leaves its texts in a file beside Sphinx's own; in the end
they become one script, which is loaded only when somebody rests on a link.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from docutils import nodes
from figures import drawings
from page_head import describe
from sphinx import addnodes
from sphinx.application import Sphinx

NOTATION = "book/notation"
IMAGES = 4  # of a figure
# "u(t), u_k" are two symbols, "f(a, b)" is one.
COMMA = re.compile(r",\s*(?![^(]*\))")
# The still of an explorable, the first frame of a player: a picture in an address.
STILL = re.compile(r'<img [^>]*?src="(data:image/[^"]+)" alt="([^"]*)"')


class Pages:
    """Nodes of one page as HTML."""

    def __init__(self, app: Sphinx) -> None:
        self.render = app.builder.render_partial  # type: ignore[attr-defined]
        self.files = app.builder.images
        self.folder = Path(app.outdir, "_images")

    def html(self, *parts: nodes.Node) -> str:
        """Nodes as they stand on the page, without anchors."""
        text = "".join(self.render(part)["fragment"] for part in parts)
        text = re.sub(r'<a class="headerlink".*?</a>', "", text)
        return re.sub(r' id="[^"]*"', "", text).strip()

    def about(self, node: nodes.Element) -> str:
        """What is shown for a target: the thing itself, or its title and beginning."""
        match node:
            case nodes.math_block() | nodes.citation():
                return self.html(node)
            case nodes.figure():
                words = node.next_node(nodes.caption)
                return self.shown(node) + self.paragraph(words)
            case nodes.table():
                return self.paragraph(node.next_node(nodes.title))
            case nodes.term():
                meaning = node.parent.next_node(nodes.definition)
                return self.paragraph(node, "strong") + self.html(*meaning.children)
            case addnodes.desc_signature():
                first = node.parent.next_node(nodes.paragraph)
                name = f"<p><code>{escape(node.astext())}</code></p>"
                return name + self.paragraph(first)
        title = self.paragraph(node.next_node(nodes.title), "strong")
        return title + f"<p>{escape(describe(node))}</p>"

    def shown(self, figure: nodes.figure) -> str:
        """What a figure shows: pictures, the still of what moves, or else all of it."""
        images = list(figure.findall(nodes.image))[:IMAGES]
        if images:
            files = (Path(self.files.get(i["uri"], i["uri"])) for i in images)
            pairs = zip(files, images, strict=True)
            return "".join(
                picture(file.name, escape(i.get("alt", ""))) for file, i in pairs
            )
        for made in figure.findall(nodes.raw):
            if still := STILL.search(made.astext()):
                return picture(self.kept(still[1]), still[2])
        words = nodes.caption, nodes.legend
        return self.html(*(c for c in figure.children if not isinstance(c, words)))

    def kept(self, address: str) -> str:
        """The name of a file with what an address `data:` holds."""
        with urlopen(address) as read:
            kind, data = read.headers.get_content_subtype(), read.read()
        stem = f"still-{hashlib.sha256(data).hexdigest()[:16]}"
        files = {f"{stem}.{kind}": data}
        if kind == "svg+xml":
            drawn = drawings(data.decode("utf-8")).items()
            files = {f"{stem}{end}.svg": text.encode() for end, text in drawn}
        self.folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (self.folder / name).write_bytes(content)
        return next(iter(files))

    def paragraph(self, node: nodes.Element | None, tag: str = "span") -> str:
        """The text of a caption, a title or a term."""
        if node is None:
            return ""
        inside = nodes.paragraph("", "", *(child.deepcopy() for child in node.children))
        return (
            self.html(inside)
            .replace("<p>", f"<p><{tag}>")
            .replace("</p>", f"</{tag}></p>")
        )


def picture(name: str, alt: str) -> str:
    """An image; of a drawing the two that `figures` makes for the themes."""
    file, themes = Path(name), {"dark-light": ""}
    if file.suffix == ".svg":
        themes = {"only-light": "", "only-dark": "-dark"}
    return "".join(
        f'<img class="{kind}" src="../_images/{file.stem}{end}{file.suffix}" '
        f'alt="{alt}">'
        for kind, end in themes.items()
    )


def targets(doctree: nodes.document) -> Iterator[tuple[nodes.Element, list[str]]]:
    """What on a page can be referred to, with its anchors."""
    kinds = (
        nodes.math_block,
        nodes.citation,
        nodes.figure,
        nodes.table,
        nodes.term,
        addnodes.desc_signature,
        nodes.section,
    )
    for node in doctree.findall(lambda n: isinstance(n, kinds)):
        # A section that has but one anchor has no label.
        if node["ids"] and (
            len(node["ids"]) > 1 or not isinstance(node, nodes.section)
        ):
            yield node, node["ids"]


def symbols(pages: Pages, doctree: nodes.document) -> dict[str, str]:
    """The rows of the page of notation, by symbol."""
    found: dict[str, str] = {}
    for row in doctree.findall(nodes.row):
        if isinstance(row.parent, nodes.thead):
            continue
        symbol, *cells = row.children
        said = [pages.html(*cell.children) for cell in cells if cell.astext()]
        text = pages.html(*symbol.children) + "".join(said)
        for formula in symbol.findall(nodes.math):
            whole = formula.astext()
            for name in {whole, *COMMA.split(whole)}:
                found[name] = found.get(name, "") + text
    return found


def collect(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Called by Sphinx for each page that is written."""
    if not doctree or app.builder.format != "html":
        return
    pages, address = Pages(app), f"{page}.html"
    texts = {
        f"{address}#{anchor}": text
        for node, anchors in targets(doctree)
        if (text := pages.about(node))
        for anchor in anchors
    }
    top = doctree.next_node(nodes.section)
    if top is not None:
        texts[address] = pages.about(top)
    kept = {"targets": texts, "symbols": {}}
    if page == NOTATION:
        kept["symbols"] = symbols(pages, doctree)
    file = Path(app.doctreedir, "previews", f"{page}.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept), encoding="utf-8")


def write(app: Sphinx, failed: Exception | None) -> None:
    """Write the script, when all pages are there."""
    whole: dict[str, dict[str, str]] = {"targets": {}, "symbols": {}}
    folder = Path(app.doctreedir, "previews")
    for page in sorted(app.env.found_docs):
        file = folder / f"{page}.json"
        if file.exists():
            kept = json.loads(file.read_text(encoding="utf-8"))
            for key, texts in whole.items():
                texts.update(kept[key])
    if not failed and app.builder.format == "html":
        script = Path(app.outdir, "_static", "previews.js")
        said = json.dumps({**whole, "mathjax": app.config.mathjax3_config})
        script.write_text(f"window.PREVIEWS = {said};\n", encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_js_file("preview.js", loading_method="defer")
    app.connect("html-page-context", collect)
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
