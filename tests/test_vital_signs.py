"""A run that is watched: slow, stuck and silent processes."""

import gc
import gzip
import json
import os
import time
from dataclasses import replace

import pytest
import torch
from commands import SMALL, diffussm
from processes import SHARED, cluster, fifty, outcomes, start, together
from tiny import SELDOM, assert_same_state, changed, run_tiny

from diffussm import distributed, runs, vital_signs
from diffussm.data import TensorData, digits
from diffussm.distributed import limit_waiting, on_rank_zero, rank
from diffussm.runs import train
from diffussm.vital_signs import Heartbeat, WorkTimes, garbage_kept


class Slow(TensorData):
    """The second process waits for its images."""

    def __init__(self, seconds, *steps):
        data = fifty()
        super().__init__(data.images, data.labels)
        self.seconds, self.steps, self.calls = seconds, steps, 0

    def batch(self, *arguments):
        self.calls += 1
        if rank() == 1 and (not self.steps or self.calls in self.steps):
            time.sleep(self.seconds)
        return super().batch(*arguments)


def run_slow(run, seconds, steps, **options):
    with cluster() as device:
        how, draw = {"progress": False, "device": device}, options.pop("draw", None)
        execution = replace(SELDOM, **options)
        data = Slow(seconds, *steps)
        train(SHARED, run, execution, dataset=data, on_samples=draw, **how)


@pytest.mark.slow
def test_the_log_names_the_process_that_all_wait_for(tmp_path):
    """The images are read while a step is computed: what is left of two seconds."""
    together(2, run_slow, tmp_path / "run", 2.0, ())
    rows = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    row = json.loads(rows[-1])
    assert row["slowest_process"] == 1
    assert row["work_seconds_slowest"] > 2 * row["work_seconds_fastest"] > 0


@pytest.mark.slow
def test_a_stuck_process_is_left_within_the_limit_of_a_step(tmp_path):
    began, started = time.monotonic(), start(2, run_stuck, tmp_path / "stuck")
    (fine, told), *_ = outcomes(started, timeout=60)
    assert not fine and "Timed out" in told
    assert time.monotonic() - began < 20


def run_stuck(run):
    run_slow(run, 30.0, (4,), step_limit=1.0)


def draws(model, step):
    time.sleep(2.5)


def run_patient(run):
    """The start takes longer than a step may, and so does what one does alone."""
    run_slow(run, 2.5, (1,), step_limit=1.0, sample_every=5, draw=draws)


@pytest.mark.slow
def test_a_slow_start_and_a_drawing_process_are_waited_for(tmp_path):
    together(2, run_patient, tmp_path / "run")


def limits():
    with cluster() as device:
        limit_waiting(0.5)
        on_rank_zero(lambda: time.sleep(1.5))
        return str(device), {k: v for k, v in os.environ.items() if "_FR_" in k}


@pytest.mark.slow
def test_the_first_process_is_waited_for_and_flights_are_recorded():
    for device, recorder in together(2, limits):
        assert device == "cpu" and recorder == {"TORCH_FR_BUFFER_SIZE": "2000"}


def test_records_of_what_hung_go_into_the_folder_of_the_run(tmp_path, monkeypatch):
    """The prefix is in place when the processes meet, for that is when it is read."""
    seen, name = [], "TORCH_FR_DUMP_TEMP_FILE"
    monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", raising=False)
    meet = distributed._join

    def join(*arguments):
        seen.append(os.environ.get(name))
        return meet(*arguments)

    monkeypatch.setattr(distributed, "_join", join)
    words = f"train digits --out {tmp_path}/run --steps 1 --no_grid {SMALL}"
    diffussm(words)
    assert name not in os.environ
    monkeypatch.setenv(name, "elsewhere_")
    diffussm(words)
    assert seen == [f"{tmp_path}/run/flight_process_", "elsewhere_"]


def test_a_gpu_stamps_its_own_clock(monkeypatch):
    stamps = iter([1000.0, 1000.0, 2000.0, 3500.0, 4000.0])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream == "the stream of cuda:1"
            self.at = next(stamps)

        def elapsed_time(self, later):
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: f"the stream of {device}"
    )
    monkeypatch.setattr(vital_signs, "world_size", lambda: 2)
    monkeypatch.setattr(
        vital_signs, "all_reduce", lambda x: x + torch.tensor([0.0, 9.0])
    )
    network = torch.nn.Linear(1, 1)
    with WorkTimes(network, torch.device("cuda:1")) as times:
        times.begin()
        for _ in range(2):  # micro-batches
            network(torch.ones(1))
        times.end()
        assert times.read() == {
            "work_seconds_fastest": 2.5,
            "work_seconds_slowest": 9.0,
            "slowest_process": 1,
        }
    network(torch.ones(1))  # outside nothing is stamped


def test_a_run_beats_between_steps_and_is_still_when_it_has_ended(
    tmp_path, monkeypatch
):
    seen, file = [], tmp_path / "run" / "heartbeat.json"
    often = lambda run: Heartbeat(run, every=0.0)  # noqa: E731
    monkeypatch.setattr(runs, "Heartbeat", often)
    recipe, execution = changed({"steps": 4, "log_every": 2})

    def look(row):
        seen.append((row["step"], json.loads(file.read_text())["step"]))
        if row["step"] == 4 and len(seen) == 2:
            raise OSError("the first time it ends by an accident")

    how = {"dataset": TensorData(*digits("train")), "progress": False}
    with pytest.raises(OSError, match="accident"):
        train(recipe, tmp_path / "run", execution, "cpu", on_log=look, **how)
    assert seen == [(2, 2), (4, 4)] and file.exists()
    train(recipe, tmp_path / "run", execution, "cpu", on_log=look, **how)
    assert not file.exists()


@pytest.mark.parametrize("ended", [runs.Preempted, FloatingPointError])
def test_a_run_that_stops_and_says_why_leaves_no_heartbeat(
    tmp_path, monkeypatch, ended
):
    def stop(run):
        run.heart.beat(run.state.step)
        assert (tmp_path / "run" / "heartbeat.json").exists()
        raise ended

    monkeypatch.setattr(runs, "_loop", stop)
    recipe, execution = changed({"steps": 4})
    how = {"dataset": TensorData(*digits("train")), "progress": False}
    with pytest.raises(ended):
        train(recipe, tmp_path / "run", execution, "cpu", **how)
    assert not (tmp_path / "run" / "heartbeat.json").exists()


def test_a_heart_that_cannot_be_written_stops_nothing(tmp_path):
    Heartbeat(tmp_path / "gone").beat(1)


def test_garbage_is_collected_at_lines_of_the_log(tmp_path, monkeypatch):
    habits, collected = [], []
    monkeypatch.setattr(gc, "collect", collected.append)
    recipe, execution = changed({"steps": 4, "log_every": 2})
    data = TensorData(*digits("train"))
    on_log = lambda row: habits.append(gc.isenabled())  # noqa: E731
    how = {"on_log": on_log, "dataset": data, "progress": False}
    train(recipe, tmp_path / "run", execution, "cpu", **how)
    assert habits == [False, False] and collected == [1, 1]
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.disable()
    with pytest.raises(KeyError), garbage_kept():
        raise KeyError
    assert not gc.isenabled()
    gc.enable()


def test_a_step_is_recorded_and_nothing_else_changes(tmp_path):
    plain = run_tiny(tmp_path / "plain", steps=4)
    watched = run_tiny(tmp_path / "watched", steps=4, profile=3)
    assert_same_state(plain, watched)
    (trace,) = (tmp_path / "watched" / "profile").iterdir()
    assert trace.name == "step_00000003_process_0.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = {event["name"] for event in events}
    assert {"aten::_fused_adamw_", "aten::fft_rfft"} <= names
    assert not (tmp_path / "plain" / "profile").exists()
