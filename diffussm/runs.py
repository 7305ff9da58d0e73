"""A run that lasts.

Generated from book/47_runs.md by `make export`: edit there.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffussm.batches import load_dataset, training_batch, training_batches
from diffussm.checkpoints import (
    WEIGHTS,
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
    on_rank_zero,
    own_device,
    rank,
    stopping,
    together,
    world_size,
)
from diffussm.files import read_json, read_tensors, write_json, write_tensors
from diffussm.model import DiffuSSM
from diffussm.options import (
    Execution,
    Recipe,
    check_data,
    diffusion_of,
    flat,
    from_flat,
    warn,
)
from diffussm.parallel import accumulate_gradients, create_state, micro_batch_of, wrap
from diffussm.run_folder import locked, open_run
from diffussm.training import TrainState, update
from diffussm.writers import BackgroundWriter, Log, rewind_log

__all__ = ["train", "replay"]


class _Told(NamedTuple):
    """What all processes know after a step."""

    tally: Tensor
    grad_norm: float
    broken: bool
    stopping: bool
    unsaved: bool


def _agree(tally: Tensor, norm: Tensor, saved: bool) -> _Told:
    ours = torch.cat([tally.flatten(), norm.double().reshape(1)]).cpu()
    reasons = [not ours.isfinite().all(), stopping(), not saved]
    flags = torch.tensor(reasons, dtype=torch.float64)
    sums = all_reduce(torch.cat([ours[:-1], flags]))
    broken, stop, unsaved = (bool(reason) for reason in sums[-3:])
    return _Told(sums[:-3].view_as(tally), ours[-1].item(), broken, stop, unsaved)


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
    on_samples: Callable[[DiffuSSM, int], None] | None = None
    on_scores: Callable[[DiffuSSM], dict[str, float | None]] | None = None


def _loop(run: _Run) -> None:
    state, recipe, execution = run.state, run.recipe, run.execution
    network, diffusion = wrap(state.model, execution), diffusion_of(recipe)
    share = state.step, rank(), world_size(), execution.workers
    batches = training_batches(run.data, state.model, recipe, *share)
    for batch in run.log.clock.awaited(batches):
        tally = accumulate_gradients(
            network, diffusion, batch, recipe, execution, run.device
        )
        norm = full_tensor(nn.utils.get_total_norm(state.gradients()))
        told = _agree(tally, norm, saved=run.writer.error() is None)
        if told.unsaved:
            raise together(run.writer.error() or OSError(_UNSAVED))
        if told.broken:
            _leave_out(run, told.grad_norm)
        else:
            update(state, recipe, told.grad_norm)
            state.meter.add(told.tally, told.grad_norm)
        state.advance()
        run.log.step(state, _scores(run))
        _keep(run, told.stopping)
    run.writer.wait()


_UNSAVED = "another process could not write a checkpoint; see its message"


def _keep(run: _Run, stop: bool) -> None:
    state, recipe, execution = run.state, run.recipe, run.execution
    every, named = execution.save_every, execution.keep_steps(recipe.batch_size)
    last, often = state.step == recipe.steps, execution.sample_every
    with run.log.clock.paused():
        if stop or last or state.step % every == 0 or state.step in named:
            run.writer.save(state)
        draw = run.on_samples
        if often and state.step % often == 0 and draw is not None:
            ema = whole_ema(state)
            on_rank_zero(lambda: draw(ema, state.step))
    if stop and not last:
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
) -> TrainState:
    """Train, or resume, the run in a folder until `recipe.steps` steps are done.

    Many processes call it inside of `processes`. Writes config.json, log.jsonl and
    checkpoints/. A killed run that is started again gives the same weights, average and
    log, bit for bit on a CPU.

    Args:
        on_log: gets each line of the log, in the first process.
        on_samples: gets the averaged model and the step, each `sample_every` steps.
        on_scores: gets the averaged model in all processes, each `score_every` steps;
            returns columns for the log.
        dataset: replaces what `load_dataset` finds.
        other_data: lets a run go on with data that it was not trained on.

    Raises:
        ValueError: a folder or data that do not fit.
        FloatingPointError: more steps than `skip_nonfinite` were not finite.
        OSError: a checkpoint cannot be written.
        Preempted: the process was asked to stop.
    """
    run, own = Path(run), own_device(None) if device is None else torch.device(device)
    micro_batch_of(recipe, execution, world_size())
    data = load_dataset(recipe) if dataset is None else dataset
    check_data(data, recipe)
    on_rank_zero(lambda: open_run(run, recipe, execution, data, other_data))
    with locked(run), BackgroundWriter(run, recipe, execution) as writer:
        state = _resume(run, recipe, execution, own)
        with Log(run, recipe, execution, state, progress, on_log) as log:
            parts = recipe, execution, data, own, state, writer, log
            _loop(_Run(run, *parts, on_samples, on_scores))
    return state


def _resume(
    run: Path, recipe: Recipe, execution: Execution, device: torch.device
) -> TrainState:
    """The state of the newest checkpoint, or a fresh one."""
    checkpoint = on_rank_zero(lambda: find_checkpoint(run))
    state = create_state(recipe, execution, device)
    if checkpoint is not None:
        load_checkpoint(checkpoint, state)
    keep = execution.keep_steps(recipe.batch_size)
    on_rank_zero(lambda: _tell_missed(run, state.step, keep))
    on_rank_zero(lambda: rewind_log(run / "log.jsonl", state.step))
    return state


def _tell_missed(run: Path, step: int, keep: frozenset[int]) -> None:
    kept = {step_of(folder) for folder in (run / "checkpoints").glob("step_*")}
    if missed := sorted(wanted for wanted in keep - kept if wanted <= step):
        warn(
            f"the run is at step {step}, too late to keep what keep names: "
            f"{', '.join(map(str, missed))}"
        )


def _leave_out(run: _Run, grad_norm: float) -> None:
    """Count a step that is left out; FloatingPointError if it is one too many."""
    state = run.state
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
