"""On the chip.

Generated from book/73_gpu_kernels.md by `make export`: edit there.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffussm.fft_convolution import convolve, operator

__all__ = [
    "LENGTHS",
    "factors",
    "warps",
    "dft_tables",
    "SLICES",
    "both_in_one",
    "on_chip_convolve",
    "Convolution",
    "TOLERANCE",
    "Choice",
    "relative_errors",
    "choose_convolution",
]

LENGTHS = (
    256,
    512,
    1024,
    2048,
    4096,
)  # the transform has twice as many points, N1 x N2


def factors(length: int) -> tuple[int, int]:
    """N1 and N2 with N1 N2 = 2L: powers of two, N1 the larger, if not equal."""
    n2 = 2 ** (int(math.log2(2 * length)) // 2)
    return 2 * length // n2, n2


def warps(length: int) -> int:
    """How many groups of 32 threads work on one tile."""
    return 4 if length <= 1024 else 8


@functools.lru_cache(maxsize=16)
def dft_tables(length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The constants of the four steps as real and imaginary part, float32, made in float64.

    Returns:
        first (2, N1, N1/2): the DFT matrix of N1 points, for those of its columns where the input is not
        padding; twiddle (2, N1, N2); second (2, N2, N2): the DFT matrix of N2 points.

    Source: chapter 16, equation eq-on-chip-four-steps.
    """
    n1, n2 = factors(length)

    def roots(rows: int, columns: int, order: int) -> Tensor:
        product = torch.arange(rows)[:, None] * torch.arange(columns) % order
        angle = -2 * math.pi * product.double() / order
        return torch.stack([angle.cos(), angle.sin()]).float().to(device)

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
def _matmul(ar, ai, br, bi, PRECISION: tl.constexpr):
    real = tl.dot(ar, br, input_precision=PRECISION) - tl.dot(
        ai, bi, input_precision=PRECISION
    )
    imaginary = tl.dot(ar, bi, input_precision=PRECISION) + tl.dot(
        ai, br, input_precision=PRECISION
    )
    return real, imaginary


@triton.jit
def _transform(
    x,
    first,
    twiddle,
    second,
    N1: tl.constexpr,
    N2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The spectrum [k1, k2] of a real tile [N1/2, N2] and as much padding; frequency k1 + N1 k2."""
    ar, ai = _load(first, N1, N1 // 2), _load(first + N1 * N1 // 2, N1, N1 // 2)
    tr, ti = (
        tl.dot(ar, x, input_precision=PRECISION),
        tl.dot(ai, x, input_precision=PRECISION),
    )
    tr, ti = _times(tr, ti, _load(twiddle, N1, N2), _load(twiddle + N1 * N2, N1, N2))
    fr, fi = _load(second, N2, N2), _load(second + N2 * N2, N2, N2)
    return _matmul(tr, ti, fr, fi, PRECISION)


@triton.jit
def _transform_back(
    yr,
    yi,
    first,
    twiddle,
    second,
    N1: tl.constexpr,
    N2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The first half of the inverse transform, times N1 N2: spectrum [k1, k2] -> complex tile [N1/2, N2]."""
    ar, ai = _load(first, N1, N1 // 2), _load(first + N1 * N1 // 2, N1, N1 // 2)
    fr, fi = _load(second, N2, N2), _load(second + N2 * N2, N2, N2)
    vr, vi = _matmul(yr, yi, fr, -fi, PRECISION)
    vr, vi = _times(vr, vi, _load(twiddle, N1, N2), -_load(twiddle + N1 * N2, N1, N2))
    return _matmul(tl.trans(ar), tl.trans(-ai), vr, vi, PRECISION)


@triton.jit
def _forward_kernel(
    u,
    h,
    y,
    first,
    twiddle,
    second,
    D,
    N1: tl.constexpr,
    N2: tl.constexpr,
    PRECISION: tl.constexpr,
):
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
    grad,
    b,
    d,
    first,
    twiddle,
    second,
    D,
    N1: tl.constexpr,
    N2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of one channel of the gradient (B, 2, D, L): past + i future."""
    N: tl.constexpr = N1 * N2
    past = _load(grad + (b * 2 * D + d) * (N // 2), N1 // 2, N2)
    pr, pi = _transform(past, first, twiddle, second, N1, N2, PRECISION)
    future = _load(grad + (b * 2 * D + D + d) * (N // 2), N1 // 2, N2)
    fr, fi = _transform(future, first, twiddle, second, N1, N2, PRECISION)
    return pr - fi, pi + fr


@triton.jit
def _grad_u_kernel(
    grad,
    h,
    grad_u,
    first,
    twiddle,
    second,
    D,
    N1: tl.constexpr,
    N2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One channel of one image: grad (B, 2, D, L), h (D, 2, N1, N2) -> grad_u (B, D, L)."""
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
    """One channel of a slice of the batch: grad (B, 2, D, L), u (B, D, L) -> s (SLICES, D, 2, N1, N2)."""
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


SLICES = 2  # of the batch, each with a sum of its own: more programs than channels keep a GPU busy


def both_in_one(spectra: Tensor) -> Tensor:
    """H of all 2L frequencies from the two half spectra: complex (2, D, L + 1) -> (D, 2L).

    Source: chapter 16, equation eq-on-chip-both.
    """
    forward, backward = torch.cat([spectra, spectra[..., 1:-1].flip(-1).conj()], dim=-1)
    return forward + 1j * backward


def _tiles(spectra: Tensor) -> Tensor:
    """H / 2L as the kernels read it: real (D, 2, N1, N2)."""
    length = spectra.shape[-1] - 1
    n1, n2 = factors(length)
    h = both_in_one(spectra) / (2 * length)  # (D, 2L), the frequency is k1 + N1 k2
    return torch.view_as_real(h).unflatten(1, (n2, n1)).permute(0, 3, 2, 1).contiguous()


def _on_chip_shape(u: Tensor, spectra: Tensor, precision: str) -> Tensor:
    return u.new_empty(u.shape[0], u.shape[1], 2 * u.shape[2])


def _on_chip_backward_shape(
    grad: Tensor, u: Tensor, spectra: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), torch.empty_like(spectra)


@operator("on_chip", _on_chip_shape)
def _on_chip(u: Tensor, spectra: Tensor, precision: str) -> Tensor:
    batch, length, d_model = u.shape
    n1, n2 = factors(length)
    x = u.transpose(1, 2).contiguous()  # (B, D, L)
    y = u.new_empty(batch, 2, d_model, length)
    tables = dft_tables(length, u.device)
    sizes = {"N1": n1, "N2": n2, "PRECISION": precision, "num_warps": warps(length)}
    _forward_kernel[(batch, d_model)](x, _tiles(spectra), y, *tables, d_model, **sizes)
    return y.flatten(1, 2).transpose(1, 2).contiguous()  # (B, L, 2D)


@operator("on_chip_backward", _on_chip_backward_shape)
def _on_chip_backward(
    grad: Tensor, u: Tensor, spectra: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    batch, length, d_model = u.shape
    n1, n2 = factors(length)
    x, g = (
        u.transpose(1, 2).contiguous(),
        grad.transpose(1, 2).contiguous(),
    )  # (B, D, L), (B, 2D, L)
    grad_u = torch.empty_like(x)
    slices = min(SLICES, batch)
    s = torch.empty(slices, d_model, 2, n1, n2, device=u.device)
    tables = dft_tables(length, u.device)
    sizes = {"N1": n1, "N2": n2, "PRECISION": precision, "num_warps": warps(length)}
    _grad_u_kernel[(batch, d_model)](
        g, _tiles(spectra), grad_u, *tables, d_model, **sizes
    )
    _grad_h_kernel[(d_model, slices)](g, x, s, *tables, batch, d_model, slices, **sizes)
    s = torch.view_as_complex(
        s.sum(0).permute(0, 3, 2, 1).flatten(1, 2).contiguous()
    )  # (D, 2L)
    mirrored = s.roll(-1, 1).flip(1).conj()  # at f: the conjugate of s at -f
    half = (
        torch.stack([s + mirrored, (s - mirrored) / 1j])[..., : length + 1] / 2
    )  # (2, D, L + 1)
    half[..., 1:-1] *= 2
    return grad_u.transpose(1, 2).contiguous(), half / (2 * length)


class _OnChip(torch.autograd.Function):
    """The two operations, tied together for autograd."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, spectra: Tensor, precision: str) -> Tensor:
        ctx.save_for_backward(u, spectra)
        ctx.precision = precision
        return _on_chip(u, spectra, precision)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_on_chip_backward(grad, *ctx.saved_tensors, ctx.precision), None


def on_chip_convolve(u: Tensor, spectra: Tensor, precision: str = "tf32x3") -> Tensor:
    """:func:`diffussm.fft_convolution.convolve` without leaving the chip between the transforms, in Triton.

    First derivatives only; a second one is refused.

    Args:
        u: Input, (B, L, D), float32 or bfloat16 or float16, L in LENGTHS.
        spectra: complex64 (2, D, L + 1), see :func:`~diffussm.bidirectional.kernel_spectra`.
        precision: Of the products on tensor cores: "tf32", "tf32x3" (three products of it, nearly float32) or
            "ieee" (float32, on no tensor core).

    Returns:
        (B, L, 2D) in the dtype of ``u``.

    Raises:
        ValueError: a length that is not in LENGTHS, or shapes or a precision that do not fit.
        TypeError: dtypes that the kernels do not know.

    Source: chapter 16.
    """
    if precision not in ("tf32", "tf32x3", "ieee"):
        raise ValueError(
            f"precision={precision!r}: expected 'tf32', 'tf32x3' or 'ieee'"
        )
    if (
        u.dtype not in (torch.float32, torch.bfloat16, torch.float16)
        or spectra.dtype != torch.complex64
    ):
        raise TypeError(
            f"u has dtype {u.dtype} and spectra {spectra.dtype}: expected float32, bfloat16 or float16, and "
            "complex64; for others use diffussm.fft_convolution.convolve"
        )
    if u.ndim != 3 or spectra.shape != (2, u.shape[2], u.shape[1] + 1):
        raise ValueError(
            f"u has shape {tuple(u.shape)} and spectra {tuple(spectra.shape)}: expected (B, L, D) and "
            "(2, D, L + 1)"
        )
    if u.shape[1] not in LENGTHS:
        raise ValueError(
            f"L={u.shape[1]}: the kernels on the chip are written for {', '.join(map(str, LENGTHS))}; for "
            "other lengths use diffussm.fft_convolution.convolve"
        )
    y: Tensor = _OnChip.apply(u, spectra, precision)
    return y


Convolution = Callable[[Tensor, Tensor], Tensor]
TOLERANCE = {"output": 1e-5, "grad_u": 1e-4, "grad_spectra": 1e-4}  # in float32


@dataclass(frozen=True)
class Choice:
    """Which convolution to use on a machine, and why.

    Attributes:
        convolution: For ``block.ssm.convolution``.
        reason: A sentence for the log.
        seconds: Of forward and backward pass of what was timed, by name.
        errors: Of what was compared, by name; see :func:`relative_errors`.
    """

    convolution: Convolution
    reason: str
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)


def _problem(
    length: int, d_model: int, batch: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Input, spectra of decaying kernels, and a gradient of the output, always the same."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(batch, length, d_model, generator=generator)
    kernels = torch.randn(2, d_model, length, generator=generator) * torch.exp(
        -torch.arange(length) / 64
    )
    spectra = torch.fft.rfft(kernels, n=2 * length)
    spectra[1].conj_physical_()
    grad = torch.randn(batch, length, 2 * d_model, generator=generator)
    return u.to(device, dtype), spectra.to(device), grad.to(device, dtype)


def _run(
    convolution: Convolution, u: Tensor, spectra: Tensor, grad: Tensor
) -> dict[str, Tensor]:
    u, spectra = u.detach().requires_grad_(), spectra.detach().requires_grad_()
    y = convolution(u, spectra)
    return dict(
        zip(
            TOLERANCE,
            (y.detach(), *torch.autograd.grad(y, (u, spectra), grad)),
            strict=True,
        )
    )


def relative_errors(
    convolution: Convolution,
    length: int,
    d_model: int,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, float]:
    """How far a convolution is from the same in float64: "output", "grad_u" and "grad_spectra".

    Each is the largest difference relative to the largest entry, NaN if anything is not a number.
    """
    u, spectra, grad = _problem(length, d_model, batch, device, dtype)
    ours = _run(convolution, u, spectra, grad)
    true = _run(convolve, u.double(), spectra.to(torch.complex128), grad.double())
    return {
        name: float((ours[name] - value).abs().max() / value.abs().max())
        for name, value in true.items()
    }


def _median_seconds(
    sides: dict[str, Convolution], problem: tuple[Tensor, Tensor, Tensor], runs: int = 5
) -> dict[str, float]:
    """Forward and backward, the sides in turns; the first round compiles and does not count."""
    wait = torch.cuda.synchronize if problem[0].is_cuda else int
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in range(runs + 1):
        for name, side in sides.items():
            wait()
            start = time.perf_counter()
            _run(side, *problem)
            wait()
            if run:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def choose_convolution(
    length: int,
    d_model: int,
    batch: int,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> Choice:
    """The fastest convolution that is right on this machine: run, compared and timed before it is chosen.

    Tried are the kernels on the chip, with products of single TF32 and of three. One is accepted if in
    float32 its errors are within TOLERANCE, in half precision at most twice that of the output of
    :func:`~diffussm.fft_convolution.convolve` (its rounding), and if it is faster. Whatever goes wrong (a
    kernel that does not compile, memory that does not suffice, wrong numbers) is a reason to stay with the
    FFT, not an error.

    Args:
        length: L.
        d_model: D.
        batch: Images that one process takes through the network at once.
        device: Where; anything but a GPU stays with the FFT.
        dtype: Of the input of the convolution, bfloat16 under autocast.

    Source: chapter 16.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return Choice(
            convolve,
            f"FFT: the kernels on the chip are for a GPU, and this is a {device.type}",
        )
    return _try_all(length, d_model, batch, device, dtype)


def _try_all(
    length: int, d_model: int, batch: int, device: torch.device, dtype: torch.dtype
) -> Choice:
    if length not in LENGTHS:
        return Choice(
            convolve, f"FFT: L = {length} is none of {', '.join(map(str, LENGTHS))}"
        )
    try:
        small = length, min(d_model, 64), min(batch, 3), device, dtype
        errors = {"FFT": relative_errors(convolve, *small)}
        allowed = TOLERANCE
        if (
            dtype != torch.float32
        ):  # twice what rounding the output to this precision costs
            allowed = dict.fromkeys(TOLERANCE, 2 * errors["FFT"]["output"])
        fastest: dict[str, Convolution] = {"FFT": convolve}
        faults = []
        for precision in ("tf32", "tf32x3"):
            name = f"on the chip, {precision}"
            candidate = functools.partial(on_chip_convolve, precision=precision)
            try:
                errors[name] = relative_errors(candidate, *small)
            except (
                Exception
            ) as error:  # Triton raises many kinds, and none may stop a training
                faults.append(f"{name}: {type(error).__name__}")
                continue
            if all(errors[name][key] <= allowed[key] for key in allowed):
                fastest[name] = candidate
            else:
                worst = max(errors[name][key] / allowed[key] for key in allowed)
                faults.append(f"{name}: errors {worst:.1f} times what is allowed")
        seconds = _median_seconds(
            fastest, _problem(length, d_model, batch, device, dtype)
        )
    except Exception as error:
        return Choice(
            convolve, f"FFT: trying the others failed ({type(error).__name__}: {error})"
        )
    name = min(seconds, key=lambda key: seconds[key])
    times = ", ".join(f"{key} {1e3 * value:.2f} ms" for key, value in seconds.items())
    return Choice(
        fastest[name], f"{name}: {'; '.join([times, *faults])}", seconds, errors
    )
