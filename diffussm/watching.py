"""Scores while it learns.

Generated from book/59_watching.md by `make export`: edit there.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from diffussm.batches import Batch
from diffussm.data import Dataset, generator, random_bits
from diffussm.distributed import all_reduce, rank, world_size
from diffussm.guards import NotFinite, expect_same, refuse
from diffussm.meter import Meter
from diffussm.metrics import kernel_distance
from diffussm.model import DiffuSSM
from diffussm.options import Recipe, diffusion_of
from diffussm.pictures import computing_in
from diffussm.plain_scores import FEATURES, as_images, named_features
from diffussm.sample_options import Sampler
from diffussm.sampling import draw

__all__ = ["watched_loss", "held_out_bits", "Watch", "draw_finite"]


_PART = 32
_IMAGES = 512  # whose loss is computed, at the most


def _chosen(dataset: Dataset, count: int, recipe: Recipe) -> Tensor:
    """The numbers of at most `count` images, always the same, int64 (n,)."""
    bits = random_bits(recipe.seed, "watched images", np.arange(len(dataset)))
    return torch.from_numpy(np.argsort(bits)[:count])


def _mine(count: int) -> Iterator[tuple[int, slice]]:
    """The parts of `count` images that this process computes: number and images."""
    for number in range(rank(), _parts(count), world_size()):
        yield number, slice(number * _PART, min((number + 1) * _PART, count))


def _parts(count: int) -> int:
    return -(-count // _PART)


def _normal(recipe: Recipe, purpose: str, number: int, count: int) -> Tensor:
    """Standard normal noise for `count` images, always the same."""
    model = recipe.model
    shape = count, model.in_channels, model.height, model.width
    return torch.randn(shape, generator=generator(recipe.seed, purpose, number))


def _batch(
    recipe: Recipe, dataset: Dataset, chosen: Tensor, number: int, part: slice
) -> Batch:
    """One part of the chosen images, with its times and its noise."""
    T, n, size = recipe.timesteps, len(chosen), len(chosen[part])
    t = (2 * torch.arange(n) + 1) * T // (2 * n)
    xi = _normal(recipe, "watched posterior", number, size)
    x0, y = dataset.batch(chosen[part], noise=xi)
    noise = _normal(recipe, "watched noise", number, size)
    return Batch(x0, t[part], y if recipe.model.num_classes else None, noise)


@torch.no_grad()
def watched_loss(
    model: DiffuSSM, recipe: Recipe, dataset: Dataset, count: int
) -> dict[str, float | None]:
    """The means of the loss terms of `count` images or 512, no label dropped.

    "loss", "mse", "vb", and "mse_q1" to "mse_q4" by quartile of t. All processes call
    it together. None: not finite, or no image.
    """
    device, diffusion = next(model.parameters()).device, diffusion_of(recipe)
    chosen = _chosen(dataset, min(count, _IMAGES), recipe)
    tallies = torch.zeros(_parts(len(chosen)), 2, len(Meter.names), dtype=torch.float64)
    for number, part in _mine(len(chosen)):
        batch = _batch(recipe, dataset, chosen, number, part)
        batch = batch.part(slice(None), device)
        with computing_in(recipe.precision, device):
            losses = diffusion.losses(model, *batch)
        tallies[number] = Meter.tally(losses, batch.t, recipe.timesteps).cpu()
    sums, counts = all_reduce(tallies).sum(0)
    means = zip(Meter.names, (sums / counts).tolist(), strict=True)
    return {name: _number(mean) for name, mean in means if name != "grad_norm"}


def _number(value: float) -> float | None:
    """For the log: None in the place of what is not finite."""
    return value if math.isfinite(value) else None


@torch.no_grad()
def held_out_bits(
    model: DiffuSSM, recipe: Recipe, dataset: Dataset, count: int, steps: int
) -> dict[str, float]:
    """The bound on held-out images in bits per dimension, and its standard error.

    Raises ValueError for latents.
    """
    refuse(dataset.levels is None, "latents have no grey levels: no bound in bits")
    device, chain = next(model.parameters()).device, diffusion_of(recipe).respace(steps)
    chosen, bits = _chosen(dataset, count, recipe), []
    for number, some in enumerate(torch.split(chosen, _PART)):
        x0, labels = (x.to(device) for x in dataset.batch(some))
        y = labels if recipe.model.num_classes else None
        noise = generator(recipe.seed, "watched bound", number)
        bits.append(
            chain.vlb(model, x0, y, generator=noise)["total_bpd"].double().cpu()
        )
    each = torch.cat(bits)
    error = float(each.std()) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    return {"bits_per_dim": float(each.mean()), "standard_error": error}


_STEPS = 20  # of DDIM


def _views(pixels: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """Features of images (B, C, H, W) as a model has them, by name; equally many."""

    def seen_by(name: str, x: Tensor) -> Tensor:
        return named_features(name)(as_images(x))["pool"]

    def fields(x: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(x, 8).flatten(1)

    if pixels:
        return {name: partial(seen_by, name) for name in FEATURES}
    return {"latents": fields}


class Watch:
    """Held-out loss and a small score of a model: a call gives columns for the log.

    Args:
        recipe: That of the run.
        data, held_out: What the run is trained on, and what it never sees.
        images: So many are drawn at each call; 0: none, losses only.

    Raises:
        ValueError: the two sets differ in shape, or in the encoder of their latents.
    """

    def __init__(
        self, recipe: Recipe, data: Dataset, held_out: Dataset, images: int
    ) -> None:
        told = "the held-out images are not of the run's"
        expect_same(told, _kind(held_out), _kind(data), "Take others with --held_out")
        self.recipe, self.data, self.held_out = recipe, data, held_out
        self.count = min(images, len(data), len(held_out))
        self.pixels = data.levels is not None
        self.views = _views(self.pixels)

    def __call__(self, model: DiffuSSM) -> dict[str, float | None]:
        """`held_out_...` and `score_...`; all processes call it together.

        None where something is not finite.
        """
        both = self.held_out, self.data
        loss_of = partial(watched_loss, model, self.recipe, count=min(map(len, both)))
        unseen, seen = map(loss_of, both)
        columns = {f"held_out_{name}": unseen[name] for name in ("loss", "mse")}
        columns["held_out_train_loss"] = seen["loss"]
        return columns | (self._scores(model) if self.count > 1 else {})

    def _scores(self, model: DiffuSSM) -> dict[str, float | None]:
        drawn, (real, _), columns = self._drawn(model), self._real, {}
        for kind, others in (("", drawn), ("_real", self._trained_on[0])):
            parts = [table.chunk(len(self.views), 1) for table in (real, others)]
            for name, x, y in zip(self.views, *parts, strict=True):
                columns[f"score_kid_{name}{kind}"] = _distance(x, y)
        return columns

    def _drawn(self, model: DiffuSSM) -> Tensor:
        """Features of samples (n, d), those of all views side by side."""
        (real, labels), recipe = self._real, self.recipe
        table = torch.zeros_like(real)
        steps = min(_STEPS, recipe.timesteps)
        sampler = Sampler(steps, "ddim", clip_denoised=self.pixels)
        for number, part in _mine(len(labels)):
            noise = _normal(recipe, "watched samples", number, len(labels[part]))
            x = draw_finite(sampler, model, recipe, labels[part], noise)
            table[part] = math.nan if x is None else self._seen(x)
        return all_reduce(table)

    def _seen(self, x: Tensor) -> Tensor:
        """Features (B, d) of finite images, those of all views side by side."""
        return torch.cat([view(x) for view in self.views.values()], 1).double()

    def _known(self, dataset: Dataset) -> tuple[Tensor, Tensor]:
        """Features (n, d) and labels (n,) of real images, computed by each process."""
        found = []
        chosen = _chosen(dataset, self.count, self.recipe)
        for number, some in enumerate(torch.split(chosen, _PART)):
            xi = _normal(self.recipe, "watched posterior", number, len(some))
            x, y = dataset.batch(some, noise=xi)
            found.append((self._seen(x), y))
        features, labels = zip(*found, strict=True)
        return torch.cat(features), torch.cat(labels)

    @cached_property
    def _real(self) -> tuple[Tensor, Tensor]:
        return self._known(self.held_out)

    @cached_property
    def _trained_on(self) -> tuple[Tensor, Tensor]:
        return self._known(self.data)


def _kind(dataset: Dataset) -> dict[str, Any]:
    """What two sets must have in common to be compared."""
    made_by = getattr(dataset, "vae", {})
    encoder = {key: made_by.get(key) for key in ("encoder_sha256", "scaling_factor")}
    return {"shape": tuple(dataset[0][0].shape), **encoder}


@torch.no_grad()
def draw_finite(
    sampler: Sampler, model: DiffuSSM, recipe: Recipe, labels: Tensor, noise: Tensor
) -> Tensor | None:
    """Images (n, C, H, W) drawn from this noise, on the CPU; None if not finite."""
    device = next(model.parameters()).device
    y = labels.to(device) if recipe.model.num_classes else None
    how: dict[str, Any] = {"noise": noise.to(device), "progress": False}
    with suppress(NotFinite), computing_in(recipe.precision, device):
        x = draw(sampler, model, diffusion_of(recipe), y, **how).float().cpu()
        if bool(x.isfinite().all()):
            return x
    return None  # or the sampler has refused a step that is not finite


def _distance(x: Tensor, y: Tensor) -> float | None:
    both_finite = bool(x.isfinite().all() and y.isfinite().all())
    return kernel_distance(x, y) if both_finite else None
