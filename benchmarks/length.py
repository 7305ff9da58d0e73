"""How the cost of a block grows with the length, beside attention's.

Command: ``python -m benchmarks.length``.

Forward and backward of one block of each kind, L from 256 to 16384 at one image. The
exponent is the slope of a straight line through log(time) against log(L), by least
squares over L = 1024 and more. 1 is linear; attention tends to 2.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.block import make_job
from benchmarks.common import (
    command,
    keep_freed_memory,
    quiet_runs,
    report,
    two_or_more,
)
from benchmarks.references import awake, require_right
from diffussm.efficiency import DiTBlock
from diffussm.hourglass import HourglassBlock

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
FROM = 1024
LIMIT = 1.15


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.length", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--width", type=int, default=1152, help="D, a multiple of 16 (default: 1152)"
    )
    parser.add_argument("--batch", type=int, default=1, help="B (default: 1)")
    parser.add_argument(
        "--runs",
        type=two_or_more,
        default=3,
        help="timed runs of each length (default: 3)",
    )
    arguments = parser.parse_args(argv)
    D, B = arguments.width, arguments.batch
    if min(D, B) < 1 or D % 16:
        parser.error("all options must be positive, and --width a multiple of 16")

    keep_freed_memory()
    torch.manual_seed(0)
    blocks: dict[str, tuple[nn.Module, int]] = {
        "DiffuSSM, M = 2": (awake(HourglassBlock(D, 64, 2)), 2),
        "DiT": (awake(DiTBlock(D)), 1),
    }
    for name, (block, _) in blocks.items():
        require_right(name, block, D, 128)
    seconds: dict[str, dict[int, list[float]]] = {name: {} for name in blocks}
    spreads = []
    for length in LENGTHS:
        jobs = {
            name: make_job(block, B, length // M) for name, (block, M) in blocks.items()
        }
        runs = max(
            arguments.runs, 4 * arguments.runs * FROM // length
        )  # short ones oftener: they are noisier
        measured, spread = quiet_runs(f"L = {length}", jobs, runs=runs)
        spreads.append(spread)
        for name in blocks:
            seconds[name][length] = measured[name]

    rows: list[dict[str, Any]] = []
    for name, (_, M) in blocks.items():
        medians = {
            length: statistics.median(values)
            for length, values in seconds[name].items()
        }
        long = [length for length in LENGTHS if length >= FROM]
        exponent = float(
            np.polyfit(np.log(long), np.log([medians[length] for length in long]), 1)[0]
        )
        rows.append(
            {
                "what": name,
                **{
                    f"L = {length}": f"{1e3 * median:,.0f} ms"
                    for length, median in medians.items()
                },
                "exponent": round(exponent, 3),
                "limit": f"at most {LIMIT}" if M == 2 else "",
                **({"reached": exponent <= LIMIT} if M == 2 else {}),
                "spread": f"{max(spreads):.0%}",
                "medians": {str(length): median for length, median in medians.items()},
                "seconds": {
                    str(length): values for length, values in seconds[name].items()
                },
            }
        )
    title = (
        f"Cost of a block, forward + backward, against the length: B = {B}, D = "
        f"{D}, float32"
    )
    return report("length", title, rows, settings=vars(arguments))


if __name__ == "__main__":
    raise SystemExit(command(main))
