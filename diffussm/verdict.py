"""The verdict of a trial.

Generated from book/93_verdict.md by `make export`: edit there.
"""

import itertools
import math
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch

from diffussm.distributed import all_reduce, processes, rank
from diffussm.doctor import QUESTIONS, Finding, Plan, amount, examine
from diffussm.options import as_flags
from diffussm.parallel import micro_batch_of
from diffussm.recipes import open_data
from diffussm.recomputation import Recompute
from diffussm.resources import memory_needed
from diffussm.show import duration
from diffussm.trial import Trial, check_length, middle_of, rehearsed, try_out

__all__ = ["findings", "CHANGES", "report"]


def _measured(trial: Trial, name: str) -> list[float]:
    """The values of a figure in the log, after the first quarter of the steps."""
    rows = [row for row in trial.before if row["step"] > trial.plan.trial / 4]
    return [float(row[name]) for row in rows if row.get(name) is not None]


def _rate(trial: Trial) -> float:
    """Images per second."""
    logged = [max(value, 0.005) for value in _measured(trial, "images_per_second")]
    return statistics.harmonic_mean(logged)


def _waiting(trial: Trial) -> float:
    """The share of the time in which a batch was waited for."""
    return statistics.mean(_measured(trial, "data_wait"))


def _pause(trial: Trial) -> float:
    """Seconds that training stood still to save."""
    for one, next_one in itertools.pairwise(trial.before):
        if one["step"] <= middle_of(trial.plan) < next_one["step"]:
            images = next_one["images"] - one["images"]
            trained = images / max(next_one["images_per_second"], 0.005)
            passed = next_one["seconds"] - one["seconds"]
            return float(max(passed - trained, 0.0))
    return 0.0


def _seconds(trial: Trial) -> float:
    """What the whole run will take, checkpoints too, without pictures and scores."""
    recipe, execution = trial.plan.recipe, trial.plan.execution
    saves = recipe.steps // execution.save_every
    return recipe.steps * recipe.batch_size / _rate(trial) + saves * _pause(trial)


def _resumed(trial: Trial) -> Finding:
    """Did the killed run go on where it was saved, as if nothing had been?"""
    saved, step = middle_of(trial.plan), trial.after[0]["step"]
    begun = step - rehearsed(trial.plan).log_every
    if begun != saved:
        return Finding("resume", "FAIL", f"from step {begun}; {saved} was saved")
    known = {row["step"]: row["loss"] for row in trial.before}
    both = [(known[r["step"]], r["loss"]) for r in trial.after if r["step"] in known]
    worst = max(_difference(*pair) for pair in both)
    told = f"killed after step {trial.before[-1]['step']}, resumed from {saved}: losses"
    if worst >= _ROUNDING:
        return Finding("resume", "FAIL", f"{told} differ, by up to {worst:.1%}")
    same = f"differ by {worst:.0e}, as rounding does" if worst else "are equal"
    return Finding("resume", "pass", f"{told} {same}")


_ROUNDING = 0.01


def _difference(a: float | None, b: float | None) -> float:
    """The relative difference of two losses; None: a line without one."""
    if a is None or b is None or not a:
        return 0.0 if a == b else float("inf")
    return abs(b / a - 1)


def findings(trial: Trial) -> Iterator[Finding]:
    """The lines of the report."""
    yield _resumed(trial)
    if lost := trial.after[-1].get("skipped"):
        told = f"not finite at {', '.join(map(str, lost))}: lower --lr, or set --clip"
        yield Finding("loss", "FAIL", told)
    yield Finding("speed", "pass", _speed(trial))
    if held := _held(trial):
        yield Finding("memory", "pass", held)
    stood = f"training stood still for {_pause(trial):.1f} s"
    told = f"{amount(trial.size)}; {stood}, on the disk after {trial.written:.1f} s"
    yield Finding("checkpoint", "pass", told)
    yield Finding("whole run", "pass", _whole(trial))
    for what, change in CHANGES.items():
        if hint := change(trial):
            yield Finding(what, "hint", hint)


def _speed(trial: Trial) -> str:
    used = _measured(trial, "mfu")
    mfu = f", an MFU of {statistics.mean(used):.0%}" if used else ""
    waited = f"{_waiting(trial):.0%} of the time waiting for data"
    return f"{_rate(trial):,.1f} images/s{mfu}, {waited}"


def _held(trial: Trial) -> str:
    """What a GPU has held at its peak, or a process without one; "": not known."""
    if of_gpu := [row["memory_gb"] for row in trial.before if "memory_gb" in row]:
        return f"{max(of_gpu):.1f} GB of a GPU at the peak"
    return f"{amount(trial.resident)} of main memory" if trial.resident else ""


def _whole(trial: Trial) -> str:
    """Time and cost of all steps."""
    plan, seconds = trial.plan, _seconds(trial)
    n, kind = plan.processes, "GPUs" if plan.device.type == "cuda" else "processes"
    cost = f", {seconds / 3600 * n * plan.price:,.2f}" if plan.price else ""
    at = f"{cost} at {plan.price:g} an hour of each, in your currency" if cost else ""
    images = plan.recipe.steps * plan.recipe.batch_size
    takes = f"{duration(seconds)} on {n} {kind}{at}"
    return f"{images:,} images: {takes}, without pictures and scores"


def _wait_less(trial: Trial) -> str | None:
    """Files are read by threads; all other batches are made by one."""
    if (waiting := _waiting(trial)) < 0.05:
        return None
    plan, here = trial.plan, os.environ.get("LOCAL_WORLD_SIZE", trial.plan.processes)
    n, cores = plan.execution.workers, (os.cpu_count() or 1) // int(here)
    data = open_data(plan.recipe, plan.free, plan.out.parent)
    cure = "put the data on a local disk"
    if plan.recipe.data == "digits":
        cure = "give each process more cores"
    elif hasattr(data, "read") and n < cores:
        cure = f"raise --workers, now {n} for {cores} cores"
    return f"a batch is waited for {waiting:.0%} of the time: {cure}"


def _compile(trial: Trial) -> str | None:
    """Compiled blocks move fewer bytes."""
    if trial.plan.device.type != "cuda" or trial.plan.execution.compile:
        return None
    return "--compile true makes blocks faster, after minutes at the start"


def _larger(plan: Plan) -> list[dict[str, Any]]:
    """Options that take more memory than those of a plan; the best one first."""
    levels = get_args(Recompute)  # from "none", which keeps all
    less = levels[: levels.index(plan.execution.activation_checkpointing)]
    changes: list[dict[str, Any]] = [{"activation_checkpointing": x} for x in less]
    now = micro_batch_of(plan.recipe, plan.execution, plan.processes)
    share = plan.recipe.batch_size // plan.processes
    sizes = [m for m in range(share, now, -1) if share % m == 0]
    return changes + [{"micro_batch": size} for size in sizes]


def _use_memory(trial: Trial) -> str | None:
    """The first of `_larger` that fits; a warning if the memory is nearly full."""
    plan, held = trial.plan, 1e9 * max(_measured(trial, "memory_gb"), default=0)
    if not trial.card or not held:
        return None
    room = f"of {amount(trial.card)}"
    if held > 0.92 * trial.card:
        return f"nearly full, {amount(held)} {room}: lower --micro_batch"
    needed = partial(memory_needed, plan.recipe, processes=plan.processes)
    more = max(held / needed(plan.execution)["total"], 1.0)
    for change in _larger(plan):
        need = more * needed(replace(plan.execution, **change))["total"]
        if need < 0.92 * trial.card:
            return f"{as_flags(change)} is faster; needs {amount(need)} {room}"
    return None


def _save_less(trial: Trial) -> str | None:
    """A checkpoint is to be written before the next, and not to cost over 2%."""
    recipe, every = trial.plan.recipe, trial.plan.execution.save_every
    step = recipe.batch_size / _rate(trial)
    enough = math.ceil(max(trial.written, _pause(trial) / 0.02) / step)
    if not every < min(enough, recipe.steps):
        return None
    takes = f"{trial.written:.1f} s, {_pause(trial):.1f} s of it without training"
    return f"a checkpoint takes {takes}: raise --save_every to {enough}"


def _steady(trial: Trial) -> str | None:
    """Something else is at work if the speed changes much."""
    rates = _measured(trial, "images_per_second")
    share = min(rates) / max(statistics.median(rates), 0.005)
    if share > 0.7:
        return None
    return f"it fell to {share:.0%} of what is usual: another program, or heat?"


CHANGES: dict[str, Callable[[Trial], str | None]] = {
    "data": _wait_less,
    "compile": _compile,
    "memory": _use_memory,
    "save_every": _save_less,
    "steadiness": _steady,
}


def _say(found: Finding) -> bool:
    """Print a line of the report, once for all processes; whether it is bad."""
    failed = found.verdict == "FAIL"
    if int(os.environ.get("RANK", 0)) == 0 or failed:
        print(f"{found.verdict}  {found.what}: {found.told}", flush=True)
    return failed


def report(plan: Plan) -> int:
    """Ask all questions, carry out the trial if there is one, and say so; exit code."""
    if plan.trial:
        check_length(plan)
    failed = any([_say(examine(what, plan)) for what in QUESTIONS])
    if not plan.trial:
        return int(failed)
    with processes("cpu"):
        if all_reduce(torch.tensor([int(failed)])):
            _say(Finding("trial", "skip", "first mend what fails"))
            return 1
        try:
            done = try_out(plan)
        except (ValueError, OSError) as error:
            return int(_say(Finding("trial", "FAIL", str(error))))
        return int(rank() == 0 and any([_say(one) for one in findings(done)]))
