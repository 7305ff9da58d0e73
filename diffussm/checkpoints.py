"""Checkpoints that can be trusted.

Generated from book/41_checkpoints.md by `make export`: edit there.
"""

import json
import re
import shutil
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from diffussm.files import (
    read_json,
    read_tensors,
    sha256,
    whole_folder,
    write_json,
    write_tensors,
)
from diffussm.guards import explain, refuse
from diffussm.model import DiffuSSM, DiffuSSMConfig
from diffussm.options import warn
from diffussm.training import TrainState

__all__ = [
    "Snapshot",
    "WEIGHTS",
    "full_tensor",
    "snapshot",
    "write_checkpoint",
    "step_of",
    "checkpoints_of",
    "find_checkpoint",
    "load_checkpoint",
    "whole_ema",
]


class Snapshot(NamedTuple):
    """A checkpoint in main memory; only the first process has the tensors."""

    step: int
    model: DiffuSSMConfig
    tensors: dict[str, dict[str, Tensor]]
    meter: list[list[float]]
    skipped: list[int]


WEIGHTS = {name: f"{name}/model.safetensors" for name in ("model", "ema")}
_OPTIMIZER = "optimizer.safetensors"


def _tensors_of(state: TrainState) -> dict[str, Mapping[str, Tensor]]:
    """Every tensor of a checkpoint, by file and by name."""
    moments = {
        f"{name}/{key}": value
        for name, parameter in state.model.named_parameters()
        for key, value in state.optimizer.state[parameter].items()
    }
    networks = {file: getattr(state, n).state_dict() for n, file in WEIGHTS.items()}
    return {**networks, _OPTIMIZER: moments}


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that processes share out; all of them must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _distribute(tensor: Tensor, like: Tensor) -> Tensor:
    """The inverse: on the device of `like`, and shared out as it is."""
    tensor = tensor.to(like.device)
    if not hasattr(like, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, like.placements, src_data_rank=None)


def _copied(tensor: Tensor, keep: bool) -> Tensor | None:
    """A copy in main memory, if to be kept."""
    whole = full_tensor(tensor.detach())  # together, also by those who keep nothing
    return torch.empty(whole.shape, dtype=whole.dtype).copy_(whole) if keep else None


def snapshot(state: TrainState, keep: bool = True) -> Snapshot:
    """Copy everything: nothing that training does afterwards changes it.

    All processes call it together, and one has to `keep` the tensors.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    for file, named in _tensors_of(state).items():
        copies = ((name, _copied(tensor, keep)) for name, tensor in named.items())
        tensors[file] = {name: copy for name, copy in copies if copy is not None}
    meter, skipped = state.meter.sums.tolist(), list(state.skipped)
    return Snapshot(state.step, state.model.config, tensors, meter, skipped)


_CHECKPOINT_FILES = {
    *WEIGHTS.values(),
    *(f"{name}/config.json" for name in WEIGHTS),
    _OPTIMIZER,
}


def _write(taken: Snapshot, folder: Path) -> None:
    for draft in folder.parent.glob(".step_*.tmp"):  # of saves that were killed
        shutil.rmtree(draft, ignore_errors=True)
    with whole_folder(folder) as draft:
        for file, tensors in taken.tensors.items():
            (draft / file).parent.mkdir(exist_ok=True)
            write_tensors(draft / file, tensors)
        for name in WEIGHTS:
            write_json(draft / name / "config.json", asdict(taken.model))
        sums = {file: sha256(draft / file) for file in sorted(_CHECKPOINT_FILES)}
        record = {"step": taken.step, "meter": taken.meter, "skipped": taken.skipped}
        write_json(draft / "state.json", {**record, "sha256": sums})


def write_checkpoint(
    run: Path,
    taken: Snapshot,
    keep_last: int = 2,
    keep_every: int = 0,
    keep: Collection[int] = (),
) -> Path:
    """Write RUN/checkpoints/step_XXXXXXXX, remove old ones; returns the folder.

    Only one process may save in a run at a time: drafts that others left are removed.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    folder = _folder_of(run, taken.step)
    with explain(
        f"the checkpoint of step {taken.step} could not be written into {run}: make "
        "room or repair the folder, and give the same command again",
        OSError,
        SafetensorError,
        error=OSError,
    ):
        if folder.exists():  # it is damaged: a valid one would have been resumed from
            shutil.rmtree(folder)
        _write(taken, folder)
    _prune(run, folder, keep_last, keep_every, keep)
    return folder


def _folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint, by its folder's name."""
    return int(folder.name.removeprefix("step_"))


def checkpoints_of(run: Path) -> list[Path]:
    """Folders of a run's checkpoints, by step; a copy `step_00000005.bak` is none."""
    found = (run / "checkpoints").glob("step_*")
    return sorted(
        (f for f in found if re.fullmatch(r"step_\d{8,}", f.name)), key=step_of
    )


def _prune(
    run: Path, newest: Path, keep_last: int, keep_every: int, keep: Collection[int]
) -> None:
    """Remove the checkpoints beside `newest` that nothing tells to keep."""
    others = [other for other in checkpoints_of(run) if other != newest]
    for old in others[: max(len(others) + 1 - keep_last, 0)]:
        step = step_of(old)
        if step not in keep and (not keep_every or step % keep_every):
            try:
                shutil.rmtree(old)
            except OSError as error:
                warn(f"{old} could not be removed: {error}; the next save tries again")


def find_checkpoint(run: Path, step: int | None = None) -> Path | None:
    """The newest checkpoint of a run that is whole, or None before the first.

    With `step` it is the checkpoint of that step and no other.

    Raises:
        FileNotFoundError: there is none of that step.
        ValueError: it is damaged, or all are.
        OSError: it cannot be read now.
    """
    if step is not None:
        return _named(run, step)
    folders = checkpoints_of(run)[::-1]
    for folder in folders:
        if (fault := _fault(folder)) is None:
            return folder
        if checkpoints_of(run)[::-1] != folders:  # the run goes on: it saved another
            return find_checkpoint(run)
        print(f"{folder} is damaged ({fault}); trying the one before", file=sys.stderr)
    if folders:  # to begin again would bury them
        raise ValueError(
            f"none of the {len(folders)} checkpoints of {run} is whole: restore one "
            "from a copy, or move them away to begin again from the first step"
        )
    return None


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    name, wrong = "state.json", []
    try:
        record = json.loads((folder / name).read_text())
        sums = record["sha256"]
        if set(sums) != _CHECKPOINT_FILES or record["step"] != step_of(folder):
            return "state.json is not that of this checkpoint"
        if odd := _files_in(folder) ^ {*_CHECKPOINT_FILES, "state.json"}:
            return f"files missing or foreign: {', '.join(sorted(odd))}"
        for name in sorted(sums):
            if sha256(folder / name) != sums[name]:
                wrong.append(name)
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is missing"
    except OSError as error:
        told = "the disk may be away; the same command goes on when it is back"
        raise OSError(f"{folder / name} cannot be read: {error}; {told}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"state.json cannot be read: {str(error) or type(error).__name__}"
    return f"{', '.join(wrong)}: other content than state.json says" if wrong else None


def _files_in(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob("*") if not path.is_dir())
    return {path.relative_to(folder).as_posix() for path in paths}


def _named(run: Path, step: int) -> Path:
    steps = list(map(step_of, checkpoints_of(run)))
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none yet"
        raise FileNotFoundError(
            f"{run} has no checkpoint of step {step}; there are {there}"
        )
    folder = _folder_of(run, step)
    if fault := _fault(folder):
        if list(map(step_of, checkpoints_of(run))) != steps:
            return _named(run, step)
        raise ValueError(f"{folder} is damaged ({fault}); choose another step")
    return folder


def load_checkpoint(folder: Path, state: TrainState) -> None:
    """Fill `state`, made with the same recipe, from a checkpoint folder.

    Raises:
        ValueError: the files do not hold what such a state does.
    """
    wrong = (KeyError, TypeError, RuntimeError, ValueError)
    with explain(f"{folder} is no checkpoint of this run", *wrong):
        record = read_json(folder / "state.json")
        _refuse_another(folder, state.model)
        for name, file in WEIGHTS.items():
            _fill(getattr(state, name), read_tensors(folder / file), file)
        _fill_moments(state, read_tensors(folder / _OPTIMIZER))
        sums = torch.tensor(record["meter"], dtype=torch.float64)
        state.meter.sums.copy_(sums.view_as(state.meter.sums))
        state.step = int(record["step"])
        state.skipped = [int(step) for step in record.get("skipped", [])]


def _refuse_another(folder: Path, model: DiffuSSM) -> None:
    """ValueError if a checkpoint says that it is of another variant than the model."""
    ours = getattr(model.config, "variant", "")
    theirs = read_json(folder / "model" / "config.json").get("variant", ours)
    told = f"it is of the variant {theirs!r}, not of {ours or 'the plain DiffuSSM'!r}"
    refuse(theirs != ours, told)


def _fill(network: nn.Module, tensors: dict[str, Tensor], file: str) -> None:
    targets = network.state_dict()
    ours, theirs = ({k: v.shape for k, v in d.items()} for d in (targets, tensors))
    refuse(ours != theirs, f"{file} holds the weights of another model")
    for name, target in targets.items():
        target.copy_(_distribute(tensors[name], target))


def _fill_moments(state: TrainState, moments: dict[str, Tensor]) -> None:
    parameters = dict(state.model.named_parameters())
    for key, value in moments.items():
        name, _, slot = key.rpartition("/")
        parameter = parameters[name]
        # Adam's count of steps is where the parameter is, but never shared out
        alone = slot == "step"
        placed = value.to(parameter.device) if alone else _distribute(value, parameter)
        state.optimizer.state[parameter][slot] = placed


def whole_ema(state: TrainState) -> DiffuSSM:
    """The averaged model as a plain one; all processes call it together."""
    tensors = state.ema.state_dict()
    if not any(hasattr(tensor, "full_tensor") for tensor in tensors.values()):
        return state.ema
    with torch.device("meta"):
        ema = state.build()
    weights = {name: full_tensor(tensor) for name, tensor in tensors.items()}
    ema.load_state_dict(weights, assign=True)
    return ema.requires_grad_(False).eval()
