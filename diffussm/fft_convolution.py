"""The fast convolution.

Generated from book/14_fft_convolution.md by `make export`: edit there.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffussm.bidirectional import BidirectionalSSM, Convolution, kernel_spectra
from diffussm.guards import expect, expect_real

__all__ = ["operator", "BODIES", "convolve", "bidirectional_conv", "FFT"]


_PIECE = 2**20  # real numbers transformed at a time on a CPU
_PIECE_ON_GPU = 2**28


def _pieces(u: Tensor) -> Iterator[slice]:
    """Slices of the channels of u (B, L, D), each about _PIECE numbers when padded."""
    batch, length, d_model = u.shape
    if batch == 0:  # there are libraries that refuse to transform nothing
        return iter(())
    piece = _PIECE if u.device.type == "cpu" else _PIECE_ON_GPU
    step = max(16, piece // (2 * batch * length))
    return (slice(start, start + step) for start in range(0, d_model, step))


def _convolve(u: Tensor, spectra: Tensor) -> Tensor:
    """Both directions from one transform of the input."""
    (batch, length, d_model), real = u.shape, spectra.real.dtype
    y = u.new_empty(batch, length, 2, d_model)
    for c in _pieces(u):
        x = u[..., c].transpose(1, 2).to(real)  # (B, d, L)
        u_f = torch.fft.rfft(x, n=2 * length)  # (B, d, L + 1)
        y_f = u_f[:, None] * spectra[:, c]  # (B, 2, d, L + 1)
        y[..., c] = torch.fft.irfft(y_f, n=2 * length)[..., :length].permute(0, 3, 1, 2)
    return y.flatten(2)  # (B, L, 2D)


def _convolve_backward(
    grad: Tensor, u: Tensor, spectra: Tensor
) -> tuple[Tensor, Tensor]:
    """The adjoint from one transform of the gradient: with respect to u and spectra."""
    length, real = u.shape[1], spectra.real.dtype
    grad = grad.view(*u.shape[:2], 2, u.shape[2])  # (B, L, 2, D)
    grad_u, grad_spectra = u.new_empty(u.shape), torch.zeros_like(spectra)
    for c in _pieces(u):
        x = u[..., c].transpose(1, 2).to(real)  # (B, d, L)
        g = grad[..., c].permute(0, 2, 3, 1).to(real)  # (B, 2, d, L)
        u_f = torch.fft.rfft(x, n=2 * length)  # (B, d, L + 1)
        g_f = torch.fft.rfft(g, n=2 * length)  # (B, 2, d, L + 1)
        grad_spectra[:, c] = (u_f.conj_physical_()[:, None] * g_f).sum(0)
        sum_f = g_f.mul_(spectra[:, c].conj_physical()).sum(1)  # (B, d, L + 1)
        x = torch.fft.irfft(sum_f, n=2 * length)[..., :length]  # (B, d, L)
        grad_u[..., c] = x.transpose(1, 2)
    grad_spectra[..., 1:-1] *= 2  # these stand for their mirror images too
    return grad_u, grad_spectra / (2 * length)


def operator(
    name: str, shape: Callable[..., Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function an operator of PyTorch's, `diffussm::name`.

    `shape` is the function without the computing. If the name is taken, by a second
    copy of this code or by this module before a reload, the operator is called `name_2`
    and so on: registering again would cut off whoever holds the first.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        more = (f"{name}_{number}" for number in itertools.count(2))
        names, taken = itertools.chain([name], more), torch.ops.diffussm
        free = next(candidate for candidate in names if not hasattr(taken, candidate))
        made = torch.library.custom_op(f"diffussm::{free}", function, mutates_args=())
        made.register_fake(shape)
        BODIES[getattr(taken, free).default] = function
        return made

    return register


BODIES: dict[Any, Callable[..., Any]] = {}  # what an operator of ours does inside


def _convolve_shape(u: Tensor, spectra: Tensor) -> Tensor:
    return u.new_empty(u.shape[0], u.shape[1], 2 * u.shape[2])


def _backward_shape(grad: Tensor, u: Tensor, spectra: Tensor) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), torch.empty_like(spectra)


_CONVOLVE = operator("convolve", _convolve_shape)(_convolve)
_CONVOLVE_BACKWARD = operator("convolve_backward", _backward_shape)(_convolve_backward)


class _Convolve(torch.autograd.Function):
    """The two operators, tied together for autograd."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, spectra: Tensor) -> Tensor:
        ctx.save_for_backward(u, spectra)
        y: Tensor = _CONVOLVE(u, spectra)
        return y

    @staticmethod
    @once_differentiable  # a second derivative would take this for a constant
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        grads: tuple[Tensor, Tensor] = _CONVOLVE_BACKWARD(grad, *ctx.saved_tensors)
        return grads


def convolve(u: Tensor, spectra: Tensor) -> Tensor:
    """Convolve u with kernels whose spectra are known: both directions, side by side.

    First derivatives only; a second one is refused.

    Args:
        u: Input, real (B, L, D).
        spectra: Of `kernel_spectra`, complex (2, D, L + 1); theirs is the precision.

    Returns:
        (B, L, 2D) in the dtype of `u`: the forward direction, then the backward one.

    Raises:
        TypeError: `u` is not real floating-point or `spectra` not complex.
        ValueError: the shapes do not fit.

    Source: eq-bidirectional-spectrum, eq-bidirectional-adjoint.
    """
    expect_real(u=u)
    if not spectra.is_complex():
        raise TypeError(f"spectra is {spectra.dtype}: expected a complex tensor")
    _, L, D = expect("u", u, "B L D")
    expect("spectra", spectra, "2 D F", D=D, F=L + 1)
    y: Tensor = _Convolve.apply(u, spectra)
    return y


def bidirectional_conv(u: Tensor, k_forward: Tensor, k_backward: Tensor) -> Tensor:
    """Convolve u with one kernel from the past and another from the future.

    Lag 0 belongs to both. Computed in float32 (float64 where an argument is), whatever
    autocast says. First derivatives only.

    Args:
        u: Input, real (B, L, D).
        k_forward, k_backward: Kernels, real (D, L), lag 0 first.

    Returns:
        (B, L, 2D) in the dtype of `u`; see `convolve`, also for what is refused.

    Source: eq-bidirectional-two.
    """
    if u.dtype == torch.float64 and k_forward.is_floating_point():
        k_forward = k_forward.double()  # the spectra decide the precision
    return convolve(u, kernel_spectra(k_forward, k_backward))


FFT = Convolution(convolve, BidirectionalSSM.spectra)
