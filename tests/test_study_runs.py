"""A study is carried out, killed, and carried out to the same end."""

import itertools
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from processes import FORKS

from diffussm import study_runs
from diffussm.files import read_json, write_json
from diffussm.resources import parameter_count
from diffussm.study import Measure, Question, Study, runs_of, step_seconds
from diffussm.study_runs import (
    read_rows,
    row_there,
    run_study,
    seconds_needed,
    steps_of,
    time_in_turns,
    write_rows,
    write_seconds,
)

TWO = {"two blocks": {"model.n_blocks": 2}, "one block": {}}
STUDY = Study(
    recipe="digits",
    questions={
        "depth": Question("Is deep better?", TWO),
        "again": Question("Is one enough?", {"one": {}}),
    },
    options={
        "steps": 10,
        "warmup": 2,
        "cooldown": 4,
        "batch_size": 8,
        "model.d_model": 16,
        "model.d_state": 4,
        "model.n_blocks": 1,
    },
    seeds=2,
    looks=1,
    measure=Measure(bits_steps=(2,), bits_images=4, score_images=4),
)
MACHINE = ("seconds", "environment")


def table(rows):
    return [{k: v for k, v in row.items() if k not in MACHINE} for row in rows]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    return out, run_study(STUDY, out)


def test_a_run_in_two_questions_is_trained_once(done):
    out, rows = done
    assert len(rows) == 4 and len(list((out / "runs").iterdir())) == 4
    assert read_rows(out / "results.jsonl") == rows
    assert [row["recipe"]["seed"] for row in rows] == [0, 1, 0, 1]


def test_a_row_has_what_was_learned_and_what_it_cost(done):
    row = done[1][0]
    assert row["parameters"] == parameter_count(
        runs_of(STUDY)["depth", "two blocks"][0].recipe.model
    )
    assert row["operations"] > 10 * 8 * 3 * 2 * 64 * 7.5 * 16**2
    assert row["seconds"] > 0 and row["environment"]["torch"]
    assert row["curves"]["step"] == [3, 6, 9]
    assert row["curves"]["held_out_loss"][-1] is not None
    assert {f"mse_q{i}" for i in range(1, 5)} < row["held_out"].keys()
    assert row["bits_per_dim"].keys() == {"2"}
    assert "score_kid_pixels_real" in row["scores"]


def test_finished_runs_are_not_run_again_but_measured_if_asked_otherwise(
    done, monkeypatch
):
    out, rows = done
    again = []
    assert run_study(STUDY, out, on_row=again.append) == rows and not again
    one = replace(STUDY, seeds=1, questions={"one": STUDY.questions["again"]})
    longer = replace(one, measure=Measure((2, 3), 4, 0))

    def refuse(*_):
        raise AssertionError("it was trained again")

    monkeypatch.setattr("diffussm.runs._go", refuse)
    (found,) = run_study(longer, out)
    assert found["bits_per_dim"]["2"] == rows[2]["bits_per_dim"]["2"]
    assert found["bits_per_dim"].keys() == {"2", "3"} and "scores" not in found
    assert found["curves"] == rows[2]["curves"]
    assert row_there(runs_of(one)["one", "one"][0], out, STUDY.measure) is None
    run_study(STUDY, out)  # as it was


def test_a_trained_run_is_judged_with_every_guidance_without_training(
    done, monkeypatch
):
    out, rows = done
    one = replace(STUDY, seeds=1, questions={"one": STUDY.questions["again"]})
    judging = replace(STUDY.measure, judged_images=8, guidance=(0, 1.0, 1.5))

    def refuse(*_):
        raise AssertionError("it was trained again")

    monkeypatch.setattr("diffussm.runs._go", refuse)
    (found,) = run_study(replace(one, measure=judging), out)
    assert found["digest"] == rows[2]["digest"]
    assert found["drawn"]["guidance"].keys() == {"0", "1", "1.5"}
    assert found["drawn"]["real"]["images"] == 8
    assert found["held_out"] == rows[2]["held_out"] and "drawn" not in rows[2]
    (run,) = runs_of(one)["one", "one"]
    assert row_there(run, out, judging) == found
    run_study(STUDY, out)  # as it was


def test_a_row_of_an_earlier_version_counts(done):
    out, _ = done
    (run,) = runs_of(replace(STUDY, seeds=1))["again", "one"]
    file = out / "runs" / run.digest / "result.json"
    row = read_json(file, "a row")
    old = row | {"measure": dict(row["measure"])}
    for new in ("judged_images", "guidance"):
        del old["measure"][new]
    write_json(file, old)
    assert row_there(run, out, STUDY.measure) == old
    again = []
    run_study(STUDY, out, on_row=again.append)
    assert not again
    write_json(file, row)


def test_a_diverged_run_is_a_row(tmp_path):
    lost = {"lost": {"lr": 0.9, "ema_decay": 0.0}}
    broken = replace(STUDY, seeds=1, questions={"q": Question("?", lost)})

    def diverge(*_, **__):
        (tmp_path / "runs" / run.digest).mkdir(parents=True)
        (tmp_path / "runs" / run.digest / "log.jsonl").touch()
        raise FloatingPointError("not finite")

    run = runs_of(broken)["q", "lost"][0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_runs, "train", diverge)
        (row,) = run_study(broken, tmp_path)
    assert row["failed"] == "not finite" and row["seconds"] == 0
    assert run_study(broken, tmp_path) == [row]


def test_nothing_is_started_if_one_cannot_work(tmp_path):
    odd = {"good": {}, "odd": {"model.d_state": 3}}
    with pytest.raises(ValueError, match="q, odd: d_state=3"):
        run_study(replace(STUDY, questions={"q": Question("?", odd)}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_convolution_for_a_gpu_is_refused_before_the_first_run(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    last = Question("?", {"plain": {}, "later": {"convolution": "triton", "steps": 11}})
    study = replace(STUDY, questions={**STUDY.questions, "last": last})
    with pytest.raises(ValueError, match="'triton' is for a GPU, not for cpu"):
        run_study(study, tmp_path)
    assert not list(tmp_path.iterdir())


def written(folder, name):
    """Whether `name` is in a tree of which another process removes folders."""
    return any(name in (*folders, *files) for _, folders, files in os.walk(folder))


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_table(done, tmp_path):
    for step in ("step_00000002", "step_00000006"):
        child = FORKS.Process(target=run_study, args=(STUDY, tmp_path))
        child.start()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not written(tmp_path, step):
            time.sleep(0.005)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    assert len(read_rows(tmp_path / "results.jsonl")) < 4
    assert table(run_study(STUDY, tmp_path)) == table(done[1])


@pytest.mark.slow
def test_processes_give_the_rows_that_one_gives_and_end_with_their_parent(
    done, tmp_path
):
    few = replace(STUDY, seeds=1)
    child = FORKS.Process(target=run_study, args=(few, tmp_path, 2))
    child.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not written(tmp_path, "log.jsonl"):
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    deadline, found = time.monotonic() + 60, None
    while found is None:
        try:
            found = run_study(few, tmp_path)
        except ValueError as locked:  # its processes are about to end
            assert "another process" in str(locked) and time.monotonic() < deadline
            time.sleep(0.05)
    assert table(found) == table(done[1][::2])


def test_seconds_are_estimated_and_grow_with_the_steps(done, monkeypatch):
    out, _ = done
    run = runs_of(STUDY)["depth", "one block"][0]
    longer = replace(run, recipe=replace(run.recipe, steps=10_000))
    measure = Measure((2,), 2, 0)
    short, long = (seconds_needed(one, out, measure, "cpu") for one in (run, longer))
    assert 0 < short < long
    triton = replace(run, execution=replace(run.execution, convolution="triton"))
    with pytest.raises(ValueError, match="'triton' is for a GPU, not for cpu"):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        seconds_needed(triton, out, measure, "cpu")
    judging = replace(measure, judged_images=8, guidance=(1.0, 1.5))
    more = study_runs._passes(run, judging, 9) - study_runs._passes(run, measure, 9)
    assert more == 20 * 8 * (1 + 2)  # guidance asks the network twice


def test_rows_are_written_whole_and_damage_is_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert read_rows(str(file)) == []
    write_rows(file, [{"digest": "a"}, {"digest": "b", "x": None}])
    assert read_rows(file) == [{"digest": "a"}, {"digest": "b", "x": None}]
    file.write_text('{"digest": "a"}\n{"dig')
    with pytest.raises(ValueError, match=r"rows\.jsonl has no JSON lines"):
        read_rows(file)


def clock(*rounds):
    """A step that takes these seconds, over and over."""
    return itertools.cycle(rounds).__next__


def test_steps_are_timed_in_turns_until_both_halves_agree():
    order = []

    def step(name, took):
        return lambda: order.append(name) or took()

    times = {"a": clock(3.0, 1.0, 1.0, 1.0, 1.0, 0.1), "b": clock(2.0)}
    steps = {name: step(name, took) for name, took in times.items()}
    rounds, medians = time_in_turns(steps, few=3, many=9)
    assert order == ["a", "b"] * len(rounds) and medians == {"a": 1.0, "b": 2.0}
    assert len(rounds) == 5  # until then the 3.0 is a half of the even ones


def test_noise_is_refused():
    got = clock(1.0, 2.0)  # every other round is slower: the halves never agree
    with pytest.raises(ValueError, match="after 8 rounds the halves differ by more"):
        time_in_turns({"quiet": clock(1.0), "noisy": got}, few=3, many=8)
    rounds, _ = time_in_turns({"noisy": clock(1.0, 1.02)}, few=3, many=8)
    assert len(rounds) == 3


def test_seconds_are_written_once_for_each_step_with_the_machine(tmp_path, monkeypatch):
    rates = {"slow": {"lr": 1e-4}, "again": {"lr": 2e-4}, "deep": {"model.n_blocks": 2}}
    asked = {"q": Question("?", rates, equal="seconds")}
    asked["other"] = Question("?", {"taps": {"variant": "taps:3"}}, equal="seconds")
    file = tmp_path / "seconds.json"
    study = replace(STUDY, questions=asked, seconds=str(file))
    with pytest.raises(ValueError, match="no seconds of its step"):
        run_study(study, tmp_path)
    assert len(steps_of(study)) == 3
    monkeypatch.setattr(study_runs, "time_in_turns", unsteady)
    with pytest.raises(ValueError, match="nothing was written"):
        write_seconds(study, tmp_path)
    assert not file.exists()
    monkeypatch.setattr(study_runs, "time_in_turns", once)
    found = write_seconds(study, tmp_path)
    assert step_seconds(study) == pytest.approx(found, rel=1e-3)
    kept = read_json(file, "seconds")
    assert kept["rounds"] == 2 and kept["processor"] and kept["torch"]
    assert {step["variant"] for step in kept["steps"].values()} == {"", "taps:3"}
    assert {run.recipe.steps for run in runs_of(study)["q", "slow"]} == {10}
    with pytest.raises(ValueError, match="names no file"):
        write_seconds(STUDY, tmp_path)


def unsteady(steps):
    return time_in_turns(dict.fromkeys(steps, clock(1.0, 2.0)), many=20)


def once(steps):
    return time_in_turns(steps, few=2, allowed=1e9)


def test_a_run_computes_with_one_thread_and_gives_the_others_back(
    tmp_path, done, monkeypatch
):
    threads, used = torch.get_num_threads(), []
    trained = study_runs.train

    def noting(*args, **hooks):
        used.append(torch.get_num_threads())
        return trained(*args, **hooks)

    monkeypatch.setattr(study_runs, "train", noting)
    torch.set_num_threads(3)
    try:
        rows = run_study(STUDY, tmp_path, only="depth, one block")
        assert used == [1, 1] and torch.get_num_threads() == 3
        for run in steps_of(STUDY).values():
            assert seconds_needed(run, tmp_path, STUDY.measure, "cpu") > 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert table(rows) == table(done[1][2:])


def test_one_line_of_a_study_is_run_alone(tmp_path, done):
    (first, second) = run_study(STUDY, tmp_path, only="depth, one block")
    assert table([first, second]) == table(done[1][2:])
    assert read_rows(tmp_path / "results.jsonl") == [first, second]
    found = run_study(replace(STUDY, seeds=1), tmp_path, only="depth, two blocks")
    assert table(found) == table(done[1][::2])
    with pytest.raises(ValueError, match="only='depth, two': .*depth, two blocks"):
        run_study(STUDY, tmp_path, only="depth, two")


def test_rows_that_are_known_are_not_run_again(done, tmp_path):
    rows, new = done[1], []
    told = {"known": rows, "on_row": new.append}
    assert run_study(STUDY, tmp_path, **told) == rows and not new
    assert not (tmp_path / "runs").exists()
    assert read_rows(tmp_path / "results.jsonl") == rows
    (one, *others), other = rows, {**rows[0], "measure": {"bits_steps": [3]}}
    assert run_study(STUDY, tmp_path, **told | {"known": [other, *others]})
    assert [row["digest"] for row in new] == [one["digest"]]
