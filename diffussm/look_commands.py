"""Pictures to look at.

Generated from book/97_look_commands.md by `make export`: edit there.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from diffussm.command_line import check_device, check_new, refuse_idle
from diffussm.file_commands import check_decodes, pipeline_of
from diffussm.guards import expect_number, explain, refuse

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffussm.model import DiffuSSM
    from diffussm.options import Recipe
    from diffussm.sample_options import Sampler, SampleSet

__all__ = [
    "show",
    "Look",
    "look_of",
    "with_look",
    "draw_look",
    "how_many",
    "draw_one",
    "page_of",
    "demo",
]


def show(run: Path, *, out: Path | None = None, overwrite: bool = False) -> int:
    """see where a run stands: its curves and its newest samples

    Print where a run stands, and draw its losses, learning rate, speed and newest
    samples as one picture. The run may go on meanwhile.

    Args:
        run: folder of the run
        out: a PNG file to write; default: show.png in that folder, drawn anew each time
        overwrite: replace the file named by --out if it exists
    """
    from diffussm.show import draw_history, read_history, summary

    if out is not None:
        check_new(out, ".png", ".PNG", overwrite=overwrite)
    history, picture = read_history(run), out or run / "show.png"
    print(summary(history, time.time()), flush=True)
    try:
        draw_history(history, picture)
    except ValueError as cannot:
        if out is not None:
            raise
        print(f"no picture: {cannot}")
    else:
        print(f"wrote {picture}")
    return 0


@dataclass(frozen=True)
class Look:
    """What is to be looked at: the files that are written, and what they show.

    The fields are the arguments of `diffussm sample`; `ends` are the two seeds that
    --interpolate names.
    """

    grid: Path | None = None
    gif: Path | None = None
    per_class: int = 8
    cfg_scales: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    scheduler: str | None = None


def _numbers_in(option: str, words: Sequence[str] | None, kind: Any) -> tuple[Any, ...]:
    """Numbers from 0, each a word, or with commas between them; none for None."""
    if words is None:
        return ()
    typed = ",".join(words)
    try:
        found = tuple(kind(word) for word in typed.split(","))
    except ValueError:
        said = f"--{option} {typed}: expected numbers, as in 1 2 4 or 1,2,4"
        raise ValueError(said) from None
    return tuple(kind(expect_number(f"--{option}", n, least=0)) for n in found)


def look_of(
    grid: Path | None,
    gif: Path | None,
    per_class: int,
    cfg_scale: Sequence[str] | None,
    seeds: Sequence[str] | None,
    interpolate: Sequence[str] | None,
    scheduler: str | None,
) -> Look:
    """What the words of a command ask for."""
    scales = _numbers_in("cfg_scale", cfg_scale, float)
    columns = _numbers_in("seeds", seeds, int)
    ends = _numbers_in("interpolate", interpolate, int)
    return Look(grid, gif, per_class, scales, columns, ends, scheduler)


def _check_look(look: Look, given: set[str]) -> None:
    is_set, several = look.grid is look.gif is None, len(look.cfg_scales) > 1
    refuse(is_set and several, "--cfg_scale: a set has one, several are for --grid")
    refuse_idle(given, "beside --seeds", look.seeds)
    refuse_idle(given, "beside --interpolate", look.ends)
    refuse_idle(given, "beside --scheduler", look.scheduler)
    refuse(look.seeds and look.ends, "give --seeds or --interpolate, not both")
    if look.ends:
        two = len(look.ends) == len({*look.ends}) == 2
        refuse(not two, "--interpolate: expected two seeds that differ, as in 3,7")
        refuse(
            look.per_class < 2, "--per_class 1: from one seed to another are 2 or more"
        )


def with_look(wanted: "SampleSet", look: Look, given: set[str]) -> "SampleSet":
    """What is wanted, with the guidance and the method that a look asks for."""
    _check_look(look, given)
    sampler = wanted.sampler
    if look.cfg_scales:
        # where several are drawn, one that guides, so that what guides is not idle
        guiding = [scale for scale in look.cfg_scales if scale != 1]
        sampler = replace(sampler, cfg_scale=(guiding or [1.0])[0])
    if look.ends and look.scheduler is None:
        noisy = "method" in given and sampler.method == "ddpm"
        refuse(noisy, "--method ddpm draws noise on the way: --interpolate needs ddim")
        sampler = replace(sampler, method="ddim")
    return replace(wanted, sampler=sampler)


def draw_look(
    look: Look,
    wanted: "SampleSet",
    model: "DiffuSSM",
    recipe: "Recipe",
    names: Sequence[str],
    decode: Any,
) -> None:
    """Draw what is to be looked at, with the network of a run, and say so."""
    from diffussm.options import diffusion_of
    from diffussm.pictures import draw_grid

    kept = {name: getattr(wanted, name) for name in ("sampler", "precision", "seed")}
    how: dict[str, Any] = kept | {"names": names, "decode": decode}
    how |= {"per_class": look.per_class, "cfg_scales": look.cfg_scales}
    how |= {"classes": wanted.classes, "start": _start_of(look)}
    if look.scheduler is not None:
        how["walk"] = _scheduled(look, recipe.timesteps)
    _announce(look, wanted, model.config.num_classes)
    draw_grid(model, diffusion_of(recipe), look.grid, gif=look.gif, **how)
    print("\n".join(f"wrote {file}" for file in (look.grid, look.gif) if file))


def _start_of(look: Look) -> Any:
    """The noise of the columns; None: other noise in each place."""
    from diffussm.pictures import between_seeds, stream_per_seed

    if look.ends:
        return partial(between_seeds, look.ends, look.per_class)
    return partial(stream_per_seed, look.seeds) if look.seeds else None


def _scheduled(look: Look, timesteps: int) -> Any:
    """What walks with the scheduler that was named."""
    with explain("--scheduler: install diffusers, or omit it", ImportError):
        from diffussm import schedulers

    name = f"{str(look.scheduler).removesuffix('Scheduler')}Scheduler"
    scheduler = schedulers.named_scheduler(name, timesteps)
    noisy = look.ends and name in schedulers.DRAWS_NOISE
    refuse(noisy, f"{name} draws noise on the way: --interpolate needs one without")
    return partial(schedulers.scheduled_walk, scheduler)


def how_many(images: int, at_once: int, sampler: "Sampler") -> str:
    """What is about to be drawn, in words; the last batch is whole too."""
    batches, guided = math.ceil(images / at_once), sampler.cfg_scale != 1
    passes = batches * at_once * sampler.steps * (2 if guided else 1)
    drawn = (
        f"{_number_of(images)} in {batches:,} batch{'es' * (batches > 1)} of {at_once}"
    )
    both = ", each with and without the class" if guided else ""
    walk = f"{drawn}, {sampler.steps} steps{both}"
    return f"{walk}: {passes:,} passes of an image through the network"


def _number_of(images: int) -> str:
    return f"{images:,} image{'s' * (images != 1)}"


def _announce(look: Look, wanted: "SampleSet", known: int) -> None:
    """Say what will be drawn, and whether it shows only the first classes."""
    from diffussm.pictures import Grid

    rows = len(Grid(wanted.classes).rows(known))
    if wanted.classes is None and rows < known:
        print(f"the first {rows} of {known} classes; name others with --classes")
    images = rows * (len(look.seeds) or look.per_class)
    for scale in look.cfg_scales or (wanted.sampler.cfg_scale,):
        at = f"cfg_scale {scale:g}: " if len(look.cfg_scales) > 1 else ""
        told = how_many(images, images, replace(wanted.sampler, cfg_scale=scale))
        if look.scheduler:  # some ask the network more than once in a step
            steps = f"{wanted.sampler.steps} steps of {look.scheduler}"
            told = f"{_number_of(images)}, {steps}"
        print(f"{at}{told}", flush=True)


def draw_one(
    pipe: Any, label: int | None, seed: float, cfg_scale: float, steps: float
) -> "Image":
    """One image of a pipeline; a class number, or None for a run without classes."""
    import torch

    noise = torch.Generator().manual_seed(int(seed))
    how: dict[str, Any] = {"generator": noise, "num_inference_steps": int(steps)}
    how |= {"guidance_scale": 1.0 if label is None else cfg_scale}
    pixels = pipe.vae is None
    image: Image = pipe(label, clip_denoised=pixels, **how).images[0]
    larger = max(1, 256 // max(image.size))
    return image.resize((larger * image.width, larger * image.height), 0)


def page_of(gradio: Any, pipe: Any) -> Any:
    """The page of gradio around `draw_one`."""
    names, classes = pipe.config.id2label, pipe.denoiser.config.num_classes
    choices = [(names.get(str(i), str(i)), i) for i in range(classes)]
    most = pipe.config.num_train_timesteps
    asked = [
        gradio.Number(0, label="seed", precision=0, minimum=0),
        gradio.Slider(0, 8, 1.5, label="guidance, 1 is none", visible=classes > 0),
        gradio.Slider(1, most, min(50, most), step=1, label="steps"),
    ]
    if classes:
        asked.insert(0, gradio.Dropdown(choices, value=0, label="class"))
    draw = partial(draw_one, pipe) if classes else partial(draw_one, pipe, None)
    image = gradio.Image(type="pil", label="image")
    how = {"title": "DiffuSSM", "flagging_mode": "never", "api_name": "draw"}
    return gradio.Interface(draw, asked, image, **how)


def demo(
    run: Path | None,
    given: set[str],
    *,
    pretrained: str | None = None,
    step: NonNegativeInt | None = None,
    weights: Literal["ema", "model"] = "ema",
    vae: str | None = None,
    device: str | None = None,
    port: PositiveInt | None = None,
) -> int:
    """draw with a run in a browser

    Open a page on this machine that draws with a run, until Ctrl-C.

    Args:
        run: folder of the run
        pretrained: instead of a run, weights in the package: digits or emoji
        step: the checkpoint to draw from; default: the newest
        weights: moving average or raw
        vae: autoencoder that decodes, for a run on latents
        device: DEVICE
        port: port of the page; default: the first that is free from 7860
    """
    with explain("demo: pip install 'diffussm[demo]'", ImportError):
        import gradio

        from diffussm.distributed import own_device
        from diffussm.schedulers import named_scheduler
    check_device(device)
    pipe = pipeline_of(run, pretrained, given, weights, vae, step)
    check_decodes(pipe, run)
    most = pipe.config.num_train_timesteps
    pipe.scheduler = named_scheduler("DDIMScheduler", most)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device or own_device(None))
    page_of(gradio, pipe).launch(server_port=port, inbrowser=False)
    return 0
