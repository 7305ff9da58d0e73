"""ImageNet, command by command.

Generated from book/14_imagenet.md by `make export`: edit there.
"""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import cache, partial
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jsonargparse import ArgumentParser

if TYPE_CHECKING:
    from torch import Tensor

    from diffussm.data import Dataset
    from diffussm.model import DiffuSSM
    from diffussm.training import TrainConfig

__all__ = [
    "recipe_files",
    "read_recipe",
    "DEVICE_HELP",
    "open_data",
    "parameter_count",
    "MARGIN",
    "save_grid",
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
    "COMMANDS",
    "main",
]


def recipe_files() -> dict[str, Path]:
    """The YAML files that come with the package, by name."""
    found = Path(str(files("diffussm"))) / "configs"
    return {file.stem: file for file in sorted(found.glob("*.yaml"), key=lambda file: file.stem)}


def read_recipe(name: str) -> "TrainConfig":
    """The configuration of a training run: the name of a recipe that comes with the package, or a YAML file.

    Raises ValueError or OSError for a file that is none: unknown keys, wrong types, impossible values.
    """
    import yaml

    from diffussm.training import TrainConfig

    known = recipe_files()
    file = known.get(name) or Path(name)
    if not file.is_file():
        raise ValueError(f"there is no recipe {name!r}; give a YAML file, or one of {', '.join(known)}")
    try:
        text = file.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError("it has aliases (*name), which a recipe does not need")
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{file} is no recipe; expected lines such as 'steps: 1000' and a 'model:' section")
    types = {field.name: field.type for field in fields(TrainConfig)}
    for key, value in values.items():
        kind = types.get(key)
        if kind is float and type(value) is int:
            values[key] = float(value) if abs(value) < 2**53 else math.inf
        elif kind in (int, float, bool, str) and type(value) is not kind:
            hint = "; YAML wants a point in such a number, as in 1.0e-4" if kind is float else ""
            raise ValueError(f"{file}: {key} is {value!r:.60}, expected {kind.__name__}{hint}")
    try:
        return TrainConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


DEVICE_HELP = "e.g. cpu or cuda; default: a GPU if there is one"


def _new_parser(command: str, description: str) -> ArgumentParser:
    # without abbreviations, or a mistyped --model.d_mode would be taken for --model.d_model
    return ArgumentParser(prog=f"diffussm {command}", description=description, allow_abbrev=False)


def _vae(arguments: Sequence[str]) -> int:
    """train a small autoencoder on a folder of images"""
    parser = _new_parser(
        "vae", "Train the small autoencoder of chapter 10, for data of one's own or a rehearsal."
    )
    parser.add_argument("images", type=Path, help="folder of images, or an LMDB")
    parser.add_argument("out", type=Path, help="folder to write, which --vae then takes")
    parser.add_argument("--size", type=int, default=64, help="images are cropped to size x size")
    parser.add_argument("--steps", type=int, default=380)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(list(arguments))
    images, out = options.images, options.out
    if min(options.size, options.steps, options.batch_size) < 1 or not 0 < options.lr < 1 or options.seed < 0:
        raise ValueError(
            "--size, --steps and --batch_size are at least 1, --lr lies in (0, 1), --seed is not negative"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists; choose a new folder for the autoencoder")

    from diffussm.latents import images_from, train_vae
    from diffussm.model import apply_umask

    source = images_from(images, options.size)
    vae = train_vae(
        source,
        steps=options.steps,
        batch_size=min(options.batch_size, len(source)),
        crop=min(32, options.size),
        lr=options.lr,
        seed=options.seed,
    )
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    vae.save_pretrained(draft)
    for file in draft.glob("*.safetensors"):
        apply_umask(file)
    draft.replace(out)
    print(f"wrote {out}: an autoencoder with a scaling factor of {vae.config.scaling_factor}")
    return 0


def _encode(arguments: Sequence[str]) -> int:
    """store the latents of a folder of images (or an LMDB)"""
    parser = _new_parser("encode", "Encode images once; also under torchrun. The same command again goes on.")
    parser.add_argument("data", type=Path, help="class folders as in ImageNet, a plain folder, or an LMDB")
    parser.add_argument("out", type=Path, help="folder of the latent store")
    parser.add_argument(
        "--vae", type=str, required=True, help="folder of an AutoencoderKL, or its name on the hub"
    )
    parser.add_argument("--size", type=int, required=True, help="images are cropped to size x size pixels")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--shard_size", type=int, default=8192, help="images per file")
    parser.add_argument("--no_flip", action="store_true", help="leave the mirrored images out")
    parser.add_argument(
        "--no_classes", action="store_true", help="take sub-folders for folders, not for classes"
    )
    parser.add_argument("--verify", action="store_true", help="read all of it again and compare checksums")
    parser.add_argument("--device", type=str | None, default=None, help=DEVICE_HELP)
    options = parser.parse_args(list(arguments))
    if min(options.size, options.batch_size, options.shard_size) < 1:
        raise ValueError("--size, --batch_size and --shard_size are at least 1")

    from diffussm.latents import LatentStore, encode, images_from, load_vae, verify_store

    source = images_from(options.data, options.size, conditional=False if options.no_classes else None)
    out = options.out
    with _cluster("encode", options.device, stoppable=False) as world:  # a kill costs a shard
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
        )
        world.barrier()  # until every process has done its share
        store = LatentStore(out)
        if world.rank == 0:
            skipped = sum(len(shard["skipped"]) for shard in store.manifest["shards"])
            held = f"{len(store)} images in {store.num_classes} classes"
            print(f"{out} holds the latents of {held}; {skipped} skipped")
        if options.verify:
            problems = world.once(partial(verify_store, out))
            if problems:
                raise ValueError("; ".join(problems))
            if world.rank == 0:
                print(f"every file of {out} is as it was written")
    return 0


def _cluster(command: str, device: str | None, *, stoppable: bool = True) -> Any:
    """The processes of a command; ValueError for a device that there is not."""
    import torch

    from diffussm.distributed import Cluster

    try:
        kind = torch.device(device or "cpu").type
    except RuntimeError:
        raise ValueError(f"--device {device}: no such kind of device; try cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device {device}: this machine has no GPU that torch can use; see diffussm doctor"
        )
    return Cluster(device, stoppable=stoppable, report=partial(_report, command))


def open_data(config: "TrainConfig") -> "Dataset":
    """What `config.data` names: the digits, a latent store, or images (a folder, or an LMDB).

    Raises ValueError or OSError for what does not exist, is damaged, or cannot be what the model takes.
    """
    from diffussm.latents import LatentStore, images_from
    from diffussm.training import load_dataset

    latents = config.model.in_channels not in (1, 3)
    if config.data == "digits":
        return load_dataset(config)
    if not config.data:
        what = "the folder that diffussm encode has written" if latents else "a folder of images"
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


def _train(arguments: Sequence[str]) -> int:
    """train a model from a recipe, or resume it"""
    from diffussm.distributed import EXIT_PREEMPTED
    from diffussm.training import (
        Preempted,
        TrainConfig,
        check_data,
        micro_batch_of,
        open_run,
        train,
        whole_ema,
    )

    names = ", ".join(recipe_files())
    parser = _new_parser(
        "train", "Train a model, also under torchrun; the same command again resumes a killed run."
    )
    parser.add_argument("recipe", type=str, help=f"what to train: a YAML file, or one of {names}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--vae", type=str | None, default=None, help="autoencoder, to draw samples of latents"
    )
    parser.add_argument("--tensorboard", action="store_true", help="write RUN/tensorboard besides the log")
    parser.add_argument("--device", type=str | None, default=None, help=DEVICE_HELP)
    parser.add_argument("--no_grid", action="store_true", help="draw no samples at the end")
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(TrainConfig, help="options of the recipe")
    if arguments and not arguments[0].startswith("-"):  # it decides the defaults of all other options
        parser.set_defaults(asdict(read_recipe(arguments[0])))
    elif not {"-h", "--help"} & set(arguments):
        raise ValueError(
            f"name what to train first, as in: diffussm train digits --out RUN; there are {names}"
        )
    options = parser.instantiate(parser.parse_args(list(arguments)))
    config = TrainConfig(**{field.name: options[field.name] for field in fields(TrainConfig)})
    out = options.out
    pixels = config.model.in_channels in (1, 3)
    if config.sample_every and not pixels and options.vae is None:
        raise ValueError(
            f"sample_every={config.sample_every}: to draw latents, say with --vae what decodes them"
        )
    writer = _tensorboard() if options.tensorboard else None
    data = open_data(config)

    with _cluster("train", options.device) as world:
        decode = _decoder(options.vae, world.device, getattr(data, "vae", None))[0] if options.vae else None

        def claim() -> None:  # every reason to refuse comes before the first file
            micro_batch_of(config, world.size)
            check_data(data, config)
            open_run(out, config, data)
            if hasattr(data, "vae"):
                (out / "vae.json").write_text(json.dumps(data.vae, indent=2) + "\n")
            (out / "preempted").unlink(missing_ok=True)

        def draw(model: "DiffuSSM", step: int) -> None:
            picture = out / "samples" / f"step_{step:08d}.png"
            picture.parent.mkdir(exist_ok=True)
            draw_grid(model, config, picture, decode=decode, progress=False)

        def log(row: dict[str, Any]) -> None:
            if board is not None:
                for name, value in row.items():
                    if value is not None:
                        board.add_scalar(name, value, row["step"])
            print(
                f"step {row['step']} of {config.steps}: loss {row['loss']:.4f}, "
                f"{row['images_per_second']:.1f} images/s, {_duration(row['seconds_left'])} left",
                flush=True,
            )

        world.once(claim)
        board = writer(str(out / "tensorboard")) if writer and world.rank == 0 else None
        if world.rank == 0:
            print(
                f"{parameter_count(config.model) / 1e6:.1f} million parameters, {len(data)} images",
                flush=True,
            )
        try:
            state = train(config, out, world=world, dataset=data, on_log=log, on_samples=draw)
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
            print(f"{state.step} steps done; the log is {out / 'log.jsonl'}, the weights are beside it")
        if (pixels or decode) and not options.no_grid:
            ema, picture = whole_ema(state, world), out / "samples.png"
            world.once(lambda: draw_grid(ema, config, picture, decode=decode))
            if world.rank == 0:
                print(f"a grid of samples is in {picture}")
    return 0


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:.0f} s"


def _tensorboard() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"--tensorboard needs the package tensorboard ({error}); leave the option away"
        ) from None
    return SummaryWriter


def _decoder(
    vae_name: str, device: Any, made_by: dict[str, Any] | None
) -> "tuple[Callable[[Tensor], Tensor], dict[str, Any]]":
    """Latents to images with this autoencoder, and which it is; ValueError if another encoder made them."""
    from diffussm.latents import check_encoder, decode, load_vae, vae_identity

    vae = load_vae(vae_name, device)
    identity = vae_identity(vae, vae_name)
    if made_by is not None:
        check_encoder(made_by, identity, "the latents of this model")
    return partial(decode, vae), identity


@cache
def parameter_count(config: Any) -> int:
    """The number of parameters of a `DiffuSSMConfig`; nothing is allocated."""
    import torch

    from diffussm.model import DiffuSSM

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DiffuSSM(config).parameters())


MARGIN = 2  # white pixels around each image of a grid


def save_grid(images: "Tensor", columns: int, path: Path) -> None:
    """Write images (n, C, H, W) in [-1, 1], C = 1 or 3, row by row as one PNG; small ones are enlarged."""
    from einops import rearrange
    from PIL import Image
    from torch.nn import functional

    n, channels, height, _ = images.shape
    if channels not in (1, 3):
        raise ValueError(f"these samples have {channels} channels: latents; say with --vae what decodes them")
    if n % columns:
        raise ValueError(f"{n} images do not fill rows of {columns}")
    scale = max(1, math.ceil(48 / height))
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
    pixels = pixels.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    pixels = functional.pad(pixels, (MARGIN,) * 4, value=255)
    grid = rearrange(pixels, "(r k) c h w -> (r h) (k w) c", k=columns).cpu().numpy()
    Image.fromarray(grid.squeeze(-1) if channels == 1 else grid).save(path)


def draw_grid(
    model: "DiffuSSM",
    config: "TrainConfig",
    picture: Path,
    *,
    count: int = 8,
    steps: int = 50,
    method: str = "ddim",
    cfg_scale: float = 1.5,
    guidance_channels: int | None = None,
    classes: Sequence[int] | None = None,
    seed: int = 0,
    decode: "Callable[[Tensor], Tensor] | None" = None,
    progress: bool = True,
) -> None:
    """Draw `count` samples for each class (None: the first ten), a class to a row; `decode`: for latents."""
    import torch

    from diffussm.sampling import sample
    from diffussm.training import diffusion_of, stream

    if classes is None:
        classes = range(min(config.model.num_classes, 10) or 1)
    where = next(model.parameters()).device
    shape = (config.model.in_channels, config.model.height, config.model.width)
    generator = stream(seed, "grid", 0)
    noise = torch.randn(len(classes) * count, *shape, generator=generator).to(where)
    conditional = model.null_label is not None
    labels = torch.tensor(classes).repeat_interleave(count).to(where) if conditional else None
    images = sample(
        model,
        diffusion_of(config),
        labels,
        steps=steps,
        method=method,
        cfg_scale=cfg_scale if conditional else 1.0,
        guidance_channels=guidance_channels,
        generator=generator,
        noise=noise,
        clip_denoised=decode is None,  # pixels end at -1 and 1, latents do not
        progress=progress,
    ).float()
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
    from diffussm.distributed import EXIT_PREEMPTED, SAMPLE_PRESETS, SampleConfig, draw_samples
    from diffussm.training import Preempted, diffusion_of, find_checkpoint, load_run

    parser = _new_parser(
        "sample",
        "Draw a grid of images, one row per class (--grid), or a set of them (--out), from a run. "
        "A set is resumed by the same command, and does not depend on the number of processes.",
    )
    parser.add_argument("--from", type=Path, required=True, help="folder of the run")
    parser.add_argument("--vae", type=str | None, default=None, help="autoencoder, for a run on latents")
    parser.add_argument("--grid", type=Path | None, default=None, help="a PNG file to write")
    parser.add_argument("--out", type=Path | None, default=None, help="a folder of PNG files, or a .npz file")
    parser.add_argument("--classes", type=str, default="all", help="for a grid: numbers or names, or 'all'")
    parser.add_argument("--per_class", type=int, default=8, help="for a grid: images per class")
    parser.add_argument(
        "--weights", type=Literal["ema", "model"], default="ema", help="moving average or raw"
    )
    parser.add_argument("--device", type=str | None, default=None, help=DEVICE_HELP)
    parser.add_argument("--overwrite", action="store_true", help="replace the grid if it exists")
    parser.add_argument("--preset", type=Literal[tuple(SAMPLE_PRESETS)], default="paper-fid")
    parser.add_class_arguments(SampleConfig, help="options of the preset", skip={"classes"})
    words = list(arguments)
    name = next((b for a, b in pairwise(words) if a == "--preset"), "paper-fid")
    name = next((word.partition("=")[2] for word in words if word.startswith("--preset=")), name)
    preset = asdict(SAMPLE_PRESETS.get(name, SampleConfig()))
    parser.set_defaults({key: value for key, value in preset.items() if key != "classes"})
    options = parser.instantiate(parser.parse_args(words))
    known = (field.name for field in fields(SampleConfig) if field.name != "classes")
    config = SampleConfig(**{name: options[name] for name in known})
    run, grid, out = options["from"], options.grid, options.out
    if (grid is None) == (out is None):
        raise ValueError("give either --grid FILE.png, for a picture, or --out, for a set of images")
    if options.per_class < 1:
        raise ValueError(f"--per_class {options.per_class}: draw at least one image per class")
    if grid is not None and grid.suffix.lower() != ".png":
        raise ValueError(f"--grid {grid}: the picture is a PNG; give a name that ends in .png")
    if grid is not None and grid.exists() and not options.overwrite:
        raise ValueError(f"{grid} exists; give another name, or --overwrite")
    target = grid or out
    if not target.parent.is_dir():
        raise ValueError(f"{target}: the folder {target.parent} does not exist")

    with _cluster("sample", options.device, stoppable=grid is None) as world:
        model, trained, names = load_run(run, options.weights)
        classes = None
        if grid is not None and model.null_label is not None:
            classes = parse_classes(options.classes, names)
        record = run / "vae.json"
        made_by = json.loads(record.read_text()) if record.is_file() else None
        latents = made_by is not None or model.config.in_channels not in (1, 3)
        if latents and options.vae is None:
            source = f", {made_by['name']}" if made_by else ""
            raise ValueError(f"{run} was trained on latents; say with --vae what made them{source}")
        if options.vae is not None and not latents:
            raise ValueError(f"{run} was trained on pixels; leave --vae away")
        decode, decoder = _decoder(options.vae, world.device, made_by) if latents else (None, None)
        model = model.to(world.device).eval()
        if grid is not None:
            if world.rank == 0:
                draw_grid(
                    model,
                    trained,
                    grid,
                    count=options.per_class,
                    steps=config.steps,
                    method=config.method,
                    cfg_scale=config.cfg_scale,
                    guidance_channels=config.guidance_channels,
                    classes=classes,
                    seed=config.seed,
                    decode=decode,
                )
                print(f"wrote {grid}")
            return 0
        checkpoint = find_checkpoint(run)
        assert checkpoint is not None  # load_run has found it
        facts = {"weights": options.weights, "checkpoint": checkpoint.name, "ema_decay": trained.ema_decay}
        if decoder is not None:
            facts["vae"] = {key: decoder[key] for key in ("name", "encoder_sha256", "decoder_sha256")}
        try:
            draw_samples(model, diffusion_of(trained), config, out, world=world, facts=facts, decode=decode)
        except Preempted as stop:
            if world.rank == 0:
                print(f"{stop}; the same command draws the others", file=sys.stderr)
            return EXIT_PREEMPTED
        if world.rank == 0:
            print(f"wrote {config.count} images to {out}")
    return 0


def _evaluate(arguments: Sequence[str]) -> int:
    """score a set of samples: FID, sFID, IS, precision, recall"""
    parser = _new_parser("evaluate", "Compare samples with a reference by ADM's protocol (chapter 12).")
    parser.add_argument(
        "samples",
        type=Path,
        nargs="*",
        help="folders of PNG files or .npz files; several: drawn with other seeds",
    )
    parser.add_argument("--reference", type=Path | None, default=None, help="a folder, a .npz, or statistics")
    parser.add_argument("--weights", type=Path | None, default=None, help="Inception's weights, a file")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--out", type=Path | None, default=None, help="a .json file to write")
    parser.add_argument("--device", type=str | None, default=None, help=DEVICE_HELP)
    parser.add_argument(
        "--self_test", "--self-test", action="store_true", help="check the metrics, and nothing else"
    )
    options = parser.parse_args(list(arguments))

    samples = options.samples or []
    if not options.self_test and (not samples or options.reference is None):
        raise ValueError("give SAMPLES and --reference, or --self-test alone")
    _check_new(options.out, ".json")

    from diffussm import evaluation

    if options.self_test:
        try:
            evaluation.self_test()
        except AssertionError as error:
            raise ValueError(f"the metrics are wrong here: {error}") from error
        print("the metrics give what they must on data with known answers")
        return 0
    result = evaluation.evaluate(
        samples if len(samples) > 1 else samples[0],
        options.reference,
        weights=options.weights,
        batch_size=options.batch_size,
        device=options.device or _default_device(),
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
    parser = _new_parser("statistics", "Store what evaluate needs to know of a reference (chapter 12).")
    parser.add_argument("data", type=Path, help="a folder of images, or a .npz file")
    parser.add_argument("out", type=Path, help="the .npz file to write")
    parser.add_argument("--weights", type=Path | None, default=None, help="Inception's weights, a file")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", type=str | None, default=None, help=DEVICE_HELP)
    options = parser.parse_args(list(arguments))
    _check_new(options.out, ".npz")

    from diffussm import evaluation

    evaluation.save_statistics(
        options.data,
        options.out,
        weights=options.weights,
        batch_size=options.batch_size,
        device=options.device or _default_device(),
    )
    print(f"wrote {options.out}")
    return 0


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


def _inception(weights: Path | None) -> str:
    """For the doctor: are these the weights that the scores are defined by?"""
    if weights is None:
        raise Skip("say with --weights where they lie")
    from diffussm import evaluation

    evaluation.check_weights(weights)
    return f"{weights} has the right checksum"


def _reference(reference: Path | None) -> str:
    """For the doctor: is there something to compare with?"""
    if reference is None:
        raise Skip("say with --reference what evaluate shall compare with")
    if not reference.exists():
        raise FileNotFoundError(f"there is no {reference}")
    return f"{reference} is there"


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
            own = {parameter.untyped_storage()._cdata for parameter in block.parameters()}
            x = torch.zeros(images, places, model.d_model, requires_grad=True)
            c = torch.zeros(images, model.d_model)
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast:
                block(x, c)
        return sum(storage.nbytes() for key, storage in storages.items() if key not in own)

    one, two = kept(1), kept(2)
    return float(max(2 * one - two, 0)), float(two - one)


RESERVE = 2e9  # bytes; assumed: what CUDA, NCCL and the allocator's gaps take


def memory_needed(config: "TrainConfig", processes: int = 1) -> dict[str, float]:
    """Bytes that each process needs to train, by use, and their sum as "total"; computed, not measured.

    Raises ValueError if the batch cannot be shared by that many processes.
    """
    from diffussm.training import micro_batch_of

    model = config.model
    images = micro_batch_of(config, processes)
    fixed, each = saved_bytes(model, config.precision)
    block = fixed + images * each
    stream = 4.0 * images * model.seq_len // model.downsample * model.d_model
    parts = {
        "weights, gradients, average, moments": 5 * 4.0 * parameter_count(model),
        "kept for the backward pass": model.n_blocks * (stream if config.recompute else block),
        "one block at work": block + (block if config.recompute else 0.0),
        "reserve (assumed)": RESERVE,
    }
    if config.parallel == "fsdp":
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


def probe_all_reduce(kind: str, processes: int, limit: float = 120.0, program: str = PROBE) -> str:
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
                    command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
                )
            )
        for job in jobs:
            _, said = job.communicate(timeout=max(limit - (time.monotonic() - begun), 0.01))
            if job.returncode != 0:
                last = said.strip().splitlines()[-1:] or ["no message"]
                raise OSError(f"a process failed: {last[0]:.200}; {advice}")
    except subprocess.TimeoutExpired:
        raise OSError(
            f"{processes} processes did not finish in {limit:g} s, and were ended; {advice}"
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
        return Finding(what, "FAIL", " ".join(str(error).split()) or type(error).__name__)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def _doctor(arguments: Sequence[str]) -> int:
    """see whether this machine can carry out a run, before it starts"""
    parser = _new_parser("doctor", "Look at all that a run needs. Exit code 1 if something fails.")
    parser.add_argument("recipe", type=str, help="as for train")
    parser.add_argument("--data", type=str | None, default=None, help="as for train")
    parser.add_argument("--out", type=Path, default=Path("."), help="where the run will be written")
    parser.add_argument("--vae", type=str | None, default=None, help="autoencoder that decodes the samples")
    parser.add_argument("--weights", type=Path | None, default=None, help="Inception weights, for evaluate")
    parser.add_argument("--reference", type=Path | None, default=None, help="what evaluate compares with")
    parser.add_argument("--processes", type=int, default=0, help="0: as many as there are GPUs, or 2")
    parser.add_argument("--micro_batch", type=int | None, default=None, help="as for train")
    parser.add_argument("--recompute", type=bool | None, default=None, help="as for train")
    parser.add_argument("--parallel", type=str | None, default=None, help="as for train")
    parser.add_argument("--device", type=str | None, default=None, help=DEVICE_HELP)
    parser.add_argument(
        "--limit", type=float, default=120.0, help="seconds that the processes may take to talk"
    )
    parser.add_argument("--quick", action="store_true", help="do not read all of the latents")
    options = parser.parse_args(list(arguments))
    if options.processes < 0 or not options.limit > 0:
        raise ValueError("--processes is not negative, and --limit is more than 0")
    from dataclasses import replace

    config = read_recipe(options.recipe)
    for name in ("data", "micro_batch", "recompute", "parallel"):
        if options[name] is not None:
            config = replace(config, **{name: options[name]})

    findings = []
    for what, question in doctor_questions(config, options):
        findings.append(examine(what, question))
        line = f"{findings[-1].verdict}  {what}: {findings[-1].told}"
        if int(os.environ.get("RANK", 0)) == 0 or findings[-1].verdict == "FAIL":
            print(line, flush=True)
    return int(any(finding.verdict == "FAIL" for finding in findings))


def doctor_questions(config: "TrainConfig", options: Any) -> list[tuple[str, Callable[[], str]]]:
    """What `diffussm doctor` asks, in order; each question returns what it saw, or raises."""
    import torch

    kind = (options.device or ("cuda" if torch.cuda.is_available() else "cpu")).split(":")[0]
    gpus = torch.cuda.device_count() if kind == "cuda" else 0
    processes = int(os.environ.get("WORLD_SIZE", 0)) or options.processes or gpus or 2
    latents = config.model.in_channels not in (1, 3)

    def gpu() -> str:
        if kind == "cpu":
            raise Skip("none is used; a CPU is enough for digits and openmoji")
        if not gpus:
            raise OSError("torch sees no GPU; see what nvidia-smi says, and whether torch was built for CUDA")
        named = (torch.cuda.get_device_properties(i) for i in range(gpus))
        return ", ".join(f"{card.name} with {_gigabytes(card.total_memory)}" for card in named)

    def memory() -> str:
        need = memory_needed(config, processes)["total"]
        free = torch.cuda.mem_get_info()[0] if gpus else _free_memory() / processes
        told = (
            f"{_gigabytes(need)} needed for each of {processes} processes (computed), {_gigabytes(free)} free"
        )
        if need > free:
            raise OSError(f"{told}; lower --micro_batch, or pass --recompute true or --parallel fsdp")
        return told

    def bf16() -> str:
        if config.precision != "bf16":
            raise Skip(f"the recipe trains in {config.precision}")
        if gpus and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise OSError("this GPU has no bf16; train with --precision float32")
        x = torch.ones(8, 8, dtype=torch.bfloat16, device=kind)
        if (x @ x).float().sum().item() != 512:
            raise OSError("a product in bf16 is wrong; train with --precision float32")
        return "works"

    def disk() -> str:
        kept = config.keep_last + 1 + (config.steps // config.keep_every if config.keep_every else 0)
        need = kept * 4 * 4.0 * parameter_count(config.model)
        there = next(
            path for path in (options.out.absolute(), *options.out.absolute().parents) if path.is_dir()
        )
        if not os.access(there, os.W_OK):
            raise OSError(f"{there} cannot be written to; choose another --out")
        free = shutil.disk_usage(there).free
        told = f"{_gigabytes(need)} needed for {kept} checkpoints, {_gigabytes(free)} free at {there}"
        if need > free:
            raise OSError(f"{told}; free some, raise --keep_every, or choose another --out")
        return told

    def data() -> str:
        from diffussm.latents import LatentStore, verify_store
        from diffussm.training import check_data

        found = open_data(config)
        check_data(found, config)
        told = f"{len(found)} images in {found.num_classes} classes"
        if isinstance(found, LatentStore) and not options.quick:
            if problems := verify_store(found.path):
                raise OSError("; ".join(problems))
            told += ", every checksum right"
        return told

    def vae() -> str:
        if not latents:
            raise Skip("the recipe trains on pixels")
        if options.vae is None:
            raise Skip("say with --vae what decodes the samples")
        found = open_data(config) if config.data else None
        decode, _ = _decoder(options.vae, kind, getattr(found, "vae", None))
        shape = (1, config.model.in_channels, config.model.height, config.model.width)
        image = decode(torch.zeros(shape, device=kind))
        if not bool(image.isfinite().all()):
            raise ValueError(f"{options.vae} decodes to numbers that are not finite")
        return f"decodes {shape[2]} x {shape[3]} to {image.shape[2]} x {image.shape[3]} pixels"

    return [
        ("GPU", gpu),
        ("memory", memory),
        ("bf16", bf16),
        ("processes", lambda: probe_all_reduce(kind, processes, options.limit)),
        ("disk", disk),
        ("data", data),
        ("autoencoder", vae),
        ("Inception", partial(_inception, options.weights)),
        ("reference", partial(_reference, options.reference)),
    ]


def _free_memory() -> float:
    """Bytes of main memory that are free, by the system's own account."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024.0 * int(line.split()[1])
    raise Skip("the system does not say how much memory is free")


COMMANDS = {
    "vae": _vae,
    "encode": _encode,
    "doctor": _doctor,
    "train": _train,
    "sample": _sample,
    "evaluate": _evaluate,
    "statistics": _statistics,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``diffussm``; returns its exit code.

    0 done, 1 refused or failed, 2 bad usage, 75 asked to stop (the run is saved, start it again), 130
    interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = "\n".join(f"  {name:<12}{command.__doc__}" for name, command in COMMANDS.items())
    usage = f"usage: diffussm COMMAND [options]    (diffussm COMMAND --help lists the options)\n\n{commands}"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        print(f"diffussm: there is no command {name!r}\n{usage}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[name](arguments[1:])
    except SystemExit as stop:  # jsonargparse has printed its own message
        return stop.code if isinstance(stop.code, int) else 2
    except BaseException as error:
        return _report(name, error)


def _report(command: str, error: BaseException) -> int:
    """Print what made a command fail, and return its exit code; raises what nobody foresaw."""
    rank = int(os.environ.get("RANK", 0))
    who = f"diffussm {command}" + (f" [process {rank}]" if rank else "")
    told = str(error)
    if isinstance(error, KeyboardInterrupt):
        print(f"\n{who}: interrupted; the same command goes on", file=sys.stderr)
        return 130
    if isinstance(error, RuntimeError) and ("out of memory" in told or "can't allocate memory" in told):
        told = "out of memory; take a smaller batch (train: --micro_batch), see doctor"
    elif not isinstance(error, ValueError | OSError | ImportError | FloatingPointError | MemoryError):
        raise error
    print(f"{who}: {told}", file=sys.stderr)
    return 1
