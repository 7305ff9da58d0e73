"""What a run tells: a line now and then, and a board."""

import contextlib
import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffussm.progress import Told, board_in, board_writer, log_row, pin

ROW = {"loss": 0.5, "images_per_second": 600.0, "seconds_left": 7200.0}


def spoken(times, steps=100, **more):
    """The steps that are said, of rows at these times (by step)."""
    out, now = io.StringIO(), [0.0]
    told = Told(steps, clock=lambda: now[0])
    with contextlib.redirect_stdout(out):
        for step, now[0] in times.items():
            told(ROW | {"step": step} | more)
    return [int(line.split()[1]) for line in out.getvalue().splitlines()]


def test_a_person_is_told_the_first_row_the_last_and_one_in_thirty_seconds():
    assert spoken({1: 0, 2: 1, 3: 29.9, 4: 30, 5: 59, 6: 61, 100: 62}) == [1, 4, 6, 100]
    assert spoken({1: 0, 2: 100, 3: 101, 4: 129, 5: 130}) == [1, 2, 5]
    assert spoken({1: 0, 2: 1}, loss=None) == [1, 2]  # what was left out is said
    assert spoken({1: 0, 2: 1}, held_out_loss=0.6) == [1, 2]


def test_two_million_steps_stay_small():
    """40,000 rows in ten days; a row each were more, and a bar's lines a hundred MB."""
    out, now, steps, seconds = io.StringIO(), [0.0], 2_000_000, 864_000
    told = Told(steps, clock=lambda: now[0])
    with contextlib.redirect_stdout(out):
        for step in range(50, steps + 1, 50):
            now[0] = seconds * step / steps
            told(ROW | {"step": step})
    size = len(out.getvalue())
    assert size < 100 * (seconds / 30 + 2) and size < 2.5e6
    assert out.getvalue().endswith("loss 0.5000, 600.0 images/s, 2.0 h left\n")


def test_the_board_gets_every_row_and_the_pictures(tmp_path):
    rows, shown, said = [], [], []
    board = SimpleNamespace(
        add_scalar=lambda *row: rows.append(row),
        add_image=lambda *what, dataformats: shown.append((what, dataformats)),
    )
    for step in (1, 2):
        log_row(board, said.append, ROW | {"step": step, "skipped": [3]})
    assert ("loss", 0.5, 2) in rows and "skipped" not in [name for name, *_ in rows]
    assert len(rows) == 8 and [row["step"] for row in said] == [1, 2]
    Image.new("L", (6, 4), 200).save(tmp_path / "x.png")
    pin(board, tmp_path / "x.png", 7)
    ((name, pixels, step), form) = shown[0]
    assert (name, step, form) == ("samples", 7, "HWC")
    assert pixels.shape == (4, 6, 3) and np.all(pixels == 200)


def test_a_board_drops_what_the_log_of_a_resumed_run_drops(tmp_path):
    for last in (4, 3):  # killed, then begun again from the checkpoint of step 2
        with board_in(board_writer(), tmp_path) as board:
            for step in range(1 if last == 4 else 3, last + 1):
                row = {"loss": float(last), "step": step}
                log_row(board, lambda row: None, row)
        (tmp_path / "checkpoints" / "step_00000002").mkdir(parents=True, exist_ok=True)
    seen = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(one.step, one.value) for one in seen] == [(1, 4.0), (2, 4.0), (3, 3.0)]


def test_without_a_board_nothing_is_written(tmp_path):
    with board_in(None, tmp_path) as board:
        log_row(board, lambda row: None, ROW | {"step": 1})
        pin(board, tmp_path / "absent.png", 1)
    assert board is None and not list(tmp_path.iterdir())


def test_a_board_is_closed_whatever_happens(tmp_path):
    closed = []
    board = SimpleNamespace(close=lambda: closed.append(1))
    with pytest.raises(OSError), board_in(lambda folder, **_: board, tmp_path):
        raise OSError
    assert closed == [1]
