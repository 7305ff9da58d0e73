"""Training: what is tallied."""

import pytest
import torch

from diffussm.training import Meter


def test_meter_means_equal_a_loop():
    torch.manual_seed(0)
    meter, seen = Meter(), []
    for _ in range(3):
        losses = {name: torch.rand(8) for name in ("loss", "mse", "vb")}
        t = torch.randint(500, (8,))  # nothing in the two noisy quarters
        meter.add(Meter.tally(losses, t, 1000), 2.0)
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
