"""What the fast blocks are held against: the same functions, as they are defined.

A benchmark that compares times first has to know that both sides compute what they
should. These are slow and short, in float64: kernels by the direct Vandermonde product,
convolutions by autograd, attention with its matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from benchmarks.common import Disagreement, require_agreement
from diffussm.bidirectional import convolve_reference
from diffussm.convolution import vandermonde
from diffussm.efficiency import DiTBlock, explicit_attention
from diffussm.hourglass import HourglassBlock


def clear_twin(block: nn.Module) -> nn.Module:
    """A copy in float64 that takes no short cut."""
    twin = copy.deepcopy(block).double()
    if isinstance(twin, HourglassBlock):
        twin.ssm.convolution = convolve_reference
        for kernel in (twin.ssm.forward_kernel, twin.ssm.backward_kernel):
            kernel.vandermonde = vandermonde
    elif isinstance(twin, DiTBlock):
        twin.attention = explicit_attention
    return twin


def outputs(block: nn.Module, inputs: Iterable[Tensor], probe: Tensor) -> list[Tensor]:
    """Output and gradients (of the inputs, then of the parameters)."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    y = block(*leaves)
    return [
        y.detach(),
        *torch.autograd.grad(y, [*leaves, *block.parameters()], probe.to(y.dtype)),
    ]


def require_right(
    what: str, block: nn.Module, d_model: int, length: int, tolerance: float = 1e-4
) -> float:
    """Compare a block with its clear twin: gradients within tolerance, output a tenth.

    Returns the largest error, relative to the largest entry of each tensor; or raises
    Disagreement.
    """
    parameter = next(block.parameters())
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(shape, generator=generator)
        for shape in ((2, length, d_model), (2, d_model))
    ]
    probe = torch.randn(2, length, d_model, generator=generator)
    fast = outputs(
        block, [tensor.to(parameter) for tensor in inputs], probe.to(parameter)
    )
    clear = outputs(
        clear_twin(block),
        [tensor.to(parameter.device, torch.float64) for tensor in inputs],
        probe.to(parameter.device),
    )
    errors = [
        require_agreement(f"{what}, output", clear[0], fast[0], tolerance / 10),
        require_agreement(f"{what}, gradients", clear[1:], fast[1:], tolerance),
    ]
    return max(errors)


def require_rounding(
    what: str, exact: list[Tensor], rounded: list[Tensor], candidate: list[Tensor]
) -> float:
    """Compare what runs under bfloat16 with the plain way, in float32 and rounded.

    The first tensor is the output, the others are gradients. An error is relative to
    the norm of the exact tensor. Allowed is three times what rounding costs the plain
    way, as in ch. "Chosen, not assumed": of the output, or of the gradient that it
    costs most. Returns the largest share of that; or raises Disagreement.
    """
    tiny = torch.finfo(torch.float32).tiny
    cost, found = (
        [float((a - b).norm() / a.norm().clamp_min(tiny)) for a, b in pairs]
        for pairs in (
            list(zip(exact, side, strict=True)) for side in (rounded, candidate)
        )
    )
    allowed = [3 * cost[0]] + [3 * max(cost[1:], default=0.0)] * len(cost[1:])
    for index, (error, most) in enumerate(zip(found, allowed, strict=True)):
        if not error <= most:  # also catches NaN
            raise Disagreement(
                f"{what}: tensor {index} is {error:.1e} of its norm from the plain "
                f"way in float32, more than the {most:.1e} allowed in bfloat16; "
                "nothing is reported"
            )
    return max(e / m for e, m in zip(found, allowed, strict=True) if m)


def awake(block: nn.Module) -> nn.Module:
    """The block with random numbers where a new one has zeros, as an identity has."""
    with torch.no_grad():
        for parameter in block.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return block
