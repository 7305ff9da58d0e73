"""Pages of the rendered book, each opened once in a browser and looked at in two themes
and three sizes.
"""

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

Look = tuple[str, int]
# In the order in which a page is looked at: what costs is to set it wide or narrow.
LOOKS: list[Look] = [
    ("light", 1280),
    ("light", 1440),
    ("light", 390),
    ("dark", 390),
    ("dark", 1440),
    ("dark", 1280),
]
# Axe sees each page in both themes and both widths, and pages take turns, so that every
# look is judged.
AXE_LOOKS: list[list[Look]] = [
    [("light", 1280), ("dark", 390)],
    [("light", 390), ("dark", 1280)],
]

# Formulas and code are long, and axe is slow with them: it sees a letter instead, which
# does not scroll (`measures.silentScrollers` is for what does). Of the reference, whose
# entries are all made alike, and of the table of contents, which the first page shows
# whole, it sees the beginning. Of texts that look alike all the way up to the page
# (elements, classes, colours) it judges the contrast of one, and of none where it has
# found nothing wrong with such a one on a page before: most of its time. So it
# does with links, which must not differ from the text around them by their colour
# alone. Rules whose breach is not grave are not asked.
AXE = """async ([impacts, whole, known]) => {
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
    // At the top nothing lies over the text: not the head of the page, nor the button
    // that leads back there.
    scrollTo({ top: 0, behavior: "instant" });
    // Boxes that no longer scroll say so a frame later, which moves what is below them.
    await new Promise((done) =>
        requestAnimationFrame(() => requestAnimationFrame(done)));
    const looks = new Map(), judged = new Set(known);
    const number = (...parts) => {  // 53 bits that stand for all parts
        let a = 0xdeadbeef, b = 0x41c6ce57;
        for (const c of parts.join("|")) {
            a = Math.imul(a ^ c.codePointAt(0), 2654435761);
            b = Math.imul(b ^ c.codePointAt(0), 1597334677);
        }
        a = Math.imul(a ^ (a >>> 16), 2246822507) ^ (b >>> 13);
        b = Math.imul(b ^ (b >>> 16), 3266489909) ^ (a >>> 13);
        return 4294967296 * (2097151 & b) + (a >>> 0);
    };
    const look = (e) => {
        if (e && !looks.has(e)) {
            const s = getComputedStyle(e);
            looks.set(e, number(e.tagName, e.getAttribute("class"), s.backgroundColor,
                s.backgroundImage, s.opacity, look(e.parentElement)));
        }
        return looks.get(e);
    };
    const judge = (e, mark, ...parts) => {
        const kind = number(mark, ...parts, look(e));
        if (judged.has(kind)) return;
        judged.add(kind);
        e.dataset[mark] = "";
        undo.push(() => { delete e.dataset[mark]; });
    };
    const block = (e) =>
        getComputedStyle(e).display.startsWith("inline") ? block(e.parentElement) : e;
    for (const e of document.querySelectorAll("body *")) {
        if (!e.checkVisibility()) continue;
        const s = getComputedStyle(e);
        if ([...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) {
            judge(e, "text", s.color, s.fontSize, s.fontWeight, s.textShadow);
        }
        if (e.matches("a[href]")) {
            const around = block(e), said = e.textContent.trim();
            judge(e, "link", s.color, s.fontWeight, s.textDecoration, s.borderBottom,
                getComputedStyle(e.parentElement).color, getComputedStyle(around).color,
                around.textContent.trim() === said);
        }
    }
    axe.configure({
        rules: [
            { id: "color-contrast", selector: "[data-text]" },
            { id: "link-in-text-block", selector: "a[data-link]" },
        ],
    });
    const more = ["target-size", "label-content-name-mismatch"];
    const grave = axe._audit.rules.filter((rule) => more.includes(rule.id)
        || (rule.enabled && impacts.includes(rule.impact)
            && !rule.tags.includes("experimental")));
    const { violations } = await axe.run(document, {
        resultTypes: ["violations"],
        preload: false,
        runOnly: { type: "rule", values: grave.map((rule) => rule.id) },
    });
    undo.reverse().forEach((back) => back());
    const faults = violations.filter((v) => impacts.includes(v.impact)).flatMap((v) =>
        v.nodes.map((n) => `${v.id}: ${n.target.join(" ")}: ` +
            n.any.concat(n.all, n.none).map((x) => x.message).join("; ")));
    return [faults, [...judged]];
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


# What is measured. On a phone code and tables may scroll, and say that they do.
ANYWHERE = [
    "equations",
    "captions",
    "body",
    "edges",
    "silentScrollers",
    "tabStops",
    "names",
    "codeContrast",
    "smallText",
]


def kinds(look: Look) -> list[str]:
    """What `measures.js` is asked for, by theme and width."""
    theme, width = look
    wide = ["code", "tables"] if width > 1000 else []
    return [*ANYWHERE, *wide, *(["slabs"] if theme == "dark" else [])]


# Two frames later what watches sizes and themes has done its work.
FRAMES = """() => new Promise((done) =>
    requestAnimationFrame(() => requestAnimationFrame(done)))"""

# When the formulas are set; then all that is folded is unfolded.
SET = f"""async () => {{
    while (window.MathJax && !MathJax.startup?.promise) await ({FRAMES})();
    await window.MathJax?.startup.promise;
    document.querySelectorAll("details").forEach((box) => {{ box.open = true; }});
    await ({FRAMES})();
}}"""

# The theme, by the page's own button.
SWITCH = """(theme) => {
    const button = [...document.querySelectorAll(".theme-switch-button")]
        .find((e) => e.checkVisibility());
    const now = document.documentElement.dataset;
    for (let k = 0; k < 3 && now.theme !== theme; k += 1) button.click();
    if (now.theme !== theme) throw Error(`the theme stays ${now.theme}`);
}"""

SURVEY = f"""async (kinds) => {{ await ({FRAMES})(); return survey(kinds); }}"""

# How high the lowest text on a canvas is, as a share of the canvas's width.
WRITTEN = """
for (const name of ["fillText", "strokeText"]) {
    const write = CanvasRenderingContext2D.prototype[name];
    CanvasRenderingContext2D.prototype[name] = function (text, ...place) {
        const { canvas } = this, { a, b } = this.getTransform();
        const share = parseFloat(/[\\d.]+(?=px)/.exec(this.font)) * Math.hypot(a, b)
            / canvas.width;
        const before = canvas.written?.width === canvas.width ? canvas.written : {};
        const smallest = Math.min(share, before.smallest ?? Infinity);
        if (String(text).trim()) canvas.written = { width: canvas.width, smallest };
        return write.call(this, text, ...place);
    };
}"""

# What stands on a page.
CONTENT = """async () => {
    const all = (selector) => [...document.querySelectorAll(selector)];
    const texts = (selector) => all(selector).map((e) => e.textContent);
    const names = (selector) => all(selector).map((e) => e.id);
    const images = all(
        "article img, article object, article .cell_output svg:not(button svg)"
    );
    return {
        title: document.title,
        headings: all("article h1").length,
        heading: document.querySelector("h1").innerText,
        article: document.querySelector("article.bd-article").innerText,
        prefaces: all("article .preface").map((e) => e.innerText),
        figures: all("article figure[id^='fig-']").map((f) => ({
            name: f.id,
            caption: f.querySelector("figcaption")?.textContent.trim(),
            inside: f.querySelectorAll("img, svg, .frame-player, table").length,
        })),
        images: await Promise.all(images.map(async (e) => {
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
        })),
        tables: all("article table[id]").map((e) =>
            [e.id, e.querySelector("caption")?.textContent ?? ""]),
        formulas: all("article mjx-container").length,
        mistaken: all("mjx-merror, merror, [data-mjx-error]").length,
        equations: names("[id^='equation-']"),
        complaining: all(
            ".output.traceback, .output.stderr, .cell_output .stderr").length,
        starts: all("article p").map((p) => p.firstChild)
            .filter((node) => node?.nodeType === Node.TEXT_NODE)
            .map((node) => node.data),
        printed: texts(".cell_output pre"),
        echoed: texts(".cell_output .text_plain pre"),
        inputs: all("article .cell_input").length,
        badges: texts(".export-badge"),
        leads: all(".fold-link a").map((a) => [
            a.closest("p").previousElementSibling.id,
            Boolean(document.querySelector(a.hash)?.closest(".cell")),
        ]),
        links: all("article a[href]").map((a) => a.href),
        players: all(".frame-player").length,
    };
}"""


@dataclass(kw_only=True)
class Opened:
    """An open page, with all that is folded unfolded, and what happened on the way."""

    tab: Any
    page: str
    judged: dict[Look, set[int]]
    complaints: list[str]
    elsewhere: list[str]
    axe: bool = False
    look: Look = ("light", 1280)
    found: dict[Look, dict[str, list[str]]] = field(default_factory=dict)

    @property
    def axe_looks(self) -> list[Look]:
        """Where axe judges the page."""
        return [look for looks in AXE_LOOKS for look in looks]

    def at(self, look: Look) -> None:
        """Make the window so wide, and the theme this one."""
        (theme, width), (old, before) = look, self.look
        if width != before:
            size = {"width": width, "height": HEIGHTS[width]}
            self.tab.set_viewport_size(size)
        if theme != old:
            self.tab.evaluate(SWITCH, theme)
        self.look = look

    def measure(self, look: Look) -> dict[str, list[str]]:
        """What `measures.js` and axe find at a look, now."""
        self.at(look)
        found: dict[str, list[str]] = self.tab.evaluate(SURVEY, kinds(look))
        if look in self.axe_looks:
            found["axe"] = self.violations()
        return found

    def faults(self, look: Look) -> dict[str, list[str]]:
        """What was found at a look; the first question has all of them looked at."""
        if not self.found:
            self.found = {one: self.measure(one) for one in LOOKS}
        return self.found[look]

    def everywhere(self, *asked: str) -> dict[str, list[str]]:
        """Where something of these kinds is wrong, and what; {} is as it should be."""
        places = [
            (kind, look) for look in LOOKS for kind in asked if kind in kinds(look)
        ]
        if "axe" in asked:
            places += [("axe", look) for look in self.axe_looks]
        assert {kind for kind, _ in places} == set(asked), (
            "nobody looks for one of them"
        )
        seen = {(kind, *look): self.faults(look)[kind] for kind, look in places}
        return {", ".join(map(str, at)): what for at, what in seen.items() if what}

    def violations(self) -> list[str]:
        """What axe finds serious or critical."""
        if not self.axe:
            self.tab.evaluate(AXE_SCRIPT)
            self.axe = True
        known = self.judged.setdefault(self.look, set())
        given = [GRAVE, self.page == PAGES[0], list(known)]
        faults, judged = self.tab.evaluate(AXE, given)
        if not any(fault.startswith(("color-", "link-in-")) for fault in faults):
            known.update(judged)
        return list(faults)


@dataclass(kw_only=True)
class Visit(Opened):
    """An open chapter, with its text."""

    chapter: Chapter
    source: str
    content: dict[str, Any]

    @property
    def axe_looks(self) -> list[Look]:
        """Two of four: of the pages that one tab opens, every second has the same."""
        return AXE_LOOKS[PAGES.index(self.page) // 2 % 2]


class Tab:
    """A tab in which pages are opened one after the other, all in one process of the
    browser, which has then compiled the scripts and drawn the letters of the next page.
    """

    def __init__(self, context: Any, server: str) -> None:
        self.server = server
        self.page = tab = context.new_page()
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        self.judged: dict[Look, set[int]] = {}
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
        tab.add_init_script(WRITTEN)
        # Each page begins with the theme that the reader's system asks for.
        tab.add_init_script(
            "if (location.protocol === 'http:') localStorage.removeItem('mode');"
        )

    def open(self, address: str) -> Any:
        """Go to a page; what the one before has complained of is forgotten."""
        self.page.goto("about:blank")  # first, or the old page would be set anew
        self.page.set_viewport_size({"width": 1280, "height": HEIGHTS[1280]})
        self.complaints, self.elsewhere = [], []
        self.page.goto(f"{self.server}/{address}", wait_until="load")
        return self.page

    def look_at(self, page: str, kind: type[Opened] = Opened, **more: Any) -> Any:
        """Open a page, whoever made it; its formulas are set."""
        tab = self.open(f"{page}.html")
        tab.evaluate(SET)
        tab.evaluate(MEASURES)
        happened = {"complaints": self.complaints, "elsewhere": self.elsewhere}
        return kind(tab=tab, page=page, judged=self.judged, **happened, **more)

    def visit(self, page: str) -> Visit:
        """Open a chapter, and read its text."""
        path = ROOT / f"{page}.md"
        text = {"source": path.read_text("utf-8"), "chapter": read_chapter(path)}
        visit: Visit = self.look_at(page, Visit, **text, content={})
        visit.content = visit.tab.evaluate(CONTENT)
        return visit


@pytest.fixture(name="tab", scope="module")
def the_tab(browser: Any, server: str) -> Iterator[Tab]:
    """A tab of a reader who prefers the light theme and no motion."""
    context = browser.new_context(color_scheme="light", reduced_motion="reduce")
    yield Tab(context, server)
    context.close()


def the_visit(pages: list[str]) -> Any:
    """A fixture that opens these pages, one after the other."""

    @pytest.fixture(
        name="visit", scope="module", params=pages, ids=lambda page: page.split("/")[-1]
    )
    def visit(request: pytest.FixtureRequest, tab: Tab) -> Visit:
        visit = tab.visit(request.param)
        assert visit.tab.evaluate("document.documentElement.dataset.theme") == "light"
        return visit

    return visit
