"""Latents.

Generated from book/54_latents.md by `make export`: edit there.
"""

import hashlib
import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffussm.autoencoder import check_encoder, vae_identity
from diffussm.data import Dataset, Fetch
from diffussm.files import read_json, sha256
from diffussm.guards import refuse

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
    refuse(
        size != expected,
        f"{path} has {size} bytes, expected {expected}: truncated, or of another store",
    )
    content = np.memmap(path, np.uint8, "r").view(np.ndarray)
    refuse(
        content[: len(header)].tobytes() != header,
        f"{path} does not begin as a float16 array of shape {tuple(shape)}",
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


class LatentStore(Dataset):
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
        self.levels = None  # latents have no grey levels
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
        self,
        indices: Tensor,
        flips: Tensor | None = None,
        noise: Tensor | None = None,
        fetch: Fetch = map,
    ) -> tuple[Tensor, Tensor]:
        """A draw: int64 (B,), bool (B,), normal (B, C, h, w) -> x0, labels (B,)."""
        x, log_variance = self.moments(indices, flips).float().unbind(1)
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
