"""ImageNet, command by command.

Generated from book/93_cli.md by `make export`: edit there.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, fields, replace
from functools import cache, partial
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jsonargparse import ArgumentParser

from diffussm import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from diffussm.data import Dataset
    from diffussm.model import DiffuSSM
    from diffussm.samples import SampleConfig
    from diffussm.training import Execution, Recipe

__all__ = [
    "recipe_files",
    "read_recipe",
    "Download",
    "HUB",
    "ADM",
    "VAE_FILE",
    "DOWNLOADS",
    "published",
    "DEVICE_HELP",
    "IDLE",
    "EXIF_HELP",
    "TOLD",
    "open_data",
    "parameter_count",
    "MARGIN",
    "GRID_ROWS",
    "save_grid",
    "GRID_STEPS",
    "draw_grid",
    "parse_classes",
    "saved_bytes",
    "RESERVE",
    "memory_needed",
    "PROBE",
    "probe_all_reduce",
    "Finding",
    "Skip",
    "examine",
    "doctor_questions",
    "checkpoints_kept",
    "COMMANDS",
    "LOG",
    "main",
]


def recipe_files() -> dict[str, Path]:
    """The YAML files that come with the package, by name."""
    found = Path(str(files("diffussm"))) / "configs"
    return {
        file.stem: file
        for file in sorted(found.glob("*.yaml"), key=lambda file: file.stem)
    }


def read_recipe(name: str) -> "tuple[Recipe, Execution]":
    """The configuration of a training run: the name of a recipe that comes with the package, or a YAML file.

    Raises ValueError or OSError for a file that is none: unknown keys, wrong types, impossible values.
    """
    import yaml

    from diffussm.training import RENAMED, Execution, Recipe, from_flat

    known = recipe_files()
    file = known.get(name) or Path(name)
    if not file.is_file():
        raise ValueError(
            f"there is no recipe {name!r}; give a YAML file, or one of {', '.join(known)}"
        )
    try:
        text = file.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError("it has aliases (*name), which a recipe does not need")
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(
            f"{file} is no recipe; expected lines such as 'steps: 1000' and a 'model:' section"
        )
    types = {f.name: f.type for part in (Recipe, Execution) for f in fields(part)}
    for key, value in values.items():
        kind = types.get(str(RENAMED.get(key, key)))
        if kind is float and type(value) is int:
            values[key] = float(value) if abs(value) < 2**53 else math.inf
        elif kind in (int, float, bool, str) and type(value) is not kind:
            hint = (
                "; YAML wants a point in such a number, as in 1.0e-4"
                if kind is float
                else ""
            )
            raise ValueError(
                f"{file}: {key} is {value!r:.60}, expected {kind.__name__}{hint}"
            )
    try:
        return from_flat(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


class Download(NamedTuple):
    """A file that others publish and a run needs. What nobody has told us is None."""

    name: str
    use: str
    url: str
    size: int | None = None
    sha256: str | None = None


HUB = "https://huggingface.co/stabilityai"
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches"
VAE_FILE = "diffusion_pytorch_model.safetensors"
DOWNLOADS = (
    Download(
        f"sd-vae-ft-ema/{VAE_FILE}",
        "encodes, decodes",
        f"{HUB}/sd-vae-ft-ema",
        334_643_276,
        "32db726da04f06c1b6b14c0043ce115cc87a501482945c5add89a40d838fcb46",
    ),
    Download(
        f"sd-vae-ft-mse/{VAE_FILE}",
        "another decoder",
        f"{HUB}/sd-vae-ft-mse",
        334_643_276,
        "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
    ),
    Download(
        "VIRTUAL_imagenet256_labeled.npz",
        "reference",
        f"{ADM}/imagenet/256/VIRTUAL_imagenet256_labeled.npz",
        2_037_122_530,
        "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758",
    ),
    Download(
        "VIRTUAL_imagenet512.npz",
        "reference",
        f"{ADM}/imagenet/512/VIRTUAL_imagenet512.npz",
    ),
    Download(
        "VIRTUAL_lsun_bedroom256.npz",
        "reference",
        f"{ADM}/lsun/bedroom/VIRTUAL_lsun_bedroom256.npz",
    ),
    Download(
        "weights-inception-2015-12-05-6726825d.pth",
        "scores",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        95_628_359,
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
)


def published(file: Path) -> Download | None:
    """Which of `DOWNLOADS` this file is, by its SHA-256; ValueError if only its name is that of one."""
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    for known in DOWNLOADS:
        if known.sha256 == found:
            return known
        if known.sha256 and known.name == file.name:
            raise ValueError(
                f"{file} is not the published {known.name}: its sha256 is {found}, not {known.sha256}"
            )
    return None


DEVICE_HELP = "e.g. cpu or cuda; default: a GPU if there is one"


def _new_parser(command: str, description: str) -> ArgumentParser:
    # without abbreviations, or a mistyped --model.d_mode would be taken for --model.d_model
    return ArgumentParser(
        prog=f"diffussm {command}", description=description, allow_abbrev=False
    )


def _parse(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Any, set[str]]:
    """The options, and the names of those *typed*: what a default, preset, recipe or --config says is not."""
    words = list(arguments)
    options = parser.instantiate(parser.parse_args(words))
    while (
        "--config" in words
    ):  # a whole configuration, also of what does not matter here
        at = words.index("--config")
        del words[at : at + 2]
    typed = parser.parse_args(
        [word for word in words if not word.startswith("--config=")], defaults=False
    )
    return options, set(typed.keys())


# What has no effect in a situation. Whoever gives it there expects one, so it is refused.
IDLE = {
    "beside --grid": "count labels batch_size",
    "beside --out": "per_class overwrite",
    "for a run without classes": "classes labels cfg_scale guidance_channels",
    "without guidance, at a cfg_scale of 1": "guidance_channels",
    "for a model of pixels": "vae",
    "where no samples are drawn": "vae",
    "for digits": "exif_rotate workers",
    "for stored latents": "exif_rotate workers",
    "for an LMDB, which has no classes": "no_classes",
    "for .npz files, whose pictures are as they are": "exif_rotate",
    "beside --self_test": "reference weights batch_size out device size exif_rotate",
    "under torchrun": "processes",
}


def _refuse_idle(given: set[str], situation: str) -> None:
    """ValueError that names the options among `given` which have no effect in this situation."""
    idle = [f"--{name}" for name in IDLE[situation].split() if name in given]
    if idle:
        raise ValueError(
            f"{' and '.join(idle)} would have no effect {situation}; omit {' and '.join(idle)}"
        )


@contextmanager
def _interruptible(kept: Callable[[], str]) -> Iterator[None]:
    """Whoever presses Ctrl-C in here hears what is kept; it is looked up at that moment."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept()) from None


def _nothing() -> str:
    return "nothing is kept"


def _batches_kept() -> str:
    return "finished batches are kept, and the same command draws the others"


EXIF_HELP = "turn photographs as their EXIF tag says (ADM does not)"


def _vae(arguments: Sequence[str]) -> int:
    """train a small autoencoder on a folder of images"""
    parser = _new_parser(
        "vae",
        "Train the small autoencoder of chapter 10, for data of one's own or a rehearsal.",
    )
    parser.add_argument("images", type=Path, help="folder of images, or an LMDB")
    parser.add_argument(
        "out", type=Path, help="folder to write, which --vae then takes"
    )
    parser.add_argument(
        "--size", type=int, default=64, help="images are cropped to size x size"
    )
    parser.add_argument("--steps", type=int, default=380)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exif_rotate", action="store_true", help=EXIF_HELP)
    options, _ = _parse(parser, arguments)
    images, out = options.images, options.out
    if (
        min(options.size, options.steps, options.batch_size) < 1
        or not 0 < options.lr < 1
        or options.seed < 0
    ):
        raise ValueError(
            "--size, --steps and --batch_size are at least 1, --lr lies in (0, 1), --seed is not negative"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists; choose a new folder for the autoencoder")

    from diffussm.autoencoder import train_vae
    from diffussm.files import apply_umask
    from diffussm.formats import images_from

    source = images_from(images, options.size, exif_rotate=options.exif_rotate)
    with _interruptible(_nothing):
        vae = train_vae(
            source,
            steps=options.steps,
            batch_size=min(options.batch_size, len(source)),
            crop=min(32, options.size),
            lr=options.lr,
            seed=options.seed,
        )
        draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        try:
            vae.save_pretrained(draft)
            for file in draft.glob("*.safetensors"):
                apply_umask(file)
            draft.replace(out)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    print(
        f"wrote {out}: an autoencoder with a scaling factor of {vae.config.scaling_factor}"
    )
    return 0


def _encode(arguments: Sequence[str]) -> int:
    """store the latents of a folder of images (or an LMDB)"""
    parser = _new_parser(
        "encode",
        "Encode images once; also under torchrun. The same command again goes on.",
    )
    parser.add_argument(
        "data",
        type=Path,
        help="class folders as in ImageNet, a plain folder, or an LMDB",
    )
    parser.add_argument("out", type=Path, help="folder of the latent store")
    parser.add_argument(
        "--vae",
        type=str,
        required=True,
        help="folder of an AutoencoderKL, or its name on the hub",
    )
    parser.add_argument(
        "--size",
        type=int,
        required=True,
        help="images are cropped to size x size pixels",
    )
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--shard_size", type=int, default=8192, help="images per file")
    parser.add_argument(
        "--workers",
        type=int,
        default=4,
        help="threads of each process that read images",
    )
    parser.add_argument(
        "--no_flip", action="store_true", help="do not store the mirrored images"
    )
    parser.add_argument(
        "--no_classes",
        action="store_true",
        help="take sub-folders for folders, not for classes",
    )
    parser.add_argument("--exif_rotate", action="store_true", help=EXIF_HELP)
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read all of it again and compare checksums",
    )
    parser.add_argument("--device", type=str | None, default=None, help=DEVICE_HELP)
    options, given = _parse(parser, arguments)
    if min(options.size, options.batch_size, options.shard_size, options.workers) < 1:
        raise ValueError(
            "--size, --batch_size, --shard_size and --workers are at least 1"
        )

    from diffussm.autoencoder import load_vae
    from diffussm.encoding import encode
    from diffussm.formats import LmdbImages, images_from
    from diffussm.latents import LatentStore, verify_store

    conditional = False if options.no_classes else None
    source = images_from(
        options.data,
        options.size,
        conditional=conditional,
        exif_rotate=options.exif_rotate,
    )
    if isinstance(source, LmdbImages):
        _refuse_idle(given, "for an LMDB, which has no classes")
    out = options.out
    with (
        _cluster("encode", options.device) as world,
        _interruptible(partial(_shards_kept, out)),
    ):
        vae = load_vae(options.vae, world.device)
        encode(
            source,
            out,
            vae,
            options.vae,
            batch_size=options.batch_size,
            shard_size=options.shard_size,
            flip=not options.no_flip,
            rank=world.rank,
            world_size=world.size,
            workers=options.workers,
        )
        world.barrier()  # until every process has done its share
        store = LatentStore(out)
        if world.rank == 0:
            skipped = [
                one for shard in store.manifest["shards"] for one in shard["skipped"]
            ]
            held = f"{len(store)} images in {store.num_classes} classes"
            print(f"{out} holds the latents of {held}; {len(skipped)} skipped")
            _tell_skipped(skipped)
        if options.verify:
            problems = world.once(partial(verify_store, out))
            if problems:
                raise ValueError("; ".join(problems))
            if world.rank == 0:
                print(f"every file of {out} is as it was written")
    return 0


def _shards_kept(out: Path) -> str:
    finished = len(list(out.glob("shard-*.json")))
    return (
        f"{finished} finished shards are kept, and the same command encodes the others"
    )


TOLD = 20  # so many skipped images are named


def _tell_skipped(skipped: Sequence[Any]) -> None:
    """Name the images that were skipped, and why: pairs of name and reason, as `Skipped`."""
    for name, reason in skipped[:TOLD]:
        print(f"skipped {name}: {reason}", file=sys.stderr)
    if len(skipped) > TOLD:
        print(f"... and {len(skipped) - TOLD} more", file=sys.stderr)


def _cluster(command: str, device: str | None, *, stoppable: bool = False) -> Any:
    """The processes of a command; ValueError for a device that there is not.

    `stoppable`: Ctrl-C and the queue's signals ask the command to stop where nothing is lost.
    """
    import torch

    from diffussm.distributed import Cluster

    try:
        kind = torch.device(device or "cpu").type
    except RuntimeError:
        raise ValueError(
            f"--device {device}: no such kind of device; try cpu or cuda"
        ) from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device {device}: this machine has no GPU that torch can use; see diffussm doctor"
        )
    return Cluster(device, stoppable=stoppable, report=partial(_report, command))


def open_data(config: "Recipe") -> "Dataset":
    """What `config.data` names: the digits, a latent store, or images (a folder, or an LMDB).

    Raises ValueError or OSError for what does not exist, is damaged, or cannot be what the model takes.
    """
    from diffussm.formats import images_from
    from diffussm.latents import LatentStore
    from diffussm.training import load_dataset

    latents = _is_latent(config)
    if config.data == "digits":
        return load_dataset(config)
    if not config.data:
        what = (
            "the folder that diffussm encode has written"
            if latents
            else "a folder of images"
        )
        raise ValueError(f"this recipe needs --data: {what}")
    path = Path(config.data)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}; --data is 'digits', a latent store, or a folder of images"
        )
    if (path / "manifest.json").exists() or (path / "plan.json").exists():
        store = LatentStore(path)
        if config.flip and not store.flip:
            raise ValueError(
                f"{path} holds no mirrored images; encode without --no_flip, or train with --flip false"
            )
        return store
    if latents:
        raise ValueError(
            f"{path} holds no latents, and this model takes {config.model.in_channels} channels; "
            f"make them first: diffussm encode {path} LATENTS --vae VAE --size PIXELS"
        )
    return images_from(
        path,
        config.model.height,
        flip=config.flip,
        conditional=config.model.num_classes > 0,
        exif_rotate=config.exif_rotate,
    )


def _with_new_names(words: Sequence[str]) -> list[str]:
    """The words of a command, with each flag's old name replaced, and a warning that says so."""
    from diffussm.training import RENAMED

    replaced = []
    for word in words:
        flag, equals, value = word.partition("=")
        new = RENAMED.get(flag.removeprefix("--")) if flag.startswith("--") else None
        if new is not None:
            print(f"warning: {flag} is called --{new} now", file=sys.stderr)
        replaced.append(f"--{new}{equals}{value}" if new else word)
    return replaced


def _add_recipe(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """The recipe and, with its values for defaults, every option of a run."""
    from diffussm.training import Execution, Recipe, flat

    names = ", ".join(recipe_files())
    parser.add_argument(
        "recipe", type=str, help=f"what to train: a YAML file, or one of {names}"
    )
    parser.add_argument(
        "--config", action="config", help="YAML file with any of the options below"
    )
    parser.add_class_arguments(Recipe, help="what is learnt")
    parser.add_class_arguments(Execution, help="how it is carried out", skip={"keep"})
    kept = "checkpoints to keep: steps or images, as in 400k,338M images"  # without the brackets of a YAML list
    parser.add_argument("--keep", type=str | list[str | int], default=[], help=kept)
    if arguments and not arguments[0].startswith(
        "-"
    ):  # it decides the defaults of all other options
        recipe, execution = read_recipe(arguments[0])
        parser.set_defaults(flat(recipe, execution) | {"keep": list(execution.keep)})
    elif not {"-h", "--help"} & set(arguments):
        raise ValueError(
            f"name what to train first, as in: {parser.prog} digits; the recipes are {names}"
        )


def _recipe_of(options: Any) -> "tuple[Recipe, Execution]":
    from diffussm.training import Execution, Recipe

    recipe, execution = (
        {field.name: options[field.name] for field in fields(part)}
        for part in (Recipe, Execution)
    )
    return Recipe(**recipe), Execution(**execution)


def _is_latent(config: "Recipe") -> bool:
    return config.model.in_channels not in (1, 3)


def _check_data_options(given: set[str], config: "Recipe", data: "Dataset") -> None:
    """ValueError for an option that this kind of data has no use for."""
    if config.data == "digits":
        _refuse_idle(given, "for digits")
    if _is_latent(config):
        _refuse_idle(given, "for stored latents")
    else:
        _refuse_idle(given, "for a model of pixels")


def _train(arguments: Sequence[str]) -> int:
    """train a model from a recipe, or resume it"""
    parser = _new_parser(
        "train",
        "Train a model, also under torchrun; the same command again resumes a killed run.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--vae",
        type=str | None,
        default=None,
        help="autoencoder, to draw samples of latents",
    )
    parser.add_argument(
        "--other_data",
        action="store_true",
        help="go on with other images than the run began with",
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="write RUN/tensorboard besides the log",
    )
    parser.add_argument("--device", type=str | None, default=None, help=DEVICE_HELP)
    parser.add_argument(
        "--no_grid", action="store_true", help="draw no samples at the end"
    )
    arguments = _with_new_names(arguments)
    _add_recipe(parser, arguments)
    options, given = _parse(parser, arguments)
    config, execution = _recipe_of(options)
    if execution.sample_every and _is_latent(config) and options.vae is None:
        raise ValueError(
            f"sample_every={execution.sample_every}: to draw latents, say with --vae what decodes them"
        )
    if options.no_grid and not execution.sample_every:
        _refuse_idle(given, "where no samples are drawn")
    writer = _tensorboard() if options.tensorboard else None
    data = open_data(config)
    _check_data_options(given, config, data)
    goes_on = partial(_goes_on, options.out)
    with (
        _interruptible(
            goes_on
        ),  # looks again once a checkpoint that was being written is whole
        _cluster("train", options.device, stoppable=True) as world,
        _interruptible(goes_on),  # for a process that leaves alone
    ):
        return _train_here(config, execution, data, options, world, writer)


def _train_here(
    config: "Recipe",
    execution: "Execution",
    data: "Dataset",
    options: Any,
    world: Any,
    writer: Any,
) -> int:
    """Train with the processes of `world`; the exit code."""
    from diffussm.distributed import EXIT_PREEMPTED
    from diffussm.training import Preempted, train, whole_ema

    out = options.out
    decode = (
        _decoder(options.vae, world.device, getattr(data, "vae", None))[0]
        if options.vae
        else None
    )
    world.once(
        lambda: _claim_run(out, config, execution, data, world.size, options.other_data)
    )

    def draw(model: "DiffuSSM", step: int) -> None:
        picture = out / "samples" / f"step_{step:08d}.png"
        picture.parent.mkdir(exist_ok=True)
        draw_grid(model, config, picture, decode=decode, progress=False)

    def log(row: dict[str, Any]) -> None:
        if board is not None:
            for name, value in row.items():
                if isinstance(value, int | float):
                    board.add_scalar(name, value, row["step"])
        loss = (
            "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        )  # None: all steps were left out
        _say(
            f"step {row['step']} of {config.steps}: loss {loss}, "
            f"{row['images_per_second']:.1f} images/s, {_duration(row['seconds_left'])} left"
        )

    board = writer(str(out / "tensorboard")) if writer and world.rank == 0 else None
    if world.rank == 0:
        _say(
            f"{parameter_count(config.model) / 1e6:.1f} million parameters, {len(data)} images"
        )
    try:
        state = train(
            config,
            out,
            execution,
            world=world,
            dataset=data,
            on_log=log,
            on_samples=draw,
        )
    except Preempted as stop:
        told = str(stop)
        world.once(lambda: (out / "preempted").write_text(told + "\n"))
        if world.rank == 0:
            print(told, file=sys.stderr)
        return EXIT_PREEMPTED
    finally:
        if board is not None:
            board.close()
    if world.rank == 0:
        weights = out / "checkpoints" / f"step_{state.step:08d}" / "ema"
        _say(
            f"{state.step} steps done; the log is {out / 'log.jsonl'}, the averaged weights are in {weights}"
        )
    if (decode or not _is_latent(config)) and not options.no_grid:
        ema, picture = whole_ema(state, world), out / "samples.png"
        world.once(lambda: draw_grid(ema, config, picture, decode=decode))
        if world.rank == 0:
            _say(f"a grid of samples is in {picture}")
    return 0


def _claim_run(
    out: Path,
    config: "Recipe",
    execution: "Execution",
    data: "Dataset",
    processes: int,
    other_data: bool,
) -> None:
    """Every reason to refuse comes before the first file."""
    from diffussm.training import check_data, micro_batch_of, open_run

    micro_batch_of(config, execution, processes)
    check_data(data, config)
    open_run(out, config, execution, data, other_data)
    (out / "preempted").unlink(missing_ok=True)


def _goes_on(run: Path) -> str:
    """From where an interrupted run will go on."""
    saved = sorted(folder.name for folder in (run / "checkpoints").glob("step_*"))
    if not saved:
        return "no checkpoint was saved, so the same command begins again"
    return f"the same command goes on from step {int(saved[-1].removeprefix('step_'))}"


def _say(line: str) -> None:
    """Print a line, above the progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(line)
    sys.stdout.flush()


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:.0f} s"


def _tensorboard() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"--tensorboard needs the package tensorboard ({error}); omit the option, or install it"
        ) from None
    return SummaryWriter


def _decoder(
    vae_name: str, device: Any, made_by: dict[str, Any] | None
) -> "tuple[Callable[[Tensor], Tensor], dict[str, Any]]":
    """What turns latents into images, and its identity; ValueError if another encoder made the latents."""
    from diffussm.autoencoder import check_encoder, decode, load_vae, vae_identity

    vae = load_vae(vae_name, device)
    identity = vae_identity(vae, vae_name)
    if made_by is not None:
        check_encoder(made_by, identity, f"--vae {vae_name}")
    return partial(decode, vae), identity


@cache
def parameter_count(config: Any) -> int:
    """The number of parameters of a `DiffuSSMConfig`; nothing is allocated."""
    import torch

    from diffussm.model import DiffuSSM

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DiffuSSM(config).parameters())


MARGIN = 2  # white pixels around each image of a grid
GRID_ROWS = 10  # classes that are drawn when none is named


def save_grid(images: "Tensor", columns: int, path: Path) -> None:
    """Write images (n, C, H, W) in [-1, 1], C = 1 or 3, row by row as one PNG; small ones are enlarged."""
    from einops import rearrange
    from PIL import Image
    from torch.nn import functional

    n, channels, height, _ = images.shape
    if channels not in (1, 3):
        raise ValueError(
            f"these samples have {channels} channels: latents; say with --vae what decodes them"
        )
    if n % columns:
        raise ValueError(f"{n} images do not fill rows of {columns}")
    scale = max(1, math.ceil(48 / height))
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
    pixels = pixels.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    pixels = functional.pad(pixels, (MARGIN,) * 4, value=255)
    grid = rearrange(pixels, "(r k) c h w -> (r h) (k w) c", k=columns).cpu().numpy()
    Image.fromarray(grid.squeeze(-1) if channels == 1 else grid).save(path)


GRID_STEPS = 50  # of the pictures that training draws


def draw_grid(
    model: "DiffuSSM",
    config: "Recipe",
    picture: Path,
    *,
    count: int = 8,
    steps: int | None = None,
    method: str = "ddim",
    cfg_scale: float = 1.5,
    guidance_channels: int | None = None,
    clip_denoised: bool | None = None,
    precision: str = "float32",
    classes: Sequence[int] | None = None,
    seed: int = 0,
    decode: "Callable[[Tensor], Tensor] | None" = None,
    progress: bool = True,
) -> None:
    """Draw `count` samples for each class (None: the first ten), a class to a row; `decode`: for latents.

    `steps` None: 50, or as many as the run has timesteps. `clip_denoised` None: for pixels, which end at -1
    and 1, and not for latents.
    """
    import torch

    from diffussm.data import generator
    from diffussm.samples import precision as computing_in
    from diffussm.sampling import sample
    from diffussm.training import diffusion_of

    if classes is None:
        classes = range(min(config.model.num_classes, GRID_ROWS) or 1)
    where = next(model.parameters()).device
    shape = (config.model.in_channels, config.model.height, config.model.width)
    draws = generator(seed, "grid", 0)
    noise = torch.randn(len(classes) * count, *shape, generator=draws).to(where)
    conditional = model.null_label is not None
    labels = (
        torch.tensor(classes).repeat_interleave(count).to(where)
        if conditional
        else None
    )
    with computing_in(precision, where):
        images = sample(
            model,
            diffusion_of(config),
            labels,
            steps=min(GRID_STEPS, config.timesteps) if steps is None else steps,
            method=method,
            cfg_scale=cfg_scale if conditional else 1.0,
            guidance_channels=guidance_channels,
            generator=draws,
            noise=noise,
            clip_denoised=decode is None if clip_denoised is None else clip_denoised,
            progress=progress,
        )
    images = images.float()
    save_grid(images.cpu() if decode is None else decode(images), count, picture)


def parse_classes(words: str, names: Sequence[str]) -> list[int]:
    """``"all"``, or numbers or names separated by commas, as class numbers; ValueError names what is none."""
    if words == "all":
        return list(range(len(names)))
    chosen = []
    for word in (word.strip() for word in words.split(",")):
        if word in names:
            chosen.append(list(names).index(word))
        elif word.isdecimal() and len(word) < 10 and int(word) < len(names):
            chosen.append(int(word))
        else:
            known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise ValueError(
                f"--classes {words}: {word!r} is no class of this model; its {len(names)} are {known}"
            )
    return chosen


def _sample(arguments: Sequence[str]) -> int:
    """draw images from a trained run: a grid to look at, or a set to be scored"""
    from diffussm.samples import SAMPLE_PRESETS, SampleConfig
    from diffussm.training import encoder_of, find_checkpoint, load_run

    parser = _new_parser(
        "sample",
        "Draw a grid of images, one row per class (--grid), or a set of them (--out), from a run. "
        "A set is resumed by the same command, and does not depend on the number of processes.",
    )
    parser.add_argument("--from", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--step",
        type=int | None,
        default=None,
        help="the checkpoint to draw from; default: the newest",
    )
    parser.add_argument(
        "--weights",
        type=Literal["ema", "model"],
        default="ema",
        help="moving average or raw",
    )
    parser.add_argument(
        "--vae",
        type=str | None,
        default=None,
        help="autoencoder that decodes, for a run on latents",
    )
    parser.add_argument(
        "--grid", type=Path | None, default=None, help="a PNG file to write"
    )
    parser.add_argument(
        "--out",
        type=Path | None,
        default=None,
        help="a folder of PNG files, or a .npz file",
    )
    parser.add_argument(
        "--classes",
        type=str | None,
        default=None,
        help=f"numbers or names, or 'all'; default: the first {GRID_ROWS} for a grid, all for a set",
    )
    parser.add_argument(
        "--per_class", type=int, default=8, help="for a grid: images per class"
    )
    parser.add_argument("--device", type=str | None, default=None, help=DEVICE_HELP)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the grid if it exists"
    )
    parser.add_argument(
        "--preset", type=Literal[tuple(SAMPLE_PRESETS)], default="paper-fid"
    )
    parser.add_class_arguments(
        SampleConfig, help="options of the preset", skip={"classes"}
    )
    preset = _preset_named(arguments)
    defaults = asdict(SAMPLE_PRESETS.get(preset, SampleConfig()))
    parser.set_defaults(
        {name: value for name, value in defaults.items() if name != "classes"}
    )
    options, given = _parse(parser, arguments)
    config = SampleConfig(
        **{name: options[name] for name in defaults if name != "classes"}
    )
    _check_sample_target(options, given)
    run = options["from"]

    is_set = options.out is not None  # it is kept batch by batch, a grid is not
    kept = _batches_kept if is_set else _nothing
    with (
        _cluster("sample", options.device, stoppable=is_set) as world,
        _interruptible(kept),
    ):
        # found once and by one process: a run that still trains may write another checkpoint meanwhile
        found = world.once(
            lambda: (
                find_checkpoint(run, options.step)
                if (run / "config.json").is_file()
                else None
            )
        )
        options.step = int(found.name.removeprefix("step_")) if found else options.step
        model, trained, names = load_run(run, options.weights, options.step)
        config = _check_sample_options(config, options, given, trained, names)
        made_by = encoder_of(run, trained.data)
        decode, vae = None, None
        if made_by is not None or _is_latent(trained):
            if options.vae is None:
                source = f", {made_by['name']}" if made_by else ""
                raise ValueError(
                    f"{run} was trained on latents; say with --vae what decodes them{source}"
                )
            decode, vae = _decoder(options.vae, world.device, made_by)
        model = model.to(world.device).eval()
        if options.grid is not None:
            _draw_grid(model, trained, config, options, given, world, decode)
            return 0
        return _draw_set(model, trained, config, options, given, world, decode, vae)


def _preset_named(arguments: Sequence[str]) -> str:
    """It decides the defaults of other options, so it is looked for before they are read."""
    words = list(arguments)
    name = next((b for a, b in pairwise(words) if a == "--preset"), "paper-fid")
    return next(
        (word.partition("=")[2] for word in words if word.startswith("--preset=")), name
    )


def _check_sample_target(options: Any, given: set[str]) -> None:
    """ValueError unless one picture or one set is asked for, where it can be written."""
    grid, out = options.grid, options.out
    if (grid is None) == (out is None):
        raise ValueError(
            "give either --grid FILE.png, for a picture, or --out, for a set of images"
        )
    _refuse_idle(given, "beside --grid" if out is None else "beside --out")
    if options.per_class < 1:
        raise ValueError(
            f"--per_class {options.per_class}: draw at least one image per class"
        )
    if grid is not None and grid.suffix.lower() != ".png":
        raise ValueError(
            f"--grid {grid}: the picture is a PNG; give a name that ends in .png"
        )
    if grid is not None and grid.exists() and not options.overwrite:
        raise ValueError(f"{grid} exists; give another name, or --overwrite")
    target = grid or out
    if not target.parent.is_dir():
        raise ValueError(f"{target}: the folder {target.parent} does not exist")


def _check_sample_options(
    config: "SampleConfig",
    options: Any,
    given: set[str],
    trained: "Recipe",
    names: Sequence[str],
) -> "SampleConfig":
    """The configuration for this run, with its classes; ValueError for options that it has no use for."""
    if not trained.model.num_classes:
        _refuse_idle(given, "for a run without classes")
    elif config.cfg_scale == 1:
        _refuse_idle(given, "without guidance, at a cfg_scale of 1")
    if not _is_latent(trained):
        _refuse_idle(given, "for a model of pixels")
    elif config.clip_denoised:
        raise ValueError(
            "--clip_denoised true clamps predicted images to the range of pixels; this run makes latents, "
            "which go beyond: omit it"
        )
    channels = config.guidance_channels or 0
    if "guidance_channels" in given and channels > trained.model.in_channels:
        raise ValueError(
            f"--guidance_channels {channels}: the model has {trained.model.in_channels}"
        )
    if config.steps > trained.timesteps:
        if "steps" in given or options.grid is None:
            raise ValueError(
                f"--steps {config.steps}: the run has {trained.timesteps} timesteps; give that many or fewer"
            )
        config = replace(config, steps=trained.timesteps)
    if options.classes is not None:
        config = replace(config, classes=tuple(parse_classes(options.classes, names)))
    return config.of(trained.model)


def _draw_grid(
    model: "DiffuSSM",
    trained: "Recipe",
    config: "SampleConfig",
    options: Any,
    given: set[str],
    world: Any,
    decode: "Callable[[Tensor], Tensor] | None",
) -> None:
    if world.rank != 0:
        return
    rows = len(config.classes or range(min(trained.model.num_classes, GRID_ROWS) or 1))
    if config.classes is None and rows < trained.model.num_classes:
        print(
            f"the first {rows} of {trained.model.num_classes} classes; name others with --classes"
        )
    print(
        _how_many(rows * options.per_class, rows * options.per_class, config, trained),
        flush=True,
    )
    draw_grid(
        model,
        trained,
        options.grid,
        count=options.per_class,
        steps=config.steps,
        method=config.method,
        cfg_scale=config.cfg_scale,
        guidance_channels=config.guidance_channels,
        clip_denoised=config.clip_denoised if "clip_denoised" in given else None,
        precision=config.precision,
        classes=config.classes,
        seed=config.seed,
        decode=decode,
    )
    print(f"wrote {options.grid}")


def _draw_set(
    model: "DiffuSSM",
    trained: "Recipe",
    config: "SampleConfig",
    options: Any,
    given: set[str],
    world: Any,
    decode: "Callable[[Tensor], Tensor] | None",
    vae: dict[str, Any] | None,
) -> int:
    from diffussm.distributed import EXIT_PREEMPTED
    from diffussm.samples import draw_samples
    from diffussm.training import Preempted, diffusion_of, read_run

    run = options["from"]
    seen = read_run(run).data["images"]
    if "count" not in given and config.count > seen:
        raise ValueError(
            f"the preset {options.preset} draws {config.count:,} images, and this run has learnt from "
            f"{seen:,}; say with --count how many to draw"
        )
    facts: dict[str, Any] = {
        "weights": options.weights,
        "checkpoint": f"step_{options.step:08d}",
        "ema_decay": trained.ema_decay,
    }
    if vae is not None:
        facts["vae"] = {
            name: vae[name] for name in ("name", "encoder_sha256", "decoder_sha256")
        }
    if world.rank == 0:
        print(_how_many(config.count, config.batch_size, config, trained), flush=True)
    try:
        draw_samples(
            model,
            diffusion_of(trained),
            config,
            options.out,
            world=world,
            facts=facts,
            decode=decode,
        )
    except Preempted as stop:
        if world.rank == 0:
            print(f"{stop}; the same command draws the others", file=sys.stderr)
        return EXIT_PREEMPTED
    if world.rank == 0:
        print(f"wrote {config.count} images to {options.out}")
    return 0


def _how_many(
    images: int, at_once: int, config: "SampleConfig", trained: "Recipe"
) -> str:
    """What is about to be drawn, in words; the last batch is whole too."""
    batches = math.ceil(images / at_once)
    guided = trained.model.num_classes > 0 and config.cfg_scale != 1
    passes = batches * at_once * config.steps * (2 if guided else 1)
    drawn = f"{images:,} images in {batches:,} batch{'es' * (batches > 1)} of {at_once}"
    times = (
        f"{config.steps} steps{', each with and without the class' if guided else ''}"
    )
    return f"{drawn}, {times}: {passes:,} passes of an image through the network"


def _evaluate(arguments: Sequence[str]) -> int:
    """score a set of samples: FID, sFID, IS, precision, recall"""
    parser = _new_parser(
        "evaluate", "Compare samples with a reference by ADM's protocol (chapter 12)."
    )
    parser.add_argument(
        "samples",
        type=Path,
        nargs="*",
        help="folders of PNG files or .npz files; several: drawn with other seeds",
    )
    parser.add_argument(
        "--reference",
        type=Path | None,
        default=None,
        help="images, a .npz, or statistics",
    )
    _add_scoring(parser)
    parser.add_argument(
        "--out", type=Path | None, default=None, help="a .json file to write"
    )
    parser.add_argument(
        "--self_test",
        "--self-test",
        action="store_true",
        help="check the metrics, and nothing else",
    )
    options, given = _parse(parser, arguments)

    samples = options.samples or []
    if options.self_test:
        _refuse_idle(given, "beside --self_test")
    if options.self_test == bool(samples) or options.self_test == bool(
        options.reference
    ):
        raise ValueError("give SAMPLES and --reference, or --self_test alone")
    if options.out is not None and options.out in [
        path.with_suffix(".json") for path in samples
    ]:
        raise ValueError(
            f"{options.out} is where diffussm sample keeps the record of a set; give another name, such as "
            f"{options.out.with_suffix('.scores.json')}"
        )
    _check_new(options.out, ".json")
    if not options.self_test and all(
        path.suffix == ".npz" for path in [*samples, options.reference]
    ):
        _refuse_idle(given, "for .npz files, whose pictures are as they are")

    from diffussm import evaluation, metrics

    if options.self_test:
        try:
            metrics.self_test()
        except AssertionError as error:
            raise ValueError(f"the metrics are wrong here: {error}") from error
        print("the metrics give what they must on data with known answers")
        return 0
    with _interruptible(_nothing):
        result = evaluation.evaluate(
            samples if len(samples) > 1 else samples[0],
            options.reference,
            **_scoring(options),
        )
    text = json.dumps(result, indent=2)
    if options.out is not None:
        draft = options.out.with_name(f".{options.out.name}.tmp")
        draft.write_text(text + "\n")
        draft.replace(options.out)
    print(text)
    return 0


def _statistics(arguments: Sequence[str]) -> int:
    """store the statistics of a reference, for evaluate"""
    parser = _new_parser(
        "statistics", "Store what evaluate needs to know of a reference (chapter 12)."
    )
    parser.add_argument(
        "data",
        type=Path,
        help="a folder of images, class folders, an LMDB, or a .npz file",
    )
    parser.add_argument("out", type=Path, help="the .npz file to write")
    _add_scoring(parser)
    options, given = _parse(parser, arguments)
    _check_new(options.out, ".npz")
    if options.data.suffix == ".npz":
        _refuse_idle(given, "for .npz files, whose pictures are as they are")

    from diffussm import evaluation

    with _interruptible(_nothing):
        evaluation.save_statistics(options.data, options.out, **_scoring(options))
    print(f"wrote {options.out}")
    return 0


def _add_scoring(parser: ArgumentParser) -> None:
    """The options that `evaluate` and `statistics` share."""
    parser.add_argument(
        "--weights", type=Path | None, default=None, help="Inception's weights, a file"
    )
    parser.add_argument(
        "--size",
        type=int | None,
        default=None,
        help="crop images to size x size, as ADM does",
    )
    parser.add_argument("--exif_rotate", action="store_true", help=EXIF_HELP)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", type=str | None, default=None, help=DEVICE_HELP)


def _scoring(options: Any) -> dict[str, Any]:
    """The same as arguments of `diffussm.evaluation`."""
    if options.batch_size < 1 or (options.size is not None and options.size < 1):
        raise ValueError("--batch_size and --size are at least 1")
    return {
        "weights": options.weights,
        "size": options.size,
        "exif_rotate": options.exif_rotate,
        "batch_size": options.batch_size,
        "device": options.device or _default_device(),
    }


def _check_new(path: Path | None, suffix: str) -> None:
    """ValueError unless a file of this kind can be made there, and is not there yet."""
    if path is None:
        return
    if path.suffix != suffix:
        raise ValueError(f"{path}: give a name that ends in {suffix}")
    if path.exists():
        raise ValueError(f"{path} exists; give another name, or remove it yourself")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist")


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def saved_bytes(model: Any, precision: str) -> tuple[float, float]:
    """What a block of a `DiffuSSMConfig` keeps for its backward pass: bytes in any case, bytes per image.

    Computed on fake tensors, which have a shape and no content, so that nothing is allocated (chapter 14).
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from diffussm.hourglass import HourglassBlock

    places = model.seq_len // model.downsample

    def kept(images: int) -> int:
        storages: dict[int, Any] = {}

        def note(tensor: "Tensor") -> "Tensor":
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
            return tensor

        with FakeTensorMode():
            block = HourglassBlock(model.d_model, model.d_state, model.downsample)
            own = {
                parameter.untyped_storage()._cdata for parameter in block.parameters()
            }
            x = torch.zeros(images, places, model.d_model, requires_grad=True)
            c = torch.zeros(images, model.d_model)
            autocast = torch.autocast(
                "cpu", torch.bfloat16, enabled=precision == "bf16"
            )
            with (
                torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
                autocast,
            ):
                block(x, c)
        return sum(
            storage.nbytes() for key, storage in storages.items() if key not in own
        )

    one, two = kept(1), kept(2)
    return float(max(2 * one - two, 0)), float(two - one)


RESERVE = 2e9  # bytes; assumed: what CUDA, NCCL and the allocator's gaps take


def memory_needed(
    config: "Recipe", execution: "Execution", processes: int = 1
) -> dict[str, float]:
    """Bytes that each process needs to train, by use, and their sum as "total"; computed, not measured.

    Raises ValueError if the batch cannot be shared by that many processes.
    """
    from diffussm.training import micro_batch_of

    model = config.model
    images = micro_batch_of(config, execution, processes)
    fixed, each = saved_bytes(model, config.precision)
    block = fixed + images * each
    stream = 4.0 * images * model.seq_len // model.downsample * model.d_model
    parts = {
        "weights, gradients, average, moments": 5 * 4.0 * parameter_count(model),
        "kept for the backward pass": model.n_blocks
        * (stream if execution.activation_checkpointing else block),
        "one block at work": block
        + (block if execution.activation_checkpointing else 0.0),
        "reserve (assumed)": RESERVE,
    }
    if execution.strategy == "fsdp":
        parts["weights, gradients, average, moments"] /= processes
    return parts | {"total": sum(parts.values())}


PROBE = """
import os, sys, torch, torch.distributed as dist
kind = sys.argv[1]
device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
if kind == "cuda":
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if kind == "cuda" else "gloo")
x = torch.full((1 << 20,), float(dist.get_rank() + 1), device=device)
dist.all_reduce(x)
n = dist.get_world_size()
assert x.min().item() == x.max().item() == n * (n + 1) / 2, "the sum is wrong"
dist.destroy_process_group()
"""


def probe_all_reduce(
    kind: str, processes: int, limit: float = 120.0, program: str = PROBE
) -> str:
    """Let processes add up a tensor, with NCCL (``"cuda"``) or gloo (``"cpu"``), within `limit` seconds.

    Under torchrun it is its processes, on all machines, otherwise `processes` of this one. Returns what to
    report; raises OSError if they fail or hang, and has then ended them.
    """
    begun = time.monotonic()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jobs = []
    if "WORLD_SIZE" in os.environ:
        processes = int(os.environ["WORLD_SIZE"])
        worlds: list[dict[str, str]] = [{}]
    else:
        worlds = [
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            for rank in range(processes)
        ]
    advice = (
        "set NCCL_DEBUG=INFO and try again; if it hangs, NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1 tell which "
        "link is at fault, NCCL_SOCKET_IFNAME names the network to use"
        if kind == "cuda"
        else "set GLOO_SOCKET_IFNAME to the network to use, e.g. lo, and see that no firewall is between them"
    )
    try:
        for world in worlds:
            command = [sys.executable, "-c", program, kind]
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | world
            jobs.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        for job in jobs:
            _, said = job.communicate(
                timeout=max(limit - (time.monotonic() - begun), 0.01)
            )
            if job.returncode != 0:
                last = said.strip().splitlines()[-1:] or ["no message"]
                raise OSError(f"a process failed: {last[0]:.200}; {advice}")
    except subprocess.TimeoutExpired:
        raise OSError(
            f"not all of {processes} finished in {limit:g} s; they were ended. {advice}"
        ) from None
    finally:
        for job in jobs:
            if job.poll() is None:
                job.kill()
                job.communicate()
    return f"{processes} processes added up a tensor with {'NCCL' if kind == 'cuda' else 'gloo'}"


class Finding(NamedTuple):
    """A line of the doctor's report: "pass", "skip" or "FAIL", and what was seen or what to do."""

    what: str
    verdict: str
    told: str


class Skip(Exception):
    """A question that does not arise here."""


def examine(what: str, question: Callable[[], str]) -> Finding:
    """Ask; an answer is a pass, `Skip` a skip, and what goes wrong a FAIL."""
    try:
        return Finding(what, "pass", question())
    except Skip as reason:
        return Finding(what, "skip", str(reason))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        return Finding(
            what, "FAIL", " ".join(str(error).split()) or type(error).__name__
        )


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def _doctor(arguments: Sequence[str]) -> int:
    """see whether this machine can carry out a run, before it starts"""
    parser = _new_parser(
        "doctor", "Look at all that a run needs. Exit code 1 if something fails."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("."), help="where the run will be written"
    )
    parser.add_argument(
        "--vae",
        type=str | None,
        default=None,
        help="autoencoder that decodes the samples",
    )
    parser.add_argument(
        "--weights",
        type=Path | None,
        default=None,
        help="Inception weights, for evaluate",
    )
    parser.add_argument(
        "--reference",
        type=Path | None,
        default=None,
        help="what evaluate compares with",
    )
    parser.add_argument(
        "--processes", type=int, default=0, help="0: as many as there are GPUs, or 2"
    )
    parser.add_argument("--device", type=str | None, default=None, help=DEVICE_HELP)
    parser.add_argument(
        "--limit",
        type=float,
        default=120.0,
        help="seconds that the processes may take to talk",
    )
    parser.add_argument(
        "--quick", action="store_true", help="do not read all of the latents"
    )
    arguments = _with_new_names(arguments)
    _add_recipe(parser, arguments)
    options, given = _parse(parser, arguments)
    if options.processes < 0 or not options.limit > 0:
        raise ValueError("--processes is not negative, and --limit is more than 0")
    config, execution = _recipe_of(options)
    if not _is_latent(config):
        _refuse_idle(given, "for a model of pixels")
    if "WORLD_SIZE" in os.environ:
        _refuse_idle(given, "under torchrun")

    findings = []
    for what, question in doctor_questions(config, execution, options):
        findings.append(examine(what, question))
        line = f"{findings[-1].verdict}  {what}: {findings[-1].told}"
        if _rank() == 0 or findings[-1].verdict == "FAIL":
            print(line, flush=True)
    return int(any(finding.verdict == "FAIL" for finding in findings))


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _first_process_only() -> None:
    """Skip, in all processes but the first, what is the same for all of them."""
    if _rank() > 0:
        raise Skip("the first process looks")


def doctor_questions(
    config: "Recipe", execution: "Execution", options: Any
) -> list[tuple[str, Callable[[], str]]]:
    """What `diffussm doctor` asks, in order; each question returns what it saw, or raises.

    Under torchrun every process asks them, each of its own GPU.
    """
    import torch

    asked = torch.device(
        options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    )
    kind = asked.type
    gpus = torch.cuda.device_count() if kind == "cuda" else 0
    processes = int(os.environ.get("WORLD_SIZE", 0)) or options.processes or gpus or 2
    local = int(os.environ.get("LOCAL_RANK", 0))
    if asked.index is not None and "LOCAL_RANK" in os.environ:
        raise ValueError(
            f"--device {asked} is one GPU for all processes; pass --device cuda, and each takes its own"
        )
    device = (
        torch.device(kind, asked.index or local)
        if kind == "cuda"
        else torch.device(kind)
    )
    return [
        ("GPU", partial(_ask_gpu, device, gpus)),
        ("memory", partial(_ask_memory, config, execution, processes, device)),
        ("bf16", partial(_ask_bf16, config, device)),
        ("processes", partial(probe_all_reduce, kind, processes, options.limit)),
        ("disk", partial(_ask_disk, config, execution, options.out)),
        ("data", partial(_ask_data, config, options.quick)),
        ("autoencoder", partial(_ask_vae, config, options.vae, device)),
        ("Inception", partial(_ask_inception, options.weights)),
        ("reference", partial(_ask_reference, options.reference)),
    ]


def _ask_gpu(device: Any, gpus: int) -> str:
    import torch

    if device.type == "cpu":
        raise Skip("none is used; a CPU is enough for digits and openmoji")
    if not gpus:
        raise OSError(
            "torch sees no GPU; see what nvidia-smi says, and whether torch was built for CUDA"
        )
    if device.index >= gpus:
        raise OSError(
            f"process {device.index} of this machine has no GPU of its own: there are {gpus}"
        )
    mine = range(gpus) if "LOCAL_RANK" not in os.environ else [device.index]
    cards = (torch.cuda.get_device_properties(i) for i in mine)
    return ", ".join(
        f"{card.name} with {_gigabytes(card.total_memory)}" for card in cards
    )


def _ask_memory(
    config: "Recipe", execution: "Execution", processes: int, device: Any
) -> str:
    import torch

    need = memory_needed(config, execution, processes)["total"]
    free = (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else _free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    )
    told = f"{_gigabytes(need)} needed for each of {processes} processes (computed), {_gigabytes(free)} free"
    if need > free:
        raise OSError(
            f"{told}; lower --micro_batch, or pass --activation_checkpointing true or "
            "--strategy fsdp"
        )
    return told


def _ask_bf16(config: "Recipe", device: Any) -> str:
    import torch

    if config.precision != "bf16":
        raise Skip(f"the recipe trains in {config.precision}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise OSError("this GPU has no bf16; train with --precision float32")
    x = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
    if (x @ x).float().sum().item() != 512:
        raise OSError("a product in bf16 is wrong; train with --precision float32")
    return "works"


def checkpoints_kept(config: "Recipe", execution: "Execution") -> int:
    """How many checkpoints lie on the disk at most, while a run writes its last one."""
    every, named = execution.keep_every, execution.keep_steps(config.batch_size)
    kept = {step for step in named if step <= config.steps}
    if every:
        kept |= set(range(every, config.steps + 1, every))
    return (
        len(kept) + execution.keep_last + 1
    )  # one is written before an old one is removed


def _ask_disk(config: "Recipe", execution: "Execution", out: Path) -> str:
    _first_process_only()
    kept = checkpoints_kept(config, execution)
    need = kept * 4 * 4.0 * parameter_count(config.model)
    there = next(
        path for path in (out.absolute(), *out.absolute().parents) if path.is_dir()
    )
    if not os.access(there, os.W_OK):
        raise OSError(f"{there} cannot be written to; choose another --out")
    free = shutil.disk_usage(there).free
    told = f"{_gigabytes(need)} needed for {kept} checkpoints, {_gigabytes(free)} free at {there}"
    if need > free:
        raise OSError(f"{told}; free some, raise --keep_every, or choose another --out")
    return told


def _ask_data(config: "Recipe", quick: bool) -> str:
    from diffussm.latents import LatentStore, verify_store
    from diffussm.training import check_data

    found = open_data(config)  # by every process: each machine must see it
    check_data(found, config)
    _first_process_only()
    told = f"{len(found)} images in {found.num_classes} classes"
    if isinstance(found, LatentStore) and not quick:
        if problems := verify_store(found.path):
            raise OSError("; ".join(problems))
        told += ", every checksum right"
    return told


def _ask_vae(config: "Recipe", name: str | None, device: Any) -> str:
    import torch

    if not _is_latent(config):
        raise Skip("the recipe trains on pixels")
    if name is None:
        raise Skip("say with --vae what decodes the samples")
    found = open_data(config) if config.data else None
    decode, _ = _decoder(name, device, getattr(found, "vae", None))
    shape = (1, config.model.in_channels, config.model.height, config.model.width)
    image = decode(torch.zeros(shape, device=device))
    if not bool(image.isfinite().all()):
        raise ValueError(f"{name} decodes to numbers that are not finite")
    told = (
        f"decodes {shape[2]} x {shape[3]} to {image.shape[2]} x {image.shape[3]} pixels"
    )
    file = Path(name) / VAE_FILE
    known = published(file) if _rank() == 0 and file.is_file() else None
    return f"{told}; its weights are those of {known.url}" if known else told


def _ask_inception(weights: Path | None) -> str:
    """Are these the weights that the scores are defined by?"""
    if weights is None:
        raise Skip("say with --weights where they lie")
    _first_process_only()
    from diffussm import evaluation

    evaluation.check_weights(weights)
    return f"{weights} has the right checksum"


def _ask_reference(reference: Path | None) -> str:
    """Is there something to compare with?"""
    if reference is None:
        raise Skip("say with --reference what evaluate shall compare with")
    _first_process_only()
    if not reference.exists():
        raise FileNotFoundError(f"there is no {reference}")
    known = published(reference) if reference.is_file() else None
    return f"{reference} is {'the published one' if known else 'there'}"


def _free_memory() -> float:
    """Bytes of main memory that are free, by the account of Linux; other systems are not asked."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return 1024.0 * int(line.split()[1])
    raise Skip("this system does not say in /proc/meminfo how much memory is free")


COMMANDS = {
    "vae": _vae,
    "encode": _encode,
    "doctor": _doctor,
    "train": _train,
    "sample": _sample,
    "evaluate": _evaluate,
    "statistics": _statistics,
}


LOG = logging.getLogger(
    "diffussm"
)  # what the package has to say while a bar is shown goes above the bar


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``diffussm``; returns its exit code.

    0 done, 1 refused or failed, 2 bad usage, 75 asked to stop (what is done is saved, start it again), 130
    interrupted.
    """
    if not sys.stderr or not sys.stderr.isatty():
        os.environ.setdefault(
            "TQDM_MININTERVAL", "30"
        )  # seconds between the lines of a progress bar
        os.environ.setdefault("TQDM_MAXINTERVAL", "60")
    from tqdm.contrib.logging import (
        logging_redirect_tqdm,
    )  # it reads them when it is imported

    streams: list[Any] = [
        _Pipe(stream) if stream else None for stream in (sys.stdout, sys.stderr)
    ]
    with (
        redirect_stdout(streams[0]),
        redirect_stderr(streams[1]),
        logging_redirect_tqdm([LOG]),
    ):
        code = _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        for stream in filter(None, streams):
            stream.flush()
    return code


class _Pipe:
    """A stream of output whose reader may leave, as in ``diffussm train ... | head``.

    What is written from then on goes nowhere, and the command does its work to the end.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except BrokenPipeError:
            self._close()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._close()

    def _close(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(
            nowhere, self._stream.fileno()
        )  # what Python still holds for it goes there too
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _dispatch(arguments: list[str]) -> int:
    commands = "\n".join(
        f"  {name:<12}{command.__doc__}" for name, command in COMMANDS.items()
    )
    usage = f"usage: diffussm COMMAND [options]    (diffussm COMMAND --help lists the options)\n\n{commands}"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0
    if arguments[0] == "--version":
        print(f"diffussm {__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        print(f"diffussm: there is no command {name!r}\n{usage}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[name](arguments[1:])
    except SystemExit as stop:  # jsonargparse has printed its own message
        return stop.code if isinstance(stop.code, int) else 2
    except (Exception, KeyboardInterrupt) as error:
        if _sentence(error) is None:
            raise
        return _report(name, error)


def _sentence(error: BaseException) -> str | None:
    """What to tell whoever typed the command; None for an error that is a bug of ours."""
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {error}" if error.args else "interrupted"
    if isinstance(
        error, ValueError | OSError | ImportError | FloatingPointError | MemoryError
    ):
        return str(error)
    lost = (
        "out of memory",
        "can't allocate memory",
    )  # torch has no class of its own for this on a CPU
    if isinstance(error, RuntimeError) and any(words in str(error) for words in lost):
        return "out of memory; take a smaller batch (train: --micro_batch), see doctor"
    return None


def _report(command: str, error: BaseException) -> int:
    """Say on the error stream what went wrong, a bug with its traceback; returns the exit code."""
    told = _sentence(error)
    if told is None:
        traceback.print_exception(error)
    process = f" [process {_rank()}]" if _rank() else ""
    begun = "\n" * isinstance(
        error, KeyboardInterrupt
    )  # the terminal shows ^C without a new line
    print(
        f"{begun}diffussm {command}{process}: {told or repr(error)}",
        file=sys.stderr,
        flush=True,
    )
    return 130 if isinstance(error, KeyboardInterrupt) else 1
