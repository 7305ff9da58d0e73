"""Where a run stands: read from its folder, whatever state that is in."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import diffussm, listing
from PIL import Image
from tiny import TINY

from diffussm.options import Execution
from diffussm.run_folder import RunConfig
from diffussm.show import curve, draw_history, duration, read_history, summary

RECIPE = replace(TINY, steps=1000, warmup=200, cooldown=300)
EVERY = Execution(log_every=100)


def row(step, **more):
    mse = {f"mse_q{q}": 1.0 / (step * q) for q in (1, 2, 3, 4)}
    return {
        "step": step,
        "images_per_second": 50.0,
        "seconds_left": 90.0,
        **mse,
        **more,
    }


def made(run, *rows, end=""):
    """The folder of a run whose log has these rows."""
    run.mkdir()
    RunConfig(RECIPE, EVERY, {"classes": ["a", "b"]}).write(run)
    text = "".join(json.dumps(one) + "\n" for one in rows)
    (run / "log.jsonl").write_text(text + end)
    return run


def picture(file, level, when):
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((40, 40), level, np.uint8)).save(file)
    os.utime(file, (when, when))


def test_each_figure_comes_from_the_row_that_has_it(tmp_path):
    rows = row(100, held_out_mse=0.5), row(200, mse_q1=None), {"step": 300}
    history = read_history(made(tmp_path / "run", *rows, row(400, mse_q1=float("nan"))))
    assert history.column("mse_q1") == ([100], [0.01])
    assert history.column("mse_q2") == ([100, 200, 400], [1 / 200, 1 / 400, 1 / 800])
    assert history.losses()["held_out_mse"] == ("held out mse", [100], [0.5])
    assert list(history.losses())[:4] == ["mse_q1", "mse_q2", "mse_q3", "mse_q4"]
    steps, rates = history.learning_rates()  # rises to 200, falls from 700
    assert steps == [100, 200, 300, 400]
    assert rates == pytest.approx([RECIPE.lr * f for f in (0.5, 1, 1, 1)])
    end = read_history(made(tmp_path / "end", row(850))).learning_rates()[1]
    assert end == pytest.approx([RECIPE.lr * 151 / 300])


def test_half_a_line_is_left_and_damaged_ones_are_counted(tmp_path):
    run = made(tmp_path / "run", row(100), row(200), end='{"step": 300, "mse_q1": 0.1')
    history = read_history(run)
    assert [one["step"] for one in history.rows] == [100, 200] and not history.damaged
    with (run / "log.jsonl").open("ab") as log:
        log.write(b'\n\x00\x00\n[]\n{"step": null}\n"\xff\n' + b"[" * 10**5 + b"\n")
        log.write(json.dumps(row(400)).encode() + b"\n")
    history = read_history(run)
    assert [one["step"] for one in history.rows] == [100, 200, 400]
    assert "6 lines of the log are damaged" in summary(history, 0.0)


def test_a_curve_is_straight_for_powers():
    assert curve([10.0**-k for k in range(8)]) == "█▇▆▅▄▃▂▁"
    assert curve([1.0]) == "▁" and curve([]) == "" == curve([0.0])
    assert curve([10.0 ** -(k // 100) for k in range(800)], 8) == "█▇▆▅▄▃▂▁"


def test_a_run_that_goes_on_is_told_from_one_that_is_silent(tmp_path):
    run = made(tmp_path / "run", row(100))
    last = (run / "log.jsonl").stat().st_mtime
    due = 100 * RECIPE.batch_size / 50  # seconds
    patience = max(60, 5 * due)

    def said(seconds):
        return summary(read_history(run), last + seconds).splitlines()[0]

    assert "step 100 of 1,000" in said(0)
    assert "stopped or stuck" not in said(patience - 1)
    assert "stopped or stuck" in said(patience + 1) and "2.0 days ago" in said(172800)
    (run / "heartbeat.json").touch()
    os.utime(run / "heartbeat.json", (last + 3600, last + 3600))
    assert "stopped or stuck" not in said(3600 + patience - 1)
    assert "silent for 11.0 min: stopped or stuck" in said(3600 + 660)
    (run / "preempted").write_text("asked to stop: saved step 100 of 1000\n")
    assert said(10**6).endswith("asked to stop: saved step 100 of 1000")
    (run / "checkpoints" / "step_00001000").mkdir(parents=True)
    assert "step 1,000 of 1,000; done" in said(10**6)


def test_the_newest_files_and_what_was_left_out_are_named(tmp_path):
    run = made(tmp_path / "run", row(100, skipped=[7, 93]))
    for step in (100, 40):
        (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    picture(run / "samples" / "step_00000100.png", 10, 2000)
    picture(run / "samples.png", 200, 1000)
    told = summary(read_history(run), 0.0)
    for line in (
        "step_00000100",
        "samples/step_00000100.png",
        "7, 93",
        "50.0 images/s",
    ):
        assert line in told
    assert "90 s left" in told
    os.utime(run / "samples.png", (3000, 3000))
    assert read_history(run).picture() == run / "samples.png"


def test_records_of_what_hung_are_named_with_what_reads_them(tmp_path):
    made(tmp_path / "run", row(1))
    assert "torchfrtrace" not in summary(read_history(tmp_path / "run"), 0.0)
    for process in range(2):
        (tmp_path / "run" / f"flight_process_{process}").write_bytes(b"x")
    told = summary(read_history(tmp_path / "run"), 0.0)
    assert "2 records" in told
    assert f"torchfrtrace --prefix flight_process_ {tmp_path}/run" in told


def test_the_picture_shows_the_newest_samples_or_why_not(tmp_path):
    run, out = made(tmp_path / "run", row(100), row(200)), tmp_path / "x.png"

    def drawn():
        draw_history(read_history(str(run)), str(out))
        return np.asarray(Image.open(out).convert("RGB")).astype(int)

    alone = drawn()
    picture(run / "samples.png", 77, 1000)
    beside = drawn()
    assert beside.shape == alone.shape
    assert (beside == 77).all(-1).sum() > 10**4 > (alone == 77).all(-1).sum()
    (run / "samples.png").write_bytes(b"no picture")
    assert (drawn() == 77).all(-1).sum() < 10**4


def test_the_command_reads_and_writes_one_file(work, tmp_path):
    before = listing(work)
    said = diffussm("show {w}/digits --out {t}/x.png", w=work, t=tmp_path)
    assert "step 4 of 4; done" in said and "wrote" in said and "mse_q4" in said
    assert listing(work) == before and (tmp_path / "x.png").is_file()
    again = "show {w}/digits --out {t}/x.png"
    assert "exists" in diffussm(again, 1, w=work, t=tmp_path)
    diffussm(again + " --overwrite", w=work, t=tmp_path)
    run = made(tmp_path / "run", row(100))
    assert "show.png" in diffussm(f"show {run}")
    assert "show.png" in diffussm(f"show {run}")  # drawn anew


def test_what_is_no_run_or_has_not_begun_gets_a_sentence(tmp_path):
    assert "config.json" in diffussm(f"show {tmp_path}", 1)
    run = made(tmp_path / "run")
    said = diffussm(f"show {run}")
    assert "step 0 of 1,000" in said and "no line yet" in said and "no picture" in said
    assert "nothing to draw" in diffussm(f"show {run} --out {tmp_path}/x.png", 1)
    assert "ends in .png" in diffussm(f"show {run} --out {tmp_path}/x.svg", 1)
    (run / "log.jsonl").unlink()
    assert "no line yet" in diffussm(f"show {run}")
    (run / "config.json").write_text('{"recipe": ')
    assert "damaged" in diffussm(f"show {run}", 1)
    (run / "config.json").write_text("{}")
    assert "not of a training run" in diffussm(f"show {run}", 1)


def test_a_run_of_the_old_form_is_shown(tmp_path):
    shutil.copytree(Path(__file__).parent / "run_before", tmp_path / "run")
    said = diffussm(f"show {tmp_path}/run")
    assert "step 3 of 3; done" in said and "step_00000003" in said and "mse_q2" in said


def test_without_matplotlib_the_lines_are_printed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = made(tmp_path / "run", row(100))
    said = diffussm(f"show {run}")
    assert "mse_q1" in said and "no picture: a picture needs matplotlib" in said
    assert "'show'" in diffussm(f"show {run} --out {tmp_path}/x.png", 1)
    assert not list(tmp_path.glob("**/*.png"))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (0.0412, "0.041 s"), (9.96, "10 s"), (90, "90 s"), (7200, "2.0 h")],
)
def test_a_duration_is_never_rounded_to_nothing(seconds, said):
    assert duration(seconds) == said
