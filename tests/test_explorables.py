"""The scripts of the explorables become one, and it runs where files are opened."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import jupytext
import pytest
from matplotlib.figure import Figure
from stages import bundle, drawn, picture

from tools.book import ROOT


def modules(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (folder / f"{name}.js").write_text(text)
    return folder


def test_modules_stand_after_those_that_they_import(tmp_path: Path) -> None:
    folder = modules(
        tmp_path,
        main='import { a, b } from "./zed.js";\nexport function start() { a(b); }\n',
        zed="export const b = 1;\nexport function a(x) { return x; }\n",
    )
    text = bundle(folder)
    assert text.index("modules.zed =") < text.index("modules.main =")
    assert "const { a, b } = modules.zed;" in text
    assert "import " not in text and "export " not in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('import { gone } from "./zed.js";\n', "zed.js has no"),
        ('import { b } from "./nowhere.js";\n', "nowhere.js has no"),
        ('import zed from "./zed.js";\n', "cannot bundle 'import zed"),
        ("export default 3;\n", "cannot bundle 'export default"),
    ],
)
def test_other_forms_are_refused(tmp_path: Path, text: str, said: str) -> None:
    folder = modules(tmp_path, main=text, zed="export const b = 1;\n")
    with pytest.raises(ValueError, match=said):
        bundle(folder)


@pytest.mark.end_to_end
def test_a_push_moves_the_spring(opened: Any) -> None:
    tab = opened("spring", {"omega": 6.28, "gamma": 0.7})
    tab.emulate_media(reduced_motion="reduce")
    tab.reload()
    tab.wait_for_function("document.querySelector('canvas').height > 100")
    drawn(tab)
    before = picture(tab)
    tab.wait_for_timeout(200)
    assert picture(tab) == before, "it moves although less motion was asked for"
    tab.get_by_role("button", name="Push").press("Enter")
    drawn(tab)
    pushed = picture(tab)
    assert pushed != before
    tab.get_by_label("damping").press("End")
    tab.get_by_role("button", name="Push").click()
    drawn(tab)
    assert picture(tab) not in (before, pushed)


@pytest.mark.end_to_end
def test_a_tap_on_the_mass_pushes_and_then_the_space_bar_does(opened: Any) -> None:
    tab = opened("spring", {"omega": 6.28, "gamma": 0.7})
    tab.emulate_media(reduced_motion="reduce")
    tab.reload()
    tab.wait_for_timeout(200)
    before, canvas = picture(tab), tab.locator("canvas")
    canvas.click(position={"x": 500, "y": 100})
    drawn(tab)
    assert picture(tab) == before, "a click on the output is no push"
    canvas.click(position={"x": 48, "y": 120})
    drawn(tab)
    tapped = picture(tab)
    tab.get_by_label("damping").focus()
    canvas.click(position={"x": 48, "y": 120})
    tab.keyboard.press("Space")
    assert before != tapped
    assert tab.evaluate("document.activeElement.textContent") == "Push"


@pytest.fixture
def twins() -> ModuleType:
    """The module beside the chapters; the extension of the book has its name too."""
    path = ROOT / "book" / "explorables.py"
    spec = importlib.util.spec_from_file_location("twins", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(
    twins: ModuleType, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> tuple[dict[str, Any], list[Any], dict[str, Any]]:
    """What is displayed of a figure that takes so long to draw, what it has been drawn
    with, and its controls.
    """
    bundles: list[Any] = []
    drawn_with: list[Any] = []
    made: dict[str, Any] = {}
    output = twins.interactive_output

    def draw(a: int, pushes: int) -> Figure:
        """A "line"
        on white.
        """
        drawn_with.append((a, pushes))
        return Figure(figsize=(1, 1))

    def watched(show: Any, widgets: dict[str, Any]) -> Any:
        made.update(widgets)
        return output(show, widgets)

    monkeypatch.setattr(twins, "display", lambda it, **_: bundles.append(it))
    monkeypatch.setattr(twins, "perf_counter", itertools.count(0, seconds).__next__)
    monkeypatch.setattr(twins, "interactive_output", watched)
    twins.explorable("x", draw, data={"b": 2}, a=(0, 9), pushes=twins.Presses(1))
    return bundles[-1], drawn_with, made


def test_a_twin_has_widgets_for_a_kernel_and_a_picture_for_the_page(
    twins: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, drawn_with, made = shown(twins, monkeypatch, 0.01)
    assert "application/vnd.jupyter.widget-view+json" in bundle
    text = bundle["text/html"]
    assert text.count("A &quot;line&quot; on white.") == 2, (
        "its name, and its picture's"
    )
    assert '{"b": 2, "a": 4, "pushes": 1}' in text and "svg+xml;base64," in text
    assert made["a"].description == "a"
    made["a"].value = 7
    made["pushes"].click()
    made["pushes"].click()
    assert drawn_with[-3:] == [(7, 1), (7, 2), (7, 3)]


@pytest.mark.parametrize(("seconds", "follows"), [(0.05, True), (0.5, False)])
def test_what_is_drawn_slowly_waits_until_the_hand_lets_go(
    twins: ModuleType, monkeypatch: pytest.MonkeyPatch, seconds: float, follows: bool
) -> None:
    assert shown(twins, monkeypatch, seconds)[2]["a"].continuous_update is follows


def test_a_twin_is_one_short_cell() -> None:
    """What draws stands before; so many lines have the call and its controls."""
    lines = {}
    for path in sorted((ROOT / "book").glob("*.md")):
        if not re.search(r"^explorable\($", path.read_text("utf-8"), re.MULTILINE):
            continue
        for cell in jupytext.read(path).cells:
            if cell.cell_type == "code" and "\nexplorable(" in f"\n{cell.source}":
                name = cell.metadata["mystnb"]["figure"]["name"]
                lines[name] = len(cell.source.splitlines())
    assert len(lines) >= 11 and max(lines.values()) <= 12, lines
