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
# entries are all made alike, it sees the first.
AXE = """async (impacts) => {
    const boxes = [...document.querySelectorAll("mjx-container, article pre")];
    const kept = boxes.map((box) => [...box.childNodes]);
    boxes.forEach((box) => {
        box.replaceChildren("x");
        box.style.overflow = "hidden";
    });
    const entries = [...document.querySelectorAll("dl.py:not(dl.py dl.py)")].slice(12);
    entries.forEach((entry) => { entry.style.display = "none"; });
    const { violations } = await axe.run(document, {
        resultTypes: ["violations"],
        preload: false,
        rules: {
            "target-size": { enabled: true },
            "label-content-name-mismatch": { enabled: true },
        },
    });
    boxes.forEach((box, i) => {
        box.replaceChildren(...kept[i]);
        box.style.overflow = "";
    });
    entries.forEach((entry) => { entry.style.display = ""; });
    return violations.filter((v) => impacts.includes(v.impact)).flatMap((v) =>
        v.nodes.map((n) => `${v.id}: ${n.target.join(" ")}: ` +
            n.any.concat(n.all, n.none).map((x) => x.message).join("; ")));
}"""


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


@pytest.fixture(scope="session")
def server(book: Path) -> Iterator[str]:
    with serving(book) as address:
        yield address


@dataclass
class Visit:
    """An open page, with all that is folded unfolded, and what happened on the way."""

    tab: Any
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
        return [
            f"{kind}: {fault}"
            for kind in kinds
            for fault in self.tab.evaluate(f"measures.{kind}()")
        ]

    def violations(self) -> list[str]:
        """What axe finds serious or critical."""
        if not self.axe:
            self.tab.evaluate(AXE_SCRIPT)
            self.axe = True
        found: list[str] = self.tab.evaluate(AXE, GRAVE)
        return found


# Two frames later.
FRAMES = """() => new Promise((done) =>
    requestAnimationFrame(() => requestAnimationFrame(done)))"""


def open_page(
    browser: Any, server: str, address: str
) -> tuple[Any, list[str], list[str]]:
    """A tab (of a browser or of a context) and what it complains of and asks for."""
    tab = browser.new_page()
    tab.set_viewport_size({"width": 1280, "height": HEIGHTS[1280]})
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


def visit_page(context: Any, server: str, page: str) -> Visit:
    """Open a page; its formulas are set."""
    path = ROOT / f"{page}.md"
    tab, complaints, elsewhere = open_page(context, server, f"{page}.html")
    tab.wait_for_function(
        "!window.MathJax || (MathJax.startup && MathJax.startup.promise)"
    )
    tab.evaluate("() => window.MathJax ? MathJax.startup.promise : null")
    tab.evaluate(
        "document.querySelectorAll('details').forEach((box) => { box.open = true; })"
    )
    tab.evaluate(MEASURES)
    tab.evaluate(FRAMES)
    source = path.read_text(encoding="utf-8")
    return Visit(tab, read_chapter(path), source, complaints, elsewhere)
