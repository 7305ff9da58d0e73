"""Draw from a run.

Generated from book/97_sample_command.md by `make export`: edit there.
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import PositiveInt

from diffussm.command_line import (
    check_new,
    interruptible,
    nothing_kept,
    refuse_idle,
    start,
)
from diffussm.guards import expect_int, expect_there
from diffussm.look_commands import Look, draw_look, how_many, look_of, with_look
from diffussm.run_commands import takes_latents

if TYPE_CHECKING:
    from diffussm.model import DiffuSSM
    from diffussm.options import Execution, Recipe
    from diffussm.sample_options import Sampler, SampleSet

__all__ = ["sample"]


def sample(
    wanted: "SampleSet",
    execution: "Execution",
    given: set[str],
    *,
    from_: Path | None = None,
    pretrained: str | None = None,
    step: int | None = None,
    weights: Literal["ema", "model"] = "ema",
    vae: str | None = None,
    grid: Path | None = None,
    gif: Path | None = None,
    out: Path | None = None,
    classes: list[str] | None = None,
    cfg_scale: list[str] | None = None,
    per_class: PositiveInt = 8,
    seeds: list[str] | None = None,
    interpolate: list[str] | None = None,
    scheduler: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
) -> int:
    """draw images from a trained run: a grid to look at, or a set to be scored

    Draw a grid of images, one row per class (--grid), the way to it (--gif), or a set
    of them (--out), from a run or from weights that come with the package. A set is
    resumed by the same command, and does not depend on the number of processes.

    Args:
        from_: folder of the run
        pretrained: instead of a run, weights in the package: digits or emoji
        step: the checkpoint to draw from; default: the newest
        weights: moving average or raw
        vae: autoencoder that decodes, for a run on latents
        grid: a PNG file to write
        gif: a GIF file to write: the noisy images beside the predicted clean ones
        out: a folder of PNG files, or a .npz file
        classes: numbers or names, as in 3 5 or 3,5, or all; default: ten or all
        cfg_scale: guidance, 1 is none; for a grid also several; default: the preset's
        per_class: for a grid: images per class
        seeds: for a grid: a column for each, as in 0,1,2; the same noise in all rows
        interpolate: for a grid: two seeds, 3,7; per_class images from one to the other
        scheduler: for a grid: one of diffusers instead of --method, as UniPCMultistep
        device: DEVICE
        overwrite: replace the grid and the GIF if they exist
    """
    _check_target(grid, gif, out, overwrite, given)
    _check_source(from_, pretrained, given)
    typed = (per_class, cfg_scale, seeds, interpolate, scheduler)
    look = look_of(grid, gif, *typed)
    wanted = with_look(wanted, look, given)
    kept = _batches_kept if out is not None else nothing_kept
    with start("sample", device, stoppable=out is not None) as own, interruptible(kept):
        run = _find(from_, step, weights) if from_ else _take(str(pretrained))
        wanted = _for_run(run, wanted, classes, given, strict=out is not None)
        run, wanted = _with_decoder(run, vae, own), wanted.on(own.type)
        if out is not None:
            _check_count(run, wanted.count, given)
            return _draw_set(run, wanted, out, own, execution)
        return _draw_pictures(run, wanted, look, given)


def _check_target(
    grid: Path | None,
    gif: Path | None,
    out: Path | None,
    overwrite: bool,
    given: set[str],
) -> None:
    looked = grid is not None or gif is not None
    if looked == (out is not None):
        told = "--grid FILE.png or --gif FILE.gif, pictures, or --out, a set"
        raise ValueError(f"give either {told}")
    refuse_idle(given, "for a picture" if looked else "beside --out")
    for file, kinds in ((grid, (".png", ".PNG")), (gif, (".gif", ".GIF"))):
        if file is not None:
            check_new(file, *kinds, overwrite=overwrite)
    if out is not None:
        expect_there(out.parent, f"a folder for {out.name}")


def _check_count(run: "_Found", count: int, given: set[str]) -> None:
    if "count" not in given and count > run.seen:
        told = f"{count:,} images of a run that saw {run.seen:,}"
        raise ValueError(f"{told}: give --count")


def _check_source(from_: Path | None, pretrained: str | None, given: set[str]) -> None:
    if (from_ is None) == (pretrained is None):
        known = "(digits, emoji)"  # as a test knows; to look is to wait for PyTorch
        raise ValueError(f"give either --from RUN or --pretrained NAME {known}")
    refuse_idle(given, "beside --pretrained", pretrained)


@dataclass(frozen=True)
class _Found:
    """A checkpoint of a run, and what is known of it."""

    run: Path
    step: int | None
    weights: str
    model: "DiffuSSM"
    recipe: "Recipe"
    names: Sequence[str]
    seen: int  # images that it learned from
    facts: dict[str, Any] = field(default_factory=dict)
    vae: str | None = None  # what decodes, if nothing else is said
    decode: Any = None


def _find(run: Path, step: int | None, weights: str) -> _Found:
    """The weights of a checkpoint; None: the newest."""
    from diffussm.checkpoints import find_checkpoint, step_of
    from diffussm.distributed import on_rank_zero
    from diffussm.run_folder import load_run, read_run

    is_run = (run / "config.json").is_file()
    found = on_rank_zero(lambda: find_checkpoint(run, step) if is_run else None)
    step = step_of(found) if found else step
    known = load_run(run, weights, step)
    return _Found(run, step, weights, *known, read_run(run).data["images"])


def _take(name: str) -> _Found:
    """Weights in the box, as if they were of a run."""
    from diffussm.pretrained import load_pretrained

    box = load_pretrained(name)
    known = box.model(), box.recipe, box.data["classes"], box.data["images"]
    vae = str(box.vae) if box.vae else None
    facts = {"pretrained": name}
    return _Found(box.folder, box.record["steps"], "ema", *known, facts, vae)


def _with_decoder(found: _Found, vae: str | None, device: Any) -> _Found:
    """The same on a device, with what decodes its latents, and what is recorded."""
    model = found.model.to(device).eval()
    facts = found.facts | {"weights": found.weights}
    facts["checkpoint"] = f"step_{found.step:08d}"
    facts["ema_decay"] = found.recipe.ema_decay
    decode, identity = _open_decoder(found, vae or found.vae, device)
    if identity:
        kept = ("name", "encoder_sha256", "decoder_sha256")
        facts["vae"] = {name: identity[name] for name in kept}
    return replace(found, model=model, facts=facts, decode=decode)


def _checksum(model: "DiffuSSM") -> str:
    """Of all weights, wherever they are and whatever file they come from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _open_decoder(found: _Found, vae: str | None, device: Any) -> tuple[Any, Any]:
    """What decodes the latents of a run, and its identity; for pixels, nothing."""
    from diffussm.recipes import open_decoder
    from diffussm.run_folder import encoder_of

    made_by = encoder_of(found.run, found.recipe.data)
    if made_by is None and not takes_latents(found.recipe):
        return None, None
    if vae is None:
        coder = (made_by or {}).get("name", "this run")
        raise ValueError(f"say with --vae what decodes the latents of {coder}")
    return open_decoder(vae, device, made_by)


def _for_run(
    run: _Found,
    wanted: "SampleSet",
    classes: Sequence[str] | None,
    given: set[str],
    strict: bool,
) -> "SampleSet":
    """The set for this run, with its classes; ValueError for what it has no use for."""
    _check_sampler(run.recipe, wanted.sampler, given)
    steps, most = wanted.sampler.steps, run.recipe.timesteps
    # a set is of a protocol: its steps are not lowered silently
    if steps > most and (strict or "steps" in given):
        raise ValueError(f"--steps {steps}: the run has only {most} timesteps")
    sampler = replace(wanted.sampler, steps=min(steps, most))
    if classes is not None:
        wanted = replace(wanted, classes=tuple(_parse_classes(classes, run.names)))
    return replace(wanted, sampler=sampler).of(run.recipe.model)


def _check_sampler(recipe: "Recipe", sampler: "Sampler", given: set[str]) -> None:
    model, latents = recipe.model, takes_latents(recipe)
    refuse_idle(given, "for a run without classes", not model.num_classes)
    unguided = sampler.cfg_scale == 1
    refuse_idle(given, "without guidance, at a cfg_scale of 1", unguided)
    refuse_idle(given, "for a model of pixels", not latents)
    if latents and sampler.clip_denoised:
        raise ValueError("--clip_denoised true is for pixels: omit it for latents")
    if "guidance_channels" in given and sampler.guidance_channels:
        channels = sampler.guidance_channels
        expect_int("--guidance_channels", channels, most=model.in_channels)


def _parse_classes(words: Sequence[str], names: Sequence[str]) -> list[int]:
    """ "all", or numbers or names, also with commas between, as class numbers."""
    if list(words) == ["all"]:
        return list(range(len(names)))
    parts = ",".join(words).split(",")
    return [_class_of(word.strip(), names) for word in parts]


def _class_of(word: str, names: Sequence[str]) -> int:
    if word in names:
        return list(names).index(word)
    if word.isdecimal() and len(word) < 10 and int(word) < len(names):
        return int(word)
    known = ", ".join(names[:12]) + ", ..." * (len(names) > 12)
    raise ValueError(f"--classes: {word!r} is no class; the {len(names)} are {known}")


def _draw_pictures(
    run: _Found, wanted: "SampleSet", look: Look, given: set[str]
) -> int:
    from diffussm.distributed import rank

    if "clip_denoised" not in given:
        sampler = replace(wanted.sampler, clip_denoised=run.decode is None)
        wanted = replace(wanted, sampler=sampler)
    if rank() == 0:
        draw_look(look, wanted, run.model, run.recipe, run.names, run.decode)
    return 0


def _draw_set(
    run: _Found, wanted: "SampleSet", out: Path, own: Any, execution: "Execution"
) -> int:
    from diffussm import samples
    from diffussm.distributed import EXIT_PREEMPTED, Preempted, on_rank_zero, rank
    from diffussm.options import diffusion_of
    from diffussm.sampling_at_scale import make_ready

    diffusion, decode = diffusion_of(run.recipe), run.decode
    network = run.model, diffusion
    wanted = make_ready(*network, wanted, execution, own, decode)
    if rank() == 0:
        print(how_many(wanted.count, wanted.batch_size, wanted.sampler), flush=True)
    facts = run.facts | on_rank_zero(lambda: {"weights_sha256": _checksum(run.model)})
    how = {"device": own, "facts": facts, "decode": decode}
    try:
        with run.model.cached_kernels():  # of all batches
            samples.draw_samples(*network, wanted, out, **how)
    except Preempted as stop:
        if rank() == 0:
            print(f"{stop}; the same command draws the others", file=sys.stderr)
        return EXIT_PREEMPTED
    if rank() == 0:
        print(f"wrote {wanted.count:,} images to {out}")
    return 0


def _batches_kept() -> str:
    return "finished batches are kept, and the same command draws the others"
