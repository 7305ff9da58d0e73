"""Commands from files to files.

Generated from book/95_file_commands.md by `make export`: edit there.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveInt

from diffussm.command_line import interruptible, nothing_kept, refuse_idle, start
from diffussm.files import apply_umask, whole_folder
from diffussm.guards import expect_empty, explain, refuse

__all__ = [
    "vae",
    "encode",
    "SHOWN",
    "tell_skipped",
    "export",
    "pipeline_of",
    "check_decodes",
]


def vae(
    images: Path,
    out: Path,
    *,
    size: PositiveInt = 64,
    steps: PositiveInt = 380,
    batch_size: PositiveInt = 4,
    lr: OpenUnitInterval = 4e-3,
    seed: NonNegativeInt = 0,
    exif_rotate: bool = False,
) -> int:
    """train a small autoencoder on a folder of images

    For data of one's own, or a rehearsal of a larger run.

    Args:
        images: folder of images, a zip of it, an LMDB, or openmoji, which are drawn
        out: folder to write, which --vae then takes
        size: images are cropped to size x size
        steps: steps of training
        batch_size: images of a step
        lr: learning rate
        seed: decides all that is random
        exif_rotate: turn photographs as their EXIF tag says (ADM does not)
    """
    expect_empty(out)
    crop = min(32, size)
    refuse(crop % 4, f"--size {size}: below 32, expected a multiple of 4")
    from diffussm import autoencoder, recipes

    source = recipes.images_at(images, out.parent, size, exif_rotate=exif_rotate)
    recipes.check_outside(out, source)
    sizes = {"batch_size": min(batch_size, len(source)), "crop": crop}
    with interruptible(nothing_kept):
        trained = autoencoder.train_vae(source, steps=steps, lr=lr, seed=seed, **sizes)
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
    size: PositiveInt,
    batch_size: PositiveInt = 16,
    shard_size: PositiveInt = 8192,
    workers: PositiveInt = 4,
    no_flip: bool = False,
    no_classes: bool = False,
    exif_rotate: bool = False,
    verify: bool = False,
    device: str | None = None,
) -> int:
    """store the latents of a folder of images (or a zip, an LMDB)

    Encode images once; also under torchrun. The same command again goes on.

    Args:
        data: class folders as in ImageNet, a plain folder, a zip, an LMDB, or openmoji
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
    from diffussm import autoencoder, encoding, recipes
    from diffussm.distributed import barrier, rank, world_size

    source = _open_images(data, out.parent, size, no_classes, exif_rotate, given)
    recipes.check_outside(out, source)
    how: dict[str, Any] = {"flip": not no_flip, "workers": workers}
    how |= {"batch_size": batch_size, "shard_size": shard_size}
    with start("encode", device) as own, interruptible(partial(_shards_kept, out)):
        coder = autoencoder.load_vae(vae, own)
        how |= {"rank": rank(), "world_size": world_size()}
        encoding.encode(source, out, coder, vae, **how)
        barrier()  # until every process has done its share
        _tell_stored(out, verify)
    return 0


def _open_images(
    data: Path,
    beside: Path,
    size: int,
    no_classes: bool,
    exif_rotate: bool,
    given: set[str],
) -> Any:
    from diffussm import formats, recipes

    classes = False if no_classes else None
    how: dict[str, Any] = {"conditional": classes, "exif_rotate": exif_rotate}
    source = recipes.images_at(data, beside, size, **how)
    lmdb = isinstance(source, formats.LmdbImages)
    refuse_idle(given, "for an LMDB, which has no classes", lmdb)
    return source


def _tell_stored(out: Path, verify: bool) -> None:
    """Say what the store holds and, having read it again, whether it is whole."""
    from diffussm.distributed import on_rank_zero, rank

    if rank() == 0:
        _tell_held(out)
    if verify:
        from diffussm.latents import verify_store

        problems = on_rank_zero(partial(verify_store, out))
        refuse(problems, "; ".join(problems))
        if rank() == 0:
            print(f"every file of {out} is as it was written")


def _tell_held(out: Path) -> None:
    from diffussm.latents import LatentStore

    store = LatentStore(out)
    skipped = [one for shard in store.manifest["shards"] for one in shard["skipped"]]
    held = f"{len(store)} images in {store.num_classes} classes"
    print(f"{out} holds the latents of {held}; {len(skipped)} skipped")
    tell_skipped(skipped)


SHOWN = 20  # so many skipped images are named


def tell_skipped(skipped: Sequence[Any]) -> None:
    """Name the images that were skipped, and why: pairs of name and reason."""
    for name, reason in skipped[:SHOWN]:
        print(f"skipped {name}: {reason}", file=sys.stderr)
    if len(skipped) > SHOWN:
        print(f"... and {len(skipped) - SHOWN} more", file=sys.stderr)


def _shards_kept(out: Path) -> str:
    kept = len(list(out.glob("shard-*.json")))
    return f"{kept} finished shards are kept; the same command encodes the others"


def export(
    run: Path | None,
    folder: Path,
    given: set[str],
    *,
    pretrained: str | None = None,
    format: Literal["pipeline", "safetensors", "onnx", "torch"] = "pipeline",
    weights: Literal["ema", "model"] = "ema",
    step: NonNegativeInt | None = None,
    vae: str | None = None,
    batch: PositiveInt | Literal["dynamic"] = "dynamic",
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
) -> int:
    """write the network of a run for other programs

    For diffusers, for PyTorch without this package, or for ONNX Runtime; compared
    with the network of the run after it was written.

    Args:
        run: folder of the run
        folder: folder to write
        pretrained: instead of a run, weights in the package: digits or emoji
        format: all for diffusers, weights alone, a graph in ONNX or of torch.export
        weights: moving average or raw
        step: the checkpoint to take; default: the newest
        vae: autoencoder that decodes, for a pipeline of a run on latents
        batch: images at once in a graph: a number, or dynamic: any
        dtype: precision of the weights; a graph is in float32
    """
    refuse_idle(given, "without a pipeline", format != "pipeline")
    refuse_idle(
        given, "where no graph is written", format in ("pipeline", "safetensors")
    )
    with explain("export: pip install 'diffussm[export]'", ModuleNotFoundError):
        import torch

        from diffussm import exporting
    with interruptible(nothing_kept):
        exporting.check_target(folder, format, dtype)
        pipe = pipeline_of(run, pretrained, given, weights, vae, step)
        if format == "pipeline":
            check_decodes(pipe, run, ", or take another --format")
        pipe.to(getattr(torch, dtype))
        difference = exporting.export_network(pipe, folder, format, batch)
    by = f"{difference:.1e} of the largest output" if difference else "nothing"
    print(f"wrote {folder}: its output differs by {by}")
    return 0


def pipeline_of(
    run: Path | None,
    pretrained: str | None,
    given: set[str],
    weights: str,
    vae: str | None,
    step: int | None,
) -> Any:
    """The pipeline of a run, or of weights in the box."""
    from diffussm.pipeline import DiffuSSMPipeline
    from diffussm.pretrained import load_pretrained

    if pretrained is not None:
        refuse_idle(given, "beside --pretrained")
        refuse_idle(given, "beside --pretrained, which has what decodes")
        return DiffuSSMPipeline.from_pretrained(load_pretrained(pretrained).folder)
    return DiffuSSMPipeline.from_run(Path(run or ""), weights, vae, step)


def check_decodes(pipe: Any, run: Path | None, hint: str = "") -> None:
    """ValueError, with a hint, for the pipeline of a run on latents without decoder."""
    from diffussm.recipes import takes_latents

    coder = pipe.config.training.get("latents", {}).get("name", run)
    lacking = pipe.vae is None and takes_latents(pipe.denoiser.config)
    refuse(lacking, f"say with --vae what decodes the latents of {coder}{hint}")
