"""Every page of the rendered book, opened in a real browser, over a server on this
machine.

`make test` builds the book first. A plain `pytest` skips these tests where the book is
not built or is older than its text, or where there is no Chromium;
DIFFUSSM_REQUIRE_BOOK and DIFFUSSM_REQUIRE_BROWSER forbid that.
"""

from __future__ import annotations

import functools
import re
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from browsers import absent

from tools.book import ROOT, Chapter, read_chapter, reading_order
from tools.preface import preface

pytestmark = pytest.mark.end_to_end

HTML = ROOT / "_build" / "html"
PHONE = 390
PAGES = reading_order()


@pytest.fixture(scope="session")
def book() -> Path:
    for page in PAGES:
        source, rendered = ROOT / f"{page}.md", HTML / f"{page}.html"
        if not rendered.exists():
            absent(
                f"{page}.html is not built: run `make book`", "DIFFUSSM_REQUIRE_BOOK"
            )
        if rendered.stat().st_mtime < source.stat().st_mtime:
            absent(
                f"{page}.html is older than its text: run `make book`",
                "DIFFUSSM_REQUIRE_BOOK",
            )
    return HTML


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="session")
def server(book: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(book))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        thread.join()


@dataclass
class Visit:
    """An open page and what happened while it loaded."""

    tab: Any
    chapter: Chapter
    source: str
    complaints: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)


def open_page(
    browser: Any, server: str, address: str
) -> tuple[Any, list[str], list[str]]:
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    complaints: list[str] = []
    elsewhere: list[str] = []
    tab.on(
        "console",
        lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None,
    )
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on(
        "response",
        lambda r: complaints.append(f"{r.status} {r.url}") if r.status >= 400 else None,
    )
    local = (server, "data:", "blob:")
    tab.on(
        "request",
        lambda r: None if r.url.startswith(local) else elsewhere.append(r.url),
    )
    tab.goto(f"{server}/{address}", wait_until="load")
    return tab, complaints, elsewhere


@pytest.fixture(scope="session", params=PAGES, ids=lambda page: page.split("/")[-1])
def visit(request: pytest.FixtureRequest, browser: Any, server: str) -> Iterator[Visit]:
    path = ROOT / f"{request.param}.md"
    tab, complaints, elsewhere = open_page(browser, server, f"{request.param}.html")
    tab.wait_for_function(
        "!window.MathJax || (MathJax.startup && MathJax.startup.promise)"
    )
    tab.evaluate("() => window.MathJax ? MathJax.startup.promise : null")
    yield Visit(
        tab, read_chapter(path), path.read_text(encoding="utf-8"), complaints, elsewhere
    )
    tab.close()


def prose(visit: Visit) -> str:
    """A page's text without its header, its code and what stands in backticks (but for
    `{math}` blocks).
    """
    text = re.sub(r"\A---\n.*?\n---\n", "", visit.source, flags=re.DOTALL)
    text = re.sub(
        r"^(`{3,})\{code-cell\}.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE
    )
    return text


def test_page_has_title_and_content(visit: Visit) -> None:
    plain = re.sub(r"[`*$]|\{\w+\}", "", visit.chapter.title)
    heading = visit.tab.locator("h1").first.inner_text().strip().rstrip("#").strip()
    assert visit.tab.locator("article h1").count() == 1
    if "$" not in visit.chapter.title:
        assert heading.endswith(plain)
        assert plain in visit.tab.title()
    article = visit.tab.locator("article.bd-article").inner_text()
    assert len(article) > 0.25 * len(prose(visit)) or "{bibliography}" in visit.source
    assert len(article.strip()) > len(plain), "nothing but a title"


def test_numbered_pages_say_how_long_they_are(visit: Visit) -> None:
    said = preface(visit.chapter.name.removesuffix(".md"))
    assert visit.tab.locator("article .preface").count() == bool(said)
    if said:
        shown = visit.tab.locator("article .preface").inner_text()
        assert shown.startswith(said.partition(";")[0].rstrip("."))


def test_figures_are_there_and_described(visit: Visit) -> None:
    named = re.findall(r"^ *:?name: *(fig-[\w-]+) *$", visit.source, re.MULTILINE)
    for name in named:
        figure = visit.tab.locator(f"article figure[id='{name}']")
        assert figure.count() == 1, f"{name} is not on the page"
        # text_content, not inner_text: a figure may lie in a solution that is folded
        # away
        assert (figure.locator("figcaption").first.text_content() or "").strip(), (
            f"{name} has no caption"
        )
        inside = figure.locator("img, svg, .frame-player, table")
        assert inside.count(), f"{name} is empty"
    shown = visit.tab.locator("article figure[id^='fig-']")
    assert shown.count() == len(named)
    for image in visit.tab.locator(
        "article img, article object, article .cell_output svg:not(button svg)"
    ).all():
        image.scroll_into_view_if_needed() if image.is_visible() else None
        state = image.evaluate(
            """async e => {
                if (e.tagName === "IMG") await e.decode().catch(() => null);
                const img = e.tagName === "IMG";
                const hidden = e.offsetParent === null && img && e.complete;
                const box = e.getBoundingClientRect();
                return {
                    alt: e.getAttribute("alt") || e.getAttribute("aria-label") || "",
                    size: img ? Math.min(e.naturalWidth, e.naturalHeight) : box.width,
                    drawn: hidden || (box.width > 0 && box.height > 0),
                    what: e.outerHTML.slice(0, 120),
                };
            }"""
        )
        assert state["size"] > 0 and state["drawn"], f"not loaded: {state['what']}"
        alt = state["alt"].strip()
        assert alt and not re.search(r"_images/|\.(svg|png)$", alt), (
            f"no alternative text: {state['what']}"
        )


def test_tables_are_numbered(visit: Visit) -> None:
    named = re.findall(r"^ *:?name: *(tab[\w-]+) *$", visit.source, re.MULTILINE)
    for name in named:
        table = visit.tab.locator(f"article table[id='{name}']")
        assert table.count() == 1, f"{name} is not on the page"
        caption = table.locator("caption").first.text_content() or ""
        assert re.match(r"\s*Table [\d.]+ *\S", caption), f"{name}: {caption!r}"


def test_mathematics_is_typeset(visit: Visit) -> None:
    text = re.sub(r"``.+?``|`(?!`)[^`\n]+`", "", prose(visit))
    has_math = "{math}" in text or re.search(r"(?<!\\)\$[^$]+\$", text)
    typeset = visit.tab.locator("article mjx-container").count()
    assert typeset > 0 or not has_math, "mathematics in the text, none on the page"
    assert visit.tab.locator("mjx-merror, merror, [data-mjx-error]").count() == 0
    labels = re.findall(r"^:label: *(eq-[\w-]+)", visit.source, re.MULTILINE)
    for label in labels:
        assert visit.tab.locator(f"[id='equation-{label}']").count() == 1, (
            f"{label} is not on the page"
        )


def test_no_cell_failed_or_complained(visit: Visit) -> None:
    assert (
        visit.tab.locator(
            ".output.traceback, .output.stderr, .cell_output .stderr"
        ).count()
        == 0
    )
    text = visit.tab.locator("article.bd-article").inner_text()
    for sign in (
        "Traceback (most recent call last)",
        "Warning:",
        "{glue",
        "{eq}",
        "{ref}",
        "{numref}",
        "{cite}",
    ):
        assert sign not in text, f"{sign!r} stands on the page"
    assert not re.search(r"\s–\w", text), "the -- of an option has become a dash"
    shown = visit.tab.locator("article p").all_inner_texts()
    assert not [words for words in shown if words.lstrip().startswith("|")], (
        "a table was not set as one"
    )


def test_outputs_are_short_and_the_same_anywhere(visit: Visit) -> None:
    """No object printed in full, no folder of the machine that made the page."""
    printed = visit.tab.locator(".cell_output pre").all_text_contents()
    for text in printed:
        assert text.count("\n") <= 40, f"{len(text)} characters: {text[:200]}"
        for path in (tempfile.gettempdir() + "/", str(ROOT)):
            assert path not in text, text[:400]
        assert not re.search(r" at 0x[0-9a-f]{8}", text), text[:400]


def test_code_cells_are_on_the_page(visit: Visit) -> None:
    hidden = sum(
        "remove-cell" in cell.tags or "remove-input" in cell.tags
        for cell in visit.chapter.cells
    )
    assert (
        visit.tab.locator("article .cell_input").count()
        == len(visit.chapter.cells) - hidden
    )


def test_exported_cells_carry_the_badge(visit: Visit) -> None:
    badges = [
        text.strip() for text in visit.tab.locator(".export-badge").all_text_contents()
    ]
    assert badges == [f"diffussm.{visit.chapter.module}"] * len(visit.chapter.exported)


def test_links_within_the_book_lead_somewhere(visit: Visit, book: Path) -> None:
    for link in visit.tab.evaluate(
        "[...document.querySelectorAll('article a[href]')].map(a => a.href)"
    ):
        if not link.startswith("http://127.0.0.1"):
            continue
        path, _, anchor = link.split("/", 3)[3].partition("#")
        target = book / path
        assert target.is_file(), f"{link} leads nowhere"
        if anchor and target.suffix == ".html":
            assert re.search(
                rf'id="{re.escape(anchor)}"', target.read_text(encoding="utf-8")
            ), link


def test_players_move(visit: Visit) -> None:
    for player in visit.tab.locator(".frame-player").all():
        image, slider = player.locator("img"), player.locator("input[type=range]")
        before = image.get_attribute("src")
        assert image.get_attribute("alt") and player.locator("output").text_content()
        assert player.evaluate("e => document.querySelectorAll('#' + e.id).length") == 1
        if not slider.is_visible():  # in a closed box
            continue
        slider.focus()
        visit.tab.keyboard.press("Home")
        first, label = image.get_attribute("src"), player.locator("output").inner_text()
        visit.tab.keyboard.press("End")
        assert image.get_attribute("src") != first
        assert player.locator("output").inner_text() != label
        assert before


def test_nothing_overflows_on_a_phone(visit: Visit) -> None:
    visit.tab.set_viewport_size({"width": PHONE, "height": 844})
    visit.tab.wait_for_timeout(200)
    wide = visit.tab.evaluate(
        """width => document.documentElement.scrollWidth <= width ? [] :
            [...document.querySelectorAll("article *")]
                .filter(e => e.getBoundingClientRect().right > width + 1)
                .map(e => e.outerHTML.slice(0, 100)).slice(0, 5)""",
        PHONE,
    )
    overflow = visit.tab.evaluate("document.documentElement.scrollWidth")
    visit.tab.set_viewport_size({"width": 1280, "height": 900})
    assert overflow <= PHONE, f"{overflow} px wide: {wide}"


def test_console_is_silent_and_no_other_host_is_asked(visit: Visit) -> None:
    assert visit.complaints == []
    assert visit.elsewhere == []


def test_search_finds_a_chapter(browser: Any, server: str) -> None:
    tab, complaints, elsewhere = open_page(browser, server, "search.html?q=state")
    tab.wait_for_selector("#search-results li a")
    assert any(
        text.strip() for text in tab.locator("#search-results li a").all_text_contents()
    )
    assert complaints == [] and elsewhere == []
    tab.close()


def test_front_page_leads_to_the_book(browser: Any, server: str) -> None:
    tab, _, elsewhere = open_page(browser, server, "index.html")
    tab.wait_for_url(f"**/{PAGES[0]}.html")
    links = tab.evaluate(
        "[...document.querySelectorAll('nav.bd-links a')].map(a => "
        "a.href.split('#')[0])"
    )
    assert [f"{server}/{page}.html" in links for page in PAGES[1:]] == [True] * (
        len(PAGES) - 1
    )
    assert elsewhere == []
    tab.close()
