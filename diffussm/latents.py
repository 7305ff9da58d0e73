"""Latents.

Generated from book/54_latents.md by `make export`: edit there.
"""

import hashlib
import io
import json
import math
import mmap
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffussm.autoencoder import check_encoder, vae_identity
from diffussm.data import Dataset, Fetch
from diffussm.files import read_json, sha256
from diffussm.guards import (
    bounded,
    check_fields,
    expect_there,
    explain,
    from_dict,
    refuse,
)

__all__ = [
    "FORMAT",
    "shard_shape",
    "npy_header",
    "map_shard",
    "with_checksum",
    "read_manifest",
    "Encoder",
    "Shard",
    "read_record",
    "parse_shard",
    "LatentStore",
    "verify_store",
]


FORMAT = "diffussm-latents-2"


def shard_shape(plan: dict[str, Any], images: int) -> tuple[int, ...]:
    """(n, image and mirror image, mean and log-variance, C, h, w)."""
    return (images, 2 if plan["flip"] else 1, 2, *plan["shape"])


def npy_header(shape: Sequence[int]) -> bytes:
    """The first bytes of a `.npy` file that holds float16 of this shape."""
    file = io.BytesIO()
    facts = {"descr": "<f2", "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(file, facts)
    return file.getvalue()


def map_shard(path: Path, shape: Sequence[int]) -> mmap.mmap:
    """Map a shard into memory: float16, read-only, exactly of this shape.

    Raises ValueError or OSError for any other file; nothing in it is interpreted.
    """
    header, size = npy_header(shape), path.stat().st_size
    start, end = len(header), len(header) + 2 * math.prod(shape)
    refuse(size != end, f"{path} is truncated or foreign: {size} bytes, not {end}")
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if content[:start] != header:
        raise ValueError(f"{path} does not begin as float16 of shape {tuple(shape)}")
    if hasattr(mmap, "MADV_RANDOM"):
        content.madvise(mmap.MADV_RANDOM)
    return content


def with_checksum(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a checksum of all its other entries."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return content | {"checksum": digest}


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a store, as it was written; ValueError or OSError for others."""
    file = Path(path) / "manifest.json"
    expect_there(file, "a store (if unfinished, run the same encode again)")
    manifest = read_record(file, "the manifest")
    if manifest.get("checksum") != with_checksum(manifest)["checksum"]:
        raise ValueError(f"{file}: changed or damaged, its checksum does not fit")
    return manifest


@dataclass(frozen=True)
class Encoder:
    """Of an autoencoder's identity, what decides the latents (see `vae_identity`)."""

    encoder_sha256: str
    scaling_factor: float = bounded(MISSING, above=1e-6, below=1e6)


@dataclass(frozen=True)
class Shard:
    """The record of a finished shard; `labels` are pairs of a label and how often."""

    name: Any  # compared with the only one that it may have
    sha256: str
    labels: tuple[list[int], ...]
    images: int = bounded(MISSING, least=0, most=2**40)


@dataclass(frozen=True)
class _Manifest:
    """What a store relies on in its manifest."""

    vae: Encoder
    shape: tuple[int, int, int]
    flip: bool
    classes: tuple[str, ...]
    shards: tuple[Any, ...]  # of `Shard`


_FIRST_FORMAT = "diffussm-latents-1"  # did not tell encoder and decoder apart


def read_record(file: Path, what: str) -> dict[str, Any]:
    """A plan or a manifest of the current format; ValueError for any other file."""
    record = read_json(file, what)
    found = record.get("format") if isinstance(record, dict) else None
    if found == _FIRST_FORMAT:
        raise ValueError(f"{file}: {found}; encode the images again, into a new folder")
    refuse(found != FORMAT, f"{file}: format {found!r:.60}, expected {FORMAT}")
    return dict(record)


_D = TypeVar("_D", Encoder, Shard, _Manifest)


def _declared(cls: type[_D], record: Any, what: str) -> _D:
    """The entries that `cls` declares, checked; others may stand beside them."""
    if isinstance(record, dict):
        names = {field.name for field in fields(cls)}
        record = {key: record[key] for key in names & record.keys()}
    declared = from_dict(cls, record, what)
    check_fields(declared)
    return declared


def parse_shard(record: Any, number: int, classes: int) -> Shard:
    """The record of a shard; ValueError unless it is one that the shard can have."""
    shard = _declared(Shard, record, f"shard {number}")
    name = f"shard-{number:05d}.npy"  # known beforehand: no record leads elsewhere
    refuse(shard.name != name, f"{shard.name!r:.60}: expected a name, {name!r}")
    within = all(
        len(run) == 2
        and type(run[0]) is type(run[1]) is int
        and 0 <= run[0] < max(classes, 1)
        and run[1] > 0
        for run in shard.labels
    )
    if not within or sum(count for _, count in shard.labels) != shard.images:
        raise ValueError(f"{name}: labels of other classes, or not one for each image")
    return shard


def _parse_manifest(path: Path, record: dict[str, Any]) -> _Manifest:
    """What the store `path` relies on; ValueError unless every entry is sound."""
    with explain(str(path / "manifest.json"), ValueError):
        vae = _declared(Encoder, record.get("vae"), "vae")
        manifest = _declared(_Manifest, {**record, "vae": vae}, "the manifest")
        shape, classes = manifest.shape, len(manifest.classes)
        refuse(
            not 0 < min(shape) <= max(shape) <= 2**16, f"{shape=}: sides are 1 to 65536"
        )
        numbered = enumerate(manifest.shards)
        shards = tuple(parse_shard(one, i, classes) for i, one in numbered)
        refuse(not any(shard.images for shard in shards), "the store has no images")
        return replace(manifest, shards=shards)


class LatentStore(Dataset):
    """The latents of a data set, sampled again at each visit: a `Dataset`.

    Attributes:
        classes, num_classes, flip: see `Dataset`; flip: mirrored images are stored too.
        labels: int64 (n,).
        shape: (C, h, w).
        scale: latents are multiplied by it.
        vae: see `vae_identity`.
        manifest: all of `manifest.json`.
        fingerprint: its checksum.

    Raises:
        ValueError, OSError: the store is incomplete, damaged or not one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self._open(_parse_manifest(self.path, self.manifest))
        self.vae: dict[str, Any] = self.manifest["vae"]
        self.fingerprint: str = self.manifest["checksum"]

    def __len__(self) -> int:
        return len(self.labels)

    def _open(self, manifest: _Manifest) -> None:
        self.flip, self.shape = manifest.flip, manifest.shape
        self.scale = float(manifest.vae.scaling_factor)
        self.classes, self.num_classes = manifest.classes, len(manifest.classes)
        self.levels = None  # latents have no grey levels
        self._shards, self._records = list[mmap.mmap](), list[np.ndarray]()
        for shard in manifest.shards:
            shape = shard_shape(self.manifest, shard.images)
            self._shards.append(map_shard(self.path / shard.name, shape))
            content = np.frombuffer(
                self._shards[-1], "<f2", offset=len(npy_header(shape))
            )
            self._records.append(content.reshape(-1, 2, *self.shape))
        self._ends = np.cumsum([shard.images for shard in manifest.shards])
        runs = torch.tensor([run for shard in manifest.shards for run in shard.labels])
        self.labels = torch.repeat_interleave(runs[:, 0], runs[:, 1])

    def _find(self, i: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard of each image, and its row there."""
        if len(i) and not 0 <= i.min() <= i.max() < len(self):
            raise IndexError(f"indices {i.min()} to {i.max()} of {len(self)} images")
        numbers = np.searchsorted(self._ends, i, side="right")
        starts = np.concatenate([[0], self._ends])
        return numbers, i - starts[numbers]

    def read(self, number: int, record: int) -> np.ndarray:
        """The moments of a record, float16 (2, C, h, w), from the file or its copy."""
        found: np.ndarray = self._records[number][record]
        if hasattr(mmap, "MADV_WILLNEED"):
            shard, size = self._shards[number], found.nbytes
            start = len(shard) - self._records[number].nbytes + size * record
            page = start % mmap.PAGESIZE  # an advice begins with a page
            shard.madvise(mmap.MADV_WILLNEED, start - page, page + size)
        return found

    def moments(
        self, indices: Tensor, flips: Tensor | None = None, fetch: Fetch = map
    ) -> Tensor:
        """Stored moments: int64 (B,), bool (B,) -> float16 (B, 2, C, h, w)."""
        i = indices.numpy()
        numbers, records = self._find(i)
        if self.flip:
            records = 2 * records + (0 if flips is None else flips.numpy())
        where = list(zip(numbers.tolist(), records.tolist(), strict=True))
        out = np.empty((len(i), 2, *self.shape), np.float16)

        def read(place: int) -> None:
            out[place] = self.read(*where[place])

        list(fetch(read, range(len(i))))
        return torch.from_numpy(out)

    def batch(
        self,
        indices: Tensor,
        flips: Tensor | None = None,
        noise: Tensor | None = None,
        fetch: Fetch = map,
    ) -> tuple[Tensor, Tensor]:
        """A draw: int64 (B,), bool (B,), normal (B, C, h, w) -> x0, labels (B,)."""
        x, log_variance = self.moments(indices, flips, fetch).float().unbind(1)
        if noise is not None:
            x = x + torch.exp(log_variance / 2) * noise
        return x * self.scale, self.labels[indices]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = range(len(self))[index]
        mean = self.moments(torch.tensor([index]))[0, 0].float()
        return mean * self.scale, int(self.labels[index])

    def check_vae(self, vae: Any) -> None:
        """Refuse an autoencoder with another encoder: ValueError."""
        identity = vae_identity(vae, "this autoencoder")
        check_encoder(self.vae, identity, f"the latents in {self.path}")


def verify_store(path: str | Path) -> list[str]:
    """What is wrong with a store, of which every byte is read, or an empty list."""
    try:
        record = read_manifest(path)
        shards = _parse_manifest(Path(path), record).shards
    except (OSError, ValueError) as error:
        return [str(error)]
    found = (_damage(Path(path) / one.name, record, one) for one in shards)
    return [damage for damage in found if damage]


def _damage(file: Path, record: dict[str, Any], shard: Shard) -> str | None:
    try:
        map_shard(file, shard_shape(record, shard.images))
        changed = sha256(file) != shard.sha256
    except (OSError, ValueError) as error:
        return str(error)
    return f"{file} has changed; delete it and encode again" if changed else None
