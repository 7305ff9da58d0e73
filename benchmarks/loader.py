"""The latent store against one ``.npy`` per image: ``python -m benchmarks.loader``.

Both hold the same moments, mean and log-variance in float16, of an image and of its
mirror image, for latents as large as at 256 and 512 pixels. Both are read in the same
random order into batches of 256, from files that lie in the system's cache: the ratio
is what the form of storage costs, not the disk.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import asked_runs, command, report, require_agreement, speed_row
from diffussm.data import batch_flips, batch_indices
from diffussm.files import sha256
from diffussm.latents import FORMAT, LatentStore, verify_store, with_checksum

LIMIT = 10.0
BATCH = 256
SIZES = {32: 4096, 64: 1024}  # side of the latent -> number of images
SHARDS = 8


def write_both(folder: Path, side: int, images: int) -> tuple[LatentStore, Path]:
    """The same random moments as a store, and as files ``<index>_<flip>.npy``."""
    store, files = folder / "store", folder / "files"
    store.mkdir(parents=True)
    files.mkdir()
    shards = []
    generator = np.random.default_rng(0)
    for number, indices in enumerate(np.array_split(np.arange(images), SHARDS)):
        shape = (len(indices), 2, 2, 4, side, side)
        block = generator.standard_normal(shape, np.float32).astype(np.float16)
        name = f"shard-{number:05d}.npy"
        np.save(store / name, block)
        shards.append(
            {
                "name": name,
                "images": len(indices),
                "sha256": sha256(store / name),
                "labels": [[0, len(indices)]],
            }
        )
        for index, pair in zip(indices.tolist(), block, strict=True):
            for flip in (0, 1):
                np.save(files / f"{index}_{flip}.npy", pair[flip])
    vae = {"encoder_sha256": "none: random numbers", "scaling_factor": 0.18215}
    manifest = {
        "format": FORMAT,
        "vae": vae,
        "shape": [4, side, side],
        "flip": True,
        "classes": [],
        "shards": shards,
    }
    (store / "manifest.json").write_text(json.dumps(with_checksum(manifest)))
    if problems := verify_store(store):
        raise RuntimeError(f"the store for the benchmark is not sound: {problems}")
    return LatentStore(store), files


def read_files(files: Path, indices: Tensor, flips: Tensor) -> Tensor:
    """What most loaders do: open, parse and read a file for each image, then stack."""
    paths = (
        files / f"{i}_{f}.npy"
        for i, f in zip(indices.tolist(), flips.int().tolist(), strict=True)
    )
    return torch.from_numpy(np.stack([np.load(path) for path in paths]))


def main(argv: list[str] | None = None) -> int:
    runs = asked_runs("loader", __doc__, argv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for side, images in SIZES.items():
            store, files = write_both(Path(folder, str(side)), side, images)
            steps = images // BATCH
            batches = [
                (
                    batch_indices(images, BATCH, step, 0),
                    batch_flips(images, BATCH, step, 0),
                )
                for step in range(steps)
            ]
            for indices, flips in batches:
                require_agreement(
                    "moments",
                    read_files(files, indices, flips),
                    store.moments(indices, flips),
                    0.0,
                )

            def one_by_one(files: Path = files, batches: list = batches) -> None:
                for indices, flips in batches:
                    read_files(files, indices, flips)

            def from_store(store: LatentStore = store, batches: list = batches) -> None:
                for indices, flips in batches:
                    store.moments(indices, flips)

            row = speed_row(
                f"one epoch of {images:,} latents 4 × {side} × {side}",
                ("one .npy per image", one_by_one),
                ("latent store", from_store),
                at_least=LIMIT,
                runs=runs,
            )
            for name in ("one .npy per image", "latent store"):
                rate = (
                    images
                    / sorted(row["seconds"][name])[len(row["seconds"][name]) // 2]
                )
                row[name] += f", {rate:,.0f} images/s"
            rows.append(row)
    title = f"Reading moments in random order, batches of {BATCH}, files in the cache"
    settings = {"batch": BATCH, "shards": SHARDS, "runs": runs, "images": SIZES}
    return report("loader", title, rows, settings=settings)


if __name__ == "__main__":
    raise SystemExit(command(main))
