"""The eigenvalue to drag: its numbers are the package's, and it answers every hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stages import drawn, picture

from diffussm.convolution import vandermonde
from diffussm.state_space import discretize_bilinear, discretize_zoh

GIVEN = {"real": -0.2, "imag": 20, "dt": 0.01, "longest": 0.1, "rule": "ZOH"}
pytestmark = pytest.mark.end_to_end


RULES = {"ZOH": discretize_zoh, "bilinear": discretize_bilinear}


def test_steps_and_kernels_are_the_packages(computed: Any) -> None:
    eigenvalues = [-0.2 + 20j, -1e-5 + 1e-6j, 0.5 + 90j, 0j]
    A = torch.tensor(eigenvalues, dtype=torch.complex128)[:, None]  # (4, 1)
    for rule, step in RULES.items():
        dA, dB = step(A, 1.0, 0.05)
        cases = [[rule, [a.real, a.imag], 0.05] for a in eigenvalues]
        found = computed("state_space", "discretize", cases)  # (4, 2, 2)
        expected = torch.view_as_real(torch.cat([dA, dB], dim=1))
        torch.testing.assert_close(torch.tensor(found).double(), expected)
        kernels = computed("state_space", "kernel", [[*pair, 200] for pair in found])
        expected = vandermonde(dA.log(), dB, 200)
        torch.testing.assert_close(torch.tensor(kernels).double(), expected)


def test_an_eigenvalue_is_dragged(opened: Any) -> None:
    tab = opened("eigenvalue", GIVEN | {"width": 16})
    says, real = tab.locator(".explorable-says"), tab.get_by_label("real part")
    tab.wait_for_function("document.querySelectorAll('canvas')[3].height > 100")
    assert "half is forgotten after 347 steps" in says.inner_text()
    before, fold = says.inner_text(), picture(tab, 3)
    box = tab.locator("canvas").first.bounding_box()
    tab.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 90)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] - 14, box["y"] + 120)
    tab.mouse.up()
    assert "doubles" in says.inner_text() and float(real.input_value()) > 0.4
    drawn(tab)
    assert picture(tab, 3) != fold
    real.fill("-0.2")
    tab.get_by_label("imaginary part").fill("20")
    assert says.inner_text() == before
    tab.get_by_label("rule").select_option("bilinear")
    assert says.inner_text() != before


def test_controls_are_those_of_the_place(opened: Any) -> None:
    tab = opened("eigenvalue", GIVEN | {"n": 64})
    assert tab.get_by_label("states N").count() == 1
    assert tab.get_by_label("width W").count() == 0
    before = picture(tab, 1)
    tab.get_by_label("states N").press("Home")
    drawn(tab)
    assert picture(tab, 1) != before
