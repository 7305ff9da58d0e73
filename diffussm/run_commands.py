"""Look, then train.

Generated from book/96_run_commands.md by `make export`: edit there.
"""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat

from diffussm.command_line import interruptible, refuse_idle, start, tell
from diffussm.progress import Told, board_in, board_writer, log_row, pin, say

if TYPE_CHECKING:
    from diffussm.data import Dataset
    from diffussm.model import DiffuSSM
    from diffussm.options import Execution, Recipe

__all__ = ["takes_latents", "doctor", "train"]


def takes_latents(recipe: "Recipe") -> bool:
    """Whether a run is of latents."""
    from diffussm import recipes

    return recipes.takes_latents(recipe.model)


def _claim(
    out: Path,
    own: Any,
    recipe: "Recipe",
    execution: "Execution",
    data: "Dataset",
    other_data: bool,
    init_from: Path | None,
) -> None:
    """Every reason to refuse comes before the first file."""
    from diffussm.resources import check_training
    from diffussm.run_folder import open_run
    from diffussm.warm_start import warm_start

    check_training(recipe, execution, data, own)
    claim = out, recipe, execution, data
    if init_from is None:
        open_run(*claim, other_data)
    else:
        origin = warm_start(*claim, init_from, other_data)
        new = ", ".join(origin["new"]) or "nothing"
        tell(f"{len(origin['taken'])} tensors of {init_from}; new: {new}")


def _refuse_two_meanings(
    given: set[str], recipe: "Recipe", execution: "Execution", out: Path
) -> None:
    """What was typed may not be a word for data and a path at once."""
    from diffussm.recipes import check_words

    named = {"data": recipe.data, "held_out": execution.held_out}
    check_words(out, **{name: named[name] for name in named.keys() & given})


def _decoder_of(recipe: "Recipe", vae: str | None, device: Any, data: "Dataset") -> Any:
    """What decodes the samples of a run, if anything does."""
    from diffussm.recipes import open_decoder

    made_by = getattr(data, "vae", None)
    return open_decoder(vae, device, made_by)[0] if vae else None


def _fitted(
    recipe: "Recipe", free: frozenset[str], out: Path
) -> tuple["Recipe", "Dataset"]:
    """A recipe with what its data decide, and these; says what it was."""
    from diffussm.options import as_flags
    from diffussm.recipes import fit, inferred, open_data

    data = open_data(recipe, free, out.parent)
    if found := inferred(recipe, data, free):
        tell(f"from {recipe.data}: {as_flags(found)}")
    return fit(recipe, data, free), data


def _refuse_idle_options(
    given: set[str], recipe: "Recipe", execution: "Execution", no_grid: bool
) -> None:
    latents, drawn = takes_latents(recipe), execution.sample_every or not no_grid
    refuse_idle(given, "where no samples are drawn", not drawn)
    refuse_idle(given, "without --score_every", not execution.score_every)
    refuse_idle(given, "for digits", recipe.data == "digits")
    refuse_idle(given, "for stored latents" if latents else "for a model of pixels")


def doctor(
    recipe: "Recipe",
    execution: "Execution",
    free: frozenset[str],
    given: set[str],
    *,
    out: Path = Path("."),
    vae: str | None = None,
    weights: Path | None = None,
    reference: Path | None = None,
    processes: NonNegativeInt = 0,
    device: str | None = None,
    limit: PositiveFloat = 120.0,
    quick: bool = False,
    trial: NonNegativeInt = 0,
    price: NonNegativeFloat = 0.0,
    other_data: bool = False,
    init_from: Path | None = None,
    tensorboard: bool = False,
    no_grid: bool = False,
) -> int:
    """see whether this machine can carry out a run, before it starts

    Look at all that a run needs. Exit code 1 if something fails.

    Args:
        out: where the run will be written
        vae: autoencoder that decodes the samples
        weights: Inception weights, for evaluate
        reference: what evaluate compares with
        processes: 0: as many as there are GPUs; without any 2, or 1 with --trial
        device: DEVICE
        limit: seconds that the processes may take to talk, or a trial to log a line
        quick: do not read all of the latents
        trial: carry out so many steps of the run, e.g. 200, kill it and resume it
        price: of an hour of a GPU, in any currency, for the cost of the run
        other_data: go on with other images than the run began with
        init_from: begin with the averaged weights of this run (folder)
        tensorboard: write RUN/tensorboard besides the log
        no_grid: draw no samples at the end
    """
    from diffussm.doctor import Plan
    from diffussm.verdict import report

    _refuse_two_meanings(given, recipe, execution, out)
    with suppress(ValueError, OSError, ImportError):  # a question says what is wrong
        recipe, _ = _fitted(recipe, free, out)
    _refuse_idle_options(given, recipe, execution, no_grid)
    refuse_idle(given, "under torchrun", "WORLD_SIZE" in os.environ)
    refuse_idle(given, "without --trial", not trial)
    if tensorboard:
        board_writer()
    files: dict[str, Any] = {"weights": weights, "reference": reference}
    how: dict[str, Any] = {"out": out, "vae": vae, "limit": limit, "quick": quick}
    how |= {"init_from": init_from, "other_data": other_data}
    how |= {"free": free, "trial": trial, "price": price}
    plan = Plan.here(recipe, execution, device, processes, **files, **how)
    return report(plan)


def train(
    recipe: "Recipe",
    execution: "Execution",
    free: frozenset[str],
    given: set[str],
    *,
    out: Path,
    vae: str | None = None,
    other_data: bool = False,
    init_from: Path | None = None,
    tensorboard: bool = False,
    device: str | None = None,
    no_grid: bool = False,
) -> int:
    """train a model from a recipe, or resume it

    Train a model, also under torchrun; the same command again resumes a killed run.

    Args:
        out: folder of the run
        vae: autoencoder, to draw samples of latents
        other_data: go on with other images than the run began with
        init_from: begin with the averaged weights of this run (folder)
        tensorboard: write RUN/tensorboard besides the log
        device: DEVICE
        no_grid: draw no samples at the end
    """
    if os.environ.get("RANK", "0") == "0" and (asked := out / "preempted").is_file():
        asked.unlink()  # first, or a queue would repeat a start that is refused
    tell(f"{recipe.steps:,} steps on {recipe.data or 'no data'}, in {out}")
    from diffussm.distributed import on_rank_zero
    from diffussm.recipes import check_outside
    from diffussm.vital_signs import flights_in

    writer = board_writer() if tensorboard else None
    _refuse_two_meanings(given, recipe, execution, out)
    recipe, data = _fitted(recipe, free, out)
    check_outside(out, data, pictures=True)
    if execution.sample_every and takes_latents(recipe) and vae is None:
        raise ValueError(
            "--sample_every: say with --vae what decodes latents, or --sample_every 0"
        )
    _refuse_idle_options(given, recipe, execution, no_grid)
    watch = _watch(recipe, execution, data, out)
    goes_on = partial(_goes_on, out)
    with (
        flights_in(out),
        interruptible(goes_on),  # looks again once a checkpoint is whole
        start("train", device, stoppable=True) as own,
        interruptible(goes_on),  # for a process that leaves alone
    ):
        decode = _decoder_of(recipe, vae, own, data)
        on_rank_zero(
            lambda: _claim(out, own, recipe, execution, data, other_data, init_from)
        )
        parts = recipe, execution, data, out, own, decode, watch, writer, no_grid
        return _carry_out(*parts)


def _watch(
    recipe: "Recipe", execution: "Execution", data: "Dataset", out: Path
) -> Callable[["DiffuSSM"], dict[str, float | None]] | None:
    """What scores the run now and then, if anything does."""
    if not execution.score_every:
        return None
    from diffussm.recipes import check_outside, open_held_out
    from diffussm.watching import Watch

    named = execution.held_out, recipe, data.classes
    held_out = open_held_out(*named, out.parent)
    check_outside(out, held_out, pictures=True)
    return Watch(recipe, data, held_out, execution.score_images)


def _carry_out(
    recipe: "Recipe",
    execution: "Execution",
    data: "Dataset",
    out: Path,
    own: Any,
    decode: Any,
    watch: Any,
    writer: Callable[..., Any] | None,
    no_grid: bool,
) -> int:
    """Train with all processes, on the device of this one; the exit code."""
    from diffussm import runs
    from diffussm.distributed import Preempted, rank

    first, draw = rank() == 0, partial(_draw_rows, recipe, data.classes, decode)
    if first:
        _say_begun(recipe, data)
    with board_in(writer if first else None, out) as board:
        hooks: Any = {"on_log": partial(log_row, board, Told(recipe.steps))}
        hooks["on_samples"] = partial(_draw_step, draw, out, board)
        hooks["on_scores"] = watch
        try:
            state = runs.train(recipe, out, execution, own, dataset=data, **hooks)
        except Preempted as stop:
            return _preempted(out, str(stop))
        if first:
            _say_done(out, state.step)
        if (decode or not takes_latents(recipe)) and not no_grid:
            _draw_last(draw, out, board, state)
    return 0


def _draw_step(
    draw: Callable[..., None], out: Path, board: Any, model: "DiffuSSM", step: int
) -> None:
    picture = out / "samples" / f"step_{step:08d}.png"
    picture.parent.mkdir(exist_ok=True)
    draw(model, picture, progress=False)
    pin(board, picture, step)
    say(f"a grid of samples is in {picture}")


def _draw_rows(
    recipe: "Recipe",
    names: Sequence[str],
    decode: Any,
    model: "DiffuSSM",
    picture: Path,
    progress: bool,
) -> None:
    from diffussm.options import diffusion_of
    from diffussm.pictures import draw_grid

    how: dict[str, Any] = {"names": names, "decode": decode, "progress": progress}
    draw_grid(model, diffusion_of(recipe), picture, **how)


def _draw_last(draw: Callable[..., None], out: Path, board: Any, state: Any) -> None:
    from diffussm.checkpoints import whole_ema
    from diffussm.distributed import on_rank_zero, rank

    ema, picture = whole_ema(state), out / "samples.png"
    on_rank_zero(lambda: draw(ema, picture, progress=True))
    if rank() == 0:
        pin(board, picture, state.step)
        say(f"a grid of samples is in {picture}")


def _say_begun(recipe: "Recipe", data: "Dataset") -> None:
    from diffussm.resources import parameter_count

    count = parameter_count(recipe.model)
    size = f"{count / 1e6:.1f} million" if count >= 1e6 else f"{count:,}"
    say(f"{size} parameters, {len(data):,} images")


def _say_done(out: Path, step: int) -> None:
    weights = out / "checkpoints" / f"step_{step:08d}" / "ema"
    log = f"{step:,} steps done; the log is {out / 'log.jsonl'}"
    say(f"{log}, the averaged weights are in {weights}")


def _preempted(out: Path, told: str) -> int:
    from diffussm.distributed import EXIT_PREEMPTED, on_rank_zero, rank

    on_rank_zero(lambda: (out / "preempted").write_text(told + "\n"))
    if rank() == 0:
        print(told, file=sys.stderr)
    return EXIT_PREEMPTED


def _goes_on(run: Path) -> str:
    """From where an interrupted run will go on."""
    from diffussm.checkpoints import checkpoints_of, step_of

    if not (saved := checkpoints_of(run)):
        return "no checkpoint was saved, so the same command begins again"
    return f"the same command goes on from step {step_of(saved[-1])}"
