"""The matrix of ways to train, which `benchmarks/gpu.sh` begins with: it can fail."""

import json
import time
from pathlib import Path

import pytest

from benchmarks import matrix
from diffussm.checkpoints import find_checkpoint
from diffussm.options import from_flat
from diffussm.runs import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


class Killed(Exception):
    """As near to SIGKILL as one process can come."""


def started(job, count, change=lambda options: None, save=True):
    """Its job, done here by one process instead of by `count`."""
    job = json.loads(json.dumps(job))  # as it travels
    change(job["options"])
    run, (recipe, execution) = Path(job["run"]), from_flat(job["options"])

    def on_log(row):
        if row["step"] == job["killed"]:
            while save and find_checkpoint(run) is None:
                time.sleep(0.01)
            raise Killed

    try:
        train(recipe, run, execution, "cpu", progress=False, on_log=on_log)
    except Killed:
        return 137
    return 0


def test_the_matrix_has_every_pair_and_each_is_saved_killed_and_resumed(capsys):
    seen = []

    def starts(job, count):
        seen.append((job["killed"], job["options"]))
        return started(job, count)

    assert matrix.walk("cpu", 2, 16, "recompute", starts) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in said] == [
        "ddp, recompute, 2 processes",
        "fsdp, recompute, 2 processes",
    ]
    assert all("right to" in line for line in said)
    assert [killed for killed, _ in seen] == [15, None, 15, None]
    assert {o["activation_checkpointing"] for _, o in seen} == {"elementwise"}
    names = {name for name, _ in matrix.cases()}
    assert len(names) == 14 and {"ddp, compile", "fsdp, micro-batches"} < names


def test_the_matrix_tries_what_a_gpu_is_to_train_with(capsys):
    tried = {(o["strategy"], o.get("convolution", "fft")) for _, o in matrix.cases()}
    for strategy in ("ddp", "fsdp"):
        for convolution in ("fft", "chunked_triton", "auto"):
            assert (strategy, convolution) in tried
    unwanted = "left out, it is for a GPU"  # and what is not tried is no success
    assert matrix.walk("cpu", 2, 16, "chunks", lambda *_: 0) == 1
    assert capsys.readouterr().out.count(unwanted) == 4


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"change": lambda options: options.update(lr=2e-3)}, "on a CPU"),
        ({"change": lambda options: options.update(save_every=100), "save": False}, ""),
    ],
)
def test_the_matrix_names_a_way_that_learns_something_else(capsys, change, fault):
    def starts(job, count):
        return started(job, count, **change)

    assert matrix.walk("cpu", 2, 16, "ddp, plain", starts) == 1
    said = capsys.readouterr().out
    assert fault in said and "right to" not in said
    assert matrix.walk("cpu", 2, 16, "ddp, plain", lambda *_: 0) == 1
    assert "it ended before it was killed" in capsys.readouterr().out
