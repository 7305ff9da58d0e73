"""Images to be scored.

Generated from book/56_image_sets.md by `make export`: edit there.
"""

import hashlib
import math
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffussm.data import random_bits
from diffussm.folders import ImageFolder, Skipped
from diffussm.formats import LmdbImages, images_from
from diffussm.guards import refuse
from diffussm.images import BadImage, center_crop

__all__ = [
    "Source",
    "ImageSet",
    "read_images",
    "SEED",
    "digests_of",
    "keys_of",
    "FirstByKey",
]


Source = str | Path | Iterable[Tensor]
_RECORDS = {"samples.json", "labels.json"}  # written by `diffussm sample` beside images


class ImageSet:
    """Images to be scored: a folder, a tree, an LMDB, an .npz, or batches.

    Args:
        source: where they are; batches are uint8 (B, 3, H, W).
        size: crop to size x size as ADM does; None: as they are.
        exif_rotate: turn pictures as EXIF asks, which ADM does not.

    `left_out` lists what is not in the set, and why; complete after the last batch.
    Raises FileNotFoundError, ValueError, OSError for what is no set of images.
    """

    def __init__(
        self, source: Source, size: int | None = None, exif_rotate: bool = False
    ) -> None:
        self.source, self.size, self.exif_rotate = source, size, exif_rotate
        self.files = _open_files(source, size, exif_rotate)
        skipped = self.files.skipped if self.files is not None else []
        self.by_name = [one for one in skipped if Path(one.path).name not in _RECORDS]
        self.left_out = list(self.by_name)

    def batches(self, batch_size: int = 64) -> Iterator[Tensor]:
        """uint8 (B, 3, H, W), by name; ValueError unless all are images of one size."""
        self.left_out = list(self.by_name)
        shape = None
        for batch in self._stored(batch_size):
            _check_batch(batch)
            if self.size is not None and self.files is None:
                batch = _cropped(batch, self.size)
            shape = shape or batch.shape[2:]
            self._check_size(shape, batch.shape[2:])
            yield batch

    def _stored(self, batch_size: int) -> Iterator[Tensor]:
        if self.files is not None:
            return self._from_files(self.files, batch_size)
        if isinstance(self.source, str | Path):
            return _from_npz(Path(self.source), batch_size)
        return iter(self.source)

    def _from_files(
        self, files: ImageFolder | LmdbImages, batch_size: int
    ) -> Iterator[Tensor]:
        batch: list[Tensor] = []
        for pixels in self._good(files):
            first = batch[0] if batch else pixels
            self._check_size(first.shape[1:], pixels.shape[1:])
            batch.append(pixels)
            if len(batch) == batch_size:
                yield torch.stack(batch)
                batch = []
        if batch:
            yield torch.stack(batch)

    def _good(self, files: ImageFolder | LmdbImages) -> Iterator[Tensor]:
        for i in range(len(files)):
            try:
                pixels = files.read(i)  # (3, H, W) in [-1, 1]
            except BadImage as error:
                self.left_out.append(Skipped(files.name(i), str(error)))
            else:
                yield ((pixels + 1) * 127.5).round().to(torch.uint8)

    def _check_size(self, first: torch.Size, other: torch.Size) -> None:
        if first != other:
            where = f" in {self.source}" if isinstance(self.source, str | Path) else ""
            raise ValueError(
                f"images of {tuple(first)} and {tuple(other)} pixels{where}: expected "
                "one size; give a size (--size) to crop them as ADM does"
            )

    def record(self, digests: list[bytes], shape: tuple[int, ...]) -> dict[str, Any]:
        """What was read, after the last batch: checksum, form, what was left out."""
        of_all = hashlib.sha256(repr(shape).encode() + b"".join(sorted(digests)))
        first = [f"{one.path}: {one.reason}" for one in self.left_out[:10]]
        return {
            "images_sha256": of_all.hexdigest(),
            "image_size": list(shape),
            "crop": self.size,
            "exif_rotate": self.exif_rotate if self.files is not None else None,
            "left_out": {"count": len(self.left_out), "first": first},
        }


def _open_files(
    source: Source, size: int | None, exif_rotate: bool
) -> ImageFolder | LmdbImages | None:
    """A folder or an LMDB; None for an .npz and for batches."""
    path = Path(source) if isinstance(source, str | Path) else None
    if path and (path.is_dir() or path.suffix == ".mdb"):
        return images_from(path, size, conditional=False, exif_rotate=exif_rotate)
    if path and (path.suffix != ".npz" or not path.is_file()):
        raise FileNotFoundError(
            f"{source} is neither a folder or LMDB of images nor an .npz file"
        )
    return None


def _cropped(batch: Tensor, size: int) -> Tensor:
    """Images that come as numbers, cropped as those that come as files."""
    images = [
        center_crop(Image.fromarray(x.permute(1, 2, 0).numpy()), size) for x in batch
    ]
    return torch.stack(
        [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    )


def read_images(
    source: Source,
    batch_size: int = 64,
    size: int | None = None,
    exif_rotate: bool = False,
) -> Iterator[Tensor]:
    """uint8 (B, 3, H, W): the batches of an `ImageSet`, see there."""
    return ImageSet(source, size, exif_rotate).batches(batch_size)


def _from_npz(path: Path, batch_size: int) -> Iterator[Tensor]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            n, *shape = _shape_of(file)
            for start in range(0, n, batch_size):
                count = min(batch_size, n - start)
                data = file.read(count * math.prod(shape))
                refuse(len(data) != count * math.prod(shape), "the file ends early")
                images = np.frombuffer(bytearray(data), np.uint8)
                images = images.reshape(count, *shape)  # (B, H, W, 3)
                yield torch.from_numpy(images).permute(0, 3, 1, 2)
    except _NO_ARCHIVE as error:
        raise ValueError(
            f"{path} is no set of images in ADM's form: {error}"
        ) from error


_NO_ARCHIVE = (ValueError, KeyError, OSError, zipfile.BadZipFile, NotImplementedError)


def _shape_of(file: IO[bytes]) -> tuple[int, ...]:
    """(n, H, W, 3) of an array of images, of which nothing but the header is read."""
    form = np.lib.format
    version = form.read_magic(file)
    refuse(version not in ((1, 0), (2, 0)), f"its array has format {version}")
    first = version == (1, 0)
    read = form.read_array_header_1_0 if first else form.read_array_header_2_0
    shape, fortran, dtype = read(file)
    refuse(
        dtype != np.uint8,
        f"arr_0 holds {dtype}, expected uint8: round to 0 ... 255 and convert",
    )
    refuse(
        len(shape) != 4 or shape[3] != 3 or 0 in shape,
        f"arr_0 has shape {shape}, expected (n, H, W, 3)",
    )
    refuse(
        fortran,
        "arr_0 is in Fortran order, so its images do not lie one after the other: "
        "store np.ascontiguousarray(images)",
    )
    return tuple(shape)


def _check_batch(batch: Tensor) -> None:
    refuse(
        batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] != 3,
        f"images are {batch.dtype} {tuple(batch.shape)}: expected uint8 (B, 3, H, W)",
    )


SEED = 0  # of the keys


def digests_of(batch: Tensor) -> list[bytes]:
    """The SHA-256 of each image's pixels: uint8 (B, 3, H, W) -> B times 32 bytes."""
    return [hashlib.sha256(image.numpy().tobytes()).digest() for image in batch]


def keys_of(digests: list[bytes]) -> np.ndarray:
    """What images are ordered by: uint64 (B,)."""
    numbers = np.frombuffer(b"".join(digest[:8] for digest in digests), "<u8")
    return random_bits(SEED, "keys", numbers)


class FirstByKey:
    """Features of the `most` images with the smallest keys, sorted; None: of all."""

    def __init__(self, most: int | None) -> None:
        self.most, self.count = most, 0
        self.parts: list[tuple[np.ndarray, dict[str, Tensor]]] = []

    def add(self, keys: np.ndarray, features: dict[str, Tensor]) -> None:
        """Take in the features of a batch, if their keys are small enough."""
        self.parts.append((keys, features))
        self.count += len(keys)
        if self.most is not None and self.count > 2 * self.most:
            self.parts, self.count = [self.read()], self.most

    def read(self) -> tuple[np.ndarray, dict[str, Tensor]]:
        """The smallest keys, sorted, and the features in their order."""
        keys = np.concatenate([keys for keys, _ in self.parts])
        order = np.argsort(keys, kind="stable")[: self.most]
        chosen, features = torch.from_numpy(order), [part for _, part in self.parts]
        joined = {
            name: torch.cat([one[name] for one in features]) for name in features[0]
        }
        return keys[order], {name: x[chosen] for name, x in joined.items()}
