"""Few images, long sequences.

Generated from book/75_segments.md by `make export`: edit there.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffussm.bidirectional import Convolution
from diffussm.chunked import modes as modes_of
from diffussm.chunked_kernels import (
    decay_powers,
    modes_kernel,
    padded,
    times,
    walk_kernel,
)
from diffussm.fft_convolution import operator
from diffussm.guards import expect, expect_one_of

__all__ = ["segments", "chunked_triton", "CHUNKED_TRITON"]


@triton.jit
def _swap(states, at, exists, real, imag, N: tl.constexpr):
    """What lies in memory, for what is to lie there."""
    left = tl.load(states + at, exists, 0.0), tl.load(states + at + N, exists, 0.0)
    tl.store(states + at, real, exists)
    tl.store(states + at + N, imag, exists)
    return left


@triton.jit
def _carry_kernel(
    states, ages, modes, S, D, L, T: tl.constexpr, REVERSED: tl.constexpr,
    AGES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """From left to given, in place: (B S, 2, D, 2N), segments of L positions."""
    row, b, n = tl.program_id(0), tl.program_id(1), tl.arange(0, padded(N))
    mode, exists = modes + row * (4 * N + 1) + n, n < N
    size = tl.exp(tl.load(mode, exists, 0.0) * L)
    angle = tl.load(mode + N, exists, 0.0) * L
    zr, zi = size * tl.cos(angle), size * tl.sin(angle)
    sr = tl.full((padded(N),), 0.0, tl.float32)
    si, ar, ai = sr, sr, sr
    for step in range(S):
        segment = b * S + tl.where((row >= D) != REVERSED, S - 1 - step, step)
        at = (segment * 2 * D + row).to(tl.int64) * 2 * N + n
        vr, vi = _swap(states, at, exists, sr, si, N)
        if AGES:
            br, bi = _swap(ages, at, exists, ar, ai, N)
            ar, ai = times(ar + L / T * sr, ai + L / T * si, zr, zi)
            ar, ai = ar + br, ai + bi
        sr, si = times(sr, si, zr, zi)
        sr, si = sr + vr, si + vi


def segments(images: int, length: int, chunk: int) -> int:
    """S: how many segments each sequence is cut into; 1 leaves it whole."""
    S = 1
    while 2 * S * images <= 32 and length % (2 * S * chunk) == 0:
        if length < 8 * S * chunk:
            break
        S *= 2
    return S


def _constants(modes: Tensor, precision: str, warps: int) -> dict[str, Any]:
    sizes = {"N": modes.shape[2] // 4, "CHANNELS": warps, "num_warps": warps}
    ahead = 4 if precision == "bf16" else 2  # chunks on their way from memory
    return {**sizes, "num_stages": ahead, "PRECISION": precision}


def _carry(
    states: Tensor, modes: Tensor, length: int, chunk: int, adjoint: bool
) -> None:
    """The carry of all segments: (1 or 2, images, segments, 2, D, N), N real."""
    (kinds, B, S, _, D, _), n = states.shape, modes.shape[2] // 4
    sizes = {"S": S, "D": D, "L": length // S, "T": chunk, "N": n}
    how = {"REVERSED": adjoint, "AGES": kinds == 2, "num_warps": 1}
    _carry_kernel[2 * D, B](states[0], states[-1], modes, **sizes, **how)


def _in_segments(
    run: Callable[[Tensor, str], Any],
    modes: Tensor,
    shape: tuple[int, int],
    cut: tuple[int, int, int],
    adjoint: bool = False,
) -> None:
    """Run a walk over whole sequences, or over segments: to, carry, from.

    Args:
        run: (states, pass): launches the kernel.
        shape: B and L.
        cut: S, the chunk, and how many kinds of states there are.
    """
    (B, L), (S, chunk, kinds), (_, D, numbers) = shape, cut, modes.shape
    if S == 1:
        run(modes[None].expand(kinds, -1, -1, -1), "")  # of states nothing is read
        return
    states = modes.new_empty(kinds, B, S, 2, D, numbers // 2)
    run(states, "to")
    _carry(states, modes, L, chunk, adjoint)
    run(states, "from")


def _walk(
    x: Tensor, y: Tensor, modes: Tensor, tables: tuple[Tensor, Tensor],
    adjoint: bool, precision: str, chunk: int, warps: int,
) -> None:  # fmt: skip
    """x (B, L, D), or its adjoint (B, L, 2D) -> y (B, L, 2D)."""
    (B, L, X), D = x.shape, modes.shape[1]
    S = segments(B, L, chunk)
    sizes, how = (B * S, L // S, D, X), {"ADJOINT": adjoint, "T": chunk}
    how |= _constants(modes, precision, warps)
    grid = triton.cdiv(D, warps), triton.cdiv(B * S, 16), 2

    def run(states: Tensor, which: str) -> None:
        walk_kernel[grid](x, y, states[0], modes, *tables, *sizes, which, **how)

    _in_segments(run, modes, (B, L), (S, chunk, 1), adjoint)


def _grad_modes(
    u: Tensor, g: Tensor, modes: Tensor, powers: Tensor, precision: str, warps: int
) -> Tensor:
    """u (B, L, D), g (B, L, 2D) -> the gradient of the modes."""
    (B, L, D), warps, lags = u.shape, min(warps, 8), powers.shape[2] - 1
    S = segments(B, L, 16)
    sizes, how = (B * S, L // S, D), {"T": 16, "LAGS": lags}
    how |= _constants(modes, precision, warps)
    grid = triton.cdiv(D, warps), triton.cdiv(B * S, 16), 2
    parts = modes.new_empty(grid[1], *modes.shape)

    def run(states: Tensor, which: str) -> None:
        given = u, g, parts, states[0], states[1], modes, powers
        modes_kernel[grid](*given, *sizes, which, **how)

    _in_segments(run, modes, (B, L), (S, 16, 2))
    return parts.sum(0)


def _shape(u: Tensor, modes: Tensor, *settings: Any) -> Tensor:
    return u.new_empty(u.shape[0], u.shape[1], 2 * u.shape[2])


@operator("chunked_triton", _shape)
def _chunked_triton(
    u: Tensor, modes: Tensor, precision: str, chunk: int, warps: int
) -> Tensor:
    u, modes, y = u.contiguous(), modes.contiguous(), _shape(u, modes)
    if y.numel():
        tables = decay_powers(modes, chunk)
        _walk(u, y, modes, tables, False, precision, chunk, warps)
    return y


def _backward_shape(grad: Tensor, u: Tensor, modes: Tensor, *settings: Any) -> Any:
    return grad.new_empty(grad.shape), torch.empty_like(modes)


@operator("chunked_triton_backward", _backward_shape)
def _chunked_triton_backward(
    grad: Tensor, u: Tensor, modes: Tensor, precision: str, chunk: int, warps: int
) -> tuple[Tensor, Tensor]:
    u, g, modes = (x.contiguous() for x in (u, grad, modes))
    both, tables = torch.empty_like(g), decay_powers(modes, chunk)
    if not u.numel():
        return both, torch.zeros_like(modes)
    _walk(g, both, modes, tables, True, precision, chunk, warps)
    return both, _grad_modes(u, g, modes, tables[0], precision, warps)


class _ChunkedTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, modes: Tensor, *settings: Any) -> Tensor:
        ctx.save_for_backward(u, modes)
        ctx.settings = settings
        return _chunked_triton(u, modes, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given = *ctx.saved_tensors, *ctx.settings
        both, grad_modes = _chunked_triton_backward(grad, *given)
        forward, backward = both.chunk(2, dim=2)
        return forward + backward, grad_modes, None, None, None


def chunked_triton(
    u: Tensor,
    modes: Tensor,
    precision: str | None = None,
    chunk: int = 16,
    warps: int | None = None,
) -> Tensor:
    """The layer chunk by chunk on a GPU, both directions; first derivatives only.

    Args:
        u: Input, (B, L, D), float32 or bfloat16, any L.
        modes: float32 (2, D, 2N + 1), of each direction and channel Re log dA, Im log
            dA, Re w, Im w (N/2 each) and the skip.
        precision: Of the products: "bf16", "tf32", "tf32x3" (nearly float32) or "ieee"
            (float32, on no tensor core). None: "bf16" or "tf32x3", by the dtype of u.
        chunk: Positions at a time: 16, 32 or 64.
        warps: Of one program, and its channels: 4, 8 or 16. None: by the precision.

    Returns:
        (B, L, 2D) in the dtype of `u`.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that the kernels do not know.

    Source: eq-chunked-kernels-walk, eq-chunked-kernels-modes.
    """
    kind = precision or ("bf16" if u.dtype == torch.bfloat16 else "tf32x3")
    warps = (8 if kind in ("bf16", "tf32") else 4) if warps is None else warps
    _check(u, modes, kind, chunk, warps)
    y: Tensor = _ChunkedTriton.apply(u, modes, kind, chunk, warps)
    return y


def _check(u: Tensor, modes: Tensor, precision: str, chunk: int, warps: int) -> None:
    _, _, D = expect("u", u, "B L D")
    M = expect("modes", modes, "2 D M", D=D)[2]
    if M % 4 != 1 or M < 5:
        raise ValueError(f"modes has {M} numbers a channel: expected 2N + 1, N even")
    if u.dtype not in (torch.float32, torch.bfloat16) or modes.dtype != torch.float32:
        given = f"u is {u.dtype}, modes {modes.dtype}"
        raise TypeError(f"{given}: expected float32 or bfloat16, and float32")
    expect_one_of("precision", precision, ("bf16", "tf32", "tf32x3", "ieee"))
    expect_one_of("chunk", chunk, (16, 32, 64))
    expect_one_of("warps", warps, (4, 8, 16))


CHUNKED_TRITON = Convolution(chunked_triton, modes_of, together=True)
