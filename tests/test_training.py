"""Training: one step."""

import copy
import math
from dataclasses import replace

import torch
from tiny import TINY, assert_same_state

from diffussm.batches import training_batch
from diffussm.data import TensorData, digits
from diffussm.options import diffusion_of
from diffussm.training import TrainState, training_step


def test_nothing_moves_from_a_step_that_is_not_finite_until_somebody_looks():
    recipe = replace(TINY, clip=0.5)
    state, data = TrainState.create(recipe), TensorData(*digits("train"))

    def steps(numbers, scale=1.0):
        for step in numbers:
            batch = training_batch(data, state.model, recipe, step)
            batch = batch._replace(x0=batch.x0 * scale)
            training_step(state, diffusion_of(recipe), batch, recipe)

    steps(range(2))
    before, seen = copy.deepcopy(state), state.meter.sums.clone()
    steps([2], scale=1e30)
    steps([3])
    assert torch.equal(state.meter.sums, seen)
    state.step = before.step
    assert_same_state(before, state)
    look = state.meter.look()
    assert (look.steps, look.finite) == (4, 2) and not math.isfinite(look.grad_norm)
    steps([2])
    assert not torch.equal(state.model.head.weight, before.model.head.weight)
    assert state.meter.look()[:2] == (1, 1)
