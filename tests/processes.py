"""Start processes as torchrun does, and hear how they ended."""

import multiprocessing
import os
import socket
import traceback

import torch

from diffussm.distributed import Cluster

# Children of a server that has imported everything start in a hundredth of a second.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["diffussm.distributed", "torch.distributed.fsdp", "torch._dynamo"]
)

REPORTS = []


def cluster(**options):
    """A Cluster that says through the pipe of its process why it ends."""
    return Cluster("cpu", report=lambda error: REPORTS[0](error), **options)


def _child(function, arguments, environment, pipe):
    os.environ.update(environment)
    torch.set_num_threads(1)
    REPORTS.append(lambda error: pipe.send((False, f"{type(error).__name__}: {error}")))
    try:
        pipe.send((True, function(*arguments)))
    except BaseException as error:
        pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


def start(size, function, *arguments):
    """Processes as torchrun starts them, with the pipes on which they say how they ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(size):
        ours, theirs = FORKS.Pipe()
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            "MASTER_PORT": port,
        }
        environment = {key: str(value) for key, value in environment.items()} | {
            "MASTER_ADDR": "127.0.0.1"
        }
        process = FORKS.Process(
            target=_child, args=(function, arguments, environment, theirs)
        )
        process.start()
        theirs.close()
        started.append((process, ours))
    return started


def outcomes(started, timeout=400):
    results = []
    for process, pipe in started:
        assert pipe.poll(timeout), "a process hangs"
        results.append(pipe.recv())
        process.join(timeout)
    return results


def together(size, function, *arguments):
    """What `function` returns in each of `size` processes; raises what one of them raised."""
    results = outcomes(start(size, function, *arguments))
    for fine, result in results:
        assert fine, result
    return [result for _, result in results]
