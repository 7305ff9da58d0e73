"""The two-level kernel against the direct one: `python -m benchmarks.kernel`.

At the paper's width, D = 1152 channels with N = 64 states, for the lengths of its two
resolutions. The sides are `convolution.vandermonde` (every exponential) and
`two_level.vandermonde_two_level`, on the same system.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    command,
    memory_row,
    peak_memory,
    report,
    require_agreement,
    speed_row,
    two_or_more,
)
from diffussm.convolution import S4DKernel, vandermonde
from diffussm.two_level import vandermonde_two_level

D_MODEL, D_STATE = 1152, 64
SPEED_LIMITS = {1024: 12.0, 4096: 30.0}
MEMORY_LIMIT = 10.0
SIDES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "direct": vandermonde,
    "two-level": vandermonde_two_level,
}


def discrete_system(d_model: int) -> tuple[Tensor, Tensor]:
    """(log dA, C dB) of a freshly initialised layer, the same for every call."""
    torch.manual_seed(0)
    log_dA, weights = S4DKernel(d_model, D_STATE).discrete()
    return log_dA.detach(), weights.detach()


def make_job(
    side: str, d_model: int, length: int, backward: bool
) -> Callable[[], list[Tensor]]:
    """A function that computes the kernel (and its gradients) anew at every call."""
    kernel = SIDES[side]
    log_dA, weights = (
        tensor.requires_grad_(backward) for tensor in discrete_system(d_model)
    )
    probe = (
        torch.randn(d_model, length, generator=torch.Generator().manual_seed(1))
        if backward
        else None
    )

    def job() -> list[Tensor]:
        result = kernel(log_dA, weights, length)
        if probe is None:
            return [result]
        return [result.detach(), *torch.autograd.grad(result, (log_dA, weights), probe)]

    # a small call first: libraries that it loads are not the kernel's memory
    if d_model > 2:
        make_job(side, 2, 16, backward)()
    return job


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--runs",
        type=two_or_more,
        default=3,
        help="timed runs of each side (default: 3)",
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=list(SPEED_LIMITS),
        help="default: 1024 4096",
    )
    arguments = parser.parse_args(argv)
    if min(arguments.lengths) < 1:
        parser.error("--lengths must be positive")

    rows: list[dict[str, Any]] = []
    for length in arguments.lengths:
        limit = SPEED_LIMITS.get(length, 1.0)
        for backward in (False, True):
            what = f"{'forward + backward' if backward else 'forward'}, L = {length}"
            jobs = {side: make_job(side, D_MODEL, length, backward) for side in SIDES}
            require_agreement(
                what, jobs["direct"](), jobs["two-level"](), tolerance=1e-4
            )
            direct, two_level = jobs.items()
            rows.append(
                speed_row(
                    f"time, {what}",
                    direct,
                    two_level,
                    at_least=limit,
                    runs=arguments.runs,
                    warmup=0,
                )
            )
            peaks = [
                (
                    side,
                    peak_memory(
                        "benchmarks.kernel:make_job", side, D_MODEL, length, backward
                    ),
                )
                for side in SIDES
            ]
            rows.append(
                memory_row(
                    f"peak memory, {what}", peaks[0], peaks[1], at_least=MEMORY_LIMIT
                )
            )
    title = (
        f"Kernel of D = {D_MODEL} channels, N = {D_STATE}, float32: "
        "two levels against direct"
    )
    settings = {
        "d_model": D_MODEL,
        "d_state": D_STATE,
        "runs": arguments.runs,
        "lengths": arguments.lengths,
    }
    return report("kernel", title, rows, settings=settings)


if __name__ == "__main__":
    raise SystemExit(command(main))
