"""Vital signs.

Generated from book/46_vital_signs.md by `make export`: edit there.
"""

import gc
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from diffussm.distributed import all_reduce, rank, world_size

__all__ = ["WorkTimes", "Heartbeat", "FLIGHT", "flights_in", "garbage_kept", "recorded"]


class WorkTimes:
    """How long this process works in a step before it waits for others."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self._device, self._spans = device, list[tuple[Any, Any]]()
        self._gpu = device.type == "cuda"
        self._hook = network.register_forward_hook(lambda *_: self._worked())
        self.begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def begin(self) -> None:
        """A step begins."""
        self._began = self._last = self._now()

    def _worked(self) -> None:
        self._last = self._now()  # of several micro-batches the last one counts

    def end(self) -> None:
        """A step is done."""
        self._spans.append((self._began, self._last))

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def read(self) -> dict[str, float]:
        """Seconds for each step since the last call, of the fastest and the slowest."""
        took = [a.elapsed_time(b) / 1e3 if self._gpu else b - a for a, b in self._spans]
        self._spans.clear()
        if world_size() == 1:
            return {}
        table = torch.zeros(world_size(), dtype=torch.float64)
        table[rank()] = sum(took) / max(len(took), 1)
        seconds = all_reduce(table).tolist()
        slowest = max(seconds)
        return {
            "work_seconds_fastest": round(min(seconds), 4),
            "work_seconds_slowest": round(slowest, 4),
            "slowest_process": seconds.index(slowest),
        }


class Heartbeat:
    """Says in RUN/heartbeat.json, every few seconds, how far a run is."""

    def __init__(self, run: Path, every: float = 10.0) -> None:
        self._file, self._every, self._last = run / "heartbeat.json", every, -every

    def beat(self, step: int) -> None:
        """A step is done."""
        now = time.monotonic()
        if rank() or now - self._last < self._every:
            return
        self._last = now
        told = {"step": step, "time": time.time(), "host": socket.gethostname()}
        draft = self._file.with_suffix(".tmp")
        with suppress(OSError):  # no reason to stop a run
            draft.write_text(json.dumps(told | {"process": os.getpid()}))
            draft.replace(self._file)

    def end(self) -> None:
        """The run ends in good order."""
        if rank() == 0:
            self._file.unlink(missing_ok=True)


FLIGHT = "flight_process_"  # and the number of the process
_FLIGHTS = "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"  # once


@contextmanager
def flights_in(run: Path) -> Iterator[None]:
    """Records of what hung go into a run's folder, unless they have another place."""
    if os.environ.keys() & {*_FLIGHTS}:
        yield
        return
    os.environ[_FLIGHTS[0]] = str(run.absolute() / FLIGHT)
    try:
        yield
    finally:
        del os.environ[_FLIGHTS[0]]


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Python collects no garbage by itself, and gets its habits back in the end."""
    habit = gc.isenabled()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if habit:
            gc.enable()


@contextmanager
def recorded(run: Path, step: int, device: torch.device, wanted: int) -> Iterator[None]:
    """Write what is done inside into RUN/profile, if this step is the one wanted."""
    if step != wanted:
        yield
        return
    (folder := run / "profile").mkdir(exist_ok=True)
    name, gpu = f"step_{step:08d}_process_{rank()}", device.type == "cuda"
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is to be quiet
    if gpu:
        torch.cuda.memory._record_memory_history(max_entries=200_000)
    with profile(activities=kinds, profile_memory=True) as trace:
        yield
        if gpu:
            torch.cuda.synchronize(device)
    trace.export_chrome_trace(str(folder / f"{name}.json.gz"))
    if gpu:
        memory: Any = torch.cuda.memory
        memory._dump_snapshot(str(folder / f"{name}_memory.pickle"))
        memory._record_memory_history(enabled=None)
