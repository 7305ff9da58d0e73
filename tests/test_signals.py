"""Signals drawn by hand: what a state remembers of them, and their convolution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from stages import drawn, picture

from diffussm.convolution import fft_conv
from diffussm.state_space import hippo_legs

SIGNAL = np.sin(np.arange(200) / 9).round(2)
MEMORY = {
    "signal": SIGNAL.tolist(),
    "kind": "noise",
    "place": 0.3,
    "turns": 8,
    "n": 16,
    "now": 150,
}
CONVOLUTION = {
    "kind": "kick",
    "place": 45,
    "turns": 4,
    "decay": 0.04,
    "frequency": 0.5,
    "padded": False,
}
pytestmark = pytest.mark.end_to_end


def states(u: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """With and without the 1/t, by dense matrices."""
    A, B, one = hippo_legs(n).numpy(), np.sqrt(2 * np.arange(n) + 1), np.eye(n)
    step = scipy.linalg.expm(A / 100)
    write = np.linalg.solve(A, (step - one) @ B)
    x, y = np.zeros(n), np.zeros(n)
    for k, value in enumerate(u):
        h = 1 / (2 * k + 1)  # half of a step of 1 at the time k + 1/2
        x = np.linalg.solve(one - h * A, (one + h * A) @ x + 2 * h * value * B)
        y = step @ y + write * value
    return x, y


def test_the_states_are_those_of_the_matrices(computed: Any) -> None:
    for n in (1, 2, 32):
        expected = states(SIGNAL, n)
        for function, state in zip(("stretched", "fading"), expected, strict=True):
            (found,) = computed("memory", function, [[SIGNAL.tolist(), n]])
            np.testing.assert_allclose(found, state, atol=1e-9)
    places = np.linspace(0, 1, 5)
    polynomials = [np.polynomial.Legendre.basis(k)(2 * places - 1) for k in range(n)]
    sums = (state * np.sqrt(2 * np.arange(n) + 1)) @ polynomials
    cases = [[state.tolist(), place] for place in places]
    np.testing.assert_allclose(computed("memory", "recall", cases), sums, atol=1e-9)


def test_the_sum_is_the_packages_and_its_tail_wraps(computed: Any) -> None:
    u, K = np.random.default_rng(1).standard_normal((2, 64))
    (y,) = computed("convolution", "convolve", [[u.tolist(), K.tolist()]])
    ours = fft_conv(torch.from_numpy(u[None]), torch.from_numpy(K[None]))[0]
    np.testing.assert_allclose(y[:64], ours, atol=1e-9)
    circle = np.fft.irfft(np.fft.rfft(u) * np.fft.rfft(K))
    np.testing.assert_allclose(np.add(y[:64], y[64:]), circle, atol=1e-9)


@pytest.fixture(params=[("memory", MEMORY), ("convolution", CONVOLUTION)])
def paper(request: pytest.FixtureRequest, opened: Any) -> Any:
    """A page on which a signal can be drawn, once it is shown."""
    tab = opened(*request.param)
    tab.wait_for_function("document.querySelectorAll('canvas')[1].height > 100")
    drawn(tab)
    return tab


def test_a_hand_draws(paper: Any) -> None:
    tab = paper
    kind, before = tab.get_by_role("combobox"), picture(tab, -1)
    box = tab.locator("canvas").first.bounding_box()
    tab.mouse.move(box["x"] + 80, box["y"] + 60)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 120)
    tab.mouse.up()
    assert kind.input_value() == "drawn"
    drawn(tab)
    assert picture(tab, -1) != before


def test_the_keyboard_draws(paper: Any) -> None:
    tab = paper
    kind, before = tab.get_by_role("combobox"), picture(tab, -1)
    said = tab.get_by_role("status").last
    tab.keyboard.press("Tab")  # the first that can be reached is the paper
    assert "space bar" in said.inner_text()
    for _ in range(4):
        tab.keyboard.press("ArrowUp")
    drawn(tab)
    assert kind.input_value() != "drawn", "a pen that is up draws nothing"
    assert picture(tab, -1) == before and "pen is up" in said.inner_text()
    tab.keyboard.press("Space")
    for _ in range(9):
        tab.keyboard.press("ArrowRight")
    drawn(tab)
    stroke = picture(tab, -1)
    assert kind.input_value() == "drawn" and stroke != before
    assert "pen is down" in said.inner_text()
    tab.keyboard.press("Space")
    tab.keyboard.press("ArrowRight")
    drawn(tab)
    assert picture(tab, -1) == stroke, "it draws although it is lifted"


def test_sliders_choose_the_signal_and_how_much_is_remembered(opened: Any) -> None:
    tab = opened("memory", MEMORY)
    seen = []
    keys = {"turns of the wave": "End", "pulse at sample": "ArrowRight"}
    for slider, key in (keys | {"numbers N": "End", "seen": "Home"}).items():
        tab.get_by_label(slider).press(key)
        drawn(tab)
        seen.append(picture(tab))
    assert len(set(seen)) == 4
    assert tab.get_by_role("combobox").input_value() == "pulse"


def test_padding_takes_the_tail_away_from_the_start(opened: Any) -> None:
    tab = opened("convolution", CONVOLUTION)
    said = tab.locator(".explorable-says").first
    tail = np.exp(-0.04 * np.arange(64)) * np.cos(0.5 * np.arange(64))
    most = (
        f"{np.abs(tail[64 - 45 :]).max():.2f}"  # what the kick at 45 puts past the end
    )
    assert f"up to {most} of the end is added to the start" in said.inner_text()
    tab.get_by_label("padded").press("Space")
    assert f"up to {most} is cut off" in said.inner_text()
    tab.get_by_label("place").press("Home")
    assert "up to 0.00" in said.inner_text()
