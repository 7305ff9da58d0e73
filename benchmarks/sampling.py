"""Drawing an image with kept kernels, and computing them at every step: ``python -m
benchmarks.sampling``.

Steps of the ancestral sampler on a batch of one, with the same noise on both sides; the
images must be the same to the last bit. A third side computes nothing but the kernels,
once for each step: what they take of the whole bounds what can be saved. The profiler
says what part of the time with kept kernels is matrix products.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    command,
    keep_freed_memory,
    quiet_runs,
    report,
    require_agreement,
    rounded,
    two_or_more,
)
from benchmarks.train_step import make_model
from diffussm.diffusion import GaussianDiffusion
from diffussm.model import PRESETS, DiffuSSM, DiffuSSMConfig
from diffussm.profiling import time_by_kind
from diffussm.sampling import sample

LIMIT = 1.5
SLOW, FAST = "computed at every step", "kept"
PRESET_AND_SIZE: list[tuple[str, dict[str, int]]] = [
    *((name, {}) for name in PRESETS),
    ("DiffuSSM-XL", {"input_size": 64}),
]


def few_blocks(preset: str, **sizes: int) -> DiffuSSMConfig:
    """The preset with few blocks: they are alike, and few have the ratio of many."""
    whole = DiffuSSMConfig(**{**PRESETS[preset], **sizes})
    fitting = max(1, 4 * 384 * 1024 // (whole.d_model * whole.seq_len))
    return replace(whole, n_blocks=min(whole.n_blocks, fitting))


def name_of(preset: str, config: DiffuSSMConfig) -> str:
    """What a row calls it: as much as decides the ratio."""
    size = f"{config.height} × {config.width}"
    blocks = f"{config.n_blocks} block{'s' * (config.n_blocks > 1)}"
    name = preset.removeprefix("DiffuSSM-")
    return f"{name}, {size}, L = {config.seq_len}, {blocks}"


class Uncached:
    """A model as a sampler sees it that does not offer to keep its kernels."""

    def __init__(self, model: DiffuSSM) -> None:
        self.model, self.config, self.null_label = model, model.config, model.null_label

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The model's output."""
        return self.model(*inputs)


def make_job(
    model: Any, steps: int, batch: int = 1, cfg_scale: float = 1.0
) -> Callable[[], Tensor]:
    """A function that draws the same images at every call."""
    config = model.config
    parameter = next(
        (model.model if isinstance(model, Uncached) else model).parameters()
    )
    shape = (batch, config.in_channels, config.height, config.width)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(parameter)
    y = torch.zeros(batch, dtype=torch.int64, device=parameter.device)
    diffusion = GaussianDiffusion.linear()

    def job() -> Tensor:
        generator = torch.Generator(parameter.device).manual_seed(0)
        return sample(
            model,
            diffusion,
            y,
            steps,
            cfg_scale=cfg_scale,
            generator=generator,
            noise=noise,
            progress=False,
        )

    return job


def kernels_of(model: DiffuSSM, steps: int) -> Callable[[], object]:
    """A function that computes the kernels of all blocks, once for each step."""
    layers: list[Any] = [block.ssm for block in model.blocks]

    @torch.no_grad()
    def job() -> object:
        for _ in range(steps):
            kernels = [layer.spectra(model.config.seq_len) for layer in layers]
        return kernels

    return job


def row_of(what: str, seconds: dict[str, list[float]], spread: float) -> dict[str, Any]:
    """A row of the report.

    "bound" is the ratio if everything but the kernels took the time that it takes now,
    and the kernels none.
    """
    slow, fast, kernels = (statistics.median(side) for side in seconds.values())
    return {
        "what": what,
        SLOW: f"{1e3 * slow:,.1f} ms",
        FAST: f"{1e3 * fast:,.1f} ms",
        "kernels": f"{1e3 * kernels:,.1f} ms",
        "ratio": rounded(slow / fast, LIMIT),
        "limit": f"at least {LIMIT:g}",
        "reached": slow / fast >= LIMIT,
        "bound": round(slow / max(slow - kernels, 1e-9), 2),
        "spread": f"{spread:.0%}",
        "seconds": seconds,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampling", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--steps", type=int, default=8, help="steps of the sampler (default: 8)"
    )
    parser.add_argument(
        "--runs",
        type=two_or_more,
        default=5,
        help="timed runs of each side (default: 5)",
    )
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error("--steps must be positive")

    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    for preset, sizes in PRESET_AND_SIZE:
        config = few_blocks(preset, **sizes)
        model, name = make_model("DiffuSSM", config).eval(), name_of(preset, config)
        slow, fast = (
            make_job(side, arguments.steps) for side in (Uncached(model), model)
        )
        difference = require_agreement(name, slow(), fast(), tolerance=0.0)
        sides = {SLOW: slow, FAST: fast, "kernels": kernels_of(model, arguments.steps)}
        seconds, spread = quiet_runs(name, sides, runs=arguments.runs)
        rows.append(
            row_of(name, seconds, spread)
            | {"difference": f"{difference:.0e}", "profile": time_by_kind(fast)}
        )
    title = (
        f"One image in {arguments.steps} steps, kernels kept against computed at every "
        "step, float32"
    )
    return report("sampling", title, rows, settings=vars(arguments))


if __name__ == "__main__":
    raise SystemExit(command(main))
