"""Begin with what is known.

Generated from book/49_warm_start.md by `make export`: edit there.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffussm.checkpoints import find_checkpoint, snapshot, write_checkpoint
from diffussm.data import Dataset
from diffussm.files import read_json, write_json
from diffussm.guards import expect_same
from diffussm.model import DiffuSSM
from diffussm.model_config import DiffuSSMConfig
from diffussm.options import Execution, Recipe, as_flags
from diffussm.run_folder import held, load_run, open_run
from diffussm.training import TrainState

__all__ = ["inherit", "warm_start", "check_warm_start"]


def _what_fits(recipe: Recipe, other: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Averaged weights of a run that fit a recipe; names of those taken, and new."""
    model, _, _ = load_run(other)
    _compare_models(other, recipe.model, model.config)
    with torch.device("meta"):
        ours = DiffuSSM(recipe.model).state_dict()
    theirs = model.state_dict()
    taken = [k for k in ours if k in theirs and ours[k].shape == theirs[k].shape]
    new = [name for name in ours if name not in taken]
    origin = {"run": str(other.resolve()), "taken": taken, "new": new}
    return {name: theirs[name] for name in taken}, origin


def inherit(recipe: Recipe, other: Path) -> tuple[TrainState, dict[str, Any]]:
    """A state of step 0 with the averaged weights of a run; what is taken, and new.

    Raises:
        ValueError, OSError: no run, or one of another width, depth or kind.
    """
    weights, origin = _what_fits(recipe, other)
    state = TrainState.create(recipe)
    for network in (state.model, state.ema):
        network.load_state_dict(weights, strict=False)
    return state, origin


_MAY_DIFFER = {"input_size", "num_classes", "label_dropout"}


def _compare_models(other: Path, ours: DiffuSSMConfig, theirs: DiffuSSMConfig) -> None:
    now, then = (
        {k: v for k, v in asdict(config).items() if k not in _MAY_DIFFER}
        for config in (ours, theirs)
    )
    unlike = {f"model.{k}": v for k, v in then.items() if now[k] != v}
    advice = f"Add {as_flags(unlike)}, or omit --init_from."
    expect_same(f"{other} has another model, which differs in", now, then, advice)


def warm_start(
    run: Path,
    recipe: Recipe,
    execution: Execution,
    data: Dataset,
    other: Path,
    other_data: bool = False,
) -> dict[str, Any]:
    """Claim a folder as `open_run` does, for a run with the weights of another.

    A run that has begun so goes on. Returns what `RUN/init.json` says: the other run,
    and the names of the tensors that are taken, and new.

    Raises:
        ValueError, OSError: see `open_run` and `inherit`; or it has begun otherwise.
    """
    begun = _has_begun(run, other)
    first = None if begun else inherit(recipe, other)
    open_run(run, recipe, execution, data, other_data)
    with held(run):
        if first is not None and not _has_begun(run, other):
            state, origin = first
            write_json(run / "init.json", origin)
            write_checkpoint(run, snapshot(state))
    return dict(read_json(run / "init.json"))


def _has_begun(run: Path, other: Path) -> bool:
    """Whether a run has a checkpoint; ValueError if it began with other weights."""
    if find_checkpoint(run) is None:
        return False
    file, asked = run / "init.json", {"init_from": str(other.resolve())}
    known = {"init_from": read_json(file)["run"] if file.is_file() else None}
    advice = "Omit --init_from, or name a new folder."
    expect_same(f"{run} has begun with other weights:", asked, known, advice)
    return True


def check_warm_start(run: Path, recipe: Recipe, other: Path) -> dict[str, Any]:
    """What `RUN/init.json` says, or would say.

    Raises:
        ValueError, OSError: as for `warm_start`.
    """
    if _has_begun(run, other):
        return dict(read_json(run / "init.json"))
    return _what_fits(recipe, other)[1]
