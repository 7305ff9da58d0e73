"""Checkpoints: whole or not at all, and a damaged one is passed over."""

import errno
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from processes import FORKS, SHARED
from tiny import TINY, assert_same_state, reseal, run_tiny, steps_kept

from diffussm import checkpoints, files
from diffussm.checkpoints import (
    checkpoints_of,
    find_checkpoint,
    load_checkpoint,
    snapshot,
    write_checkpoint,
)
from diffussm.training import TrainState


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "garble"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage, capsys):
    run_tiny(tmp_path / "run", save_every=5)
    newest = tmp_path / "run" / "checkpoints" / "step_00000010"
    weights = newest / "ema" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "truncate":
        weights.write_bytes(content[:-100])
    elif damage == "flip":
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "remove":
        weights.unlink()
    else:
        (newest / "state.json").write_text("[]")
    assert find_checkpoint(tmp_path / "run").name == "step_00000005"
    assert "damaged" in capsys.readouterr().err
    straight = run_tiny(tmp_path / "straight", save_every=5)
    assert_same_state(straight, run_tiny(tmp_path / "run", save_every=5))


def test_old_checkpoints_go_only_after_the_new_one_is_there(tmp_path):
    state = run_tiny(tmp_path / "run", save_every=2)
    kept = sorted(
        folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()
    )
    assert kept == ["step_00000008", "step_00000010"]
    # left by a kill in the middle of a save
    (tmp_path / "run" / "checkpoints" / ".step_00000011.tmp").mkdir()
    state.step = 11
    write_checkpoint(tmp_path / "run", snapshot(state))
    assert find_checkpoint(tmp_path / "run").name == "step_00000011"


def test_a_save_removes_the_drafts_of_all_saves_that_were_killed(tmp_path):
    state = run_tiny(tmp_path / "run", steps=2)
    draft = tmp_path / "run" / "checkpoints" / ".step_00000001.tmp"
    draft.mkdir()
    (draft / "optimizer.safetensors").write_text("half")
    state.step = 3
    write_checkpoint(tmp_path / "run", snapshot(state))
    assert steps_kept(tmp_path / "run") == [2, 3]


def test_a_checkpoint_that_cannot_be_removed_is_told_and_tried_again(
    tmp_path, monkeypatch, capsys
):
    honest, run = shutil.rmtree, tmp_path / "run"

    def busy(path, **how):
        if Path(path).name == "step_00000002":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        honest(path, **how)

    monkeypatch.setattr(shutil, "rmtree", busy)
    assert run_tiny(run, save_every=2, keep_last=1).step == 10
    assert steps_kept(run) == [2, 10]
    assert f"{run}/checkpoints/step_00000002 could not be removed" in (
        capsys.readouterr().err
    )
    monkeypatch.undo()
    run_tiny(run, steps=12, save_every=2, keep_last=1)
    assert steps_kept(run) == [12]


@pytest.mark.parametrize("asked", [None, 10])
def test_what_a_run_in_training_removes_meanwhile_is_not_damaged(
    tmp_path, asked, monkeypatch, capsys
):
    run, honest = tmp_path / "run", files.sha256
    state = run_tiny(run, steps=10, keep_last=1)

    def late(path):
        if state.step == 10:
            state.step = 12
            write_checkpoint(run, snapshot(state), keep_last=1)
        return honest(path)

    monkeypatch.setattr(checkpoints, "sha256", late)
    if asked is None:
        assert find_checkpoint(run).name == "step_00000012"
    else:
        with pytest.raises(FileNotFoundError, match="no checkpoint of step 10.* 12$"):
            find_checkpoint(run, asked)
    assert "damaged" not in capsys.readouterr().err


def test_checkpoints_hold_safetensors_and_json_only(tmp_path):
    run_tiny(tmp_path / "run")
    suffixes = {
        path.suffix for path in (tmp_path / "run").rglob("[!.]*") if path.is_file()
    }
    assert suffixes == {".json", ".jsonl", ".safetensors"}


@pytest.mark.parametrize("file", ["state.json", "ema/model.safetensors"])
def test_a_disk_that_cannot_be_read_is_no_damage(tmp_path, file, monkeypatch):
    run_tiny(tmp_path / "run", save_every=5)
    newest, honest = find_checkpoint(tmp_path / "run"), (Path.read_text, files.sha256)

    def fail(path, reader):
        if path == newest / file:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return reader(path)

    monkeypatch.setattr(Path, "read_text", lambda path, **_: fail(path, honest[0]))
    monkeypatch.setattr(checkpoints, "sha256", lambda path: fail(path, honest[1]))
    for step in (None, 10):
        with pytest.raises(OSError, match=f"{file} cannot be read: .*[Ss]tale"):
            find_checkpoint(tmp_path / "run", step)
    monkeypatch.undo()
    assert find_checkpoint(tmp_path / "run") == newest
    (newest / "state.json").unlink()
    with pytest.raises(ValueError, match="state.json is missing"):
        find_checkpoint(tmp_path / "run", 10)


def test_a_copy_beside_the_checkpoints_is_left_alone(tmp_path):
    run_tiny(tmp_path / "run", save_every=5, keep_last=2)
    folder = tmp_path / "run" / "checkpoints"
    copies = [folder / name for name in ("step_00000005.bak", "step_00000005_2")]
    for copy in copies:
        shutil.copytree(folder / "step_00000005", copy)
    shutil.copytree(folder / "step_00000005", folder / "step_100000000")  # by number
    names = ["step_00000005", "step_00000010", "step_100000000"]
    assert [path.name for path in checkpoints_of(tmp_path / "run")] == names
    shutil.rmtree(folder / "step_100000000")
    run_tiny(tmp_path / "run", steps=15, save_every=5, keep_last=1)
    assert [path.name for path in checkpoints_of(tmp_path / "run")] == ["step_00000015"]
    assert all(copy.is_dir() for copy in copies)


@pytest.mark.parametrize("trick", ["foreign", "pickle", "path", "step"])
def test_a_checkpoint_with_anything_else_in_it_is_refused(tmp_path, trick):
    run_tiny(tmp_path / "run")
    checkpoint = find_checkpoint(tmp_path / "run")
    if trick == "foreign":
        torch.save({"harm": 1}, checkpoint / "extra.pt")
    elif trick == "pickle":
        torch.save({"harm": 1}, checkpoint / "optimizer.safetensors")
        reseal(checkpoint)
        with pytest.raises(ValueError, match="no checkpoint of this run"):
            run_tiny(tmp_path / "run", steps=12)
        return
    else:
        record = json.loads((checkpoint / "state.json").read_text())
        if trick == "path":
            (tmp_path / "elsewhere").write_text("secret")
            record["sha256"]["../../../elsewhere"] = hashlib.sha256(
                b"secret"
            ).hexdigest()
        else:
            record["step"] = 11
        (checkpoint / "state.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        run_tiny(tmp_path / "run", steps=12)


def test_every_hundredth_checkpoint_can_be_kept(tmp_path):
    run_tiny(tmp_path / "run", save_every=1, keep_last=2, keep_every=4)
    kept = sorted(
        folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()
    )
    assert kept == [f"step_{step:08d}" for step in (4, 8, 9, 10)]


def test_what_is_kept_is_also_saved(tmp_path):
    run_tiny(tmp_path / "run", save_every=5, keep_last=1, keep_every=4)
    assert steps_kept(tmp_path / "run") == [4, 8, 10]


def test_as_many_checkpoints_are_kept_as_was_asked(tmp_path):
    # with more to keep than there are, a negative bound once removed the oldest
    run_tiny(tmp_path / "run", save_every=1, keep_last=6)
    assert steps_kept(tmp_path / "run") == [5, 6, 7, 8, 9, 10]


def test_named_checkpoints_are_written_when_reached_and_outlive_all_others(tmp_path):
    # with 8 images a step, 35 are reached by step 5; save_every divides neither 3 nor 5
    run_tiny(tmp_path / "run", save_every=2, keep_last=1, keep=("3", "35 images"))
    assert steps_kept(tmp_path / "run") == [3, 5, 10]
    # what is kept may change on resume, and what was passed already is told
    run_tiny(tmp_path / "run", steps=14, save_every=2, keep_last=1, keep=("3", "13"))
    assert steps_kept(tmp_path / "run") == [3, 13, 14]


def test_weights_are_as_readable_as_any_new_file(tmp_path):
    mask = os.umask(0o027)
    try:
        state = run_tiny(tmp_path / "run", steps=2)
        state.ema.save_pretrained(tmp_path / "exported")
    finally:
        os.umask(mask)
    files = [
        path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"
    ]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o640)}
    assert sum(path.suffix == ".safetensors" for path in files) == 4


def test_a_folder_that_cannot_be_flushed_is_told_once(tmp_path, monkeypatch, caplog):
    flush = os.fsync

    def only_files(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flush(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    files._warn_of_flushing.cache_clear()
    run_tiny(tmp_path / "run", save_every=2)
    assert steps_kept(tmp_path / "run") == [8, 10]
    assert caplog.text.count("cannot flush a folder") == 1


def test_a_disk_that_fails_is_not_passed_over(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    taken = snapshot(TrainState.create(TINY))
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="could not be written"):
        write_checkpoint(tmp_path, taken)
    assert not list((tmp_path / "checkpoints").iterdir())


def save_for_ever(run, shared):
    state = TrainState.create(SHARED)
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    if (checkpoint := find_checkpoint(run)) is not None:
        load_checkpoint(checkpoint, state)
    while True:
        state.step += 1
        write_checkpoint(run, snapshot(state))
        shared.value = state.step


@pytest.mark.slow
def test_fifty_kills_in_the_middle_of_saves_lose_at_most_the_save_under_way(tmp_path):
    generator = torch.Generator().manual_seed(0)
    # Without a lock: a process that is killed while it holds one never lets it go.
    finished = FORKS.RawValue("q", 0)
    in_the_middle = 0
    for _ in range(50):
        before = finished.value
        process = FORKS.Process(target=save_for_ever, args=(tmp_path, finished))
        process.start()
        deadline = time.monotonic() + 60
        while finished.value == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(float(torch.rand(1, generator=generator)) * 0.05)
        process.kill()
        process.join()
        in_the_middle += any((tmp_path / "checkpoints").glob(".*.tmp"))
        assert finished.value > before, "no save finished in a minute"
        assert int(find_checkpoint(tmp_path).name[5:]) >= finished.value
    assert in_the_middle >= 10, (
        f"only {in_the_middle} of 50 kills fell into a save: the test shows little"
    )
    assert len(list((tmp_path / "checkpoints").glob("step_*"))) <= 4
