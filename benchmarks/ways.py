"""Which way to run the bidirectional layer wins where: `python -m benchmarks.ways`.

Forward and backward pass of a whole layer, with what is prepared of its weights, in
float32. The recurrence and the direct sums are the chunked way with chunks of one
position and of all of them, and take part where they are not hopeless. A plain matrix
product takes its turn, so that a slow winner would be seen.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    command,
    keep_freed_memory,
    plain_product,
    quiet_runs,
    report,
    require_agreement,
    two_or_more,
)
from diffussm.bidirectional import BidirectionalSSM, Convolution, way
from diffussm.chunked import chunked, modes
from diffussm.efficiency import convolution_macs

STATES, CHUNK = 64, 64
SIZES = ((96, 8), (1152, 1))  # D, B
LENGTHS = (64, 256, 1024, 4096, 16384)
MOST = 96 * 8 * 16384  # numbers of an input
MATRIX = 2**25  # numbers of the matrices of the direct sums
STEPS = 256  # of the recurrence


def ways_for(length: int, width: int) -> dict[str, tuple[Convolution, int]]:
    """Those that take part, each with its chunk, 0 for a transform."""
    by_chunks = {"chunked": CHUNK}
    if length <= STEPS:
        by_chunks["recurrence"] = 1
    if 2 * width * length**2 <= MATRIX:
        by_chunks["direct"] = length
    return {"fft": (way("fft"), 0), "reference": (way("reference"), 0)} | {
        name: (Convolution(partial(chunked, chunk=chunk), modes), chunk)
        for name, chunk in by_chunks.items()
    }


def operations(length: int, width: int, batch: int, chunk: int) -> float:
    """Of a forward and backward pass, six for each multiply-add; kernels given."""
    macs = convolution_macs(length, width)
    if chunk:  # the products with T, V and R, both directions
        macs = 2 * width * length * (min(chunk, length) + 2 * STATES)
    return 6 * batch * macs


def make_job(
    layer: BidirectionalSSM, convolution: Convolution, u: Tensor, probe: Tensor
) -> Callable[[], list[Tensor]]:
    """A function that computes the output and all gradients anew at every call."""

    def job() -> list[Tensor]:
        layer.convolution = convolution
        y = layer(u)
        return [y.detach(), *torch.autograd.grad(y, [u, *layer.parameters()], probe)]

    return job


def compare(length: int, width: int, batch: int, runs: int) -> dict[str, Any]:
    """One row: all ways and a matrix product in turns."""
    what = f"L = {length}, D = {width}, B = {batch}"
    torch.manual_seed(0)
    layer = BidirectionalSSM(width, STATES)
    u = torch.randn(batch, length, width, requires_grad=True)
    probe, ways = torch.randn(batch, length, 2 * width), ways_for(length, width)
    jobs: dict[str, Callable[[], object]] = {}
    expected = make_job(layer, way("reference"), u, probe)()
    for name, (convolution, _) in ways.items():
        job = jobs[name] = make_job(layer, convolution, u, probe)
        require_agreement(f"{what}, {name}", expected, job(), 3e-4)
    jobs["matrix product"], product = plain_product(1024)
    seconds, spread = quiet_runs(what, jobs, runs=runs)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    work = {n: operations(length, width, batch, c) for n, (_, c) in ways.items()}
    work["matrix product"] = product
    return {
        "what": f"{what}, threads {torch.get_num_threads()}",
        **{name: f"{1e3 * median[name]:,.1f} ms" for name in ways},
        "fastest": min(ways, key=lambda name: median[name]),
        "spread": f"{spread:.0%}",
        "matrix product, GFLOP/s": round(
            work["matrix product"] / median["matrix product"] / 1e9
        ),
        "gflops": {name: work[name] / median[name] / 1e9 for name in work},
        "seconds": seconds,
        "length": length,
        "width": width,
        "batch": batch,
        "threads": torch.get_num_threads(),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ways", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--runs",
        type=two_or_more,
        default=3,
        help="timed runs of each side (default: 3)",
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=list(LENGTHS), help="default: all"
    )
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2"
    )
    arguments = parser.parse_args(argv)
    if min(*arguments.lengths, *arguments.threads) < 1:
        parser.error("--lengths and --threads must be positive")
    keep_freed_memory()
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        rows += [
            compare(length, width, batch, arguments.runs)
            for width, batch in SIZES
            for length in arguments.lengths
            if batch * length * width <= MOST
        ]
    title = f"Ways to run the layer, forward + backward: N = {STATES}, float32"
    return report("ways", title, rows, settings=vars(arguments))


if __name__ == "__main__":
    raise SystemExit(command(main))
