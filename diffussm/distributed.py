"""Many processes.

Generated from book/42_distributed.md by `make export`: edit there.
"""

import itertools
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

__all__ = [
    "T",
    "E",
    "rank",
    "world_size",
    "all_reduce",
    "on_rank_zero",
    "stopping",
    "request_stop",
    "deal",
    "barrier",
    "processes",
    "own_device",
    "limit_waiting",
    "together",
    "leaves_alone",
    "PeerFailed",
    "Preempted",
    "EXIT_PREEMPTED",
]

T = TypeVar("T")
E = TypeVar("E", bound=Exception)


def rank() -> int:
    """The number of this process, from 0; 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes share the run; 1 when this one is alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(values: Tensor) -> Tensor:
    """The sum of a tensor over the processes, in place; all of them call it."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def on_rank_zero(function: Callable[[], T]) -> T:
    """Call a function in one process; all get its result or raise its exception."""
    if world_size() == 1:
        return function()
    error: Exception | None = None
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
            pickle.dumps(outcome[0])  # or the others would wait for what cannot be sent
        except Exception as raised:
            error, outcome = raised, [None, _portable(raised)]
    cpu = torch.device("cpu")
    dist.broadcast_object_list(outcome, group=_GROUP.patient, device=cpu)
    if outcome[1] is not None:
        raise together(error or outcome[1])
    return cast(T, outcome[0])


def _portable(error: Exception) -> Exception:
    """This exception if it survives being sent to another process, or else its text."""
    with suppress(Exception):  # a class's own methods may raise anything
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    return RuntimeError(f"{type(error).__name__}: {error}")


@dataclass
class _Group:
    """The processes that work together, as this one sees them."""

    store: Store | None = None
    patient: dist.ProcessGroup | None = None  # in it one waits as long as at the start
    limit: float = 0.0  # of the start, in seconds
    counters: int = 0  # that were handed out so far
    stopping: bool = False
    interrupted: float | None = None  # when Ctrl-C was pressed first
    shared: Exception | None = None  # what all processes raise together


_GROUP = _Group()


def _forget() -> None:
    """As it is for a process that is alone and was asked nothing."""
    vars(_GROUP).update(vars(_Group()))


def stopping() -> bool:
    """Whether this process was asked to save and stop."""
    return _GROUP.stopping


def request_stop() -> None:
    """Ask this process to save and stop."""
    _GROUP.stopping = True


def _counter() -> Callable[[int], int]:
    """A new number that all share: what is returned adds to it, and says its value."""
    _GROUP.counters += 1
    if _GROUP.store is not None:
        return partial(_GROUP.store.add, f"counter/{_GROUP.counters}")
    alone = [0]

    def add(amount: int) -> int:
        alone[0] += amount
        return alone[0]

    return add


def deal(numbers: Sequence[int]) -> Iterator[int]:
    """Each number in one process, whichever asks next; ends when one is `stopping`."""
    count = _counter()
    while (position := count(1) - 1) < len(numbers) and not stopping():
        yield numbers[position]
    count(len(numbers))  # if we are asked to stop, nobody gets more


def barrier() -> None:
    """Wait until every process is here; TimeoutError after a day."""
    deadline, count = time.monotonic() + 86_400, _counter()
    count(1)
    while (missing := world_size() - count(0)) > 0:
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {rank()} waited a day for {missing} others")
        time.sleep(0.1)
    all_reduce(torch.zeros(1))  # all have seen it: whoever holds the store may end


@contextmanager
def processes(
    device: str | torch.device | None = None,
    timeout: float = 1800.0,
    *,
    stoppable: bool = True,
    report: Callable[[BaseException], int | None] | None = None,
) -> Iterator[torch.device]:
    """The processes that torchrun started, or this one alone; gives its device.

    A process that leaves by an exception which the others do not raise ends at once;
    the others follow within seconds.

    Args:
        device: None for a GPU if there is one, "cuda" for this process's, or "cpu".
        timeout: seconds until a process gives up waiting; see `limit_waiting`.
        stoppable: whether signals set `stopping`.
        report: called with what made this process fail; returns its exit code.

    Raises:
        ValueError: more processes than GPUs, or one GPU for all of them.
    """
    _forget()
    own = own_device(device)
    watch = _join(own, timeout, report or traceback.print_exception)
    handlers = {n: signal.signal(n, _on_signal) for n in _SIGNALS if stoppable}
    try:
        yield own
    except BaseException as error:
        if watch is not None and leaves_alone(error):
            watch.leave(error)
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if watch is not None:
            dist.destroy_process_group()
            watch.close()
        _forget()


def _join(
    device: torch.device, timeout: float, report: Callable[[BaseException], int | None]
) -> "_FailureWatch | None":
    """Meet the other processes, if there are any."""
    size, limit = int(os.environ.get("WORLD_SIZE", 1)), timedelta(seconds=timeout)
    if size == 1:
        return None
    store, number, _ = next(rendezvous("env://", timeout=limit))
    _GROUP.store = PrefixStore(f"diffussm/{next(_GROUPS)}", store)
    gpu = device.type == "cuda"
    os.environ.update({**_FLIGHT_RECORDER, **os.environ})
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        store=PrefixStore("group", _GROUP.store),
        rank=number,
        world_size=size,
        timeout=limit,
        device_id=device if gpu else None,  # or NCCL has to guess it from the rank
    )
    _GROUP.patient = cast(Any, dist.new_group(backend="gloo", timeout=limit))
    _GROUP.limit = timeout
    return _FailureWatch(_GROUP.store, report)


_GROUPS = itertools.count(1)  # each has its own names in the store


def own_device(device: str | torch.device | None) -> torch.device:
    """The device of this process; ValueError if there is none for it alone."""
    own = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if own.type != "cuda":
        return own
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    n = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))
    if own.index is not None and n > 1:
        raise ValueError(f"{own} is one GPU, and {n} processes run: pass --device cuda")
    if own.index is None and local >= gpus:
        raise ValueError(
            f"process {local} of this machine has no GPU of its own: "
            f"start torchrun with --nproc_per_node {gpus}, or pass --device cpu"
        )
    own = torch.device("cuda", local) if own.index is None else own
    torch.cuda.set_device(own)
    return own


def limit_waiting(seconds: float | None) -> None:
    """How long an all-reduce may take from now on; None: as at the start.

    `on_rank_zero` and `barrier` are as patient as ever.
    """
    if world_size() > 1:
        limit = _GROUP.limit if seconds is None else seconds
        older: Any = getattr(dist.distributed_c10d, "_set_pg_timeout", None)
        getattr(dist, "set_timeout", older)(timedelta(seconds=limit))


_FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}


def together(error: E) -> E:
    """Mark an exception that all processes raise: `raise together(Preempted(...))`."""
    _GROUP.shared = error
    return error


def leaves_alone(error: BaseException | None) -> bool:
    """Whether this is an exception that the other processes do not raise."""
    return world_size() > 1 and error is not None and error is not _GROUP.shared


class _FailureWatch:
    """How a process that fails tells the others, which may be waiting for it."""

    def __init__(
        self, store: Store, report: Callable[[BaseException], int | None]
    ) -> None:
        self._store = store.clone()  # a connection of its own
        self._store.set_timeout(timedelta(seconds=10))
        self._report = report
        self._closed, self._leaving = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        with suppress(RuntimeError):  # the process that held the store has ended
            while not self._closed.wait(0.5):
                if self._store.check(["failed"]):
                    self.leave()

    def _post(self, notice: str) -> str:
        """Leave a notice; returns the first that anybody left."""
        with suppress(RuntimeError):
            first: bytes = self._store.compare_set("failed", "", notice)
            return first.decode()
        return notice

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def leave(self, error: BaseException | None = None) -> NoReturn:
        """End this process alone, for its own error or (None) another's."""
        with self._leaving:  # for ever: whoever comes second has nothing to add
            ours = ""
            if error is not None:
                ours = f"process {rank()} failed: {type(error).__name__}: {error}"[
                    :2000
                ]
            first = self._post(ours)
            if error is None or first != ours:
                error = PeerFailed(f"stopped, because {first}")
            code = self._exit_code(error)
            sys.stdout.flush()
            sys.stderr.flush()
            if rank() == 0:
                time.sleep(1.0)  # the store may be here, and the others have to read it
            os._exit(code)

    def _exit_code(self, error: BaseException) -> int:
        try:
            return self._report(error) or 1
        except BaseException:  # not even a report may keep this process
            traceback.print_exc()
            return 1


class PeerFailed(ConnectionError):
    """Another process of the run failed; the message says which one, and why."""


class Preempted(Exception):
    """The work was asked to stop, and what is done is kept; the message says more."""


EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: not an error, try again

_REPEAT = 2.0  # seconds
_KNOWN = ("SIGINT", "SIGTERM", "SIGUSR1")  # the last is not known on Windows
_SIGNALS = tuple(getattr(signal, name) for name in _KNOWN if hasattr(signal, name))


def _on_signal(number: int, _: object) -> None:
    now = time.monotonic()
    if number == signal.SIGINT:
        if _GROUP.interrupted is not None and now - _GROUP.interrupted > _REPEAT:
            raise KeyboardInterrupt
        _GROUP.interrupted = _GROUP.interrupted or now
    request_stop()
