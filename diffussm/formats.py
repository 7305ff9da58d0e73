"""Formats.

Generated from book/52_formats.md by `make export`: edit there.
"""

import struct
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from diffussm.adapters import is_saved, saved_images
from diffussm.folders import ImageFolder, NameList, Skipped, StoredImages, scan
from diffussm.guards import expect_int, expect_there, explain, refuse
from diffussm.images import WHITE, BadImage
from diffussm.zips import ZipFolder, holds_classes, zip_of

__all__ = ["LmdbImages", "images_from", "holds_images", "find_broken_images"]


class LmdbImages(StoredImages):
    """The images of an LMDB, keys to encoded files, as LSUN has them: no classes.

    They come in the order of their keys. Reads are safe from several threads. Needs the
    package `lmdb`.

    Raises:
        FileNotFoundError, OSError, ValueError: no LMDB, a damaged one, an empty one.
    """

    def __init__(
        self,
        root: str | Path,
        size: int | None,
        flip: bool = False,
        *,
        background: tuple[int, int, int] = WHITE,
        exif_rotate: bool = False,
    ) -> None:
        super().__init__(root, size, flip, background, exif_rotate)
        self._env = _open_lmdb(self.root)
        with self._env.begin() as reading:
            self._keys = NameList(reading.cursor().iternext(keys=True, values=False))
        refuse(not len(self._keys), f"{self.root} is an LMDB without any images")
        self.labels = torch.zeros(len(self._keys), dtype=torch.int64)

    def key(self, index: int) -> bytes:
        """The key of image `index`."""
        return self._keys[index]

    def name(self, index: int) -> str:
        """The key of image `index` as text."""
        return self.key(index).decode(errors="backslashreplace")

    def _content(self, index: int) -> bytes:
        import lmdb

        what = f"record {self.name(index)!r} of {self.root} cannot be read"
        with explain(what, lmdb.Error, error=OSError), self._env.begin() as reading:
            content = reading.get(self.key(index))
        refuse(content is None, "no longer there", BadImage)
        return bytes(content)

    def _facts(self) -> Iterator[bytes]:
        yield self._keys.block
        yield self._keys.ends.astype("<i8").tobytes()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_env"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._env = _open_lmdb(self.root)


_OPEN: WeakValueDictionary[tuple[int, int], Any] = WeakValueDictionary()


def _open_lmdb(root: str) -> Any:
    import lmdb

    data = _whole_lmdb(root)
    file = (data.stat().st_dev, data.stat().st_ino)
    environment = _OPEN.get(file)
    if environment is None:
        how = {"subdir": False, "readonly": True, "lock": False, "readahead": False}
        with explain(f"{data} cannot be read as an LMDB", lmdb.Error, error=OSError):
            environment = lmdb.open(str(data), **how)
        _OPEN[file] = environment
    return environment


def _whole_lmdb(root: str) -> Path:
    """The file of an LMDB that is as long as its header says."""
    data = Path(root) / "data.mdb" if Path(root).is_dir() else Path(root)
    expect_there(data, "the file of an LMDB")
    size, promised = data.stat().st_size, _promised_bytes(data)
    refuse(not promised, f"{data} is no LMDB of a 64-bit machine, or damaged", OSError)
    refuse(size < promised, f"{data} is truncated: {size} of {promised} bytes", OSError)
    return data


def _promised_bytes(data: Path) -> int:
    """How long an LMDB is by its own account; 0 if it is none."""
    with data.open("rb") as file:
        head = file.read(2 << 16)
    page = int.from_bytes(head[40:44], "little")
    headers = [_header(head[start:]) for start in (16, page + 16)]
    if any(magic != _MAGIC for _, _, magic in headers):
        return 0
    _, last, _ = max(headers)  # of the later transaction
    return (last + 1) * page


_MAGIC = 0xBEEFC0DE  # how the header of every LMDB begins
_HEADER = struct.Struct("<I116xQQ")


def _header(page: bytes) -> tuple[int, int, int]:
    """Transaction, last page and magic number; zeros where the file is too short."""
    part = page[: _HEADER.size].ljust(_HEADER.size, b"\0")
    magic, last, transaction = _HEADER.unpack(part)
    return transaction, last, magic


def images_from(
    path: str | Path,
    size: int | None,
    *,
    flip: bool = False,
    conditional: bool | None = None,
    exif_rotate: bool = False,
) -> StoredImages:
    """The images at `path`, whatever it is.

    Class folders or a plain folder, a zip of either (or a folder in a zip), an LMDB, or
    what `save_to_disk` of Hugging Face's `datasets` wrote.

    `conditional` says whether the sub-folders are classes; None: they are if no image
    lies beside them. The other options are those of `ImageFolder`.
    """
    path = Path(path)
    how: dict[str, Any] = {"flip": flip, "exif_rotate": exif_rotate}
    if _is_lmdb(path):
        refuse(conditional, f"{path} is an LMDB, with no classes; omit conditional")
        return LmdbImages(path, size, flip, exif_rotate=exif_rotate)
    if zip_of(path):
        return ZipFolder(path, size, conditional=conditional, **how)
    if is_saved(path):
        return saved_images(path, size, conditional=conditional, **how)
    if conditional is None:
        conditional = path.is_dir() and holds_classes(scan(path))
    return ImageFolder(path, size, conditional=conditional, **how)


def _is_lmdb(path: Path) -> bool:
    return path.suffix == ".mdb" or (path / "data.mdb").is_file()


def holds_images(path: Path) -> bool:
    """Whether `images_from` has to be asked what is at a path, and nobody else."""
    return path.is_dir() or _is_lmdb(path) or zip_of(path) is not None


def find_broken_images(images: StoredImages, workers: int = 0) -> list[Skipped]:
    """Decode every image once and list those that fail, in their order.

    Args:
        workers: number of processes; 0 stays in this one.

    Raises:
        OSError: the disk fails, which is no image's fault.
    """
    expect_int("workers", workers, least=0)
    if workers == 0:
        found = [_broken(images, i) for i in range(len(images))]
    else:  # spawn: forking a process that has threads (torch starts some) can hang
        spawn = get_context("spawn")
        with ProcessPoolExecutor(workers, spawn, _receive, (images,)) as pool:
            numbers = range(len(images))
            found = list(pool.map(_broken_received, numbers, chunksize=64))
    return [skipped for skipped in found if skipped]


_RECEIVED: list[StoredImages] = []  # in a process that looks through them


def _receive(images: StoredImages) -> None:
    _RECEIVED.append(images)


def _broken_received(index: int) -> Skipped | None:
    return _broken(_RECEIVED[-1], index)


def _broken(images: StoredImages, index: int) -> Skipped | None:
    try:
        images.read(index)
    except BadImage as error:
        return Skipped(images.path(index), str(error))
    return None
