"""Embeddings.

Generated from book/22_embeddings.md by `make export`: edit there.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

__all__ = [
    "timestep_features",
    "Labels",
    "as_labels",
    "to_stream",
    "to_image",
    "sincos_positions",
]


def timestep_features(
    t: Tensor, n_features: int = 256, max_period: float = 10_000.0
) -> Tensor:
    """Cosines, then sines, of t at n/2 frequencies: (B,) -> (B, n).

    n is `n_features`; the periods begin with 2 pi and end below 2 pi `max_period`.
    Source: ch. "Embeddings", eq-model-timestep (section 4.1 of the paper: as in ADM).
    """
    half = n_features // 2
    exponent = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angle = t.float()[:, None] * torch.exp(-math.log(max_period) * exponent)  # (B, n/2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)  # (B, n)


Labels = Tensor | np.ndarray | Sequence[int]  # (B,), whole numbers


def as_labels(y: Labels) -> Tensor:
    """Class labels as an int64 tensor: a tensor, an array or a sequence, of any shape.

    Raises:
        TypeError: they are not integers.
    """
    if isinstance(y, Tensor):
        real = y.is_floating_point() or y.is_complex() or y.dtype == torch.bool
        if not real or y.numel() == 0:
            return y.long()
        given = str(y.dtype)
    else:
        array = np.asarray(y)
        if array.dtype.kind in "iu" or array.size == 0:
            return torch.from_numpy(array.astype(np.int64))
        given = f"{type(y).__name__} of {array.dtype}"
    raise TypeError(f"y is {given}: expected an integer tensor, array or list")


def to_stream(x: Tensor, patch_size: int, downsample: int) -> Tensor:
    """Cut an image into the stream's groups: (B, C, H, W) -> (B, J, M P P C)."""
    P, M = patch_size, downsample
    x = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=P, q=P)  # (B, L, P P C)
    return rearrange(x, "b (j k) c -> b j (k c)", k=M)


def to_image(x: Tensor, patch_size: int, downsample: int, width: int) -> Tensor:
    """The inverse of `to_stream`, `width` is W: (B, J, M P P C) -> (B, C, H, W)."""
    P, w = patch_size, width // patch_size
    x = rearrange(x, "b j (k c) -> b (j k) c", k=downsample)  # (B, L, P P C)
    return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", w=w, p=P, q=P)


def sincos_positions(
    height: int, width: int, d_model: int, device: torch.device | None = None
) -> Tensor:
    """Sines and cosines of column, then row, in raster order: (H W, D) float32.

    Source: ch. "Embeddings", eq-model-sincos (DiT's table; the paper mentions none).
    """
    quarter = d_model // 4
    steps = torch.arange(quarter, device=device, dtype=torch.float32)
    omega = 10_000.0 ** (-steps / quarter)
    rows = torch.arange(height, device=device).repeat_interleave(width)  # (HW,)
    columns = torch.arange(width, device=device).repeat(height)
    angles = [place[:, None] * omega for place in (columns, rows)]  # (HW, D/4) each
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)
