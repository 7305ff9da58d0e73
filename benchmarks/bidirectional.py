"""The bidirectional layer against two S4D convolutions and a flip.

Run `python -m benchmarks.bidirectional`. The other side is the layer as it is usually
put together from a public S4D: for each direction a kernel by the direct Vandermonde
product and a convolution of its own, with the sequence flipped before and after the
second. Kernels are part of the work on both sides. A second row gives the other side
our two-level kernel as well, so that only the shared transform and the adjoint are
compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import command, report, require_agreement, speed_row, two_or_more
from diffussm.bidirectional import BidirectionalSSM
from diffussm.convolution import fft_conv, vandermonde
from diffussm.two_level import vandermonde_two_level

D_STATE = 64
LIMIT = 3.0  # against the layer as it is usually put together
Kernel = Callable[[Tensor, Tensor, int], Tensor]


def two_convolutions(layer: BidirectionalSSM, u: Tensor, kernel: Kernel) -> Tensor:
    """What `layer` computes, from two causal S4D layers and two flips."""
    length = u.shape[1]
    x = u.transpose(1, 2)
    skip_forward, skip_backward = layer.skip[:, None].chunk(2)
    k_forward = kernel(*layer.forward_kernel.discrete(), length)
    k_backward = kernel(*layer.backward_kernel.discrete(), length)
    forward = fft_conv(x, k_forward) + skip_forward * x
    x = x.flip(-1)
    backward = fft_conv(x, k_backward) + skip_backward * x
    return torch.cat([forward, backward.flip(-1)], dim=1).transpose(1, 2)


def make_job(
    layer: Callable[[Tensor], Tensor], inputs: list[Tensor], probe: Tensor
) -> Callable[[], list[Tensor]]:
    """A function that computes output and gradients anew at every call."""

    def job() -> list[Tensor]:
        y = layer(inputs[0])
        return [y.detach(), *torch.autograd.grad(y, inputs, probe)]

    return job


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bidirectional", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--batch", type=int, default=4, help="B (default: 4)")
    parser.add_argument("--length", type=int, default=4096, help="L (default: 4096)")
    parser.add_argument(
        "--width",
        type=int,
        default=1152,
        help="D (default: 1152; less needs less memory)",
    )
    parser.add_argument(
        "--runs",
        type=two_or_more,
        default=3,
        help="timed runs of each side (default: 3)",
    )
    arguments = parser.parse_args(argv)
    B, L, D = arguments.batch, arguments.length, arguments.width
    if min(B, L, D) < 1:
        parser.error("--batch, --length and --width must be positive")

    torch.manual_seed(0)
    layer = BidirectionalSSM(D, D_STATE)
    inputs = [torch.randn(B, L, D, requires_grad=True), *layer.parameters()]
    probe = torch.randn(B, L, 2 * D)
    ours = make_job(layer, inputs, probe)
    rows: list[dict[str, Any]] = []
    for what, kernel, limit in (
        ("against two S4D convolutions, direct kernels", vandermonde, LIMIT),
        (
            "against two S4D convolutions, our two-level kernels",
            vandermonde_two_level,
            1.0,
        ),
    ):
        theirs = make_job(
            lambda u, kernel=kernel: two_convolutions(layer, u, kernel), inputs, probe
        )
        error = require_agreement(what, theirs(), ours(), tolerance=1e-3)
        row = speed_row(
            what,
            ("two convolutions", theirs),
            ("BidirectionalSSM", ours),
            at_least=limit,
            runs=arguments.runs,
        )
        rows.append({**row, "difference": f"{error:.0e}"})
    title = (
        "Bidirectional layer, forward + backward, kernels included: "
        f"B = {B}, L = {L}, D = {D}, N = {D_STATE}"
    )
    return report("bidirectional", title, rows, settings=vars(arguments))


if __name__ == "__main__":
    raise SystemExit(command(main))
