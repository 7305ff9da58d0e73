"""GPU kernels.

Generated from book/73_gpu_kernels.md by `make export`: edit there.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.function import once_differentiable

from diffussm.bidirectional import BidirectionalSSM, Convolution
from diffussm.fft_convolution import operator
from diffussm.guards import expect, expect_one_of

__all__ = [
    "both_in_one",
    "LENGTHS",
    "factors",
    "warps",
    "dft_tables",
    "triton_convolve",
    "TRITON",
]


def both_in_one(spectra: Tensor) -> Tensor:
    """H of all 2L frequencies from two half spectra: complex (2, D, L + 1) -> (D, 2L).

    Source: ch. "GPU kernels", eq-on-chip-both.
    """
    mirrored = torch.conj_physical(spectra[..., 1:-1].flip(-1))
    forward, backward = torch.cat([spectra, mirrored], dim=-1)
    return forward + 1j * backward


def _taken_apart(s: Tensor) -> Tensor:
    """The gradient of the half spectra from that of H: (D, 2L) -> (2, D, L + 1)."""
    length = s.shape[1] // 2
    mirrored = torch.conj_physical(s.roll(-1, 1).flip(1))  # at f: that of s at -f
    both = torch.stack([s + mirrored, (s - mirrored) / 1j])  # (2, D, 2L)
    half = both[..., : length + 1] / 2
    half[..., 1:-1] *= 2  # all frequencies but two stand for their mirror image too
    return half / (2 * length)


LENGTHS = (256, 512, 1024, 2048, 4096)  # a transform has twice as many points


def factors(length: int) -> tuple[int, int]:
    """N1 and N2 with N1 N2 = 2L: powers of two, N1 the larger, if not equal."""
    n2 = 2 ** (int(math.log2(2 * length)) // 2)
    return 2 * length // n2, n2


def warps(length: int) -> int:
    """How many groups of 32 threads work on one tile."""
    return 4 if length <= 1024 else 8


@functools.lru_cache(maxsize=16)
def dft_tables(length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The constants of the four steps, real and imaginary part in float32.

    Returns:
        first (2, N1, N1/2): the DFT matrix of N1 points, for those of its columns
        where the input is not padding; twiddle (2, N1, N2); second (2, N2, N2): the
        DFT matrix of N2 points.

    Source: ch. "GPU kernels", eq-on-chip-four-steps.
    """
    n1, n2 = factors(length)

    def roots(rows: int, columns: int, order: int) -> Tensor:
        product = torch.arange(rows)[:, None] * torch.arange(columns) % order
        angle = -2 * math.pi * product.double() / order
        return torch.stack([angle.cos(), angle.sin()]).float().to(device)

    with unset_fake_temporarily():  # kept, and so real, also where work is only counted
        return roots(n1, n1 // 2, n1), roots(n1, n2, n1 * n2), roots(n2, n2, n2)


@triton.jit
def _load(start, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None] * COLUMNS
    return tl.load(start + rows + tl.arange(0, COLUMNS)[None, :]).to(tl.float32)


@triton.jit
def _store(start, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None] * COLUMNS
    tl.store(start + rows + tl.arange(0, COLUMNS)[None, :], tile)


@triton.jit
def _times(ar, ai, br, bi):
    return ar * br - ai * bi, ar * bi + ai * br


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _matmul(ar, ai, br, bi, PRECISION: tl.constexpr):
    real = _dot(ar, br, PRECISION) - _dot(ai, bi, PRECISION)
    return real, _dot(ar, bi, PRECISION) + _dot(ai, br, PRECISION)


@triton.jit
def _transform(
    x, first, twiddle, second,
    N1: tl.constexpr, N2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The spectrum [k1, k2] of a real tile [N1/2, N2] and as much padding."""
    ar, ai = _load(first, N1, N1 // 2), _load(first + N1 * N1 // 2, N1, N1 // 2)
    tr, ti = _dot(ar, x, PRECISION), _dot(ai, x, PRECISION)
    tr, ti = _times(tr, ti, _load(twiddle, N1, N2), _load(twiddle + N1 * N2, N1, N2))
    fr, fi = _load(second, N2, N2), _load(second + N2 * N2, N2, N2)
    return _matmul(tr, ti, fr, fi, PRECISION)


@triton.jit
def _transform_back(
    yr, yi, first, twiddle, second,
    N1: tl.constexpr, N2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The first half of the inverse, times N1 N2: [k1, k2] -> complex [N1/2, N2]."""
    ar, ai = _load(first, N1, N1 // 2), _load(first + N1 * N1 // 2, N1, N1 // 2)
    fr, fi = _load(second, N2, N2), _load(second + N2 * N2, N2, N2)
    vr, vi = _matmul(yr, yi, fr, -fi, PRECISION)
    vr, vi = _times(vr, vi, _load(twiddle, N1, N2), -_load(twiddle + N1 * N2, N1, N2))
    return _matmul(tl.trans(ar), tl.trans(-ai), vr, vi, PRECISION)


@triton.jit
def _forward_kernel(
    u, h, y, first, twiddle, second, D,
    N1: tl.constexpr, N2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One channel of one image: u (B, D, L), h (D, 2, N1, N2) -> y (B, 2, D, L)."""
    b, d = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    N: tl.constexpr = N1 * N2
    x = _load(u + (b * D + d) * (N // 2), N1 // 2, N2)
    xr, xi = _transform(x, first, twiddle, second, N1, N2, PRECISION)
    hr, hi = _load(h + d * 2 * N, N1, N2), _load(h + d * 2 * N + N, N1, N2)
    zr, zi = _times(xr, xi, hr, hi)
    past, future = _transform_back(zr, zi, first, twiddle, second, N1, N2, PRECISION)
    _store(y + (b * 2 * D + d) * (N // 2), past, N1 // 2, N2)
    _store(y + (b * 2 * D + D + d) * (N // 2), future, N1 // 2, N2)


@triton.jit
def _grad_spectrum(
    grad, b, d, first, twiddle, second, D,
    N1: tl.constexpr, N2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one channel of the gradient (B, 2, D, L): past + i future."""
    N: tl.constexpr = N1 * N2
    past = _load(grad + (b * 2 * D + d) * (N // 2), N1 // 2, N2)
    pr, pi = _transform(past, first, twiddle, second, N1, N2, PRECISION)
    future = _load(grad + (b * 2 * D + D + d) * (N // 2), N1 // 2, N2)
    fr, fi = _transform(future, first, twiddle, second, N1, N2, PRECISION)
    return pr - fi, pi + fr


@triton.jit
def _grad_u_kernel(
    grad, h, grad_u, first, twiddle, second, D,
    N1: tl.constexpr, N2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One channel of one image: grad (B, 2, D, L), h as above -> grad_u (B, D, L)."""
    b, d = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    N: tl.constexpr = N1 * N2
    zr, zi = _grad_spectrum(grad, b, d, first, twiddle, second, D, N1, N2, PRECISION)
    hr, hi = _load(h + d * 2 * N, N1, N2), _load(h + d * 2 * N + N, N1, N2)
    zr, zi = _times(zr, zi, hr, -hi)
    real, _ = _transform_back(zr, zi, first, twiddle, second, N1, N2, PRECISION)
    _store(grad_u + (b * D + d) * (N // 2), real, N1 // 2, N2)


@triton.jit
def _grad_h_kernel(
    grad, u, s, first, twiddle, second, B, D, SLICES,
    N1: tl.constexpr, N2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One channel of a slice of the batch: grad, u -> s (SLICES, D, 2, N1, N2)."""
    d, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    N: tl.constexpr = N1 * N2
    sr, si = tl.full((N1, N2), 0.0, tl.float32), tl.full((N1, N2), 0.0, tl.float32)
    for b in range(part, B, SLICES):
        gr, gi = _grad_spectrum(
            grad, b, d, first, twiddle, second, D, N1, N2, PRECISION
        )
        x = _load(u + (b * D + d) * (N // 2), N1 // 2, N2)
        xr, xi = _transform(x, first, twiddle, second, N1, N2, PRECISION)
        pr, pi = _times(gr, gi, xr, -xi)
        sr += pr
        si += pi
    _store(s + (part * D + d) * 2 * N, sr, N1, N2)
    _store(s + (part * D + d) * 2 * N + N, si, N1, N2)


_SLICES = 2  # of the batch: more programs than channels keep a GPU busy


def _tiles(spectra: Tensor) -> Tensor:
    """H / 2L as the kernels read it: real (D, 2, N1, N2)."""
    length = spectra.shape[-1] - 1
    n1, n2 = factors(length)
    h = both_in_one(spectra) / (2 * length)  # (D, 2L), the frequency is k1 + N1 k2
    tiles = torch.view_as_real(h).unflatten(1, (n2, n1))  # (D, N2, N1, 2)
    return tiles.permute(0, 3, 2, 1).contiguous()


def _constants(length: int, precision: str) -> dict[str, Any]:
    n1, n2 = factors(length)
    return {"N1": n1, "N2": n2, "PRECISION": precision, "num_warps": warps(length)}


def _shape(u: Tensor, spectra: Tensor, precision: str) -> Tensor:
    return u.new_empty(u.shape[0], u.shape[1], 2 * u.shape[2])


def _backward_shape(
    grad: Tensor, u: Tensor, spectra: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), torch.empty_like(spectra)


@operator("triton_convolve", _shape)
def _triton_convolve(u: Tensor, spectra: Tensor, precision: str) -> Tensor:
    B, L, D = u.shape
    x = u.transpose(1, 2).contiguous()  # (B, D, L)
    y = u.new_empty(B, 2, D, L)
    tables, constants = dft_tables(L, u.device), _constants(L, precision)
    _forward_kernel[(B, D)](x, _tiles(spectra), y, *tables, D, **constants)
    return y.flatten(1, 2).transpose(1, 2).contiguous()  # (B, L, 2D)


@operator("triton_convolve_backward", _backward_shape)
def _triton_convolve_backward(
    grad: Tensor, u: Tensor, spectra: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    (B, L, D), slices = u.shape, min(_SLICES, u.shape[0])
    x = u.transpose(1, 2).contiguous()  # (B, D, L)
    g = grad.transpose(1, 2).contiguous()  # (B, 2D, L)
    grad_u = torch.empty_like(x)
    s = torch.empty(slices, D, 2, *factors(L), device=u.device)
    tables, constants = dft_tables(L, u.device), _constants(L, precision)
    _grad_u_kernel[(B, D)](g, _tiles(spectra), grad_u, *tables, D, **constants)
    _grad_h_kernel[(D, slices)](g, x, s, *tables, B, D, slices, **constants)
    s = s.sum(0).permute(0, 3, 2, 1).flatten(1, 2)  # (D, 2L, 2)
    grad_spectra = _taken_apart(torch.view_as_complex(s.contiguous()))
    return grad_u.transpose(1, 2).contiguous(), grad_spectra


class _TritonConvolve(torch.autograd.Function):
    """The two operations, tied together for autograd."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, spectra: Tensor, precision: str) -> Tensor:
        ctx.save_for_backward(u, spectra)
        ctx.precision = precision
        return _triton_convolve(u, spectra, precision)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        saved = ctx.saved_tensors
        return *_triton_convolve_backward(grad, *saved, ctx.precision), None


def triton_convolve(u: Tensor, spectra: Tensor, precision: str = "tf32x3") -> Tensor:
    """`fft_convolution.convolve` without leaving the chip between the transforms.

    First derivatives only; a second one is refused.

    Args:
        u: Input, (B, L, D), float32 or bfloat16 or float16, L in LENGTHS.
        spectra: complex64 (2, D, L + 1), of `bidirectional.kernel_spectra`.
        precision: Of the products on tensor cores: "tf32", "tf32x3" (three products of
            it, nearly float32) or "ieee" (float32, on no tensor core).

    Returns:
        (B, L, 2D) in the dtype of `u`.

    Raises:
        ValueError: a length not in LENGTHS, shapes or a precision that do not fit.
        TypeError: dtypes that the kernels do not know.

    Source: ch. "GPU kernels".
    """
    _, L, D = expect("u", u, "B L D")
    _check_kinds(u, spectra, precision)
    expect("spectra", spectra, "2 D F", D=D, F=L + 1)
    y: Tensor = _TritonConvolve.apply(u, spectra, precision)
    return y


_PRECISIONS = ("tf32", "tf32x3", "ieee")
_REAL = (torch.float32, torch.bfloat16, torch.float16)
_COMPLEX = (torch.complex64,)


def _check_kinds(u: Tensor, spectra: Tensor, precision: str) -> None:
    expect_one_of("precision", precision, _PRECISIONS)
    for name, x, known in (("u", u, _REAL), ("spectra", spectra, _COMPLEX)):
        if x.dtype not in known:
            raise TypeError(f"{name} is {x.dtype}: expected {known}, or use convolve")
    if u.shape[1] not in LENGTHS:
        raise ValueError(f"L={u.shape[1]}: expected one of {LENGTHS}, or use convolve")


TRITON = Convolution(triton_convolve, BidirectionalSSM.spectra)
