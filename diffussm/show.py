"""Look at a run.

Generated from book/48_show.md by `make export`: edit there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffussm.checkpoints import checkpoints_of, step_of
from diffussm.files import whole_file
from diffussm.guards import expect_there, explain
from diffussm.optimiser import learning_rate_factor
from diffussm.run_folder import RunConfig, read_run
from diffussm.vital_signs import FLIGHT
from diffussm.writers import read_log

__all__ = ["History", "read_history", "curve", "duration", "summary", "draw_history"]


_Curve = tuple[str, list[int], list[float]]  # what it is, steps, values


@dataclass(frozen=True)
class History:
    """What the folder of a run tells: its configuration, and the rows of its log."""

    run: Path
    config: RunConfig
    rows: list[dict[str, Any]]
    damaged: int = 0  # lines of the log that cannot be read

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """The steps at which a figure was logged, and its values."""
        found = [(row["step"], row.get(name)) for row in self.rows]
        is_number = (int, float)
        kept = [
            (s, v) for s, v in found if isinstance(v, is_number) and math.isfinite(v)
        ]
        return [step for step, _ in kept], [float(value) for _, value in kept]

    def step(self) -> int:
        """How many steps are done, as far as the log and the checkpoints know."""
        saved = [step_of(folder) for folder in checkpoints_of(self.run)]
        return max([row["step"] for row in self.rows[-1:]] + saved, default=0)

    def learning_rates(self) -> tuple[list[int], list[float]]:
        """The learning rate at each step that was logged."""
        recipe, steps = self.config.recipe, [row["step"] for row in self.rows]
        return steps, [recipe.lr * learning_rate_factor(s - 1, recipe) for s in steps]

    def picture(self) -> Path | None:
        """The newest grid of samples that training has drawn."""
        drawn = [*self.run.glob("samples/step_*.png"), *self.run.glob("samples.png")]
        return max(drawn, key=lambda file: file.stat().st_mtime, default=None)

    def last_alive(self) -> float:
        """When the run has written last, in seconds as of `time.time()`."""
        files = [self.run / "config.json", self.run / "log.jsonl", self.picture()]
        files += [self.run / "heartbeat.json", *checkpoints_of(self.run)]
        return max(file.stat().st_mtime for file in files if file and file.exists())

    def losses(self) -> dict[str, _Curve]:
        """The losses that were logged, by name."""
        return self._curves(_QUARTILES | self._beginning("held_out"))

    def scores(self) -> dict[str, _Curve]:
        """Scores of the average that were logged, by name."""
        return self._curves(self._beginning("score_"))

    def _beginning(self, word: str) -> dict[str, str]:
        """The columns whose names begin so, in words."""
        logged = {name for row in self.rows for name in row if name.startswith(word)}
        return {name: name.replace("_", " ") for name in sorted(logged)}

    def _curves(self, told: dict[str, str]) -> dict[str, _Curve]:
        found = {name: (words, *self.column(name)) for name, words in told.items()}
        return {name: one for name, one in found.items() if one[1]}


def read_history(run: str | Path) -> History:
    """The history of the run in a folder.

    Raises:
        FileNotFoundError, ValueError: no run, or its configuration is damaged.
    """
    run = expect_there(Path(run, "config.json"), "that of a training run").parent
    return History(run, read_run(run), *read_log(run / "log.jsonl"))


_BLOCKS = "▁▂▃▄▅▆▇█"


def curve(values: Sequence[float], width: int = 40) -> str:
    """Positive values as a line of blocks, on a logarithmic scale."""
    logs = np.log([value for value in values if value > 0])
    if not len(logs):
        return ""
    parts = np.array_split(logs, min(width, len(logs)))
    heights = np.array([part.mean() for part in parts])
    heights = (heights - heights.min()) / (np.ptp(heights) or 1)
    return "".join(_BLOCKS[round(7 * float(height))] for height in heights)


_QUARTILES = {
    "mse_q1": "least noise",
    "mse_q2": "t in the 2nd quarter",
    "mse_q3": "t in the 3rd quarter",
    "mse_q4": "most noise",
}


def _state(history: History, now: float) -> str:
    """Whether a run is done, goes on, or has fallen silent."""
    if history.step() >= history.config.recipe.steps:
        return "done"
    if (asked := history.run / "preempted").is_file():
        return asked.read_text(errors="replace").strip()
    silence, due = max(now - history.last_alive(), 0.0), _due(history)
    said = f"last alive {duration(silence)} ago"
    if (history.run / "heartbeat.json").is_file() and silence > 600:
        return f"silent for {duration(silence)}: stopped or stuck"
    if due is None or silence <= max(5 * due, 60):
        return said
    return f"{said}, where a line is due every {duration(due)}: stopped or stuck"


def _due(history: History) -> float | None:
    """Seconds between two lines of the log, at the last rate; None: not known."""
    _, rates = history.column("images_per_second")
    recipe, execution = history.config.recipe, history.config.execution
    images = execution.log_every * recipe.batch_size
    return images / rates[-1] if rates and rates[-1] > 0 else None


def duration(seconds: float) -> str:
    """Seconds, in the unit in which one would say them."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def summary(history: History, now: float) -> str:
    """A run in a few lines, as they are at `now`, in seconds as of `time.time()`."""
    step, recipe = history.step(), history.config.recipe
    lines = [
        f"{history.run}: step {step:,} of {recipe.steps:,}; {_state(history, now)}"
    ]
    for name, (words, _, values) in (history.losses() | history.scores()).items():
        shown = f"{curve(values):<40}"
        lines.append(f"  {name:<9} {shown} {values[-1]:<9.4g} {words}")
    if not history.rows:
        lines.append("  the log has no line yet")
    if history.damaged:
        lines.append(f"  {history.damaged} lines of the log are damaged: left out")
    facts = _facts(history).items()
    return "\n".join(lines + [f"  {name:<13} {told}" for name, told in facts])


def _facts(history: History) -> dict[str, str]:
    """What else one asks of a run, in words."""
    saved, picture = checkpoints_of(history.run), history.picture()
    facts = {"checkpoint": saved[-1].name if saved else "none yet"}
    facts["picture"] = str(picture.relative_to(history.run)) if picture else "none yet"
    facts |= _flights(history.run)
    if not history.rows:
        return facts
    last, (_, lrs) = history.rows[-1], history.learning_rates()
    skipped = ", ".join(map(str, last.get("skipped") or [])) or "none"
    _, rates = history.column("images_per_second")
    speed = {"speed": f"{rates[-1]:,.1f} images/s{_left(last)}"} if rates else {}
    return {
        "learning rate": f"{lrs[-1]:.3g}",
        **speed,
        "skipped steps": skipped,
        **facts,
    }


def _flights(run: Path) -> dict[str, str]:
    """What PyTorch has recorded of processes that hung, and how it is read."""
    files = sorted(run.glob(f"{FLIGHT}*"))
    read = f"torchfrtrace --prefix {FLIGHT} {run}"
    return {"it hung": f"{len(files)} records; {read}"} if files else {}


def _left(row: dict[str, Any]) -> str:
    left = row.get("seconds_left")
    return f", {duration(left)} left" if isinstance(left, int | float) and left else ""


def _figure(history: History) -> Any:
    """Losses, learning rate, speed and the newest samples: a matplotlib figure."""
    if not history.rows:
        raise ValueError(f"{history.run}: no line in the log yet, so nothing to draw")
    with explain("a picture needs matplotlib, the extra 'show'", ImportError):
        from matplotlib.figure import Figure
    picture = history.picture()
    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    beside = ["samples"] if picture else []
    heights = {"loss": 3, "score": 2, "learning rate": 1, "images/s": 1}
    if not history.scores():
        del heights["score"]
    rows: Any = [[name, *beside] for name in heights]
    sizes: Any = {
        "height_ratios": [*heights.values()],
        "width_ratios": [2, *[1] * len(beside)],
    }
    axes = figure.subplot_mosaic(rows, **sizes)
    _fill(axes, history)
    figure.suptitle(f"{history.run.resolve().name}, step {history.step():,}")
    return figure


def draw_history(history: History, out: str | Path) -> None:
    """Write losses, learning rate, speed and the newest samples as one PNG.

    Raises:
        ValueError: nothing is logged yet, or matplotlib is not installed.
    """
    figure = _figure(history)
    with whole_file(out) as draft:
        figure.savefig(draft, format="png", dpi=120)


# told apart with any of the common kinds of colour blindness (Okabe and Ito)
_COLORS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#000000"]
_ABOVE: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "frameon": False}


def _fill(axes: Any, history: History) -> None:
    """Draw into the axes of a picture, by name."""
    axes["loss"].set_prop_cycle(color=_COLORS)
    for name, (words, steps, values) in history.losses().items():
        axes["loss"].semilogy(steps, values, label=f"{name}: {words}")
    axes["loss"].legend(fontsize="small", ncols=2, **_ABOVE)
    for name, (_, steps, values) in history.scores().items():
        axes["score"].plot(steps, values, "o-", ms=3, label=name)
        axes["score"].legend(fontsize="small")
    axes["learning rate"].plot(*history.learning_rates())
    axes["images/s"].plot(*history.column("images_per_second"))
    axes["images/s"].set_ylim(bottom=0)
    axes["images/s"].set_xlabel("step")
    for name in axes.keys() - {"samples"}:
        axes[name].set_ylabel(name)
    if (picture := history.picture()) is not None:
        _show_picture(axes["samples"], picture)


def _show_picture(axis: Any, picture: Path) -> None:
    """A grid of samples; where it is damaged, why it cannot be read."""
    from PIL import Image

    axis.axis("off")
    axis.set_title(picture.name)
    try:
        with Image.open(picture) as image:
            axis.imshow(np.asarray(image.convert("RGB")))
    except OSError as error:
        said = axis.text(0.5, 0.5, f"cannot be read: {error}", ha="center", wrap=True)
        said.set_in_layout(False)  # a long path would leave no room for the curves
