"""Training.

Generated from book/36_training.md by `make export`: edit there.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffussm.batches import Batch
from diffussm.data import generator
from diffussm.diffusion import DenoisingModel, GaussianDiffusion
from diffussm.meter import Meter
from diffussm.model import DiffuSSM, DiffuSSMConfig
from diffussm.optimiser import (
    ema_decay_at,
    learning_rate_factor,
    parameter_groups,
    update_ema,
)
from diffussm.options import Recipe

__all__ = ["TrainState", "backward", "update", "training_step"]


@dataclass
class TrainState:
    """All of a run but its data and options; `step` counts finished steps."""

    model: DiffuSSM
    ema: DiffuSSM
    optimizer: torch.optim.Optimizer
    meter: Meter
    build: Callable[[], DiffuSSM]  # another network of their kind
    step: int = 0
    skipped: list[int] = field(default_factory=list)

    @classmethod
    def create(
        cls,
        recipe: Recipe,
        device: str | torch.device = "cpu",
        prepare: Callable[[DiffuSSM], object] = lambda model: None,
        network: Callable[[DiffuSSMConfig], DiffuSSM] = DiffuSSM,
    ) -> Self:
        """A fresh state; `prepare` may change the networks in place.

        `network` builds one, which may differ from a `DiffuSSM` as ch. "Variants" says.
        """
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator(recipe.seed, "weights", 0).get_state())
            model = network(recipe.model).to(device)
        ema = copy.deepcopy(model).requires_grad_(False).eval()
        for one in (model, ema):
            prepare(one)
        groups = parameter_groups(model, recipe.lr, recipe.ssm_lr, recipe.weight_decay)
        how: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
        optimizer = torch.optim.AdamW(
            groups, **how, fused=True
        )  # one walk through memory
        return cls(model, ema, optimizer, Meter(device), lambda: network(recipe.model))

    def gradients(self) -> list[Tensor]:
        """The gradients of those parameters that have one."""
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def advance(self) -> None:
        """Forget the gradients and count the step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1


def backward(
    network: DenoisingModel,
    diffusion: GaussianDiffusion,
    batch: Batch,
    recipe: Recipe,
    processes: int = 1,
) -> Tensor:
    """Add up the gradients of (a part of) a batch; returns its tally (2, 8)."""
    bf16 = recipe.precision == "bf16"
    with torch.autocast(batch.t.device.type, torch.bfloat16, enabled=bf16):
        losses = diffusion.losses(network, *batch)
    loss = losses["loss"].sum() * (processes / recipe.batch_size)
    torch.autograd.backward(loss)
    return Meter.tally(losses, batch.t, recipe.timesteps)


def update(state: TrainState, recipe: Recipe, tally: Tensor, grad_norm: Tensor) -> None:
    """Move weights and average by the gradients that lie in the parameters.

    Nothing moves from the first step that is not finite on, until the meter is read.
    """
    fine = state.meter.add(tally, grad_norm)
    if recipe.clip:
        shorter = recipe.clip / grad_norm.double()
        factor = torch.where(grad_norm > recipe.clip, shorter, 1.0)
        torch._foreach_mul_(state.gradients(), factor)
    for group in state.optimizer.param_groups:
        group["lr"] = group["base_lr"] * learning_rate_factor(state.step, recipe)
    state.optimizer.found_inf = (~fine).float()  # type: ignore[attr-defined]
    state.optimizer.step()
    decay = ema_decay_at(state.step, recipe.ema_decay, recipe.ema_warmup)
    update_ema(state.ema, state.model, decay, fine)


def training_step(
    state: TrainState, diffusion: GaussianDiffusion, batch: Batch, recipe: Recipe
) -> None:
    """One step of a run that a process does alone."""
    tally = backward(state.model, diffusion, batch, recipe)
    update(state, recipe, tally, nn.utils.get_total_norm(state.gradients()))
    state.advance()
