"""The convolution.

Generated from book/12_convolution.md by `make export`: edit there.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffussm.state_space import (
    discretize_bilinear,
    discretize_zoh,
    s4d_inv,
    s4d_legs,
    s4d_lin,
)

__all__ = [
    "vandermonde",
    "fft_conv",
    "vandermonde_two_level",
    "INITIALISATIONS",
    "DISCRETIZATIONS",
    "S4DKernel",
]


def vandermonde(log_dA: Tensor, weights: Tensor, length: int) -> Tensor:
    """The kernel K_l = 2 Re sum_n weights_n exp(l log_dA_n), written as it is read: memory D x N/2 x L.

    Args:
        log_dA: Logarithms of the discrete eigenvalues, complex (D, N/2).
        weights: Products C dB, complex (D, N/2).
        length: L, the number of lags, starting at 0.

    Returns:
        Real (D, L).

    Raises:
        ValueError: the shapes differ, or ``length`` is not a positive integer.

    Source: chapter 2, equation eq-convolution-vandermonde. The reference for vandermonde_two_level.
    """
    _check_kernel(log_dA, weights, length)
    lags = torch.arange(length, device=log_dA.device)
    powers = torch.exp(log_dA[:, :, None] * lags)  # (D, N/2, L)
    return 2 * torch.einsum("dn,dnl->dl", weights, powers).real  # (D, L)


def _check_kernel(log_dA: Tensor, weights: Tensor, length: int) -> None:
    if log_dA.ndim != 2 or log_dA.shape != weights.shape:
        raise ValueError(
            f"log_dA has shape {tuple(log_dA.shape)} and weights {tuple(weights.shape)}: "
            "expected the same (D, N/2)"
        )
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(
            f"length={length!r}: expected a positive integer, the number of positions"
        )


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast switched off for one device; does nothing where there is no autocast, as on meta."""
    if (
        device.type == "meta"
    ):  # asking torch.amp which devices have it would break a compiled graph
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def fft_conv(u: Tensor, k: Tensor) -> Tensor:
    """Causal convolution y_i = sum_{l <= i} k_l u_{i-l} by FFT, padded to 2L so that nothing wraps around.

    Computed in float32 (float64 for float64 inputs), also under autocast.

    Args:
        u: Input, real (..., D, L).
        k: Kernel, real (D, L): the last dimensions of ``u``.

    Returns:
        (..., D, L), in the dtype of ``u``.

    Raises:
        ValueError: the shapes do not fit.
        TypeError: ``u`` or ``k`` is not a real floating-point tensor.

    Source: chapter 2, equations eq-convolution-causal and eq-convolution-wrap (section 3.1 of the paper).
    """
    for name, tensor in (("u", u), ("k", k)):
        if not tensor.is_floating_point():
            raise TypeError(
                f"{name} has dtype {tensor.dtype}: expected a real floating-point tensor"
            )
    if k.ndim == 0 or u.ndim < k.ndim or u.shape[-k.ndim :] != k.shape:
        raise ValueError(
            f"u has shape {tuple(u.shape)} and k {tuple(k.shape)}: expected (..., D, L) and (D, L); "
            "build the kernel with the length of the input, kernel(u.shape[-1])"
        )
    if u.numel() == 0:  # there are libraries that refuse to transform nothing
        return (u * k).to(u.dtype)
    length = u.shape[-1]
    with _without_autocast(u.device):
        dtype = torch.promote_types(
            torch.promote_types(u.dtype, k.dtype), torch.float32
        )
        spectrum = torch.fft.rfft(u.to(dtype), n=2 * length)  # (..., D, L + 1)
        spectrum = spectrum * torch.fft.rfft(
            k.to(dtype), n=2 * length
        )  # (..., D, L + 1)
        return torch.fft.irfft(spectrum, n=2 * length)[..., :length].to(u.dtype)


def vandermonde_two_level(log_dA: Tensor, weights: Tensor, length: int) -> Tensor:
    """The kernel of :func:`vandermonde` from 2 sqrt(L), not L, exponentials per state and a matrix product.

    A lag is written with two digits, l = i b + j, so that exp(l z) = exp(i b z) exp(j z). Arguments, result
    and errors are those of :func:`vandermonde`; memory is D x N x 2 sqrt(L) and the result.
    Differentiable once.

    On GPUs the matrix product obeys ``torch.set_float32_matmul_precision``: with TensorFloat-32 allowed, the
    kernel keeps three digits.

    Source: chapter 2, equation eq-convolution-two-level.
    """
    _check_kernel(log_dA, weights, length)
    block = 2 ** math.ceil(math.log2(length) / 2)  # about sqrt(L)
    kernel = _TwoLevel.apply(log_dA, weights, block, -(-length // block))  # (D, I, J)
    return kernel.flatten(1)[:, :length]  # (D, L)


class _TwoLevel(torch.autograd.Function):
    """2 Re(P Q) and its gradients (chapter 2, eq-convolution-two-level and eq-convolution-backward)."""

    @staticmethod
    def forward(
        ctx: Any, log_dA: Tensor, weights: Tensor, block: int, n_blocks: int
    ) -> Tensor:
        i = block * torch.arange(n_blocks, device=log_dA.device)
        j = torch.arange(block, device=log_dA.device)
        E = _exp(log_dA[:, None, :] * i[:, None])  # (D, I, N/2)
        Q_conj = _exp(log_dA.conj()[:, None, :] * j[:, None])  # (D, J, N/2)
        ctx.save_for_backward(weights, E, Q_conj)
        ctx.block = block
        return (_pairs(weights[:, None, :] * E) @ _pairs(Q_conj).mT).mul_(
            2
        )  # (D, I, J)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weights, E, Q_conj = ctx.saved_tensors
        with _without_autocast(
            grad.device
        ):  # backward may be called where autocast is on
            G = 2 * grad  # (D, I, J)
            i = ctx.block * torch.arange(E.shape[1], device=E.device).to(E.dtype)
            j = torch.arange(Q_conj.shape[1], device=E.device).to(E.dtype)
            g = _complex(G @ _pairs(Q_conj)).mul_(E.conj())  # (D, I, N/2)
            grad_weights = g.sum(1)  # (D, N/2)
            grad_log_dA = weights.conj() * torch.einsum("din,i->dn", g, i)  # (D, N/2)
            g = _complex(G.mT @ _pairs(weights[:, None, :] * E)).mul_(
                Q_conj.conj()
            )  # (D, J, N/2)
            grad_log_dA = (
                grad_log_dA + torch.einsum("djn,j->dn", g, j).conj()
            )  # (D, N/2)
        return grad_log_dA, grad_weights, None, None


def _exp(z: Tensor) -> Tensor:
    # the real functions run vectorised on a CPU where the complex exponential does not
    return torch.polar(torch.exp(z.real), z.imag)


def _pairs(z: Tensor) -> Tensor:
    return torch.view_as_real(z).flatten(-2)  # (..., N/2) -> (..., N)


def _complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))  # (..., N) -> (..., N/2)


INITIALISATIONS = {"lin": s4d_lin, "inv": s4d_inv, "legs": s4d_legs}
DISCRETIZATIONS = ("zoh", "bilinear")


class S4DKernel(nn.Module):
    """The convolution kernels of D diagonal state space systems: ``kernel(length)`` is real (D, L).

    Kept and computed in float32, or in float64 after ``.double()``. Neither autocast nor a conversion of the
    model to half precision changes that: phases and decays would lose the digits they need.

    Args:
        d_model: D, the number of channels, each with a system of its own.
        d_state: N, the real size of each state; even, because N/2 conjugate pairs are stored.
        init: "lin", "inv" or "legs": the initial eigenvalues (chapter 1).
        discretization: "zoh" or "bilinear".
        dt_min, dt_max: The steps start log-uniform between these, in time per position.

    Parameters, all real:
        log_dt (D,), log_A_real (D, N/2), A_imag (D, N/2), C (D, N/2, 2).

    Raises:
        ValueError: an argument outside the above.

    Source: chapter 2 (Gu et al., S4D, 2022; section 3.1 of the paper).
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
        if isinstance(d_model, bool) or not isinstance(d_model, int) or d_model < 1:
            raise ValueError(
                f"d_model={d_model!r}: expected a positive integer, the number of channels"
            )
        if init not in INITIALISATIONS:
            raise ValueError(
                f"init={init!r}: expected one of {', '.join(map(repr, INITIALISATIONS))}"
            )
        if discretization not in DISCRETIZATIONS:
            raise ValueError(
                f"discretization={discretization!r}: expected one of {', '.join(map(repr, DISCRETIZATIONS))}"
            )
        if not 0 < dt_min <= dt_max < math.inf:
            raise ValueError(
                f"dt_min={dt_min}, dt_max={dt_max}: expected 0 < dt_min <= dt_max, e.g. 1e-3 and 1e-1"
            )
        A = INITIALISATIONS[init](d_state)  # (N/2,)
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        log_dt = torch.empty(d_model, dtype=dtype).uniform_(
            math.log(dt_min), math.log(dt_max)
        )
        self.discretization = discretization
        self.log_dt = nn.Parameter(log_dt)
        self.log_A_real = nn.Parameter(torch.log(-A.real).to(dtype).repeat(d_model, 1))
        self.A_imag = nn.Parameter(A.imag.to(dtype).repeat(d_model, 1))
        self.C = nn.Parameter(
            torch.randn(d_model, d_state // 2, 2, dtype=dtype) / math.sqrt(2)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What .to(), .half() and .cuda() do to every tensor, but never below float32."""

        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.dtype.itemsize < 4:
                return tensor.to(moved.device, torch.float32)
            return moved

        applied: Self = super()._apply(at_least_float32, recurse)
        return applied

    def discrete(self) -> tuple[Tensor, Tensor]:
        """The discrete system as the kernel needs it: (log dA, C dB), complex (D, N/2) each, with B = 1."""
        # at least float32: there is no complex bfloat16, should a checkpoint have been assigned in it
        dtype = torch.promote_types(self.C.dtype, torch.float32)
        A = torch.complex(-torch.exp(self.log_A_real.to(dtype)), self.A_imag.to(dtype))
        dt = torch.exp(self.log_dt.to(dtype))[:, None]  # (D, 1)
        C = torch.view_as_complex(self.C.to(dtype).contiguous())  # (D, N/2)
        if self.discretization == "zoh":
            return dt * A, C * discretize_zoh(A, 1.0, dt)[1]
        return _log_bilinear(dt * A), C * discretize_bilinear(A, 1.0, dt)[1]

    def forward(self, length: int) -> Tensor:
        """The first ``length`` values of each kernel: real (D, L)."""
        with _without_autocast(self.C.device):
            return vandermonde_two_level(*self.discrete(), length)  # (D, L)

    def extra_repr(self) -> str:
        """What ``print(kernel)`` shows."""
        d_model, half_state, _ = self.C.shape
        return f"d_model={d_model}, d_state={2 * half_state}, discretization={self.discretization!r}"


def _log_bilinear(z: Tensor) -> Tensor:
    """log((1 + z/2) / (1 - z/2)) without cancellation near 0 (chapter 2, eq-convolution-log-bilinear)."""
    a, b = z.real / 2, z.imag / 2
    ratio = 4 * a / ((1 - a) ** 2 + b**2)
    # z = -2 exactly would give log 0; a state that is forgotten to 1e-4 in one step is forgotten
    decay = 0.5 * torch.log1p(ratio.clamp_min(torch.finfo(ratio.dtype).eps - 1))
    return torch.complex(decay, torch.atan2(2 * b, 1 - a**2 - b**2))
