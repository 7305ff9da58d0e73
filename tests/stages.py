"""Explorables in pages of their own, and what the modules of `book/_js` compute."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.book import ROOT

sys.path.insert(0, str(ROOT / "book" / "_ext"))
from explorables import bundle  # type: ignore[import-not-found]
from figures import CONTRAST, contrast  # type: ignore[import-not-found]
from figures import PAGE as DARK

__all__ = ["bundle", "computed", "drawn", "opened", "picture", "stroke"]

PAGE = (
    '<html data-theme="light"><meta charset="utf-8"><script src="x.js" defer></script>'
    f'<link rel="stylesheet" href="{(ROOT / "book/_static/book.css").as_uri()}">'
    "<body>{}</body>"
)
BOX = (
    '<div class="explorable" data-name="{}"><img class="explorable-still" alt="">'
    '<script type="application/json">{}</script></div>'
)


# Every colour in which a text has been written on a canvas.
INKS = """
    const write = CanvasRenderingContext2D.prototype.fillText;
    window.inks = new Set();
    CanvasRenderingContext2D.prototype.fillText = function (...given) {
      if (given[0] !== "") window.inks.add(this.fillStyle);
      return write.apply(this, given);
    };
"""


@pytest.fixture
def opened(tmp_path: Path, browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens one explorable from a file, in a page of its own; collects complaints, and
    looks in both themes whether what is written on its canvases can be read.
    """
    (tmp_path / "x.js").write_text(bundle(ROOT / "book" / "_js"), encoding="utf-8")
    tabs = []

    def show(name: str, given: dict[str, Any], **look: Any) -> Any:
        page = tmp_path / f"{name}.html"
        page.write_text(PAGE.format(BOX.format(name, json.dumps(given))))
        tab = browser.new_page(viewport={"width": 800, "height": 700}, **look)
        tab.complaints = []
        tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.add_init_script(INKS)
        tab.goto(page.as_uri())
        tabs.append(tab)
        return tab

    yield show
    for tab in tabs:
        assert tab.complaints == []
        for theme, ground in (("light", "#ffffff"), ("dark", DARK)):
            # at once: a picture may be due in between
            turn = "document.documentElement.dataset.theme = theme"
            tab.evaluate(f"theme => {{ inks.clear(); {turn}; }}", theme)
            drawn(tab)
            inks = tab.evaluate("[...inks]")
            assert inks, "nothing is written"
            assert {ink for ink in inks if contrast(ink, ground) < CONTRAST} == set()
        tab.close()


def picture(tab: Any, number: int = 0) -> str:
    """What one of the page's canvases shows."""
    canvas = tab.locator("canvas").nth(number)
    return str(canvas.evaluate("e => e.toDataURL()"))


def stroke(tab: Any, number: int, start: tuple[int, int], end: tuple[int, int]) -> None:
    """A finger goes over one of the page's canvases, as a touch screen tells it."""
    box = tab.locator("canvas").nth(number).bounding_box()
    screen = tab.context.new_cdp_session(tab)
    for k in range(11):
        x, y = (a + (b - a) * k / 10 for a, b in zip(start, end, strict=True))
        finger = {"x": box["x"] + x, "y": box["y"] + y}
        kind = "touchMove" if k else "touchStart"
        screen.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [finger]})
    screen.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


@pytest.fixture
def computed(tmp_path: Path, browser: Any) -> Callable[..., Any]:
    """Calls a function of a module of `book/_js` in a browser, for several cases."""

    def call(module: str, function: str, cases: list[Any]) -> Any:
        folder = tmp_path / "modules"
        shutil.copytree(ROOT / "book" / "_js", folder, dirs_exist_ok=True)
        (folder / "main.js").write_text(
            f'import {{ {function} }} from "./{module}.js";\n'
            "const plain = (_, v) => (ArrayBuffer.isView(v) ? [...v] : v);\n"
            f"const cases = {json.dumps(cases)};\n"
            f"const found = () => cases.map((given) => {function}(...given));\n"
            "export function start() {\n"
            "  window.found = JSON.stringify(found(), plain);\n}\n"
        )
        tab = browser.new_page()
        found = json.loads(tab.evaluate(f"{bundle(folder)}; found"))
        tab.close()
        return found

    return call


def drawn(tab: Any) -> None:
    """Wait until what has changed is drawn: before the next frame but one."""
    frames = "requestAnimationFrame(() => requestAnimationFrame(done))"
    tab.evaluate(f"() => new Promise(done => {frames})")
