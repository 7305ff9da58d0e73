"""How the cost of a block grows with the length: ``python -m benchmarks.block``.

Forward and backward of one `HourglassBlock`, L from 1024 to 16384 at a fixed number of images. The exponent
is the slope of a straight line through log(time) against log(L), by least squares over all lengths. 1 is
linear; attention would tend to 2.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.common import alternate, report
from diffussm.hourglass import HourglassBlock

LENGTHS = (1024, 2048, 4096, 8192, 16384)
LIMIT = 1.15


def make_job(block: HourglassBlock, batch: int, length: int) -> Callable[[], object]:
    """A function that runs the block forwards and backwards on the same input at every call."""
    d_model, M = block.w0.in_features, block.downsample
    x = torch.randn(batch, length // M, d_model, requires_grad=True)
    c = torch.randn(batch, d_model, requires_grad=True)
    inputs = [x, c, *block.parameters()]
    probe = torch.randn_like(x)
    return lambda: torch.autograd.grad(block(x, c), inputs, probe)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.block", description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1152, help="D (default: 1152; less is faster)")
    parser.add_argument("--batch", type=int, default=1, help="B (default: 1)")
    parser.add_argument("--downsample", type=int, default=2, help="M (default: 2)")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each length (default: 3)")
    arguments = parser.parse_args(argv)
    D, B, M = arguments.width, arguments.batch, arguments.downsample
    if min(D, B, M, arguments.runs) < 1 or any(length % M for length in LENGTHS):
        parser.error(f"all options must be positive, and --downsample must divide {LENGTHS[0]}")

    torch.manual_seed(0)
    block = HourglassBlock(D, 64, M)
    torch.nn.init.xavier_uniform_(block.w3.weight)  # zero at the start: some gradients would be all zeros
    seconds = alternate({str(length): make_job(block, B, length) for length in LENGTHS}, runs=arguments.runs)
    medians = {length: statistics.median(seconds[str(length)]) for length in LENGTHS}
    exponent = float(np.polyfit(np.log(LENGTHS), np.log(list(medians.values())), 1)[0])
    row: dict[str, Any] = {
        "what": "exponent of the time in L",
        **{f"L = {length}": f"{1e3 * median:,.0f} ms" for length, median in medians.items()},
        "doubling costs": f"{2**exponent:.2f} times",
        "exponent": round(exponent, 3),
        "limit": f"under {LIMIT}",
        "reached": math.isfinite(exponent) and exponent < LIMIT,
        "seconds": seconds,
    }
    title = (
        f"Cost of a block, forward + backward, against the length: B = {B}, D = {D}, N = 64, M = {M}, float32"
    )
    return report("block", title, [row], settings=vars(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
