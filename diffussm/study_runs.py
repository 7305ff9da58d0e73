"""Runs of a study.

Generated from book/92_study_runs.md by `make export`: edit there.
"""

import json
import os
import platform
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from diffussm.batches import training_batch
from diffussm.data import Dataset
from diffussm.distributed import own_device
from diffussm.evaluation import versions
from diffussm.files import read_json, whole_file, write_json
from diffussm.guards import expect_one_of, explain, refuse
from diffussm.judge import judged, jury_of
from diffussm.model import DiffuSSM
from diffussm.options import diffusion_of
from diffussm.parallel import check_gpu, create_state
from diffussm.resources import processor
from diffussm.runs import train
from diffussm.study import Measure, Run, Study, as_asked, as_json, images_of, runs_of
from diffussm.training import training_step
from diffussm.variants import count_parameters, image_macs, network
from diffussm.watching import Watch, held_out_bits, watched_loss
from diffussm.writers import read_log

__all__ = [
    "Row",
    "row_there",
    "chosen",
    "run_study",
    "write_rows",
    "read_rows",
    "seconds_needed",
    "time_in_turns",
    "steps_of",
    "write_seconds",
]


Row = dict[str, Any]  # what is known of one run


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch compute with one thread, and then with as many as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def _carry_out(run: Run, out: Path, measure: Measure, device: str | None) -> Row:
    """Train a run, or resume it, and measure it; RUN/result.json gets the row."""
    folder, (data, held_out) = out / "runs" / run.digest, images_of(run, out)
    watch = Watch(run.recipe, data, held_out, 0)
    hooks: dict[str, Any] = {"on_scores": watch, "progress": False, "dataset": data}
    hooks["network"] = partial(network, run.variant)
    row = _facts(run) | {"measure": as_json(measure)}
    try:
        state = train(run.recipe, folder, run.execution, device, **hooks)
        row |= _measured(state.ema, run, measure, data, held_out)
    except FloatingPointError as diverged:
        row |= {"failed": str(diverged)}
    row |= _history(folder) | {"environment": _environment(device)}
    write_json(folder / "result.json", row)
    return row


def _environment(device: str | None) -> dict[str, Any]:
    machine = {"processor": processor(), "cores": os.cpu_count()}
    if (own := own_device(device)).type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(own)
    return machine | {"python": platform.python_version(), **versions()}


def _facts(run: Run) -> Row:
    """What is known of a run before it begins."""
    recipe, images = run.recipe, run.recipe.steps * run.recipe.batch_size
    return {
        "digest": run.digest,
        "recipe": asdict(recipe),
        "variant": run.variant,
        "parameters": count_parameters(run.variant, recipe.model),
        "operations": 3 * images * image_macs(run.variant, recipe.model),
    }


def _measured(
    model: DiffuSSM, run: Run, measure: Measure, data: Dataset, held_out: Dataset
) -> Row:
    """Loss, bound and scores of a trained network on images that it has not seen."""
    row: Row = watched_loss(model, run.recipe, held_out, len(held_out))
    row = {"held_out": row, "bits_per_dim": {}}
    count = min(measure.bits_images, len(held_out))
    if held_out.levels is not None:
        for steps in measure.bits_steps:
            found = held_out_bits(model, run.recipe, held_out, count, steps)
            row["bits_per_dim"][str(steps)] = found
    if measure.score_images:
        scores = Watch(run.recipe, data, held_out, measure.score_images)(model)
        row["scores"] = {k: v for k, v in scores.items() if k.startswith("score")}
    if measure.judged_images:
        sets: Any = (data, held_out)  # a protocol promises no hash
        jury = jury_of(*sets, measure.judged_images)
        row["drawn"] = judged(model, run.recipe, jury, measure.guidance)
    return row


_CURVES = ("step", "loss", "mse_q1", "mse_q2", "mse_q3", "mse_q4", "held_out_loss")


def _history(folder: Path) -> Row:
    """The curves of a run, and the seconds on the wall that its steps took."""
    lines, _ = read_log(folder / "log.jsonl")
    curves = {name: [_short(line.get(name)) for line in lines] for name in _CURVES}
    images = [0, *(line["images"] for line in lines)]
    seconds = sum(
        (after - before) / line["images_per_second"]
        for before, after, line in zip(images, images[1:], lines, strict=False)
    )
    return {"seconds": round(seconds, 2), "curves": curves}


def _short(value: float | None) -> float | None:
    return value if value is None else float(f"{value:.5g}")


def _begin() -> None:
    """What a process of a study does first."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # it may be killed at any moment
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := parent_process():
        connection.wait([parent.sentinel])
        os._exit(1)


_Job = tuple[Run, Path, Measure, str | None]  # and the device


def _carried_out(jobs: list[_Job], workers: int) -> Iterator[Row]:
    """The rows of runs, in the order in which they are finished."""
    if workers == 1:
        yield from (_carry_out(*job) for job in jobs)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin)
    told = "a process of the study was killed; the same command goes on"
    try:
        with explain(told, BrokenProcessPool, error=OSError):
            futures = [pool.submit(_carry_out, *job) for job in jobs]
            yield from (done.result() for done in as_completed(futures))
    finally:
        pool.shutdown(cancel_futures=True)


def row_there(
    run: Run, out: Path, measure: Measure, known: Sequence[Row] = ()
) -> Row | None:
    """The row of a run that is finished and was measured so, beside it or `known`."""
    file = out / "runs" / run.digest / "result.json"
    beside = [read_json(file, "the result of a run")] if file.exists() else []
    rows = [*beside, *(row for row in known if row["digest"] == run.digest)]
    return next((row for row in rows if as_asked(row, measure)), None)


_Planned = dict[tuple[str, str], list[Run]]  # by question and name


def chosen(planned: _Planned, only: str = "") -> _Planned:
    """All runs of a study, or those of one "question, name"."""
    named = {f"{question}, {name}": (question, name) for question, name in planned}
    if not only:
        return planned
    key = named[expect_one_of("only", only, named)]
    return {key: planned[key]}


def run_study(
    study: Study,
    out: Path,
    workers: int = 1,
    device: str | None = "cpu",
    on_row: Callable[[Row], object] = lambda row: None,
    only: str = "",
    known: Sequence[Row] = (),
) -> list[Row]:
    """Carry out what is missing of a study; OUT/results.jsonl has a line for each run.

    Args:
        on_row: gets each row that is new.
        only: "question, name": nothing but the seeds of this one.
        known: rows of runs that need not be carried out again.

    Raises:
        ValueError: a configuration cannot work; nothing was started.
    """
    planned = runs_of(study, out)
    runs = {run.digest: run for each in planned.values() for run in each}
    wanted = {run.digest for each in chosen(planned, only).values() for run in each}
    rows = {k: row_there(run, out, study.measure, known) for k, run in runs.items()}
    missing = [runs[name] for name in runs if name in wanted and rows[name] is None]
    for convolution in {run.execution.convolution for run in missing}:
        check_gpu(convolution, own_device(device))
    jobs: list[_Job] = [(run, out, study.measure, device) for run in missing]
    file = out / "results.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    write_rows(file, filter(None, rows.values()))  # what ended just before a kill, too
    for row in _carried_out(jobs, workers):
        rows[row["digest"]] = row
        write_rows(file, filter(None, rows.values()))
        on_row(row)
    return [row for row in rows.values() if row is not None]


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """Write one JSON line for each run, whole or not at all."""
    with whole_file(file) as draft:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        draft.write_text(text, encoding="utf-8")


def read_rows(file: str | Path) -> list[Row]:
    """The rows in a file of JSON lines; none if there is no such file."""
    file = Path(file)
    if not file.exists():
        return []
    with explain(f"{file} has no JSON lines", ValueError):
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def _stepper(run: Run, out: Path, asked: str | None = "cpu") -> Callable[[], float]:
    """What makes a training step of a run, and returns its seconds."""
    recipe, device = run.recipe, own_device(asked)
    state = create_state(recipe, run.execution, device, partial(network, run.variant))
    batch = training_batch(images_of(run, out)[0], state.model, recipe, 0)
    batch, diffusion = batch.part(slice(None), device), diffusion_of(recipe)

    gpu = device.type == "cuda"
    wait = partial(torch.cuda.synchronize, device) if gpu else int
    clock = time.perf_counter if gpu else time.process_time

    def step() -> float:
        start = clock()
        training_step(state, diffusion, batch, recipe)
        wait()
        return clock() - start

    step()  # the first is slower
    return step


@_one_thread()
def seconds_needed(run: Run, out: Path, measure: Measure, device: str | None) -> float:
    """An estimate of what a run takes on a device, from a few of its steps."""
    step, (_, held_out) = _stepper(run, out, device), images_of(run, out)
    each = min(step() for _ in range(3))
    passes = _passes(run, measure, min(len(held_out), 512))
    return each * (run.recipe.steps + passes / (3 * run.recipe.batch_size))


def _passes(run: Run, measure: Measure, images: int) -> int:
    """Images that go through the network to measure a run."""
    looks = run.recipe.steps // run.execution.score_every
    bound = sum(measure.bits_steps) * measure.bits_images
    chains = sum(1 if scale == 1 else 2 for scale in measure.guidance)
    drawn = measure.score_images + chains * measure.judged_images
    return 2 * images * (looks + 1) + bound + 20 * drawn


_Rounds = list[dict[str, float]]  # in each, seconds by name


def _apart(rounds: _Rounds) -> float:
    """How much the medians of even and odd rounds differ at most, relatively."""
    halves = [_medians(rounds[start::2]) for start in (0, 1)]
    pairs = [[half[name] for half in halves] for name in rounds[0]]
    return max(max(pair) / min(pair) - 1 for pair in pairs)


def _medians(rounds: _Rounds) -> dict[str, float]:
    return {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}


def time_in_turns(
    steps: dict[str, Callable[[], float]],
    few: int = 20,
    many: int = 200,
    allowed: float = 0.05,
) -> tuple[_Rounds, dict[str, float]]:
    """Rounds in which each step is made, and the median seconds of each.

    Raises:
        ValueError: after `many` rounds the halves differ by more than is allowed.
    """
    rounds: _Rounds = []
    while len(rounds) < few or _apart(rounds) > allowed:
        told = f"after {many} rounds the halves differ by more than {allowed:.0%}: "
        told += "nothing was written; try again when less runs beside it"
        refuse(len(rounds) >= many, told)
        rounds.append({name: step() for name, step in steps.items()})
    return rounds, _medians(rounds)


_UNTIMED: dict[str, Any] = {"seconds": "", "parameters and seconds": "parameters"}


def steps_of(study: Study) -> dict[str, Run]:
    """A run for each step that a study makes, by `Run.step_name`."""
    free = {
        name: replace(asked, equal=_UNTIMED.get(asked.equal, asked.equal))
        for name, asked in study.questions.items()
    }
    runs = runs_of(replace(study, questions=free)).values()
    return {each[0].step_name: each[0] for each in runs}


@_one_thread()
def write_seconds(study: Study, out: Path) -> dict[str, float]:
    """Measure the steps of a study; its file `seconds` gets them, with the machine."""
    refuse(not study.seconds, "the study names no file for it, as 'seconds: FILE.json'")
    runs = steps_of(study)
    rounds, found = time_in_turns({k: _stepper(run, out) for k, run in runs.items()})
    steps = {
        k: run.step | {"seconds": float(f"{found[k]:.4g}")} for k, run in runs.items()
    }
    how = {"rounds": len(rounds), "apart": round(_apart(rounds), 4)}
    write_json(Path(study.seconds), {**_environment("cpu"), **how, "steps": steps})
    return found
