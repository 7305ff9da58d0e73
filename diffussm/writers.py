"""Writing while training goes on.

Generated from book/46_writers.md by `make export`: edit there.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from diffussm.batches import Batch
from diffussm.checkpoints import snapshot, write_checkpoint
from diffussm.distributed import leaves_alone, on_rank_zero, rank
from diffussm.files import whole_file
from diffussm.optimiser import describe_groups
from diffussm.options import Execution, Recipe, warn
from diffussm.resources import utilisation
from diffussm.training import TrainState

__all__ = ["BackgroundWriter", "Clock", "in_short", "Log", "read_log", "rewind_log"]


class BackgroundWriter:
    """Writes the checkpoints of a run by a thread, one at a time."""

    def __init__(self, run: Path, recipe: Recipe, execution: Execution) -> None:
        self._run, self._pool = run, ThreadPoolExecutor(1)
        keep = execution.keep_steps(recipe.batch_size)
        self._kept = (execution.keep_last, execution.keep_every, keep)
        self._written: Future[Path] | None = None

    def save(self, state: TrainState) -> None:
        """Copy the state and have it written; waits for the write before this one."""
        self.wait()
        taken = snapshot(state, keep=rank() == 0)
        if rank() == 0:
            task = partial(write_checkpoint, self._run, taken, *self._kept)
            self._written = self._pool.submit(task)

    def error(self) -> Exception | None:
        """Why the last checkpoint could not be written, if it could not."""
        done = self._written is not None and self._written.done()
        error = self._written.exception() if done and self._written else None
        return error if isinstance(error, Exception) else None

    def wait(self) -> None:
        """Until all that was saved is written; raises, in all, what went wrong."""
        on_rank_zero(lambda: self._written and self._written.result())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: object, error: BaseException | None, trace: object
    ) -> None:
        # whoever leaves alone waits for nothing, not even for this
        self._pool.shutdown(wait=not leaves_alone(error))


class Clock:
    """Times for the log: the only figures in it that a resumed run does not repeat."""

    def __init__(self, step: int, recipe: Recipe) -> None:
        self.recipe, self.step, self.waited = recipe, step, 0.0
        self.started = self.last = time.perf_counter()

    def awaited(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; how long each is waited for counts."""
        began = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what is not training: it does not count for the rate."""
        began = time.perf_counter()
        yield
        self.last += time.perf_counter() - began

    def read(self, step: int) -> dict[str, float]:
        """Seconds; since the last call images per second and the share of waiting."""
        now = time.perf_counter()
        spent = max(now - self.last, 1e-9)
        rate, waited = (step - self.step) / spent, self.waited / spent
        self.last, self.step, self.waited = now, step, 0.0
        return {
            "seconds": round(now - self.started, 3),
            "images_per_second": round(rate * self.recipe.batch_size, 2),
            "data_wait": round(waited, 4),
            "seconds_left": round((self.recipe.steps - step) / rate, 1),
        }


def in_short(row: dict[str, Any]) -> str:
    """A line of the log, for a person."""
    # None: all steps were left out
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
    left = row["seconds_left"]
    time = f"{left / 3600:.1f} h" if left >= 3600 else f"{left:.0f} s"
    held_out = row.get("held_out_loss")
    scored = "" if held_out is None else f", held out {held_out:.4f}"
    speed = f"{row['images_per_second']:.1f} images/s"
    return f"loss {loss}{scored}, {speed}, {time} left"


class Log:
    """The log of a run: a file of JSON lines, a progress bar, and who else listens."""

    def __init__(
        self,
        run: Path,
        recipe: Recipe,
        execution: Execution,
        state: TrainState,
        progress: bool,
        on_log: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.clock = Clock(state.step, recipe)
        self._file, self._recipe, self._on_log = run / "log.jsonl", recipe, on_log
        self._device = next(state.model.parameters()).device
        progress = progress and rank() == 0
        if progress:
            print(describe_groups(state.optimizer.param_groups))
        # in a file, the lines of the log are enough
        silent = not progress or (on_log is not None and not sys.stderr.isatty())
        self._bar = tqdm(
            total=recipe.steps,
            initial=state.step,
            disable=silent,
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 30,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, state: TrainState) -> None:
        """Show how far the run is, which may be less far than before."""
        self._bar.update(state.step - self._bar.n)

    def line(self, state: TrainState, figures: Mapping[str, float | None]) -> None:
        """Write a line."""
        row: dict[str, Any] = {"step": state.step}
        row |= {"images": state.step * self._recipe.batch_size, **figures}
        row |= self.clock.read(state.step)
        row |= utilisation(self._recipe.model, row["images_per_second"], self._device)
        row |= {"skipped": list(state.skipped)} if state.skipped else {}
        if rank() == 0:
            with self._file.open("a") as log:
                log.write(json.dumps(row) + "\n")
            if self._on_log is not None:
                self._on_log(row)
        self._bar.set_postfix_str(in_short(row))


def read_log(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a log, and how many lines of it are damaged."""
    if not file.exists():
        return [], 0
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    found = [_row(line) for line in lines if line.endswith("\n")]
    rows = [row for row in found if row is not None]
    return rows, len(found) - len(rows)


def _row(line: str) -> dict[str, Any] | None:
    """A line of the log; None if it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def rewind_log(path: Path, step: int) -> None:
    """Drop the rows after a step, and what is unfinished or damaged."""
    rows, damaged = read_log(path)
    if damaged:
        warn(f"damaged lines of {path} are dropped: {damaged}")
    if path.exists():
        kept = (json.dumps(row) + "\n" for row in rows if row["step"] <= step)
        with whole_file(path) as draft:
            draft.write_text("".join(kept), encoding="utf-8")
