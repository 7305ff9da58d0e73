"""Grids that a command has written, as figures of the page.

A grid is black words on white paper. Here the words are those of the figure, and there
is nothing between the images, so that it has the page's colours in either theme.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

import plotting  # noqa: F401 (figures become SVG)

__all__ = ["draw_sheet", "images_of_sheet"]


def images_of_sheet(
    picture: Image.Image, rows: int, columns: int, margin: int = 2
) -> np.ndarray:
    """The right end of a grid, its square images, as uint8 (height, width, 4).

    Clear are the margins of the images, in pixels, and images that are white all over.
    """
    size, rest = divmod(picture.height, rows)
    left = picture.width - columns * size
    if rest or left < 0:
        raise ValueError(
            f"{rows} rows of {columns} square images: got a picture of "
            f"{picture.width} × {picture.height} pixels"
        )
    pixels = np.array(picture.convert("RGBA"))[:, left:]
    images = pixels.reshape(rows, size, columns, size, 4)
    place = np.arange(size)
    inside = (place >= margin) & (place < size - margin)
    drawn = np.any(images[..., :3] < 255, axis=(1, 3, 4))  # (rows, columns)
    shown = drawn[:, None, :, None] & inside[:, None, None] & inside
    return np.concatenate(
        [images[..., :3], 255 * shown[..., None].astype(np.uint8)], -1
    ).reshape(pixels.shape)


def draw_sheet(
    ax: Axes, picture: Image.Image, words: Sequence[str], columns: int
) -> None:
    """Draw the images of a grid with a word beside each row."""
    pixels = images_of_sheet(picture, len(words), columns)
    size = len(pixels) // len(words)
    ax.imshow(pixels, interpolation="none")
    ax.spines[:].set_visible(False)
    ax.set_xticks([])
    ax.set_yticks((np.arange(len(words)) + 0.5) * size, words)
    ax.tick_params(length=0)
