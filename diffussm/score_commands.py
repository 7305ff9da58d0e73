"""Commands that score.

Generated from book/95_score_commands.md by `make export`: edit there.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from diffussm.command_line import (
    check_device,
    check_new,
    interruptible,
    nothing_kept,
    refuse_idle,
)
from diffussm.files import write_json
from diffussm.guards import explain

__all__ = ["evaluate", "statistics", "bound", "neighbours"]


def evaluate(
    samples: list[Path],
    given: set[str],
    *,
    reference: Path | None = None,
    features: Literal["inception", "dinov2", "pixels", "random"] = "inception",
    held_out: Path | None = None,
    weights: Path | None = None,
    size: PositiveInt | None = None,
    exif_rotate: bool = False,
    batch_size: PositiveInt = 64,
    device: str | None = None,
    out: Path | None = None,
    extrapolate: bool = False,
    acceptance: Path | None = None,
    self_test: bool = False,
) -> int:
    """score a set of samples: FID, sFID, IS, precision, recall, or others

    Compare samples with a reference: by ADM's protocol, or on --features that need no
    download. The latter come with the same scores of real images.

    Args:
        samples: folders of PNG files or .npz files; several: drawn with other seeds
        reference: images (also digits/train), a .npz, or statistics
        features: Inception's, DINOv2's, pixels (composition), random filters (texture)
        held_out: other real images, for the noise floor; default: half the reference
        weights: Inception's weights, or DINOv2's, a file
        size: crop images to size x size, as ADM does
        exif_rotate: turn photographs as their EXIF tag says (ADM does not)
        batch_size: images at once
        device: DEVICE
        out: a .json file to write
        extrapolate: add the FID extended to infinitely many samples
        acceptance: folder of ADM's published samples; our scores beside ADM's, alone
        self_test: check the metrics, and nothing else
    """
    alone = self_test or acceptance is not None
    if alone == bool(samples) or alone == bool(reference):
        told = "give SAMPLES and --reference, or --self_test or --acceptance alone"
        raise ValueError(told)
    if out is not None and not self_test:
        _check_result(out, samples)
    network = {"weights": weights, "batch_size": batch_size}
    if reference is None:
        refuse_idle(given, "beside --self_test", self_test)
        refuse_idle(given, "beside --acceptance", acceptance)
        return _accept(acceptance, out, network, device) if acceptance else _self_test()
    _check_turned(given, *samples, reference)
    known = _NETWORKS.get(features)
    refuse_idle(given, "for a network's features", known)
    refuse_idle(given, "for features without a network", not known)
    how: dict[str, Any] = {"size": size, "exif_rotate": exif_rotate}
    if not known:
        how |= {"held_out": held_out}
    else:
        how |= network | {"device": _chosen(device), "extrapolate": extrapolate}
    with interruptible(nothing_kept):
        result = _result_of(samples, reference, features, how)
    return _told(result, out)


def _told(result: dict[str, Any], out: Path | None) -> int:
    if out is not None:
        write_json(out, result)
    print(json.dumps(result, indent=2))
    return 0


_NETWORKS = {"inception": "Inception", "dinov2": "DINOv2"}


def _extractor(features: str, how: dict[str, Any]) -> dict[str, Any]:
    """`how`, with the extractor of features that are not Inception's."""
    if features == "inception":
        return how
    from diffussm.trust import load_dinov2

    return how | {"extractor": load_dinov2(how["weights"], how["device"])}


def _result_of(
    samples: list[Path], reference: Path, features: str, how: dict[str, Any]
) -> dict[str, Any]:
    """By ADM's protocol on a network's features, or on features without one."""
    if features in _NETWORKS:
        from diffussm import evaluation

        drawn = samples if len(samples) > 1 else samples[0]
        return evaluation.evaluate(drawn, reference, **_extractor(features, how))
    from diffussm.plain_scores import plain_scores, real_images

    held_out = how.pop("held_out")
    rest = None if held_out is None else real_images(held_out)
    how["features"] = features
    return plain_scores(samples, real_images(reference), held_out=rest, **how)


def _accept(
    folder: Path, out: Path | None, network: dict[str, Any], device: str | None
) -> int:
    from diffussm import evaluation
    from diffussm.trust import acceptance, acceptance_files

    samples, reference = acceptance_files(folder)
    with interruptible(nothing_kept):
        how = network | {"device": _chosen(device)}
        found = evaluation.evaluate(samples, reference, **how)
    compared = acceptance(found)
    _told(compared | {"evaluation": found}, out)
    return 0 if compared["accepted"] else 1


def _check_result(out: Path, samples: Sequence[Path]) -> None:
    """ValueError unless the scores of these sets can be written there."""
    other = out.with_suffix(".scores.json")
    if out in [path.with_suffix(".json") for path in samples]:
        raise ValueError(f"{out} is for the record of a set; take {other}")
    check_new(out, ".json")


def statistics(
    data: Path,
    out: Path,
    given: set[str],
    *,
    features: Literal["inception", "dinov2"] = "inception",
    weights: Path | None = None,
    size: PositiveInt | None = None,
    exif_rotate: bool = False,
    batch_size: PositiveInt = 64,
    device: str | None = None,
) -> int:
    """store the statistics of a reference, for evaluate

    Store what evaluate needs to know of a reference.

    Args:
        data: a folder of images, class folders, a zip, an LMDB, or a .npz file
        out: the .npz file to write
        features: Inception's or DINOv2's
        weights: Inception's weights, or DINOv2's, a file
        size: crop images to size x size, as ADM does
        exif_rotate: turn photographs as their EXIF tag says (ADM does not)
        batch_size: images at once
        device: DEVICE
    """
    check_new(out, ".npz")
    _check_turned(given, data)
    from diffussm.features import save_statistics

    how: dict[str, Any] = {"size": size, "exif_rotate": exif_rotate}
    how |= {"weights": weights, "batch_size": batch_size, "device": _chosen(device)}
    with interruptible(nothing_kept):
        save_statistics(data, out, **_extractor(features, how))
    print(f"wrote {out}")
    return 0


def _check_turned(given: set[str], *pictures: Path) -> None:
    packed = all(path.suffix == ".npz" for path in pictures)
    refuse_idle(given, "for .npz files, whose pictures are as they are", packed)


def _chosen(device: str | None) -> str:
    check_device(device)
    from torch import cuda

    return device or ("cuda" if cuda.is_available() else "cpu")


def _self_test() -> int:
    from diffussm import metrics

    with explain("the metrics are wrong here", AssertionError):
        metrics.self_test()
    print("the metrics give what they must on data with known answers")
    return 0


def _weights_of(
    run: Path | None, pretrained: str | None, weights: str, step: int | None
) -> tuple[Any, Any, Sequence[str]]:
    """Network, recipe and class names of a run, or of weights in the box."""
    from diffussm.pretrained import load_pretrained
    from diffussm.run_folder import load_run

    if pretrained is None:
        return load_run(run or "", weights, step)
    box = load_pretrained(pretrained)
    return box.model(), box.recipe, box.data["classes"]


def bound(
    run: Path | None,
    given: set[str],
    *,
    pretrained: str | None = None,
    held_out: str = "",
    count: PositiveInt = 64,
    steps: PositiveInt = 250,
    weights: Literal["ema", "model"] = "ema",
    step: NonNegativeInt | None = None,
    device: str | None = None,
) -> int:
    """say how many bits held-out images cost a run, at most

    The variational bound on images that the run does not see, in bits per dimension.

    Args:
        run: folder of the run
        pretrained: instead of a run, weights in the package: digits or emoji
        held_out: images as --data names them; default: those of digits and openmoji
        count: so many of them, at the most
        steps: length of the chain, at most that of training
        weights: moving average or raw
        step: the checkpoint to take; default: the newest
        device: DEVICE
    """
    from diffussm.recipes import open_held_out
    from diffussm.watching import held_out_bits

    if pretrained is not None:
        refuse_idle(given, "beside --pretrained")
    model, recipe, names = _weights_of(run, pretrained, weights, step)
    data = open_held_out(held_out, recipe, names, (run or Path("run")).parent)
    model, steps = model.to(_chosen(device)).eval(), min(steps, recipe.timesteps)
    with interruptible(nothing_kept):
        told: dict[str, Any] = dict(held_out_bits(model, recipe, data, count, steps))
    told |= {"images": min(count, len(data)), "steps": steps, "weights": weights}
    print(json.dumps(told, indent=2))
    return 0


def neighbours(
    samples: Path,
    *,
    train: Path,
    held_out: Path,
    sheet: Path,
    features: Literal["pixels", "random"] = "pixels",
    count: PositiveInt = 1000,
    size: PositiveInt | None = None,
    exif_rotate: bool = False,
    mirrored: bool = False,
    out: Path | None = None,
) -> int:
    """look for copies: the nearest training image of each sample, as a sheet

    Lay samples beside the training images nearest to them, and held-out images beside
    theirs. A model that copies has samples nearer than held-out images are.

    Args:
        samples: a folder of PNG files or a .npz file
        train: the images that the run was trained on (also digits/train)
        held_out: as real, but not among them (also digits/test)
        sheet: a PNG file to write: the nearest pairs and their distances
        features: of what distances are: pixels (means of fields), random filters
        count: so many samples are looked at, at the most
        size: crop images to size x size, as ADM does
        exif_rotate: turn photographs as their EXIF tag says, as such a run sees them
        mirrored: compare with mirrored training images too, as a run with --flip sees
        out: a .json file to write
    """
    check_new(sheet, ".png", ".PNG")
    if out is not None:
        _check_result(out, [samples])
    from diffussm.neighbours import find_copies, save_sheet
    from diffussm.plain_scores import real_images

    how: dict[str, Any] = {"features": features, "count": count}
    how |= {"size": size, "exif_rotate": exif_rotate, "mirrored": mirrored}
    with interruptible(nothing_kept):
        real = real_images(train), real_images(held_out)
        drawn, others, told = find_copies(samples, *real, **how)
        save_sheet(drawn, others, sheet)
    if out is not None:
        write_json(out, told)
    print(json.dumps(told, indent=2))
    return 0
