"""The whole book as one PDF: ``make pdf``.

The rendered pages become one long page, whose links lead to places in itself; Chromium
sets its formulas and prints it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tools.book import ROOT, reading_order

if TYPE_CHECKING:
    from playwright.sync_api import Page

__all__ = ["BROWSERS", "one_page", "main"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH = 680  # of an A4 page less its margins, in CSS pixels
MINUTES = 60  # to read it; the whole book takes a busy machine some of them

# The printed page has the frame in which the theme's rules find it.
FRAME = """<!DOCTYPE html>
<html lang="en" data-theme="light" data-mode="light" data-content_root="../html/">
<head><meta charset="utf-8"><title>{title}</title>
{head}
<style>
.part-of-book {{ break-before: page; }}
.bd-main .bd-content .bd-article h1:first-of-type {{ display: block; }}
</style></head>
<body><main class="bd-main"><div class="bd-content"><div class="bd-article-container">
<article class="bd-article">
{body}
</article></div></div></main></body></html>
"""
# A page without formulas does not load it, though its text may name it.
MATHJAX = re.compile(r'<script [^>]*src="[^"]*/mathjax/')
UNSET = """() => [...document.querySelectorAll("article .math")]
    .filter((e) => !e.querySelector("mjx-container")).length"""
# What is far down the page is fetched only when it is seen, and paper sees all of it.
PICTURES = """() => Promise.all([...document.images]
    .filter((image) => image.checkVisibility())
    .map((image) => {
        image.loading = "eager";
        return image.decode().catch(() => null);
    })).then(() => null)"""
# `fit.js` folds formulas when a frame is drawn, and again when their letters are there.
FRAMES = """() => new Promise((done) => {
    const next = (n) => n ? requestAnimationFrame(() => next(n - 1)) : done(null);
    next(4);
})"""
# What would be cut at the edge of the sheet: on which page, what, and its words.
CUT = """() => {
    const edge = document.querySelector("article").getBoundingClientRect().right + 1;
    return [...document.querySelectorAll(
            "article :is(mjx-container, pre, table, img, svg, canvas)")]
        .filter((box) => box.checkVisibility())
        .filter((box) => box.getBoundingClientRect().right > edge
            || (box.matches("pre, [display=true]")
                && box.scrollWidth > box.clientWidth + 1))
        .map((box) => [box.closest(".part-of-book").id, box.localName,
            (box.alt ?? box.textContent).trim().slice(0, 60)].join(", "));
}"""
FOOTER = (
    '<div style="font-size: 8px; margin: 0 auto; color: #555">'
    '<span class="pageNumber"></span></div>'
)


def _article(text: str) -> str:
    """What a page says, without what the theme puts around it."""
    found = re.search(
        r'<article class="bd-article"[^>]*>(.*)</article>', text, re.DOTALL
    )
    if found is None:
        raise ValueError("a page has no article: `make book` renders the pages")
    return found[1]


def _head(text: str) -> str:
    """Style sheets and scripts of a page, by their paths from `_build/pdf`."""
    kept = re.findall(
        r'<link [^>]*rel="stylesheet"[^>]*/>|<script[^>]*>.*?</script>',
        text.partition("</head>")[0],
        re.DOTALL,
    )
    kept = [tag for tag in kept if "<link" in tag or "_static/scripts/" not in tag]
    return "\n".join(kept).replace("../_static/", "../html/_static/")


def one_page(pages: list[str], folder: Path) -> str:
    """The pages of a rendered book as one; `folder` is that of the HTML.

    Raises:
        FileNotFoundError: a page is not rendered.
    """
    texts = {page: (folder / f"{page}.html").read_text("utf-8") for page in pages}
    names = {Path(page).name for page in pages}

    def inside(page: str, text: str) -> str:
        """Names of places begin with the page's, and links lead to those."""
        name = Path(page).name

        def link(found: re.Match[str]) -> str:
            target, anchor = found[1], found[2] or ""
            stem = Path(target).stem if target else name
            if stem not in names or not (target.endswith(".html") or not target):
                return found[0]
            return f'href="#{stem}{"--" + anchor if anchor else ""}"'

        text = re.sub(r'(?<=\s)id="([^"]+)"', rf'id="{name}--\1"', text)
        text = re.sub(r'href="([^":#]*)(?:#([^"]*))?"', link, text)
        text = text.replace('getElementById("', f'getElementById("{name}--')
        text = re.sub(r'(src|data|srcset)="\.\./_', r'\1="../html/_', text)
        return f'<div class="part-of-book" id="{name}">{text}</div>'

    body = "\n".join(inside(page, _article(text)) for page, text in texts.items())
    heads = [text for text in texts.values() if MATHJAX.search(text)]
    first = texts[pages[0]]
    found = re.search(r"<title>(.*?)</title>", first, re.DOTALL)
    title = found[1].strip() if found else "The book"
    return FRAME.format(title=title, head=_head((heads or [first])[0]), body=body)


def print_pdf(
    source: Path, target: Path, browser: str, minutes: float = MINUTES
) -> None:
    """Let Chromium print a page when its formulas are set.

    Raises:
        ValueError: formulas were not set, something is wider than the sheet, or a step
            took more than these minutes.
    """
    from playwright.sync_api import TimeoutError, sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=browser, args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            tab = chromium.new_page(
                viewport={"width": WIDTH, "height": 1000}, color_scheme="light"
            )
            tab.emulate_media(media="print", reduced_motion="reduce")
            tab.goto(source.as_uri(), wait_until="load", timeout=minutes * 60_000)
            _make_ready(tab)
            tab.pdf(
                path=str(target),
                prefer_css_page_size=True,
                print_background=True,
                display_header_footer=True,
                header_template="<span></span>",
                footer_template=FOOTER,
                outline=True,
                tagged=True,
            )
        except TimeoutError:
            raise ValueError(
                f"Chromium had not read {source} after {minutes:g} minutes: give it "
                "more with --minutes, or print some pages only"
            ) from None
        finally:
            chromium.close()


def _make_ready(tab: Page) -> None:
    """Wait for formulas, letters and pictures, open what is folded, look for cuts."""
    tab.evaluate("() => window.MathJax ? MathJax.startup.promise : null")
    if unset := tab.evaluate(UNSET):
        raise ValueError(f"{unset} formulas were not set: does MathJax load?")
    tab.evaluate("() => { window.dispatchEvent(new Event('beforeprint')); }")
    tab.evaluate(FRAMES)  # what has opened may need other letters
    tab.evaluate("() => document.fonts.ready.then(() => null)")
    tab.evaluate(PICTURES)
    tab.evaluate(FRAMES)
    if cut := tab.evaluate(CUT):
        raise ValueError("wider than the sheet:\n" + "\n".join(cut))


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.pdf", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("pages", nargs="*", help="only these, such as book/notation")
    parser.add_argument("--out", type=Path, default=ROOT / "_build" / "diffussm.pdf")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="that Chromium may read"
    )
    options = parser.parse_args(arguments)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(
            f"pdf: none of {', '.join(BROWSERS)} is here; install Chromium",
            file=sys.stderr,
        )
        return 1
    try:
        text = one_page(options.pages or reading_order(), ROOT / "_build" / "html")
    except FileNotFoundError as error:
        print(f"pdf: {error.filename} is missing: run `make book`", file=sys.stderr)
        return 1
    source = ROOT / "_build" / "pdf" / "book.html"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(text, encoding="utf-8")
    try:
        print_pdf(source, options.out, browser, options.minutes)
    except ValueError as error:
        print(f"pdf: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.0f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
