"""What a run tells.

Generated from book/96_progress.md by `make export`: edit there.
"""

import math
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffussm.guards import explain

__all__ = ["say", "Told", "board_writer", "board_in", "log_row", "pin"]


def say(line: str) -> None:
    """Print a line, above the progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(line)
    sys.stdout.flush()


@dataclass
class Told:
    """Called with each row of a log, it prints those that a person is told.

    Args:
        steps: Of the whole run: the last is always told.
        clock: Gives the time in seconds.
        due: When the next row is told, by that clock.
    """

    steps: int
    clock: Callable[[], float] = time.monotonic
    due: float = -math.inf

    def __call__(self, row: dict[str, Any]) -> None:
        """Say a row, if it is time."""
        from diffussm.writers import in_short

        unusual = row["loss"] is None or row.get("held_out_loss") is not None
        if self.clock() >= self.due or unusual or row["step"] == self.steps:
            self.due = self.clock() + 30
            say(f"step {row['step']:,} of {self.steps:,}: {in_short(row)}")


def board_writer() -> Any:
    """TensorBoard's writer; ValueError if it is not installed."""
    with explain("--tensorboard: install tensorboard, or omit it", ImportError):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter


def board_in(writer: Callable[..., Any] | None, out: Path) -> Any:
    """A context with TensorBoard's board of a run; None if there is no writer."""
    from diffussm.checkpoints import checkpoints_of, step_of

    if writer is None:
        return nullcontext()
    again = 1 + max(map(step_of, checkpoints_of(out)), default=-1)
    return closing(writer(str(out / "tensorboard"), purge_step=again))


def log_row(board: Any, tell_row: Callable[..., None], row: dict[str, Any]) -> None:
    """Give a row of the log to a person, and to the board if there is one."""
    for name, value in row.items():
        if board is not None and isinstance(value, int | float):
            board.add_scalar(name, value, row["step"])
    tell_row(row)


def pin(board: Any, picture: Path, step: int) -> None:
    """Show a picture of a step on the board, if there is a board."""
    import numpy as np
    from PIL import Image

    if board is not None:
        with Image.open(picture) as image:
            pixels = np.asarray(image.convert("RGB"))
        board.add_image("samples", pixels, step, dataformats="HWC")
