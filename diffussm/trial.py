"""A trial.

Generated from book/93_trial.md by `make export`: edit there.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffussm.distributed import all_reduce, on_rank_zero, rank, stopping, together
from diffussm.doctor import Plan, written_to
from diffussm.options import Execution
from diffussm.probe import ADVICE, Job, free_port, meeting, started
from diffussm.recipes import open_data
from diffussm.run_folder import open_run
from diffussm.show import read_history

__all__ = ["rehearsed", "middle_of", "Trial", "try_out", "check_length"]


def rehearsed(plan: Plan) -> Execution:
    """How the trial of a plan is carried out."""
    every = max(plan.trial // 10, 1)
    middle = plan.trial // 2 // every * every
    how: Any = {"log_every": every, "keep": (str(middle),), "keep_every": 0}
    how |= {"save_every": plan.recipe.steps, "sample_every": 0, "score_every": 0}
    return replace(plan.execution, **how)


def middle_of(plan: Plan) -> int:
    """The step that a trial saves."""
    return int(rehearsed(plan).keep[0])


def _claim(plan: Plan) -> Path:
    """A folder for the trial, beside that of the run."""
    data = open_data(plan.recipe, plan.free, plan.out.parent)
    there = written_to(plan.out.parent)
    folder = Path(tempfile.mkdtemp(prefix=".diffussm-trial-", dir=there))
    open_run(folder, plan.recipe, rehearsed(plan), data)
    return folder


_TRAIN = (sys.executable, "-m", "diffussm", "train")


def _command(plan: Plan, folder: Path, program: Sequence[str]) -> list[str]:
    """What is typed to begin the run, and to resume it."""
    device = str(plan.device) if plan.processes == 1 else plan.device.type
    words = [str(folder / "config.json"), "--out", str(folder), "--no_grid"]
    return [*program, *words, "--device", device]


def _places(plan: Plan) -> list[dict[str, str]]:
    """What tells each process of the run who it is; all call it."""
    port = on_rank_zero(free_port)
    told = {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return [place | told for place in meeting(plan.processes)]


class _Watch:
    """A run, seen from outside: the new lines of its log, and its checkpoint."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.last = folder, plan.trial
        self.old = read_history(folder).rows
        self.saved = folder / "checkpoints" / f"step_{middle_of(plan):08d}"
        self.middle, self.limit = middle_of(plan), plan.limit
        self.advice = ADVICE.get(plan.device.type, ADVICE["cpu"])
        self.rows: list[dict[str, Any]] = []
        self.changed = self.asked = time.monotonic()
        self.patience, self.written = 10 * plan.limit, 0.0

    def enough(self) -> bool:
        """Whether all steps are done and the checkpoint is on the disk."""
        return self.step() >= self.last and self.saved.is_dir()

    def stuck(self) -> bool:
        """Whether a line of the log is overdue."""
        return time.monotonic() > self.changed + self.patience

    def step(self) -> int:
        """The last step that was logged."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    def look(self) -> None:
        """Read the log again."""
        now, before = time.monotonic(), self.step()
        if self.step() >= self.middle and not self.saved.is_dir():
            self.written = now - self.asked
        new = [row for row in read_history(self.folder).rows if row not in self.old]
        if len(new) <= len(self.rows):
            return
        gap = now - self.changed if self.rows else 0.0
        self.patience = max(self.limit, 5 * gap, self.patience if self.rows else 0.0)
        self.rows, self.changed = new, now
        if before < self.middle <= self.step():
            self.asked = now


def _over(watch: _Watch, jobs: Sequence[Job]) -> bool:
    """Whether the first process has seen enough; OSError in all if it went wrong."""
    if first := rank() == 0:
        watch.look()
    ended = [job for job in jobs if job.process.poll() is not None]
    seen = [first and watch.enough(), first and watch.stuck(), bool(ended), stopping()]
    enough, stuck, failed, stop = all_reduce(torch.tensor(seen).double()).tolist()
    if stop or (failed and not enough):
        told = _fate(ended[0]) if ended else "a process of the run has ended"
        raise together(OSError("asked to stop" if stop else told))
    if stuck:
        waited = f"no line for {watch.patience:.0f} s after step {watch.step()}"
        raise together(OSError(f"stuck: {waited}; {watch.advice}"))
    return bool(enough)


def _fate(job: Job) -> str:
    """Why a process has ended."""
    code = job.process.returncode
    if code >= 0:
        return f"a process ended with code {code}: {job.last_words()}"
    short = ", perhaps by the system, for want of main memory"
    why = short if code == -9 else f": {job.last_words()}"
    return f"a process was ended by signal {-code}{why}"


@dataclass(frozen=True)
class Trial:
    """What a run logged before it was killed, and after; what it took.

    Args:
        plan: What was tried.
        before, after: Rows of the log.
        size: Of its checkpoint, in bytes.
        written: Seconds until that was on the disk.
        resident: Main memory of a process, in bytes; 0: not known.
        card: Memory of a GPU, in bytes; 0: there is none.
    """

    plan: Plan
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]
    size: float
    written: float
    resident: float = 0.0
    card: float = 0.0


def _until_killed(
    plan: Plan, folder: Path, program: Sequence[str]
) -> tuple[_Watch, float]:
    """Start the run, and kill it after its last step; and the memory that it took."""
    watch = _Watch(folder, plan)
    with started(_command(plan, folder, program), _places(plan)) as jobs:
        while not _over(watch, jobs):
            time.sleep(0.05)
        return watch, max(_resident(job.process.pid) for job in jobs)


def _resident(pid: int) -> float:
    """The most main memory (bytes) a process has held, as Linux says it; else 0."""
    with suppress(OSError, KeyError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        said = dict(line.split(":", 1) for line in lines)["VmHWM"]
        return 1024.0 * int(said.split()[0])
    return 0.0


def _size(folder: Path) -> float:
    """The bytes of a checkpoint; no process goes on before all have asked."""
    files = folder.rglob("*") if rank() == 0 else ()
    own = sum(file.stat().st_size for file in files if file.is_file())
    return float(all_reduce(torch.tensor(float(own), dtype=torch.float64)))


def _card(device: torch.device) -> float:
    """The memory (bytes) of a GPU; 0 for a CPU."""
    if device.type != "cuda":
        return 0.0
    return float(torch.cuda.get_device_properties(device).total_memory)


def try_out(plan: Plan, program: Sequence[str] = _TRAIN) -> Trial:
    """Carry out the trial of a plan; all processes call it.

    Raises:
        ValueError: the recipe is too short, or its data do not fit.
        OSError: the run has failed, or is stuck; the message says where.
    """
    check_length(plan)
    folder = on_rank_zero(lambda: _claim(plan))
    try:
        first, resident = _until_killed(plan, folder, program)
        second, _ = _until_killed(plan, folder, program)
        size = _size(first.saved)
        parts = size, first.written, resident, _card(plan.device)
        return Trial(plan, first.rows, second.rows, *parts)
    finally:
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def check_length(plan: Plan) -> None:
    """ValueError unless a trial is long enough to measure, and ends before the run."""
    most = plan.recipe.steps // 2  # or it might be done before it is killed
    if not _LEAST <= plan.trial <= most:
        raise ValueError(
            f"a trial of {plan.trial} steps: take {_LEAST} or more, and at most half "
            f"of the {plan.recipe.steps} of the recipe"
        )


_LEAST = 10
