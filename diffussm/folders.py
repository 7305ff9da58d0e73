"""Folders.

Generated from book/51_folders.md by `make export`: edit there.
"""

import copy
import hashlib
import logging
import os
import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffussm.data import Dataset
from diffussm.guards import expect_int, expect_there, refuse
from diffussm.images import (
    EXTENSIONS,
    WHITE,
    BadImage,
    check_colour,
    file_size,
    image_tensor,
    listed_content,
)

__all__ = [
    "Skipped",
    "StoredImages",
    "PATIENCE",
    "NameList",
    "Entry",
    "scan",
    "visible",
    "ImageFolder",
]

_LOG = logging.getLogger("diffussm.folders")


class Skipped(NamedTuple):
    """A file that is not used, and why."""

    path: str
    reason: str


class StoredImages(Dataset):
    """Images that lie encoded somewhere, decoded one at a time.

    A subclass gives `name`, `_content` and `_facts`, and sets `labels`, int64 (n,),
    ascending. `skipped` lists what is not used. See `decode_image` for the options.
    """

    labels: Tensor
    classes: tuple[str, ...] = ()
    num_classes = 0
    levels: int | None = 256

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int | None,
        flip: bool,
        background: tuple[int, int, int],
        exif_rotate: bool,
    ) -> None:
        if size is not None:
            expect_int("size", size, least=1)
        check_colour(background)
        self.root, self.size, self.flip = os.fspath(root), size, flip
        self.background, self.exif_rotate = background, exif_rotate
        self.skipped: list[Skipped] = []

    def name(self, index: int) -> str:
        """What image `index` is called."""
        raise NotImplementedError

    def path(self, index: int) -> str:
        """Where image `index` lies."""
        return self.name(index)

    def _content(self, index: int) -> bytes | Image.Image:
        """A file's bytes, or what Pillow has opened; BadImage where there is none."""
        raise NotImplementedError

    def _facts(self) -> Iterator[bytes]:
        """What tells these images from others, without reading them."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Tensor:
        """Image `index` itself, float32 (3, H, W) in [-1, 1], or BadImage."""
        content = self._content(index)
        return image_tensor(content, self.size, self.background, self.exif_rotate)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the names and sizes of files, or of keys, and of the options."""
        digest = hashlib.sha256()
        for fact in self._facts():
            digest.update(b"%d\n%b" % (len(fact), fact))
        if self.exif_rotate:
            digest.update(b"exif_rotate")
        if self.background != WHITE:
            digest.update(b"background %d %d %d" % self.background)
        return digest.hexdigest()

    def _candidates(self, index: int) -> list[int]:
        """Image `index`, those of its class that follow, then those before it."""
        label = int(self.labels[index])
        first = int(torch.searchsorted(self.labels, label))
        last = int(torch.searchsorted(self.labels, label, right=True))
        return list(islice(chain(range(index, last), range(first, index)), PATIENCE))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = range(len(self))[index]  # IndexError, and negative numbers as in a list
        candidates = self._candidates(index)
        for candidate in candidates:
            try:
                return self.read(candidate), int(self.labels[index])
            except BadImage as error:
                self._skip(candidate, str(error))
        raise BadImage(
            f"none of the {len(candidates)} images from {self.name(index)!r} of "
            f"{self.root!r} on can be decoded; the last: {self.skipped[-1].reason}"
        )

    def _skip(self, index: int, reason: str) -> None:
        path = self.path(index)
        with _RECORDING:
            if all(path != known for known, _ in self.skipped):
                self.skipped.append(Skipped(path, reason))
                _LOG.warning("skipped %s: %s", path, reason)


PATIENCE = 100  # so many broken ones in a row, and it is not the images that are broken


_RECORDING = threading.Lock()  # several threads may meet the same broken image


class NameList:
    """Names as one block of bytes and the places where they end."""

    def __init__(self, names: Iterable[bytes]) -> None:
        parts = list(names)
        self.block = b"".join(parts)
        self.ends = np.cumsum([0] + [len(part) for part in parts])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> bytes:
        index = range(len(self))[index]
        return self.block[self.ends[index] : self.ends[index + 1]]


class Entry(NamedTuple):
    """What lies in a folder: its `kind` is "folder", "file", or what else it is."""

    name: str
    path: str
    kind: str  # "folder", "file", or in words what it is instead


def scan(folder: str | os.PathLike[str]) -> list[Entry]:
    """What lies in a folder on a disk."""
    with os.scandir(folder) as entries:
        return [Entry(entry.name, entry.path, _kind(entry)) for entry in entries]


def visible(entries: Iterable[Entry]) -> list[Entry]:
    """Entries by name, without what systems hide in a folder."""
    seen = [one for one in entries if not one.name.startswith(".")]
    return sorted(one for one in seen if one.name != "__MACOSX")


class ImageFolder(StoredImages):
    """A folder of images, read lazily: `root/<class>/**/<name>.jpg` as in ImageNet.

    The constructor lists names and opens no file. What is left out by its name is
    announced once and listed in `skipped`.

    Args:
        size: images come out as size x size pixels (`center_crop`); None: as they are.
        flip: whether a mirrored image is as good as the image.
        conditional: False takes all images below root as one unlabelled set.
        background, exif_rotate: see `decode_image`.

    Raises:
        OSError, ValueError: no folder, no classes or no images.
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
        above = frozenset({self._place(self.root)} if conditional else ())
        folders = self._class_folders() if conditional else [("", self.root)]
        self._keep([self._images_below(path, above) for _, path in folders])
        self._announce()
        self.classes = tuple(name for name, _ in folders) if conditional else ()
        self.num_classes = len(self.classes)

    def _visible(self, folder: str) -> list[Entry]:
        return visible(scan(folder))

    def _place(self, folder: str) -> Hashable:
        """What a folder is called by everyone, whichever links lead to it."""
        status = expect_there(Path(folder), "a folder of images").stat()
        return status.st_dev, status.st_ino

    def _walk(self, folder: str, above: frozenset[Hashable]) -> Iterator[Entry]:
        """All visible files below, sorted by name."""
        if (here := self._place(folder)) in above:
            return
        for entry in self._visible(folder):
            if entry.kind == "folder":
                yield from self._walk(entry.path, above | {here})
            else:
                yield entry

    def _images_below(self, path: str, above: frozenset[Hashable]) -> list[str]:
        found = [
            entry.path for entry in self._walk(path, above) if self._by_name(entry)
        ]
        if not found:
            _LOG.warning("class folder %s holds no images", path)
        return [os.path.relpath(image, self.root) for image in found]

    def _keep(self, found: Sequence[Sequence[str]]) -> None:
        self._names = NameList(map(os.fsencode, chain.from_iterable(found)))
        counts = torch.tensor([len(names) for names in found])
        self.labels = torch.arange(len(found)).repeat_interleave(counts)

    def name(self, index: int) -> str:
        """The path of image `index` below the root."""
        return os.fsdecode(self._names[index])

    def path(self, index: int) -> str:
        """Where image `index` lies."""
        return os.path.join(self.root, self.name(index))

    def _content(self, index: int) -> bytes:
        return listed_content(self.path(index))

    def _size(self, index: int) -> int:
        return file_size(self.path(index))

    def _facts(self) -> Iterator[bytes]:
        def sizes(part: np.ndarray) -> list[int]:
            return [self._size(i) for i in part.tolist()]

        parts = np.array_split(np.arange(len(self)), max(len(self) // 1000, 1))
        with ThreadPoolExecutor(16) as pool:
            found = list(chain.from_iterable(pool.map(sizes, parts)))
        yield self._names.block
        for numbers in (self._names.ends, self.labels.numpy(), found):
            yield np.asarray(numbers, "<i8").tobytes()

    def without(self, bad: Iterable[Skipped]) -> "ImageFolder":
        """The same folder with these files taken out, and with the same classes."""
        other = copy.copy(self)
        other.__dict__.pop("fingerprint", None)
        other.skipped = list(dict.fromkeys([*self.skipped, *bad]))
        other._keep(self._names_except({path for path, _ in other.skipped}))
        refuse(not len(other), f"all images of {self.root!r} would be taken out")
        return other

    def _names_except(self, paths: set[str]) -> list[list[str]]:
        """The names of each class, but for the images at these paths."""
        kept: list[list[str]] = [[] for _ in self.classes or ("",)]
        for i, label in enumerate(self.labels.tolist()):
            if self.path(i) not in paths:
                kept[label].append(self.name(i))
        return kept

    def _by_name(self, entry: Entry) -> bool:
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix in EXTENSIONS and entry.kind == "file":
            return True
        reason = entry.kind
        if suffix not in EXTENSIONS:
            reason = f"not an image by its name ({repr(suffix)[1:-1] or 'no ending'})"
        self.skipped.append(Skipped(entry.path, reason))
        return False

    def _class_folders(self) -> list[tuple[str, str]]:
        folders = []
        for entry in self._visible(self.root):
            if entry.kind == "folder":
                folders.append((entry.name, entry.path))
            elif self._by_name(entry):
                reason = "lies beside the class folders, in none of them"
                self.skipped.append(Skipped(entry.path, reason))
        if not folders:
            raise ValueError(
                f"{self.root} has no sub-folders; for no classes pass conditional=False"
            )
        if {name for name, _ in folders} <= {"train", "val", "test"}:
            raise ValueError(f"{folders[0][1]} is a split and no class; pass it itself")
        return folders

    def _announce(self) -> None:
        """Say what was left out by its name; ValueError if nothing else is there."""
        left_out = self._left_out()
        if not len(self):
            raise ValueError(
                f"no images below {self.root} (.jpg, .png, ...); {left_out}"
            )
        if self.skipped:
            _LOG.warning("%s: %s", self.root, left_out)

    def _left_out(self) -> str:
        """In words: how many files are left out by their names, and why the first."""
        count, first = len(self.skipped), self.skipped[:3]
        shown = [f"{os.path.relpath(path, self.root)!r} {why}" for path, why in first]
        more = [f"and {count - 3} more"] * (count > 3)
        files = {0: "no file is", 1: "1 file is"}.get(count, f"{count} files are")
        return f"{files} left out{': ' if count else ''}{', '.join(shown + more)}"


def _kind(entry: os.DirEntry[str]) -> str:
    with suppress(OSError):  # a link to itself leads to no folder
        if entry.is_dir():
            return "folder"
    if entry.is_symlink() or entry.is_file():
        return "file"
    return "neither a file nor a link to one"  # a pipe would be waited for
