"""Training.

Generated from book/34_training.md by `make export`: edit there.
"""

import copy
import errno
import hashlib
import importlib
import json
import math
import os
import re
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffussm.data import (
    RANDOM,
    Dataset,
    Fetch,
    TensorData,
    batch_flips,
    batch_indices,
    digits,
    generator,
)
from diffussm.diffusion import GaussianDiffusion
from diffussm.files import apply_umask
from diffussm.guards import bounded, check_fields, nearest
from diffussm.model import PRESETS, DiffuSSM, DiffuSSMConfig

__all__ = [
    "Recipe",
    "Execution",
    "RENAMED",
    "flat",
    "from_flat",
    "RECIPES",
    "learning_rate_factor",
    "DYNAMICS",
    "parameter_groups",
    "describe_groups",
    "ema_decay_at",
    "update_ema",
    "Batch",
    "training_batch",
    "training_batches",
    "Meter",
    "T",
    "E",
    "World",
    "TrainState",
    "Snapshot",
    "WEIGHTS",
    "OPTIMIZER",
    "CHECKPOINT_FILES",
    "snapshot",
    "UNSUPPORTED",
    "THIS_PROCESS",
    "write_checkpoint",
    "find_checkpoint",
    "load_checkpoint",
    "open_run",
    "RunConfig",
    "read_run",
    "encoder_of",
    "load_run",
    "load_dataset",
    "check_data",
    "diffusion_of",
    "micro_batch_of",
    "Preempted",
    "train",
    "accumulate_gradients",
    "Clock",
    "whole_ema",
    "replay",
]


@dataclass(frozen=True)
class Recipe:
    """What a run learns; the defaults are the paper's, but for `ema_warmup`.

    `data` is ``"digits"``, the path of an image folder, or that of a latent store (chapter 10). `batch_size`
    counts the images of one optimiser step, over all processes. `lr` is constant between `warmup` steps at
    the start, over which it rises linearly, and `cooldown` steps at the end, over which it falls towards
    zero; `ssm_lr` caps it for the state space dynamics (chapter 9). `clip` bounds the norm of the gradient
    (0: not at all). `ema_warmup` lets the window of the average grow at the start (False: a constant decay,
    as the paper has it). `exif_rotate` turns photographs as their EXIF data ask (chapter 8). `precision` is
    ``"float32"`` or ``"bf16"`` (autocast). Raises ValueError for values that cannot work.
    """

    model: DiffuSSMConfig
    data: str = "digits"
    steps: int = bounded(400_000, least=1)
    batch_size: int = bounded(256, least=1)
    lr: float = bounded(1e-4, above=0, below=1, note="a learning rate such as 1.0e-4")
    ssm_lr: float = bounded(1e-3, above=0, below=1, note="a learning rate")
    weight_decay: float = bounded(0.0, least=0)
    warmup: int = bounded(0, least=0)
    cooldown: int = bounded(0, least=0)
    ema_decay: float = bounded(0.9999, least=0, below=1)
    ema_warmup: bool = True
    timesteps: int = bounded(1000, above=20, note="the last beta is 20 / timesteps")
    flip: bool = False
    exif_rotate: bool = False
    clip: float = bounded(0.0, least=0)
    precision: Literal["float32", "bf16"] = "float32"
    seed: int = bounded(0, least=0)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.warmup + self.cooldown > self.steps:
            raise ValueError(
                f"warmup={self.warmup} and cooldown={self.cooldown} must fit into "
                f"steps={self.steps} together"
            )


@dataclass(frozen=True)
class Execution:
    """How a run is carried out: nothing in it changes what is learnt, and all of it may change on resume.

    `log_every`, `save_every` and `sample_every` (0: never) count optimiser steps. `keep_last` checkpoints
    are kept, and besides each that `keep_every` divides (0: none) and all that `keep` names, by their step
    (``"1320313"``) or by the images seen until then (``"338M images"``), which are saved when they are
    reached. `skip_nonfinite` steps whose loss or gradient is not finite are left out before the run stops.
    `workers` threads decode images. `micro_batch` is how many images a process takes through the network at
    once (0: all of its share). `strategy` is ``"ddp"`` or ``"fsdp"``; `activation_checkpointing` keeps fewer
    activations and computes them again; `compile` uses torch.compile (chapter 11). `convolution` is
    ``"fft"`` or ``"package.module:function"``, which chooses another for this machine (chapter 16).
    """

    log_every: int = bounded(50, least=1)
    save_every: int = bounded(1000, least=1)
    sample_every: int = bounded(0, least=0)
    keep_last: int = bounded(2, least=1)
    keep_every: int = bounded(0, least=0)
    keep: tuple[str, ...] = ()
    skip_nonfinite: int = bounded(3, least=0)
    workers: int = bounded(4, least=1)
    micro_batch: int = bounded(0, least=0)
    strategy: Literal["ddp", "fsdp"] = "ddp"
    activation_checkpointing: bool = False
    compile: bool = False
    convolution: str = "fft"

    def __post_init__(self) -> None:
        # a YAML file may say `keep: 338M images` where a list of one would be meant
        if isinstance(self.keep, str | int | list):
            entries = (
                self.keep if isinstance(self.keep, list) else f"{self.keep}".split(",")
            )
            kept = tuple(str(entry).strip() for entry in entries)
            object.__setattr__(self, "keep", kept)
        check_fields(self)
        self.keep_steps(1)  # refuses what cannot be read

    def keep_steps(self, batch_size: int) -> frozenset[int]:
        """The steps that `keep` names; a number of images is that of the first step that reaches it."""
        return frozenset(_kept_step(entry, batch_size) for entry in self.keep)


def _kept_step(entry: str, batch_size: int) -> int:
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?) ?([kM]?)( images)?", entry)
    number = (
        Fraction(match[1].replace("_", "")) * {"": 1, "k": 10**3, "M": 10**6}[match[2]]
        if match
        else 0
    )
    step = math.ceil(number / batch_size) if match and match[3] else number
    if step < 1 or step != int(step):
        raise ValueError(
            f"keep={entry!r}: expected a step such as '1320313' or '400k', or a number of images such as "
            "'338M images'"
        )
    return int(step)


RENAMED = {"parallel": "strategy", "recompute": "activation_checkpointing"}


def flat(recipe: Recipe, execution: Execution) -> dict[str, Any]:
    """All options of a run as one mapping, as a YAML file or the command line has them."""
    return {**asdict(recipe), **asdict(execution)}


def from_flat(values: dict[str, Any]) -> tuple[Recipe, Execution]:
    """The inverse of `flat`; an option's old name is read with a warning that says the new one.

    Raises ValueError that names an unknown or missing key.
    """
    values = dict(values)
    for old, new in RENAMED.items():
        if old in values:
            _warn(f"the option {old} is called {new} now; write {new}")
            values.setdefault(new, values.pop(old))
    names = {field.name: part for part in (Recipe, Execution) for field in fields(part)}
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(
            f"unknown training option {unknown[0]!r}; {nearest(unknown[0], names)}"
        )
    if "model" not in values:
        raise ValueError("a training configuration needs a 'model' section")
    values["model"] = DiffuSSMConfig.from_dict(values["model"])
    recipe, execution = (
        {key: value for key, value in values.items() if names[key] is part}
        for part in (Recipe, Execution)
    )
    return Recipe(**recipe), Execution(**execution)


@cache  # each text once
def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


RECIPES = {
    "digits": Recipe(
        model=DiffuSSMConfig(**PRESETS["digits"]),
        data="digits",
        steps=1500,
        batch_size=32,
        lr=4e-3,
        warmup=100,
        cooldown=600,
        ema_decay=0.98,
    )
}


def learning_rate_factor(step: int, config: Recipe) -> float:
    """The share of `config.lr` at `step` (from 0), in (0, 1]: linear warm-up, constant, linear cool-down.

    The cool-down would be at zero only after the last step.
    """
    rising = (step + 1) / max(config.warmup, 1)
    falling = (config.steps - step) / max(config.cooldown, 1)
    return min(1.0, rising, falling)


DYNAMICS = ("log_dt", "log_A_real", "A_imag")


def parameter_groups(
    model: nn.Module, lr: float, ssm_lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Sort the parameters into optimiser groups; each is in exactly one (chapter 9).

    ``dynamics``: log_dt, log_A_real, A_imag of every S4D kernel, lr at most `ssm_lr`, never decayed.
    ``vectors``: biases, skips and the C of the kernels, label table; never decayed.
    ``matrices``: the weights of the linear maps, the only ones that weight decay touches.
    """

    def group_of(name: str) -> str:
        leaf = name.rsplit(".", 1)[-1]
        if leaf in DYNAMICS:
            return "dynamics"
        return "matrices" if leaf == "weight" and "embed_y" not in name else "vectors"

    groups: dict[str, dict[str, Any]] = {
        "dynamics": {"lr": min(lr, ssm_lr), "weight_decay": 0.0},
        "vectors": {"lr": lr, "weight_decay": 0.0},
        "matrices": {"lr": lr, "weight_decay": weight_decay},
    }
    for name, group in groups.items():
        group.update(name=name, params=[], param_names=[], base_lr=group["lr"])
    for name, parameter in model.named_parameters():
        groups[group_of(name)]["params"].append(parameter)
        groups[group_of(name)]["param_names"].append(name)
    return list(groups.values())


def describe_groups(groups: list[dict[str, Any]]) -> str:
    """One line per group: how many tensors and numbers it holds, its learning rate and weight decay."""
    lines = [f"{'group':<10}{'tensors':>9}{'parameters':>13}{'lr':>10}{'decay':>8}"]
    for group in groups:
        numbers = sum(parameter.numel() for parameter in group["params"])
        lines.append(
            f"{group['name']:<10}{len(group['params']):>9}{numbers:>13,}"
            f"{group['base_lr']:>10.1e}{group['weight_decay']:>8g}"
        )
    return "\n".join(lines)


def ema_decay_at(step: int, decay: float, warmup: bool = True) -> float:
    """The decay of the moving average at `step` (counted from 0), eq-training-ema-warmup of chapter 9.

    Without `warmup` it is constant, eq-training-ema.
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """In place: ema <- decay * ema + (1 - decay) * model, every parameter (chapter 9, eq-training-ema)."""
    pairs = zip(ema.parameters(), model.parameters(), strict=True)
    ours, theirs = zip(*((_local(a), _local(b)) for a, b in pairs), strict=True)
    torch._foreach_lerp_(ours, theirs, 1 - decay)


def _local(parameter: Tensor) -> Tensor:
    # a parameter that several processes share out (chapter 11) is averaged by each for its own part
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


class Batch(NamedTuple):
    """One training batch: x0 (B, C, H, W) in [-1, 1], t (B,), y (B,) or None, noise (B, C, H, W)."""

    x0: Tensor
    t: Tensor
    y: Tensor | None
    noise: Tensor

    def part(self, first: int, count: int, device: torch.device) -> "Batch":
        """`count` of its images from `first` on, on a device."""
        x0, t, noise = (
            whole[first : first + count].to(device)
            for whole in (self.x0, self.t, self.noise)
        )
        return Batch(
            x0,
            t,
            None if self.y is None else self.y[first : first + count].to(device),
            noise,
        )


def training_batch(
    dataset: Dataset,
    model: DiffuSSM,
    config: Recipe,
    step: int,
    rank: int = 0,
    size: int = 1,
    fetch: Fetch = map,
) -> Batch:
    """The part of process `rank` of `size` in the batch of `step`, a pure function (eq-training-stream).

    `fetch` may do the work of `map` in several threads.
    """
    position = (len(dataset), config.batch_size, step, config.seed)
    share = config.batch_size // size
    mine = slice(rank * share, (rank + 1) * share)
    # each draw is made for the whole batch, so that it does not matter who shares it
    draw = partial(generator, config.seed, number=step)
    t = torch.randint(
        config.timesteps, (config.batch_size,), generator=draw("timesteps")
    )
    shape = (
        config.batch_size,
        config.model.in_channels,
        config.model.height,
        config.model.width,
    )
    noise = torch.randn(shape, generator=draw("noise"))
    indices, flips = (
        batch_indices(*position)[mine],
        batch_flips(*position)[mine] & config.flip,
    )
    xi = None
    if dataset.levels is None:  # latents, which are drawn
        xi = torch.randn(shape, generator=draw("posterior"))[mine]
    x0, labels = dataset.batch(indices, flips, xi, fetch)
    if model.null_label is None:
        return Batch(x0, t[mine], None, noise[mine])
    everyone = torch.zeros(config.batch_size, dtype=torch.int64)
    everyone[mine] = labels
    y = model.drop_labels(everyone, draw("label dropout"))[mine]
    return Batch(x0, t[mine], y, noise[mine])


def training_batches(
    dataset: Dataset,
    model: DiffuSSM,
    config: Recipe,
    step: int,
    rank: int = 0,
    size: int = 1,
    workers: int = 4,
) -> Iterator[Batch]:
    """The batches from `step` to the end of the run, each made while the one before is being used.

    Data sets that read files (they have a method `read`) do so in `workers` threads.
    """
    threads = workers if hasattr(dataset, "read") else 1
    with (
        ThreadPoolExecutor(1, thread_name_prefix="batches") as pool,
        ThreadPoolExecutor(threads, thread_name_prefix="images") as readers,
    ):
        fetch = readers.map if threads > 1 else map
        ahead = pool.submit(
            training_batch, dataset, model, config, step, rank, size, fetch
        )
        for following in range(step + 1, config.steps + 1):
            batch = ahead.result()
            if following < config.steps:
                ahead = pool.submit(
                    training_batch, dataset, model, config, following, rank, size, fetch
                )
            yield batch


class Meter:
    """Running means of the loss terms, and of mse by quartile of t: a float64 (2, 8), sums over counts."""

    names = ("loss", "mse", "vb", "mse_q1", "mse_q2", "mse_q3", "mse_q4", "grad_norm")

    def __init__(self) -> None:
        self.sums = torch.zeros(2, len(self.names), dtype=torch.float64)

    @classmethod
    def tally(cls, losses: dict[str, Tensor], t: Tensor, timesteps: int) -> Tensor:
        """What images add: losses {"loss", "mse", "vb"}, (B,) each, t (B,) in [0, timesteps) -> (2, 8).

        It stays on the device of the losses: to copy it would make the host wait for each micro-batch.
        """
        sums = torch.zeros(2, len(cls.names), dtype=torch.float64, device=t.device)
        terms = torch.stack(
            [losses[name].detach().double() for name in cls.names[:3]]
        )  # (3, B)
        sums[0, :3], sums[1, :3] = terms.sum(1), len(t)
        inside = (
            4 * t // timesteps == torch.arange(4, device=t.device)[:, None]
        )  # (4, B): in which quartile
        sums[0, 3:7], sums[1, 3:7] = (
            torch.where(inside, terms[1], 0.0).sum(1),
            inside.sum(1),
        )
        return sums

    def add(self, tally: Tensor, grad_norm: float) -> None:
        """One step: the tally of all its images, and the norm of its gradient."""
        self.sums += tally
        self.sums[:, 7] += torch.tensor([grad_norm, 1.0], dtype=torch.float64)

    def read_and_reset(self) -> dict[str, float | None]:
        """The means since the last call; None for a quartile that no image fell in."""
        means = [
            total / count if count else None for total, count in self.sums.T.tolist()
        ]
        self.sums.zero_()
        return dict(zip(self.names, means, strict=True))


T = TypeVar("T")
E = TypeVar("E", bound=Exception)


class World:
    """The processes that share a run. This one is alone; `Cluster` of chapter 11 is one of many.

    All methods are called by all processes, in the same order.
    """

    rank = 0
    size = 1
    stopping = False  # set when somebody asked the run to save and stop

    def __init__(self, device: str | torch.device | None = None) -> None:
        self.device = torch.device(
            device or ("cuda" if torch.cuda.is_available() else "cpu")
        )

    def shard(self, module: nn.Module, recipe: Recipe, execution: Execution) -> None:
        """Share out the parameters of a module among the processes, in place."""

    def wrap(self, model: DiffuSSM, execution: Execution) -> nn.Module:
        """The module to call in training: the same parameters, gradients averaged over the processes."""
        return model

    def exchange(self, network: nn.Module, now: bool) -> AbstractContextManager[object]:
        """A context for forward and backward; gradients are averaged over the processes only `now`."""
        return nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a CPU tensor over the processes."""
        return values

    def barrier(self) -> None:
        """Wait until every process is here, be it for hours."""

    def deal(self, numbers: Sequence[int]) -> Iterator[int]:
        """Each number in one process, whichever asks next; ends when one of them is `stopping`."""
        for number in numbers:
            if self.stopping:
                return
            yield number

    def together(self, error: E) -> E:
        """Note that all processes raise here, so that they can part in good order; returns `error`."""
        return error

    def once(self, function: Callable[[], T]) -> T:
        """Call a function in one process; every process gets its result, or its exception."""
        return function()

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor that was shared out, put together again."""
        return tensor

    def place(self, tensor: Tensor, like: Tensor) -> Tensor:
        """The inverse of `whole`: on the device of `like`, and shared out as it is."""
        return tensor.to(like.device)

    def save(
        self, run: Path, snapshot: "Snapshot", recipe: Recipe, execution: Execution
    ) -> None:
        """Write a checkpoint, now or soon."""
        keep = execution.keep_steps(recipe.batch_size)
        write_checkpoint(run, snapshot, execution.keep_last, execution.keep_every, keep)

    def save_error(self) -> Exception | None:
        """Why the last checkpoint could not be written, if it could not and nobody was told yet."""
        return None

    def finish(self) -> None:
        """Wait until all that was saved is written; raises what went wrong."""

    def vitals(self, config: Recipe, images_per_second: float) -> dict[str, float]:
        """More figures for a line of the log."""
        return {}


@dataclass
class TrainState:
    """What a checkpoint holds: all of a run but data and configuration.

    `step` counts finished steps; `skipped` are those (from 1) that were not finite and changed nothing.
    """

    model: DiffuSSM
    ema: DiffuSSM
    optimizer: torch.optim.Optimizer
    meter: Meter
    step: int = 0
    skipped: list[int] = field(default_factory=list)

    @classmethod
    def create(cls, config: Recipe, execution: Execution, world: World) -> Self:
        """A fresh state; the initial weights depend on `config.seed` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator(config.seed, "weights", 0).get_state())
            model = DiffuSSM(config.model).to(world.device)
        model.activation_checkpointing = execution.activation_checkpointing
        _choose_convolution(model, config, execution, world)
        ema = copy.deepcopy(model).requires_grad_(False).eval()
        for module in (model, ema):
            world.shard(module, config, execution)
        groups = parameter_groups(model, config.lr, config.ssm_lr, config.weight_decay)
        fused = world.device.type in (
            "cpu",
            "cuda",
        )  # one walk through memory instead of one per operation
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=fused)
        return cls(model, ema, optimizer, Meter())


class Snapshot(NamedTuple):
    """A checkpoint in main memory; only the first process has the tensors."""

    step: int
    model: DiffuSSMConfig
    tensors: dict[str, dict[str, Tensor]]
    meter: list[list[float]]
    skipped: list[int]


WEIGHTS = {name: f"{name}/model.safetensors" for name in ("model", "ema")}
OPTIMIZER = "optimizer.safetensors"
CHECKPOINT_FILES = {
    *WEIGHTS.values(),
    "model/config.json",
    "ema/config.json",
    OPTIMIZER,
}


def snapshot(state: TrainState, world: World) -> Snapshot:
    """Copy everything that a checkpoint holds: nothing that training does afterwards changes it."""

    def copied(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        kept = {}
        for name, tensor in named:
            whole = world.whole(tensor.detach())  # every process takes part, one keeps
            if world.rank == 0:
                kept[name] = torch.empty(whole.shape, dtype=whole.dtype).copy_(whole)
        return kept

    moments = (
        (f"{name}/{key}", value)
        for name, parameter in state.model.named_parameters()
        for key, value in state.optimizer.state[parameter].items()
    )
    tensors = {
        file: copied(getattr(state, name).state_dict().items())
        for name, file in WEIGHTS.items()
    }
    tensors[OPTIMIZER] = copied(moments)
    return Snapshot(
        state.step,
        state.model.config,
        tensors,
        state.meter.sums.tolist(),
        list(state.skipped),
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    apply_umask(path)


# What systems answer that lack a call for a kind of file, or at all: network disks, FUSE, Windows.
UNSUPPORTED = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EBADF,
    errno.EACCES,
    errno.EPERM,
}


THIS_PROCESS = (
    uuid.uuid4().hex
)  # a number such as 7 may come again in the next container


def _flush(path: Path) -> None:
    folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not folder or error.errno not in UNSUPPORTED:
            raise
        _warn(
            f"this disk cannot flush a folder ({error.strerror}): after a loss of power the newest "
            "checkpoint may be missing, and the run would go on from the one before"
        )


def write_checkpoint(
    run: Path,
    taken: Snapshot,
    keep_last: int = 2,
    keep_every: int = 0,
    keep: Iterable[int] = (),
) -> Path:
    """Write RUN/checkpoints/step_XXXXXXXX, all of it or nothing, then remove those not to be kept; return it.

    Kept are the last `keep_last`, those that `keep_every` divides (0: none), and the steps in `keep`.
    Raises OSError, with what to do, when the disk is full or the folder read-only; older checkpoints are
    still there then.
    """
    folder = run / "checkpoints" / f"step_{taken.step:08d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        if temporary.exists():  # of a run that was killed here
            shutil.rmtree(temporary)
        for file, tensors in taken.tensors.items():
            path = temporary / file
            path.parent.mkdir(parents=True, exist_ok=True)
            _save_tensors(tensors, path)
            if path.name != OPTIMIZER:
                (path.parent / "config.json").write_text(
                    json.dumps(asdict(taken.model), indent=2) + "\n"
                )
            _flush(path)
            back = safetensors.torch.load_file(path)
            if back.keys() != tensors.keys() or not all(
                torch.equal(_bits(back[name]), _bits(value))
                for name, value in tensors.items()
            ):
                raise OSError(f"{path} reads back other than it was written")
        sums = {name: _sha256(temporary / name) for name in sorted(CHECKPOINT_FILES)}
        record = {
            "step": taken.step,
            "meter": taken.meter,
            "skipped": taken.skipped,
            "sha256": sums,
        }
        (temporary / "state.json").write_text(json.dumps(record, indent=2))
        for path in (*temporary.rglob("*.json"), *temporary.rglob("*"), temporary):
            _flush(path)
        if (
            folder.exists()
        ):  # only a broken one can be here: a valid one would have been resumed from
            shutil.rmtree(folder)
        temporary.replace(folder)
        _flush(folder.parent)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"the checkpoint of step {taken.step} could not be written into {run / 'checkpoints'}: {error}. "
            "The run stops here rather than train on without one; make room or repair the folder, and give "
            "the same command again to go on from the last checkpoint"
        ) from error
    others = sorted(other for other in folder.parent.glob("step_*") if other != folder)
    for old in others[: max(len(others) + 1 - keep_last, 0)]:
        step = _step_of(old)
        if step not in keep and (not keep_every or step % keep_every):
            shutil.rmtree(old)
    return folder


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)  # a NaN equals itself


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def find_checkpoint(run: Path, step: int | None = None) -> Path | None:
    """The newest checkpoint of a run whose files match their checksums, or None before the first one.

    With `step` it is the checkpoint of that step and no other: FileNotFoundError, naming those there are,
    if it is not kept. Raises ValueError when it is damaged, or when there are checkpoints and all are
    damaged: to begin again would bury them.
    """
    folders = sorted((run / "checkpoints").glob("step_*"), reverse=True)
    if step is not None:
        return _checkpoint_of(
            run, step, [_step_of(folder) for folder in reversed(folders)]
        )
    for folder in folders:
        if (fault := _fault(folder)) is None:
            return folder
        print(
            f"{folder} is damaged ({fault}); falling back to the one before",
            file=sys.stderr,
        )
    if folders:
        raise ValueError(
            f"none of the {len(folders)} checkpoints in {run / 'checkpoints'} is whole; restore one from a "
            "copy, or move that folder away to begin again from the first step"
        )
    return None


def _checkpoint_of(run: Path, step: int, present: list[int]) -> Path:
    if step not in present:
        raise FileNotFoundError(
            f"{run} has no checkpoint of step {step}; there are {', '.join(map(str, present)) or 'none yet'}"
        )
    folder = run / "checkpoints" / f"step_{step:08d}"
    if fault := _fault(folder):
        raise ValueError(f"{folder} is damaged ({fault}); choose another step")
    return folder


def _fault(folder: Path) -> str | None:
    try:
        record = json.loads((folder / "state.json").read_text())
        sums = record["sha256"]
        if set(sums) != CHECKPOINT_FILES or record["step"] != _step_of(folder):
            return "state.json is not that of this checkpoint"
        found = {
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if not path.is_dir()
        }
        if found != CHECKPOINT_FILES | {"state.json"}:
            return f"files missing or foreign: {', '.join(sorted(found ^ CHECKPOINT_FILES ^ {'state.json'}))}"
        wrong = [name for name in sorted(sums) if _sha256(folder / name) != sums[name]]
        return (
            f"{', '.join(wrong)}: other content than state.json says" if wrong else None
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"state.json cannot be read: {error or type(error).__name__}"


def load_checkpoint(folder: Path, state: TrainState, world: World) -> None:
    """Fill `state`, made by `TrainState.create` with the same configuration, from a checkpoint folder.

    Raises ValueError when the files do not hold what such a state does.
    """
    try:
        record = json.loads((folder / "state.json").read_text())
        for name, file in WEIGHTS.items():
            module: DiffuSSM = getattr(state, name)
            tensors = safetensors.torch.load_file(folder / file)
            targets = module.state_dict()
            if {k: v.shape for k, v in tensors.items()} != {
                k: v.shape for k, v in targets.items()
            }:
                raise ValueError(f"{file} holds the weights of another model")
            for key, target in targets.items():
                target.copy_(world.place(tensors[key], target))
        moments = safetensors.torch.load_file(folder / OPTIMIZER)
        parameters = dict(state.model.named_parameters())
        for key, value in moments.items():
            name, _, slot = key.rpartition("/")
            parameter = parameters[name]
            # the step is a single number: it is where the parameter is, but never shared out
            value = (
                value.to(parameter.device)
                if slot == "step"
                else world.place(value, parameter)
            )
            state.optimizer.state[parameter][slot] = value
        state.meter.sums = torch.tensor(record["meter"], dtype=torch.float64).view_as(
            state.meter.sums
        )
        state.step = int(record["step"])
        state.skipped = [int(step) for step in record.get("skipped", [])]
    except (
        safetensors.SafetensorError,
        KeyError,
        TypeError,
        RuntimeError,
        ValueError,
    ) as error:
        raise ValueError(f"{folder} is no checkpoint of this run: {error}") from error


def _chooser(convolution: str) -> Callable[..., Any] | None:
    """The function that this option names, or None for the FFT; ValueError if there is no such function."""
    if convolution == "fft":
        return None
    name, _, function = convolution.partition(":")
    try:
        choose: Callable[..., Any] = getattr(importlib.import_module(name), function)
        return choose
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"convolution={convolution!r} cannot be had ({error}); expected 'fft', or "
            "'package.module:function' such as 'diffussm.autotuning:autotune_convolution', which needs Triton"
        ) from error


def _choose_convolution(
    model: DiffuSSM, config: Recipe, execution: Execution, world: World
) -> None:
    """Ask the function that `execution.convolution` names for a convolution, and give it to every block."""
    choose = _chooser(execution.convolution)
    if choose is None:
        return
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    batch = micro_batch_of(config, execution, world.size)
    # one process measures and all do as it says: they must not choose differently
    choice = world.once(
        lambda: choose(
            config.model.seq_len, config.model.d_model, batch, world.device, dtype
        )
    )
    if world.rank == 0:
        print(f"convolution: {choice.reason}", file=sys.stderr)
    blocks: Any = model.blocks
    for block in blocks:
        block.ssm.convolution = choice.convolution


def open_run(
    run: Path,
    recipe: Recipe,
    execution: Execution,
    dataset: Dataset,
    other_data: bool = False,
) -> None:
    """Claim the folder `run` for a recipe and data, or check that it is this run already.

    Raises ValueError if it holds another run (naming the differing options), a run of other data, or files
    that are no run; a new folder is made only when nothing is to be refused. `execution` may differ, and so
    may `steps`: a run can be prolonged, unless its learning rate has been told to fall towards the end.
    `other_data` lets a run go on with other data, which its configuration then records.
    """
    _chooser(
        execution.convolution
    )  # a name that does not exist is refused before there is a folder
    facts = dataset.identity
    encoder = getattr(dataset, "vae", None)
    if not run.exists() or (run.is_dir() and not any(run.iterdir())):
        run.mkdir(parents=True, exist_ok=True)
        _write_config(run, RunConfig(recipe, execution, facts))
        if encoder is not None:
            _write_json(run / "vae.json", encoder)
        return
    if not (run / "config.json").is_file():
        raise ValueError(
            f"{run} is not empty and holds no training run; choose a new folder"
        )
    theirs = read_run(run)
    if differing := _differing(recipe, theirs.recipe):
        raise ValueError(
            f"{run} holds another run, which differs in {'; '.join(differing)}. "
            "Choose a new folder, or give the same options to resume it; nothing was written"
        )
    if encoder is not None:
        _compare_encoder(run, encoder)
    if theirs.random != RANDOM:
        _warn(
            f"{run} was begun by a version that drew its random numbers in another way: it goes on, but "
            "which digits are held out, order, flips, noise and dropped labels are not those of then"
        )
    _compare_data(run, facts, theirs, other_data)
    if theirs.data.get("fingerprint") is None and facts["fingerprint"] is not None:
        _warn(
            f"{run} holds no fingerprint of its data: only their number and their classes were compared"
        )


class RunConfig(NamedTuple):
    """What the ``config.json`` of a run's folder says: what it learns, how it was begun, and from which data."""

    recipe: Recipe
    execution: Execution
    data: dict[str, Any]
    random: int = RANDOM


def read_run(run: Path) -> RunConfig:
    """The configuration of the run in a folder, also in the flat form of earlier versions.

    An option that the file does not know is younger than the run, which did as the default does.
    Raises ValueError for a file that is damaged or of something else.
    """
    try:
        values = json.loads((run / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{run / 'config.json'} is damaged: {error}") from error
    if isinstance(values, dict) and isinstance(values.get("dataset"), dict):
        data, random = values.pop("dataset"), values.pop("random", 1)
        return RunConfig(*from_flat(values), data, random)
    try:
        recipe, execution, data = (
            values[key] for key in ("recipe", "execution", "data")
        )
        options = from_flat({**recipe, **execution})
        return RunConfig(*options, dict(data), values.get("random", 1))
    except (KeyError, TypeError):
        raise ValueError(
            f"{run / 'config.json'} is not the configuration of a training run"
        ) from None


def _write_config(run: Path, config: RunConfig) -> None:
    values = {
        "recipe": asdict(config.recipe),
        "execution": asdict(config.execution),
        "data": config.data,
        "random": config.random,
    }
    _write_json(run / "config.json", values)


def _differing(ours: Recipe, theirs: Recipe) -> list[str]:
    # where the data lie may change: what they are is compared apart
    free = {"data"} | ({"steps"} if ours.cooldown == 0 else set())
    asked, there = asdict(ours), asdict(theirs)
    return [
        f"{name} (there {there[name]!r}, asked {asked[name]!r})"
        for name in sorted(asked)
        if name not in free and asked[name] != there[name]
    ]


def _compare_data(
    run: Path, ours: dict[str, Any], theirs: RunConfig, other_data: bool
) -> None:
    known = theirs.data
    differing = [
        f"data.{name} (there {known.get(name)!r:.60}, now {value!r:.60})"
        for name, value in ours.items()
        # a fingerprint that is not known on both sides says nothing
        if known.get(name) != value
        and not (name == "fingerprint" and None in (known.get(name), value))
    ]
    if differing and not other_data:
        raise ValueError(
            f"{run} was trained on other data, which differ in {'; '.join(differing)}. Give the data that "
            "it was trained on (they may have moved), choose a new folder, or pass --other_data "
            "(other_data=True) to go on with these; nothing was written"
        )
    if differing:
        earlier = [*known.pop("earlier", []), known]
        _write_config(run, theirs._replace(data={**ours, "earlier": earlier}))


def _compare_encoder(run: Path, encoder: dict[str, Any]) -> None:
    """ValueError if a run has learned the latents of another encoder: no option makes the two one model."""
    known = encoder_of(run) or encoder
    for name in ("encoder_sha256", "scaling_factor"):
        if known.get(name) != encoder.get(name):
            raise ValueError(
                f"{run} has learned latents of the encoder of {known.get('name')}, and these are of that of "
                f"{encoder.get('name')} ({name} there {known.get(name)}, now {encoder.get(name)}); give its "
                "own latents, or choose a new folder. Nothing was written"
            )
    _write_json(run / "vae.json", known)


def encoder_of(run: Path, data: str | Path | None = None) -> dict[str, Any] | None:
    """Which autoencoder's encoder made the latents of a run (`vae_identity` of chapter 10); None if unknown.

    The run remembers it in ``vae.json``; without that, the latent store `data` is asked, if it is there.
    """
    if (run / "vae.json").is_file():
        return dict(json.loads((run / "vae.json").read_text()))
    if data and (manifest := Path(data) / "manifest.json").is_file():
        return dict(json.loads(manifest.read_text())["vae"])
    return None


def _write_json(path: Path, values: dict[str, Any]) -> None:
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(json.dumps(values, indent=2) + "\n")
    draft.replace(path)


@contextmanager
def _locked(run: Path, world: World) -> Iterator[None]:
    """Hold the run's folder; ValueError if another process does."""
    release: list[Callable[[], None]] = []
    world.once(lambda: release.append(_lock(run)))
    try:
        yield
    finally:
        for let_go in release:  # the first process has one, the others none
            let_go()


def _lock(run: Path) -> Callable[[], None]:
    """Take the run's lock and return what lets go of it; the system does so when the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return _lock_by_file(run, "this system has no flock")
    handle = (run / ".lock").open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle.close
    except BlockingIOError:
        handle.close()
        raise ValueError(
            f"{run} is being trained by another process; wait for it, or stop it (a killed torchrun "
            "leaves its children alive)"
        ) from None
    except OSError as error:  # Lustre that is mounted without flock, some network disks
        handle.close()
        if error.errno not in UNSUPPORTED | {errno.ENOLCK}:
            raise
        return _lock_by_file(run, f"this disk has no flock: {error.strerror}")


def _lock_by_file(run: Path, reason: str) -> Callable[[], None]:
    """The same with a file that only one process can create, which outlives a process that is killed."""
    path, host = run / ".lock.json", socket.gethostname()
    _warn(
        f"{reason}; {path.name} in the run's folder takes its place, which a killed process leaves behind"
    )
    for _ in range(2):
        try:
            with path.open("x") as file:
                json.dump(
                    {"host": host, "process": os.getpid(), "token": THIS_PROCESS}, file
                )
            return lambda: path.unlink(missing_ok=True)
        except FileExistsError:
            _remove_if_stale(path, host)
    raise ValueError(
        f"{run} is being trained by another process, which took {path} just now; wait for it"
    )


def _remove_if_stale(path: Path, host: str) -> None:
    try:
        holder = json.loads(path.read_text())
        owner, process, token = (
            str(holder["host"]),
            int(holder["process"]),
            holder["token"],
        )
    except FileNotFoundError:  # let go of in this moment
        return
    except (OSError, ValueError, KeyError, TypeError):
        owner, process, token = "unknown", 0, ""
    if owner == host and not _alive(
        process, token
    ):  # of another machine's processes we know nothing
        _warn(
            f"{path} was left by process {process} of this machine, which is no more; it is removed"
        )
        aside = path.with_name(
            f"{path.name}.{THIS_PROCESS}"
        )  # another process may judge the same at once
        with suppress(FileNotFoundError):
            path.rename(aside)
            if (
                json.loads(aside.read_text()).get("token") != token
            ):  # it is new already: not ours to remove
                with suppress(FileExistsError):
                    os.link(aside, path)
            aside.unlink()
        return
    raise ValueError(
        f"{path.parent} is held by process {process} of the machine {owner!r}, says {path}. If it still "
        "trains, wait for it or stop it; if it was killed, remove that file and give the command again"
    )


def _alive(process: int, token: str) -> bool:
    if process == os.getpid():
        return token == THIS_PROCESS
    if os.name != "posix":  # where the question would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def load_run(
    run: str | Path, weights: str = "ema", step: int | None = None
) -> tuple[DiffuSSM, Recipe, list[str]]:
    """The trained network of a run's newest valid checkpoint, its recipe and its class names.

    `weights` is ``"ema"`` (what one samples from) or ``"model"``; `step` asks for the checkpoint of that
    step. Raises FileNotFoundError when `run` is no run, or has no valid checkpoint yet or none of that step.
    """
    run = Path(run)
    if not (run / "config.json").is_file():
        raise FileNotFoundError(
            f"{run} is not a training run: it has no config.json, as `diffussm train` writes"
        )
    trained = read_run(run)
    checkpoint = find_checkpoint(run, step)
    if checkpoint is None:
        raise FileNotFoundError(
            f"{run} has no valid checkpoint yet; train longer, or lower save_every"
        )
    model = DiffuSSM.from_pretrained(checkpoint / weights)
    return model, trained.recipe, trained.data.get("classes", [])


def load_dataset(config: Recipe) -> Dataset:
    """The digits; other data are opened by `diffussm.cli.open_data` and handed over."""
    if config.data != "digits":
        raise ValueError(
            f"data={config.data!r}: only the digits come by their name; open other "
            "images and pass them as dataset=, for example ImageFolder(path, size)"
        )
    images, labels = digits("train")
    conditional = config.model.num_classes > 0
    return TensorData(
        images, labels if conditional else None, flip=config.flip, levels=17
    )


def check_data(dataset: Dataset, config: Recipe) -> None:
    """Raises ValueError if the images of a data set do not fit the model, or its labels, or the batch."""
    shape = (config.model.in_channels, config.model.height, config.model.width)
    image, _ = dataset[0]
    if tuple(image.shape) != shape:
        raise ValueError(
            f"the images of {config.data!r} are {tuple(image.shape)}, the model takes {shape}; "
            "set model.input_size and model.in_channels"
        )
    if config.model.num_classes != dataset.num_classes:
        raise ValueError(
            f"{config.data!r} has {dataset.num_classes} classes, the model {config.model.num_classes}; "
            f"set model.num_classes={dataset.num_classes}, or 0 to train without labels"
        )
    if config.batch_size > len(dataset):
        raise ValueError(
            f"batch_size={config.batch_size}, but {config.data!r} has only {len(dataset)} images; "
            f"set batch_size={len(dataset)} or less"
        )
    if config.exif_rotate and not hasattr(dataset, "read"):
        raise ValueError(
            f"exif_rotate applies to files of photographs, and {config.data!r} holds none; omit it (for "
            "latents it is an option of diffussm encode)"
        )


def diffusion_of(config: Recipe) -> GaussianDiffusion:
    """The noise schedule of a run: linear (paper, section 4.1); digits have 17 grey levels, others 256."""
    return GaussianDiffusion.linear(
        config.timesteps, levels=17 if config.data == "digits" else 256
    )


def micro_batch_of(config: Recipe, execution: Execution, size: int) -> int:
    """How many images each of `size` processes takes at once; ValueError if the batch does not split."""
    share, left = divmod(config.batch_size, size)
    if left or not share:
        raise ValueError(
            f"batch_size={config.batch_size} cannot be shared by {size} processes; take a multiple of {size}"
        )
    micro = execution.micro_batch or share
    if share % micro:
        raise ValueError(
            f"micro_batch={micro} does not divide the {share} images that each of {size} processes has of "
            f"batch_size={config.batch_size}; choose a divisor of {share}"
        )
    return micro


class Preempted(Exception):
    """The run was asked to stop and a checkpoint of its last step is written; the message names the step."""


def train(
    config: Recipe,
    run: str | Path,
    execution: Execution = Execution(),
    device: str | torch.device | None = None,
    progress: bool = True,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    on_samples: Callable[[DiffuSSM, int], None] | None = None,
    world: World | None = None,
    dataset: Dataset | None = None,
    other_data: bool = False,
) -> TrainState:
    """Train, or resume, the run in folder `run` until `config.steps` optimiser steps are done (chapter 9).

    Writes ``config.json``, ``log.jsonl`` (a line each `log_every` steps) and ``checkpoints/`` (each
    `save_every` steps and at the end). A killed run that is started again gives the same weights, moving
    average and log, bit for bit on a CPU. `on_log` gets each line of the log; `on_samples` the averaged
    model and the step, each `sample_every` steps; both in the first process only. `world` shares the run
    with others (chapter 11); `dataset` replaces what `load_dataset` finds; `other_data` lets a run go on
    with data that it was not trained on.

    Raises ValueError for a folder or data that do not fit, FloatingPointError when loss or gradient were
    not finite at more than `execution.skip_nonfinite` steps (what led to the first is in RUN/dump_XXXXXXXX),
    OSError when a checkpoint cannot be written, Preempted when the world was told to stop.
    """
    run = Path(run)
    world = world or World(device)
    micro_batch_of(config, execution, world.size)
    data = load_dataset(config) if dataset is None else dataset
    check_data(data, config)
    world.once(lambda: open_run(run, config, execution, data, other_data))
    with _locked(run, world):
        checkpoint = world.once(lambda: find_checkpoint(run))
        state = TrainState.create(config, execution, world)
        if checkpoint is not None:
            load_checkpoint(checkpoint, state, world)
        keep = execution.keep_steps(config.batch_size)
        world.once(lambda: _tell_missed(run, state.step, keep))
        world.once(lambda: _rewind_log(run / "log.jsonl", state.step))
        progress = progress and world.rank == 0
        if progress:
            print(describe_groups(state.optimizer.param_groups))
        _loop(config, execution, run, state, data, world, progress, on_log, on_samples)
    return state


def _tell_missed(run: Path, step: int, keep: frozenset[int]) -> None:
    kept = {_step_of(folder) for folder in (run / "checkpoints").glob("step_*")}
    if missed := sorted(wanted for wanted in keep - kept if wanted <= step):
        _warn(
            f"the run is at step {step}, too late to keep what keep names: {', '.join(map(str, missed))}"
        )


def _loop(
    config: Recipe,
    execution: Execution,
    run: Path,
    state: TrainState,
    data: Dataset,
    world: World,
    progress: bool,
    on_log: Callable[[dict[str, Any]], None] | None,
    on_samples: Callable[[DiffuSSM, int], None] | None,
) -> None:
    diffusion = diffusion_of(config)
    network = world.wrap(state.model, execution)
    clock = Clock(state.step, config)
    in_file = (
        on_log is not None and not sys.stderr.isatty()
    )  # there, the lines of the log are enough
    silent = not progress or in_file
    bar = tqdm(
        total=config.steps,
        initial=state.step,
        unit="step",
        disable=silent,
        dynamic_ncols=True,
    )
    for batch in training_batches(
        data, state.model, config, state.step, world.rank, world.size, execution.workers
    ):
        tally = accumulate_gradients(
            network, diffusion, batch, config, execution, world
        )
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        norm = world.whole(nn.utils.get_total_norm(gradients))
        told = _all_reduce(tally, norm, world)
        if told.unsaved:
            lost = OSError(
                "another process could not write a checkpoint; see its message"
            )
            raise world.together(world.save_error() or lost)
        if told.broken:
            _skip(run, state, data, config, execution, world, told.grad_norm)
        else:
            _update(state, gradients, told.grad_norm, config)
            state.meter.add(told.tally, told.grad_norm)
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1

        bar.update()
        if state.step % execution.log_every == 0:
            row = _log_row(state, clock, config, world)
            if world.rank == 0:
                with (run / "log.jsonl").open("a") as log:
                    log.write(json.dumps(row) + "\n")
                if on_log is not None:
                    on_log(row)
            bar.set_postfix(
                loss="none" if row["loss"] is None else f"{row['loss']:.4f}"
            )
        with clock.paused():
            if told.stopping or _saves_at(state.step, config, execution):
                world.save(run, snapshot(state, world), config, execution)
            if (
                execution.sample_every
                and state.step % execution.sample_every == 0
                and on_samples is not None
            ):
                world.once(partial(on_samples, whole_ema(state, world), state.step))
        if told.stopping and state.step < config.steps:
            world.finish()
            saved = f"asked to stop: saved step {state.step} of {config.steps}"
            raise world.together(
                Preempted(f"{saved}; the same command goes on from there")
            )
    world.finish()
    bar.close()


def accumulate_gradients(
    network: nn.Module,
    diffusion: GaussianDiffusion,
    batch: Batch,
    config: Recipe,
    execution: Execution,
    world: World,
) -> Tensor:
    """Forward and backward pass of a process's share, one micro-batch after another; returns its tally."""
    micro = micro_batch_of(config, execution, world.size)
    parts = len(batch.t) // micro
    tally = torch.zeros(2, len(Meter.names), dtype=torch.float64, device=world.device)
    for part in range(parts):
        x0, t, y, noise = batch.part(part * micro, micro, world.device)
        with world.exchange(network, now=part == parts - 1):
            with torch.autocast(
                world.device.type, torch.bfloat16, enabled=config.precision == "bf16"
            ):
                losses = diffusion.losses(network, x0, t, y, noise)
            # gradients are averaged over processes, so each scales its sum by their number
            (losses["loss"].sum() * (world.size / config.batch_size)).backward()
        tally += Meter.tally(losses, t, config.timesteps)
    return tally


class _Told(NamedTuple):
    """What all processes know after a step: the tally of the whole batch, and whether anyone has to stop."""

    tally: Tensor
    grad_norm: float
    broken: bool
    stopping: bool
    unsaved: bool


def _all_reduce(tally: Tensor, norm: Tensor, world: World) -> _Told:
    """The one all-reduce of a step beside that of the gradients, so that all processes decide alike."""
    ours = torch.cat(
        [tally.flatten(), norm.double().reshape(1)]
    ).cpu()  # the only copy off the device
    reasons = [
        not ours.isfinite().all(),
        world.stopping,
        world.save_error() is not None,
    ]
    sums = world.sum(torch.cat([ours[:-1], torch.tensor(reasons, dtype=torch.float64)]))
    broken, stopping, unsaved = (bool(reason) for reason in sums[-3:])
    return _Told(sums[:-3].view_as(tally), ours[-1].item(), broken, stopping, unsaved)


def _update(
    state: TrainState, gradients: list[Tensor], grad_norm: float, config: Recipe
) -> None:
    """One step of the optimiser and of the average."""
    if config.clip and grad_norm > config.clip:
        torch._foreach_mul_(gradients, config.clip / grad_norm)
    for group in state.optimizer.param_groups:
        group["lr"] = group["base_lr"] * learning_rate_factor(state.step, config)
    state.optimizer.step()
    update_ema(
        state.ema,
        state.model,
        ema_decay_at(state.step, config.ema_decay, config.ema_warmup),
    )


def _saves_at(step: int, config: Recipe, execution: Execution) -> bool:
    return (
        step % execution.save_every == 0
        or step == config.steps
        or step in execution.keep_steps(config.batch_size)
    )


def _log_row(
    state: TrainState, clock: "Clock", config: Recipe, world: World
) -> dict[str, Any]:
    row: dict[str, Any] = {"step": state.step, "images": state.step * config.batch_size}
    row |= state.meter.read_and_reset() | clock.read(state.step)
    row |= world.vitals(config, row["images_per_second"])
    return row | ({"skipped": list(state.skipped)} if state.skipped else {})


class Clock:
    """Times for the log; they are the only figures in it that a resumed run does not repeat."""

    def __init__(self, step: int, config: Recipe) -> None:
        self.config = config
        self.started = self.last = time.perf_counter()
        self.step = step

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what is not training, such as drawing samples: it does not count for the rate."""
        began = time.perf_counter()
        yield
        self.last += time.perf_counter() - began

    def read(self, step: int) -> dict[str, float]:
        """Seconds since the start, images per second since the last call, seconds left at that rate."""
        now = time.perf_counter()
        rate = (step - self.step) / max(now - self.last, 1e-9)
        self.last, self.step = now, step
        return {
            "seconds": round(now - self.started, 3),
            "images_per_second": round(rate * self.config.batch_size, 2),
            "seconds_left": round((self.config.steps - step) / rate, 1),
        }


def whole_ema(state: TrainState, world: World) -> DiffuSSM:
    """The averaged model as a plain one that each process can call by itself."""
    if world.size == 1:
        return state.ema
    with torch.device("meta"):
        ema = DiffuSSM(state.model.config)
    weights = {
        name: world.whole(tensor) for name, tensor in state.ema.state_dict().items()
    }
    ema.load_state_dict(weights, assign=True)
    return ema.requires_grad_(False).eval()


def _rewind_log(path: Path, step: int) -> None:
    """Drop the lines that a killed run wrote after its last checkpoint: the resumed run writes them again."""
    if path.exists():
        lines = [
            line
            for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]
        draft = path.with_name(f".{path.name}.tmp")
        draft.write_text(
            "".join(line for line in lines if json.loads(line)["step"] <= step)
        )
        draft.replace(path)


def _skip(
    run: Path,
    state: TrainState,
    data: Dataset,
    config: Recipe,
    execution: Execution,
    world: World,
    grad_norm: float,
) -> None:
    """Count a step that is left out; FloatingPointError, alike in all processes, if it is one too many."""
    if not state.skipped:
        _dump(run, state, data, config, execution, world, grad_norm)
    state.skipped.append(state.step + 1)
    left = execution.skip_nonfinite - len(state.skipped)
    first = run / f"dump_{state.skipped[0]:08d}"
    what = f"loss or gradient is not finite at step {state.step + 1} (gradient norm {grad_norm})"
    if left < 0:
        world.finish()
        before = ", ".join(map(str, state.skipped[:-1])) or "none"
        error = FloatingPointError(
            f"{what}; the weights were not touched. skip_nonfinite={execution.skip_nonfinite} such steps may "
            f"be left out; left out before: {before}. What led to the first was written to {first}: look at "
            "it with diffussm.training.replay. Its checkpoints stay. Start a new run with a lower lr "
            f"(now {config.lr:g}), a longer warmup (now {config.warmup}) or a clip (now {config.clip:g}); or "
            "go on with a higher skip_nonfinite, if this was an accident"
        )
        raise world.together(error)
    if world.rank == 0:
        tqdm.write(
            f"{what}; left out, as {left} more may be. See {first}", file=sys.stderr
        )


def _dump(
    run: Path,
    state: TrainState,
    data: Dataset,
    config: Recipe,
    execution: Execution,
    world: World,
    grad_norm: float,
) -> None:
    """Write what leads to this step, for `replay`: the weights as they are, and the batch."""
    taken = snapshot(state, world)
    folder = run / f"dump_{state.step + 1:08d}"

    def write() -> None:
        (folder / "model").mkdir(parents=True, exist_ok=True)
        (folder / "model" / "config.json").write_text(
            json.dumps(asdict(taken.model), indent=2) + "\n"
        )
        _save_tensors(
            taken.tensors[WEIGHTS["model"]], folder / "model" / "model.safetensors"
        )
        batch = training_batch(data, state.model, config, state.step)
        kept = {
            name: value for name, value in batch._asdict().items() if value is not None
        }
        _save_tensors(kept, folder / "batch.safetensors")
        facts = {
            "step": state.step,
            "grad_norm": str(grad_norm),
            "config": flat(config, execution),
        }
        (folder / "dump.json").write_text(json.dumps(facts, indent=2) + "\n")

    world.finish()
    world.once(write)


def replay(folder: str | Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Compute again the losses of a dump, image by image, in float32.

    Returns {"loss", "mse", "vb", "t"}, (B,) each, in the order of the batch.
    """
    folder = Path(folder)
    config, _ = from_flat(json.loads((folder / "dump.json").read_text())["config"])
    model = DiffuSSM.from_pretrained(folder / "model", device)
    batch = {
        name: value.to(device)
        for name, value in safetensors.torch.load_file(
            folder / "batch.safetensors"
        ).items()
    }
    rows: dict[str, list[Tensor]] = {"loss": [], "mse": [], "vb": []}
    with torch.no_grad():
        for i in range(len(batch["t"])):
            x0, t, noise = (batch[name][i : i + 1] for name in ("x0", "t", "noise"))
            y = batch["y"][i : i + 1] if "y" in batch else None
            for name, value in (
                diffusion_of(config).losses(model, x0, t, y, noise).items()
            ):
                rows[name].append(value)
    return {name: torch.cat(values) for name, values in rows.items()} | {
        "t": batch["t"]
    }
