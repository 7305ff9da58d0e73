"""Evaluation.

Generated from book/58_evaluation.md by `make export`: edit there.
"""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffussm import __version__
from diffussm.features import (
    Extractor,
    Inception,
    load_inception,
    load_reference,
    statistics,
)
from diffussm.files import sha256
from diffussm.image_sets import SEED, ImageSet, Source
from diffussm.metrics import FeatureStatistics, protocol, scores
from diffussm.metrics import frechet_distance as frechet_distance
from diffussm.trust import fid_infinity

__all__ = ["evaluate", "facts_of", "versions"]


class _Scored(NamedTuple):
    """One set's scores, how they were computed, what to note, what was read."""

    scores: dict[str, Any]
    protocol: dict[str, Any]
    notes: list[str]
    record: dict[str, Any]


def _score_set(
    images: ImageSet,
    known: FeatureStatistics,
    kind: str,
    extractor: Extractor,
    batch_size: int,
    extrapolate: bool,
) -> _Scored:
    place = getattr(extractor, "device", "cpu")
    found = statistics(images, extractor, batch_size)
    row = scores(found, known, place)
    if extrapolate and found.pool is not None:
        row["fid_infinity"] = fid_infinity(found.pool, known.mu, known.sigma)
    how = protocol(found, known, row, place)
    if "fid_infinity" in row:
        how["fid_infinity"] = {"images_of_the_smallest_subset": found.count // 10}
    for name in how.keys() & {"inception_score", "precision_recall", "kid"}:
        how[name]["seed"] = SEED  # of the keys that order the images
    differs = _differs_from_adm(extractor, how, kind)
    setting = {"batch_size": batch_size, "device": str(place)}
    how = setting | how | {"differs_from_adm": differs}
    counted = row | {"count": found.count}
    notes = _unknown(kind, extractor) + _notes(found, known, how)
    return _Scored(counted, how, notes, found.record)


def _differs_from_adm(
    extractor: Extractor, how: dict[str, Any], kind: str
) -> list[str]:
    """In what these scores were computed otherwise than by ADM's evaluator."""
    inception, pairs = isinstance(extractor, Inception), "precision_recall" in how
    several = how.get("inception_score", {}).get("parts", 1) > 1
    known = {
        "means in float64; ADM's in float32": True,
        "weights converted to PyTorch by torch-fidelity from those of ADM's graph": (
            inception
        ),
        f"the features are those of {extractor.name}, not Inception's": not inception,
        "parts of the Inception score in the order of the images' keys; ADM's in "
        "that of the file": several,
        "distances between features in float32; ADM's in float16 where these are "
        "finite": pairs,
        "the reference's images for precision and recall are others than those in "
        "ADM's file": pairs and kind != "adm",
    }
    return [difference for difference, holds in known.items() if holds]


def _unknown(kind: str, extractor: Extractor) -> list[str]:
    """What to tell of moments that do not say which extractor they are of."""
    told = "it is not known by which network the reference's moments were made"
    named = f"{told}: the scores hold if it was {extractor.name}"
    return [named] if kind == "moments" else []


def _notes(
    found: FeatureStatistics, known: FeatureStatistics, how: dict[str, Any]
) -> list[str]:
    """What a reader of these scores must be told."""
    sets = {"": found.count, " of the reference": known.count}
    notes = [
        f"{count} images{which} for {len(found.mu)} features: the covariance is "
        "singular and the distance far too high; compare it only with others of "
        "the same count"
        for which, count in sets.items()
        if 0 < count <= len(found.mu)
    ]
    fewest = how.get("fid_infinity", {}).get("images_of_the_smallest_subset")
    if fewest is not None and fewest <= len(found.mu):
        notes.append(
            f"fid_infinity: its smallest subset has {fewest} images for "
            f"{len(found.mu)} features, where it is no line: take more images"
        )
    parts = how.get("inception_score", {"parts": 1})
    if parts["parts"] > 1 and parts["last_part"] < parts["part"]:
        notes.append(
            f"the last part of the Inception score has {parts['last_part']} images, "
            f"not {parts['part']}, and counts as much as the others, as in ADM's code"
        )
    for what, record in (("samples", found.record), ("reference", known.record)):
        if left_out := record.get("left_out", {}).get("count"):
            notes.append(
                f"the {what} are not all that lay there: {left_out} were left out"
            )
    ours, theirs = found.record["image_size"], known.record.get("image_size")
    if theirs is not None and ours != theirs:
        notes.append(
            f"the samples have {tuple(ours)} pixels, the reference {tuple(theirs)}: "
            "sets of different sizes differ in sharpness too"
        )
    return notes


def evaluate(
    samples: Source | list[Path],
    reference: str | Path,
    *,
    extractor: Extractor | None = None,
    weights: str | Path | None = None,
    batch_size: int = 64,
    device: str = "cpu",
    how: dict[str, Any] | None = None,
    size: int | None = None,
    exif_rotate: bool = False,
    extrapolate: bool = False,
) -> dict[str, Any]:
    """Score samples against a reference; the result says how it can be repeated.

    `samples` may be a list of sets drawn with different seeds: then each score comes
    with its mean and standard deviation. What `diffussm sample` wrote beside a set goes
    into the result; `how` adds to it. `size` and `exif_rotate` hold for the samples and
    for a reference of images, see `ImageSet`. `extrapolate` adds `fid_infinity`.

    Raises ValueError, OSError as `ImageSet`, `load_reference`, `check_weights` do.
    """
    sources = _sources(samples)
    facts = [facts_of(one) | (how or {}) for one in sources]
    sets = [ImageSet(one, size, exif_rotate) for one in sources]
    extractor = extractor or load_inception(weights, device)
    known, kind = load_reference(reference, extractor, batch_size, size, exif_rotate)
    how_to = (known, kind, extractor, batch_size, extrapolate)
    found = [_score_set(one, *how_to) for one in sets]
    facts = [fact | one.record for fact, one in zip(facts, found, strict=True)]
    return _summary([one.scores for one in found]) | {
        "samples": facts if len(facts) > 1 else facts[0],
        "reference": _about(Path(reference), known, kind),
        "extractor": {"name": extractor.name, "sha256": extractor.checksum},
        "protocol": _one_or_all([one.protocol for one in found]),
        "notes": _all_notes(found),
        "versions": versions(),
    }


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One set's scores as they are; of several, mean, deviation and values of each."""
    result = dict(rows[0])
    for name, value in rows[0].items() if len(rows) > 1 else ():
        if value is not None and name != "count":
            values = np.array([row[name] for row in rows], dtype=np.float64)
            spread = {"mean": values.mean(), "std": values.std(ddof=1)}
            result[name] = spread | {"values": values.tolist()}
    return result


_VERSIONS = ("torch", "torch-fidelity", "numpy")


def _sources(samples: Any) -> list[Any]:
    """The sets, each a place or batches."""
    places = isinstance(samples, list) and all(
        isinstance(one, str | Path) for one in samples
    )
    return list(samples) if places else [samples]


def _about(path: Path, known: FeatureStatistics, kind: str) -> dict[str, Any]:
    file = {"sha256": sha256(path)} if path.is_file() else {}
    named = {"name": path.name, "kind": kind, "count": known.count or None}
    return named | file | known.record


def _one_or_all(protocols: list[dict[str, Any]]) -> Any:
    alike = all(one == protocols[0] for one in protocols)
    return protocols[0] if alike else protocols


def _all_notes(found: list[_Scored]) -> list[str]:
    notes = [note for one in found for note in one.notes]
    if len({one.scores["count"] for one in found}) > 1:
        notes.append(
            "the sets differ in their counts: their scores have different biases, and "
            "so has the mean"
        )
    return list(dict.fromkeys(notes))


def facts_of(source: Source) -> dict[str, Any]:
    """What `diffussm sample` wrote beside a set."""
    if not isinstance(source, str | Path):
        return {"name": "given"}
    path = Path(source)
    packed = path.is_file() or path.suffix == ".npz"
    record = path.with_suffix(".json") if packed else path / "samples.json"
    facts: dict[str, Any] = {"name": path.name}
    if path.is_file():
        facts["sha256"] = sha256(path)
    try:
        written = json.loads(record.read_text())
    except (OSError, ValueError):
        return facts
    if isinstance(written, dict) and written.get("complete") is False:
        raise ValueError(f"{path} is not complete; finish it with `diffussm sample`")
    return facts | (written if isinstance(written, dict) else {})


def versions() -> dict[str, str | None]:
    """The version of each package that computes scores; None: not installed."""
    return {"diffussm": __version__} | {name: _version(name) for name in _VERSIONS}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
