"""A recurrence for tensor cores.

Generated from book/75_chunked_kernels.md by `make export`: edit there.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffussm.bidirectional import Convolution
from diffussm.chunked import modes as modes_of
from diffussm.fft_convolution import operator
from diffussm.guards import expect, expect_one_of

__all__ = ["STAGES", "chunked_triton", "CHUNKED_TRITON"]


STAGES = 4
_IMAGES = tl.constexpr(16)  # of one program: the rows of a tensor core's product


@triton.jit
def _places(step, d, width, mirrored, B, L, D, T: tl.constexpr):
    """Offsets of a tile (channels, images, T) in (B, L, width); which of them exist."""
    b = (tl.program_id(1) * _IMAGES + tl.arange(0, _IMAGES)).to(tl.int64)[None, :, None]
    p = (step * T + tl.arange(0, T))[None, None, :]
    inside = (d < D)[:, None, None] & (b < B) & (p < L)
    return (b * L + tl.where(mirrored, L - 1 - p, p)) * width + d[:, None, None], inside


@triton.jit
def _operand(x, PRECISION: tl.constexpr):
    """x as a factor of a product."""
    factor = x.to(tl.float32)
    if PRECISION == "bf16":
        factor = x.to(tl.bfloat16)
    elif PRECISION == "tf32":
        bits = factor.to(tl.int32, bitcast=True)
        factor = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return factor


@triton.jit
def _dot(a, b, c, PRECISION: tl.constexpr):
    """a b + c, a product for each channel."""
    KIND: tl.constexpr = "tf32" if PRECISION == "bf16" else PRECISION  # of float32 only
    return tl.dot(a, b, c, input_precision=KIND)


@triton.jit
def _times(ar, ai, br, bi):
    return ar * br - ai * bi, ar * bi + ai * br


@triton.constexpr_function
def _padded(n):
    """The least number of modes that a tile has: a power of two, 16 or more."""
    return max(16, triton.next_power_of_2(n))


@triton.jit
def _powers_kernel(modes, powers, kernel, N: tl.constexpr, T: tl.constexpr):
    """Of one row of modes (2D, 4N + 1): (2D, T + 1, 2N) and (2D, T), N the modes."""
    row, lag = tl.program_id(0), tl.arange(0, 2 * T)[:, None]
    n = tl.arange(0, _padded(N))[None, :]
    at, exists = modes + row * (4 * N + 1) + n, n < N
    size = tl.exp(tl.load(at, exists, 0.0) * lag)
    angle = tl.load(at + N, exists, 0.0) * lag
    zr, zi = size * tl.cos(angle), size * tl.sin(angle)
    wr, wi = tl.load(at + 2 * N, exists, 0.0), tl.load(at + 3 * N, exists, 0.0)
    k = 2 * tl.sum(wr * zr - wi * zi, 1)
    to = powers + (row * (T + 1) + lag) * 2 * N + n
    tl.store(to, zr, exists & (lag <= T))
    tl.store(to + N, zi, exists & (lag <= T))
    lag = tl.arange(0, 2 * T)
    skip = tl.load(modes + row * (4 * N + 1) + 4 * N)
    tl.store(kernel + row * T + lag, tl.where(lag == 0, k + skip, k), lag < T)


@triton.jit
def _power(powers, row, lag, LAGS: tl.constexpr, N: tl.constexpr):
    """z^lag of the channels in `row`: two tiles (channels, lags, modes)."""
    n = tl.arange(0, _padded(N))[None, None, :]
    at = powers + (row[:, None, None] * (LAGS + 1) + lag[None, :, None]) * 2 * N + n
    return tl.load(at, n < N, 0.0), tl.load(at + N, n < N, 0.0)


@triton.jit
def _weights(modes, row, N: tl.constexpr):
    """w of the channels in `row`: two tiles (channels, 1, modes)."""
    n = tl.arange(0, _padded(N))[None, None, :]
    at = modes + row[:, None, None] * (4 * N + 1) + 2 * N + n
    return tl.load(at, n < N, 0.0), tl.load(at + N, n < N, 0.0)


@triton.jit
def _near(kernel, row, T: tl.constexpr, PRECISION: tl.constexpr):
    """k of lag t - s: (channels, s, t)."""
    lag = tl.arange(0, T)[None, None, :] - tl.arange(0, T)[None, :, None]
    k = tl.load(kernel + row[:, None, None] * T + lag, lag >= 0, 0.0)
    return _operand(k, PRECISION)


@triton.jit
def _readout(
    modes, powers, row, T: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr
):
    """What the state's two parts are multiplied by: (channels, modes, t) each."""
    wr, wi = _weights(modes, row, N)
    zr, zi = _power(powers, row, tl.arange(0, T) + 1, T, N)
    rr, ri = _times(2 * wr, 2 * wi, zr, zi)
    rr, ri = tl.permute(rr, (0, 2, 1)), tl.permute(-ri, (0, 2, 1))
    return _operand(rr, PRECISION), _operand(ri, PRECISION)


@triton.jit
def _walk_kernel(
    x, y, modes, powers, kernel, B, L, D, X, ADJOINT: tl.constexpr,
    T: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some channels of 16 images, from end to end: x (B, L, X) -> y (B, L, 2D)."""
    way = tl.program_id(2)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    row, mirrored = way * D + tl.minimum(d, D - 1), (way == 1) != ADJOINT
    near = _near(kernel, row, T, PRECISION)
    rr, ri = _readout(modes, powers, row, T, N, PRECISION)
    vr, vi = _power(powers, row, T - 1 - tl.arange(0, T), T, N)
    vr, vi = _operand(vr, PRECISION), _operand(vi, PRECISION)
    zr, zi = _power(powers, row, T + tl.arange(0, 1), T, N)
    sr = tl.full((CHANNELS, _IMAGES, _padded(N)), 0.0, tl.float32)
    si, none = sr, tl.full((CHANNELS, _IMAGES, T), 0.0, tl.float32)
    x, y = x + way * (X - D), y + way * D
    for step in range(tl.cdiv(L, T)):
        at, inside = _places(step, d, X, mirrored, B, L, D, T)
        u = _operand(tl.load(x + at, inside, 0.0), PRECISION)
        out = _dot(u, near, none, PRECISION)
        out = _dot(_operand(sr, PRECISION), rr, out, PRECISION)
        out = _dot(_operand(si, PRECISION), ri, out, PRECISION)
        at, inside = _places(step, d, 2 * D, mirrored, B, L, D, T)
        tl.store(y + at, out, inside)
        sr, si = _times(sr, si, zr, zi)
        sr, si = _dot(u, vr, sr, PRECISION), _dot(u, vi, si, PRECISION)


@triton.jit
def _through_states(
    sr, si, ar, ai, powers, row, T: tl.constexpr, LAGS: tl.constexpr, N: tl.constexpr
):
    """P and Q from the sums of g S and of g A: (channels, t, modes) each."""
    lag = (tl.arange(0, T) + 1)[None, :, None]
    zr, zi = _power(powers, row, tl.arange(0, T) + 1, LAGS, N)
    sr, si = _times(sr, si, zr, zi)
    ar, ai = _times(ar, ai, zr, zi)
    qr, qi = tl.sum(lag * sr + T * ar, 1, True), tl.sum(lag * si + T * ai, 1, True)
    return tl.sum(sr, 1, True), tl.sum(si, 1, True), qr, qi


@triton.jit
def _diagonals(
    near, pr, pi, qr, qi, powers, row,
    T: tl.constexpr, LAGS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Add what is near, from the sum of g u^T (channels, t, s); r_0 is the skip's."""
    lag = tl.arange(0, T)[None, :, None] - tl.arange(0, T)[None, None, :]
    skip = tl.sum(tl.sum(tl.where(lag == 0, near, 0.0), 2, True), 1, True)
    for one in range(T):
        r = tl.sum(tl.sum(tl.where(lag == one, near, 0.0), 2, True), 1, True)
        zr, zi = _power(powers, row, one + tl.arange(0, 1), LAGS, N)
        zr, zi = r * zr, r * zi
        pr, pi, qr, qi = pr + zr, pi + zi, qr + one * zr, qi + one * zi
    return pr, pi, qr, qi, skip


@triton.jit
def _store_modes(out, modes, row, exists, pr, pi, qr, qi, skip, N: tl.constexpr):
    """The gradient of one row of modes, (4N + 1) numbers for each channel."""
    wr, wi = _weights(modes, row, N)
    qr, qi = _times(wr, wi, qr, qi)
    to = out + row[:, None, None] * (4 * N + 1)
    n, exists = tl.arange(0, _padded(N))[None, None, :], exists[:, None, None]
    tl.store(to + n, 2 * qr, exists & (n < N))
    tl.store(to + N + n, -2 * qi, exists & (n < N))
    tl.store(to + 2 * N + n, 2 * pr, exists & (n < N))
    tl.store(to + 3 * N + n, -2 * pi, exists & (n < N))
    tl.store(to + 4 * N, skip, exists)


@triton.jit
def _modes_kernel(
    u, g, out, modes, powers, B, L, D, T: tl.constexpr, LAGS: tl.constexpr,
    N: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u (B, L, D), g (B, L, 2D) -> the gradient of the modes for each 16 images."""
    way = tl.program_id(2)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    row, age = way * D + tl.minimum(d, D - 1), T - 1 - tl.arange(0, T)
    vr, vi = _power(powers, row, age, LAGS, N)
    share = (age / T)[None, :, None]
    fr, fi = _operand(share * vr, PRECISION), _operand(share * vi, PRECISION)
    vr, vi = _operand(vr, PRECISION), _operand(vi, PRECISION)
    zr, zi = _power(powers, row, T + tl.arange(0, 1), LAGS, N)
    sr = tl.full((CHANNELS, _IMAGES, _padded(N)), 0.0, tl.float32)
    pr = tl.full((CHANNELS, T, _padded(N)), 0.0, tl.float32)
    near = tl.full((CHANNELS, T, T), 0.0, tl.float32)
    si, ar, ai, pi, qr, qi = sr, sr, sr, pr, pr, pr
    g, out = g + way * D, out + tl.program_id(1) * 2 * D * (4 * N + 1)
    for step in range(tl.cdiv(L, T)):
        at, inside = _places(step, d, D, way == 1, B, L, D, T)
        x = _operand(tl.load(u + at, inside, 0.0), PRECISION)
        at, inside = _places(step, d, 2 * D, way == 1, B, L, D, T)
        y = tl.permute(_operand(tl.load(g + at, inside, 0.0), PRECISION), (0, 2, 1))
        near = _dot(y, x, near, PRECISION)
        pr = _dot(y, _operand(sr, PRECISION), pr, PRECISION)
        pi = _dot(y, _operand(si, PRECISION), pi, PRECISION)
        qr = _dot(y, _operand(ar, PRECISION), qr, PRECISION)
        qi = _dot(y, _operand(ai, PRECISION), qi, PRECISION)
        ar, ai = _times(ar + sr, ai + si, zr, zi)
        ar, ai = _dot(x, fr, ar, PRECISION), _dot(x, fi, ai, PRECISION)
        sr, si = _times(sr, si, zr, zi)
        sr, si = _dot(x, vr, sr, PRECISION), _dot(x, vi, si, PRECISION)
    pr, pi, qr, qi = _through_states(pr, pi, qr, qi, powers, row, T, LAGS, N)
    pr, pi, qr, qi, skip = _diagonals(near, pr, pi, qr, qi, powers, row, T, LAGS, N)
    _store_modes(out, modes, row, d < D, pr, pi, qr, qi, skip, N)


def _tables(modes: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """z^0 ... z^T and k_0 ... k_{T-1}: (2, D, T + 1, N) and (2, D, T), N real."""
    D, n = modes.shape[1], modes.shape[2] // 4
    powers, kernel = (
        modes.new_empty(2, D, chunk + 1, 2 * n),
        modes.new_empty(2, D, chunk),
    )
    _powers_kernel[(2 * D,)](modes, powers, kernel, n, chunk)
    return powers, kernel


def _constants(modes: Tensor, precision: str, warps: int) -> dict[str, Any]:
    sizes = {"N": modes.shape[2] // 4, "CHANNELS": warps, "num_warps": warps}
    return {**sizes, "num_stages": STAGES, "PRECISION": precision}


def _shape(u: Tensor, modes: Tensor, *settings: Any) -> Tensor:
    return u.new_empty(u.shape[0], u.shape[1], 2 * u.shape[2])


def _backward_shape(grad: Tensor, u: Tensor, modes: Tensor, *settings: Any) -> Any:
    return torch.empty_like(grad), torch.empty_like(modes)


@operator("chunked_triton", _shape)
def _chunked_triton(
    u: Tensor, modes: Tensor, precision: str, chunk: int, warps: int
) -> Tensor:
    (B, L, D), u, modes = u.shape, u.contiguous(), modes.contiguous()
    y = u.new_empty(B, L, 2 * D)
    given = modes, *_tables(modes, chunk), B, L, D, D, False, chunk
    if y.numel():
        grid = triton.cdiv(D, warps), triton.cdiv(B, 16), 2
        _walk_kernel[grid](u, y, *given, **_constants(modes, precision, warps))
    return y


@operator("chunked_triton_backward", _backward_shape)
def _chunked_triton_backward(
    grad: Tensor, u: Tensor, modes: Tensor, precision: str, chunk: int, warps: int
) -> tuple[Tensor, Tensor]:
    u, g, modes = (x.contiguous() for x in (u, grad, modes))
    (B, L, D), tables, both = u.shape, _tables(modes, chunk), torch.empty_like(g)
    if not u.numel():
        return both, torch.zeros_like(modes)
    given = modes, *tables, B, L, D, 2 * D, True, chunk
    grid = triton.cdiv(D, warps), triton.cdiv(B, 16), 2
    _walk_kernel[grid](g, both, *given, **_constants(modes, precision, warps))
    grid = triton.cdiv(D, min(warps, 8)), triton.cdiv(B, 16), 2
    parts = modes.new_empty(grid[1], *modes.shape)
    constants = _constants(modes, precision, min(warps, 8)) | {"T": 16, "LAGS": chunk}
    _modes_kernel[grid](u, g, parts, modes, tables[0], B, L, D, **constants)
    return both, parts.sum(0)


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
