"""Can the processes talk?.

Generated from book/92_probe.md by `make export`: edit there.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import torch
import torch.distributed as dist

__all__ = [
    "add_up",
    "probe_all_reduce",
    "Job",
    "started",
    "meeting",
    "free_port",
    "ADVICE",
]


def add_up(kind: str) -> None:
    """What each process of the probe does: add up a tensor with all the others."""
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    n = dist.get_world_size()
    x = torch.full((1 << 20,), dist.get_rank() + 1.0, device=kind)
    dist.all_reduce(x)
    if not x.min().item() == x.max().item() == n * (n + 1) / 2:
        raise SystemExit("the sum is wrong")
    dist.destroy_process_group()


_PROBE = (sys.executable, "-m", "diffussm.probe")


def probe_all_reduce(
    kind: str, processes: int, limit: float = 120.0, program: Sequence[str] = _PROBE
) -> str:
    """Let processes add up a tensor, with NCCL ("cuda") or gloo ("cpu").

    Returns what to report; raises OSError if they fail, or take more than `limit`
    seconds, having ended them.
    """
    begun = time.monotonic()
    with started([*program, kind], meeting(processes)) as jobs:
        for job in jobs:
            left = max(limit - (time.monotonic() - begun), 0.01)
            try:
                done = job.process.wait(left) == 0
            except subprocess.TimeoutExpired:
                raise OSError(f"a hang of {limit:g} s; {ADVICE[kind]}") from None
            if not done:
                raise OSError(f"a process failed: {job.last_words()}; {ADVICE[kind]}")
    means = "NCCL" if kind == "cuda" else "gloo"
    return f"a tensor was added up with {means} (processes: {processes})"


class Job(NamedTuple):
    """A process that was started, and what it says on its error stream."""

    process: "subprocess.Popen[bytes]"
    said: IO[bytes]

    def last_words(self) -> str:
        """The last line that it said."""
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").split("\n")
        told = [line for line in lines if line.strip()]
        return f"{told[-1].strip():.200}" if told else "no message"


@contextmanager
def started(
    command: Sequence[str], places: Sequence[dict[str, str]]
) -> Iterator[list[Job]]:
    """A process in each place; when this is left they have ended."""
    jobs = []
    few = {"OMP_NUM_THREADS": "1"} if len(places) > 1 else {}
    try:
        for place in places:
            said = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
            how: Any = {"env": few | os.environ | place, "stdout": subprocess.DEVNULL}
            jobs.append(Job(subprocess.Popen(command, stderr=said, **how), said))
        yield jobs
    finally:
        for job in jobs:
            job.process.kill()
            job.process.wait()
            job.said.close()


def meeting(processes: int) -> list[dict[str, str]]:
    """What tells each process who it is, and where the others are."""
    if "WORLD_SIZE" in os.environ:
        return [{}]  # torchrun has told us already
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks, place["WORLD_SIZE"] = map(str, range(processes)), str(processes)
    return [place | {"RANK": rank, "LOCAL_RANK": rank} for rank in ranks]


def free_port() -> str:
    """A port of this machine where nobody listens."""
    with socket.socket() as free:
        free.bind(("", 0))
        return str(free.getsockname()[1])


ADVICE = {
    "cuda": "set NCCL_DEBUG=INFO and try again; if it hangs, NCCL_P2P_DISABLE=1 or "
    "NCCL_IB_DISABLE=1 tell which link is at fault, NCCL_SOCKET_IFNAME names the "
    "network to use",
    "cpu": "set GLOO_SOCKET_IFNAME to the network to use, e.g. lo, and see that no "
    "firewall is between them",
}

if __name__ == "__main__" and __spec__ is not None:  # python -m, and no notebook
    add_up(sys.argv[1])
