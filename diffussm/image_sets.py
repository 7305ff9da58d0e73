"""Images to be scored.

Generated from book/56_image_sets.md by `make export`: edit there.
"""

import hashlib
import math
import zipfile
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffussm.data import random_bits
from diffussm.folders import Skipped, StoredImages
from diffussm.formats import holds_images, images_from
from diffussm.guards import expect, expect_one_of, explain, refuse
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
    """Images to be scored: a folder, a tree, a zip, an LMDB, an .npz, or batches.

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
        self.files = self._open()
        skipped = self.files.skipped if self.files is not None else []
        self.by_name = [one for one in skipped if Path(one.path).name not in _RECORDS]
        self.left_out = list(self.by_name)

    def _open(self) -> StoredImages | None:
        """What `images_from` opens; None for an .npz and for batches."""
        path = Path(self.source) if isinstance(self.source, str | Path) else None
        if path and holds_images(path):
            how = {"conditional": False, "exif_rotate": self.exif_rotate}
            return images_from(path, self.size, **how)
        if path and (path.suffix != ".npz" or not path.is_file()):
            raise FileNotFoundError(
                f"no folder, zip, LMDB or .npz of images is at {path}"
            )
        return None

    @property
    def name(self) -> str:
        """Where the images are, in words."""
        return str(self.source) if isinstance(self.source, str | Path) else "batches"

    def batches(self, batch_size: int = 64) -> Iterator[Tensor]:
        """uint8 (B, 3, H, W), by name; ValueError unless all are images of one size."""
        self.left_out = list(self.by_name)
        size = None
        for batch in map(self._prepared, self._stored(batch_size)):
            H, W = batch.shape[2:]
            size = size or (H, W)
            if size != (H, W):
                raise ValueError(f"{self.name}: {size} and {H, W} pixels; use --size")
            yield batch

    def _stored(self, batch_size: int) -> Iterator[Tensor]:
        if self.files is not None:
            return self._from_files(self.files, batch_size)
        if isinstance(self.source, str | Path):
            return _from_npz(Path(self.source), batch_size)
        return iter(self.source)

    def _prepared(self, batch: Tensor) -> Tensor:
        """A batch of 8 bits and three channels, cropped unless its files were."""
        expect("images", batch, "B C H W", C=3)
        expect_one_of("dtype of images", batch.dtype, [torch.uint8])
        if self.size is None or self.files is not None:
            return batch
        return _cropped(batch, self.size)

    def _from_files(self, files: StoredImages, batch_size: int) -> Iterator[Tensor]:
        """The images of files in batches, each of which has images of one size."""
        for _, alike in groupby(self._good(files), lambda pixels: pixels.shape):
            while batch := list(islice(alike, batch_size)):
                yield torch.stack(batch)

    def _good(self, files: StoredImages) -> Iterator[Tensor]:
        for i in range(len(files)):
            try:
                pixels = files.read(i)  # (3, H, W) in [-1, 1]
            except BadImage as error:
                self.left_out.append(Skipped(files.name(i), str(error)))
            else:
                yield ((pixels + 1) * 127.5).round().to(torch.uint8)

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


def _cropped(batch: Tensor, size: int) -> Tensor:
    """Images that come as numbers, cropped as those that come as files."""
    images = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in batch]
    crops = [np.array(center_crop(one, size)) for one in images]
    return torch.stack([torch.from_numpy(one).permute(2, 0, 1) for one in crops])


def read_images(
    source: Source,
    batch_size: int = 64,
    size: int | None = None,
    exif_rotate: bool = False,
) -> Iterator[Tensor]:
    """uint8 (B, 3, H, W): the batches of an `ImageSet`, see there."""
    return ImageSet(source, size, exif_rotate).batches(batch_size)


def _from_npz(path: Path, batch_size: int) -> Iterator[Tensor]:
    with (
        explain(f"{path} is no set of images in ADM's form", *_NO_ARCHIVE),
        zipfile.ZipFile(path) as archive,
        archive.open("arr_0.npy") as file,
    ):
        n, *shape = _shape_of(file)
        for start in range(0, n, batch_size):
            yield _next_images(file, min(batch_size, n - start), shape)


def _next_images(file: IO[bytes], count: int, shape: list[int]) -> Tensor:
    """The next of an open array: `count` images (H, W, 3) -> (count, 3, H, W)."""
    data = file.read(count * math.prod(shape))
    refuse(len(data) != count * math.prod(shape), "the file ends early")
    images = np.frombuffer(bytearray(data), np.uint8).reshape(count, *shape)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


_NO_ARCHIVE = (ValueError, KeyError, OSError, zipfile.BadZipFile, NotImplementedError)


def _shape_of(file: IO[bytes]) -> tuple[int, ...]:
    """(n, H, W, 3) of an array of images, of which nothing but the header is read."""
    form = np.lib.format
    readers = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}
    version = expect_one_of("format of arr_0", form.read_magic(file), readers)
    shape, fortran, dtype = readers[version](file)
    if dtype != np.uint8:
        raise ValueError(f"arr_0 holds {dtype}, expected uint8: round and convert it")
    if len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise ValueError(f"arr_0 has shape {shape}, expected (n, H, W, 3)")
    if fortran:
        raise ValueError("arr_0 has Fortran order: store np.ascontiguousarray(images)")
    return tuple(shape)


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
        parts, chosen = [part for _, part in self.parts], torch.from_numpy(order)
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return keys[order], {name: x[chosen] for name, x in joined.items()}
