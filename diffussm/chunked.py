"""The fourth way: chunks.

Generated from book/19_chunked.md by `make export`: edit there.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from diffussm.bidirectional import BidirectionalSSM, Convolution
from diffussm.convolution import without_autocast
from diffussm.guards import expect, expect_int, expect_real, refuse

__all__ = ["modes", "chunked", "CHUNKED", "Prepare", "prepare_layers"]


def modes(layer: BidirectionalSSM, length: int = 0) -> Tensor:
    """The modes of both directions, forward first: real (2, D, 2N + 1).

    In float32, or float64 after `.double()`; the same for every length.

    Raises:
        ValueError: a kernel is not of a state space model.

    Source: eq-chunked-modes.
    """
    rows = []
    kernels = layer.forward_kernel, layer.backward_kernel
    with without_autocast(layer.skip.device):
        for kernel, skip in zip(kernels, layer.skip.chunk(2), strict=True):
            told = f"{type(kernel).__name__} has no states: take convolution=fft"
            refuse(not hasattr(kernel, "discrete"), told)
            log_dA, w = kernel.discrete()  # complex (D, n) each
            parts = [log_dA.real, log_dA.imag, w.real, w.imag]
            rows.append(torch.cat([*parts, skip[:, None].to(w.real.dtype)], dim=1))
    return torch.stack(rows)


def _powers(modes: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """e^(l lambda) and its reading at the lags l = 0 ... T: two of (D, 2, N, T + 1)."""
    a, b, w_real, w_imag = modes[..., :-1].transpose(0, 1).unsqueeze(-1).chunk(4, dim=2)
    lags = torch.arange(T + 1, device=modes.device)
    decay, angle = torch.exp(a * lags), b * lags  # (D, 2, n, T + 1)
    real, imag = decay * torch.cos(angle), decay * torch.sin(angle)
    read = [w_real * real - w_imag * imag, -(w_real * imag + w_imag * real)]
    return torch.cat([real, imag], dim=2), 2 * torch.cat(read, dim=2)


def _toeplitz(read: Tensor, skip: Tensor) -> Tensor:
    """Matrix T of both directions, as causal ones: (D, 2, T, T)."""
    n, T = read.shape[2] // 2, read.shape[3] - 1
    k = read[:, :, :n, :T].sum(2)  # (D, 2, T)
    k = k + skip.unsqueeze(-1) * (torch.arange(T, device=k.device) == 0)
    return F.pad(k, (T - 1, 0)).unfold(2, T, 1).flip(3)  # row t: k_t ... k_0 0 ... 0


def _mirrored(matrix: Tensor, *positions: int) -> Tensor:
    """(D, 2, ...) with the positions of the second direction in reverse order."""
    forward, backward = matrix.unbind(1)
    return torch.stack([forward, backward.flip(positions)], dim=1)


def _carried(left_behind: Sequence[Tensor], step: Tensor) -> list[Tensor]:
    """The state that each chunk is given: tensors (D, N, B). Source: eq-chunked-carry.

    Args:
        left_behind: What each chunk adds, (D, N, B).
        step: The pair e^(T lambda), (D, N, 1).
    """
    real, imag = (part.repeat(1, 2, 1) for part in step.chunk(2, dim=1))
    states = [torch.zeros_like(left_behind[0])]
    for v in left_behind[:-1]:
        x_real, x_imag = states[-1].chunk(2, dim=1)
        turned = torch.cat([-x_imag, x_real], dim=1)  # i x
        states.append(real * states[-1] + imag * turned + v)
    return states


def _carried_both(left_behind: Tensor, step: Tensor) -> Tensor:
    """The states for all chunks c: (D, 2, N, c, B) -> the same, in both directions."""
    forward, backward = (list(v.unbind(2)) for v in left_behind.unbind(1))
    given = _carried(forward, step[:, 0])
    taken = _carried(backward[::-1], step[:, 1])[::-1]
    return torch.stack([torch.stack(given, 2), torch.stack(taken, 2)], dim=1)


def _into_columns(u: Tensor, T: int) -> Tensor:
    """(B, L, D) -> (D, T, c B), a column for each chunk of each sequence."""
    B, L, D = u.shape
    u = F.pad(u, (0, 0, 0, -L % T)).reshape(B, -(-L // T), T, D)
    return u.permute(3, 2, 1, 0).flatten(2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def _by_chunks(u: Tensor, modes: Tensor, T: int) -> Tensor:
    """Source: eq-chunked-matrices."""
    (B, L, D), c = u.shape, -(-u.shape[1] // T)  # c chunks
    powers, read = _powers(modes, T)
    toeplitz = _mirrored(_toeplitz(read, modes[..., -1].T), 1, 2)  # (D, 2, T, T)
    leave = _mirrored(powers[..., :T].flip(3), 2)  # (D, 2, N, T)
    read = _mirrored(read[..., 1:], 2).mT  # (D, 2, T, N)
    U = _into_columns(u, T)  # (D, T, c B)
    left_behind = _product(leave.flatten(1, 2), U).view(D, 2, leave.shape[2], c, B)
    states = _carried_both(left_behind, powers[..., T:])  # (D, 2, N, c, B)
    y = _product(toeplitz.flatten(1, 2), U).view(D, 2, T, c * B)
    y = y + _product(read, states.flatten(3))
    y = y.view(D, 2, T, c, B).permute(4, 3, 2, 1, 0)  # (B, c, T, 2, D)
    return y.reshape(B, c * T, 2 * D)[:, :L]


def chunked(u: Tensor, modes: Tensor, chunk: int = 64) -> Tensor:
    """Both directions from chunks of the sequence: (B, L, D) -> (B, L, 2D).

    Differentiated by autograd, as often as one likes.

    Args:
        u: Input, real (B, L, D), any L.
        modes: Of `modes`, real (2, D, 2N + 1); theirs is the precision.
        chunk: T. At 1 it is the recurrence, from L on one matrix product.

    Returns:
        (B, L, 2D) in the dtype of `u`: the forward direction, then the backward one.

    Raises:
        TypeError: an argument is not real floating-point.
        ValueError: the shapes do not fit, or `chunk` is not positive.

    Source: eq-chunked-matrices, eq-chunked-carry.
    """
    expect_real(u=u, modes=modes)
    _, L, D = expect("u", u, "B L D")
    expect("modes", modes, "2 D K", D=D)
    T = min(expect_int("chunk", chunk, least=1), expect_int("L", L, least=1))
    with without_autocast(u.device):
        return _by_chunks(u.to(modes.dtype), modes, T).to(u.dtype)


CHUNKED = Convolution(chunked, modes, together=True)


class Prepare(nn.Module):
    """`prepare` of a layer or a model as a module, to be called with other weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, length: int) -> Any:
        """What `model.prepare(length)` returns."""
        return self.model.prepare(length)


def _kind(layer: BidirectionalSSM) -> tuple[Any, ...]:
    """What is the same in layers of which one may stand for the others."""
    kernels = layer.forward_kernel, layer.backward_kernel
    kinds = [(type(k), getattr(k, "discretization", None)) for k in kernels]
    shapes = [(name, p.shape) for name, p in layer.named_parameters()]
    return type(layer), layer.convolution, *kinds, *shapes


def prepare_layers(layers: Sequence[BidirectionalSSM], length: int) -> list[Tensor]:
    """`layer.prepare(length)` of each layer; at once if `Convolution.together`."""
    way: Any = layers[0].convolution
    if len(set(map(_kind, layers))) > 1 or not getattr(way, "together", False):
        return [layer.prepare(length) for layer in layers]
    named = [dict(Prepare(layer).named_parameters()) for layer in layers]
    stacked = {name: torch.stack([one[name] for one in named]) for name in named[0]}
    first = Prepare(layers[0])
    prepare = torch.vmap(lambda weights: functional_call(first, weights, (length,)))
    return list(prepare(stacked))
