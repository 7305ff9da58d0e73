"""Drawing an image with kept kernels, and computing them at every step: ``python -m
benchmarks.sampling``.

Steps of the ancestral sampler on a batch of one, with the same noise on both sides; the
images must be the same to the last bit. A last row compares guidance in one batch of
two with two calls.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    command,
    keep_freed_memory,
    report,
    require_agreement,
    speed_row,
)
from benchmarks.train_step import make_model
from diffussm.diffusion import GaussianDiffusion
from diffussm.model import PRESETS, DiffuSSM, DiffuSSMConfig
from diffussm.sampling import sample

LIMIT = 1.5
# blocks are alike: few of them have the ratio of many
CASES: dict[str, dict[str, Any]] = {
    "XL, 32 x 32, L = 1024": {**PRESETS["DiffuSSM-XL"], "n_blocks": 4},
    "XL, 64 x 64, L = 4096": {
        **PRESETS["DiffuSSM-XL"],
        "n_blocks": 2,
        "input_size": 64,
    },
    "XL/2, 32 x 32, L = 256": {**PRESETS["DiffuSSM-XL/2"], "n_blocks": 4},
    "S, 32 x 32, L = 1024": {**PRESETS["DiffuSSM-S"], "n_blocks": 4},
    "emoji, L = 256": PRESETS["emoji"],
    "digits, L = 64": PRESETS["digits"],
}


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


@torch.no_grad()
def guided_in_two_calls(
    model: DiffuSSM, scale: float, x: Tensor, t: Tensor, y: Tensor
) -> Tensor:
    """Guidance as its formula reads: the conditional model, then the other."""
    conditional, unconditional = (
        model(x, t, y),
        model(x, t, torch.full_like(y, model.null_label)),
    )
    n = x.shape[1]
    eps = unconditional[:, :n] + scale * (conditional[:, :n] - unconditional[:, :n])
    return torch.cat([eps, conditional[:, n:]], dim=1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampling", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--steps", type=int, default=8, help="steps of the sampler (default: 8)"
    )
    parser.add_argument(
        "--runs", type=int, default=5, help="timed runs of each side (default: 5)"
    )
    arguments = parser.parse_args(argv)
    if min(arguments.steps, arguments.runs) < 1:
        parser.error("--steps and --runs must be positive")

    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    for what, values in CASES.items():
        model = make_model("DiffuSSM", DiffuSSMConfig(**values)).eval()
        slow, fast = (
            make_job(side, arguments.steps) for side in (Uncached(model), model)
        )
        difference = require_agreement(what, slow(), fast(), tolerance=0.0)
        row = speed_row(
            f"{what}, {model.config.n_blocks} blocks",
            ("computed at every step", slow),
            ("kept", fast),
            at_least=LIMIT,
            runs=arguments.runs,
        )
        rows.append({**row, "difference": f"{difference:.0e}"})
    title = (
        f"One image in {arguments.steps} steps, kernels kept against computed at every "
        "step, float32"
    )
    return report("sampling", title, rows, settings=vars(arguments))


if __name__ == "__main__":
    raise SystemExit(command(main))
