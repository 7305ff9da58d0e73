"""Pages of the rendered book, each opened once in a browser by the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.base import AXE_SCRIPT
from browsers import absent, serving

from tools.book import ROOT, Chapter, read_chapter, reading_order

HTML = ROOT / "_build" / "html"
PAGES = reading_order()
HEIGHTS = {1440: 900, 1280: 800, 390: 844}
MEASURES = (Path(__file__).parent / "measures.js").read_text(encoding="utf-8")
GRAVE = ("serious", "critical")

# Formulas and code are long, and axe is slow with them: it sees a letter instead, which
# does not scroll (`measures.silentScrollers` is for what does). Of the reference, whose
# entries are all made alike, and of the table of contents, which the first page shows
# whole, it sees the beginning. Of texts that look alike all the way up to the page
# (elements, classes, colours) it judges the contrast of one: most of its time.
AXE = """async ([impacts, whole]) => {
    const undo = [];
    for (const box of document.querySelectorAll("mjx-container, article pre")) {
        const kept = [...box.childNodes];
        box.replaceChildren("x");
        box.style.overflow = "hidden";
        undo.push(() => { box.replaceChildren(...kept); box.style.overflow = ""; });
    }
    const alike = ["dl.py:not(dl.py dl.py)", ".bd-links li:not(.current)"];
    for (const some of whole ? [] : alike) {
        for (const entry of [...document.querySelectorAll(some)].slice(12)) {
            const place = document.createComment("");
            entry.replaceWith(place);
            undo.push(() => place.replaceWith(entry));
        }
    }
    const numbers = new Map(), looks = new Map();
    const number = (...parts) => {
        const all = parts.join("|");
        if (!numbers.has(all)) numbers.set(all, numbers.size);
        return numbers.get(all);
    };
    const look = (e) => {
        if (e && !looks.has(e)) {
            const s = getComputedStyle(e);
            looks.set(e, number(e.tagName, e.getAttribute("class"), s.backgroundColor,
                s.backgroundImage, s.opacity, look(e.parentElement)));
        }
        return looks.get(e);
    };
    const kinds = new Map();
    for (const e of document.querySelectorAll("body *")) {
        if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
        if (!e.checkVisibility()) continue;
        const s = getComputedStyle(e);
        const kind = number(s.color, s.fontSize, s.fontWeight, s.textShadow, look(e));
        if (!kinds.has(kind)) kinds.set(kind, e);
    }
    for (const e of kinds.values()) {
        e.dataset.oneOfItsKind = "";
        undo.push(() => { delete e.dataset.oneOfItsKind; });
    }
    axe.configure({
        rules: [{ id: "color-contrast", selector: "[data-one-of-its-kind]" }],
    });
    const { violations } = await axe.run(document, {
        resultTypes: ["violations"],
        preload: false,
        rules: {
            "target-size": { enabled: true },
            "label-content-name-mismatch": { enabled: true },
        },
    });
    undo.reverse().forEach((back) => back());
    return violations.filter((v) => impacts.includes(v.impact)).flatMap((v) =>
        v.nodes.map((n) => `${v.id}: ${n.target.join(" ")}: ` +
            n.any.concat(n.all, n.none).map((x) => x.message).join("; ")));
}"""


@pytest.fixture(name="book", scope="session")
def the_book() -> Path:
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


@pytest.fixture(name="server", scope="session")
def the_server(book: Path) -> Iterator[str]:
    with serving(book) as address:
        yield address


@dataclass
class Visit:
    """An open page, with all that is folded unfolded, and what happened on the way."""

    tab: Any
    page: str
    chapter: Chapter
    source: str
    complaints: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    axe: bool = False

    def resize(self, width: int) -> None:
        """Make the window so wide; what watches sizes has then done its work."""
        if self.tab.viewport_size["width"] != width:
            self.tab.set_viewport_size({"width": width, "height": HEIGHTS[width]})
            self.tab.evaluate(FRAMES)

    def faults(self, *kinds: str) -> list[str]:
        """What `measures.js` finds."""
        found: list[str] = self.tab.evaluate(FAULTS, kinds)
        return found

    def violations(self) -> list[str]:
        """What axe finds serious or critical."""
        if not self.axe:
            self.tab.evaluate(AXE_SCRIPT)
            self.axe = True
        found: list[str] = self.tab.evaluate(AXE, [GRAVE, self.page == PAGES[0]])
        return found


FAULTS = """(kinds) => kinds.flatMap((kind) =>
    measures[kind]().map((fault) => `${kind}: ${fault}`))"""

# Two frames later.
FRAMES = """() => new Promise((done) =>
    requestAnimationFrame(() => requestAnimationFrame(done)))"""

# When the formulas are set; then all that is folded is unfolded.
SET = f"""async () => {{
    while (window.MathJax && !MathJax.startup?.promise) await ({FRAMES})();
    await window.MathJax?.startup.promise;
    document.querySelectorAll("details").forEach((box) => {{ box.open = true; }});
    await ({FRAMES})();
}}"""


class Tab:
    """A tab in which pages are opened one after the other, all in one process of the
    browser, which has then compiled the scripts and drawn the letters of the next page.
    """

    def __init__(self, context: Any, server: str) -> None:
        self.server = server
        self.page = tab = context.new_page()
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        local = (server, "data:", "blob:", "about:")

        def complain(text: str, of: bool = True) -> None:
            if of:
                self.complaints.append(text)

        def ask(url: str) -> None:
            if not url.startswith(local):
                self.elsewhere.append(url)

        tab.on("console", lambda m: complain(m.text, m.type in ("error", "warning")))
        tab.on("pageerror", lambda error: complain(str(error)))
        tab.on("response", lambda r: complain(f"{r.status} {r.url}", r.status >= 400))
        tab.on("request", lambda r: ask(r.url))

    def open(self, address: str) -> Any:
        """Go to a page; what the one before has complained of is forgotten."""
        self.page.set_viewport_size({"width": 1280, "height": HEIGHTS[1280]})
        self.page.goto("about:blank")
        self.complaints, self.elsewhere = [], []
        self.page.goto(f"{self.server}/{address}", wait_until="load")
        return self.page

    def visit(self, page: str) -> Visit:
        """Open a page of the book; its formulas are set."""
        path = ROOT / f"{page}.md"
        tab = self.open(f"{page}.html")
        tab.evaluate(SET)
        tab.evaluate(MEASURES)
        source = path.read_text(encoding="utf-8")
        chapter = read_chapter(path)
        return Visit(tab, page, chapter, source, self.complaints, self.elsewhere)


@pytest.fixture(name="tab", scope="module")
def the_tab(request: pytest.FixtureRequest, browser: Any, server: str) -> Iterator[Tab]:
    """A tab in the theme that the file of tests names."""
    context = browser.new_context(
        color_scheme=request.module.THEME, reduced_motion="reduce"
    )
    yield Tab(context, server)
    context.close()


@pytest.fixture(
    name="visit", scope="module", params=PAGES, ids=lambda page: page.split("/")[-1]
)
def the_visit(request: pytest.FixtureRequest, tab: Tab) -> Visit:
    visit = tab.visit(request.param)
    assert visit.tab.evaluate("document.documentElement.dataset.theme") == (
        request.module.THEME
    )
    return visit
