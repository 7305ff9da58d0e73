"""What holds of the rendered book as a whole, in a real browser: search, the front
page, and that the checks of `page_checks.py` see what they look for.
"""

from __future__ import annotations

from typing import Any

import pytest
from visits import ANYWHERE, LOOKS, PAGES, Look, Tab, the_book, the_server, the_tab  # noqa: F401

pytestmark = pytest.mark.end_to_end


def test_search_finds_a_chapter(tab: Tab) -> None:
    page = tab.open("search.html?q=state")
    page.wait_for_selector("#search-results li a")
    assert any(
        text.strip()
        for text in page.locator("#search-results li a").all_text_contents()
    )
    assert tab.complaints == [] and tab.elsewhere == []


def test_search_has_a_chapter_before_functions_of_its_name(tab: Tab) -> None:
    page = tab.open("search.html?q=convolution")
    page.wait_for_selector("#search-results li a")
    first = page.locator("#search-results li a").first
    assert first.text_content().endswith("The convolution")


@pytest.mark.parametrize("word", ["constructor", "__proto__"])
def test_a_word_that_every_object_has_is_searched_like_others(
    tab: Tab, word: str
) -> None:
    page = tab.open(f"search.html?q={word}")
    page.wait_for_function("document.querySelector('.search-summary')?.textContent")
    assert "undefined" not in page.locator("#search-results").text_content()
    assert tab.complaints == []


def test_search_finds_a_class_and_a_word_of_the_reference(tab: Tab) -> None:
    def found(word: str) -> list[str]:
        page = tab.open(f"search.html?q={word}")
        page.wait_for_function("document.querySelector('.search-summary')?.textContent")
        links = page.locator("#search-results li a").all()
        return [str(link.get_attribute("href")) for link in links]

    assert found("BidirectionalSSM")[0].startswith("book/api.html#")
    assert "book/api.html" in found("constructor")


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


@pytest.mark.parametrize("page", ["genindex", "py-modindex", "search"])
def test_pages_without_a_text_of_their_own_are_right(tab: Tab, page: str) -> None:
    """Indices and search."""
    opened = tab.look_at(page)
    assert opened.everywhere(*ANYWHERE, "axe") == {}
    assert opened.complaints == [] and opened.elsewhere == []


def test_axe_judges_the_contrast_of_what_looks_alike_but_for_its_colour(
    tab: Tab,
) -> None:
    visit = tab.visit("book/glossary")
    assert visit.violations() == []
    visit.tab.evaluate("[...document.querySelectorAll('dd p')].at(-2).id = 'pale'")
    visit.tab.evaluate("document.querySelector('#pale').style.color = '#999'")
    for _ in range(2):  # what is wrong is not taken for judged
        (fault,) = visit.violations()
        assert fault.startswith("color-contrast: #pale: ")
    (where,) = visit.everywhere("axe")
    assert where.startswith("axe, light, ")


UNDER_THE_HEAD = """(rows) => {
    const { top } = document.querySelector(".export-badge a").getBoundingClientRect();
    scrollTo({ top: scrollY + top - rows, behavior: "instant" });
}"""


def test_axe_does_not_mind_where_a_page_stands(tab: Tab) -> None:
    """The head of the page lies over what is scrolled under it."""
    visit = tab.visit("book/32_reverse_process")
    visit.at(("dark", 390))
    for rows in (28, 36):
        visit.tab.evaluate(UNDER_THE_HEAD, rows)
        assert visit.violations() == []


@pytest.mark.parametrize(
    ("address", "elsewhere"),
    [("https://example.invalid/a.png", True), ("_static/none.png", False)],
)
def test_what_is_not_there_is_noticed(tab: Tab, address: str, elsewhere: bool) -> None:
    page = tab.visit("book/glossary").tab
    fetch = f"document.querySelector('article').innerHTML += '<img src={address}>'"
    with page.expect_event("console"):
        page.evaluate(fetch)
    assert any(said.startswith("Failed to load resource") for said in tab.complaints)
    assert tab.elsewhere == [address] * elsewhere


def test_a_caption_is_read_where_its_table_is_a_pixel_too_wide(tab: Tab) -> None:
    visit = tab.visit("book/94_what_matters")
    narrow = (
        "table => { const width = table.offsetWidth; "
        "table.style.minWidth = `${width}px`; "
        "table.parentElement.style.width = `${width - 1.2}px`; }"
    )
    visit.tab.locator("article caption").first.locator("..").evaluate(narrow)
    assert not visit.measure(("light", 1280))["captions"]


def test_page_is_dark_from_the_start_for_who_prefers_that(
    browser: Any, server: str
) -> None:
    """Also what a script draws when it is loaded."""
    context = browser.new_context(color_scheme="dark", reduced_motion="reduce")
    visit = Tab(context, server).visit(PAGES[0])
    visit.look = ("dark", 1280)
    assert visit.tab.evaluate("document.documentElement.dataset.theme") == "dark"
    assert not any(visit.measure(("dark", 1280)).values())
    assert visit.complaints == []
    context.close()


WIDE = """() => {
    const formula = document.createElement("mjx-container");
    formula.setAttribute("display", "true");
    formula.style.cssText = "display: block; overflow-x: auto";
    formula.innerHTML = '<div style="width: 500px">x</div>';
    document.querySelector("article p").after(formula);
}"""
# In the dark only: pale code, a light box.
PALE = """() => {
    const style = document.createElement("style");
    style.textContent = `[data-theme=dark] #pale {
        color: #777 !important; background: #555 !important }`;
    document.head.append(style);
    document.querySelector("article p").innerHTML += " <code id=pale>x</code>";
}"""
LIGHT = """() => {
    const box = document.querySelector("article p");
    box.style.background = "light-dark(white, #ddd)";
}"""


# A text that is too small, in a drawing that a script makes.
SMALL = """() => {
    const canvas = document.createElement("canvas");
    canvas.setAttribute("aria-label", "a small text");
    canvas.style.width = "300px";
    document.querySelector("article p").append(canvas);
    const pen = canvas.getContext("2d");
    pen.scale(0.5, 0.5);
    pen.font = "italic 12px serif";
    pen.fillText("x", 10, 20);
}"""


@pytest.mark.parametrize(
    ("fault", "kind", "where"),
    [
        (WIDE, "equations", [("light", 390), ("dark", 390)]),
        (PALE, "codeContrast", [("dark", w) for w in (390, 1280, 1440)]),
        (LIGHT, "slabs", [("dark", w) for w in (390, 1280, 1440)]),
        (SMALL, "smallText", LOOKS),
    ],
    ids=["wide", "pale", "light", "small"],
)
def test_a_fault_is_seen_where_it_is_and_nowhere_else(
    tab: Tab, fault: str, kind: str, where: list[Look]
) -> None:
    visit = tab.visit("book/glossary")
    visit.tab.evaluate(fault)
    seen = [look for look in LOOKS if visit.faults(look).get(kind)]
    assert sorted(seen) == sorted(where)
