"""Training.

Generated from book/36_training.md by `make export`: edit there.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from diffussm.batches import Batch
from diffussm.data import generator
from diffussm.diffusion import GaussianDiffusion
from diffussm.model import DiffuSSM
from diffussm.optimiser import (
    ema_decay_at,
    learning_rate_factor,
    parameter_groups,
    update_ema,
)
from diffussm.options import Recipe

__all__ = ["Meter", "TrainState", "backward", "update", "training_step"]


class Meter:
    """Running means of the loss terms, and of mse by quartile of t: (2, 8)."""

    names = ("loss", "mse", "vb", "mse_q1", "mse_q2", "mse_q3", "mse_q4", "grad_norm")

    def __init__(self) -> None:
        self.sums = torch.zeros(2, len(self.names), dtype=torch.float64)

    @classmethod
    def tally(cls, losses: dict[str, Tensor], t: Tensor, timesteps: int) -> Tensor:
        """What images add: losses (B,) each, t (B,) in [0, timesteps) -> (2, 8)."""
        sums = torch.zeros(2, len(cls.names), dtype=torch.float64, device=t.device)
        terms = torch.stack([losses[name].detach().double() for name in cls.names[:3]])
        sums[0, :3], sums[1, :3] = terms.sum(1), len(t)
        quartile = torch.arange(4, device=t.device)[:, None]  # (4, 1)
        inside = 4 * t // timesteps == quartile  # (4, B)
        sums[0, 3:7] = torch.where(inside, terms[1], 0.0).sum(1)
        sums[1, 3:7] = inside.sum(1)
        return sums

    def add(self, tally: Tensor, grad_norm: float) -> None:
        """One step: the tally of all its images, and the norm of its gradient."""
        self.sums += tally
        self.sums[:, 7] += torch.tensor([grad_norm, 1.0], dtype=torch.float64)

    def read_and_reset(self) -> dict[str, float | None]:
        """The means since the last call; None for a quartile without an image."""
        sums, counts = self.sums.tolist()
        self.sums.zero_()
        means = [s / n if n else None for s, n in zip(sums, counts, strict=True)]
        return dict(zip(self.names, means, strict=True))


@dataclass
class TrainState:
    """All of a run but its data and options; `step` counts finished steps."""

    model: DiffuSSM
    ema: DiffuSSM
    optimizer: torch.optim.Optimizer
    meter: Meter
    step: int = 0
    skipped: list[int] = field(default_factory=list)

    @classmethod
    def create(
        cls,
        recipe: Recipe,
        device: str | torch.device = "cpu",
        prepare: Callable[[DiffuSSM], object] = lambda model: None,
    ) -> Self:
        """A fresh state; `prepare` may change the networks in place."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator(recipe.seed, "weights", 0).get_state())
            model = DiffuSSM(recipe.model).to(device)
        ema = copy.deepcopy(model).requires_grad_(False).eval()
        for network in (model, ema):
            prepare(network)
        groups = parameter_groups(model, recipe.lr, recipe.ssm_lr, recipe.weight_decay)
        fused = torch.device(device).type in ("cpu", "cuda")  # one walk through memory
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=fused)
        return cls(model, ema, optimizer, Meter())

    def gradients(self) -> list[Tensor]:
        """Those that there are."""
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def advance(self) -> None:
        """Forget the gradients and count the step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1


def backward(
    network: nn.Module,
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


def update(state: TrainState, recipe: Recipe, grad_norm: float) -> None:
    """Move weights and average by the gradients that lie in the parameters."""
    if recipe.clip and grad_norm > recipe.clip:
        torch._foreach_mul_(state.gradients(), recipe.clip / grad_norm)
    for group in state.optimizer.param_groups:
        group["lr"] = group["base_lr"] * learning_rate_factor(state.step, recipe)
    state.optimizer.step()
    decay = ema_decay_at(state.step, recipe.ema_decay, recipe.ema_warmup)
    update_ema(state.ema, state.model, decay)


def training_step(
    state: TrainState, diffusion: GaussianDiffusion, batch: Batch, recipe: Recipe
) -> None:
    """One step of a run that a process does alone."""
    tally = backward(state.model, diffusion, batch, recipe)
    grad_norm = nn.utils.get_total_norm(state.gradients()).item()
    update(state, recipe, grad_norm)
    state.meter.add(tally, grad_norm)
    state.advance()
