"""Ch. "Does the choice matter?": the sides of its experiment, and what was recorded."""

import json

import pytest
import torch

from benchmarks import choice
from benchmarks.common import RESULTS


@pytest.fixture(scope="module")
def page():
    return choice.experiment()


def test_every_start_is_stable_and_has_as_many_modes(page):
    for name, start in page["STARTS"].items():
        A = start(3)
        assert A.shape == (32,) and (A.real < 0).all(), name
        assert (A.imag >= 0).all(), name
    assert not torch.equal(page["random_spread"](0), page["random_spread"](1))


def test_sides_of_a_seed_differ_in_the_eigenvalues_alone(page):
    lin, inv = (
        page["network"](page["STARTS"][n](0), 5) for n in ("S4D-Lin", "S4D-Inv")
    )
    others = inv.state_dict()
    differing = {
        name.rpartition(".")[2]
        for name, value in lin.state_dict().items()
        if not torch.equal(value, others[name])
    }
    assert differing == {"A_imag"}  # both decay by one half


def test_the_network_is_causal(page):
    model = page["network"](page["STARTS"]["random matrix"](0), 0)
    x = torch.randn(1, 64, 1)
    later = x.clone()
    later[:, 40:] += 1
    with torch.no_grad():
        one, other = model(x), model(later)
    torch.testing.assert_close(one[:, :40], other[:, :40], rtol=0, atol=1e-5)
    assert (one[:, -1] - other[:, -1]).abs().max() > 1e-3


def test_the_record_names_seeds_steps_and_machine(page):
    record = json.loads((RESULTS / "choice.json").read_text())
    assert [row["start"] for row in record["rows"]] == list(page["STARTS"])
    settings = record["settings"]
    looks = settings["steps"] // settings["every"] + 1
    for row in record["rows"]:
        assert [len(curve) for curve in row["curves"]] == [looks] * settings["seeds"]
    assert record["environment"]["processor"]


def test_nothing_to_do_is_refused(capsys):
    with pytest.raises(SystemExit):
        choice.main(["--seeds", "0"])
    assert "all options must be positive" in capsys.readouterr().err
