"""The convolution.

Generated from book/12_convolution.md by `make export`: edit there.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffussm.guards import (
    expect,
    expect_int,
    expect_number,
    expect_one_of,
    expect_real,
)
from diffussm.state_space import (
    discretize_bilinear,
    discretize_zoh,
    s4d_inv,
    s4d_legs,
    s4d_lin,
)

__all__ = [
    "check_kernel",
    "vandermonde",
    "without_autocast",
    "fft_conv",
    "later",
    "Kernel",
    "INITIALISATIONS",
    "DISCRETIZATIONS",
    "S4DKernel",
]


def check_kernel(log_dA: Tensor, weights: Tensor, length: int) -> None:
    """Refuse other shapes than (D, N/2) twice, and a length below 1."""
    D, N = expect("log_dA", log_dA, "D N")
    expect("weights", weights, "D N", D=D, N=N)
    expect_int("length", length, least=1)


def vandermonde(log_dA: Tensor, weights: Tensor, length: int) -> Tensor:
    """The kernel K_l = 2 Re sum_n weights_n exp(l log_dA_n), written as it is read.

    Args:
        log_dA: Logarithms of the discrete eigenvalues, complex (D, N/2).
        weights: Products C dB, complex (D, N/2).
        length: L, the number of lags, starting at 0.

    Returns:
        Real (D, L); memory on the way D x N/2 x L.

    Raises:
        ValueError: the shapes differ, or `length` is not positive.

    Source: eq-convolution-vandermonde.
    """
    check_kernel(log_dA, weights, length)
    lags = torch.arange(length, device=log_dA.device)
    powers = torch.exp(log_dA[:, :, None] * lags)  # (D, N/2, L)
    return 2 * torch.einsum("dn,dnl->dl", weights, powers).real  # (D, L)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast switched off for one device; nothing where there is none, as on meta."""
    if device.type == "meta":  # asking torch.amp would break a compiled graph
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _check_convolution(u: Tensor, k: Tensor) -> None:
    expect_real(u=u, k=k)
    if not k.ndim or u.shape[-k.ndim :] != k.shape:
        raise ValueError(
            f"u is {tuple(u.shape)} and k {tuple(k.shape)}: expected (..., D, L) and "
            "(D, L), as of kernel(u.shape[-1])"
        )


def fft_conv(u: Tensor, k: Tensor) -> Tensor:
    """Causal convolution y_i = sum_{l <= i} k_l u_{i-l} by FFT, padded to 2L.

    Computed in float32 (float64 for float64 inputs), also under autocast.

    Args:
        u: Input, real (..., D, L).
        k: Kernel, real (D, L): the last dimensions of `u`.

    Returns:
        (..., D, L), in the dtype of `u`.

    Raises:
        ValueError: the shapes do not fit.
        TypeError: `u` or `k` is not a real floating-point tensor.

    Source: eq-convolution-causal, eq-convolution-wrap (section 3.1 of the paper).
    """
    _check_convolution(u, k)
    if u.numel() == 0:  # there are libraries that refuse to transform nothing
        return (u * k).to(u.dtype)
    length, dtype = u.shape[-1], torch.promote_types(u.dtype, k.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    with without_autocast(u.device):
        u_f = torch.fft.rfft(u.to(dtype), n=2 * length)  # (..., D, L + 1)
        y_f = u_f * torch.fft.rfft(k.to(dtype), n=2 * length)  # (..., D, L + 1)
        y: Tensor = torch.fft.irfft(y_f, n=2 * length)[..., :length]
        return y.to(u.dtype)


def _log_bilinear(z: Tensor) -> Tensor:
    """log((1 + z/2) / (1 - z/2)), accurate near 0: eq-convolution-log-bilinear."""
    a, b = z.real / 2, z.imag / 2
    ratio = 4 * a / ((1 - a) ** 2 + b**2)
    # z = -2 exactly would give log 0; forgotten to 1e-4 in one step is forgotten
    decay = 0.5 * torch.log1p(ratio.clamp_min(torch.finfo(ratio.dtype).eps - 1))
    return torch.complex(decay, torch.atan2(2 * b, 1 - a**2 - b**2))


def later(place: str) -> Callable[..., Any]:
    """A function of a later chapter, "module:function"; its module is imported now."""
    module, _, function = place.partition(":")
    home = import_module(f"{__package__ or 'diffussm'}.{module}")
    found: Callable[..., Any] = getattr(home, function)
    return found


Kernel = Callable[[Tensor, Tensor, int], Tensor]  # (log_dA, weights, length)
INITIALISATIONS = {"lin": s4d_lin, "inv": s4d_inv, "legs": s4d_legs}  # of A
DISCRETIZATIONS = ("zoh", "bilinear")  # zero-order hold, trapezoidal


class S4DKernel(nn.Module):
    """The convolution kernels of D diagonal systems: `kernel(length)` is real (D, L).

    Kept and computed in float32, or in float64 after `.double()`, whatever autocast or
    a conversion to half precision would have.

    Args:
        d_model: D, the number of channels, each with a system of its own.
        d_state: N, the real size of each state; even: N/2 conjugate pairs are stored.
        init: "lin", "inv" or "legs": the initial eigenvalues.
        discretization: "zoh" or "bilinear".
        dt_min, dt_max: The steps start log-uniform between these, in time per position.

    Attributes:
        log_dt, log_A_real, A_imag, C: Parameters (D,), (D, N/2) twice, (D, N/2, 2).
        vandermonde: How the kernel is computed; `vandermonde` is the direct way.

    Source: Gu et al., S4D, 2022; section 3.1 of the paper.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        init: str = "lin",
        discretization: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ) -> None:
        super().__init__()
        D = expect_int("d_model", d_model, least=1)
        expect_one_of("discretization", discretization, DISCRETIZATIONS)
        expect_number("dt_max", dt_max, least=expect_number("dt_min", dt_min, above=0))
        A = INITIALISATIONS[expect_one_of("init", init, INITIALISATIONS)](d_state)
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        log_dt = torch.empty(D, dtype=dtype)
        log_dt.uniform_(math.log(dt_min), math.log(dt_max))
        C = torch.randn(D, d_state // 2, 2, dtype=dtype) / math.sqrt(2)
        self.log_dt = nn.Parameter(log_dt)
        self.log_A_real = nn.Parameter(torch.log(-A.real).to(dtype).repeat(D, 1))
        self.A_imag = nn.Parameter(A.imag.to(dtype).repeat(D, 1))
        self.C = nn.Parameter(C)
        self.discretization = discretization
        self.vandermonde: Kernel = later("two_level:vandermonde_two_level")

    def continuous(self) -> tuple[Tensor, Tensor, Tensor]:
        """The continuous system: A (D, N/2), dt (D, 1), C (D, N/2); B = 1."""
        # at least float32: there is no complex bfloat16, should a checkpoint be in it
        dtype = torch.promote_types(self.C.dtype, torch.float32)
        A = torch.complex(-torch.exp(self.log_A_real.to(dtype)), self.A_imag.to(dtype))
        dt = torch.exp(self.log_dt.to(dtype))[:, None]
        return A, dt, torch.view_as_complex(self.C.to(dtype).contiguous())

    def discrete(self) -> tuple[Tensor, Tensor]:
        """The discrete system, (log dA, C dB), complex (D, N/2) each, with B = 1."""
        A, dt, C = self.continuous()
        if self.discretization == "zoh":
            return dt * A, C * discretize_zoh(A, 1.0, dt)[1]
        return _log_bilinear(dt * A), C * discretize_bilinear(A, 1.0, dt)[1]

    def forward(self, length: int) -> Tensor:
        """The first `length` values of each kernel: real (D, L)."""
        with without_autocast(self.C.device):
            return self.vandermonde(*self.discrete(), length)  # (D, L)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.dtype.itemsize < 4:
                return tensor.to(moved.device, torch.float32)
            return moved

        module: Any = nn.Module  # whose _apply has no types
        applied: Self = module._apply(self, at_least_float32, recurse)
        return applied

    def extra_repr(self) -> str:
        """What `print(kernel)` shows."""
        D, half, _ = self.C.shape
        return (
            f"d_model={D}, d_state={2 * half}, discretization={self.discretization!r}"
        )
