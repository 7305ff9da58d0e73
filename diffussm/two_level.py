"""The kernel in two levels.

Generated from book/15_two_level.md by `make export`: edit there.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffussm.convolution import check_kernel, without_autocast

__all__ = ["multiplying_in", "vandermonde_two_level"]


def _exp(z: Tensor) -> Tensor:
    # the real functions run vectorised on a CPU where the complex exponential does not
    return torch.polar(torch.exp(z.real), z.imag)


def _powers(log_dA: Tensor, block: int, n_blocks: int) -> tuple[Tensor, Tensor]:
    """exp(i b log dA), (D, I, N/2), and the conjugate of exp(j log dA), (D, J, N/2)."""
    i = block * torch.arange(n_blocks, device=log_dA.device)
    j = torch.arange(block, device=log_dA.device)
    E = _exp(log_dA[:, None, :] * i[:, None])
    return E, _exp(log_dA.conj()[:, None, :] * j[:, None])


def _pairs(z: Tensor) -> Tensor:
    return torch.view_as_real(z).flatten(-2)  # (..., N/2) -> (..., N)


def _complex(pairs: Tensor) -> Tensor:
    pairs = pairs.view(*pairs.shape[:-1], -1, 2)
    return torch.view_as_complex(pairs)  # (..., N) -> (..., N/2)


def _product(weights: Tensor, E: Tensor, Q_conj: Tensor) -> Tensor:
    """2 Re(P Q), real (D, I, J), with P = w E."""
    return _pairs(2 * weights[:, None, :] * E) @ _pairs(Q_conj).mT


def _product_backward(
    G: Tensor, weights: Tensor, E: Tensor, Q_conj: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to log dA and the weights (eq-convolution-backward)."""
    i = block * torch.arange(E.shape[1], device=E.device).to(E.dtype)
    j = torch.arange(Q_conj.shape[1], device=E.device).to(E.dtype)
    g = _complex(G @ _pairs(Q_conj)).mul_(E.conj())  # (D, I, N/2)
    grad_weights = g.sum(1)  # (D, N/2)
    grad_log_dA = weights.conj() * torch.einsum("din,i->dn", g, i)  # (D, N/2)
    g = _complex(G.mT @ _pairs(weights[:, None, :] * E))  # (D, J, N/2)
    g = g.mul_(Q_conj.conj())
    return grad_log_dA + torch.einsum("djn,j->dn", g, j).conj(), grad_weights


class _TwoLevel(torch.autograd.Function):
    """The product and its gradients, tied together for autograd."""

    @staticmethod
    def forward(
        ctx: Any, log_dA: Tensor, weights: Tensor, block: int, n_blocks: int
    ) -> Tensor:
        with without_autocast(log_dA.device):
            E, Q_conj = _powers(log_dA, block, n_blocks)
            ctx.save_for_backward(weights, E, Q_conj)
            ctx.block = block
            return _product(weights, E, Q_conj)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weights, E, Q_conj = ctx.saved_tensors
        with without_autocast(grad.device):  # it may be called where autocast is on
            grads = _product_backward(2 * grad, weights, E, Q_conj, ctx.block)
        return *grads, None, None


@contextmanager
def multiplying_in(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """On GPUs, products and convolutions of float32 in all 24 bits, or in TF32's 11.

    What was set before is set again afterwards.
    """
    before = [setting.fp32_precision for setting in _SETTINGS]
    _multiply_in(*[precision] * len(_SETTINGS))
    try:
        yield
    finally:
        _multiply_in(*before)


_BACKENDS: Any = torch.backends  # no type checker knows its members
_SETTINGS = _BACKENDS.cuda.matmul, _BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn
_OLDER = {"tf32": "high", "bf16": "medium"}


def _multiply_in(products: str, *others: str) -> None:
    torch.set_float32_matmul_precision(_OLDER.get(products, "highest"))
    _BACKENDS.cudnn.allow_tf32 = others[0] == "tf32"
    for setting, precision in zip(_SETTINGS, (products, *others), strict=True):
        setting.fp32_precision = precision


def vandermonde_two_level(log_dA: Tensor, weights: Tensor, length: int) -> Tensor:
    """The kernel of `vandermonde` from 2 sqrt(L), not L, exponentials per state.

    Arguments, result and errors are those of `vandermonde`; memory is D x N x 2 sqrt(L)
    and the result. Differentiable once. On GPUs the product obeys
    `multiplying_in`: TF32 keeps three digits.

    Source: eq-convolution-two-level.
    """
    check_kernel(log_dA, weights, length)
    block = 2 ** math.ceil(math.log2(length) / 2)  # about sqrt(L)
    kernel: Tensor = _TwoLevel.apply(log_dA, weights, block, -(-length // block))
    return kernel.flatten(1)[:, :length]  # (D, I, J) -> (D, L)
