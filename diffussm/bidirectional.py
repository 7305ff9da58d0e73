"""Both directions.

Generated from book/03_bidirectional.md by `make export`: edit there.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffussm.convolution import S4DKernel

__all__ = ["bidirectional_conv", "BidirectionalSSM"]


class _BidirectionalConv(torch.autograd.Function):
    """Both directions from one transform of the input; its adjoint from one transform of the gradient."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, k_forward: Tensor, k_backward: Tensor) -> Tensor:
        batch, d_model, length = u.shape
        n = 2 * length
        u_f = torch.fft.rfft(u, n=n)  # (B, D, L + 1)
        forward_f = torch.fft.rfft(k_forward, n=n)  # (D, L + 1)
        backward_f = torch.fft.rfft(k_backward, n=n)  # (D, L + 1)
        ctx.save_for_backward(u_f, forward_f, backward_f)
        y_f = u_f.new_empty(batch, 2 * d_model, length + 1)  # filled in place: concatenating would copy it
        torch.mul(u_f, forward_f, out=y_f[:, :d_model])
        torch.mul(u_f, backward_f.conj_physical(), out=y_f[:, d_model:])
        return torch.fft.irfft(y_f, n=n)[..., :length]  # (B, 2D, L)

    @staticmethod
    @once_differentiable  # the saved spectra are cut off the graph: a second derivative would be wrong
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u_f, forward_f, backward_f = ctx.saved_tensors
        length = grad.shape[-1]
        n = 2 * length
        g_forward, g_backward = torch.fft.rfft(grad, n=n).chunk(2, dim=1)  # (B, D, L + 1) each
        grad_u = grad_forward = grad_backward = None
        if ctx.needs_input_grad[0]:
            grad_f = g_forward * forward_f.conj_physical()
            grad_f.addcmul_(g_backward, backward_f)
            grad_u = torch.fft.irfft(grad_f, n=n)[..., :length]  # (B, D, L)
        u_f = u_f.conj_physical()
        if ctx.needs_input_grad[1]:
            grad_f = (g_forward * u_f).sum(0)
            grad_forward = torch.fft.irfft(grad_f, n=n)[..., :length]  # (D, L)
        if ctx.needs_input_grad[2]:
            grad_f = (g_backward * u_f).sum(0).conj_physical()
            grad_backward = torch.fft.irfft(grad_f, n=n)[..., :length]  # (D, L)
        return grad_u, grad_forward, grad_backward


def bidirectional_conv(u: Tensor, k_forward: Tensor, k_backward: Tensor) -> Tensor:
    """Convolve u with one kernel from the past and with another from the future, side by side.

    For i = 0 .. L-1: y_i = sum_{l <= i} k_forward_l u_{i-l} and, D channels further on,
    y_i = sum_{l < L-i} k_backward_l u_{i+l}. Lag 0 belongs to both. Computed in float32 (float64 where an
    argument is), whatever autocast says. First derivatives only; a second one is refused.

    Args:
        u: Input, real (B, D, L).
        k_forward, k_backward: Kernels, real (D, L), lag 0 first.

    Returns:
        (B, 2D, L) in the dtype of ``u``: the forward direction, then the backward one.

    Raises:
        TypeError: an argument is not a real floating-point tensor.
        ValueError: the shapes do not fit.

    Source: chapter 3, equations eq-bidirectional-two, eq-bidirectional-spectrum and eq-bidirectional-adjoint.
    """
    for name, tensor in (("u", u), ("k_forward", k_forward), ("k_backward", k_backward)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}: expected a real floating-point tensor")
    if u.ndim != 3 or k_forward.shape != u.shape[1:] or k_backward.shape != u.shape[1:]:
        raise ValueError(
            f"u has shape {tuple(u.shape)}, k_forward {tuple(k_forward.shape)} and k_backward "
            f"{tuple(k_backward.shape)}: expected (B, D, L), (D, L) and (D, L)"
        )
    dtype = torch.promote_types(torch.promote_types(k_forward.dtype, k_backward.dtype), u.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    y = _BidirectionalConv.apply(u.to(dtype), k_forward.to(dtype), k_backward.to(dtype))
    return y.to(u.dtype)


class BidirectionalSSM(nn.Module):
    """Two diagonal state space models, one reading from each end: (B, L, D) -> (B, L, 2D).

    Position i of the first D channels depends on positions up to i, of the last D on positions from i on.
    Each direction has its own S4D kernel and its own skip ``d u``, which is added to the kernel's lag 0.

    Args:
        d_model: D, channels.
        d_state: N, real size of each channel's state, even.

    Attributes:
        forward_kernel, backward_kernel: :class:`~diffussm.convolution.S4DKernel`.
        skip: (2D,), standard normal at the start; the first D belong to the forward direction.

    Source: chapter 3; section 3.1 of the paper ("concatenating the outputs of two SSM layers").
    """

    def __init__(self, d_model: int, d_state: int = 64) -> None:
        super().__init__()
        self.forward_kernel = S4DKernel(d_model, d_state)
        self.backward_kernel = S4DKernel(d_model, d_state)
        self.skip = nn.Parameter(torch.randn(2 * d_model))

    def forward(self, u: Tensor) -> Tensor:
        """Mix along the sequence.

        Args:
            u: (B, L, D), any L.

        Returns:
            (B, L, 2D) in the dtype of ``u``.

        Raises:
            ValueError: ``u`` is not (B, L, D) with this layer's D.
            TypeError: ``u`` is not a real floating-point tensor.
        """
        d_model = self.skip.shape[0] // 2
        if u.ndim != 3 or u.shape[2] != d_model or u.shape[1] == 0:
            raise ValueError(f"u has shape {tuple(u.shape)}: expected (B, L, {d_model}), with L at least 1")
        skip_forward, skip_backward = self.skip.chunk(2)  # (D,) each
        y = bidirectional_conv(
            u.transpose(1, 2),  # (B, D, L)
            _add_at_lag_zero(self.forward_kernel(u.shape[1]), skip_forward),  # (D, L)
            _add_at_lag_zero(self.backward_kernel(u.shape[1]), skip_backward),  # (D, L)
        )  # (B, 2D, L)
        return y.transpose(1, 2)  # (B, L, 2D)


def _add_at_lag_zero(k: Tensor, skip: Tensor) -> Tensor:
    return torch.cat([k[:, :1] + skip[:, None], k[:, 1:]], dim=1)
