"""The sliders of cost count as the package does."""

from __future__ import annotations

from typing import Any

import pytest
from stages import drawn, picture

from diffussm.bill import _hours
from diffussm.efficiency import diffussm_macs, dit_macs
from diffussm.model_config import DiffuSSMConfig

pytestmark = pytest.mark.end_to_end
SIZES = [(256, 128, 1, 64, 1), (1024, 1152, 2, 64, 32), (16384, 512, 4, 16, 256)]
PEAKS = {"bf16": 3e14, "float32": 2e13}
BILL = {
    "recipes": {"small": {"train": {"bf16": 3e20}, "sample": {"float32": 1e18}}},
    "cards": {"A": PEAKS, "B": {kind: 3 * peak for kind, peak in PEAKS.items()}},
    **{"recipe": "small", "card": "A", "gpus": 8, "percent": 13, "price": 2.0},
}


def test_multiply_adds_are_the_packages(computed: Any) -> None:
    ours = computed("block_cost", "diffussmBlock", [list(size) for size in SIZES])
    theirs = computed("block_cost", "ditBlock", [[L, D] for L, D, *_ in SIZES])
    ratios = computed("block_cost", "ratio", [list(size) for size in SIZES])
    for k, (L, D, M, N, B) in enumerate(SIZES):
        side = round(L**0.5)
        config = DiffuSSMConfig(
            in_channels=4,
            input_size=side,
            d_model=D,
            d_state=N,
            n_blocks=1,
            downsample=M,
        )
        expected, dit = diffussm_macs(config), dit_macs(config)
        for name in ("linear maps", "convolution"):
            assert ours[k][name] == pytest.approx(expected[name])
        assert ours[k]["kernels"] == pytest.approx(expected["kernels"] / B)
        for name in ("linear maps", "attention"):
            assert theirs[k][name] == pytest.approx(dit[name])
        mine = expected["linear maps"] + expected["convolution"]
        mine += expected["kernels"] / B
        other = dit["linear maps"] + dit["attention"]
        assert ratios[k] == pytest.approx(other / mine)


def test_hours_are_the_packages(computed: Any) -> None:
    work = {"bf16": 3e20, "float32": 1e18}
    (found,) = computed("bill", "hours", [[work, PEAKS, 0.13, 8]])
    expected = sum(_hours(n, PEAKS[kind], 0.13, 8) for kind, n in work.items())
    assert found == pytest.approx(expected)


def test_sliders_move_the_drawings(opened: Any) -> None:
    first = {"log_length": 10, "width": 1152, "downsample": 2, "log_batch": 3}
    first["states"] = 64
    for name, given, moves in (
        ("block_cost", first, ("length L", "width D", "batch B")),
        ("bill", BILL, ("GPUs", "MFU", "price")),
    ):
        tab = opened(name, given)
        tab.wait_for_function("document.querySelector('canvas').height > 100")
        drawn(tab)
        seen = {picture(tab)}
        for label in moves:
            tab.get_by_label(label).press("ArrowRight")
            drawn(tab)
            seen.add(picture(tab))
        tab.get_by_role("combobox").last.select_option(index=0 if name != "bill" else 1)
        drawn(tab)
        seen.add(picture(tab))
        assert len(seen) == len(moves) + 2
