"""Draw from a run.

Generated from book/97_sample_command.md by `make export`: edit there.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffussm.command_line import (
    interruptible,
    nothing_kept,
    refuse,
    refuse_idle,
    start,
)
from diffussm.run_commands import takes_latents

if TYPE_CHECKING:
    from diffussm.model import DiffuSSM
    from diffussm.options import Recipe
    from diffussm.samples import SampleSet
    from diffussm.sampling import Sampler

__all__ = ["sample"]


def sample(
    wanted: "SampleSet",
    given: set[str],
    *,
    from_: Path,
    step: int | None = None,
    weights: Literal["ema", "model"] = "ema",
    vae: str | None = None,
    grid: Path | None = None,
    out: Path | None = None,
    classes: str | None = None,
    per_class: int = 8,
    device: str | None = None,
    overwrite: bool = False,
    preset: str = "paper-fid",
) -> int:
    """draw images from a trained run: a grid to look at, or a set to be scored

    Draw a grid of images, one row per class (--grid), or a set of them (--out), from a
    run. A set is resumed by the same command, and does not depend on the number of
    processes.

    Args:
        from_: folder of the run
        step: the checkpoint to draw from; default: the newest
        weights: moving average or raw
        vae: autoencoder that decodes, for a run on latents
        grid: a PNG file to write
        out: a folder of PNG files, or a .npz file
        classes: numbers or names, or 'all'; default: ten for a grid, all for a set
        per_class: for a grid: images per class
        device: DEVICE
        overwrite: replace the grid if it exists
    """
    _check_target(grid, out, per_class, overwrite, given)
    kept = _batches_kept if out is not None else nothing_kept
    with start("sample", device, stoppable=out is not None) as own, interruptible(kept):
        run = _find(from_, step, weights)
        wanted = _for_run(run, wanted, classes, given, strict=grid is None)
        run = _with_decoder(run, vae, own)
        if out is not None:
            _check_count(run, wanted, preset, given)
            return _draw_set(run, wanted, out, own)
        if grid is not None:
            _draw_picture(run, wanted, grid, per_class, given)
        return 0


@dataclass(frozen=True)
class _Found:
    """A checkpoint of a run, and what is known of it."""

    run: Path
    step: int | None
    weights: str
    model: "DiffuSSM"
    recipe: "Recipe"
    names: Sequence[str]
    facts: dict[str, Any] = field(default_factory=dict)
    decode: Any = None


def _find(run: Path, step: int | None, weights: str) -> _Found:
    """The weights of a checkpoint; None: the newest."""
    from diffussm.checkpoints import find_checkpoint
    from diffussm.distributed import on_rank_zero
    from diffussm.run_folder import load_run

    is_run = (run / "config.json").is_file()
    found = on_rank_zero(lambda: find_checkpoint(run, step) if is_run else None)
    step = int(found.name.removeprefix("step_")) if found else step
    return _Found(run, step, weights, *load_run(run, weights, step))


def _with_decoder(found: _Found, vae: str | None, device: Any) -> _Found:
    """The same on a device, with what decodes its latents, and what is recorded."""
    from diffussm.run_folder import encoder_of

    recipe, decode, identity = found.recipe, None, {}
    made_by = encoder_of(found.run, recipe.data)
    if made_by is not None or takes_latents(recipe):
        decode, identity = _open_decoder(found.run, vae, device, made_by)
    model = found.model.to(device).eval()
    facts: dict[str, Any] = {"weights": found.weights}
    facts["checkpoint"] = f"step_{found.step:08d}"
    facts["ema_decay"] = recipe.ema_decay
    if identity:
        kept = ("name", "encoder_sha256", "decoder_sha256")
        facts["vae"] = {name: identity[name] for name in kept}
    return replace(found, model=model, facts=facts, decode=decode)


def _for_run(
    run: _Found, wanted: "SampleSet", classes: str | None, given: set[str], strict: bool
) -> "SampleSet":
    """The set for this run, with its classes; ValueError for what it has no use for."""
    _check_sampler(run.recipe, wanted.sampler, given)
    most = run.recipe.timesteps
    if wanted.sampler.steps > most:
        # a set is of a protocol: its steps are not lowered without a word
        told = f"--steps {wanted.sampler.steps}: the run has {most} timesteps"
        refuse(strict or "steps" in given, f"{told}; give that many or fewer")
        wanted = replace(wanted, sampler=replace(wanted.sampler, steps=most))
    if classes is not None:
        wanted = replace(wanted, classes=tuple(_parse_classes(classes, run.names)))
    return wanted.of(run.recipe.model)


def _parse_classes(words: str, names: Sequence[str]) -> list[int]:
    """ "all", or numbers or names separated by commas, as class numbers."""
    if words == "all":
        return list(range(len(names)))
    return [_class_of(word.strip(), words, names) for word in words.split(",")]


def _draw_picture(
    run: _Found, wanted: "SampleSet", picture: Path, per_class: int, given: set[str]
) -> None:
    from diffussm.distributed import rank
    from diffussm.options import diffusion_of
    from diffussm.pictures import GRID_ROWS, draw_grid

    if rank() > 0:
        return

    known, sampler = run.recipe.model.num_classes, wanted.sampler
    rows = len(wanted.classes or range(min(known, GRID_ROWS) or 1))
    if wanted.classes is None and rows < known:
        print(f"the first {rows} of {known} classes; name others with --classes")
    if "clip_denoised" not in given:
        sampler = replace(sampler, clip_denoised=run.decode is None)
    images = rows * per_class
    print(_how_many(images, images, sampler), flush=True)
    draw_grid(
        run.model,
        diffusion_of(run.recipe),
        picture,
        sampler=sampler,
        classes=wanted.classes,
        per_class=per_class,
        precision=wanted.precision,
        seed=wanted.seed,
        decode=run.decode,
    )
    print(f"wrote {picture}")


def _draw_set(run: _Found, wanted: "SampleSet", out: Path, own: Any) -> int:
    from diffussm import samples
    from diffussm.distributed import EXIT_PREEMPTED, Preempted, rank
    from diffussm.options import diffusion_of

    if rank() == 0:
        print(_how_many(wanted.count, wanted.batch_size, wanted.sampler), flush=True)
    how = {"device": own, "facts": run.facts, "decode": run.decode}
    try:
        samples.draw_samples(run.model, diffusion_of(run.recipe), wanted, out, **how)
    except Preempted as stop:
        if rank() == 0:
            print(f"{stop}; the same command draws the others", file=sys.stderr)
        return EXIT_PREEMPTED
    if rank() == 0:
        print(f"wrote {wanted.count} images to {out}")
    return 0


def _how_many(images: int, at_once: int, sampler: "Sampler") -> str:
    """What is about to be drawn, in words; the last batch is whole too."""
    batches, guided = math.ceil(images / at_once), sampler.cfg_scale != 1
    passes = batches * at_once * sampler.steps * (2 if guided else 1)
    drawn = f"{images:,} images in {batches:,} batch{'es' * (batches > 1)} of {at_once}"
    both = ", each with and without the class" if guided else ""
    return (
        f"{drawn}, {sampler.steps} steps{both}: {passes:,} passes of an image through "
        "the network"
    )


def _batches_kept() -> str:
    return "finished batches are kept, and the same command draws the others"


def _open_decoder(run: Path, vae: str | None, device: Any, made_by: Any) -> Any:
    from diffussm.recipes import open_decoder

    if vae is None:
        source = f", {made_by['name']}" if made_by else ""
        raise ValueError(
            f"{run} was trained on latents; say with --vae what decodes them{source}"
        )
    return open_decoder(vae, device, made_by)


def _check_target(
    grid: Path | None,
    out: Path | None,
    per_class: int,
    overwrite: bool,
    given: set[str],
) -> None:
    """ValueError unless one picture or one set is asked for, and can be written."""
    either = "give either --grid FILE.png, for a picture, or --out, for a set of images"
    refuse((grid is None) == (out is None), either)
    refuse_idle(given, "beside --grid" if out is None else "beside --out")
    at_least = f"--per_class {per_class}: draw at least one image per class"
    refuse(per_class < 1, at_least)
    if grid is not None:
        png = f"--grid {grid}: the picture is a PNG; give a name that ends in .png"
        refuse(grid.suffix.lower() != ".png", png)
        there = f"{grid} exists; give another name, or --overwrite"
        refuse(grid.exists() and not overwrite, there)
    folder = (grid or out or Path()).parent
    refuse(not folder.is_dir(), f"{grid or out}: the folder {folder} does not exist")


def _check_sampler(recipe: "Recipe", sampler: "Sampler", given: set[str]) -> None:
    model, channels = recipe.model, sampler.guidance_channels or 0
    if not model.num_classes:
        refuse_idle(given, "for a run without classes")
    elif sampler.cfg_scale == 1:
        refuse_idle(given, "without guidance, at a cfg_scale of 1")
    latents = takes_latents(recipe)
    if not latents:
        refuse_idle(given, "for a model of pixels")
    refuse(latents and sampler.clip_denoised, _CLAMPED)
    has = f"--guidance_channels {channels}: the model has {model.in_channels}"
    refuse("guidance_channels" in given and channels > model.in_channels, has)


_CLAMPED = (
    "--clip_denoised true clamps predicted images to the range of pixels; this run "
    "makes latents, which go beyond: omit it"
)


def _check_count(
    run: _Found, wanted: "SampleSet", preset: str, given: set[str]
) -> None:
    from diffussm.run_folder import read_run

    seen = read_run(run.run).data["images"]
    drawn = f"the preset {preset} draws {wanted.count:,} images"
    learnt = f"this run has learnt from {seen:,}; say with --count how many to draw"
    many = "count" not in given and wanted.count > seen
    refuse(many, f"{drawn}, and {learnt}")


def _class_of(word: str, words: str, names: Sequence[str]) -> int:
    if word in names:
        return list(names).index(word)
    if word.isdecimal() and len(word) < 10 and int(word) < len(names):
        return int(word)
    known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    raise ValueError(
        f"--classes {words}: {word!r} is no class of this model; its {len(names)} are "
        f"{known}"
    )
