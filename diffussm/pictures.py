"""Pictures.

Generated from book/55_pictures.md by `make export`: edit there.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from diffussm import sampling
from diffussm.data import generator
from diffussm.diffusion import GaussianDiffusion, NoiseSource
from diffussm.files import whole_file
from diffussm.guards import expect_finite, refuse
from diffussm.model import DiffuSSM
from diffussm.sample_options import Sampler
from diffussm.two_level import multiplying_in

__all__ = [
    "Decode",
    "to_uint8",
    "save_grid",
    "Start",
    "one_stream",
    "stream_per_seed",
    "between_seeds",
    "image_shape",
    "Walk",
    "Frame",
    "Grid",
    "computing_in",
    "draw_grid",
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


def _arranged(images: Tensor, columns: int) -> Image.Image:
    """Images (n, C, H, W) in [-1, 1] row by row, small ones larger."""
    refuse(len(images) % columns, f"{len(images)} images do not fill rows of {columns}")
    grid = _tiled(images, columns)
    grey = grid.shape[2] == 1
    return Image.fromarray((grid.squeeze(-1) if grey else grid).cpu().numpy())


_GAP = 6  # pixels beside a word
_LETTERS = 24  # of a word that are shown


def _labelled(picture: Image.Image, words: Sequence[str]) -> Image.Image:
    """A picture with a word beside each of its rows; none leave it as it is."""
    if not words:
        return picture
    height = picture.height // len(words)
    font = ImageFont.load_default(size=max(14, height // 12))
    words = [" ".join(word.split()) for word in words]
    words = [w if len(w) <= _LETTERS else f"{w[: _LETTERS - 3]}..." for w in words]
    margin = math.ceil(max(font.getlength(word) for word in words)) + 2 * _GAP
    wide = Image.new(picture.mode, (margin + picture.width, picture.height), "white")
    wide.paste(picture, (margin, 0))
    pen = ImageDraw.Draw(wide)
    for row, word in enumerate(words):
        pen.text((margin - _GAP, (row + 0.5) * height), word, "black", font, "rm")
    return wide


def save_grid(
    images: Tensor, columns: int, path: str | Path, words: Sequence[str] = ()
) -> None:
    """Write images (n, C, H, W) in [-1, 1] row by row as one PNG, words beside them."""
    picture = _labelled(_arranged(images, columns), words)
    with whole_file(path) as draft:
        picture.save(draft, format="PNG")


Start = Callable[[int, tuple[int, ...]], tuple[Tensor, NoiseSource]]


def one_stream(
    seed: int, columns: int, rows: int, shape: tuple[int, ...]
) -> tuple[Tensor, NoiseSource]:
    """Other noise at each place: x_T (rows * columns, C, H, W), and whence the rest."""
    draws = generator(seed, "grid", 0)
    return torch.randn(rows * columns, *shape, generator=draws), draws


def stream_per_seed(
    seeds: Sequence[int], rows: int, shape: tuple[int, ...]
) -> tuple[Tensor, NoiseSource]:
    """A column for each seed: results as for `one_stream`."""
    streams = [generator(seed, "grid", 0) for _ in range(rows) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=s) for s in streams]), streams


def _on_great_circle(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """From a to b (C, H, W) at each of u (n,): (n, C, H, W), eq-pictures-slerp."""
    theta = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    u = u[:, None, None, None]
    return (torch.sin((1 - u) * theta) * a + torch.sin(u * theta) * b) / theta.sin()


def between_seeds(
    ends: Sequence[int], columns: int, rows: int, shape: tuple[int, ...]
) -> tuple[Tensor, NoiseSource]:
    """Columns between two seeds, for samplers that draw no noise on the way."""
    (a, b), _ = stream_per_seed(ends, 1, shape)
    way = _on_great_circle(a, b, torch.linspace(0, 1, columns))
    return way.repeat(rows, 1, 1, 1), None


_GRID_ROWS = 10  # classes that are drawn when none is named
_GRID_STEPS = 50


def _grid_sampler(diffusion: GaussianDiffusion, pixels: bool) -> Sampler:
    """How pictures are drawn that only someone looks at."""
    steps = min(_GRID_STEPS, diffusion.num_timesteps)
    return Sampler(steps, "ddim", cfg_scale=1.5, clip_denoised=pixels)


def image_shape(model: DiffuSSM) -> tuple[int, int, int]:
    """(C, H, W) of what a model draws."""
    return model.config.in_channels, model.config.height, model.config.width


Walk = Callable[..., Iterator[tuple[int, Tensor, Tensor]]]
Frame = tuple[Tensor, Tensor]  # x_t and the predicted clean image


@dataclass(frozen=True)
class Grid:
    """What stands in the rows and columns of a grid, and how it is drawn.

    Args:
        classes: A row each; None: the first ten.
        names: Of all classes, to be written beside the rows.
        cfg_scales: All rows again for each; none: once, with that of `sampler`.
        per_class, seed: Columns, and their noise, as `one_stream` has it.
        start: Other columns, such as a part of `stream_per_seed`.
        sampler: None: 50 DDIM steps with guidance 1.5.
        walk: Called with the sampler and the arguments of `sampling.walk`.
        precision: See `computing_in`.
    """

    classes: Sequence[int] | None = None
    names: Sequence[str] = ()
    cfg_scales: Sequence[float] = ()
    per_class: int = 8
    seed: int = 0
    start: Start | None = None
    sampler: Sampler | None = None
    walk: Walk = sampling.walk
    precision: str = "float32"

    def words(self, num_classes: int) -> list[str]:
        """What is written beside the rows; nothing for a model without classes."""
        if not num_classes:
            return []
        names = {c: name.partition(",")[0] for c, name in enumerate(self.names)}
        rows = [names.get(c, str(c)) for c in self.rows(num_classes)]
        if len(self.cfg_scales) < 2:
            return rows
        return [f"{row}, w = {scale:g}" for scale in self.cfg_scales for row in rows]

    def rows(self, num_classes: int) -> Sequence[int]:
        """The classes of the rows; one row for a model without classes."""
        return self.classes or range(min(num_classes, _GRID_ROWS) or 1)

    def _drawn(
        self,
        model: DiffuSSM,
        diffusion: GaussianDiffusion,
        sampler: Sampler,
        every: int,
        progress: bool,
    ) -> list[Frame]:
        """The last state (n, C, H, W), row by row, and before it each so manyth."""
        guided = model.null_label is not None
        scales = (self.cfg_scales or [sampler.cfg_scale]) if guided else [1.0]
        blocks = []
        for scale in scales:
            asked = replace(sampler, cfg_scale=scale)
            chain = self._begin(model, diffusion, asked)
            total = asked.steps if self.walk is sampling.walk else None
            bar = tqdm(chain, "sampling", total, unit="step", disable=not progress)
            with computing_in(self.precision, next(model.parameters()).device):
                blocks.append(_some(bar, every))
        return [_stacked(frames) for frames in zip(*blocks, strict=True)]

    def _begin(
        self, model: DiffuSSM, diffusion: GaussianDiffusion, sampler: Sampler
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The walk of one block of rows."""
        where, rows = (
            next(model.parameters()).device,
            self.rows(model.config.num_classes),
        )
        start = self.start or partial(one_stream, self.seed, self.per_class)
        noise, source = start(len(rows), image_shape(model))
        labels = torch.tensor(rows).repeat_interleave(len(noise) // len(rows)).to(where)
        y = None if model.null_label is None else labels
        how: dict[str, Any] = {"generator": source, "noise": noise.to(where)}
        return self.walk(sampler, model, diffusion, y, **how)


def _stacked(frames: Iterable[Frame]) -> Frame:
    """The same moment of all blocks as one."""
    x, x0 = (torch.cat(same).float() for same in zip(*frames, strict=True))
    return x, x0


def _some(walk: Iterable[tuple[int, Tensor, Tensor]], every: int) -> list[Frame]:
    """Each so manyth state of a walk, and the last; 0: the last alone."""
    kept: list[Frame] = []
    last: list[Frame] = []
    for number, (_, x, x0) in enumerate(walk, 1):
        last = [(x, x0)]
        if every and number % every == 0:
            kept, last = kept + last, []
    return kept + last


@contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """A context in which a network computes in "float32", "tf32" or "bf16"."""
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    with multiplying_in("ieee" if precision == "float32" else "tf32"), bf16:
        yield


_FRAMES = 40  # of a film, about


def draw_grid(
    model: DiffuSSM,
    diffusion: GaussianDiffusion,
    picture: Path | None,
    *,
    gif: Path | None = None,
    decode: Decode | None = None,
    progress: bool = True,
    **options: Any,
) -> None:
    """Draw a grid as a PNG file, the way to it as a GIF, or both.

    `decode` is for latents; `options` are the fields of `Grid`.
    """
    grid = Grid(**options)
    sampler = grid.sampler or _grid_sampler(diffusion, pixels=decode is None)
    every = math.ceil(sampler.steps / _FRAMES) if gif else 0
    frames = grid._drawn(model, diffusion, sampler, every, progress)
    words, seen = grid.words(model.config.num_classes), decode or (lambda x: x)
    columns = len(frames[-1][0]) // max(len(words), 1)
    if picture is not None:
        save_grid(seen(frames[-1][0]), columns, picture, words)
    if gif is not None:
        film = ((seen(x), seen(x0)) for x, x0 in frames)
        _save_gif(film, columns, gif, words)


def _save_gif(
    frames: Iterable[Frame], columns: int, path: Path, words: Sequence[str] = ()
) -> None:
    """Write a film: on the left x_t, on the right the predicted clean images."""
    pictures = [
        _side_by_side(_labelled(_arranged(x, columns), words), _arranged(x0, columns))
        for x, x0 in frames
    ]
    times = [80] * (len(pictures) - 1) + [2000]  # milliseconds; the end is looked at
    how: dict[str, Any] = {"append_images": pictures[1:], "duration": times, "loop": 0}
    with whole_file(path) as draft:
        pictures[0].save(draft, format="GIF", save_all=True, **how)


def _side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    size = left.width + 4 * _GAP + right.width, left.height
    both = Image.new(left.mode, size, "white")
    both.paste(left, (0, 0))
    both.paste(right, (size[0] - right.width, 0))
    return both
