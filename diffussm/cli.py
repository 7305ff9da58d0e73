"""The command line.

Generated from book/14_imagenet.md by `make export`: edit there.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser

if TYPE_CHECKING:
    from torch import Tensor

    from diffussm.model import DiffuSSM
    from diffussm.training import TrainConfig

__all__ = ["MARGIN", "DEVICE_HELP", "save_grid", "draw_grid", "parse_classes", "COMMANDS", "main"]

MARGIN = 2  # white pixels around each image of a grid
DEVICE_HELP = "e.g. cpu or cuda; default: a GPU if there is one"


def _train(arguments: Sequence[str]) -> int:
    """train a model from a recipe, or resume it"""
    from diffussm.training import RECIPES, TrainConfig

    parser = ArgumentParser(
        prog="diffussm train",
        description="Train a model, also under torchrun; the same command again resumes a killed run.",
        allow_abbrev=False,  # or a mistyped --model.d_mode would be taken for --model.d_model
    )
    parser.add_argument("recipe", type=Literal[tuple(RECIPES)], help=f"what to train: {', '.join(RECIPES)}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--device", type=str | None, default=None, help=DEVICE_HELP)
    parser.add_argument("--no_grid", action="store_true", help="draw no samples at the end")
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(TrainConfig, help="options of the recipe")
    # The recipe decides the defaults of all other options, so it has to be known before the parser runs.
    name = next((word for word in arguments if word in RECIPES), None)
    if name is not None:
        parser.set_defaults(asdict(RECIPES[name]))
    options = parser.instantiate_classes(parser.parse_args(list(arguments)))
    config = TrainConfig(**{field.name: options[field.name] for field in fields(TrainConfig)})

    from diffussm.distributed import EXIT_PREEMPTED, Cluster
    from diffussm.training import Preempted, train

    def draw(model: "DiffuSSM", step: int) -> None:
        picture = out / "samples" / f"step_{step:08d}.png"
        picture.parent.mkdir(exist_ok=True)
        draw_grid(model, config, picture, count=8, steps=50, method="ddim", cfg_scale=1.5, progress=False)

    out = options.out
    with Cluster(options.device) as world:
        marker = out / "preempted"
        world.once(lambda: marker.unlink(missing_ok=True))
        try:
            state = train(config, out, world=world, on_samples=draw)
        except Preempted as stop:
            told = f"{stop}; the same command goes on from there"
            world.once(lambda: marker.write_text(told + "\n"))
            if world.rank == 0:
                print(told, file=sys.stderr)
            return EXIT_PREEMPTED
        if world.rank == 0:
            print(f"{state.step} steps done; the log is {out / 'log.jsonl'}, the weights are beside it")
            if config.model.in_channels in (1, 3) and not options.no_grid:
                picture = out / "samples.png"
                draw_grid(state.ema, config, picture, count=8, steps=50, method="ddim", cfg_scale=1.5)
                print(f"a grid of samples is in {picture}")
    return 0


def save_grid(images: "Tensor", columns: int, path: Path) -> None:
    """Write images (n, C, H, W) in [-1, 1], C = 1 or 3, row by row as one PNG; small ones are enlarged."""
    from einops import rearrange
    from PIL import Image
    from torch.nn import functional

    n, channels, height, _ = images.shape
    if channels not in (1, 3):
        raise ValueError(
            f"these samples have {channels} channels: latents, which an autoencoder must decode first"
        )
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
    count: int,
    steps: int,
    method: str,
    cfg_scale: float,
    classes: Sequence[int] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Draw `count` samples for each class (None: the first ten), a class to a row."""
    import torch

    from diffussm.sampling import sample
    from diffussm.training import diffusion_of

    if classes is None:
        classes = range(min(config.model.num_classes, 10) or 1)
    where = next(model.parameters()).device
    shape = (config.model.in_channels, config.model.height, config.model.width)
    generator = torch.Generator().manual_seed(seed)
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
        generator=generator,
        noise=noise,
        clip_denoised=True,
        progress=progress,
    )
    save_grid(images.float().cpu(), count, picture)


def parse_classes(words: str, names: Sequence[str]) -> list[int]:
    """``"all"``, or numbers or names separated by commas, as class numbers; ValueError names what is none."""
    if words == "all":
        return list(range(len(names)))
    chosen = []
    for word in (word.strip() for word in words.split(",")):
        if word in names:
            chosen.append(list(names).index(word))
        elif word.isdecimal() and int(word) < len(names):
            chosen.append(int(word))
        else:
            known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise ValueError(
                f"--classes {words}: {word!r} is no class of this model; its {len(names)} are {known}"
            )
    return chosen


def _sample(arguments: Sequence[str]) -> int:
    """draw images from a trained run: a grid to look at, or a set to be scored"""
    from diffussm.distributed import SAMPLE_PRESETS, Cluster, SampleConfig, draw_samples
    from diffussm.training import diffusion_of, find_checkpoint, load_run

    parser = ArgumentParser(
        prog="diffussm sample",
        description="Draw a grid of images, one row per class (--grid), or a set of them (--out), from a run. "
        "A set is resumed by the same command, and does not depend on the number of processes.",
        allow_abbrev=False,
    )
    parser.add_argument("--from", type=Path, required=True, help="folder of the run")
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
    parser.add_class_arguments(SampleConfig, help="options of the preset")
    words = list(arguments)
    name = next((b for a, b in pairwise(words) if a == "--preset"), "paper-fid")
    name = next((word.partition("=")[2] for word in words if word.startswith("--preset=")), name)
    parser.set_defaults(asdict(SAMPLE_PRESETS.get(name, SampleConfig())))
    options = parser.instantiate_classes(parser.parse_args(words))
    config = SampleConfig(**{field.name: options[field.name] for field in fields(SampleConfig)})
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

    with Cluster(options.device) as world:
        model, trained, names = load_run(run, options.weights)
        model = model.to(world.device).eval()
        if grid is not None:
            classes = parse_classes(options.classes, names) if model.null_label is not None else None
            draw_grid(
                model,
                trained,
                grid,
                options.per_class,
                config.steps,
                config.method,
                config.cfg_scale,
                classes,
                config.seed,
            )
            print(f"wrote {grid}")
            return 0
        checkpoint = find_checkpoint(run)
        assert checkpoint is not None  # load_run has found it
        facts = {"weights": options.weights, "checkpoint": checkpoint.name, "ema_decay": trained.ema_decay}
        draw_samples(model, diffusion_of(trained), config, out, world=world, facts=facts)
        if world.rank == 0:
            print(f"wrote {config.count} images to {out}")
    return 0


COMMANDS = {"train": _train, "sample": _sample}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``diffussm``; returns its exit code.

    0 done, 1 refused, 2 bad usage, 75 asked to stop (the run is saved, start it again), 130 interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = "\n".join(f"  {name:<10}{command.__doc__}" for name, command in COMMANDS.items())
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
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"diffussm {name}: {error}", file=sys.stderr)
        return 1
    except SystemExit as stop:  # jsonargparse has printed its own message
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        print(f"\ndiffussm {name}: interrupted; a run resumes with the same command", file=sys.stderr)
        return 130
