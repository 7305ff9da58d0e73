"""The scripts of the explorables become one, and it runs where files are opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stages import bundle, drawn, picture


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
