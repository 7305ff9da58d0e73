"""Twenty steps in every way that a run can be carried out, killed and resumed.

``benchmarks/gpu.sh`` begins with it: ``python -m benchmarks.matrix`` on a machine with
GPUs, ``--rehearse`` with two processes on a CPU. Each way trains the digits from step
0, saves, is killed by the strongest signal, and goes on in new processes from what was
saved. What all of it has logged, step by step, must be what one process has logged that
was left alone on a CPU. A way that fails is named, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, environment
from diffussm.checkpoints import find_checkpoint
from diffussm.distributed import processes
from diffussm.options import RECIPES, Execution, Recipe, flat, from_flat
from diffussm.parallel import compiler_lacking
from diffussm.runs import train

STEPS, SAVED, KILLED = 20, 10, 15
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compile": {"compile": True},
    "recompute": {"activation_checkpointing": "elementwise"},
    "micro-batches": {"micro_batch": 4},
    "chunks": {"convolution": "chunked_triton"},
    "compiled chunks, in bf16": {
        "convolution": "chunked_triton",
        "compile": True,
        "precision": "bf16",
    },
    "all of them, in bf16": {
        "compile": True,
        "convolution": "auto",
        "activation_checkpointing": "elementwise",
        "micro_batch": 4,
        "precision": "bf16",
    },
}
TOLERANCES = {"float32": 1e-3, "bf16": 3e-2}  # of losses and gradient norms
Log = list[dict[str, Any]]


def recipe_of(width: int, precision: str) -> Recipe:
    """The digits, with a model whose block fills more than one bucket of DDP."""
    digits = RECIPES["digits"]
    model = replace(digits.model, d_model=width, n_blocks=2)
    how: dict[str, Any] = {"precision": precision, "warmup": 0, "cooldown": 0}
    return replace(digits, model=model, steps=STEPS, lr=1e-3, **how)


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """The name of each way, and the options that it is."""
    for strategy in ("ddp", "fsdp"):
        for name, options in WAYS.items():
            yield f"{strategy}, {name}", {"strategy": strategy, **options}


def log_of(run: Path) -> Log:
    """What a run has logged, a row for each step."""
    lines = (run / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def one_process(file: Path) -> None:
    """What torchrun starts: train, or be killed once step `SAVED` is on the disk."""
    job = json.loads(file.read_text())
    run, (recipe, execution) = Path(job["run"]), from_flat(job["options"])

    def on_log(row: dict[str, Any]) -> None:
        if row["step"] == job["killed"]:
            while find_checkpoint(run) is None:  # it is written in the background
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    with processes(job["device"]) as device:
        train(recipe, run, execution, device, progress=False, on_log=on_log)


def start(job: dict[str, Any], count: int) -> int:
    """So many processes with a job, as torchrun starts them; its exit code."""
    file = Path(job["run"]).with_suffix(".json")
    file.write_text(json.dumps(job))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = ["--nproc_per_node", str(count), "-m", "benchmarks.matrix", "--job"]
    unheard = subprocess.DEVNULL if job["killed"] else None  # how torchrun mourns
    command = [*torchrun, *program, str(file)]
    return subprocess.run(command, stderr=unheard, check=False).returncode


def agree(found: Log, wanted: Log, tolerance: float) -> float:
    """The largest relative difference; ValueError if it, or a step, is amiss."""
    steps = [row["step"] for row in found]
    if steps != [row["step"] for row in wanted]:
        raise ValueError(f"it logged the steps {steps}, one after the other")
    worst = 0.0
    for ours, theirs in zip(found, wanted, strict=True):
        for name in ("loss", "grad_norm"):
            difference = abs(ours[name] / theirs[name] - 1)
            if not difference < tolerance:
                told = f"{name} {ours[name]:.6g}, on a CPU {theirs[name]:.6g}"
                raise ValueError(f"step {ours['step']}: {told}")
            worst = max(worst, difference)
    return worst


def killed_and_resumed(
    job: dict[str, Any], count: int, starts: Callable[[dict[str, Any], int], int]
) -> Log:
    """The log of a run that was killed in its middle and started again."""
    run = Path(job["run"])
    if starts({**job, "killed": KILLED}, count) == 0:
        raise ValueError("it ended before it was killed")
    left, saved = len(log_of(run)), find_checkpoint(run)
    if saved is None or not SAVED <= left <= KILLED:
        raise ValueError(f"killed at step {KILLED}, it left {left} rows and {saved}")
    if (code := starts({**job, "killed": None}, count)) != 0:
        raise ValueError(f"it did not resume: exit code {code}")
    return log_of(run)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.matrix", description=__doc__.splitlines()[0]
    )
    told = "two processes on a CPU and a tiny model; writes nothing"
    parser.add_argument("--rehearse", action="store_true", help=told)
    told = "only ways whose name has this in it, such as fsdp"
    parser.add_argument("--only", default="", help=told)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.job:
        one_process(arguments.job)
        return 0
    gpus = torch.cuda.device_count()
    if not gpus and not arguments.rehearse:
        print("error: PyTorch sees no GPU here; --rehearse takes a CPU")
        return 2
    kind, count = ("cpu", 2) if arguments.rehearse else ("cuda", gpus)
    return walk(kind, count, 32 if arguments.rehearse else 640, arguments.only)


def walk(
    kind: str,
    count: int,
    width: int,
    only: str = "",
    starts: Callable[[dict[str, Any], int], int] = start,
) -> int:
    """Every way, one after the other; 1 if one fails. On GPUs, the result is kept."""
    rows, wanted, folder = [], {}, Path(tempfile.mkdtemp(prefix="diffussm-"))
    for precision in TOLERANCES:  # what one process on a CPU learns
        recipe, alone = recipe_of(width, precision), folder / precision
        train(recipe, alone, Execution(log_every=1), "cpu", progress=False)
        wanted[precision] = log_of(alone)
    for number, (name, options) in enumerate(cases()):
        if only not in name:
            continue
        how = dict(options)
        precision = how.pop("precision", "float32")
        execution = Execution(log_every=1, save_every=SAVED, **how)
        if kind == "cpu" and "triton" in execution.convolution:
            print(f"matrix: {name}: left out, it is for a GPU", flush=True)
            continue
        job = {"device": kind, "run": str(folder / f"way-{number}")}
        job["options"] = flat(recipe_of(width, precision), execution)
        row: dict[str, Any] = {"what": name, "processes": count}
        lacking = compiler_lacking(torch.device(kind)) if execution.compile else ""
        try:
            if lacking:
                raise ValueError(f"no {lacking} here")
            found = killed_and_resumed(job, count, starts)
            row["difference"] = agree(found, wanted[precision], TOLERANCES[precision])
        except (ValueError, OSError) as error:
            row["error"] = str(error)
        rows.append(row)
        told = row.get("error") or f"right to {row['difference']:.1e}"
        print(f"matrix: {name}, {count} processes: {told}", flush=True)
    shutil.rmtree(folder)
    if kind == "cuda":
        record = {"environment": environment(), "steps": STEPS, "ways": rows}
        (RESULTS / "matrix.json").write_text(json.dumps(record, indent=2) + "\n")
    return int(any("error" in row for row in rows) or not rows)


if __name__ == "__main__":
    raise SystemExit(main())
