"""Pictures.

Generated from book/55_pictures.md by `make export`: edit there.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional

from diffussm.data import generator
from diffussm.diffusion import GaussianDiffusion
from diffussm.files import whole_file
from diffussm.guards import expect_finite, refuse
from diffussm.model import DiffuSSM
from diffussm.sampling import Sampler

__all__ = [
    "Decode",
    "to_uint8",
    "save_grid",
    "GRID_ROWS",
    "image_shape",
    "draw_grid",
    "computing_in",
]

Decode = Callable[[Tensor], Tensor]  # latents (B, C, h, w) -> images (B, 3, H, W)


def _levels(images: Tensor) -> Tensor:
    if (channels := images.shape[1]) not in (1, 3):
        raise ValueError(f"{channels} channels: latents; pass --vae, an autoencoder")
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (n, 1 or 3, H, W) in [-1, 1] as RGB, uint8 (n, H, W, 3)."""
    expect_finite("the images drawn", images, "the weights have probably diverged")
    rgb = _levels(images).expand(-1, 3, -1, -1)
    return rgb.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _tiled(images: Tensor, columns: int, margin: int = 2) -> Tensor:
    """Images (n, C, H, W) row by row, white around each: (height, width, C)."""
    scale = max(1, math.ceil(48 / images.shape[2]))
    pixels = _levels(images).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    pixels = functional.pad(pixels, (margin,) * 4, value=255)
    return rearrange(pixels, "(r k) c h w -> (r h) (k w) c", k=columns)


def save_grid(images: Tensor, columns: int, path: Path) -> None:
    """Write images (n, C, H, W) in [-1, 1] row by row as one PNG, small ones larger."""
    refuse(len(images) % columns, f"{len(images)} images do not fill rows of {columns}")
    grid = _tiled(images, columns)
    grey = grid.shape[2] == 1
    with whole_file(path) as draft:
        picture = Image.fromarray((grid.squeeze(-1) if grey else grid).cpu().numpy())
        picture.save(draft, format="PNG")


GRID_ROWS = 10  # classes that are drawn when none is named
_GRID_STEPS = 50


def _grid_sampler(diffusion: GaussianDiffusion, pixels: bool) -> Sampler:
    """How pictures are drawn that only someone looks at."""
    steps = min(_GRID_STEPS, diffusion.num_timesteps)
    return Sampler(steps, "ddim", cfg_scale=1.5, clip_denoised=pixels)


def image_shape(model: DiffuSSM) -> tuple[int, int, int]:
    """(C, H, W) of what a model draws."""
    return model.config.in_channels, model.config.height, model.config.width


def draw_grid(
    model: DiffuSSM,
    diffusion: GaussianDiffusion,
    picture: Path,
    *,
    sampler: Sampler | None = None,
    classes: Sequence[int] | None = None,
    per_class: int = 8,
    precision: str = "float32",
    seed: int = 0,
    decode: Decode | None = None,
    progress: bool = True,
) -> None:
    """Draw `per_class` samples for each class (None: the first ten), a class to a row.

    `sampler` None: that of `_grid_sampler`. `decode` is for latents.
    """
    rows = classes or range(min(model.config.num_classes, GRID_ROWS) or 1)
    sampler = sampler or _grid_sampler(diffusion, pixels=decode is None)
    images = _draw_rows(
        model, diffusion, rows, per_class, sampler, precision, seed, progress
    )
    save_grid(images.cpu() if decode is None else decode(images), per_class, picture)


def _draw_rows(
    model: DiffuSSM,
    diffusion: GaussianDiffusion,
    rows: Sequence[int],
    per_class: int,
    sampler: Sampler,
    precision: str,
    seed: int,
    progress: bool,
) -> Tensor:
    """Images (n, C, H, W), row by row."""
    where = next(model.parameters()).device
    draws = generator(seed, "grid", 0)
    noise = torch.randn(len(rows) * per_class, *image_shape(model), generator=draws)
    y: Tensor | None = torch.tensor(rows).repeat_interleave(per_class).to(where)
    if model.null_label is None:
        y, sampler = None, replace(sampler, cfg_scale=1.0)
    how: dict[str, Any] = {"generator": draws, "noise": noise.to(where)}
    with computing_in(precision, where):
        return sampler.draw(model, diffusion, y, **how, progress=progress).float()


@contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """A context in which a network computes in "float32", "tf32" or "bf16"."""
    before, exact = torch.get_float32_matmul_precision(), precision == "float32"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if exact else "high")
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
