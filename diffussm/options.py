"""What decides a run.

Generated from book/34_options.md by `make export`: edit there.
"""

import json
import math
import re
import sys
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

from diffussm.guards import bounded, check_fields, expect_one_of, refuse
from diffussm.model_config import PRESETS, DiffuSSMConfig

if TYPE_CHECKING:
    from diffussm.data import Dataset
    from diffussm.diffusion import GaussianDiffusion

__all__ = [
    "Recipe",
    "RECIPES",
    "diffusion_of",
    "Execution",
    "flat",
    "RENAMED",
    "from_flat",
    "warn",
    "misfits",
    "as_flags",
    "check_data",
]


@dataclass(frozen=True)
class Recipe:
    """What a run learns: two runs of one recipe and the same data learn the same.

    Args:
        model: Sizes of the network.
        data: digits, openmoji, images (a folder, a zip, an LMDB), or a latent store.
        steps: Steps of the optimiser, each with one batch.
        batch_size: Images of a step, over all processes.
        lr: Learning rate.
        ssm_lr: The most it may be for the dynamics of the state spaces.
        weight_decay: That of AdamW.
        warmup: Steps in which the learning rate rises from 0.
        cooldown: Last steps, in which it falls to 0.
        ema_decay: Decay of the moving average of the weights, for each step.
        ema_warmup: Whether the average is over fewer steps at the start.
        timesteps: Noise levels, T.
        flip: Mirror half of the images.
        exif_rotate: Turn photographs as their EXIF tag says (ADM does not).
        clip: The most that the norm of the gradient may be; 0 does not clip.
        precision: bf16 is autocast, with weights in float32.
        seed: Decides all that is random.
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
        if (both := self.warmup + self.cooldown) > self.steps:
            raise ValueError(
                f"warmup + cooldown={both} must fit into steps={self.steps}: lower "
                f"--warmup and --cooldown, or take --steps {both}"
            )


RECIPES = {
    "digits": Recipe(
        model=DiffuSSMConfig(**PRESETS["digits"]),
        steps=1500,
        batch_size=32,
        lr=4e-3,
        warmup=100,
        cooldown=600,
        ema_decay=0.98,
    )
}


def diffusion_of(recipe: Recipe) -> "GaussianDiffusion":
    """The noise schedule of a run: linear (paper, section 4.1)."""
    from diffussm.diffusion import GaussianDiffusion

    levels = 17 if recipe.data == "digits" else 256
    return GaussianDiffusion.linear(recipe.timesteps, levels=levels)


@dataclass(frozen=True)
class Execution:
    """How a run is carried out: all of it may change when the run is resumed.

    Args:
        log_every: Steps between two lines of the log.
        save_every: Steps between two checkpoints.
        sample_every: Steps between two grids of samples; 0 draws none on the way.
        score_every: Steps between two scores of the average; 0 computes none.
        score_images: Images drawn for a score; 0 computes losses only.
        held_out: Images that the run does not see; default: those of digits, openmoji.
        keep_last: How many of the newest checkpoints stay.
        keep_every: Checkpoints of multiples of so many steps stay, too; 0 is none.
        keep: Checkpoints that stay, by steps or images, as in 400k or 338M images.
        skip_nonfinite: Steps with a loss that is not finite that may be left out.
        step_limit: Seconds that a process waits for another in a step; then it ends.
        profile: Step that each process records into RUN/profile; 0 is none.
        workers: Threads of each process that read images or latents.
        micro_batch: Images that go through the network at once; 0 is all of a process.
        strategy: Whole replicas of the network, or shards of it (fsdp).
        activation_checkpointing: Compute activations again instead of keeping them.
        compile: Let torch.compile fuse the blocks.
        convolution: fft, chunked, reference, triton, chunked_triton, auto (measure) or
            module:function.
    """

    log_every: int = bounded(50, least=1)
    save_every: int = bounded(1000, least=1)
    sample_every: int = bounded(0, least=0)
    score_every: int = bounded(0, least=0)
    score_images: int = bounded(256, least=0)
    held_out: str = ""
    keep_last: int = bounded(2, least=1)
    keep_every: int = bounded(0, least=0)
    keep: tuple[str, ...] = ()
    skip_nonfinite: int = bounded(3, least=0)
    step_limit: float = bounded(300.0, above=0)
    profile: int = bounded(0, least=0)
    workers: int = bounded(4, least=1)
    micro_batch: int = bounded(0, least=0)
    strategy: Literal["ddp", "fsdp"] = "ddp"
    activation_checkpointing: Literal["none", "elementwise", "all"] = "none"
    compile: bool = False
    convolution: str = "fft"

    def keep_steps(self, batch_size: int) -> frozenset[int]:
        """The steps that `keep` names, for batches of this size."""
        return frozenset(_kept_step(entry, batch_size) for entry in self.keep)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", _listed(self.keep))
        if isinstance(self.activation_checkpointing, bool):  # as it was once
            how = "all" if self.activation_checkpointing else "none"
            object.__setattr__(self, "activation_checkpointing", how)
        check_fields(self)
        self.keep_steps(1)  # refuses what cannot be read
        if self.score_every % self.log_every:
            raise ValueError(
                f"score_every={self.score_every}: scores stand in lines of the log; "
                f"take a multiple of log_every={self.log_every}, or change that too"
            )


def _kept_step(entry: str, batch_size: int) -> int:
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?) ?([kM]?)( images)?", entry)
    count, unit, images = match.groups() if match else ("0", "", None)
    number = Fraction(count.replace("_", "")) * {"": 1, "k": 10**3, "M": 10**6}[unit]
    step = math.ceil(number / batch_size) if images else number
    if step < 1 or step != int(step):
        raise ValueError(f"keep={entry!r}: expected a step as '400k', or '338M images'")
    return int(step)


def _listed(keep: Any) -> Any:
    """`keep` as it stands in YAML: a list, one entry, or several with commas."""
    if isinstance(keep, str | int):
        keep = str(keep).split(",")
    return tuple(str(x).strip() for x in keep) if isinstance(keep, list) else keep


def flat(recipe: Recipe, execution: Execution) -> dict[str, Any]:
    """All options of a run as one mapping, as a YAML file has them."""
    return {**asdict(recipe), **asdict(execution)}


RENAMED = {"parallel": "strategy", "recompute": "activation_checkpointing"}


def from_flat(values: dict[str, Any]) -> tuple[Recipe, Execution]:
    """The inverse of `flat`.

    Raises:
        ValueError: an unknown or missing option, or a value that cannot work.
    """
    values = _known(_with_new_names(values))
    recipe, execution = (
        {name: values[name] for name in values.keys() & names} for names in _NAMES
    )
    recipe["model"] = DiffuSSMConfig.from_dict(recipe["model"])
    return Recipe(**recipe), Execution(**execution)


def _with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    for old in RENAMED.keys() & values.keys():
        new, value = RENAMED[old], values[old]
        warn(f"the option {old} is called {new} now; write {new}")
        told = (
            f"{old}={value!r} and {new}={values.get(new)!r} are one option: omit {old}"
        )
        refuse(values.get(new, value) != value, told)
    named = {RENAMED.get(key, key): value for key, value in values.items()}
    if named.get("convolution") == "diffussm.gpu_kernels:choose_convolution":
        warn("the convolution that measures and chooses is called 'auto' now")
        named["convolution"] = "auto"
    return named


_NAMES = [{field.name for field in fields(part)} for part in (Recipe, Execution)]


def _known(values: dict[str, Any]) -> dict[str, Any]:
    for name in sorted(values):
        expect_one_of("training option", name, sorted(set.union(*_NAMES)))
    refuse("model" not in values, "a training configuration needs a 'model' section")
    return values


@cache  # each text once
def warn(text: str) -> None:
    """Print a warning, the first time that it is given."""
    print(f"warning: {text}", file=sys.stderr)


def misfits(dataset: "Dataset", recipe: Recipe) -> dict[str, Any]:
    """The options that do not fit the data, each with the value that would."""
    model, (C, h, w) = recipe.model, dataset[0][0].shape
    most = min(recipe.batch_size, len(dataset))
    pairs: dict[str, tuple[Any, Any]] = {
        "model.in_channels": (model.in_channels, C),
        "model.input_size": (_side(model.height, model.width), _side(h, w)),
        "model.num_classes": (model.num_classes, dataset.num_classes),
        "batch_size": (recipe.batch_size, most),
    }
    return {name: fits for name, (has, fits) in pairs.items() if has != fits}


def _side(height: int, width: int) -> int | tuple[int, int]:
    """How `input_size` says it: one number for a square."""
    return height if height == width else (height, width)


def as_flags(options: dict[str, Any]) -> str:
    """Options as one would type them: `--model.num_classes 2 --batch_size 12`."""
    word = partial(json.dumps, separators=(",", ":"))
    return " ".join(f"--{name} {word(value)}" for name, value in options.items())


def check_data(dataset: "Dataset", recipe: Recipe) -> None:
    """ValueError if the images do not fit the model, or its labels, or the batch."""
    model, what, k = recipe.model, repr(recipe.data), dataset.num_classes
    if wrong := misfits(dataset, recipe):
        found = tuple(dataset[0][0].shape)
        takes = (model.in_channels, model.height, model.width)
        raise ValueError(
            f"{what} has {len(dataset)} images {found} in {k} classes, the model takes "
            f"{takes} in {model.num_classes} classes, and a batch {recipe.batch_size} "
            f"images: add {as_flags(wrong)}"
        )
    files = hasattr(dataset, "read") and dataset.levels is not None
    if recipe.exif_rotate and not files:
        raise ValueError(f"exif_rotate applies to files, and {what} has none: omit it")
