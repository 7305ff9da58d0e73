"""A run's folder: it belongs to one run, and one process holds it."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from tiny import SELDOM, TINY, assert_same_state, run_tiny, write_images

from diffussm import run_folder
from diffussm.checkpoints import find_checkpoint
from diffussm.data import TensorData, digits
from diffussm.folders import ImageFolder
from diffussm.options import warn
from diffussm.run_folder import encoder_of, load_run, open_run, read_run
from diffussm.runs import train


def test_a_checkpoint_folder_loads_as_a_model(tmp_path):
    state = run_tiny(tmp_path / "run")
    for weights, module in (("ema", state.ema), ("model", state.model)):
        model, config, classes = load_run(tmp_path / "run", weights)
        assert config == TINY and classes == [str(digit) for digit in range(10)]
        for p, q in zip(model.parameters(), module.parameters(), strict=True):
            assert torch.equal(p, q)
    saved = safetensors.torch.load_file(
        find_checkpoint(tmp_path / "run") / "ema" / "model.safetensors"
    )
    assert saved.keys() == state.ema.state_dict().keys()


def test_another_runs_folder_is_refused_and_untouched(tmp_path):
    run_tiny(tmp_path / "run")
    before = {
        path: path.read_bytes()
        for path in (tmp_path / "run").rglob("*")
        if path.is_file()
    }
    with pytest.raises(
        ValueError, match=r"holds another run.*lr \(there 0.001, asked 0.002\)"
    ):
        run_tiny(tmp_path / "run", lr=2e-3)
    assert before == {
        path: path.read_bytes()
        for path in (tmp_path / "run").rglob("*")
        if path.is_file()
    }
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_mother.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds no training run"):
        run_tiny(tmp_path / "letters")
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["to_mother.txt"]


def test_a_run_whose_cooldown_has_begun_cannot_be_prolonged(tmp_path):
    run_tiny(tmp_path / "run", cooldown=3)
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(
        ValueError,
        match=r"is at step 10: its cool-down has begun, and its step 9 would .* steps "
        r"\(there 10, asked 12\)\. .*--init_from .*run",
    ):
        run_tiny(tmp_path / "run", cooldown=3, steps=12)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_run_may_be_prolonged_as_long_as_no_step_done_had_another_rate(tmp_path):
    recipe, data = replace(TINY, warmup=2, cooldown=4), TensorData(*digits("train"))
    longer = replace(recipe, steps=14)
    for done in range(11):
        run = tmp_path / str(done)
        open_run(run, recipe, SELDOM, data)
        (run / "checkpoints" / f"step_{done:08d}").mkdir(parents=True)
        # counted by hand: 1/2, 1, 1, 1, 1, 1, 1, 3/4, 2/4, 1/4
        if done <= 7:
            open_run(run, longer, SELDOM, data)
        else:
            with pytest.raises(ValueError, match="its step 8 would have had another"):
                open_run(run, longer, SELDOM, data)
        steps = json.loads((run / "config.json").read_text())["recipe"]["steps"]
        assert steps == (14 if done <= 7 else 10)
    other = replace(recipe, warmup=3)
    open_run(tmp_path / "0", other, SELDOM, data)
    with pytest.raises(ValueError, match=r"is at step 1: its step 1 would .* warmup"):
        open_run(tmp_path / "1", replace(longer, warmup=3), SELDOM, data)


def test_a_prolonged_run_is_the_one_that_was_longer_from_the_beginning(tmp_path):
    run = tmp_path / "run"
    run_tiny(run, steps=5)
    twice = run_tiny(run, steps=8, cooldown=3)
    assert_same_state(twice, run_tiny(tmp_path / "once", steps=8, cooldown=3))
    assert read_run(run) == read_run(tmp_path / "once")
    with pytest.raises(ValueError, match="its cool-down has begun"):
        run_tiny(run, steps=9)


def test_a_run_that_is_being_trained_is_refused(tmp_path):
    def intrude(row):
        with pytest.raises(ValueError, match="another process"):
            run_tiny(tmp_path / "run")
        seen.append(row["step"])

    seen = []
    train(TINY, tmp_path / "run", SELDOM, "cpu", progress=False, on_log=intrude)
    assert seen == [4, 8] and run_tiny(tmp_path / "run", steps=12).step == 12


def test_a_run_has_one_encoder_whatever_its_data(tmp_path):
    def latents(encoder):
        data = TensorData(
            torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        )
        data.vae = {"name": encoder, "encoder_sha256": encoder, "scaling_factor": 1.0}
        return data

    config = replace(TINY, model=replace(TINY.model, num_classes=0, label_dropout=0.0))
    open_run(tmp_path / "run", config, SELDOM, latents("one"))
    assert encoder_of(tmp_path / "run")["name"] == "one"
    open_run(tmp_path / "run", config, SELDOM, latents("one"))
    with pytest.raises(ValueError, match="has another encoder"):
        open_run(tmp_path / "run", config, SELDOM, latents("two"), other_data=True)
    assert encoder_of(tmp_path / "run")["name"] == "one"
    (tmp_path / "run" / "vae.json").unlink()  # as a run of an older version has none
    assert encoder_of(tmp_path / "run", tmp_path / "nowhere") is None
    for content in ('{"images": 9}', "[]"):  # of something else than latents
        (tmp_path / "manifest.json").write_text(content)
        assert encoder_of(tmp_path / "run", tmp_path) is None


def test_a_lock_that_is_new_already_is_not_taken(tmp_path, monkeypatch):
    """Two starts judge the same lock stale; the second must not remove the first's."""
    lock = tmp_path / ".lock.json"
    lock.write_text(
        json.dumps({"host": socket.gethostname(), "process": 1, "token": "gone"})
    )

    def meanwhile(process, token):
        lock.write_text(json.dumps({"host": "here", "process": 2, "token": "new"}))
        return False

    monkeypatch.setattr(run_folder, "_alive", meanwhile)
    run_folder._remove_if_stale(lock, socket.gethostname())
    assert (
        json.loads(lock.read_text())["token"] == "new"
        and len(list(tmp_path.iterdir())) == 1
    )


def test_the_same_data_may_move_and_other_data_may_not(tmp_path):
    def folder(name, count):
        for i in range(count):
            (tmp_path / name / str(i % 2)).mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), i).save(tmp_path / name / str(i % 2) / f"{i}.png")
        return str(tmp_path / name)

    model = replace(TINY.model, num_classes=2, in_channels=3)
    here, there, more = folder("here", 8), folder("there", 8), folder("more", 9)
    run_tiny(tmp_path / "run", model=model, data=here, steps=2)
    assert run_tiny(tmp_path / "run", model=model, data=there, steps=4).step == 4
    assert read_run(tmp_path / "run").recipe.data == there
    with pytest.raises(ValueError, match="other data"):
        run_tiny(tmp_path / "run", model=model, data=more, steps=6)


def test_load_run_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a training run"):
        load_run(tmp_path)
    run_tiny(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(FileNotFoundError, match="no valid checkpoint"):
        load_run(tmp_path / "run")


def test_any_checkpoint_can_be_loaded_by_its_step(tmp_path):
    early = run_tiny(tmp_path / "early", steps=3)
    late = run_tiny(tmp_path / "run", keep=("3",))
    for step, state in ((3, early), (10, late), (None, late)):
        model, _, _ = load_run(tmp_path / "run", "ema", step)
        for p, q in zip(model.parameters(), state.ema.parameters(), strict=True):
            assert torch.equal(p, q), step
    with pytest.raises(
        FileNotFoundError, match=r"no checkpoint of step 4; there are 3, 10$"
    ):
        load_run(tmp_path / "run", step=4)
    (find_checkpoint(tmp_path / "run", 3) / "ema" / "model.safetensors").write_bytes(
        b""
    )
    with pytest.raises(
        ValueError, match="step_00000003 is damaged"
    ):  # and never another one in its place
        load_run(tmp_path / "run", step=3)
    with pytest.raises(FileNotFoundError, match="there are none yet"):
        find_checkpoint(tmp_path / "nothing", 3)


def test_other_pictures_of_the_same_number_are_refused_unless_told(tmp_path):
    model = replace(TINY.model, num_classes=2, in_channels=3)
    one, two = (
        write_images(tmp_path / name, seed) for seed, name in enumerate(("one", "two"))
    )
    run = tmp_path / "run"
    run_tiny(run, model=model, data=one, steps=2)
    before = (run / "config.json").read_bytes()
    with pytest.raises(
        ValueError, match=r"other data, which differ in data.fingerprint .*--other_data"
    ):
        run_tiny(run, model=model, data=two, steps=4)
    assert (run / "config.json").read_bytes() == before
    config = replace(TINY, model=model, data=two, steps=4)
    told = {"dataset": ImageFolder(two, 8), "other_data": True}
    assert train(config, run, SELDOM, "cpu", progress=False, **told).step == 4
    assert read_run(run).recipe.data == two
    facts = json.loads((run / "config.json").read_text())["data"]
    assert facts["earlier"] == [
        json.loads(before)["data"]
    ]  # it is not forgotten what it learned from
    assert (
        run_tiny(run, model=model, data=two, steps=6).step == 6
    )  # told once is enough
    with pytest.raises(ValueError, match="other data"):
        run_tiny(run, model=model, data=one, steps=8)
    assert load_run(run)[2] == ["0", "1"]


def test_digits_that_were_changed_are_other_digits(tmp_path):
    images, labels = digits("train")
    train(
        TINY,
        tmp_path / "run",
        device="cpu",
        progress=False,
        dataset=TensorData(images, labels),
    )
    changed = images.clone()
    changed[7, 0, 0, 0] *= -1
    for other in (TensorData(changed, labels), TensorData(images, labels.roll(1))):
        with pytest.raises(ValueError, match=r"data\.fingerprint"):
            train(TINY, tmp_path / "run", device="cpu", progress=False, dataset=other)


def test_a_run_of_an_older_version_goes_on(tmp_path, capsys):
    """Its options lie flat in the file, some under other names, some are missing."""
    run_tiny(tmp_path / "run", steps=4)
    file = tmp_path / "run" / "config.json"
    now = json.loads(file.read_text())
    values = now["recipe"] | now["execution"] | {"dataset": now["data"]}
    for younger in ("ema_warmup", "keep", "skip_nonfinite", "workers", "exif_rotate"):
        del values[younger]
    values["parallel"] = values.pop("strategy")
    values["recompute"] = values.pop("activation_checkpointing")
    values["dataset"]["fingerprint"] = None
    file.write_text(json.dumps(values))
    assert run_tiny(tmp_path / "run").step == 10
    assert "holds no fingerprint of its data" in capsys.readouterr().err
    assert load_run(tmp_path / "run")[1] == TINY  # with the steps that it has now
    values["lr"] = 2e-3
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="differs in lr"):
        run_tiny(tmp_path / "run", steps=12)


def test_a_run_that_an_earlier_version_wrote_is_read_and_goes_on(tmp_path, capsys):
    """`run_before` was written by the version before options were in two records."""
    warn.cache_clear()  # of what an earlier test has heard
    before = Path(__file__).with_name("run_before")
    shutil.copytree(before, tmp_path / "run")
    model, recipe, classes = load_run(tmp_path / "run")
    assert "recompute is called activation_checkpointing" in capsys.readouterr().err
    assert (recipe.steps, recipe.model.d_model, len(classes)) == (3, 4, 10)
    total = sum(float(p.detach().double().sum()) for p in model.parameters())
    assert total == pytest.approx(-45.57817742516636, abs=1e-9)
    longer, run = replace(recipe, steps=4), tmp_path / "run"
    # the digits have been divided in another way since
    with pytest.raises(ValueError, match=r"other data, which differ in data\.finger"):
        train(longer, run, SELDOM, "cpu", progress=False)
    said = capsys.readouterr().err
    assert "which digits are held out" in said
    state = train(longer, run, SELDOM, "cpu", progress=False, other_data=True)
    steps = {int(s["step"]) for s in state.optimizer.state.values()}
    assert state.step == 4 and steps == {4}


def test_a_run_of_earlier_random_streams_says_so_and_goes_on(tmp_path, capsys):
    run_tiny(tmp_path / "run", steps=4)
    file = tmp_path / "run" / "config.json"
    values = json.loads(file.read_text())
    assert values["random"] == 3
    run_tiny(tmp_path / "run", steps=5)
    assert "random numbers" not in capsys.readouterr().err
    file.write_text(json.dumps(values | {"random": 2}))
    assert run_tiny(tmp_path / "run", steps=7).step == 7
    said = capsys.readouterr().err
    assert "goes on, but the noise of each image will be" in said
    assert "order" not in said
    del values["random"]
    file.write_text(json.dumps(values))
    assert run_tiny(tmp_path / "run").step == 10
    assert "order, flips, dropped labels and noise" in capsys.readouterr().err
    assert load_run(tmp_path / "run")[1].steps == 10


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_disk_without_flock_has_another_lock(tmp_path, monkeypatch, capsys, code):
    import fcntl

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    run = tmp_path / f"run{code}"
    seen = []

    def intrude(row):
        holder = json.loads((run / ".lock.json").read_text())
        assert (holder["host"], holder["process"]) == (
            socket.gethostname(),
            os.getpid(),
        )
        with pytest.raises(
            ValueError, match=rf"held by process {os.getpid()} of the machine"
        ):
            run_tiny(run)
        seen.append(row["step"])

    train(TINY, run, SELDOM, device="cpu", progress=False, on_log=intrude)
    assert seen == [4, 8] and not (run / ".lock.json").exists()
    warn.cache_clear()
    run_tiny(run, steps=12)
    assert os.strerror(code) in capsys.readouterr().err


def test_a_system_without_fcntl_has_another_lock(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    warn.cache_clear()
    assert run_tiny(tmp_path / "run", steps=2).step == 2
    assert "this system has no flock" in capsys.readouterr().err


@pytest.mark.slow
def test_a_lock_left_by_a_process_that_is_no_more_is_taken_over(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    run_tiny(tmp_path / "run", steps=2)
    lock = tmp_path / "run" / ".lock.json"
    here = {"host": socket.gethostname(), "token": "another"}
    # a number that is free, and ours, which an earlier process had in this container
    for process in (ended.pid, os.getpid()):
        lock.write_text(json.dumps({**here, "process": process}))
        assert run_tiny(tmp_path / "run", steps=3).step == 3
        assert (
            f"was left by process {process} of this machine" in capsys.readouterr().err
        )
    # of processes elsewhere, or of a file that does not name one, nothing is known
    for holder in (
        {**here, "host": "elsewhere", "process": 1},
        {**here, "process": 1},
        {},
    ):
        lock.write_text(json.dumps(holder))
        with pytest.raises(ValueError, match="remove that file"):
            run_tiny(tmp_path / "run", steps=4)
        assert json.loads(lock.read_text()) == holder


@pytest.mark.slow
def test_training_is_imported_without_fcntl_and_sigusr1():
    code = (
        "import signal, sys; del signal.SIGUSR1; sys.modules['fcntl'] = None; "
        "import diffussm.runs"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_that_was_killed_while_its_folder_was_made_begins(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.77.tmp").write_text("{")
    assert run_tiny(tmp_path / "run", steps=2).step == 2


def test_of_two_first_starts_the_second_finds_the_run_of_the_first(
    tmp_path, monkeypatch
):
    """Both have looked, and found no run, before either writes."""
    data, run = TensorData(*digits("train")), tmp_path / "run"
    honest, looks = run_folder.check_run, []

    def look(*claim):
        looks.append(honest(*claim))
        if len(looks) == 1:  # now the other is faster
            open_run(run, replace(TINY, lr=2e-3), SELDOM, data)
            return None
        return looks[-1]

    monkeypatch.setattr(run_folder, "check_run", look)
    with pytest.raises(ValueError, match=r"holds another run.*lr"):
        open_run(run, TINY, SELDOM, data)
    assert read_run(run).recipe.lr == 2e-3


REFUSED = [
    {"convolution": "fast"},
    {"convolution": "triton"},
    {"micro_batch": 3},
    {"batch_size": 2000},
]


@pytest.mark.parametrize("changes", REFUSED)
def test_a_refused_run_leaves_no_folder(tmp_path, changes, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=next(iter(changes))):
        run_tiny(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
