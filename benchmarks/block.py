"""A block of DiffuSSM against a block of DiT, forward and backward.

Command: ``python -m benchmarks.block``.

Same width, same length of sequence, same batch, same precision, each as fast as it
goes; with ``--precision bf16`` under autocast, which helps where the processor
multiplies bfloat16, and with ``--beside`` while another process multiplies matrices on
one core, each in a report of its own. Attention is PyTorch's fused
`scaled_dot_product_attention`. Without the maps of the condition the DiT block has 12
D^2 weights, ours with M = 2 has 15 D^2 and the kernels. A plain matrix product takes
its turn with the two, so that a slow baseline would be seen. The profiler says where
the time of both blocks goes: what part of ours is no matrix product, and so what the
ratio would be without it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from benchmarks.common import (
    command,
    keep_freed_memory,
    plain_product,
    quiet_runs,
    report,
    rounded,
    share_outside,
    two_or_more,
)
from benchmarks.references import awake, require_right
from benchmarks.train_step import SHARE_LIMIT, kernel_job, operations, where_time_goes
from diffussm.efficiency import DiTBlock
from diffussm.hourglass import HourglassBlock
from diffussm.model_config import DiffuSSMConfig
from diffussm.profiling import time_by_kind

CASES = (
    (1024, 8, 2.0),
    (4096, 8, 3.1),
    (16384, 1, 5.4),
    (1024, 4, 1.7),
    (4096, 2, 2.5),
)  # L, B, how many times faster we must be


def make_job(
    block: nn.Module, batch: int, length: int, bf16: bool = False
) -> Callable[[], object]:
    """A function that runs the block forwards and backwards on the same input at every
    call.
    """
    parameter = next(block.parameters())
    d_model = (
        block.norm.normalized_shape[0]
        if isinstance(block, HourglassBlock)
        else block.proj.in_features
    )
    options = {"device": parameter.device, "requires_grad": True}
    x = torch.randn(batch, length, d_model, **options)
    c = torch.randn(batch, d_model, **options)
    inputs, probe = [x, c, *block.parameters()], torch.randn(x.shape, device=x.device)

    def job() -> object:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            y = block(x, c)
        return torch.autograd.grad(y, inputs, probe.to(y.dtype))

    return job


def compare(
    blocks: dict[str, nn.Module],
    d_model: int,
    case: tuple[int, int, float],
    runs: int,
    bf16: bool = False,
) -> dict[str, Any]:
    """One row: the two blocks and a matrix product in turns."""
    length, batch, limit = case
    what = f"L = {length}, B = {batch}"
    product, size = plain_product(2048, bf16)
    jobs, work = {}, {"matrix product": size}
    config = DiffuSSMConfig(8, d_model=d_model, n_blocks=1)
    for name, block in blocks.items():
        # the stream of M = 2 has L / 2 places
        places = length // (2 if isinstance(block, HourglassBlock) else 1)
        jobs[name] = make_job(block, batch, places, bf16)
        work[name] = operations(name.removesuffix(" block"), config, batch, length)
    jobs["matrix product"] = product
    seconds, spread = quiet_runs(what, jobs, runs=runs)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    slow, fast = (median[name] for name in blocks)
    ours = blocks["DiffuSSM block"]
    kernels = kernel_job([ours.ssm], length)
    kernels()
    profile = {
        "DiT block": time_by_kind(jobs["DiT block"]),
        "DiffuSSM block": where_time_goes(jobs["DiffuSSM block"], kernels, 1),
    }
    outside = share_outside(profile["DiffuSSM block"])
    return {
        "what": what,
        **{name: f"{1e3 * median[name]:,.1f} ms" for name in blocks},
        "ratio": rounded(slow / fast, limit),
        "limit": f"at least {limit:g}",
        "reached": slow / fast >= limit,
        "outside products": rounded(outside, SHARE_LIMIT, 3),
        "at most": SHARE_LIMIT,
        "bound": rounded(slow / fast / (1 - outside), limit),
        "spread": f"{spread:.0%}",
        **{f"{name}, GFLOP/s": round(work[name] / median[name] / 1e9) for name in work},
        "seconds": seconds,
        "profile": profile,
        "length": length,
        "batch": batch,
        "threads": torch.get_num_threads(),
    }


@contextmanager
def busy_process() -> Iterator[None]:
    """Another process that multiplies matrices on one core while this lasts."""
    process = multiprocessing.get_context("spawn").Process(
        target=_multiply, daemon=True
    )
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _multiply() -> None:
    torch.set_num_threads(1)
    product, _ = plain_product(512)
    while True:
        product()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.block", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--width", type=int, default=1152, help="D, a multiple of 16 (default: 1152)"
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
        default=sorted({L for L, _, _ in CASES}),
        help="default: 1024 4096 16384",
    )
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        help="measure with each of these numbers of threads (default: PyTorch's own)",
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bf16"),
        default="float32",
        help="of the products: bf16 is a report of its own (default: float32)",
    )
    parser.add_argument(
        "--beside",
        action="store_true",
        help="while another process is busy: a report of its own",
    )
    arguments = parser.parse_args(argv)
    D, bf16 = arguments.width, arguments.precision == "bf16"
    cases = [case for case in CASES if case[0] in arguments.lengths]
    known = {L for L, _, _ in CASES}
    least = min(D, *(arguments.threads or [1]))
    if least < 1 or D % 16 or not known.issuperset(arguments.lengths):
        parser.error(
            "--width must be a multiple of 16, --threads positive, "
            "--lengths among 1024, 4096, 16384"
        )

    keep_freed_memory()
    torch.manual_seed(0)
    ours, theirs = awake(HourglassBlock(D, 64, 2)), awake(DiTBlock(D))
    errors = [
        require_right(name, block, D, 128)
        for name, block in (("DiffuSSM", ours), ("DiT", theirs))
    ]
    rows: list[dict[str, Any]] = []
    blocks = {"DiT block": theirs, "DiffuSSM block": ours}
    with busy_process() if arguments.beside else nullcontext():
        for threads in arguments.threads or [torch.get_num_threads()]:
            torch.set_num_threads(threads)
            for case in cases:
                row = compare(blocks, D, case, arguments.runs, bf16)
                rows.append({**row, "difference": f"{max(errors):.0e}"})
    title = (
        f"A block, forward + backward, against a DiT block: D = {D}, N = 64, M "
        f"= 2, 16 heads, {arguments.precision}"
    )
    title += ", beside a busy process" * arguments.beside
    name = "block" + "_bf16" * bf16 + "_beside" * arguments.beside
    return report(name, title, rows, settings=vars(arguments), by="block")


if __name__ == "__main__":
    raise SystemExit(command(main))
