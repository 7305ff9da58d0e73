"""State spaces.

Generated from book/11_state_space.md by `make export`: edit there.
"""

import math

import torch
from torch import Tensor

from diffussm.guards import expect_int, expect_number

__all__ = [
    "discretize_zoh",
    "discretize_bilinear",
    "scan",
    "hippo_legs",
    "s4d_legs",
    "s4d_lin",
    "s4d_inv",
]


def _expm1(z: Tensor) -> Tensor:
    """exp(z) - 1 for complex z, accurate near z = 0: eq-state-space-expm1."""
    real = torch.expm1(z.real) * torch.cos(z.imag) - 2 * torch.sin(z.imag / 2) ** 2
    return torch.complex(real, torch.exp(z.real) * torch.sin(z.imag))


def _check_discretization(A: Tensor, dt: Tensor | float) -> None:
    if not A.is_complex():
        raise TypeError(f"A is {A.dtype}: expected the complex diagonal, or A + 0j")
    if not isinstance(dt, Tensor):
        expect_number("dt", dt, above=0)


def discretize_zoh(
    A: Tensor, B: Tensor | float, dt: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Zero-order hold: the exact step of dx/dt = A x + B u for an input that holds.

    Args:
        A: Diagonal of the state matrix, complex (..., N/2), in 1/time.
        B: Input map, complex or real, broadcastable to `A`.
        dt: Step, positive, broadcastable to `A`, in time per position.

    Returns:
        dA = exp(dt A) and dB = (exp(dt A) - 1) / A * B, the limit dt B where A = 0.

    Raises:
        TypeError: `A` is not complex.
        ValueError: `dt` is a number that is not positive.

    Source: eq-state-space-zoh.
    """
    _check_discretization(A, dt)
    z = dt * A
    at_zero = z == 0
    growth = torch.where(at_zero, 1 + z / 2, _expm1(z) / torch.where(at_zero, 1, z))
    return torch.exp(z), growth * dt * B


def discretize_bilinear(
    A: Tensor, B: Tensor | float, dt: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Bilinear (trapezoid, Tustin) rule: a step that maps stable to stable.

    Arguments and errors are those of `discretize_zoh`.

    Returns:
        dA = (1 + dt A / 2) / (1 - dt A / 2) and dB = dt B / (1 - dt A / 2).

    Source: eq-state-space-bilinear.
    """
    _check_discretization(A, dt)
    half = dt * A / 2
    return (1 + half) / (1 - half), dt * B / (1 - half)


def _check_system(dA: Tensor, dB: Tensor, C: Tensor, u: Tensor) -> None:
    shapes = [tuple(t.shape) for t in (dA, dB, C)]
    if () in shapes or len({shape[-1] for shape in shapes}) > 1:
        raise ValueError(f"dA, dB, C are {shapes}: expected (..., N/2), the same N/2")
    if u.is_complex():
        raise ValueError(f"u is {u.dtype}: expected a real input of shape (..., L)")


def scan(dA: Tensor, dB: Tensor, C: Tensor, u: Tensor) -> Tensor:
    """Run x_k = dA x_{k-1} + dB u_k, y_k = 2 Re(C x_k) from x = 0, step by step.

    The factor 2 Re adds the conjugate half of the state, which is not stored.

    Args:
        dA, dB, C: Complex (..., N/2), one system per leading index.
        u: Input, real (..., L); its leading sizes broadcast with the systems'.

    Returns:
        Output y, real (..., L), in the precision of the arguments.

    Raises:
        ValueError: the numbers of states differ, or `u` is complex.

    Source: eq-state-space-recurrence (section 3.1 of the paper).
    """
    _check_system(dA, dB, C, u)
    x = torch.zeros_like(dA * dB * u.sum(-1, keepdim=True))  # (..., N/2)
    y = [(C * x).real[..., :0]]  # (..., 0)
    for k in range(u.shape[-1]):
        x = dA * x + dB * u[..., k : k + 1]  # (..., N/2)
        y.append(2 * (C * x).sum(-1, keepdim=True).real)  # (..., 1)
    return torch.cat(y, dim=-1)  # (..., L)


def hippo_legs(n_state: int) -> Tensor:
    """The HiPPO-LegS state matrix, dense and lower triangular: real float64 (N, N).

    Its input map is B_n = sqrt(2n + 1). ValueError unless `n_state` is positive.

    Source: eq-state-space-legs (Gu et al., "HiPPO", 2020).
    """
    n = torch.arange(expect_int("n_state", n_state, least=1), dtype=torch.float64)
    root = torch.sqrt(2 * n + 1)
    return -torch.tril(root[:, None] * root[None, :], diagonal=-1) - torch.diag(n + 1)


def _count_pairs(n_state: int) -> int:
    """N/2; ValueError unless `n_state` is positive and even."""
    if expect_int("n_state", n_state, least=2) % 2:
        raise ValueError(f"n_state={n_state}: expected a positive even integer")
    return n_state // 2


def _decaying(frequencies: Tensor) -> Tensor:
    return torch.complex(torch.full_like(frequencies, -0.5), frequencies)


def s4d_legs(n_state: int) -> Tensor:
    """S4D-LegS: eigenvalues of the normal part of HiPPO-LegS, complex128 (N/2,).

    Slowest first; those with positive imaginary part. All real parts are -1/2.
    ValueError unless `n_state` is positive and even.

    Source: eq-state-space-nplr (Gu et al., S4D, 2022).
    """
    pairs = _count_pairs(n_state)
    p = torch.sqrt(torch.arange(n_state, dtype=torch.float64) + 0.5)
    half = 0.5 * torch.eye(n_state, dtype=torch.float64)
    skew = hippo_legs(n_state) + p[:, None] * p[None, :] + half
    # i * skew is Hermitian: its eigenvalues are real, ascending, accurate to round-off
    return _decaying(-torch.linalg.eigvalsh(1j * skew)[:pairs].flip(0))


def s4d_lin(n_state: int) -> Tensor:
    """S4D-Lin: the frequencies of a Fourier series, complex128 (N/2,), slowest first.

    ValueError unless `n_state` is positive and even.
    Source: eq-state-space-lin (Gu et al., S4D, 2022).
    """
    n = torch.arange(_count_pairs(n_state), dtype=torch.float64)
    return _decaying(math.pi * n)


def s4d_inv(n_state: int) -> Tensor:
    """S4D-Inv: inverse-law frequencies, complex128 (N/2,), fastest first.

    ValueError unless `n_state` is positive and even.
    Source: eq-state-space-lin (Gu et al., S4D, 2022).
    """
    n = torch.arange(_count_pairs(n_state), dtype=torch.float64)
    return _decaying(n_state / math.pi * (n_state / (2 * n + 1) - 1))
