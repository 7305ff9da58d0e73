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
from diffussm.parallel import carry_out, convolution_for
from diffussm.pictures import Decode
from diffussm.sample_options import SampleSet
from diffussm.samples import draw_batch

__all__ = ["make_ready", "replay", "largest_batch", "fitting_batch", "even_batch"]


def make_ready(
    model: DiffuSSM,
    diffusion: GaussianDiffusion,
    wanted: SampleSet,
    execution: Execution,
    device: torch.device,
    decode: Decode | None = None,
) -> SampleSet:
    """Prepare a network, in place, for drawing a set; the set, with a batch that fits.

    No more images are drawn than a set needs: batches are as even as they can be. All
    processes call it. Of `execution` it takes `convolution` and `compile`; on a GPU
    the latter also records a step as a CUDA graph. The set is one whose `of` and `on`
    have been called.
    """
    batch = wanted.batch_size
    batch = batch or fitting_batch(model, diffusion, wanted, device, decode)
    batch = even_batch(wanted.count, batch, world_size())
    at_once = batch * (1 if wanted.sampler.cfg_scale == 1 else 2)
    dtype = torch.bfloat16 if wanted.precision == "bf16" else torch.float32
    case = execution.convolution, model.config, at_once, device, dtype
    carry_out(model, execution, convolution_for(*case, backward=False), device)
    if execution.compile and device.type == "cuda":
        replay(model)
    return replace(wanted, batch_size=batch)


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

    def __call__(
        self, x: Tensor, t: Tensor, y: Any = None, prepared: Any = None
    ) -> Tensor:
        """What the model's forward pass returns."""
        inputs = [x, t] if y is None else [x, t, y]
        free = prepared is None and self._can_replay(inputs)
        kept = self._kept(x) if free else None
        if kept is None:
            return self.forward(x, t, y, prepared)
        half = torch.is_autocast_enabled(self.device)
        rounding = half and torch.get_autocast_dtype(self.device)
        key = (rounding, *((one.shape, one.dtype) for one in inputs))
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


def even_batch(count: int, most: int, processes: int) -> int:
    """The images of a batch, at most `most`, such that all processes draw as few."""
    share = -(-count // processes)  # of one process, rounded up
    batches = -(-share // most)
    return -(-share // batches)
