"""Explorables of trained networks show the numbers that they are given."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from stages import drawn


@pytest.mark.end_to_end
def test_the_digits_of_a_moment_are_drawn(opened: Any) -> None:
    pixels = bytes([17] * 16 * 64 + [90] * 16 * 64 + [201] * 16 * 64)
    given = {
        "k": 2,
        "steps": [50, 100, 150, 200],
        "losses": {f"q{k}": [0.9, 0.5, 0.1, 0.01 * k] for k in range(1, 6)},
        "moments": [50, 100, 200],
        "pixels": base64.b64encode(pixels).decode(),
    }
    tab = opened("growth", given)

    def grey() -> int:
        drawn(tab)
        inside = "getContext('2d').getImageData(10, 30, 1, 1).data[0]"
        return int(tab.evaluate(f"document.querySelectorAll('canvas')[1].{inside}"))

    assert grey() == 201
    slider = tab.get_by_role("slider")
    slider.press("Home")
    assert grey() == 17 and slider.get_attribute("aria-valuetext") == "step 50"
    curves = tab.locator("canvas").first
    curves.click(position={"x": curves.bounding_box()["width"] / 2, "y": 100})
    assert grey() == 90 and slider.get_attribute("aria-valuetext") == "step 100"


@pytest.mark.end_to_end
def test_a_clicked_pixel_shows_its_row_of_the_jacobian(opened: Any) -> None:
    import matplotlib
    import numpy as np

    rng = np.random.default_rng(0)
    names = ["trained", *(f"random, M = {M}" for M in (1, 2, 4))]
    fields = {
        name: {way: rng.integers(0, 256, (64, 64)) for way in ("both", "forward")}
        for name in names
    }
    given: dict[str, Any] = {
        name: {
            way: base64.b64encode(levels.astype(np.uint8).tobytes()).decode()
            for way, levels in ways.items()
        }
        for name, ways in fields.items()
    }
    tab = opened("reach", given | {"row": 4, "column": 4, "direction": "both", "M": 2})
    drawing = tab.locator("canvas")
    drawn(tab)
    cell = int(min((drawing.evaluate("e => e.clientWidth") - 20) / 2, 280)) // 8

    def place(panel: int, row: int, column: int) -> list[int]:
        """Within a pixel of an image; the second begins 14 after the first."""
        left = 2 + panel * (8 * cell + 14)
        return [left + cell * column + cell // 3, 24 + cell * row + cell // 3]

    def shown(panel: int) -> Any:
        drawn(tab)
        places = [place(panel, k // 8, k % 8) for k in range(64)]
        look = """(places) => {
          const pen = document.querySelector("canvas").getContext("2d");
          return places.map(([x, y]) => [...pen.getImageData(x, y, 1, 1).data]);
        }"""
        return np.array(tab.evaluate(look, places))[:, :3]

    def colours(levels: Any) -> Any:
        """Those that matplotlib has; white where nothing passes."""
        map_ = matplotlib.colormaps["cividis"]
        real = 255 * map_((levels - 1) / 254)[:, :3]
        return np.where(levels[:, None] > 0, real, 255)

    def expect(panel: int, name: str, way: str, pixel: int) -> None:
        wanted = colours(fields[name][way][pixel])
        assert np.abs(shown(panel) - wanted).max() < 20, (name, way, pixel)

    expect(0, "random, M = 2", "both", 36)
    expect(1, "trained", "both", 36)
    x, y = place(1, row=1, column=6)
    drawing.click(position={"x": x, "y": y})
    expect(1, "trained", "both", 14)
    assert tab.get_by_label("row").input_value() == "1"
    tab.get_by_label("column").press("ArrowRight")
    tab.get_by_label("read").select_option("forward")
    tab.get_by_label("M of the random network").select_option("4")
    expect(0, "random, M = 4", "forward", 15)
    expect(1, "trained", "forward", 15)
