"""How the weights move: one group per parameter, an average that is a weighted sum."""

from dataclasses import replace

import pytest
import torch
from tiny import TINY
from torch import nn

from diffussm.model import DiffuSSM
from diffussm.optimiser import (
    describe_groups,
    ema_decay_at,
    learning_rate_factor,
    parameter_groups,
    update_ema,
)


@pytest.mark.parametrize("name", ["DiffuSSM-S", "digits"])
def test_every_parameter_is_in_exactly_one_group(name):
    with torch.device("meta"):
        model = DiffuSSM.from_preset(name)
    groups = parameter_groups(model, lr=1e-2, ssm_lr=1e-3, weight_decay=0.1)
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert [id(p) for g in groups for p in g["params"]] == [
        id(dict(model.named_parameters())[n]) for n in names
    ]
    by_name = {group["name"]: group for group in groups}
    assert (
        by_name["dynamics"]["lr"] == 1e-3 and by_name["dynamics"]["weight_decay"] == 0
    )
    assert all(p.ndim >= 2 for p in by_name["matrices"]["params"])
    assert (
        by_name["matrices"]["weight_decay"] == 0.1
        and by_name["vectors"]["weight_decay"] == 0
    )
    assert len(by_name["dynamics"]["params"]) == 2 * 3 * model.config.n_blocks
    for group in groups:
        assert group["name"] in describe_groups(groups)


def test_ema_is_the_unrolled_weighted_sum():
    torch.manual_seed(0)
    model, ema = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
    expected = ema.weight.detach().clone()
    for step in range(30):
        nn.init.normal_(model.weight)
        decay = ema_decay_at(step, 0.9)
        update_ema(ema, model, decay)
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.weight, expected)
    assert [ema_decay_at(step, 0.9) for step in (0, 8, 10**6)] == [0.1, 0.5, 0.9]


def test_learning_rate_rises_stays_and_falls():
    config = replace(TINY, steps=100, warmup=10, cooldown=20)
    factors = [learning_rate_factor(step, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1
    assert set(factors[9:80]) == {1.0}
    assert (
        factors[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 100)])
        and factors[-1] > 0
    )
