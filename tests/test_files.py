"""Files appear whole or not at all, with the rights of any new file."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diffussm import files
from diffussm.files import (
    read_json,
    read_tensors,
    sha256,
    whole_file,
    whole_folder,
    write_json,
    write_tensors,
)

KILLED = """
import os, signal, sys
from pathlib import Path
from diffussm import files
count, path, kind = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
def fuse(call):
    def counted(*arguments, **options):
        global count
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return counted
os.fsync = fuse(os.fsync)
Path.replace = fuse(Path.replace)
if kind == "file":
    files.write_json(path, list(range(1000)))
else:
    with files.whole_folder(path) as draft:
        (draft / "a").write_text("a")
        (draft / "b").write_text("b")
"""


def listing(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(RuntimeError), whole_file(path) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert read_json(path) == 1
    assert listing(tmp_path) == ["a.json"]


def test_a_folder_is_not_replaced_by_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (Path(), tmp_path):
        with pytest.raises(IsADirectoryError, match="is a folder"), whole_file(folder):
            raise AssertionError("the work was begun")
    assert listing(tmp_path) == []


def test_an_error_leaves_no_part_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "step") as draft:
        (draft / "a").write_text("half")
        raise RuntimeError
    assert listing(tmp_path) == []


def test_a_full_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "old").touch()
    with pytest.raises(OSError, match="not empty"), whole_folder(tmp_path / "step"):
        pass
    assert listing(tmp_path / "step") == ["old"]


@pytest.mark.parametrize(("kind", "calls"), [("file", 3), ("folder", 5)])
def test_a_killed_process_leaves_all_or_nothing(
    tmp_path: Path, kind: str, calls: int
) -> None:
    path = tmp_path / "x"
    for fuse in range(1, calls + 2):
        command = [sys.executable, "-c", KILLED, str(fuse), str(path), kind]
        done = subprocess.run(command, check=False)
        killed = fuse <= calls
        assert done.returncode == (-signal.SIGKILL if killed else 0)
        if kind == "file" and path.exists():
            assert read_json(path) == list(range(1000))
            path.unlink()
        elif path.exists():
            assert listing(path) == ["a", "b"]
            for name in listing(path):
                (path / name).unlink()
            path.rmdir()
        else:
            assert killed


def test_what_a_killed_process_left_is_taken_away(tmp_path: Path) -> None:
    (tmp_path / ".step.tmp").mkdir()
    (tmp_path / ".step.tmp" / "stale").touch()
    with whole_folder(tmp_path / "step") as draft:
        (draft / "new").touch()
    assert listing(tmp_path) == ["step"] and listing(tmp_path / "step") == ["new"]


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "a.safetensors", {"w": torch.zeros(2)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640


def failing(monkeypatch: pytest.MonkeyPatch, number: int, folders: bool) -> None:
    flush = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode) == folders:
            raise OSError(number, os.strerror(number))
        flush(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    files._warn_of_flushing.cache_clear()


@pytest.mark.parametrize("number", sorted(files.UNSUPPORTED))
def test_a_disk_that_cannot_flush_folders_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, number: int
) -> None:
    failing(monkeypatch, number, folders=True)
    write_json(tmp_path / "a", 1)
    write_json(tmp_path / "b", 2)
    assert [read_json(tmp_path / name) for name in "ab"] == [1, 2]
    assert [r.getMessage()[:31] for r in caplog.records] == [
        "this disk cannot flush a folder"
    ]


@pytest.mark.parametrize(
    ("number", "folders"),
    [(errno.EIO, True), (errno.EIO, False), (errno.EINVAL, False)],
)
def test_a_disk_that_fails_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, folders: bool
) -> None:
    failing(monkeypatch, number, folders)
    with pytest.raises(OSError, match=os.strerror(number)):
        write_json(tmp_path / "a", 1)
    assert [name for name in listing(tmp_path) if name.startswith(".")] == []


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4).t(),  # not contiguous
        "b": torch.randn(2).bfloat16(),
        "c": torch.arange(3),
    }
    write_tensors(tmp_path / "t", tensors)
    back = read_tensors(tmp_path / "t")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_tensors(path, {"a": torch.zeros(3)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="the weights .*t is damaged"):
        read_tensors(path, "the weights")
    for damaged in (b"{", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="the record .*t is damaged"):
            read_json(path, "the record")


def test_the_checksum_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    expected = hashlib.sha256(b"abc" * 100_000).hexdigest()
    assert sha256(tmp_path / "a") == expected


def test_files_need_no_torch() -> None:
    code = "import sys, diffussm.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
