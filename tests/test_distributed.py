"""Many processes: they agree, and one that fails takes the others with it."""

import importlib.util
import os
import signal
import sys
import threading
import time

import pytest
import torch
from processes import cluster, outcomes, start, together

from diffussm.distributed import (
    all_reduce,
    barrier,
    on_rank_zero,
    processes,
    rank,
    stopping,
    world_size,
)

SLOW = 600  # seconds that closing the process group takes, and more than any test waits


def once_in_a_while():
    with cluster():
        calls = []
        said = on_rank_zero(lambda: calls.append(rank()) or f"rank {rank()}")
        total = all_reduce(torch.tensor([1.0, float(rank())]))
        try:
            on_rank_zero(lambda: int("x"))
        except ValueError as error:
            return said, calls, total.tolist(), str(error)


def test_once_is_once_and_its_error_is_everyones():
    results = together(3, once_in_a_while)
    assert [calls for _, calls, _, _ in results] == [[0], [], []]
    assert all(result[0] == "rank 0" and result[2] == [3.0, 3.0] for result in results)
    assert all("invalid literal" in result[3] for result in results)


def fails_alone(failing, wait):
    """Process `failing` raises, and the other waits for it in one way or another."""
    torch.distributed.destroy_process_group = lambda *_: time.sleep(SLOW)
    with cluster():
        all_reduce(torch.zeros(1))
        if rank() == failing:
            raise OSError("the disk is full")
        if wait == "barrier":
            barrier()
        elif wait == "all-reduce":
            all_reduce(torch.zeros(1))
        else:  # as in NCCL, which never learns that nobody comes
            time.sleep(SLOW)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("wait", ["barrier", "all-reduce", "NCCL"])
def test_a_process_that_fails_alone_ends_all_without_waiting(failing, wait):
    started = start(2, fails_alone, failing, wait)
    told = outcomes(started, timeout=400)
    assert told[failing] == (False, "OSError: the disk is full")
    why = f"process {failing} failed: OSError: the disk is full"
    assert told[1 - failing] == (False, f"PeerFailed: stopped, because {why}")
    assert [process.exitcode for process, _ in started] == [1, 1]


class TwoArguments(Exception):
    """Pickles, and cannot be read back."""

    def __init__(self, what, why):
        super().__init__(f"{what}: {why}")


def once_what_cannot_be_sent():
    def needs_two():
        raise TwoArguments("no image", "torn")

    def holds_a_lock():
        error = ValueError("locked")
        error.lock = threading.Lock()
        raise error

    said = []
    with cluster():
        for function in (needs_two, holds_a_lock, threading.Lock):
            try:
                on_rank_zero(function)
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
        return said, all_reduce(torch.ones(1)).item()  # and they are still in step


def test_what_cannot_be_pickled_leaves_nobody_waiting():
    first, second = (
        said for said, total in together(2, once_what_cannot_be_sent) if total == 2
    )
    assert (
        first[0] == "TwoArguments: no image: torn" and first[1] == "ValueError: locked"
    )
    assert (
        second[0] == f"RuntimeError: {first[0]}"
        and second[1] == f"RuntimeError: {first[1]}"
    )
    assert "cannot pickle" in first[2] and "cannot pickle" in second[2]


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(monkeypatch):
    from diffussm import distributed

    with processes("cpu"):
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping()
        os.kill(
            os.getpid(), signal.SIGINT
        )  # torchrun hands on what the terminal has sent already
        monkeypatch.setattr(distributed, "_REPEAT", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with processes("cpu"):  # SIGTERM says no more the second time than the first
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping()


def test_what_cannot_stop_leaves_the_signals_alone():
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with processes("cpu", stoppable=False):
        assert before == [signal.getsignal(number) for number in numbers]


def test_a_system_without_sigusr1_can_stop_as_well(monkeypatch):
    """As on Windows: the module is executed once more, under another name."""
    from diffussm import distributed

    monkeypatch.delattr(signal, "SIGUSR1")
    spec = importlib.util.spec_from_file_location("elsewhere", distributed.__file__)
    elsewhere = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(
        sys.modules, "elsewhere", elsewhere
    )  # its dataclasses look there
    spec.loader.exec_module(elsewhere)
    with elsewhere.processes("cpu"):
        os.kill(os.getpid(), signal.SIGTERM)
        assert elsewhere.stopping()


def test_one_gpu_for_many_processes_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_WORLD_SIZE", "8"),
        ("LOCAL_RANK", "7"),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match="cuda:1 is one GPU, and 8 processes.*pass --device cuda"
    ):
        processes("cuda:1").__enter__()
    with pytest.raises(
        ValueError, match="process 7 of this machine has no GPU.*--nproc_per_node 2"
    ):
        processes("cuda").__enter__()
    monkeypatch.setenv("LOCAL_RANK", "1")
    with processes("cuda") as device:
        assert device == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with processes("cuda:0") as device:
        assert device == torch.device("cuda", 0)


def test_the_processes_give_the_signals_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with processes("cpu"):
        assert signal.getsignal(signal.SIGTERM) != before[0] and world_size() == 1
    assert before == [
        signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)
    ]
