"""A block of DiffuSSM against a block of DiT, forward and backward.

Command: ``python -m benchmarks.block``.

Same width, same length of sequence, same batch, same precision, each as fast as it
goes: attention is PyTorch's fused `scaled_dot_product_attention`. The DiT block has 18
D^2 parameters, ours with M = 2 has 15 D^2 and the kernels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.common import command, keep_freed_memory, report, speed_row
from benchmarks.references import awake, require_right
from diffussm.efficiency import DiTBlock
from diffussm.hourglass import HourglassBlock

CASES = (
    (1024, 8, 1.3),
    (4096, 8, 2.2),
    (16384, 1, 4.0),
)  # L, B, how many times faster we must be


def make_job(block: nn.Module, batch: int, length: int) -> Callable[[], object]:
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
    return lambda: torch.autograd.grad(block(x, c), inputs, probe)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.block", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--width", type=int, default=1152, help="D, a multiple of 16 (default: 1152)"
    )
    parser.add_argument(
        "--runs", type=int, default=3, help="timed runs of each side (default: 3)"
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[L for L, _, _ in CASES],
        help="default: 1024 4096 16384",
    )
    arguments = parser.parse_args(argv)
    D = arguments.width
    cases = [case for case in CASES if case[0] in arguments.lengths]
    if min(D, arguments.runs) < 1 or D % 16 or len(cases) < len(arguments.lengths):
        parser.error(
            "--width must be a multiple of 16, --runs positive, --lengths among "
            "1024, 4096, 16384"
        )

    keep_freed_memory()
    torch.manual_seed(0)
    ours, theirs = awake(HourglassBlock(D, 64, 2)), awake(DiTBlock(D))
    errors = [
        require_right(name, block, D, 128)
        for name, block in (("DiffuSSM", ours), ("DiT", theirs))
    ]
    rows: list[dict[str, Any]] = []
    for L, B, limit in cases:
        row = speed_row(
            f"L = {L}, B = {B}",
            ("DiT block", make_job(theirs, B, L)),
            (
                "DiffuSSM block",
                make_job(ours, B, L // 2),
            ),  # the stream of M = 2 has L / 2 places
            at_least=limit,
            runs=arguments.runs,
        )
        rows.append({**row, "difference": f"{max(errors):.0e}", "length": L})
    title = (
        f"A block, forward + backward, against a DiT block: D = {D}, N = 64, M "
        "= 2, 16 heads, float32"
    )
    return report("block", title, rows, settings=vars(arguments))


if __name__ == "__main__":
    raise SystemExit(command(main))
