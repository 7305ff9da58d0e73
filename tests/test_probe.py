"""The probe: processes that may be killed."""

import sys
import time
from pathlib import Path

import pytest

from diffussm import probe


def test_a_hang_between_processes_is_cut_off_and_ends_them(tmp_path):
    mark = tmp_path / "pids"
    program = (
        f"import os, time; open({str(mark)!r}, 'a').write(f'{{os.getpid()}} '); "
        "time.sleep(600)"
    )
    begun = time.monotonic()
    with pytest.raises(OSError, match="GLOO_SOCKET_IFNAME"):
        probe.probe_all_reduce("cpu", 2, 2.0, [sys.executable, "-c", program])
    assert time.monotonic() - begun < 30
    assert not [
        pid for pid in mark.read_text().split() if Path(f"/proc/{pid}").exists()
    ]


def test_a_process_that_fails_is_reported_with_its_last_words():
    with pytest.raises(OSError, match="no cable.*NCCL_DEBUG"):
        program = [sys.executable, "-c", "raise SystemExit('no cable')"]
        probe.probe_all_reduce("cuda", 1, 60.0, program)


def test_the_program_of_the_probe_adds_up_and_says_when_the_sum_is_wrong(monkeypatch):
    said = probe.probe_all_reduce("cpu", 2)
    assert said == "a tensor was added up with gloo (processes: 2)"
    monkeypatch.setattr(probe.dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(probe.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(probe.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(probe.dist, "all_reduce", lambda x: None)
    with pytest.raises(SystemExit, match="the sum is wrong"):
        probe.add_up("cpu")
