"""Every page of the rendered book, opened in a real browser, over a server on this
machine, in the light theme; `test_pages_dark.py` opens them in the dark one.

`make test` builds the book first. A plain `pytest` skips these tests where the book is
not built or is older than its text, or where there is no Chromium;
DIFFUSSM_REQUIRE_BOOK and DIFFUSSM_REQUIRE_BROWSER forbid that.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
from visits import PAGES, Tab, Visit, the_book, the_server, the_tab, the_visit  # noqa: F401

from tools.book import ROOT
from tools.preface import preface

pytestmark = pytest.mark.end_to_end
THEME = "light"


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
    figures = visit.tab.evaluate(
        """() => [...document.querySelectorAll(
            "article figure[id^='fig-']"
        )].map((f) => ({
            name: f.id,
            caption: f.querySelector("figcaption")?.textContent.trim(),
            inside: f.querySelectorAll("img, svg, .frame-player, table").length,
        }))"""
    )
    assert sorted(figure["name"] for figure in figures) == sorted(named)
    assert all(figure["caption"] and figure["inside"] for figure in figures), figures
    images = visit.tab.evaluate(
        """() => Promise.all([...document.querySelectorAll(
            "article img, article object, article .cell_output svg:not(button svg)"
        )].map(async (e) => {
            const img = e.tagName === "IMG";
            const shown = e.checkVisibility();
            if (img && shown) {
                e.loading = "eager";
                await e.decode().catch(() => null);
            }
            const box = e.getBoundingClientRect();
            return {
                alt: e.getAttribute("alt") || e.getAttribute("aria-label") || "",
                drawn: !shown || (box.width > 0 && box.height > 0
                    && (!img || e.naturalWidth > 0)),
                what: e.outerHTML.slice(0, 120),
            };
        }))"""
    )
    for image in images:
        assert image["drawn"], f"not loaded: {image['what']}"
        alt = image["alt"].strip()
        assert alt and not re.search(r"_images/|\.(svg|png)$", alt), (
            f"no alternative text: {image['what']}"
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
    starts = visit.tab.evaluate(
        "[...document.querySelectorAll('article p')].map(p => p.firstChild)"
        ".filter(node => node?.nodeType === Node.TEXT_NODE).map(node => node.data)"
    )
    assert not [words for words in starts if words.lstrip().startswith("|")], (
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


@pytest.mark.parametrize("width", [1440, 1280])
def test_nothing_is_cut(visit: Visit, width: int) -> None:
    """No formula, no line of code or of an output, no table, nor the page itself."""
    visit.resize(width)
    assert visit.faults("equations", "code", "tables", "body") == []


def test_what_one_uses_has_a_name(visit: Visit) -> None:
    assert visit.faults("names", "tabStops", "codeContrast") == []


def test_axe_finds_nothing_grave(visit: Visit) -> None:
    visit.resize(1280)
    assert visit.violations() == []


def test_console_is_silent_and_no_other_host_is_asked(visit: Visit) -> None:
    assert visit.complaints == []
    assert visit.elsewhere == []


def test_search_finds_a_chapter(tab: Tab) -> None:
    page = tab.open("search.html?q=state")
    page.wait_for_selector("#search-results li a")
    assert any(
        text.strip()
        for text in page.locator("#search-results li a").all_text_contents()
    )
    assert tab.complaints == [] and tab.elsewhere == []


def test_front_page_leads_to_the_book(tab: Tab) -> None:
    page = tab.open("index.html")
    page.wait_for_url(f"**/{PAGES[0]}.html")
    links = page.evaluate(
        "[...document.querySelectorAll('nav.bd-links a')].map(a => "
        "a.href.split('#')[0])"
    )
    assert [f"{tab.server}/{page}.html" in links for page in PAGES[1:]] == [True] * (
        len(PAGES) - 1
    )
    assert tab.elsewhere == []


def test_axe_judges_the_contrast_of_what_looks_alike_but_for_its_colour(
    tab: Tab,
) -> None:
    visit = tab.visit("book/glossary")
    assert visit.violations() == []
    visit.tab.evaluate("[...document.querySelectorAll('dd p')].at(-2).id = 'pale'")
    visit.tab.evaluate("document.querySelector('#pale').style.color = '#999'")
    (fault,) = visit.violations()
    assert fault.startswith("color-contrast: #pale: ")
