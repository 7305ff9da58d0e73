"""What is asserted of every page of the rendered book, in a real browser.

`test_pages_odd.py` and `test_pages_even.py` take a half of the pages each, so that two
cores have something to do. What is asked `everywhere` holds in both themes at three
sizes.

`make test` builds the book first. A plain `pytest` skips these tests where the book is
not built or is older than its text, or where there is no Chromium;
DIFFUSSM_REQUIRE_BOOK and DIFFUSSM_REQUIRE_BROWSER forbid that.
"""

from __future__ import annotations

import functools
import re
import tempfile
from pathlib import Path

import pytest
from visits import FRAMES, Visit, the_book, the_server, the_tab  # noqa: F401 (the fixtures)

from tools.book import ROOT
from tools.preface import preface

pytestmark = pytest.mark.end_to_end


def prose(visit: Visit) -> str:
    """A page's text without its header, its code and what stands in backticks (but for
    `{math}` blocks).
    """
    text = re.sub(r"\A---\n.*?\n---\n", "", visit.source, flags=re.DOTALL)
    text = re.sub(
        r"^(`{3,})\{code-cell\}.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE
    )
    return text


@functools.cache
def anchors(page: Path) -> frozenset[str]:
    """What one can link to on a rendered page."""
    return frozenset(re.findall(r'id="([^"]+)"', page.read_text(encoding="utf-8")))


def test_page_has_title_and_content(visit: Visit) -> None:
    plain = re.sub(r"[`*$]|\{\w+\}", "", visit.chapter.title)
    heading = visit.content["heading"].strip().rstrip("#").strip()
    assert visit.content["headings"] == 1
    if "$" not in visit.chapter.title:
        assert heading.endswith(plain)
        assert plain in visit.content["title"]
    article = visit.content["article"]
    assert len(article) > 0.25 * len(prose(visit)) or "{bibliography}" in visit.source
    assert len(article.strip()) > len(plain), "nothing but a title"


def test_numbered_pages_say_how_long_they_are(visit: Visit) -> None:
    said = preface(visit.chapter.name.removesuffix(".md"))
    assert len(visit.content["prefaces"]) == bool(said)
    for shown in visit.content["prefaces"]:
        assert shown.startswith(said.partition(";")[0].rstrip("."))


def test_figures_are_there_and_described(visit: Visit) -> None:
    named = re.findall(r"^ *:?name: *(fig-[\w-]+) *$", visit.source, re.MULTILINE)
    figures = visit.content["figures"]
    assert sorted(figure["name"] for figure in figures) == sorted(named)
    assert all(figure["caption"] and figure["inside"] for figure in figures), figures
    for image in visit.content["images"]:
        assert image["drawn"], f"not loaded: {image['what']}"
        alt = image["alt"].strip()
        assert alt and not re.search(r"_images/|\.(svg|png)$", alt), (
            f"no alternative text: {image['what']}"
        )


def test_tables_are_numbered(visit: Visit) -> None:
    named = re.findall(r"^ *:?name: *(tab[\w-]+) *$", visit.source, re.MULTILINE)
    for name in named:
        captions = [text for one, text in visit.content["tables"] if one == name]
        assert len(captions) == 1, f"{name} is not on the page"
        (caption,) = captions
        assert re.match(r"\s*Table\s[\d.]+ *\S", caption), f"{name}: {caption!r}"


def test_mathematics_is_typeset(visit: Visit) -> None:
    text = re.sub(r"``.+?``|`(?!`)[^`\n]+`", "", prose(visit))
    has_math = "{math}" in text or re.search(r"(?<!\\)\$[^$]+\$", text)
    typeset = visit.content["formulas"]
    assert typeset > 0 or not has_math, "mathematics in the text, none on the page"
    assert visit.content["mistaken"] == 0
    labels = re.findall(r"^:label: *(eq-[\w-]+)", visit.source, re.MULTILINE)
    for label in labels:
        there = visit.content["equations"].count(f"equation-{label}")
        assert there == 1, f"{label} is not on the page"


def test_no_cell_failed_or_complained(visit: Visit) -> None:
    assert visit.content["complaining"] == 0
    text = visit.content["article"]
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
    starts = visit.content["starts"]
    assert not [words for words in starts if words.lstrip().startswith("|")], (
        "a table was not set as one"
    )


def test_outputs_are_short_and_the_same_anywhere(visit: Visit) -> None:
    """No object printed in full, no folder of the machine that made the page."""
    for text in visit.content["printed"]:
        assert text.count("\n") <= 40, f"{len(text)} characters: {text[:200]}"
        for path in (tempfile.gettempdir() + "/", str(ROOT)):
            assert path not in text, text[:400]
        assert not re.search(r" at 0x[0-9a-f]{8}", text), text[:400]
        assert "it/s]" not in text, f"a bar that stands still: {text[:200]}"
    for text in visit.content["echoed"]:
        assert not text.strip().isdigit(), f"a number that says nothing: {text}"


def test_code_cells_are_on_the_page(visit: Visit) -> None:
    hidden = sum(
        "remove-cell" in cell.tags or "remove-input" in cell.tags
        for cell in visit.chapter.cells
    )
    assert visit.content["inputs"] == len(visit.chapter.cells) - hidden


def test_glued_figures_lead_to_their_code(visit: Visit) -> None:
    """It stands further down; a browser unfolds what a link leads to."""
    glued = re.findall(r"\{glue:figure\} \S+\n:name: (\S+)", visit.source)
    assert visit.content["leads"] == [[name, True] for name in glued]


def test_exported_cells_carry_the_badge(visit: Visit) -> None:
    badges = [text.strip() for text in visit.content["badges"]]
    assert badges == [f"diffussm.{visit.chapter.module}"] * len(visit.chapter.exported)


def test_links_within_the_book_lead_somewhere(visit: Visit, book: Path) -> None:
    for link in visit.content["links"]:
        if not link.startswith("http://127.0.0.1"):
            continue
        path, _, anchor = link.split("/", 3)[3].partition("#")
        target = book / path
        assert target.is_file(), f"{link} leads nowhere"
        if anchor and target.suffix == ".html":
            assert anchor in anchors(target), link


def test_players_move(visit: Visit) -> None:
    if not visit.content["players"]:
        return
    visit.at(("light", 1280))
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


# A key that changes what a control says.
KEY = """(e) => {
    if (e.type === "range") return Number(e.value) < Number(e.max) ? "End" : "Home";
    if (e.tagName === "SELECT") return e.selectedIndex ? "ArrowUp" : "ArrowDown";
    return { number: "ArrowUp", checkbox: " " }[e.type] ?? "Enter";
}"""
CHANGED = "([box, before]) => pictures(box) !== before"


def test_explorables_are_drawn_and_answer_a_key(visit: Visit) -> None:
    """Each that the text has; a key on its first two controls changes the picture (the
    first may be a button for what is there already).
    """
    called = r"^(?:(?:explorable|live_model)\(|```\{live-model\}$)"
    boxes = visit.tab.locator("article .explorable").all()
    assert len(boxes) == len(re.findall(called, visit.source, re.MULTILINE))
    visit.at(("light", 1280))
    for box in boxes:
        controls = box.locator(".explorable-stage :is(input, select, button)")
        controls.first.focus(timeout=5_000)
        visit.tab.evaluate(FRAMES)
        before = box.evaluate("pictures")
        assert before, "nothing is drawn"
        for control in controls.all()[:2]:
            control.press(control.evaluate(KEY))
        given = [box.element_handle(), before]
        visit.tab.wait_for_function(CHANGED, arg=given, timeout=20_000)


def test_nothing_is_cut(visit: Visit) -> None:
    """No formula, no caption, nor the page itself; no code and no table but on a phone.

    What scrolls there shows that it does and can be reached without a mouse.
    """
    kinds = "equations", "captions", "body", "silentScrollers", "code", "tables"
    assert visit.everywhere(*kinds) == {}


def test_boxes_begin_where_the_text_does(visit: Visit) -> None:
    assert visit.everywhere("edges") == {}


def test_what_one_uses_has_a_name(visit: Visit) -> None:
    assert visit.everywhere("names", "tabStops") == {}


def test_code_can_be_read(visit: Visit) -> None:
    assert visit.everywhere("codeContrast") == {}


def test_figures_can_be_read(visit: Visit) -> None:
    assert visit.everywhere("smallText") == {}


def test_nothing_is_light_in_the_dark(visit: Visit) -> None:
    assert visit.everywhere("slabs") == {}


def test_axe_finds_nothing_grave(visit: Visit) -> None:
    assert visit.everywhere("axe") == {}


def test_console_is_silent_and_no_other_host_is_asked(visit: Visit) -> None:
    visit.everywhere("body")  # it has been looked at
    assert visit.complaints == []
    assert visit.elsewhere == []
