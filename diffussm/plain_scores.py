"""Scores without Inception.

Generated from book/58_plain_scores.md by `make export`: edit there.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from diffussm.data import digits, generator
from diffussm.evaluation import facts_of, versions
from diffussm.features import NEIGHBOURS, Extractor, load_reference, statistics
from diffussm.guards import expect_int, expect_one_of
from diffussm.image_sets import ImageSet, Source
from diffussm.metrics import frechet_distance, kernel_distance
from diffussm.pictures import to_uint8

__all__ = [
    "FEATURES",
    "named_features",
    "against_real",
    "as_images",
    "real_images",
    "plain_scores",
]


class _Pixels:
    """Means over 8 x 8 fields of an image; an `Extractor`."""

    name = "pixels"
    sees = "what colour lies where, as means over 8 x 8 fields; no detail"
    checksum = "8 x 8"

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) -> "pool" (B, 192)."""
        x = images.float() / 127.5 - 1
        return {"pool": functional.adaptive_avg_pool2d(x, 8).flatten(1)}


_FILTERS = 64
_SCALES = 3


class _RandomEdges:
    """How strongly random filters answer, eq-plain-scores-edges; an `Extractor`."""

    name = "random"
    sees = "how much edge and texture there is at three scales; not where, no colour"

    def __init__(self, seed: int = 0) -> None:
        shape, self.seed = (_SCALES, _FILTERS, 3, 3, 3), seed
        filters = torch.randn(shape, generator=generator(seed, "random features", 0))
        filters -= filters.mean((3, 4), keepdim=True)
        self.filters = filters / filters.flatten(2).norm(dim=2)[..., None, None, None]
        numbers = (self.filters * 2**20).round().int().numpy()
        self.checksum = hashlib.sha256(numbers.tobytes()).hexdigest()

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) -> "pool" (B, 192)."""
        x, found = images.float() / 127.5 - 1, []
        for filters in self.filters:
            around = functional.pad(x, (1, 1, 1, 1), mode="replicate")
            answers = functional.conv2d(around, filters).abs()
            found.append(answers.mean((2, 3)))  # (B, 64)
            x = functional.avg_pool2d(x, 2) if min(x.shape[2:]) > 1 else x
        return {"pool": torch.cat(found, 1)}


FEATURES = {"pixels": _Pixels, "random": _RandomEdges}


def named_features(name: str) -> Extractor:
    """The extractor "pixels" or "random", which need no weights."""
    made: Extractor = FEATURES[expect_one_of("features", name, FEATURES)]()
    return made


_DRAWS = 20
_SEED = 0


def _distances(real: Tensor, others: Tensor) -> dict[str, float]:
    """Both distances of two sets of features (n, d)."""
    clouds = [z.double().numpy() for z in (real, others)]
    moments = [f(z) for z in clouds for f in (_mean, _covariance)]
    return {
        "kid": kernel_distance(real, others),
        "frechet_distance": frechet_distance(*moments),
    }


def _mean(cloud: np.ndarray) -> np.ndarray:
    return np.asarray(cloud.mean(0))


def _covariance(cloud: np.ndarray) -> np.ndarray:
    return np.asarray(np.cov(cloud, rowvar=False))


def _one_draw(
    sets: Sequence[Tensor],
    real: Tensor,
    held_out: Tensor | None,
    count: int,
    number: int,
) -> list[dict[str, float]]:
    """Distances to `count` real images: of each set, and then of other real ones."""
    order = torch.randperm(len(real), generator=generator(_SEED, "real images", number))
    ours, rest = real[order[:count]], real[order[count:]]
    others = rest if held_out is None else held_out
    return [_distances(ours, _some(z, count, number)) for z in (*sets, others)]


def _some(features: Tensor, count: int, number: int) -> Tensor:
    """`count` rows of (n, d), others in each draw."""
    draws = generator(_SEED, "images of a set", number)
    return features[torch.randperm(len(features), generator=draws)[:count]]


def against_real(
    sets: Sequence[Tensor],
    real: Tensor,
    held_out: Tensor | None = None,
    draws: int = _DRAWS,
) -> tuple[int, list[dict[str, Any]]]:
    """Distances of sets of features (n, d) to those of real images, and their floor.

    Returns:
        How many images of each were compared, and for each set {"kid": {"mean",
        "std"}, "frechet_distance": ...} over the draws. The last is of the real images
        `held_out`, or, for None, of the other half of `real`.

    Raises ValueError for fewer than four images.
    """
    half = len(real) // 2 if held_out is None else min(len(real), len(held_out))
    count = min(half, *map(len, sets))
    expect_int("number of images to compare", count, least=2)
    rows = [_one_draw(sets, real, held_out, count, i) for i in range(draws)]
    return count, [_spread(list(found)) for found in zip(*rows, strict=True)]


def _spread(found: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of each distance over the draws."""
    values = {name: np.array([one[name] for one in found]) for name in found[0]}
    return {
        name: {"mean": float(x.mean()), "std": float(x.std(ddof=1))}
        for name, x in values.items()
    }


def as_images(x: Tensor) -> Tensor:
    """(B, 1 or 3, H, W) in [-1, 1] -> uint8 (B, 3, H, W), for an `Extractor`."""
    return torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2)


def real_images(name: str | Path) -> Source:
    """A path; or, where nothing has that name, `digits/train` and `digits/test`."""
    folder, _, split = str(name).rpartition("/")
    if folder == "digits" and split in ("train", "test") and not Path(name).exists():
        return torch.split(as_images(digits(split)[0]), 64)
    return Path(name)


def _features_of(
    source: Source, extractor: Extractor, size: int | None, exif_rotate: bool
) -> tuple[Tensor, dict[str, Any]]:
    """Features (n, d) of real images, or of a file of them, and what was read."""
    how: dict[str, Any] = {"size": size, "exif_rotate": exif_rotate}
    if isinstance(source, str | Path):
        known, kind = load_reference(source, extractor, **how)
        about = {"name": Path(source).name, "kind": kind}
    else:
        images = ImageSet(source, size, exif_rotate)
        known, about = statistics(images, extractor, keep=NEIGHBOURS), {"name": "given"}
    pool = torch.zeros(0, 1) if known.pool is None else known.pool
    return pool, about | {"count": known.count} | known.record


def plain_scores(
    samples: Sequence[Source],
    reference: Source,
    features: str = "pixels",
    *,
    held_out: Source | None = None,
    size: int | None = None,
    exif_rotate: bool = False,
) -> dict[str, Any]:
    """Kernel and Fréchet distance of sets to real images, on `named_features`.

    "samples" has a row for each set; "real" is the same of other real images, see
    `against_real`. `size` and `exif_rotate` as for `ImageSet`.

    Raises ValueError, OSError as `ImageSet` and `load_reference` do.
    """
    extractor = named_features(features)
    facts = [facts_of(one) for one in samples]  # refuses what is not complete
    how: dict[str, Any] = {"size": size, "exif_rotate": exif_rotate}
    real, about = _features_of(reference, extractor, **how)
    rest = None if held_out is None else _features_of(held_out, extractor, **how)
    found = [_features_of(one, extractor, **how) for one in samples]
    sets = [pool for pool, _ in found]
    count, (*rows, floor) = against_real(sets, real, None if rest is None else rest[0])
    read = zip(facts, found, rows, strict=True)
    return {
        "features": _told(extractor, real.shape[1]),
        "compared": {"images": count, "draws": _DRAWS, "seed": _SEED},
        "samples": [fact | record | row for fact, (_, record), row in read],
        "real": floor | {"images": "held out" if rest else "the rest of the reference"},
        "reference": about,
        "held_out": rest[1] if rest else None,
        "notes": _notes(count, [about, *(record for _, record in found)]),
        "versions": versions(),
    }


def _told(extractor: Extractor, dimensions: int) -> dict[str, Any]:
    """Which features these are."""
    told: dict[str, Any] = {"name": extractor.name, "dimensions": dimensions}
    told["sees"] = getattr(extractor, "sees", "")
    return told | {"checksum": extractor.checksum}


def _notes(count: int, records: list[dict[str, Any]]) -> list[str]:
    """What a reader of these scores must be told."""
    about, *others = records
    size, notes = about.get("image_size"), []
    if count < 100:
        notes.append(f"{count} images are few: the floor and its deviation are large")
    for record in records:
        if left_out := record.get("left_out", {}).get("count"):
            notes.append(f"{left_out} images of {record['name']} were left out")
    for record in others:
        if (other := record.get("image_size")) != size:
            notes.append(
                f"{record['name']} has images of {other} pixels, the reference of "
                f"{size}: sharpness differs by that too"
            )
    return notes
