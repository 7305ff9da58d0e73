"""Commands from files to files.

Generated from book/95_file_commands.md by `make export`: edit there.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffussm.command_line import (
    check_at_least_one,
    check_new,
    interruptible,
    nothing_kept,
    refuse,
    refuse_idle,
    start,
)
from diffussm.files import apply_umask, whole_folder, write_json

__all__ = ["vae", "encode", "SHOWN", "tell_skipped", "evaluate", "statistics"]


def _check_vae(
    out: Path, size: int, steps: int, batch_size: int, lr: float, seed: int
) -> None:
    check_at_least_one(size=size, steps=steps, batch_size=batch_size)
    told = "--lr lies in (0, 1), --seed is not negative"
    refuse(not 0 < lr < 1 or seed < 0, told)
    full = out.exists() and (not out.is_dir() or any(out.iterdir()))
    refuse(full, f"{out} exists; choose a new folder for the autoencoder")


def _check_evaluate(
    samples: list[Path],
    reference: Path | None,
    out: Path | None,
    self_test: bool,
    given: set[str],
) -> None:
    if self_test:
        refuse_idle(given, "beside --self_test")
    both = self_test == bool(samples) or self_test == bool(reference)
    refuse(both, "give SAMPLES and --reference, or --self_test alone")
    if out is not None:
        taken = f"{out} is where diffussm sample keeps the record of a set"
        other = f"give another name, such as {out.with_suffix('.scores.json')}"
        records = [path.with_suffix(".json") for path in samples]
        refuse(out in records, f"{taken}; {other}")
    check_new(out, ".json")
    pictures = [*samples, *([reference] if reference else [])]
    if pictures and all(path.suffix == ".npz" for path in pictures):
        refuse_idle(given, "for .npz files, whose pictures are as they are")


def _open_images(
    data: Path, size: int, no_classes: bool, exif_rotate: bool, given: set[str]
) -> Any:
    from diffussm import formats

    classes = False if no_classes else None
    source = formats.images_from(
        data, size, conditional=classes, exif_rotate=exif_rotate
    )
    if isinstance(source, formats.LmdbImages):
        refuse_idle(given, "for an LMDB, which has no classes")
    return source


def vae(
    images: Path,
    out: Path,
    *,
    size: int = 64,
    steps: int = 380,
    batch_size: int = 4,
    lr: float = 4e-3,
    seed: int = 0,
    exif_rotate: bool = False,
) -> int:
    """train a small autoencoder on a folder of images

    For data of one's own, or a rehearsal of a larger run.

    Args:
        images: folder of images, or an LMDB
        out: folder to write, which --vae then takes
        size: images are cropped to size x size
        steps: how long it learns
        batch_size: images of a step
        lr: learning rate
        seed: of all that is random
        exif_rotate: turn photographs as their EXIF tag says (ADM does not)
    """
    _check_vae(out, size, steps, batch_size, lr, seed)
    from diffussm import autoencoder, formats

    source = formats.images_from(images, size, exif_rotate=exif_rotate)
    with interruptible(nothing_kept):
        trained = autoencoder.train_vae(
            source,
            steps=steps,
            batch_size=min(batch_size, len(source)),
            crop=min(32, size),
            lr=lr,
            seed=seed,
        )
        _save_vae(trained, out)
    scale = trained.config.scaling_factor
    print(f"wrote {out}: an autoencoder with a scaling factor of {scale}")
    return 0


def _save_vae(trained: Any, out: Path) -> None:
    with whole_folder(out) as draft:
        trained.save_pretrained(draft)
        for file in draft.glob("*.safetensors"):
            apply_umask(file)


def encode(
    data: Path,
    out: Path,
    given: set[str],
    *,
    vae: str,
    size: int,
    batch_size: int = 16,
    shard_size: int = 8192,
    workers: int = 4,
    no_flip: bool = False,
    no_classes: bool = False,
    exif_rotate: bool = False,
    verify: bool = False,
    device: str | None = None,
) -> int:
    """store the latents of a folder of images (or an LMDB)

    Encode images once; also under torchrun. The same command again goes on.

    Args:
        data: class folders as in ImageNet, a plain folder, or an LMDB
        out: folder of the latent store
        vae: folder of an AutoencoderKL, or its name on the hub
        size: images are cropped to size x size pixels
        batch_size: images at once
        shard_size: images per file
        workers: threads of each process that read images
        no_flip: do not store the mirrored images
        no_classes: take sub-folders for folders, not for classes
        exif_rotate: turn photographs as their EXIF tag says (ADM does not)
        verify: read all of it again and compare checksums
        device: DEVICE
    """
    numbers: dict[str, Any] = {
        "batch_size": batch_size,
        "shard_size": shard_size,
        "workers": workers,
    }
    check_at_least_one(size=size, **numbers)
    from diffussm import autoencoder, encoding
    from diffussm.distributed import barrier, rank, world_size

    source = _open_images(data, size, no_classes, exif_rotate, given)
    with start("encode", device) as own, interruptible(partial(_shards_kept, out)):
        coder = autoencoder.load_vae(vae, own)
        who: Any = {"rank": rank(), "world_size": world_size()}
        encoding.encode(source, out, coder, vae, flip=not no_flip, **numbers, **who)
        barrier()  # until every process has done its share
        _tell_stored(out, verify)
    return 0


SHOWN = 20  # so many skipped images are named


def _tell_stored(out: Path, verify: bool) -> None:
    """Say what the store holds and, having read it again, whether it is whole."""
    from diffussm.distributed import on_rank_zero, rank

    if rank() == 0:
        _tell_held(out)
    if verify:
        from diffussm.latents import verify_store

        if problems := on_rank_zero(partial(verify_store, out)):
            raise ValueError("; ".join(problems))
        if rank() == 0:
            print(f"every file of {out} is as it was written")


def _tell_held(out: Path) -> None:
    from diffussm.latents import LatentStore

    store = LatentStore(out)
    skipped = [one for shard in store.manifest["shards"] for one in shard["skipped"]]
    held = f"{len(store)} images in {store.num_classes} classes"
    print(f"{out} holds the latents of {held}; {len(skipped)} skipped")
    tell_skipped(skipped)


def tell_skipped(skipped: Sequence[Any]) -> None:
    """Name the images that were skipped, and why: pairs of name and reason."""
    for name, reason in skipped[:SHOWN]:
        print(f"skipped {name}: {reason}", file=sys.stderr)
    if len(skipped) > SHOWN:
        print(f"... and {len(skipped) - SHOWN} more", file=sys.stderr)


def _shards_kept(out: Path) -> str:
    finished = len(list(out.glob("shard-*.json")))
    return (
        f"{finished} finished shards are kept, and the same command encodes the others"
    )


def evaluate(
    samples: list[Path],
    given: set[str],
    *,
    reference: Path | None = None,
    weights: Path | None = None,
    size: int | None = None,
    exif_rotate: bool = False,
    batch_size: int = 64,
    device: str | None = None,
    out: Path | None = None,
    self_test: bool = False,
) -> int:
    """score a set of samples: FID, sFID, IS, precision, recall

    Compare samples with a reference by ADM's protocol.

    Args:
        samples: folders of PNG files or .npz files; several: drawn with other seeds
        reference: images, a .npz, or statistics
        weights: Inception's weights, a file
        size: crop images to size x size, as ADM does
        exif_rotate: turn photographs as their EXIF tag says (ADM does not)
        batch_size: images at once
        device: DEVICE
        out: a .json file to write
        self_test: check the metrics, and nothing else
    """
    _check_evaluate(samples, reference, out, self_test, given)
    if self_test:
        return _self_test()
    how = _scoring(weights, size, exif_rotate, batch_size, device)
    from diffussm import evaluation

    with interruptible(nothing_kept):
        drawn = samples if len(samples) > 1 else samples[0]
        result = evaluation.evaluate(drawn, reference or "", **how)
    if out is not None:
        write_json(out, result)
    print(json.dumps(result, indent=2))
    return 0


def statistics(
    data: Path,
    out: Path,
    given: set[str],
    *,
    weights: Path | None = None,
    size: int | None = None,
    exif_rotate: bool = False,
    batch_size: int = 64,
    device: str | None = None,
) -> int:
    """store the statistics of a reference, for evaluate

    Store what evaluate needs to know of a reference.

    Args:
        data: a folder of images, class folders, an LMDB, or a .npz file
        out: the .npz file to write
        weights: Inception's weights, a file
        size: crop images to size x size, as ADM does
        exif_rotate: turn photographs as their EXIF tag says (ADM does not)
        batch_size: images at once
        device: DEVICE
    """
    check_new(out, ".npz")
    if data.suffix == ".npz":
        refuse_idle(given, "for .npz files, whose pictures are as they are")
    how = _scoring(weights, size, exif_rotate, batch_size, device)
    from diffussm import features

    with interruptible(nothing_kept):
        features.save_statistics(data, out, **how)
    print(f"wrote {out}")
    return 0


def _scoring(
    weights: Path | None,
    size: int | None,
    exif_rotate: bool,
    batch_size: int,
    device: str | None,
) -> dict[str, Any]:
    """What both hand to the evaluation."""
    check_at_least_one(batch_size=batch_size, size=size)
    from torch import cuda

    return {
        "weights": weights,
        "size": size,
        "exif_rotate": exif_rotate,
        "batch_size": batch_size,
        "device": device or ("cuda" if cuda.is_available() else "cpu"),
    }


def _self_test() -> int:
    from diffussm import metrics

    try:
        metrics.self_test()
    except AssertionError as error:
        raise ValueError(f"the metrics are wrong here: {error}") from error
    print("the metrics give what they must on data with known answers")
    return 0
