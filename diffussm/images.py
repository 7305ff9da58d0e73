"""Images.

Generated from book/50_images.md by `make export`: edit there.
"""

import errno
import io
import os
import re
import warnings
from contextlib import suppress
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from diffussm.guards import expect_int, explain, refuse

__all__ = [
    "WHITE",
    "BadImage",
    "check_colour",
    "decode_image",
    "EXTENSIONS",
    "center_crop",
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


def check_colour(background: tuple[int, int, int]) -> None:
    """ValueError for what is no colour, before any file is blamed for it."""
    parts = [type(part) is int and 0 <= part <= 255 for part in background]
    if parts != [True] * 3:
        raise ValueError(f"background={background}: expected three integers, 0 to 255")


def decode_image(
    data: bytes | Image.Image,
    background: tuple[int, int, int] = WHITE,
    exif_rotate: bool = False,
) -> Image.Image:
    """A file's bytes as an 8-bit RGB image: its first frame, on `background`.

    Also what Pillow has opened. Pixels stay in the order in which they are stored, as
    in ADM's code, unless `exif_rotate` asks for the orientation that EXIF states.

    Raises:
        BadImage: nothing to decode, or pixels without an agreed range.
        ValueError: background is no colour.
    """
    check_colour(background)
    _mute_pillow()
    with explain("cannot be decoded", Exception, error=BadImage):
        image = _loaded(data)
        rgb = _to_rgb(_upright(image) if exif_rotate else image, background)
        tags = getattr(image, "tag_v2", {}) if image.mode.startswith("I;16") else {}
        return ImageOps.invert(rgb) if tags.get(262) == 0 else rgb  # a TIFF's 0: white


_PILLOW = re.compile(r"PIL\.")


def _mute_pillow() -> None:
    if all(module != _PILLOW for _, _, _, module, _ in warnings.filters):
        warnings.filterwarnings("ignore", module=_PILLOW.pattern)


def _loaded(data: bytes | Image.Image) -> Image.Image:
    image = _opened(data) if isinstance(data, bytes) else data
    w, h = image.size
    refuse(w * h > _MAX_PIXELS, f"{w} x {h} pixels; the limit is {_MAX_PIXELS}")
    image.load()
    of_16_bits = image.mode == "I" and image.format in ("PNG", "PPM")
    told = f"mode {image.mode} has no agreed range; save 8 or 16 bits"
    refuse(image.mode in ("I", "F") and not of_16_bits, told)
    bits = getattr(image, "tag_v2", {}).get(258, (16,))  # of a TIFF
    of_12_bits = image.mode.startswith("I;16") and bits != (16,)
    refuse(of_12_bits, f"grey of {bits[0]} bits has no agreed range; save 8 or 16")
    key = image.info.get("transparency")
    lost = isinstance(key, tuple) and max(key) > 255
    refuse(lost, f"the transparent colour {key} has 16 bits; save an alpha channel")
    return image


_AVIF = find_spec("PIL._avif") is not None  # Pillow is built with it or without
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP") + ("AVIF",) * _AVIF
EXTENSIONS = frozenset(
    ".bmp .gif .jfif .jpe .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split()
    + [".avif"] * _AVIF
)


def _opened(data: bytes) -> Image.Image:
    refuse(not data, "empty file (0 bytes)")
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:  # whose own words name an object in memory
        raise BadImage("not an image in any known format") from None


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.float64)
        opaque = Image.fromarray(levels != image.info.get("transparency", -1))
        image = Image.fromarray((levels / 257).round().astype(np.uint8))
        image.putalpha(opaque)
    if image.has_transparency_data:
        behind = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(behind, image.convert("RGBA"))
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    with suppress(Exception):  # noisy EXIF: the pixels are still good
        return ImageOps.exif_transpose(image)
    return image


def _halved(image: Image.Image, size: int) -> Image.Image:
    """Step 1."""
    while min(image.size) >= 2 * size:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, Image.Resampling.BOX)
    return image


def _scaled(image: Image.Image, size: int) -> Image.Image:
    """Step 2."""
    w, h = image.size
    scale = size / min(w, h)
    width, height = round(w * scale), round(h * scale)
    if width * height > max(_MAX_PIXELS, size * size):
        raise BadImage(f"too elongated: {w} x {h} would become {width} x {height}")
    return image.resize((width, height), Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop: halve while it is safe, scale to `size`, cut out the middle.

    Same arithmetic as `center_crop_arr` of guided-diffusion and DiT, so that FIDs are
    comparable. Source: ch. "Images", eq-data-crop.

    Raises:
        BadImage: the scaled image would hold more than 2^27 pixels (a strip, say).
    """
    expect_int("size", size, least=1)
    image = _scaled(_halved(image, size), size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _to_tensor(image: Image.Image) -> Tensor:
    """8-bit RGB image (H, W) as float32 (3, H, W) in [-1, 1]: level / 127.5 - 1."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return x.to(torch.float32) / 127.5 - 1


def image_tensor(
    data: bytes | Image.Image,
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
        error.filename = error.filename or os.fspath(path)  # `read` does not say it
        raise


_GONE = (errno.ENOENT, errno.ELOOP)  # no such file, or a link to itself


def listed_content(path: str) -> bytes:
    """The bytes of a listed file. BadImage if it is gone, OSError if its folder is."""
    try:
        return file_content(path)
    except OSError as error:
        if error.errno not in _GONE or not os.path.isdir(os.path.dirname(path)):
            raise
    raise BadImage(_absence(path))


def _absence(path: str) -> str:
    """In words: why there is no file."""
    if os.path.islink(path):
        return f"a link to {os.readlink(path)!r}, where no file is"
    return "no longer there"


def file_size(path: str) -> int:
    """Bytes of a file; -1 where there is none."""
    try:
        return os.stat(path).st_size
    except OSError as error:
        if error.errno in _GONE:
            return -1
        raise
