"""Scaling out.

Generated from book/42_distributed.md by `make export`: edit there.
"""

import os
import pickle
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffussm.hourglass import linear_macs
from diffussm.model import DiffuSSM
from diffussm.training import E, Execution, Recipe, Snapshot, World, write_checkpoint

__all__ = [
    "T",
    "DAY",
    "REPEAT",
    "EXIT_PREEMPTED",
    "SIGNALS",
    "PeerFailed",
    "FailureWatch",
    "Cluster",
    "PEAK_FLOPS",
    "peak_flops",
]

T = TypeVar("T")
DAY = 86_400.0  # seconds; a process that has done its share waits this long for the others
REPEAT = 2.0  # seconds; torchrun hands on a Ctrl-C that the terminal has sent already
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: not an error, try again
# SIGUSR1 is not known on Windows
SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1")
    if hasattr(signal, name)
)


class PeerFailed(ConnectionError):
    """Another process of the run failed; the message says which one, and why."""


class FailureWatch:
    """How a process that fails tells the others, which may be waiting for it in an all-reduce.

    A thread of each process looks twice a second for a notice in the store of the process group, over a
    connection of its own, and calls `failed` once there is one.
    """

    def __init__(self, store: dist.Store, failed: Callable[[], object]) -> None:
        self._store = store.clone()
        self._store.set_timeout(timedelta(seconds=10))
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._look, args=(failed,), name="failures", daemon=True
        )
        self._thread.start()

    def _look(self, failed: Callable[[], object]) -> None:
        try:
            while not self._closed.wait(0.5):
                if self._store.check(["failed"]):
                    failed()
        except RuntimeError:  # the process that held the store has ended
            return

    def post(self, notice: str) -> str:
        """Leave a notice; returns the first that anybody left."""
        try:
            return self._store.compare_set("failed", "", notice).decode()
        except RuntimeError:
            return notice

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()


class Cluster(World):
    """The processes that torchrun started, or this one alone, with all that a long run needs (chapter 11).

    Checkpoints are written by a thread while training goes on. Use it as a context manager. If all processes
    leave it together, it gives back the process group and the signal handlers. A process that leaves it
    alone, by an exception that the others do not raise, calls `report` (None: print the traceback) and ends
    at once, with the exit code that `report` returns, or 1; the others follow within seconds.

    Args:
        device: None for a GPU if there is one, ``"cuda"`` for the GPU of this process, or ``"cpu"``.
        timeout: seconds until a process gives up waiting for the others in an all-reduce.
        stoppable: SIGINT (Ctrl-C), SIGTERM and SIGUSR1 set `stopping`; a second SIGINT raises
            KeyboardInterrupt. False leaves the signals as they are, for work that cannot stop half-way.
        report: called with what made this process fail.

    Raises:
        ValueError: there are more processes than GPUs, or `device` names one GPU for all of them.
    """

    def __init__(
        self,
        device: str | torch.device | None = None,
        timeout: float = 1800.0,
        *,
        stoppable: bool = True,
        report: Callable[[BaseException], int | None] | None = None,
    ) -> None:
        super().__init__(device)
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        if self.device.type == "cuda":
            self.device = _own_gpu(self.device)
            torch.cuda.set_device(self.device)
        self._report = report or _print_traceback
        self._leaving = threading.Lock()
        self._shared: Exception | None = None  # what all processes raise together
        if self.size > 1:
            self._join(timeout)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._written: Future[Path] | None = None
        self._interrupted: float | None = None  # when Ctrl-C was pressed first
        self._handlers = {
            number: signal.signal(number, self._stop) for number in SIGNALS if stoppable
        }

    def _join(self, timeout: float) -> None:
        """Meet the other processes."""
        Cluster._groups += 1
        limit, gpu = timedelta(seconds=timeout), self.device.type == "cuda"
        store, _, _ = next(dist.rendezvous("env://", timeout=limit))
        self._store = dist.PrefixStore(f"diffussm/{Cluster._groups}", store)
        self._counters = 0
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=dist.PrefixStore("group", self._store),
            rank=self.rank,
            world_size=self.size,
            timeout=limit,
            device_id=self.device
            if gpu
            else None,  # or NCCL has to guess it from the rank
        )
        self._watch = FailureWatch(self._store, self._leave)

    _groups = 0  # process groups so far: each has its own names in the store

    def _stop(self, number: int, _: object) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted is not None and now - self._interrupted > REPEAT:
                raise KeyboardInterrupt
            self._interrupted = self._interrupted or now
        self.stopping = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: object, error: BaseException | None, trace: object
    ) -> None:
        if self.size > 1 and error is not None and error is not self._shared:
            self._leave(error)
        self._writer.shutdown(wait=True)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self.size > 1:
            dist.destroy_process_group()
            self._watch.close()

    def _leave(self, error: BaseException | None = None) -> NoReturn:
        """End this process alone, because of its own error or (None) another's. Waits for nothing.

        To destroy the process group would be to wait for the others, who wait for this process.
        """
        with self._leaving:  # for ever: whoever comes second has nothing to add
            ours = (
                ""
                if error is None
                else f"process {self.rank} failed: {type(error).__name__}: {error}"[
                    :2000
                ]
            )
            first = self._watch.post(ours)
            if error is None or first != ours:
                error = PeerFailed(f"stopped, because {first}")
            code = self._exit_code(error)
            sys.stdout.flush()
            sys.stderr.flush()
            if self.rank == 0:
                time.sleep(
                    1.0
                )  # without torchrun the store is here, and the others have to read it
            os._exit(code)

    def _exit_code(self, error: BaseException) -> int:
        try:
            return self._report(error) or 1
        except BaseException:  # not even a report may keep this process
            traceback.print_exc()
            return 1

    def together(self, error: E) -> E:
        """See World."""
        self._shared = error
        return error

    def barrier(self) -> None:
        """See World. Waits for a day, whatever the timeout of the process group."""
        deadline = time.monotonic() + DAY
        count = self._counter()
        count(1)
        while count(0) < self.size:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"process {self.rank} has waited a day for {self.size - count(0)} others"
                )
            time.sleep(
                0.1
            )  # not in one call that blocks: signals are handled in between
        self.sum(
            torch.zeros(1)
        )  # all have seen it: now the process that holds the store may end

    def deal(self, numbers: Sequence[int]) -> Iterator[int]:
        """See World."""
        count = self._counter()
        while (position := count(1) - 1) < len(numbers) and not self.stopping:
            yield numbers[position]
        count(len(numbers))  # if we are asked to stop, nobody gets more

    def _counter(self) -> Callable[[int], int]:
        """A new number that all processes share: what is called adds to it, and returns it."""
        if self.size == 1:
            alone = [0]

            def add(amount: int) -> int:
                alone[0] += amount
                return alone[0]

            return add
        self._counters += 1
        return partial(self._store.add, f"counter/{self._counters}")

    def shard(self, module: nn.Module, recipe: Recipe, execution: Execution) -> None:
        """See World. Blocks are compiled one by one: all are the same graph, which is compiled once."""
        if self.device.type == "cuda":  # TF32 only where bf16 is allowed
            torch.set_float32_matmul_precision(
                "high" if recipe.precision == "bf16" else "highest"
            )
        if execution.compile:
            # DDP would have each block's graph cut into parts of its buckets' size, for an overlap that
            # blocks compiled one by one give already
            from torch._dynamo import config as dynamo

            dynamo.optimize_ddp = False
            for block in module.blocks:  # type: ignore[union-attr]
                block.compile()
        if self.size > 1 and execution.strategy == "fsdp":
            from torch.distributed.fsdp import (
                fully_shard,
            )  # imported where it is used: it costs seconds

            mesh = dist.init_device_mesh(self.device.type, (self.size,))
            for block in module.blocks:  # type: ignore[union-attr]
                fully_shard(block, mesh=mesh)
            fully_shard(module, mesh=mesh)

    def wrap(self, model: DiffuSSM, execution: Execution) -> nn.Module:
        """See World."""
        if self.size == 1 or execution.strategy == "fsdp":
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def exchange(self, network: nn.Module, now: bool) -> AbstractContextManager[object]:
        """See World."""
        if isinstance(network, DistributedDataParallel):
            return nullcontext() if now else network.no_sync()
        if hasattr(network, "set_requires_gradient_sync"):  # FSDP2
            network.set_requires_gradient_sync(now)  # type: ignore[operator]
        return nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """See World."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def once(self, function: Callable[[], T]) -> T:
        """See World. The result travels between our own processes, never through a file."""
        error: Exception | None = None
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = function()
                if self.size > 1:
                    pickle.dumps(
                        outcome[0]
                    )  # or the others would wait for what cannot be sent
            except Exception as raised:
                error = raised
                outcome = [None, _portable(raised)]
        if self.size > 1:
            dist.broadcast_object_list(outcome, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise self.together(error or outcome[1])
        return cast(T, outcome[0])

    def whole(self, tensor: Tensor) -> Tensor:
        """See World."""
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def place(self, tensor: Tensor, like: Tensor) -> Tensor:
        """See World. Every process has read the whole tensor from the checkpoint; each keeps its slice."""
        tensor = tensor.to(like.device)
        if hasattr(like, "placements"):
            from torch.distributed.tensor import distribute_tensor

            mesh, slices = like.device_mesh, like.placements  # type: ignore[attr-defined]
            return distribute_tensor(tensor, mesh, slices, src_data_rank=None)
        return tensor

    def save(
        self, run: Path, snapshot: Snapshot, recipe: Recipe, execution: Execution
    ) -> None:
        """See World. Waits for the write before this one, not for this one."""
        self.finish()
        if self.rank == 0:
            self._written = self._writer.submit(
                write_checkpoint,
                run,
                snapshot,
                execution.keep_last,
                execution.keep_every,
                execution.keep_steps(recipe.batch_size),
            )

    def save_error(self) -> Exception | None:
        """See World."""
        error = (
            self._written.exception()
            if self._written is not None and self._written.done()
            else None
        )
        return error if isinstance(error, Exception) else None

    def finish(self) -> None:
        """See World."""

        def wait() -> None:
            if self._written is not None:
                self._written.result()

        self.once(wait)

    def vitals(self, config: Recipe, images_per_second: float) -> dict[str, float]:
        """See World: the share of the GPUs' peak that is used (MFU), and the peak of memory in GB."""
        if self.device.type != "cuda":
            return {}
        figures = {"memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}
        torch.cuda.reset_peak_memory_stats()  # of this line of the log, not of all since the start
        peak = peak_flops(torch.cuda.get_device_name())
        if peak is not None:
            used = 6 * linear_macs(config.model) * images_per_second
            figures["mfu"] = round(used / (peak * self.size), 4)
        return figures


def _own_gpu(device: torch.device) -> torch.device:
    """The GPU of this process, by its number on this machine; ValueError if there is none for it alone."""
    gpus = torch.cuda.device_count()
    local = int(os.environ.get("LOCAL_RANK", 0))
    neighbours = int(
        os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1))
    )
    if device.index is not None and neighbours > 1:
        raise ValueError(
            f"--device {device} is one GPU, and {neighbours} processes run on this machine; pass "
            "--device cuda, and each takes its own"
        )
    if device.index is None and local >= gpus:
        raise ValueError(
            f"process {local} of this machine has no GPU of its own: there are {gpus}; start torchrun with "
            f"--nproc_per_node {gpus}, or pass --device cpu"
        )
    return torch.device("cuda", local) if device.index is None else device


def _portable(error: Exception) -> Exception:
    """This exception if it survives being sent to another process, or else its text."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:  # a class's own methods may raise anything
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def _print_traceback(error: BaseException) -> None:
    traceback.print_exception(error)


PEAK_FLOPS = {
    # nvidia.com/en-us/data-center/a100; the A800 is an A100 with a slower NVLink
    "A100": 312e12,
    "A100 PCIe": 312e12,
    "A800": 312e12,
    "A800 PCIe": 312e12,
    # nvidia.com/en-us/data-center/h100, h200 and grace-hopper-superchip, halved: the sheets count zeros of
    # sparse matrices. H100 PCIe: product brief PB-11133. The H800 is an H100 with a slower NVLink.
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H800": 989e12,
    "H800 PCIe": 756e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "GH200": 989e12,
    "H20": 148e12,  # no public sheet; the figure that resellers and frameworks (verl, Megatron-Bridge) give
    # nvidia.com/en-us/data-center/hgx and gb200-nvl72, halved
    "B200": 2250e12,
    "GB200": 2500e12,
    "L40S": 362e12,  # nvidia.com/en-us/data-center/l40s
    "RTX 4090": 165e12,  # "NVIDIA Ada GPU Architecture", appendix A, with sums in float32
}
# parts of a name that say nothing about speed: maker, form of the module, memory
_PLAIN = re.compile(r"NVIDIA|Tesla|GeForce|SXM\d*|HBM\d\w*|\d+GB?", re.IGNORECASE)


def peak_flops(device_name: str) -> float | None:
    """The maker's figure for dense bf16 products, operations per second.

    `device_name` is what CUDA says, such as ``"NVIDIA A100-SXM4-80GB"``. None for a GPU that is not in the
    table, or a part of one (MIG): variants of one name differ in speed.
    """
    words = [
        word
        for word in re.split(r"[\s-]+", device_name)
        if word and not _PLAIN.fullmatch(word)
    ]
    known = {name.casefold(): flops for name, flops in PEAK_FLOPS.items()}
    return known.get(" ".join(words).casefold())
