"""The command line.

Generated from book/14_imagenet.md by `make export`: edit there.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MARGIN", "DEVICE_HELP", "save_grid", "draw_grid", "parse_classes", "COMMANDS", "main"]

MARGIN = 2  # white pixels around each image of a grid
DEVICE_HELP = "e.g. cpu or cuda; default: a GPU if there is one"


def _train(arguments: Sequence[str]) -> None:
    """train a model from a recipe, or resume it"""
    from diffussm.training import RECIPES, TrainConfig, load_run, train

    parser = ArgumentParser(
        prog="diffussm train",
        description="Train a model; the same command again resumes a killed run.",
        allow_abbrev=False,  # or a mistyped --model.d_mode would be taken for --model.d_model
    )
    parser.add_argument("recipe", type=Literal[tuple(RECIPES)], help=f"what to train: {', '.join(RECIPES)}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--device", type=str | None, default=None, help=DEVICE_HELP)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(TrainConfig, help="options of the recipe")
    # The recipe decides the defaults of all other options, so it has to be known before the parser runs.
    name = next((word for word in arguments if word in RECIPES), None)
    if name is not None:
        parser.set_defaults(asdict(RECIPES[name]))
    options = parser.instantiate_classes(parser.parse_args(list(arguments)))
    config = TrainConfig(**{key: options[key] for key in TrainConfig.__dataclass_fields__})

    state = train(config, options.out, device=options.device)
    _, _, classes = load_run(options.out)
    print(f"{state.step} steps done; the log is {options.out / 'log.jsonl'}, the weights are beside it")
    if config.model.in_channels in (1, 3):
        picture = options.out / "samples.png"
        shown = list(range(min(len(classes), 10))) if config.model.num_classes else None
        draw_grid(options.out, picture, shown, count=8, steps=50, method="ddim", cfg_scale=1.5)
        print(f"a grid of samples is in {picture}")


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
    run: Path,
    picture: Path,
    classes: Sequence[int] | None,
    count: int,
    steps: int,
    method: str,
    cfg_scale: float,
    seed: int = 0,
    weights: str = "ema",
    device: str | None = None,
    progress: bool = True,
) -> None:
    """Draw `count` samples for each class (None: an unconditional model) of a run, a class to a row."""
    import torch

    from diffussm.sampling import sample
    from diffussm.training import diffusion_of, load_run

    model, config, _ = load_run(run, weights)
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    where = next(model.parameters()).device
    shape = (config.model.in_channels, config.model.height, config.model.width)
    rows = 1 if classes is None else len(classes)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows * count, *shape, generator=generator).to(where)
    labels = None if classes is None else torch.tensor(classes).repeat_interleave(count).to(where)
    images = sample(
        model,
        diffusion_of(config),
        labels,
        steps=steps,
        method=method,
        cfg_scale=cfg_scale,
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


def _sample(arguments: Sequence[str]) -> None:
    """draw images from a trained run"""
    parser = ArgumentParser(
        prog="diffussm sample",
        description="Draw a grid of images from a trained run, one row per class.",
        allow_abbrev=False,
    )
    parser.add_argument("--from", type=Path, required=True, help="folder of the run")
    parser.add_argument("--grid", type=Path, required=True, help="the PNG file to write")
    parser.add_argument(
        "--classes", type=str, default="all", help="numbers or names, separated by commas, or 'all'"
    )
    parser.add_argument("--count", type=int, default=8, help="images per class")
    parser.add_argument("--steps", type=int, default=250, help="sampling steps")
    parser.add_argument("--method", type=Literal["ddpm", "ddim"], default="ddpm", help="ancestral or DDIM")
    parser.add_argument("--cfg_scale", type=float, default=1.5, help="classifier-free guidance; 1 is none")
    parser.add_argument(
        "--weights", type=Literal["ema", "model"], default="ema", help="moving average or raw"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=str | None, default=None, help=DEVICE_HELP)
    parser.add_argument("--overwrite", action="store_true", help="replace the picture if it exists")
    options = parser.parse_args(list(arguments))
    if options.count < 1:
        raise ValueError(f"--count {options.count}: draw at least one image per class")
    if options.grid.suffix.lower() != ".png":
        raise ValueError(f"--grid {options.grid}: the picture is a PNG; give a name that ends in .png")
    if options.grid.exists() and not options.overwrite:
        raise ValueError(f"{options.grid} exists; give another name, or --overwrite")
    if not options.grid.parent.is_dir():
        raise ValueError(f"--grid {options.grid}: the folder {options.grid.parent} does not exist")

    from diffussm.training import load_run

    model, _, names = load_run(options["from"], options.weights)
    classes = parse_classes(options.classes, names) if model.null_label is not None else None
    draw_grid(
        options["from"],
        options.grid,
        classes,
        count=options.count,
        steps=options.steps,
        method=options.method,
        cfg_scale=options.cfg_scale if classes is not None else 1.0,
        seed=options.seed,
        weights=options.weights,
        device=options.device,
    )
    print(f"wrote {options.grid}")


COMMANDS = {"train": _train, "sample": _sample}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``diffussm``; returns its exit code: 0 done, 1 refused, 2 bad usage, 130 interrupted."""
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
        COMMANDS[name](arguments[1:])
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"diffussm {name}: {error}", file=sys.stderr)
        return 1
    except SystemExit as stop:  # jsonargparse has printed its own message
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        print(f"\ndiffussm {name}: interrupted; a run resumes with the same command", file=sys.stderr)
        return 130
    return 0
