"""Sampling at scale.

Generated from book/77_sampling_at_scale.md by `make export`: edit there.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffussm.diffusion import GaussianDiffusion
from diffussm.distributed import all_reduce, rank, world_size
from diffussm.model import DiffuSSM
from diffussm.options import Execution
from diffussm.parallel import convolution_for, speed_up
from diffussm.pictures import Decode
from diffussm.sample_options import SampleSet
from diffussm.samples import draw_batch

__all__ = ["make_ready", "replay", "largest_batch", "fitting_batch"]


def make_ready(
    model: DiffuSSM,
    diffusion: GaussianDiffusion,
    wanted: SampleSet,
    execution: Execution,
    device: torch.device,
    decode: Decode | None = None,
) -> SampleSet:
    """Prepare a network, in place, for drawing a set; the set, with a batch that fits.

    All processes call it. Of `execution` it takes `convolution` and `compile`; on a GPU
    the latter also records a step as a CUDA graph. The set is one whose `of` and `on`
    have been called.
    """
    if not wanted.batch_size:
        batch = fitting_batch(model, diffusion, wanted, device, decode)
        wanted = replace(wanted, batch_size=batch)
    at_once = wanted.batch_size * (1 if wanted.sampler.cfg_scale == 1 else 2)
    dtype = torch.bfloat16 if wanted.precision == "bf16" else torch.float32
    asked = execution.convolution
    chosen = convolution_for(asked, model.config, at_once, device, dtype)
    speed_up(model, chosen, execution.compile, device)
    if execution.compile and device.type == "cuda":
        replay(model)
    return wanted


class _Replayed:
    """A forward pass that is recorded once for a shape, and then replayed."""

    device = "cuda"

    def __init__(self, model: DiffuSSM) -> None:
        self.model = model
        self.forward: Callable[..., Tensor] = model.forward
        self.key: tuple[Any, ...] = ()
        self.kept: Any = None
        self.inputs: list[Tensor] = []
        self.output: Any = None
        self.graph: Any = None

    def __call__(self, x: Tensor, t: Tensor, y: Any = None) -> Tensor:
        """What the model's forward pass returns."""
        inputs = [x, t] if y is None else [x, t, y]
        kept = self._kept(x) if self._can_replay(inputs) else None
        if kept is None:
            return self.forward(x, t, y)
        key = (torch.is_autocast_enabled(self.device), *(one.shape for one in inputs))
        if kept is not self.kept or key != self.key:
            self._record(inputs, kept)
            self.key, self.kept = key, kept
        for ours, given in zip(self.inputs, inputs, strict=True):
            ours.copy_(given)
        self.graph.replay()
        output: Tensor = self.output.clone()
        return output

    def _can_replay(self, inputs: Sequence[Any]) -> bool:
        tensors = all(isinstance(one, Tensor) for one in inputs)
        here = tensors and all(one.device.type == self.device for one in inputs)
        return here and not torch.is_grad_enabled()

    def _kept(self, x: Tensor) -> Any:
        """The kernels of all blocks, or None where nobody keeps them."""
        length = x.shape[2] * x.shape[3] // self.model.config.patch_size**2
        kept = self.model._prepared(length)
        return None if kept[0] is None else kept

    def _record(self, inputs: Sequence[Tensor], kept: Any) -> None:
        self.inputs = [one.clone() for one in inputs]
        y = self.inputs[2] if len(inputs) > 2 else None
        once = partial(self.forward, *self.inputs[:2], y, kept)
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        rounding = torch.get_autocast_dtype(self.device)
        half = torch.is_autocast_enabled(self.device)
        with torch.autocast(self.device, rounding, enabled=half, cache_enabled=False):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    once()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = once()


def replay(model: DiffuSSM) -> None:
    """Let a model replay its forward pass, on a GPU and within `cached_kernels`."""
    vars(model)["forward"] = _Replayed(model)


def largest_batch(
    fits: Callable[[int], bool], start: int = 16, most: int = 1024
) -> int:
    """Nine tenths of the largest batch that fits, to within an eighth; at most `most`.

    Raises:
        MemoryError: not even one image fits.
    """
    low, high = 0, start
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if not low:
        raise MemoryError("not even one image fits on this device: take another one")
    return max(1, low * 9 // 10)


def _fits(draw: Callable[[int], object], images: int) -> bool:
    """Whether so many images can be drawn at once."""
    try:
        draw(images)
        fitted = True
    except torch.OutOfMemoryError:
        fitted = False
    torch.cuda.empty_cache()  # of what did not fit; nothing where there is no GPU
    return fitted


def fitting_batch(
    model: DiffuSSM,
    diffusion: GaussianDiffusion,
    wanted: SampleSet,
    device: torch.device,
    decode: Decode | None = None,
) -> int:
    """How many images of a set are drawn at once; all processes call it.

    On a GPU as many as fit, elsewhere those of the presets: more are no faster there.
    """
    if device.type == "cpu":
        return SampleSet().batch_size
    step = replace(wanted, sampler=replace(wanted.sampler, steps=1))

    def draw(images: int) -> object:
        batch, how = replace(step, batch_size=images), {"decode": decode}
        return draw_batch(model, diffusion, batch, range(images), device=device, **how)

    found = torch.zeros(world_size(), dtype=torch.int64)
    found[rank()] = largest_batch(partial(_fits, draw))
    return int(all_reduce(found).min())
