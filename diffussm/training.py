"""Training.

Generated from book/09_training.md by `make export`: edit there.
"""

import copy
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffussm.data import Dataset, ImageFolder, TensorData, batch_flips, batch_indices, digits, load_batch
from diffussm.diffusion import GaussianDiffusion
from diffussm.model import PRESETS, DiffuSSM, DiffuSSMConfig

__all__ = [
    "TrainConfig",
    "RECIPES",
    "learning_rate_factor",
    "DYNAMICS",
    "parameter_groups",
    "describe_groups",
    "ema_decay_at",
    "update_ema",
    "Batch",
    "stream",
    "training_batch",
    "Meter",
    "TrainState",
    "save_checkpoint",
    "find_checkpoint",
    "load_checkpoint",
    "open_run",
    "load_run",
    "load_dataset",
    "diffusion_of",
    "train",
]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run; the defaults are the paper's recipe (appendix).

    `data` is ``"digits"`` or the path of an image folder. `lr` is constant between `warmup` steps at the
    start and `cooldown` steps at the end, during which it rises from and falls to zero linearly; `ssm_lr`
    caps it for the state space dynamics (chapter 9). `precision` is ``"float32"`` or ``"bf16"`` (autocast).
    `save_every` and `log_every` count optimiser steps. Raises ValueError for values that cannot work.
    """

    model: DiffuSSMConfig
    data: str = "digits"
    steps: int = 400_000
    batch_size: int = 256
    lr: float = 1e-4
    ssm_lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 0
    cooldown: int = 0
    ema_decay: float = 0.9999
    timesteps: int = 1000
    flip: bool = False
    precision: str = "float32"
    seed: int = 0
    log_every: int = 50
    save_every: int = 1000

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "timesteps", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("lr", "ssm_lr"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)}: a learning rate is between 0 and 1, e.g. 1.0e-4"
                )
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay}: must not be negative")
        if min(self.warmup, self.cooldown) < 0 or self.warmup + self.cooldown > self.steps:
            raise ValueError(
                f"warmup={self.warmup} and cooldown={self.cooldown} must fit into steps={self.steps} together"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}: must be in [0, 1), e.g. 0.9999")
        if self.precision not in ("float32", "bf16"):
            raise ValueError(f"precision={self.precision!r}: choose 'float32' or 'bf16'")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`; raises ValueError that names an unknown or missing key."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"unknown training option {', '.join(unknown)}; the options are {', '.join(sorted(known))}"
            )
        if "model" not in values:
            raise ValueError("a training configuration needs a 'model' section")
        return cls(**{**values, "model": DiffuSSMConfig.from_dict(values["model"])})


RECIPES = {
    "digits": TrainConfig(
        model=DiffuSSMConfig(**PRESETS["digits"]),
        data="digits",
        steps=1500,
        batch_size=32,
        lr=4e-3,
        warmup=100,
        cooldown=600,
        ema_decay=0.98,
        save_every=500,
    ),
}


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """The share of `config.lr` at `step` (from 0): linear warm-up, constant, linear cool-down; never zero."""
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


def ema_decay_at(step: int, decay: float) -> float:
    """The decay of the moving average at `step` (counted from 0), eq-training-ema-warmup of chapter 9."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """In place: ema <- decay * ema + (1 - decay) * model, every parameter (chapter 9, eq-training-ema)."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


class Batch(NamedTuple):
    """One training batch: x0 (B, C, H, W) in [-1, 1], t (B,), y (B,) or None, noise (B, C, H, W)."""

    x0: Tensor
    t: Tensor
    y: Tensor | None
    noise: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        y = None if self.y is None else self.y.to(device)
        return Batch(self.x0.to(device), self.t.to(device), y, self.noise.to(device))


def stream(seed: int, step: int) -> torch.Generator:
    """A CPU generator that depends on its arguments alone: nothing has to be saved to resume (chapter 9)."""
    digest = hashlib.sha256(f"{seed}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def training_batch(dataset: Dataset, model: DiffuSSM, config: TrainConfig, step: int) -> Batch:
    """The batch of `step` (from 0): a pure function of (config.seed, step), chapter 9, eq-training-stream."""
    position = (len(dataset), config.batch_size, step, config.seed)
    x0, labels = load_batch(dataset, batch_indices(*position), batch_flips(*position))
    generator = stream(config.seed, step)
    t = torch.randint(config.timesteps, (len(x0),), generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    y = None if model.null_label is None else model.drop_labels(labels, generator)
    return Batch(x0, t, y, noise)


class Meter:
    """Running means of the loss terms, and of mse by quartile of t: one float64 tensor, for checkpoints."""

    names = ("loss", "mse", "vb", "mse_q1", "mse_q2", "mse_q3", "mse_q4", "grad_norm")

    def __init__(self) -> None:
        self.sums = torch.zeros(2, len(self.names), dtype=torch.float64)

    def add(self, losses: dict[str, Tensor], t: Tensor, timesteps: int, grad_norm: Tensor) -> None:
        """losses: {"loss", "mse", "vb"}, (B,) each; t (B,) in [0, timesteps); grad_norm: scalar."""
        quartile = 4 * t.cpu() // timesteps  # (B,) 0 to 3
        mse = losses["mse"].detach().double().cpu()
        for column, name in enumerate(("loss", "mse", "vb")):
            self.sums[0, column] += losses[name].detach().double().sum().cpu()
            self.sums[1, column] += len(t)
        self.sums[0, 3:7].index_add_(0, quartile, mse)
        self.sums[1, 3:7].index_add_(0, quartile, torch.ones_like(mse))
        self.sums[:, 7] += torch.tensor([grad_norm.item(), 1.0], dtype=torch.float64)

    def read_and_reset(self) -> dict[str, float | None]:
        """The means since the last call; None for a quartile that no image fell in."""
        means = [total / count if count else None for total, count in self.sums.T.tolist()]
        self.sums.zero_()
        return dict(zip(self.names, means, strict=True))


@dataclass
class TrainState:
    """What a checkpoint holds: all of a run but data and configuration. `step` counts finished steps."""

    model: DiffuSSM
    ema: DiffuSSM
    optimizer: torch.optim.Optimizer
    meter: Meter
    step: int = 0

    @classmethod
    def create(cls, config: TrainConfig, device: torch.device) -> Self:
        """A fresh state; the initial weights depend on `config.seed` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = DiffuSSM(config.model).to(device)
        groups = parameter_groups(model, config.lr, config.ssm_lr, config.weight_decay)
        ema = copy.deepcopy(model).requires_grad_(False).eval()
        return cls(model, ema, torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8), Meter())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_checkpoint(run: Path, state: TrainState, keep: int = 2) -> Path:
    """Write RUN/checkpoints/step_XXXXXXXX atomically, then remove all but the newest `keep`; return it."""
    folder = run / "checkpoints" / f"step_{state.step:08d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    state.model.save_pretrained(temporary / "model")
    state.ema.save_pretrained(temporary / "ema")
    optimizer = {
        f"{name}/{key}": value.contiguous()
        for name, parameter in state.model.named_parameters()
        for key, value in state.optimizer.state[parameter].items()
    }
    safetensors.torch.save_file(optimizer, temporary / "optimizer.safetensors")
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    record = {
        "step": state.step,
        "meter": state.meter.sums.tolist(),
        "sha256": {path.relative_to(temporary).as_posix(): _sha256(path) for path in files},
    }
    (temporary / "state.json").write_text(json.dumps(record, indent=2))
    for path in [*files, temporary / "state.json"]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if folder.exists():  # only a broken one can be here: a valid one would have been resumed from
        shutil.rmtree(folder)
    temporary.replace(folder)
    for old in sorted(folder.parent.glob("step_*"))[:-keep]:
        shutil.rmtree(old)
    return folder


def find_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run whose files match their checksums, or None when there is none."""
    for folder in sorted((run / "checkpoints").glob("step_*"), reverse=True):
        try:
            record = json.loads((folder / "state.json").read_text())
            if all(_sha256(folder / name) == digest for name, digest in record["sha256"].items()):
                return folder
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        print(f"{folder} is damaged (its files do not match state.json); falling back to the one before")
    return None


def load_checkpoint(folder: Path, state: TrainState) -> None:
    """Fill `state`, made by `TrainState.create` with the same configuration, from a checkpoint folder."""
    for name, module in (("model", state.model), ("ema", state.ema)):
        module.load_state_dict(safetensors.torch.load_file(folder / name / "model.safetensors"))
    optimizer = safetensors.torch.load_file(folder / "optimizer.safetensors")
    parameters = dict(state.model.named_parameters())
    for key, value in optimizer.items():
        name, _, slot = key.rpartition("/")
        parameter = parameters[name]
        state.optimizer.state[parameter][slot] = value if slot == "step" else value.to(parameter.device)
    record = json.loads((folder / "state.json").read_text())
    state.meter.sums = torch.tensor(record["meter"], dtype=torch.float64)
    state.step = record["step"]


def open_run(run: Path, config: TrainConfig, classes: Sequence[str]) -> None:
    """Claim the folder `run` for `config`, or check that it is this run already.

    Raises ValueError if it holds another run (naming the differing options) or files that are no run.
    `log_every`, `save_every` and `steps` may differ: a run can be prolonged, unless its learning rate has
    been told to fall towards the end.
    """
    ours = json.loads(json.dumps({**asdict(config), "classes": classes}))
    if not run.exists() or (run.is_dir() and not any(run.iterdir())):
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.json").write_text(json.dumps(ours, indent=2) + "\n")
        return
    config_file = run / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{run} is not empty and holds no training run; choose a new folder")
    theirs = json.loads(config_file.read_text())
    free = {"log_every", "save_every"} | ({"steps"} if config.cooldown == 0 else set())
    differing = [
        f"{name} (there {theirs.get(name)!r}, asked {ours.get(name)!r})"
        for name in sorted(set(ours) | set(theirs))
        if name not in free and ours.get(name) != theirs.get(name)
    ]
    if differing:
        raise ValueError(
            f"{run} holds another run, which differs in {'; '.join(differing)}. "
            "Choose a new folder, or give the same options to resume it; nothing was written"
        )


def load_run(run: str | Path, weights: str = "ema") -> tuple[DiffuSSM, TrainConfig, list[str]]:
    """The trained network of a run's newest valid checkpoint, its configuration and its class names.

    `weights` is ``"ema"`` (what one samples from) or ``"model"``. Raises FileNotFoundError when `run` is no
    run or has no valid checkpoint yet.
    """
    run = Path(run)
    if not (run / "config.json").is_file():
        raise FileNotFoundError(
            f"{run} is not a training run: it has no config.json, as `diffussm train` writes"
        )
    values = json.loads((run / "config.json").read_text())
    classes = values.pop("classes", [])
    checkpoint = find_checkpoint(run)
    if checkpoint is None:
        raise FileNotFoundError(f"{run} has no valid checkpoint yet; train longer, or lower save_every")
    return DiffuSSM.from_pretrained(checkpoint / weights), TrainConfig.from_dict(values), classes


def load_dataset(config: TrainConfig) -> Dataset:
    """The training images that `config.data` names; ValueError if they do not fit the model."""
    shape = (config.model.in_channels, config.model.height, config.model.width)
    conditional = config.model.num_classes > 0
    if config.data == "digits":
        images, labels = digits("train")
        dataset: Dataset = TensorData(images, labels if conditional else None, flip=config.flip)
    else:
        dataset = ImageFolder(config.data, config.model.height, flip=config.flip, conditional=conditional)
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
    return dataset


def diffusion_of(config: TrainConfig) -> GaussianDiffusion:
    """The noise schedule of a run: linear (paper, section 4.1); digits have 17 grey levels, others 256."""
    return GaussianDiffusion.linear(config.timesteps, levels=17 if config.data == "digits" else 256)


def train(
    config: TrainConfig,
    run: str | Path,
    device: str | torch.device | None = None,
    progress: bool = True,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> TrainState:
    """Train, or resume, the run in folder `run` until `config.steps` optimiser steps are done (chapter 9).

    Writes ``config.json``, ``log.jsonl`` (a line each `log_every` steps) and ``checkpoints/`` (each
    `save_every` steps and at the end). A killed run that is started again gives the same weights, moving
    average and log, bit for bit on a CPU. Raises ValueError for a folder or data that do not fit,
    FloatingPointError when the gradient stops being finite.
    """
    run = Path(run)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dataset = load_dataset(config)
    diffusion = diffusion_of(config)
    open_run(run, config, dataset.classes)
    state = TrainState.create(config, device)
    if checkpoint := find_checkpoint(run):
        load_checkpoint(checkpoint, state)
    _rewind_log(run / "log.jsonl", state.step)
    if progress:
        print(describe_groups(state.optimizer.param_groups))

    started = time.perf_counter()
    bar = tqdm(total=config.steps, initial=state.step, unit="step", disable=not progress, dynamic_ncols=True)
    while state.step < config.steps:
        batch = training_batch(dataset, state.model, config, state.step).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
            losses = diffusion.losses(state.model, batch.x0, batch.t, batch.y, batch.noise)
        losses["loss"].mean().backward()
        grad_norm = nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None])
        if not torch.isfinite(grad_norm):
            raise FloatingPointError(
                f"the gradient norm is {grad_norm.item()} at step {state.step + 1}: the run has diverged. "
                f"The last checkpoint is kept; start a new run with a lower lr (now {config.lr:g}) or a "
                f"longer warmup (now {config.warmup})"
            )
        for group in state.optimizer.param_groups:
            group["lr"] = group["base_lr"] * learning_rate_factor(state.step, config)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        update_ema(state.ema, state.model, ema_decay_at(state.step, config.ema_decay))
        state.meter.add(losses, batch.t, config.timesteps, grad_norm)
        state.step += 1

        bar.update()
        if state.step % config.log_every == 0:
            row: dict[str, Any] = {"step": state.step, "images": state.step * config.batch_size}
            row |= state.meter.read_and_reset()
            row["seconds"] = round(time.perf_counter() - started, 3)
            with (run / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            bar.set_postfix(loss=f"{row['loss']:.4f}")
            if on_log is not None:
                on_log(row)
        if state.step % config.save_every == 0 or state.step == config.steps:
            save_checkpoint(run, state)
    bar.close()
    return state


def _rewind_log(path: Path, step: int) -> None:
    """Drop the lines that a killed run wrote after its last checkpoint: the resumed run writes them again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
