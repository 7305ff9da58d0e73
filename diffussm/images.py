"""Images.

Generated from book/50_images.md by `make export`: edit there.
"""

import errno
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from diffussm.guards import expect_int, refuse

__all__ = [
    "WHITE",
    "BadImage",
    "decode_image",
    "EXTENSIONS",
    "center_crop",
    "check_colour",
    "image_tensor",
    "read_image",
    "file_content",
    "listed_content",
    "file_size",
]


WHITE = (255, 255, 255)
_MAX_PIXELS = 1 << 27  # 134 million: more than any camera makes, 400 MB once decoded


class BadImage(ValueError):
    """A file that cannot become a training image; the message is the reason."""


def decode_image(
    data: bytes, background: tuple[int, int, int] = WHITE, exif_rotate: bool = False
) -> Image.Image:
    """The bytes of a file as an 8-bit RGB image: its first frame, on `background`.

    Pixels stay in the order in which they are stored, as in ADM's code, unless
    `exif_rotate` asks for the orientation that EXIF states.

    Raises:
        BadImage: nothing to decode, or pixels without an agreed range.
        ValueError: background is no colour.
    """
    check_colour(background)
    with (
        _every_error_as_bad_image(data),
        Image.open(io.BytesIO(data), formats=_FORMATS) as image,
    ):
        _check_size(image)
        image.load()
        return _to_rgb(_upright(image) if exif_rotate else image, background)


@contextmanager
def _every_error_as_bad_image(data: bytes) -> Iterator[None]:
    if not data:
        raise BadImage("empty file (0 bytes)")
    try:
        with warnings.catch_warnings():
            # Pillow's opinions on odd metadata; what matters raises below
            warnings.simplefilter("ignore")
            yield
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("not an image in any known format") from None
    except Image.DecompressionBombError:
        raise BadImage(f"more pixels than the limit of {_MAX_PIXELS}") from None
    except Exception as error:  # OSError, SyntaxError, struct.error ...
        raise BadImage(f"cannot be decoded: {error}") from None


_AVIF = find_spec("PIL._avif") is not None  # Pillow is built with it or without
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP") + ("AVIF",) * _AVIF
EXTENSIONS = frozenset(
    ".bmp .gif .jfif .jpe .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split()
    + [".avif"] * _AVIF
)


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        levels = _check_range(image.mode, np.asarray(image)) / 257
        return Image.fromarray(levels.round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        behind = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(behind, image.convert("RGBA"))
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noisy EXIF: the pixels are still good
        return image


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop: halve while it is safe, scale to `size`, cut out the middle.

    Same arithmetic as `center_crop_arr` of guided-diffusion and DiT, so that FIDs are
    comparable. Source: ch. "Images", eq-data-crop.

    Raises:
        BadImage: the scaled image would hold more than `_MAX_PIXELS` (a strip, say).
    """
    expect_int("size", size, least=1)
    while min(image.size) >= 2 * size:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    _check_elongation(image, width, height, size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > _MAX_PIXELS:
        raise BadImage(
            f"{image.width} x {image.height} pixels; the limit is {_MAX_PIXELS} in all"
        )


def _check_range(mode: str, levels: np.ndarray) -> np.ndarray:
    if mode == "F" or levels.min() < 0 or levels.max() > 65535:
        raise BadImage(
            f"pixels of mode {mode} have no agreed range; expected 8 or 16 bits"
        )
    return levels.astype(np.float64)


def _check_elongation(image: Image.Image, width: int, height: int, size: int) -> None:
    if width * height > max(_MAX_PIXELS, size * size):
        raise BadImage(
            f"too elongated: {image.width} x {image.height} would become "
            f"{width} x {height}"
        )


def check_colour(background: tuple[int, int, int]) -> None:
    """ValueError for what is no colour, before any file is blamed for it."""
    refuse(
        len(background) != 3
        or not all(type(part) is int and 0 <= part <= 255 for part in background),
        f"background is {background!r}; expected three integers from 0 to 255",
    )


def _to_tensor(image: Image.Image) -> Tensor:
    """8-bit RGB image (H, W) as float32 (3, H, W) in [-1, 1]: level / 127.5 - 1."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return x.to(torch.float32) / 127.5 - 1


def image_tensor(
    data: bytes,
    size: int | None,
    background: tuple[int, int, int] = WHITE,
    exif_rotate: bool = False,
) -> Tensor:
    """The bytes of a file as the model sees them: (3, size, size), or all (3, H, W).

    Raises:
        BadImage: see `decode_image` and `center_crop`.
    """
    image = decode_image(data, background, exif_rotate)
    return _to_tensor(image if size is None else center_crop(image, size))


def read_image(
    path: str | os.PathLike[str],
    size: int | None,
    background: tuple[int, int, int] = WHITE,
    exif_rotate: bool = False,
) -> Tensor:
    """The file at `path` as the model sees it, see `image_tensor`.

    Raises:
        BadImage: the content is at fault.
        OSError: the disk is, or there is no such file.
    """
    return image_tensor(file_content(path), size, background, exif_rotate)


def file_content(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file; an OSError names it."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        # reading fails without saying where
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def listed_content(path: str) -> bytes:
    """The bytes of a listed file. BadImage if it is gone, OSError if its folder is."""
    try:
        return file_content(path)
    except OSError as error:
        gone = error.errno in (errno.ENOENT, errno.ELOOP)
        if not gone or not os.path.isdir(os.path.dirname(path)):
            raise
        reason = "no longer there"
        if os.path.islink(path):
            reason = f"a link to {os.readlink(path)!r}, where no file is"
        raise BadImage(reason) from None


def file_size(path: str) -> int:
    """Bytes of a file; -1 where there is none."""
    try:
        return os.stat(path).st_size
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        return -1
