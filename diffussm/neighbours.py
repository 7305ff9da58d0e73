"""The nearest training image.

Generated from book/59_neighbours.md by `make export`: edit there.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffussm.evaluation import facts_of
from diffussm.features import Extractor
from diffussm.guards import expect_int
from diffussm.image_sets import FirstByKey, ImageSet, Source, digests_of, keys_of
from diffussm.pictures import save_grid
from diffussm.plain_scores import named_features

__all__ = [
    "Pairs",
    "nearest_pairs",
    "nearer_than_held_out",
    "find_copies",
    "save_sheet",
]


@dataclass(frozen=True)
class Pairs:
    """Images, those nearest to them, and the distances between them.

    Attributes:
        images, nearest: uint8 (n, 3, H, W).
        distance: float32 (n,), eq-neighbours-distance.
    """

    images: Tensor
    nearest: Tensor
    distance: Tensor


def _distances(f: Tensor, g: Tensor) -> Tensor:
    """eq-neighbours-distance of features (n, d) and (m, d): (n, m)."""
    plain = "donot_use_mm_for_euclid_dist"  # exactly zero for a copy
    distances: Tensor = torch.cdist(f, g, compute_mode=plain)
    return distances / math.sqrt(f.shape[1])


def nearest_pairs(
    images: Tensor,
    known: Iterable[Tensor],
    extractor: Extractor,
    mirrored: bool = False,
) -> Pairs:
    """Each of the images (n, 3, H, W) with the nearest in batches of uint8 images.

    `mirrored`: or the nearest of their mirror images. Raises ValueError for images of
    another size.
    """
    ours = extractor(images)["pool"]
    far = torch.full([len(images)], torch.inf)
    found = Pairs(images, torch.zeros_like(images), far)
    for batch in known:
        _check_sizes(images, batch)
        for other in (batch, batch.flip(-1)) if mirrored else (batch,):
            distance, which = _distances(ours, extractor(other)["pool"]).min(dim=1)
            nearer = distance < found.distance
            found.distance[nearer] = distance[nearer]
            found.nearest[nearer] = other[which[nearer]]
    return found


def _check_sizes(images: Tensor, others: Tensor) -> None:
    ours, theirs = (list(x.shape[2:]) for x in (images, others))
    if ours != theirs:
        raise ValueError(
            f"samples have {ours} pixels, the images to compare with {theirs}: give "
            "--size"
        )


_SHARE = 0.01


def nearer_than_held_out(samples: Pairs, held_out: Pairs) -> float:
    """The share of samples nearer than all but one in a hundred held-out images."""
    limit = held_out.distance.quantile(_SHARE)
    return float((samples.distance < limit).float().mean())


def find_copies(
    samples: Source,
    train: Source,
    held_out: Source,
    *,
    count: int = 1000,
    features: str = "pixels",
    size: int | None = None,
    exif_rotate: bool = False,
    mirrored: bool = False,
) -> tuple[Pairs, Pairs, dict[str, Any]]:
    """Pairs of samples and of held-out images with training images, and what they say.

    Of both sets as many are taken, `count` at the most, chosen by what they show.
    `size` and `exif_rotate` hold for all three sets, as for `ImageSet`.
    Raises ValueError, OSError as `ImageSet` does, and for an unfinished set of samples.
    """
    facts_of(samples)
    extractor = named_features(features)
    cropped = partial(ImageSet, size=size, exif_rotate=exif_rotate)
    sets = [_chosen(cropped(one), count) for one in (samples, held_out)]
    fewest = min(map(len, sets))
    found = [
        nearest_pairs(images[:fewest], cropped(train).batches(), extractor, mirrored)
        for images in sets
    ]
    told = {"features": extractor.name, "images": fewest, "mirrored": mirrored}
    told |= {"samples": _summed(found[0]), "held_out": _summed(found[1])}
    told["nearer_than_held_out"] = nearer_than_held_out(*found)
    return found[0], found[1], told | {"of_held_out": _SHARE}


def _chosen(images: ImageSet, count: int) -> Tensor:
    """At most `count` images of a set, those with the smallest keys."""
    kept, total = FirstByKey(count), 0
    for batch in images.batches():
        kept.add(keys_of(digests_of(batch)), {"images": batch})
        total += len(batch)
    expect_int(f"number of images in {images.name}", total, least=1)
    return kept.read()[1]["images"]


def _summed(pairs: Pairs) -> dict[str, float]:
    """Distances in three numbers."""
    least, median = pairs.distance.min(), pairs.distance.median()
    mean = pairs.distance.mean()
    return {"least": float(least), "median": float(median), "mean": float(mean)}


def save_sheet(
    samples: Pairs, held_out: Pairs, path: str | Path, rows: int = 10
) -> None:
    """The nearest pairs of both as one PNG, samples on the left."""
    both = [(x, x.distance.argsort(stable=True)[:rows]) for x in (samples, held_out)]
    columns = [x[i] for pairs, i in both for x in (pairs.images, pairs.nearest)]
    columns.insert(2, torch.full_like(columns[0], 255))  # between left and right
    sheet = torch.stack(columns, 1).flatten(0, 1) / 127.5 - 1
    numbers = [pairs.distance[i].tolist() for pairs, i in both]
    words = [f"{a:.3f} | {b:.3f}" for a, b in zip(*numbers, strict=True)]
    save_grid(sheet, len(columns), path, words)
