"""How long training stands still for a checkpoint: ``python -m benchmarks.checkpoint``.

A synchronous save (snapshot, write, flush, read back, checksums, rename) against what
is left of it when a thread writes (chapter 11): the snapshot alone. The state is that
of a DiffuSSM-S with its average and AdamW's moments. Both sides write the same bytes,
which is checked.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    Disagreement,
    command,
    report,
    require_quiet,
    rounded,
    two_or_more,
)
from diffussm.checkpoints import snapshot, write_checkpoint
from diffussm.model import PRESETS, DiffuSSMConfig
from diffussm.options import Execution, Recipe
from diffussm.training import TrainState
from diffussm.writers import BackgroundWriter

LIMIT = 10.0


def make_state(preset: str) -> tuple[Recipe, TrainState]:
    """A state that has everything a checkpoint holds, moments included."""
    config = Recipe(model=DiffuSSMConfig(**PRESETS[preset]))
    state = TrainState.create(config)
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    state.optimizer.zero_grad()
    return config, state


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write benchmarks/results/checkpoint.{md,json}; 1 if the limit is
    not reached.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="DiffuSSM-S")
    parser.add_argument("--runs", type=two_or_more, default=5)
    options = parser.parse_args(argv)
    seconds: dict[str, list[float]] = {"synchronous": [], "training waits": []}
    config, state = make_state(options.preset)
    with (
        tempfile.TemporaryDirectory() as folder,
        BackgroundWriter(Path(folder, "b"), config, Execution()) as writer,
    ):
        for _ in range(options.runs):
            state.step += 1
            begun = time.perf_counter()
            written = write_checkpoint(Path(folder, "a"), snapshot(state))
            seconds["synchronous"].append(time.perf_counter() - begun)

            begun = time.perf_counter()
            writer.save(state)
            seconds["training waits"].append(time.perf_counter() - begun)
            writer.wait()
            records = [
                json.loads(
                    (
                        Path(folder, name, "checkpoints", written.name) / "state.json"
                    ).read_text()
                )
                for name in "ab"
            ]
            if records[0] != records[1]:
                raise Disagreement(
                    "the two ways wrote different checkpoints; nothing is reported"
                )
        size = sum(file.stat().st_size for file in written.rglob("*.safetensors"))
    what = f"checkpoint of {options.preset}, {size / 1e6:,.0f} MB"
    spread = require_quiet(what, seconds)
    slow, fast = (statistics.median(values) for values in seconds.values())
    row: dict[str, Any] = {
        "what": what,
        "synchronous": f"{1e3 * slow:,.0f} ms",
        "training waits": f"{1e3 * fast:,.0f} ms",
        "ratio": rounded(slow / fast, LIMIT),
        "limit": f"at least {LIMIT:g}",
        "reached": slow / fast >= LIMIT,
        "spread": f"{spread:.0%}",
        "seconds": seconds,
    }
    return report("checkpoint", "Saving while training goes on", [row])


if __name__ == "__main__":
    raise SystemExit(command(main))
