"""The kernels of a block to choose from: what is shown is what the page wrote."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from stages import drawn, picture

KERNELS = np.exp(-np.arange(24)[:, None] / 9) * np.cos(
    np.outer(np.arange(24), range(64))
)
pytestmark = pytest.mark.end_to_end


def as_text(kernels: np.ndarray) -> str:
    levels = (128 + 127 * kernels).round().astype(np.uint8)
    return base64.b64encode(levels.tobytes()).decode()


def test_kernels_and_shares_survive_the_way_into_the_page(computed: Any) -> None:
    cases = [[as_text(KERNELS), number] for number in (0, 7, 23)]
    found = np.array(computed("bank", "kernelOf", cases))
    np.testing.assert_allclose(found, KERNELS[[0, 7, 23]], atol=0.5 / 127 + 1e-9)
    energy = found**2
    expected = energy[:, 8::8].sum(1) / energy[:, 1:].sum(1)
    shares = computed("bank", "wholeRows", [[kernel] for kernel in found.tolist()])
    np.testing.assert_allclose(shares, expected, atol=1e-9)


def test_a_click_and_the_slider_choose_a_kernel(opened: Any) -> None:
    one, other = as_text(KERNELS), as_text(KERNELS[::-1])
    ways = {"forward": one, "backward": other}
    given = {"trained": ways, "random": ways, "network": "trained"}
    tab = opened("bank", given | {"direction": "forward", "kernel": 0})
    says = tab.locator(".explorable-says")
    assert says.inner_text().startswith("Kernel 1: 11 percent")  # 7 of 63 lags, all 1
    tab.wait_for_function("document.querySelectorAll('canvas')[1].height > 100")
    drawn(tab)
    first = picture(tab, 1)
    width = tab.locator("canvas").first.bounding_box()["width"]
    tab.locator("canvas").first.click(position={"x": 1.5 * width / 12, "y": 30})
    assert says.inner_text().startswith("Kernel 2:")
    drawn(tab)
    assert picture(tab, 1) != first
    tab.get_by_role("slider").press("Home")
    tab.get_by_label("direction").select_option("backward")
    drawn(tab)
    assert picture(tab, 1) != first
