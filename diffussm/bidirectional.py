"""Both directions.

Generated from book/13_bidirectional.md by `make export`: edit there.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.library import CustomOpDef

from diffussm.convolution import S4DKernel

__all__ = [
    "PIECE",
    "PIECE_ON_GPU",
    "kernel_spectra",
    "operator",
    "convolve",
    "bidirectional_conv",
    "BidirectionalSSM",
]

PIECE = (
    2**20
)  # real numbers that are transformed at a time on a CPU: what fits into a core's cache
PIECE_ON_GPU = 2**28  # there the pieces only bound the memory


def kernel_spectra(k_forward: Tensor, k_backward: Tensor) -> Tensor:
    """What the spectrum of the input is multiplied by, for each direction; the second one is conjugated.

    Args:
        k_forward, k_backward: Kernels, real (D, L), lag 0 first.

    Returns:
        Complex (2, D, L + 1), at least in single precision: half spectra of length 2L, for each direction.

    Raises:
        TypeError: a kernel is not a real floating-point tensor.
        ValueError: the kernels are not both (D, L).

    Source: chapter 3, equation eq-bidirectional-spectrum.
    """
    for name, tensor in (("k_forward", k_forward), ("k_backward", k_backward)):
        if not tensor.is_floating_point():
            raise TypeError(
                f"{name} has dtype {tensor.dtype}: expected a real floating-point tensor"
            )
    if (
        k_forward.ndim != 2
        or k_forward.shape != k_backward.shape
        or k_forward.shape[1] == 0
    ):
        raise ValueError(
            f"k_forward has shape {tuple(k_forward.shape)} and k_backward {tuple(k_backward.shape)}: "
            "expected (D, L) for both, with L at least 1"
        )
    dtype = torch.promote_types(
        torch.promote_types(k_forward.dtype, k_backward.dtype), torch.float32
    )
    n = 2 * k_forward.shape[1]
    forward = torch.fft.rfft(k_forward.to(dtype), n=n)  # (D, L + 1)
    backward = torch.fft.rfft(k_backward.to(dtype), n=n)  # (D, L + 1)
    return torch.stack([forward, backward.conj()])


def _pieces(u: Tensor) -> Iterator[slice]:
    """Slices of the channels of u (B, L, D), each with about PIECE numbers after padding; none if B = 0."""
    batch, length, d_model = u.shape
    if batch == 0:  # there are libraries that refuse to transform nothing
        return iter(())
    step = max(
        16, (PIECE if u.device.type == "cpu" else PIECE_ON_GPU) // (2 * batch * length)
    )
    return (slice(start, start + step) for start in range(0, d_model, step))


def operator(
    name: str, shape: Callable[..., Any]
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Make a function an operator of PyTorch's, ``diffussm::name``; ``shape`` is it without the computing.

    If the name is taken, by a second copy of this code or by this module before a reload, the operator is
    called ``name_2`` and so on: registering a name again would cut off whoever holds the first operator.
    """

    def register(function: Callable[..., Any]) -> CustomOpDef:
        names = itertools.chain(
            [name], (f"{name}_{number}" for number in itertools.count(2))
        )
        free = next(
            candidate
            for candidate in names
            if not hasattr(torch.ops.diffussm, candidate)
        )
        made = torch.library.custom_op(f"diffussm::{free}", function, mutates_args=())
        made.register_fake(shape)
        return made

    return register


def _convolve_shape(u: Tensor, spectra: Tensor) -> Tensor:
    return u.new_empty(u.shape[0], u.shape[1], 2 * u.shape[2])


def _convolve_backward_shape(
    grad: Tensor, u: Tensor, spectra: Tensor
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), torch.empty_like(spectra)


@operator("convolve", _convolve_shape)
def _convolve(u: Tensor, spectra: Tensor) -> Tensor:
    """Both directions from one transform of the input."""
    (batch, length, d_model), real = u.shape, spectra.real.dtype
    y = u.new_empty(batch, length, 2, d_model)
    for c in _pieces(u):
        u_f = torch.fft.rfft(
            u[..., c].transpose(1, 2).to(real), n=2 * length
        )  # (B, d, L + 1)
        y_f = u_f[:, None] * spectra[:, c]  # (B, 2, d, L + 1)
        y[..., c] = torch.fft.irfft(y_f, n=2 * length)[..., :length].permute(0, 3, 1, 2)
    return y.flatten(2)  # (B, L, 2D)


@operator("convolve_backward", _convolve_backward_shape)
def _convolve_backward(
    grad: Tensor, u: Tensor, spectra: Tensor
) -> tuple[Tensor, Tensor]:
    """The adjoint from one transform of the gradient: with respect to u and to the spectra."""
    length, real = u.shape[1], spectra.real.dtype
    grad = grad.unflatten(2, (2, -1))  # (B, L, 2, D)
    grad_u, grad_spectra = u.new_empty(u.shape), torch.zeros_like(spectra)
    for c in _pieces(u):
        u_f = torch.fft.rfft(
            u[..., c].transpose(1, 2).to(real), n=2 * length
        )  # (B, d, L + 1)
        g_f = torch.fft.rfft(
            grad[..., c].permute(0, 2, 3, 1).to(real), n=2 * length
        )  # (B, 2, d, L + 1)
        grad_spectra[:, c] = (u_f.conj_physical_()[:, None] * g_f).sum(0)
        sum_f = g_f.mul_(spectra[:, c].conj_physical()).sum(1)  # (B, d, L + 1)
        grad_u[..., c] = torch.fft.irfft(sum_f, n=2 * length)[..., :length].transpose(
            1, 2
        )
    grad_spectra[..., 1:-1] *= (
        2  # a half spectrum: all frequencies but two stand for their mirror image too
    )
    return grad_u, grad_spectra / (2 * length)


class _Convolve(torch.autograd.Function):
    """The two operations above, tied together for autograd."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, spectra: Tensor) -> Tensor:
        ctx.save_for_backward(u, spectra)
        return _convolve(u, spectra)

    @staticmethod
    @once_differentiable  # a second derivative would take this for a constant
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _convolve_backward(grad, *ctx.saved_tensors)


def convolve(u: Tensor, spectra: Tensor) -> Tensor:
    """Convolve u with kernels whose spectra are known: both directions, side by side.

    First derivatives only; a second one is refused.

    Args:
        u: Input, real (B, L, D).
        spectra: Of :func:`kernel_spectra`, complex (2, D, L + 1). Their precision is the one computed in.

    Returns:
        (B, L, 2D) in the dtype of ``u``: the forward direction, then the backward one.

    Raises:
        TypeError: ``u`` is not real floating-point or ``spectra`` not complex.
        ValueError: the shapes do not fit.

    Source: chapter 3, equations eq-bidirectional-spectrum and eq-bidirectional-adjoint.
    """
    if not u.is_floating_point() or not spectra.is_complex():
        raise TypeError(
            f"u has dtype {u.dtype} and spectra {spectra.dtype}: expected a real floating-point tensor and "
            "a complex one"
        )
    if u.ndim != 3 or spectra.shape != (2, u.shape[2], u.shape[1] + 1):
        raise ValueError(
            f"u has shape {tuple(u.shape)} and spectra {tuple(spectra.shape)}: expected (B, L, D) and "
            "(2, D, L + 1)"
        )
    y: Tensor = _Convolve.apply(u, spectra)
    return y


def bidirectional_conv(u: Tensor, k_forward: Tensor, k_backward: Tensor) -> Tensor:
    """Convolve u with one kernel from the past and with another from the future, side by side.

    For i = 0 .. L-1: y_i = sum_{l <= i} k_forward_l u_{i-l} and, D channels further on,
    y_i = sum_{l < L-i} k_backward_l u_{i+l}. Lag 0 belongs to both. Computed in float32 (float64 where an
    argument is), whatever autocast says. First derivatives only; a second one is refused.

    Args:
        u: Input, real (B, L, D).
        k_forward, k_backward: Kernels, real (D, L), lag 0 first.

    Returns:
        (B, L, 2D) in the dtype of ``u``: the forward direction, then the backward one.

    Raises:
        TypeError: an argument is not a real floating-point tensor.
        ValueError: the shapes do not fit.

    Source: chapter 3, equations eq-bidirectional-two, eq-bidirectional-spectrum and eq-bidirectional-adjoint.
    """
    if u.dtype == torch.float64 and k_forward.is_floating_point():
        k_forward = k_forward.double()  # the spectra decide the precision
    return convolve(u, kernel_spectra(k_forward, k_backward))


class BidirectionalSSM(nn.Module):
    """Two diagonal state space models, one reading from each end: (B, L, D) -> (B, L, 2D).

    Position i of the first D channels depends on positions up to i, of the last D on positions from i on.
    Each direction has its own S4D kernel and its own skip ``d u``, which is added to the kernel's spectrum.

    Args:
        d_model: D, channels.
        d_state: N, real size of each channel's state, even.

    Attributes:
        forward_kernel, backward_kernel: :class:`~diffussm.convolution.S4DKernel`.
        skip: (2D,), standard normal at the start; the first D belong to the forward direction.
        convolution: What is done with input and spectra: :func:`convolve`, or another with its contract.

    Source: chapter 3; section 3.1 of the paper ("concatenating the outputs of two SSM layers").
    """

    def __init__(self, d_model: int, d_state: int = 64) -> None:
        super().__init__()
        self.forward_kernel = S4DKernel(d_model, d_state)
        self.backward_kernel = S4DKernel(d_model, d_state)
        self.skip = nn.Parameter(torch.randn(2 * d_model))
        self.convolution: Callable[[Tensor, Tensor], Tensor] = convolve

    def spectra(self, length: int) -> Tensor:
        """The spectra of both kernels with their skips, complex (2, D, L + 1), for sequences of a length L.

        They depend on the parameters only. Whoever applies the layer several times between two changes of
        the weights may compute them once and pass them to :meth:`forward`.
        """
        spectra = kernel_spectra(
            self.forward_kernel(length), self.backward_kernel(length)
        )
        return spectra + self.skip.view(2, -1, 1)  # the spectrum of d at lag 0 is d

    def forward(self, u: Tensor, spectra: Tensor | None = None) -> Tensor:
        """Mix along the sequence.

        Args:
            u: (B, L, D), any L.
            spectra: What :meth:`spectra` returns for L, if it is known; None computes it.

        Returns:
            (B, L, 2D) in the dtype of ``u``.

        Raises:
            ValueError: ``u`` is not (B, L, D) with this layer's D.
            TypeError: ``u`` is not a real floating-point tensor.
        """
        d_model = self.skip.shape[0] // 2
        if u.ndim != 3 or u.shape[2] != d_model or u.shape[1] == 0:
            raise ValueError(
                f"u has shape {tuple(u.shape)}: expected (B, L, {d_model}), with L at least 1"
            )
        y = self.convolution(
            u, self.spectra(u.shape[1]) if spectra is None else spectra
        )
        return y
