"""What is tallied, on the device."""

import math

import pytest
import torch

from diffussm.meter import Meter


def test_meter_means_equal_a_loop():
    torch.manual_seed(0)
    meter, seen = Meter(), []
    for _ in range(3):
        losses = {name: torch.rand(8) for name in ("loss", "mse", "vb")}
        t = torch.randint(500, (8,))  # nothing in the two noisy quarters
        meter.add(Meter.tally(losses, t, 1000), torch.tensor(2.0))
        seen += [
            (int(t[i]), {name: float(losses[name][i]) for name in losses})
            for i in range(8)
        ]
    row = meter.read_and_reset()
    for name in ("loss", "mse", "vb"):
        assert row[name] == pytest.approx(
            sum(terms[name] for _, terms in seen) / len(seen)
        )
    low = [terms["mse"] for t, terms in seen if t < 250]
    assert row["mse_q1"] == pytest.approx(sum(low) / len(low))
    assert row["mse_q3"] is None and row["grad_norm"] == 2.0
    assert meter.sums.abs().sum() == 0


def test_a_tally_stays_on_the_device():
    """On a device without numbers any look at them would fail."""
    losses = {name: torch.rand(8, device="meta") for name in ("loss", "mse", "vb")}
    tally = Meter.tally(losses, torch.zeros(8, dtype=torch.int64, device="meta"), 1000)
    assert (
        tally.device.type == "meta"
        and tally.shape == (2, 8)
        and tally.dtype == torch.float64
    )


def test_a_short_loop_is_told_of_a_step_that_is_not_finite():
    meter = Meter()
    meter.add(torch.full((2, 8), torch.nan), torch.tensor(1.0))
    with pytest.raises(FloatingPointError, match="step 1 of 1 was not finite"):
        meter.read_and_reset()


@pytest.mark.parametrize("norm", [math.inf, 5.0])
def test_the_norm_of_a_step_that_is_not_finite_is_told_as_it_was(norm):
    meter = Meter()  # the tally tells all processes by a column that is not a number
    meter.add(torch.full((2, 8), torch.nan), torch.tensor(norm))
    assert meter.look().grad_norm == norm
