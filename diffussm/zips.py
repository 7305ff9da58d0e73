"""Zips.

Generated from book/51_zips.md by `make export`: edit there.
"""

import os
import posixpath
import stat
import struct
import threading
import weakref
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np

from diffussm.folders import Entry, ImageFolder, NameList, visible
from diffussm.guards import explain, refuse
from diffussm.images import EXTENSIONS, WHITE, BadImage

__all__ = ["ZipFolder", "zip_of", "holds_classes"]


def _members(path: str) -> dict[str, ZipInfo]:
    """What is in a zip, by its name; OSError, ValueError for what cannot be read."""
    damaged = f"{path} is no zip, or not a whole one"
    kinds = (BadZipFile, NotImplementedError, ValueError, struct.error)
    with explain(damaged, *kinds, error=OSError), ZipFile(path) as archive:
        listed = {_name(info): info for info in archive.infolist()}
    for name, info in listed.items():
        flaw = _flaw(name, info, os.path.getsize(path))
        refuse(flaw, f"{path} cannot be read in place: {name!r} {flaw}")
    return listed


_DOS = 0  # who made an entry
_UNIX = 3
_UTF8 = 1 << 11  # the mark


def _name(info: ZipInfo) -> str:
    """The path of an entry in its zip, without a slash at its end."""
    name = info.filename
    if info.create_system == _UNIX and not info.flag_bits & _UTF8:
        name = os.fsdecode(info.orig_filename.encode("cp437"))
    elif info.create_system == _DOS:
        name = name.replace("\\", "/")
    return posixpath.normpath(name)


def _kind(info: ZipInfo) -> str:
    """As in an `Entry`: "folder", "file", or in words what it is instead."""
    if info.filename.endswith(("/", "\\")):
        return "folder"
    if info.create_system == _UNIX and stat.S_ISLNK(info.external_attr >> 16):
        return "a link, which is not followed in a zip"
    return "file"


_DEEPEST = 100  # folders in each other
_AGAIN = "zip the folder again, as in zip -r -0 photos.zip photos"


def _flaw(name: str, info: ZipInfo, size: int) -> str:
    """Why a zip of so many bytes is refused for this entry; nothing if it is not."""
    if info.header_offset + info.compress_size > size or info.file_size >> 40:
        return "does not lie within it: its table of contents is damaged"
    if name.startswith("/") or ".." in name.split("/"):
        return f"lies outside of it; {_AGAIN}"
    if info.flag_bits & 1:
        return "is encrypted; unpack it with its password and give the folder"
    if info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        return f"is packed by method {info.compress_type}; {_AGAIN}"
    if name.endswith((".mdb", ".arrow")):
        return "is a database, mapped into memory; unpack it and give its folder"
    deep = name.count("/") > _DEEPEST
    return f"lies more than {_DEEPEST} folders deep; {_AGAIN}" if deep else ""


class _Packed:
    """The files in a zip, each read where it lies, by several threads if need be."""

    def __init__(self, path: str, members: Mapping[str, ZipInfo]) -> None:
        files = {os.fsencode(name): info for name, info in members.items()}
        self.path, self.bytes = path, os.path.getsize(path)
        self.names = NameList(sorted(files))
        rows = [_numbers(files[name]) for name in sorted(files)]
        self.numbers = np.array(rows, np.int64).reshape(-1, 5)
        self._open()

    def entry(self, name: bytes) -> list[int]:
        """The five numbers of a file."""
        found: list[int] = self.numbers[bisect_left(self.names, name)].tolist()
        return found

    def content(self, name: bytes) -> bytes:
        """The bytes of a file; BadImage where they are damaged."""
        start, packed, size, checksum, method = self.entry(name)
        with explain(f"{self.path} cannot be read", OSError, error=OSError):
            head = self._read(_HEAD.size, start)
            start += _HEAD.size + sum(_HEAD.unpack(head.ljust(_HEAD.size)))
            data = self._read(packed, start)
        if method == ZIP_DEFLATED:
            data = _inflated(data, size)
        damaged = len(data) != size or zlib.crc32(data) != checksum
        refuse(damaged, "damaged in the zip: its checksum is another", BadImage)
        return data

    def _read(self, size: int, start: int) -> bytes:
        """So many bytes from a place on."""
        if hasattr(os, "pread"):
            return os.pread(self._handle, size, start)
        with self._turn:
            os.lseek(self._handle, start, os.SEEK_SET)
            return os.read(self._handle, size)

    def _open(self) -> None:
        changed = f"{self.path} is not the file that was opened: its size has changed"
        refuse(os.path.getsize(self.path) != self.bytes, changed, OSError)
        self._turn = threading.Lock()
        self._handle = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._handle)

    def __getstate__(self) -> dict[str, Any]:
        here_only = ("_handle", "_turn")
        return {key: x for key, x in self.__dict__.items() if key not in here_only}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def _numbers(info: ZipInfo) -> tuple[int, ...]:
    sizes = info.compress_size, info.file_size
    return info.header_offset, *sizes, info.CRC, info.compress_type


_HEAD = struct.Struct("<26x2H")  # lengths of the name and the notes that follow


def _inflated(data: bytes, size: int) -> bytes:
    with explain("damaged in the zip", zlib.error, error=BadImage):
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size or 1)


def _folders(path: str, members: Mapping[str, ZipInfo]) -> dict[str, dict[str, Entry]]:
    """What lies in each folder of a zip; "" is the zip itself."""
    folders: dict[str, dict[str, Entry]] = {"": {}}
    for name, info in members.items():
        kind = _kind(info)
        if kind == "folder":
            folders.setdefault(name, {})
        known = name == "."
        while not known:
            above, _, last = name.rpartition("/")
            known = above in folders
            entry = Entry(last, f"{path}/{name}", kind)
            folders.setdefault(above, {})[name] = entry
            name, kind = above, "folder"
    return folders


class ZipFolder(ImageFolder):
    """A folder of images in a zip, read in place: nothing is unpacked.

    `root` is the zip or leads to a folder in it (`photos.zip/train`). Where a zip holds
    one folder and nothing else, it is that folder. Order, labels and fingerprint are
    those of the unpacked folder; so are the options, but that conditional=None takes
    sub-folders for classes if no image lies beside them.

    Raises:
        OSError, ValueError: no zip, a damaged or encrypted one, no images in it.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int | None,
        flip: bool = False,
        *,
        conditional: bool | None = None,
        background: tuple[int, int, int] = WHITE,
        exif_rotate: bool = False,
    ) -> None:
        path = os.fspath(zip_of(root) or root)
        members = _members(path)
        self._files = _Packed(path, members)
        self._listing = _folders(path, members)
        self._inner = self._top(_slashed(os.path.relpath(root, path)), conditional)
        if conditional is None:
            conditional = holds_classes(self._listing[self._inner].values())
        how: dict[str, Any] = {"background": background, "exif_rotate": exif_rotate}
        where = os.path.join(path, self._inner) if self._inner else path
        super().__init__(where, size, flip, conditional=conditional, **how)
        del self._listing  # needed no longer

    def _top(self, inner: str, conditional: bool | None) -> str:
        """The folder in the zip where the images begin, "" for the zip itself."""
        folders = self._listing
        if inner != ".":
            known = f"in {self._files.path} there is no folder {inner!r}; it holds "
            refuse(inner not in folders, known + ", ".join(sorted(folders)[1:9]))
            return inner
        only, *others = visible(folders[""].values()) or [Entry("", "", "file")]
        if others or only.kind != "folder":
            return ""
        below = [entry.kind for entry in folders[only.name].values()]
        return "" if conditional and "folder" not in below else only.name

    def _visible(self, folder: str) -> list[Entry]:
        inner = _slashed(os.path.relpath(folder, self._files.path))
        return visible(self._listing["" if inner == "." else inner].values())

    def _place(self, folder: str) -> str:
        return folder  # no links, no circles

    def _content(self, index: int) -> bytes:
        return self._files.content(self._key(index))

    def _size(self, index: int) -> int:
        return self._files.entry(self._key(index))[2]

    def _key(self, index: int) -> bytes:
        """What the zip itself calls image `index`."""
        return os.fsencode(_slashed(os.path.join(self._inner, self.name(index))))


def zip_of(path: str | os.PathLike[str]) -> Path | None:
    """The zip that lies at a path, or into which it leads; None: there is none."""
    above = (Path(path), *Path(path).parents)
    return next((p for p in above if p.suffix.lower() == ".zip" and p.is_file()), None)


def _slashed(path: str) -> str:
    """As zips write it, on Windows as well."""
    return path.replace(os.sep, "/")


def holds_classes(entries: Iterable[Entry]) -> bool:
    """Whether there are sub-folders, and no image beside them."""
    kinds = {_class_or_image(entry) for entry in visible(entries)}
    return "folder" in kinds and "image" not in kinds


def _class_or_image(entry: Entry) -> str:
    image = os.path.splitext(entry.name)[1].lower() in EXTENSIONS
    return "image" if image and entry.kind != "folder" else entry.kind
