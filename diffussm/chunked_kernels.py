"""A recurrence for tensor cores.

Generated from book/75_chunked_kernels.md by `make export`: edit there.
"""

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["times", "padded", "decay_powers", "walk_kernel", "modes_kernel"]


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
        rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        factor = tl.where(factor == factor, rounded, factor)  # a NaN would become 0
    return factor


@triton.jit
def _dot(a, b, c, PRECISION: tl.constexpr):
    """a b + c, a product for each channel."""
    KIND: tl.constexpr = "tf32" if PRECISION == "bf16" else PRECISION  # of float32 only
    return tl.dot(a, b, c, input_precision=KIND)


@triton.jit
def times(ar, ai, br, bi):
    """The product of two complex numbers, as two real ones."""
    return ar * br - ai * bi, ar * bi + ai * br


@triton.constexpr_function
def padded(n):
    """The least number of modes that a tile has: a power of two, 16 or more."""
    return max(16, triton.next_power_of_2(n))


@triton.jit
def _powers_kernel(modes, powers, kernel, N: tl.constexpr, T: tl.constexpr):
    """Of one row of modes (2D, 4N + 1), 16 lags: (2D, T + 1, 2N) and (2D, T)."""
    row, n = tl.program_id(0), tl.arange(0, padded(N))[None, :]
    lags = tl.program_id(1) * 16 + tl.arange(0, 16)
    lag, at, exists = lags[:, None], modes + row * (4 * N + 1) + n, n < N
    size = tl.exp(tl.load(at, exists, 0.0) * lag)
    angle = tl.load(at + N, exists, 0.0) * lag
    zr, zi = size * tl.cos(angle), size * tl.sin(angle)
    wr, wi = tl.load(at + 2 * N, exists, 0.0), tl.load(at + 3 * N, exists, 0.0)
    k = 2 * tl.sum(wr * zr - wi * zi, 1)
    to = powers + (row * (T + 1) + lag) * 2 * N + n
    tl.store(to, zr, exists & (lag <= T))
    tl.store(to + N, zi, exists & (lag <= T))
    skip = tl.load(modes + row * (4 * N + 1) + 4 * N)
    tl.store(kernel + row * T + lags, tl.where(lags == 0, k + skip, k), lags < T)


def decay_powers(modes: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """z^0 ... z^T and k_0 ... k_{T-1}: (2, D, T + 1, N) and (2, D, T), T the chunk."""
    D, n = modes.shape[1], modes.shape[2] // 4
    powers = modes.new_empty(2, D, chunk + 1, 2 * n)
    kernel = modes.new_empty(2, D, chunk)
    grid = 2 * D, triton.cdiv(chunk + 1, 16)
    _powers_kernel[grid](modes, powers, kernel, n, chunk, num_warps=1)
    return powers, kernel


@triton.jit
def _power(powers, row, lag, LAGS: tl.constexpr, N: tl.constexpr):
    """z^lag of the channels in `row`: two tiles (channels, lags, modes)."""
    n = tl.arange(0, padded(N))[None, None, :]
    at = powers + (row[:, None, None] * (LAGS + 1) + lag[None, :, None]) * 2 * N + n
    return tl.load(at, n < N, 0.0), tl.load(at + N, n < N, 0.0)


@triton.jit
def _weights(modes, row, N: tl.constexpr):
    """w of the channels in `row`: two tiles (channels, 1, modes)."""
    n = tl.arange(0, padded(N))[None, None, :]
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
    rr, ri = times(2 * wr, 2 * wi, zr, zi)
    rr, ri = tl.permute(rr, (0, 2, 1)), tl.permute(-ri, (0, 2, 1))
    return _operand(rr, PRECISION), _operand(ri, PRECISION)


@triton.jit
def _state(d, way, B, D, N: tl.constexpr):
    """Offsets of a tile (channels, images, modes) in (B, 2, D, 2N); which exist."""
    b = (tl.program_id(1) * _IMAGES + tl.arange(0, _IMAGES)).to(tl.int64)[None, :, None]
    n = tl.arange(0, padded(N))[None, None, :]
    at = ((b * 2 + way) * D + d[:, None, None]) * 2 * N + n
    return at, (d < D)[:, None, None] & (b < B) & (n < N)


@triton.jit
def _begin(states, at, exists, PASS: tl.constexpr, N: tl.constexpr):
    """The states that a walk is given, or zeros."""
    exists = exists & (PASS == "from")
    return tl.load(states + at, exists, 0.0), tl.load(states + at + N, exists, 0.0)


@triton.jit
def _leave(states, at, exists, real, imag, N: tl.constexpr):
    tl.store(states + at, real, exists)
    tl.store(states + at + N, imag, exists)


@triton.jit
def walk_kernel(
    x, y, states, modes, powers, kernel, B, L, D, X, PASS: tl.constexpr,
    ADJOINT: tl.constexpr, T: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
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
    lies, exists = _state(d, way, B, D, N)
    sr, si = _begin(states, lies, exists, PASS, N)
    none = tl.full((CHANNELS, _IMAGES, T), 0.0, tl.float32)
    x, y = x + way * (X - D), y + way * D
    for step in range(tl.cdiv(L, T)):
        at, inside = _places(step, d, X, mirrored, B, L, D, T)
        u = _operand(tl.load(x + at, inside, 0.0), PRECISION)
        if PASS != "to":
            out = _dot(u, near, none, PRECISION)
            out = _dot(_operand(sr, PRECISION), rr, out, PRECISION)
            out = _dot(_operand(si, PRECISION), ri, out, PRECISION)
            at, inside = _places(step, d, 2 * D, mirrored, B, L, D, T)
            tl.store(y + at, out, inside)
        sr, si = times(sr, si, zr, zi)
        sr, si = _dot(u, vr, sr, PRECISION), _dot(u, vi, si, PRECISION)
    if PASS == "to":
        _leave(states, lies, exists, sr, si, N)


@triton.jit
def _through_states(
    sr, si, ar, ai, powers, row, T: tl.constexpr, LAGS: tl.constexpr, N: tl.constexpr
):
    """P and Q from the sums of g S and of g A: (channels, t, modes) each."""
    lag = (tl.arange(0, T) + 1)[None, :, None]
    zr, zi = _power(powers, row, tl.arange(0, T) + 1, LAGS, N)
    sr, si = times(sr, si, zr, zi)
    ar, ai = times(ar, ai, zr, zi)
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
    qr, qi = times(wr, wi, qr, qi)
    to = out + row[:, None, None] * (4 * N + 1)
    n, exists = tl.arange(0, padded(N))[None, None, :], exists[:, None, None]
    tl.store(to + n, 2 * qr, exists & (n < N))
    tl.store(to + N + n, -2 * qi, exists & (n < N))
    tl.store(to + 2 * N + n, 2 * pr, exists & (n < N))
    tl.store(to + 3 * N + n, -2 * pi, exists & (n < N))
    tl.store(to + 4 * N, skip, exists)


@triton.jit
def _add(y, sr, si, pr, pi, PRECISION: tl.constexpr):
    """To the sums of products with both parts of a state, one chunk more."""
    pr = _dot(y, _operand(sr, PRECISION), pr, PRECISION)
    return pr, _dot(y, _operand(si, PRECISION), pi, PRECISION)


@triton.jit
def modes_kernel(
    u, g, out, states, ages, modes, powers, B, L, D, PASS: tl.constexpr,
    T: tl.constexpr, LAGS: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """u (B, L, D), g (B, L, 2D) -> the gradient of the modes for each 16 images."""
    way, d = tl.program_id(2), tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    row, age = way * D + tl.minimum(d, D - 1), T - 1 - tl.arange(0, T)
    vr, vi = _power(powers, row, age, LAGS, N)
    share = (age / T)[None, :, None]
    fr, fi = _operand(share * vr, PRECISION), _operand(share * vi, PRECISION)
    vr, vi = _operand(vr, PRECISION), _operand(vi, PRECISION)
    zr, zi = _power(powers, row, T + tl.arange(0, 1), LAGS, N)
    lies, exists = _state(d, way, B, D, N)
    sr, si = _begin(states, lies, exists, PASS, N)
    ar, ai = _begin(ages, lies, exists, PASS, N)
    pr = tl.full((CHANNELS, T, padded(N)), 0.0, tl.float32)
    near = tl.full((CHANNELS, T, T), 0.0, tl.float32)
    pi, qr, qi = pr, pr, pr
    g, out = g + way * D, out + tl.program_id(1) * 2 * D * (4 * N + 1)
    for step in range(tl.cdiv(L, T)):
        at, inside = _places(step, d, D, way == 1, B, L, D, T)
        x = _operand(tl.load(u + at, inside, 0.0), PRECISION)
        if PASS != "to":
            at, inside = _places(step, d, 2 * D, way == 1, B, L, D, T)
            y = tl.permute(_operand(tl.load(g + at, inside, 0.0), PRECISION), (0, 2, 1))
            near = _dot(y, x, near, PRECISION)
            pr, pi = _add(y, sr, si, pr, pi, PRECISION)
            qr, qi = _add(y, ar, ai, qr, qi, PRECISION)
        ar, ai = times(ar + sr, ai + si, zr, zi)
        ar, ai = _dot(x, fr, ar, PRECISION), _dot(x, fi, ai, PRECISION)
        sr, si = times(sr, si, zr, zi)
        sr, si = _dot(x, vr, sr, PRECISION), _dot(x, vi, si, PRECISION)
    if PASS == "to":
        _leave(states, lies, exists, sr, si, N)
        _leave(ages, lies, exists, ar, ai, N)
    else:
        pr, pi, qr, qi = _through_states(pr, pi, qr, qi, powers, row, T, LAGS, N)
        pr, pi, qr, qi, skip = _diagonals(near, pr, pi, qr, qi, powers, row, T, LAGS, N)
        _store_modes(out, modes, row, d < D, pr, pi, qr, qi, skip, N)
