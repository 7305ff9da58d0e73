"""A run that lasts.

Generated from book/47_runs.md by `make export`: edit there.
"""

import gc
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffussm.batches import load_dataset, training_batch, training_batches
from diffussm.checkpoints import (
    WEIGHTS,
    checkpoints_of,
    find_checkpoint,
    full_tensor,
    load_checkpoint,
    snapshot,
    step_of,
    whole_ema,
)
from diffussm.data import Dataset
from diffussm.distributed import (
    Preempted,
    all_reduce,
    limit_waiting,
    on_rank_zero,
    own_device,
    rank,
    stopping,
    together,
    world_size,
)
from diffussm.files import read_json, read_tensors, write_json, write_tensors
from diffussm.meter import Look
from diffussm.model import DiffuSSM, DiffuSSMConfig
from diffussm.options import Execution, Recipe, diffusion_of, flat, from_flat, warn
from diffussm.parallel import accumulate_gradients, create_state, wrap
from diffussm.resources import check_training
from diffussm.run_folder import locked, open_run
from diffussm.training import TrainState, update
from diffussm.vital_signs import Heartbeat, WorkTimes, garbage_kept, recorded
from diffussm.writers import BackgroundWriter, Log, rewind_log

__all__ = ["train", "replay"]


def _agree(saved: bool) -> tuple[bool, bool]:
    """Whether any process was asked to stop, and whether any could not save."""
    reasons = torch.tensor([stopping(), not saved], dtype=torch.float64)
    stop, unsaved = all_reduce(reasons).tolist()
    return bool(stop), bool(unsaved)


class _Due(NamedTuple):
    """What there is to do after a step."""

    line: bool
    save: bool
    draw: bool


@dataclass
class _Run:
    folder: Path
    recipe: Recipe
    execution: Execution
    data: Dataset
    device: torch.device
    state: TrainState
    writer: BackgroundWriter
    log: Log
    heart: Heartbeat
    on_samples: Callable[[DiffuSSM, int], None] | None = None
    on_scores: Callable[[DiffuSSM], dict[str, float | None]] | None = None


def _loop(run: _Run) -> None:
    network = wrap(run.state.model, run.execution)
    try:
        with garbage_kept(), WorkTimes(network, run.device) as times:
            while run.state.step < run.recipe.steps:
                _go(run, network, times)
    finally:
        limit_waiting(None)
    run.writer.wait()


def _go(run: _Run, network: nn.Module, times: WorkTimes) -> None:
    """Steps, to the end of the run or past one that was not finite."""
    state, recipe, execution = run.state, run.recipe, run.execution
    share = state.step, rank(), world_size(), execution.workers, run.device
    diffusion, how = diffusion_of(recipe), (recipe, execution, run.device)
    batches = training_batches(run.data, state.model, recipe, *share)
    times.begin()
    for batch in run.log.clock.awaited(batches):
        with recorded(run.folder, state.step + 1, run.device, execution.profile):
            tally = accumulate_gradients(network, diffusion, batch, *how)
            norm = full_tensor(nn.utils.get_total_norm(state.gradients()))
            tally[0, 7] = 0 * norm  # 0, or not a number: then in all processes
            update(state, recipe, all_reduce(tally), norm)
            state.advance()
        times.end()
        run.log.step(state)
        run.heart.beat(state.step)
        stop, unsaved = _agree(saved=run.writer.error() is None)
        if unsaved:
            raise together(run.writer.error() or OSError(_UNSAVED))
        if any(due := _due(run, stop)):
            look = state.meter.look()
            if broken := look.finite < look.steps:
                _leave_out(run, look)
                due = _due(run, stop)
            limit_waiting(None)  # who draws or scores is waited for
            _keep(run, due, look.means | (times.read() if due.line else {}), stop)
            if broken:
                return
        limit_waiting(execution.step_limit)  # the first took what it took
        times.begin()


_UNSAVED = "another process could not write a checkpoint; see its message"


def _due(run: _Run, stop: bool) -> _Due:
    step, recipe, execution = run.state.step, run.recipe, run.execution
    every = execution.save_every, execution.keep_every or recipe.steps, recipe.steps
    save = stop or step in execution.keep_steps(recipe.batch_size)
    save |= any(step % number == 0 for number in every)
    often = execution.sample_every if run.on_samples is not None else 0
    draw = bool(often) and step % often == 0
    return _Due(step % execution.log_every == 0, save, draw)


def _keep(
    run: _Run, due: _Due, figures: Mapping[str, float | None], stop: bool
) -> None:
    state, recipe, draw = run.state, run.recipe, run.on_samples
    if due.line:
        run.log.line(state, {**figures, **_scores(run)})
        state.meter.sums.zero_()
        gc.collect(1)
    with run.log.clock.paused():
        if due.save:
            run.writer.save(state)
        if due.draw and draw is not None:
            ema = whole_ema(state)
            on_rank_zero(lambda: draw(ema, state.step))
    if stop and state.step < recipe.steps:
        run.writer.wait()
        saved = f"asked to stop: saved step {state.step} of {recipe.steps}"
        told = f"{saved}; the same command goes on from there"
        raise together(Preempted(told))


def _scores(run: _Run) -> dict[str, float | None]:
    every, state = run.execution.score_every, run.state
    if run.on_scores is None or not every or state.step % every:
        return {}
    with run.log.clock.paused():
        return run.on_scores(whole_ema(state))


def train(
    recipe: Recipe,
    run: str | Path,
    execution: Execution = Execution(),
    device: str | torch.device | None = None,
    progress: bool = True,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    on_samples: Callable[[DiffuSSM, int], None] | None = None,
    on_scores: Callable[[DiffuSSM], dict[str, float | None]] | None = None,
    dataset: Dataset | None = None,
    other_data: bool = False,
    network: Callable[[DiffuSSMConfig], DiffuSSM] = DiffuSSM,
) -> TrainState:
    """Train, or resume, the run in a folder until `recipe.steps` steps are done.

    Many processes call it inside of `processes`. Writes config.json, log.jsonl and
    checkpoints/. A killed run that is started again gives the same weights, average and
    log, bit for bit on a CPU.

    Args:
        execution: how the run is carried out.
        device: None for a GPU if there is one, or "cuda", "cuda:1", "cpu".
        progress: show a bar.
        on_log: gets each line of the log, in the first process.
        on_samples: gets the averaged model and the step, each `sample_every` steps.
        on_scores: gets the averaged model in all processes, each `score_every` steps;
            returns columns for the log.
        dataset: replaces what `load_dataset` finds.
        other_data: lets a run go on with data that it was not trained on.
        network: builds what is trained, for comparisons; it must be the same in a
            run that goes on.

    Raises:
        ValueError: a folder or data that do not fit.
        FloatingPointError: more steps than `skip_nonfinite` were not finite.
        OSError: a checkpoint cannot be written.
        Preempted: the process was asked to stop.
    """
    run, name = Path(run), str(device)  # "cuda" is the process's own, "cuda:1" that one
    own = torch.device(name) if ":" in name else own_device(device)
    data = load_dataset(recipe) if dataset is None else dataset
    check_training(recipe, execution, data, own, network)
    on_rank_zero(lambda: open_run(run, recipe, execution, data, other_data))
    with locked(run), BackgroundWriter(run, recipe, execution) as writer:
        state = _resume(run, recipe, execution, own, network)
        with Log(run, recipe, execution, state, progress, on_log) as log:
            parts = recipe, execution, data, own, state, writer, log, Heartbeat(run)
            running = _Run(run, *parts, on_samples, on_scores)
            try:
                _loop(running)
            except (Preempted, FloatingPointError):  # it ends, and says why
                running.heart.end()
                raise
            running.heart.end()
    return state


def _resume(
    run: Path,
    recipe: Recipe,
    execution: Execution,
    device: torch.device,
    network: Callable[[DiffuSSMConfig], DiffuSSM],
) -> TrainState:
    """The state of the newest checkpoint, or a fresh one."""
    checkpoint = on_rank_zero(lambda: find_checkpoint(run))
    state = create_state(recipe, execution, device, network)
    if checkpoint is not None:
        load_checkpoint(checkpoint, state)
    keep = execution.keep_steps(recipe.batch_size)
    on_rank_zero(lambda: _tell_missed(run, state.step, keep))
    on_rank_zero(lambda: rewind_log(run / "log.jsonl", state.step))
    return state


def _tell_missed(run: Path, step: int, keep: frozenset[int]) -> None:
    kept = set(map(step_of, checkpoints_of(run)))
    if missed := sorted(wanted for wanted in keep - kept if wanted <= step):
        warn(
            f"the run is at step {step}, too late to keep what keep names: "
            f"{', '.join(map(str, missed))}"
        )


def _leave_out(run: _Run, look: Look) -> None:
    """Go back to a step and leave it out; FloatingPointError if it is one too many."""
    state, grad_norm = run.state, look.grad_norm
    state.step -= look.steps - look.finite
    if not state.skipped:
        _dump(run, grad_norm)
    state.skipped.append(state.step + 1)
    left = run.execution.skip_nonfinite - len(state.skipped)
    what = (
        f"loss or gradient is not finite at step {state.step + 1} "
        f"(gradient norm {grad_norm})"
    )
    first = run.folder / f"dump_{state.skipped[0]:08d}"
    if left < 0:
        run.writer.wait()
        raise together(_diverged(run, what, first))
    if rank() == 0:
        told = f"{what}; left out, as {left} more may be. See {first}"
        tqdm.write(told, file=sys.stderr)
    state.advance()


def _dump(run: _Run, grad_norm: float) -> None:
    """Write what leads to this step, for `replay`: the weights, and the batch."""
    state, recipe = run.state, run.recipe
    taken = snapshot(state, keep=rank() == 0)
    folder = run.folder / f"dump_{state.step + 1:08d}"
    facts = {"step": state.step, "grad_norm": str(grad_norm)}

    def write() -> None:
        (folder / "model").mkdir(parents=True, exist_ok=True)
        write_json(folder / "model" / "config.json", asdict(taken.model))
        write_tensors(folder / WEIGHTS["model"], taken.tensors[WEIGHTS["model"]])
        batch = training_batch(run.data, state.model, recipe, state.step)._asdict()
        kept = {name: value for name, value in batch.items() if value is not None}
        write_tensors(folder / "batch.safetensors", kept)
        options = flat(recipe, run.execution)
        write_json(folder / "dump.json", facts | {"config": options})

    run.writer.wait()
    on_rank_zero(write)


def replay(folder: str | Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Compute again the losses of a dump, image by image, in float32.

    Returns:
        {"loss", "mse", "vb", "t"}, (B,) each, in the order of the batch.
    """
    folder = Path(folder)
    recipe, _ = from_flat(read_json(folder / "dump.json")["config"])
    model = DiffuSSM.from_pretrained(folder / "model", device)
    stored = read_tensors(folder / "batch.safetensors")
    x0, t, noise = (stored[name].to(device) for name in ("x0", "t", "noise"))
    y = stored["y"].to(device) if "y" in stored else None
    diffusion, rows = diffusion_of(recipe), []
    with torch.no_grad():
        for i in range(len(t)):
            one, labels = slice(i, i + 1), None if y is None else y[i : i + 1]
            rows.append(diffusion.losses(model, x0[one], t[one], labels, noise[one]))
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]} | {"t": t}


def _diverged(run: _Run, what: str, first: Path) -> FloatingPointError:
    recipe, skipped = run.recipe, run.state.skipped
    return FloatingPointError(
        f"{what}; the weights were not touched. skip_nonfinite="
        f"{run.execution.skip_nonfinite} such steps may be left out; left out before: "
        f"{', '.join(map(str, skipped[:-1])) or 'none'}. What led to the first was "
        f"written to {first}: look at it with diffussm.runs.replay. Its checkpoints "
        f"stay. Start a new run with a lower lr (now {recipe.lr:g}), a longer warmup "
        f"(now {recipe.warmup}) or a clip (now {recipe.clip:g}); or go on with a "
        "higher skip_nonfinite, if this was an accident"
    )
