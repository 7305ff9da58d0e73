"""Files.

Generated from book/02_files.md by `make export`: edit there.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffussm.guards import explain, refuse

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "whole_file",
    "whole_folder",
    "UNSUPPORTED",
    "apply_umask",
    "sha256",
    "write_json",
    "read_json",
    "write_tensors",
    "read_tensors",
]

_LOG = logging.getLogger("diffussm.files")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A draft beside `path` that takes its place when the block ends well."""
    path = Path(path)
    refuse(path.is_dir(), f"{path} is a folder: name a file", IsADirectoryError)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        apply_umask(draft)
        _flush(draft)
        draft.replace(path)
        _flush(path.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """As `whole_file`, for a folder; a full one in its place is not replaced."""
    draft = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed here
    draft.mkdir(parents=True)
    try:
        yield draft
        for part in (*draft.rglob("*"), draft):
            _flush(part)
        draft.replace(path)
        _flush(path.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    try:
        _fsync(path)
    except OSError as error:
        if not path.is_dir() or error.errno not in UNSUPPORTED:
            raise  # a disk that is full or broken
        _warn_of_flushing(str(error.strerror))


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# What systems answer that lack a call for a kind of file, or at all
UNSUPPORTED = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EBADF,
    errno.EACCES,
    errno.EPERM,
}


@cache  # each text once
def _warn_of_flushing(reason: str) -> None:
    _LOG.warning(
        "this disk cannot flush a folder (%s): after a loss of power, what was written "
        "last may be missing",
        reason,
    )


def apply_umask(path: Path) -> None:
    """Let others read a file as the umask has it."""
    probe = path.with_name(f".{path.name}.umask")
    probe.touch()
    path.chmod(probe.stat().st_mode)
    probe.unlink()


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a record, whole or not at all."""
    with whole_file(path) as draft:
        draft.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, what: str = "the file") -> Any:
    """Read a record.

    Raises:
        ValueError: it is no JSON.
    """
    with explain(f"{what} {path} is damaged", ValueError, RecursionError):
        return json.loads(path.read_text(encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"], **facts: str) -> None:
    """Write tensors by name, from any device, whole or not at all."""
    from safetensors.torch import save_file  # here, for it loads torch

    kept = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    with whole_file(path) as draft:
        save_file(kept, draft, metadata={"format": "pt", **facts})


def read_tensors(path: Path, what: str = "the file") -> dict[str, "Tensor"]:
    """Read tensors onto the CPU.

    Raises:
        ValueError: it is no safetensors file, or a part of one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with explain(f"{what} {path} is damaged", SafetensorError):
        return dict(load_file(path))
