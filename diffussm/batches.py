"""A batch is a function of the step.

Generated from book/35_batches.md by `make export`: edit there.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from diffussm.data import (
    Dataset,
    Fetch,
    TensorData,
    batch_flips,
    batch_indices,
    digits,
    generator,
)
from diffussm.model import DiffuSSM
from diffussm.options import Recipe

__all__ = ["load_dataset", "Batch", "training_batch", "training_batches"]


def load_dataset(recipe: Recipe, split: str = "train") -> Dataset:
    """Digits, those to train on or "test"; other data are opened elsewhere."""
    if recipe.data != "digits":
        raise ValueError(f"data={recipe.data!r}: open these images and pass dataset=")
    images, labels = digits(split)
    y = labels if recipe.model.num_classes else None
    return TensorData(images, y, flip=recipe.flip, levels=17)


class Batch(NamedTuple):
    """A training batch: x0 and noise (B, C, H, W), x0 in [-1, 1], t (B,), y (B,)."""

    x0: Tensor
    t: Tensor
    y: Tensor | None
    noise: Tensor

    def part(self, mine: slice, device: torch.device) -> "Batch":
        """Some of its images, on a device."""
        x0, t, noise = (x[mine].to(device) for x in (self.x0, self.t, self.noise))
        return Batch(x0, t, None if self.y is None else self.y[mine].to(device), noise)


def training_batch(
    dataset: Dataset,
    model: DiffuSSM,
    recipe: Recipe,
    step: int,
    rank: int = 0,
    size: int = 1,
    fetch: Fetch = map,
) -> Batch:
    """The part of process `rank` of `size` in the batch of a step.

    Source: eq-batches-stream. `fetch` may do the work of `map` in several threads.
    """
    B, cfg, share = recipe.batch_size, model.config, recipe.batch_size // size
    mine = slice(rank * share, (rank + 1) * share)
    draw = partial(generator, recipe.seed, number=step)
    shape = (B, cfg.in_channels, cfg.height, cfg.width)
    t = torch.randint(recipe.timesteps, (B,), generator=draw("timesteps"))
    noise = torch.randn(shape, generator=draw("noise"))
    position = (len(dataset), B, step, recipe.seed)
    indices = batch_indices(*position)[mine]
    flips = batch_flips(*position)[mine] & recipe.flip
    xi = None
    if dataset.levels is None:  # latents, which are drawn
        xi = torch.randn(shape, generator=draw("posterior"))[mine]
    x0, labels = dataset.batch(indices, flips, xi, fetch)
    y = _with_dropped(model, labels, mine, B, draw("label dropout"))
    return Batch(x0, t[mine], y, noise[mine])


def _with_dropped(
    model: DiffuSSM, labels: Tensor, mine: slice, B: int, draws: torch.Generator
) -> Tensor | None:
    if model.null_label is None:
        return None
    everyone = torch.zeros(B, dtype=torch.int64)
    everyone[mine] = labels
    return model.drop_labels(everyone, draws)[mine]


def training_batches(
    dataset: Dataset,
    model: DiffuSSM,
    recipe: Recipe,
    step: int = 0,
    rank: int = 0,
    size: int = 1,
    workers: int = 4,
) -> Iterator[Batch]:
    """The batches from a step to the end of the run, each made while one is used.

    Data sets that read files (they have a method `read`) do so in `workers` threads.
    """
    threads = workers if hasattr(dataset, "read") else 1
    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(threads) as readers:
        fetch = readers.map if threads > 1 else map
        batch = partial(training_batch, dataset, model, recipe)
        ahead = pool.submit(batch, step, rank, size, fetch)
        for following in range(step + 1, recipe.steps + 1):
            ready = ahead.result()
            if following < recipe.steps:
                ahead = pool.submit(batch, following, rank, size, fetch)
            yield ready
