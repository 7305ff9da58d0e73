"""Trials: the very run, killed and resumed, and whatever may go wrong with it."""

import json
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import SMALL, diffussm
from processes import cluster, outcomes, start
from tiny import TINY

from diffussm import doctor, trial
from diffussm.distributed import processes, rank, request_stop
from diffussm.doctor import Plan
from diffussm.options import Execution
from diffussm.verdict import findings

LONG = replace(TINY, steps=1000)
PRETEND = str(Path(__file__).parent / "pretend_run.py")


def plan(out, recipe=LONG, **options):
    known = {"device": torch.device("cpu"), "processes": 1, "trial": 10, "limit": 60.0}
    return Plan(recipe, Execution(), out=out / "run", **known | options)


def tried(how, out, **options):
    """A trial of a run that goes as `how` says; nothing is left of it."""
    with processes("cpu"):
        try:
            return trial.try_out(plan(out, **options), [sys.executable, PRETEND, how])
        finally:
            assert not list(out.iterdir())


def told(done):
    """The report of a trial: what was said of each thing."""
    return {found.what: f"{found.verdict} {found.told}" for found in findings(done)}


def test_a_run_is_killed_and_resumed_and_its_losses_compared(tmp_path):
    said = told(tried("well", tmp_path, price=2.0))
    assert "resumed from 5: losses are equal" in said["resume"]
    assert said["speed"].startswith("pass 80.0 images/s, 0% of the time")
    assert said["checkpoint"].startswith("pass 2.5 MB; training stood still")
    assert "MB of main memory" in said["memory"]
    # 1000 steps of 8 images, 80 a second; an hour is 2
    assert "8,000 images: 100 s on 1 processes, 0.06 at 2" in said["whole run"]
    assert "loss" not in said and "data" not in said


@pytest.mark.parametrize(
    ("how", "what", "words"),
    [
        ("forgets", "resume", "FAIL from step 0; 5 was saved"),
        ("differs", "resume", "losses differ, by up to 50.0%"),
        ("rounds", "resume", "losses differ by 1e-06, as rounding does"),
        ("not finite", "loss", "FAIL not finite at 8: lower --lr"),
        ("slow in data", "data", "hint a batch is waited for 30% of the time"),
    ],
)
def test_what_is_wrong_with_a_run_is_reported(how, what, words, tmp_path):
    said = told(tried(how, tmp_path))
    assert words in said[what]
    assert said["resume"].startswith("FAIL") == (how in ("forgets", "differs"))


@pytest.mark.parametrize(
    ("how", "limit", "words"),
    [
        ("stuck", 0.4, "stuck: no line for .* after step 6; .*GLOO_SOCKET"),
        ("killed", 60.0, "ended by signal 9, perhaps by the system, for want of main"),
        ("fails", 60.0, "ended with code 1: no space left on this disk"),
    ],
)
def test_a_run_that_is_stuck_or_ends_fails_the_trial(how, limit, words, tmp_path):
    begun = time.monotonic()
    with pytest.raises(OSError, match=words):
        tried(how, tmp_path, limit=limit)
    assert time.monotonic() - begun < 60


def test_whoever_is_asked_to_stop_leaves_nothing(tmp_path):
    later = threading.Timer(0.5, request_stop)
    later.start()
    with pytest.raises(OSError, match="asked to stop"):
        tried("stuck", tmp_path)


def two(out, how, notes):
    """In each of two processes of torchrun: a trial, or why it failed."""
    os.environ["PRETEND_NOTES"] = str(notes)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    ours = plan(out, processes=2)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE")  # for this process, nobody holds one
    carried_out = trial._until_killed

    def late(*arguments):
        found = carried_out(*arguments)
        time.sleep(rank())  # the first process may not remove what the second reads
        return found

    trial._until_killed = late
    with cluster():
        try:
            done = trial.try_out(ours, [sys.executable, PRETEND, how])
        except OSError as error:
            return str(error)
        told = [found.told for found in findings(done)] if rank() == 0 else []
        return told if done.size > 0 else "the checkpoint was gone"


@pytest.mark.slow
def test_under_torchrun_each_process_starts_one_of_the_run(tmp_path):
    out, notes = tmp_path / "out", tmp_path / "notes"
    out.mkdir()
    pipes = outcomes(start(2, two, out, "well", notes))
    assert all(fine for fine, _ in pipes), pipes
    assert "losses are equal" in pipes[0][1][0] and pipes[1][1] == []
    seen = [json.loads(line) for line in notes.read_text().splitlines()]
    assert sorted(one["RANK"] for one in seen) == ["0", "0", "1", "1"]
    # two starts, each with a meeting point of its own, which torchrun does not hold
    assert len({one["MASTER_PORT"] for one in seen}) == 2
    assert {one["TORCHELASTIC_USE_AGENT_STORE"] for one in seen} == {"False"}
    assert all(one["WORLD_SIZE"] == "2" and "cpu" in one["words"] for one in seen)
    assert not list(out.iterdir())


@pytest.mark.slow
def test_under_torchrun_one_that_fails_fails_all(tmp_path):
    (tmp_path / "out").mkdir()
    pipes = outcomes(start(2, two, tmp_path / "out", "fails 1", tmp_path / "notes"))
    assert [fine for fine, _ in pipes] == [True, True]
    assert "no space left on this disk" in pipes[1][1]
    assert "a process of the run has ended" in pipes[0][1]
    assert not list((tmp_path / "out").iterdir())


def test_a_trial_works_beside_the_run_or_in_the_current_folder(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    folder = trial._claim(replace(plan(tmp_path), out=Path(".")))
    assert folder.parent == here and list(tmp_path.iterdir()) == [here]
    assert trial._claim(plan(Path("runs"))).parent == here
    small = replace(LONG.model, in_channels=3, num_classes=14)
    emoji = replace(LONG, model=small, data="openmoji")
    folder = trial._claim(plan(Path("runs"), emoji))  # the first to need the folder
    assert (folder.parent / "openmoji-8").is_dir()


def test_a_run_that_is_scored_is_tried_without_scores(tmp_path):
    scored = Execution(log_every=250, score_every=500)
    how = trial.rehearsed(replace(plan(tmp_path, trial=300), execution=scored))
    assert (how.log_every, how.score_every) == (30, 0)


@pytest.mark.slow
def test_the_very_run_is_tried_and_its_folder_removed(tmp_path):
    words = f"doctor digits --out {tmp_path}/run --quick --steps 200 {SMALL} --trial"
    said = diffussm(f"{words} 10 --price 2.5 --save_every 1")
    assert "resumed from 5: losses are equal" in said
    for line in ("speed", "memory", "checkpoint", "whole run"):
        assert f"pass  {line}: " in said
    assert "1 processes" in said and "at 2.5 an hour" in said
    assert not list(tmp_path.iterdir())


def test_a_trial_is_refused_where_it_cannot_be_carried_out(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "probe_all_reduce", lambda *_: "they can")
    words = f"doctor digits --out {tmp_path}/run {SMALL} --quick --steps 30"
    said = diffussm(f"{words} --trial 20", 1)
    assert "a trial of 20 steps" in said and "half of the 30" in said
    assert "memory" not in said
    said = diffussm(f"{words} --trial 2", 1)
    assert "take 10 or more" in said
    said = diffussm(f"{words} --trial 10 --data {tmp_path}/none", 1)
    assert "skip  trial: first mend what fails" in said
    assert "--price would have no effect without --trial" in diffussm(
        f"{words} --price 2", 1
    )
