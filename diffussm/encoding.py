"""Encoding.

Generated from book/59_encoding.md by `make export`: edit there.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from diffussm.autoencoder import moments, vae_identity
from diffussm.data import Dataset
from diffussm.files import read_json, sha256, whole_file, write_json
from diffussm.folders import Skipped, StoredImages
from diffussm.guards import expect_int, expect_same, refuse
from diffussm.images import BadImage
from diffussm.latents import (
    FORMAT,
    LatentStore,
    map_shard,
    npy_header,
    parse_shard,
    read_record,
    shard_shape,
    with_checksum,
)

__all__ = ["make_plan", "encode"]


def make_plan(
    source: Dataset,
    identity: dict[str, Any],
    *,
    batch_size: int,
    shard_size: int,
    flip: bool,
) -> dict[str, Any]:
    """All that decides a store; ValueError if images do not fit the autoencoder."""
    height, width, h, w = _sizes(source, identity["downsampling"])
    data = {"images": len(source), "sha256": _fingerprint(source)}
    return {
        "format": FORMAT,
        "vae": identity,
        "data": {"kind": type(source).__name__, **data},
        "image_size": [height, width],
        "shape": [identity["latent_channels"], h, w],
        "flip": flip,
        "exif_rotate": bool(getattr(source, "exif_rotate", False)),
        "batch_size": batch_size,
        "shard_size": shard_size,
        "classes": list(source.classes),
    }


def _sizes(source: Dataset, factor: int) -> tuple[int, int, int, int]:
    """Height and width of images and of latents."""
    size = getattr(source, "size", None)
    height, width = (size, size) if size else source[0][0].shape[-2:]
    if height % factor or width % factor:
        raise ValueError(f"{height} x {width} pixels: expected multiples of {factor}")
    return height, width, height // factor, width // factor


def _fingerprint(source: Dataset) -> str:
    """What tells a data set from others; in memory there are no names, but pixels."""
    if isinstance(source, StoredImages):
        return source.fingerprint
    digest = hashlib.sha256()
    for i in range(len(source)):
        image, label = source[i]
        digest.update(b"%b%d\n" % (image.contiguous().numpy().tobytes(), label))
    return digest.hexdigest()


def _settle(out: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """The plan of folder `out`: this one if it is new, the one there if it is alike."""
    out.mkdir(parents=True, exist_ok=True)
    present = {path.name for path in out.glob("[!.]*")}
    if "plan.json" not in present:
        refuse(present, f"{out} is not empty and holds no latents; choose a new folder")
        _write(out / "plan.json", plan)
        return plan
    theirs = read_record(out / "plan.json", "the plan")
    expect_same(
        f"{out} holds other latents:", _flat(plan), _flat(theirs), "Choose a new folder"
    )
    return theirs


_MAY_DIFFER = ("vae.name", "vae.decoder_sha256", "data.kind")


def _flat(plan: dict[str, Any]) -> dict[str, Any]:
    """The entries of a plan by dotted names, without those that may differ."""
    flat: dict[str, Any] = {}
    for key, value in plan.items():
        nested = value if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{inner}".rstrip("."): one for inner, one in nested.items()}
    return {key: value for key, value in flat.items() if key not in _MAY_DIFFER}


def encode(
    source: Dataset,
    out: str | Path,
    vae: Any,
    vae_name: str | Path,
    *,
    batch_size: int = 16,
    shard_size: int = 8192,
    flip: bool = True,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 4,
    progress: bool = True,
) -> LatentStore | None:
    """Write the latent store of all images into folder `out`, or what is missing of it.

    Process `rank` of `world_size` makes the shards rank, rank + world_size, ...; the
    bytes depend neither on how many there are nor on how often they were killed. `flip`
    stores the moments of the mirrored images too. Broken images are left out and
    listed. `workers` threads read ahead.

    Returns the store, or None while other processes are still at work. Raises
    ValueError when `out` holds something else, or another process makes these shards.
    """
    sizes = {"batch_size": batch_size, "shard_size": shard_size}
    for name, size in {**sizes, "workers": workers}.items():
        expect_int(name, size, least=1)
    expect_int("rank", rank, least=0, most=world_size - 1)
    out, identity = Path(out), vae_identity(vae, vae_name)
    plan = _settle(out, make_plan(source, identity, **sizes, flip=flip))
    _remove_stale(out, rank, world_size)
    shards = math.ceil(len(source) / shard_size)
    mine = range(rank, shards, world_size)
    for number in tqdm(mine, unit="shard", disable=not progress or rank > 0):
        if _finished(out, plan, number) is None:
            _encode_shard(source, vae, out, plan, number, workers)
    records = [_finished(out, plan, number) for number in range(shards)]
    if None in records:
        return None
    _write(out / "manifest.json", with_checksum({**plan, "shards": records}))
    return LatentStore(out)


def _encode_shard(
    source: Dataset,
    vae: Any,
    out: Path,
    plan: dict[str, Any],
    number: int,
    workers: int,
) -> None:
    """Write one shard, then its record."""
    first, size = number * plan["shard_size"], plan["batch_size"]
    indices = range(first, min(first + plan["shard_size"], len(source)))
    labels: list[int] = []
    skipped: list[Skipped] = []
    path = out / f"shard-{number:05d}.npy"
    with whole_file(path) as draft, draft.open("wb") as file:
        _hold(file)
        file.write(npy_header(shard_shape(plan, len(indices))))
        for batch in _read_ahead(partial(_read, source), indices, size, workers):
            skipped += [item for item in batch if isinstance(item, Skipped)]
            good = [item for item in batch if not isinstance(item, Skipped)]
            if good:
                file.write(_encoded(vae, [image for image, _ in good], plan["flip"]))
                labels += [label for _, label in good]
        file.seek(0)  # now that the number of good images is known
        file.write(npy_header(shard_shape(plan, len(labels))))
        refuse(not draft.exists(), f"{draft} {_REMOVED}", FileNotFoundError)
    _write(path.with_suffix(".json"), _record(path, labels, skipped))


def _record(path: Path, labels: list[int], skipped: list[Skipped]) -> dict[str, Any]:
    return {
        "name": path.name,
        "images": len(labels),
        "sha256": sha256(path),
        "labels": [[label, len(list(run))] for label, run in groupby(labels)],
        "skipped": skipped,
    }


def _encoded(vae: Any, images: list[Tensor], flip: bool) -> bytes:
    """The moments of images (3, H, W), as they lie in a shard: (B, F, 2, C, h, w)."""
    x = torch.stack(images)
    versions = [x, x.flip(-1)] if flip else [x]
    block = torch.stack([moments(vae, version) for version in versions], 1)
    return block.numpy().tobytes()


def _read(source: Dataset, index: int) -> tuple[Tensor, int] | Skipped:
    """An image and its label, or why there is none."""
    stored = source if isinstance(source, StoredImages) else None
    try:
        if stored is None:
            return source[index]
        return stored.read(index), int(stored.labels[index])
    except BadImage as error:
        name = stored.name(index) if stored else str(index)
        return Skipped(name, re.sub(r" at 0x[0-9a-f]+", "", str(error)))


def _read_ahead(
    read: Callable[[int], Any], indices: range, size: int, workers: int
) -> Iterator[list[Any]]:
    """Batches of what `read` gives; the next is being read while one is used."""
    with ThreadPoolExecutor(workers) as pool:
        ahead = [pool.submit(read, i) for i in indices[:size]]
        for first in range(size, len(indices) + size, size):
            following = indices[first : first + size]
            batch, ahead = ahead, [pool.submit(read, i) for i in following]
            yield [item.result() for item in batch]


def _finished(out: Path, plan: dict[str, Any], number: int) -> dict[str, Any] | None:
    """The record of a shard that is complete on disk."""
    path = out / f"shard-{number:05d}.json"
    try:
        record: dict[str, Any] = read_json(path, "the record")
        shard = parse_shard(record, number, len(plan["classes"]))
        map_shard(path.with_suffix(".npy"), shard_shape(plan, shard.images))
    except (OSError, ValueError):
        return None
    return record


_REMOVED = "was removed while it was written, as another process does that starts here"


def _remove_stale(out: Path, rank: int, world_size: int) -> None:
    """ValueError if a shard of ours is being made by another process."""
    for stale in out.glob(".*.tmp*"):
        found = re.search(r"shard-(\d{5})", stale.name)
        number = int(found[1]) if found else 0
        if number % world_size == rank:
            with suppress(FileNotFoundError):
                with stale.open("r+b") as file:
                    busy = f"another process is making shard {number} of {out}"
                    refuse(not _hold(file), f"{busy}: wait for it, or stop it")
                stale.unlink()


def _hold(file: BinaryIO) -> bool:
    """Lock a draft until it is closed, or its process ends; False if it is locked."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # a system or a disk that has no such lock
        pass
    return True


def _write(path: Path, value: dict[str, Any]) -> None:
    try:
        write_json(path, value)
    except FileNotFoundError:  # a process that starts has removed the draft
        write_json(path, value)
