"""Start processes as torchrun does, and hear how they ended."""

import json
import multiprocessing
import os
import signal
import socket
import traceback
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from tiny import TINY, changed, log_of

from diffussm.checkpoints import find_checkpoint
from diffussm.data import TensorData
from diffussm.distributed import processes, rank
from diffussm.runs import train

# Children of a server that has imported everything start in a hundredth of a second.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["diffussm.runs", "torch.distributed.fsdp", "torch._dynamo"]
)

REPORTS = []


def cluster(**options):
    """`processes`, of which each says through its pipe why it ends."""
    return processes("cpu", report=lambda error: REPORTS[0](error), **options)


def _child(function, arguments, environment, pipe):
    os.environ.update(environment)
    torch.set_num_threads(1)
    REPORTS.append(lambda error: pipe.send((False, f"{type(error).__name__}: {error}")))
    try:
        pipe.send((True, function(*arguments)))
    except BaseException as error:
        pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


def start(size, function, *arguments):
    """Processes as torchrun starts them, with pipes that say how they ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for number in range(size):
        ours, theirs = FORKS.Pipe()
        environment = {
            "RANK": number,
            "LOCAL_RANK": number,
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
    """What `function` returns in each of `size` processes, or raises."""
    results = outcomes(start(size, function, *arguments))
    for fine, result in results:
        assert fine, result
    return [result for _, result in results]


# 50 images and batches of 8: the end of an epoch lies in a batch, and in a micro-batch.
SHARED = replace(TINY, model=replace(TINY.model, n_blocks=2))


def changed_shared(changes):
    """SHARED and SELDOM with these options."""
    recipe, execution = changed(changes)
    return replace(recipe, model=SHARED.model), execution


def fifty():
    generator = torch.Generator().manual_seed(0)
    return TensorData(
        torch.rand(50, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(50) % 10
    )


def run_shared(run, changes=None, kill_at=None):
    """Train SHARED with all processes; optionally be killed while logging a step."""

    def on_log(row):
        if row["step"] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    with cluster() as device:
        recipe, execution = changed_shared(changes or {})
        train(
            recipe,
            run,
            execution,
            progress=False,
            device=device,
            dataset=fifty(),
            on_log=on_log,
        )
        return rank()


def digest_of(run):
    """The checksums of all tensors: equal if and only if every bit is."""
    return json.loads((find_checkpoint(run) / "state.json").read_text())


def assert_close(run, other):
    for name in ("model", "ema"):
        ours, theirs = (
            safetensors.torch.load_file(
                find_checkpoint(folder) / name / "model.safetensors"
            )
            for folder in (run, other)
        )
        for key in ours:
            torch.testing.assert_close(
                ours[key], theirs[key], atol=2e-5, rtol=1e-3, msg=f"{name} {key}"
            )
    for a, b in zip(log_of(run), log_of(other), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
