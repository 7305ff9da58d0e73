"""Latents.

Generated from book/54_latents.md by `make export`: edit there.
"""

import hashlib
import io
import json
import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from diffussm.autoencoder import check_encoder, vae_identity
from diffussm.data import (
    EXTENSIONS,
    WHITE,
    BadImage,
    ImageFolder,
    StoredImages,
    is_folder,
    visible,
)
from diffussm.files import read_json, sha256

__all__ = [
    "FORMAT",
    "shard_shape",
    "npy_header",
    "open_shard",
    "with_checksum",
    "read_manifest",
    "OLD_FORMAT",
    "ENCODE_AGAIN",
    "shard_flaws",
    "LatentStore",
    "LmdbImages",
    "images_from",
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


def open_shard(path: Path, shape: Sequence[int]) -> np.ndarray:
    """Map a shard into memory: float16, read-only, exactly of this shape.

    Raises ValueError or OSError for any other file; nothing in it is interpreted.
    """
    header = npy_header(shape)
    expected, size = len(header) + 2 * math.prod(shape), path.stat().st_size
    if size != expected:
        raise ValueError(
            f"{path} has {size} bytes, expected {expected}: truncated, or of another "
            "store"
        )
    content = np.memmap(path, np.uint8, "r").view(np.ndarray)
    if content[: len(header)].tobytes() != header:
        raise ValueError(
            f"{path} does not begin as a float16 array of shape {tuple(shape)}"
        )
    return content[len(header) :].view("<f2").reshape(shape)


def with_checksum(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a checksum of all its other entries."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return content | {"checksum": digest}


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a store; ValueError or OSError unless every entry is sound."""
    file = Path(path) / "manifest.json"
    if not file.is_file():
        unfinished = (Path(path) / "plan.json").is_file()
        advice = "it is unfinished: run the same encode again" if unfinished else ""
        raise FileNotFoundError(f"there is no {file}; {advice or 'is it a store?'}")
    manifest: dict[str, Any] = read_json(file, "the manifest")
    if wrong := next(_flaws(manifest), None):
        raise ValueError(f"{file}: {wrong}")
    return manifest


OLD_FORMAT = "diffussm-latents-1"
ENCODE_AGAIN = (
    f"this is a store of the format {OLD_FORMAT}, which did not tell encoder and "
    "decoder apart and turned images by EXIF; encode the images again, into a new "
    "folder"
)


def _natural(value: Any, least: int = 0, most: int = 2**40) -> bool:
    return type(value) is int and least <= value <= most


def _flaws(m: Any) -> Iterator[str]:
    """What is wrong; a check may rely on all before it, so take one flaw and stop."""
    if isinstance(m, dict) and m.get("format") == OLD_FORMAT:
        yield ENCODE_AGAIN
    if not isinstance(m, dict) or m.get("format") != FORMAT:
        yield f"is not the manifest of a latent store ({FORMAT})"
    if m.get("checksum") != with_checksum(m)["checksum"]:
        yield "its checksum does not fit its content; it was changed or damaged"
    vae, shape, classes, shards = (
        m.get(key) for key in ("vae", "shape", "classes", "shards")
    )
    if not isinstance(vae, dict) or not isinstance(vae.get("encoder_sha256"), str):
        yield f"vae is {vae!r:.80}; expected an identity with its encoder_sha256"
    scale = vae.get("scaling_factor")
    if type(scale) not in (int, float) or not 1e-6 < scale < 1e6:
        yield f"scaling_factor is {scale!r:.80}; expected a positive number"
    if (
        not isinstance(shape, list)
        or len(shape) != 3
        or not all(_natural(side, 1, 2**16) for side in shape)
    ):
        yield f"shape is {shape!r:.80}; expected three positive integers"
    if not isinstance(m.get("flip"), bool):
        yield f"flip is {m.get('flip')!r:.80}; expected true or false"
    if not isinstance(classes, list) or not all(
        isinstance(name, str) for name in classes
    ):
        yield f"classes are {classes!r:.80}; expected names"
    if not isinstance(shards, list) or not shards:
        yield "has no shards"
    for number, shard in enumerate(shards):
        yield from shard_flaws(shard, number, len(classes))
    if sum(shard["images"] for shard in shards) == 0:
        yield "has no images"


def shard_flaws(shard: Any, number: int, classes: int) -> Iterator[str]:
    """What is wrong with the record of a shard, of whose manifest the rest is sound."""
    name = f"shard-{number:05d}.npy"  # known beforehand: no record leads elsewhere
    if not isinstance(shard, dict) or shard.get("name") != name:
        yield f"shard {number} is {shard!r:.80}; expected a name, {name!r}, and more"
    if not _natural(shard.get("images")) or not isinstance(shard.get("sha256"), str):
        yield f"{name} has no count of images or no sha256"
    runs = shard.get("labels")
    if not isinstance(runs, list) or not all(
        isinstance(run, list) and len(run) == 2 for run in runs
    ):
        yield f"the labels of {name} are not pairs of label and count"
    if not all(
        _natural(label, 0, max(classes - 1, 0)) and _natural(count, 1)
        for label, count in runs
    ):
        yield f"{name} has labels outside the {classes} classes"
    if sum(count for _, count in runs) != shard["images"]:
        yield f"the labels of {name} are not as many as its images"


class LatentStore:
    """The latents of a data set, drawn anew at each visit: a `Dataset`.

    Attributes:
        classes, num_classes, flip: see `Dataset`; flip: mirrored images are stored too.
        labels: int64 (n,). shape: (C, h, w). scale: latents are multiplied by it.
        vae: see `vae_identity`. manifest: all of `manifest.json`.
        fingerprint: its checksum.

    Raises ValueError or OSError for a store that is incomplete, damaged or not one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.vae: dict[str, Any] = self.manifest["vae"]
        self.scale = float(self.vae["scaling_factor"])
        self.shape = tuple(self.manifest["shape"])
        self.flip: bool = self.manifest["flip"]
        self.classes = tuple(self.manifest["classes"])
        self.num_classes = len(self.classes)
        self.fingerprint: str = self.manifest["checksum"]
        self._open(self.manifest["shards"])

    def __len__(self) -> int:
        return len(self.labels)

    def _open(self, shards: list[dict[str, Any]]) -> None:
        self._shards = [
            open_shard(
                self.path / one["name"], shard_shape(self.manifest, one["images"])
            )
            for one in shards
        ]
        self._ends = np.cumsum([one["images"] for one in shards])
        runs = torch.tensor([run for one in shards for run in one["labels"]])
        self.labels = torch.repeat_interleave(runs[:, 0], runs[:, 1])

    def moments(self, indices: Tensor, flips: Tensor | None = None) -> Tensor:
        """Stored moments: int64 (B,), bool (B,) -> float16 (B, 2, C, h, w)."""
        i = indices.numpy()
        if len(i) and not 0 <= i.min() <= i.max() < len(self):
            raise IndexError(
                f"indices {i.min()} to {i.max()}; the store has {len(self)} images"
            )
        numbers = np.searchsorted(self._ends, i, side="right")
        counts = [len(self._shards[number]) for number in numbers]
        rows = i - self._ends[numbers] + counts
        sides = np.zeros(len(i), int)
        if flips is not None and self.flip:
            sides = flips.numpy().astype(int)
        out = np.empty((len(i), 2, *self.shape), np.float16)
        where = zip(numbers.tolist(), rows.tolist(), sides.tolist(), strict=True)
        for place, (number, row, side) in zip(out, where, strict=True):
            place[...] = self._shards[number][row, side]
        return torch.from_numpy(out)

    def batch(
        self, indices: Tensor, flips: Tensor | None, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A draw: int64 (B,), bool (B,), normal (B, C, h, w) -> x0, labels (B,)."""
        mean, log_variance = self.moments(indices, flips).float().unbind(1)
        x0 = (mean + torch.exp(log_variance / 2) * noise) * self.scale
        return x0, self.labels[indices]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = range(len(self))[index]
        mean = self.moments(torch.tensor([index]))[0, 0].float()
        return mean * self.scale, int(self.labels[index])

    def check_vae(self, vae: Any) -> None:
        """Refuse an autoencoder with another encoder: ValueError."""
        identity = vae_identity(vae, "this autoencoder")
        check_encoder(self.vae, identity, f"the latents in {self.path}")


class LmdbImages(StoredImages):
    """The images of an LMDB, keys to encoded files, as LSUN distributes them: a `Dataset` without classes.

    They come in the order of their keys. A broken record is stepped over and listed in ``skipped`` by its
    key, see :class:`diffussm.data.StoredImages`. Reads are safe from several threads, and the object can be
    pickled: it opens the database again where it arrives. Needs the package ``lmdb``.

    Raises FileNotFoundError, OSError, ValueError: no LMDB there, a damaged one, an empty one.
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
            keys = list(reading.cursor().iternext(keys=True, values=False))
        if not keys:
            raise ValueError(f"{self.root} is an empty LMDB; expected encoded images")
        # One block of bytes: LSUN's bedrooms have three million keys.
        self._keys = b"".join(keys)
        self._ends = np.cumsum([0] + [len(key) for key in keys])
        self.labels = torch.zeros(len(keys), dtype=torch.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_env"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._env = _open_lmdb(self.root)

    def key(self, index: int) -> bytes:
        """The key of image `index`."""
        index = range(len(self))[index]
        return self._keys[self._ends[index] : self._ends[index + 1]]

    def name(self, index: int) -> str:
        """The key of image `index` as text."""
        return self.key(index).decode(errors="backslashreplace")

    def _content(self, index: int) -> bytes:
        import lmdb

        try:
            with self._env.begin() as reading:
                content = reading.get(self.key(index))
        except lmdb.Error as error:
            raise OSError(
                f"record {self.name(index)!r} of {self.root} cannot be read: {error}"
            ) from error
        if content is None:
            raise BadImage("no longer there")
        return bytes(content)

    def _facts(self) -> Iterator[bytes]:
        yield self._keys
        yield self._ends.astype("<i8").tobytes()


# LMDB opens a file only once in a process; whoever asks again shares it.
_OPEN: WeakValueDictionary[tuple[int, int], Any] = WeakValueDictionary()


def _open_lmdb(root: str) -> Any:
    import lmdb

    data = Path(root) / "data.mdb" if Path(root).is_dir() else Path(root)
    if not data.is_file():
        raise FileNotFoundError(f"there is no {data}; expected the folder of an LMDB")
    _check_lmdb(data)
    file = (data.stat().st_dev, data.stat().st_ino)
    try:
        environment = _OPEN.get(file)
        if environment is None:
            environment = lmdb.open(
                str(data), subdir=False, readonly=True, lock=False, readahead=False
            )
            _OPEN[file] = environment
    except lmdb.Error as error:
        raise OSError(f"{data} cannot be read as an LMDB: {error}") from error
    return environment


def _check_lmdb(file: Path) -> None:
    """OSError for a file shorter than its header says: LMDB would end the whole process (bus error)."""
    with file.open("rb") as opened:
        head = opened.read(2 << 16)
    try:
        (page,) = struct.unpack_from("<I", head, 40)
        # The two headers take turns; the newer transaction is the valid one. (magic, last page, transaction)
        metas = [
            struct.unpack_from("<I116xQQ", head, start + 16) for start in (0, page)
        ]
    except struct.error:
        metas = [(0, 0, 0)]
    if any(magic != 0xBEEFC0DE for magic, _, _ in metas):
        raise OSError(f"{file} is no LMDB of a 64-bit machine, or damaged")
    size, needed = (
        file.stat().st_size,
        (max(metas, key=lambda meta: meta[2])[1] + 1) * page,
    )
    if size < needed:
        raise OSError(f"{file} is truncated: {size} of {needed} bytes")


def images_from(
    path: str | Path,
    size: int | None,
    *,
    flip: bool = False,
    conditional: bool | None = None,
    exif_rotate: bool = False,
) -> ImageFolder | LmdbImages:
    """The images below `path`, whatever it is: an LMDB, class folders as in ImageNet, or one plain folder.

    `conditional` says whether the sub-folders are classes; None: they are if no image lies beside them.
    `size` and `exif_rotate`: see :class:`diffussm.data.StoredImages`.
    """
    path = Path(path)
    if path.suffix == ".mdb" or (path / "data.mdb").is_file():
        if conditional:
            raise ValueError(
                f"{path} is an LMDB, which has no classes; omit conditional"
            )
        return LmdbImages(path, size, flip, exif_rotate=exif_rotate)
    if conditional is None and path.is_dir():
        loose = any(
            Path(e.name).suffix.lower() in EXTENSIONS
            for e in visible(path)
            if not is_folder(e)
        )
        conditional = not loose and any(is_folder(entry) for entry in visible(path))
    return ImageFolder(
        path, size, flip=flip, conditional=bool(conditional), exif_rotate=exif_rotate
    )


def verify_store(path: str | Path) -> list[str]:
    """What is wrong with a store, of which every byte is read, or an empty list."""
    try:
        manifest = read_manifest(path)
    except (OSError, ValueError) as error:
        return [str(error)]
    found = (_shard_problem(Path(path), manifest, one) for one in manifest["shards"])
    return [problem for problem in found if problem]


def _shard_problem(
    path: Path, manifest: dict[str, Any], shard: dict[str, Any]
) -> str | None:
    file = path / shard["name"]
    try:
        open_shard(file, shard_shape(manifest, shard["images"]))
        if sha256(file) == shard["sha256"]:
            return None
    except (OSError, ValueError) as error:
        return str(error)
    return f"{file} has changed since it was written; delete it and encode again"
