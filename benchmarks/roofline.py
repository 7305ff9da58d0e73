"""What bounds the parts of a block on this machine, operations or bytes.

Command: ``python -m benchmarks.roofline``.

The roof is the best matrix product and the best copy that can be measured. Under it lie
the parts of a block of XL width on one image, in single precision. A second table takes
a block's forward pass apart: what the kernels' spectra cost, which a sampler keeps, and
how much of the rest are matrix products. The chapter on efficiency draws both from what
this command wrote.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.common import command, quiet_runs, report, two_or_more
from diffussm.hourglass import HourglassBlock
from diffussm.profiling import time_by_kind

Part = tuple[float, float, Callable[[], object]]


def parts_of_a_block(L: int, D: int) -> dict[str, Part]:
    """Name -> operations (a multiply-add is two), bytes that must be read or written,
    and the work itself.
    """
    torch.manual_seed(0)
    stream, weight = torch.randn(L, D), torch.randn(2 * D, D)
    wide, gate = torch.randn(2, L, 2 * D)
    sequences = torch.randn(D, 2 * L)
    half_spectra, spectra = (
        torch.fft.rfft(sequences),
        torch.randn(2, D, L + 1, dtype=torch.complex64),
    )
    heads = torch.randn(3, 1, 16, L, D // 16)
    return {
        "dense map": (
            4.0 * L * D * D,
            4.0 * (3 * L * D + 2 * D * D),
            lambda: stream @ weight.T,
        ),
        "attention": (
            4.0 * L * L * D,
            16.0 * L * D,
            lambda: F.scaled_dot_product_attention(*heads),
        ),
        "transform": (
            5.0 * L * math.log2(2 * L) * D,
            16.0 * L * D,
            lambda: torch.fft.rfft(sequences),
        ),
        "two spectra": (
            12.0 * D * (L + 1),
            40.0 * D * (L + 1),
            lambda: half_spectra * spectra,
        ),
        "GELU": (20.0 * L * D, 16.0 * L * D, lambda: F.gelu(wide)),
        "layer norm": (8.0 * L * D, 8.0 * L * D, lambda: F.layer_norm(stream, (D,))),
        "gate": (2.0 * L * D, 24.0 * L * D, lambda: wide * gate),
    }


def ceilings() -> dict[str, Part]:
    """A large matrix product and a large copy."""
    square, source, target = (
        torch.randn(2048, 2048),
        torch.randn(2**25),
        torch.empty(2**25),
    )
    return {
        "matrix product": (2.0 * 2048**3, 12.0 * 2048**2, lambda: square @ square),
        "copy": (0.0, 8.0 * 2**25, lambda: target.copy_(source)),
    }


@torch.no_grad()
def kept_spectra(L: int, D: int, runs: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of a block's forward pass on one image with and without kept spectra, and
    of the spectra.

    The last number is the share of matrix products in the pass with kept spectra.
    """
    torch.manual_seed(0)
    block = HourglassBlock(D, 64, 2)
    x, c = torch.randn(1, L // 2, D), torch.randn(1, D)
    known = block.ssm.spectra(L)
    sides = {
        "spectra": lambda: block.ssm.spectra(L),
        "whole block": lambda: block(x, c),
        "with kept spectra": lambda: block(x, c, known),
    }
    seconds, _ = quiet_runs(
        "a block with and without kept spectra", sides, runs=runs, warmup=2
    )
    shares = []
    for _ in range(runs):
        kinds = time_by_kind(sides["with kept spectra"])
        shares.append(kinds["matrix products"] / sum(kinds.values()))
    return seconds, statistics.median(shares)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--length", type=int, default=1024, help="L, even (default: 1024)"
    )
    parser.add_argument(
        "--width", type=int, default=1152, help="D, a multiple of 16 (default: 1152)"
    )
    parser.add_argument(
        "--runs",
        type=two_or_more,
        default=9,
        help="timed runs of each part (default: 9)",
    )
    arguments = parser.parse_args(argv)
    L, D, runs = arguments.length, arguments.width, arguments.runs
    if min(L, D) < 1 or L % 2 or D % 16:
        parser.error(
            "all options must be positive, --length even and --width a multiple of 16"
        )

    rows: list[dict[str, Any]] = []
    work = {**ceilings(), **parts_of_a_block(L, D)}
    seconds, _ = quiet_runs(
        "the parts of a block",
        {name: job for name, (_, _, job) in work.items()},
        runs=runs,
        warmup=3,
    )
    for name, (operations, moved, _) in work.items():
        best = min(
            seconds[name]
        )  # a ceiling is what can be reached, and so is what lies under it
        rows.append(
            {
                "what": name,
                "operations per byte": round(operations / moved, 2),
                "Gflop/s": round(operations / best / 1e9, 2),
                "GB/s": round(moved / best / 1e9, 2),
                "best": f"{1e3 * best:.3g} ms",
                "seconds": seconds[name],
            }
        )
    inside, products = kept_spectra(L, D, runs)
    for name, values in inside.items():
        rows.append(
            {
                "what": f"block: {name}",
                "best": f"{1e3 * min(values):.3g} ms",
                "seconds": values,
            }
        )
    settings = vars(arguments) | {
        "share of matrix products with kept spectra": round(products, 4)
    }
    title = f"Roofline and the parts of a block: B = 1, L = {L}, D = {D}, float32"
    return report("roofline", title, rows, settings=settings)


if __name__ == "__main__":
    raise SystemExit(command(main))
