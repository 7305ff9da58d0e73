"""A batch is a function of the step.

Generated from book/35_batches.md by `make export`: edit there.
"""

from collections import deque
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
    random_bits,
)
from diffussm.guards import refuse
from diffussm.model import DiffuSSM
from diffussm.options import Recipe

__all__ = [
    "load_dataset",
    "Batch",
    "BATCHES",
    "noise_at",
    "training_batch",
    "training_batches",
]


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
        """Some of its images, on a device; whoever has them `pinned` does not wait."""
        part = (
            None if x is None else x[mine].to(device, non_blocking=True) for x in self
        )
        return Batch(*part)  # type: ignore[arg-type]

    def pinned(self) -> "Batch":
        """The same in pinned memory."""
        pins = (None if x is None else x.pin_memory() for x in self)
        return Batch(*pins)  # type: ignore[arg-type]


def _mixed(number: int) -> int:
    """For each number below 2**32 another one below 2**32; a permutation of them."""
    z = number % 2**32
    z = (z ^ z >> 16) * 0x85EBCA6B % 2**32
    z = (z ^ z >> 13) * 0xC2B2AE35 % 2**32
    return z ^ z >> 16


BATCHES = 3  # how batches are drawn; 2: noise of a whole batch, 1: before eq-data-bits


def noise_at(
    places: range, shape: tuple[int, ...], seed: int, purpose: str = "noise"
) -> Tensor:
    """Standard normal (n, *shape), each place with a stream of its own."""
    noise, key = torch.empty(len(places), *shape), int(random_bits(seed, purpose, 0))
    for row, place in zip(noise, places, strict=True):
        stream = torch.Generator().manual_seed(_mixed(key + place))
        torch.randn(shape, generator=stream, out=row)
    return noise


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

    Raises:
        ValueError: `size` processes cannot share the batch.
    """
    B, cfg, share = recipe.batch_size, model.config, recipe.batch_size // size
    refuse(B % size, f"batch_size={B}: expected a multiple of {size}, the processes")
    mine = slice(rank * share, (rank + 1) * share)
    draw = partial(generator, recipe.seed, number=step)
    shape = (cfg.in_channels, cfg.height, cfg.width)
    places = range(step * B, (step + 1) * B)[mine]
    t = torch.randint(recipe.timesteps, (B,), generator=draw("timesteps"))
    noise = noise_at(places, shape, recipe.seed)
    position = (len(dataset), B, step, recipe.seed)
    indices = batch_indices(*position)[mine]
    flips = batch_flips(*position)[mine] & recipe.flip
    xi = None
    if dataset.levels is None:  # latents, which are drawn
        xi = noise_at(places, shape, recipe.seed, "posterior")
    x0, labels = dataset.batch(indices, flips, xi, fetch)
    y = _with_dropped(model, labels, mine, B, draw("label dropout"))
    return Batch(x0, t[mine], y, noise)


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
    device: torch.device | None = None,
) -> Iterator[Batch]:
    """The batches from a step to the end of the run, made while others are used.

    Data sets that read files (they have a method `read`) do so in `workers` threads.
    For a GPU as `device` the batches are pinned.
    """
    threads = workers if hasattr(dataset, "read") else 1
    gpu = device if device is not None and device.type == "cuda" else None
    if gpu is not None and gpu.index is None:
        gpu = torch.device("cuda", torch.cuda.current_device())  # of this thread
    maker = ThreadPoolExecutor(1, initializer=partial(_use, gpu))
    with maker, ThreadPoolExecutor(threads) as readers:
        fetch = readers.map if threads > 1 else map

        def batch(step: int) -> Batch:
            made = training_batch(dataset, model, recipe, step, rank, size, fetch)
            return made if gpu is None else made.pinned()

        first = range(step, min(step + _AHEAD, recipe.steps))
        ahead = deque(maker.submit(batch, number) for number in first)
        try:
            for following in range(step + _AHEAD, recipe.steps + _AHEAD):
                ready = ahead.popleft().result()
                if following < recipe.steps:
                    ahead.append(maker.submit(batch, following))
                yield ready
        finally:  # whoever stops early waits for none that is not begun
            for waiting in ahead:
                waiting.cancel()


_AHEAD = 4  # batches: a network disk that pauses for a step or two stops nobody


def _use(gpu: torch.device | None) -> None:
    if gpu is not None:  # or a new thread would take memory of the first GPU
        torch.cuda.set_device(gpu)
