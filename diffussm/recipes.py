"""Recipes.

Generated from book/91_recipes.md by `make export`: edit there.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml

from diffussm.files import read_json
from diffussm.guards import expect_same, expect_there, explain, nearest, refuse
from diffussm.options import Execution, Recipe, flat, from_flat, misfits

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffussm.data import Dataset
    from diffussm.latents import LatentStore
    from diffussm.model_config import DiffuSSMConfig

__all__ = [
    "recipe_files",
    "read_recipe",
    "read_yaml",
    "open_data",
    "images_at",
    "check_words",
    "check_outside",
    "takes_latents",
    "open_held_out",
    "left_open",
    "inferred",
    "fit",
    "shortened",
    "decided",
    "open_decoder",
]


def recipe_files() -> dict[str, Path]:
    """The YAML files that come with the package, by name."""
    folder = Path(str(files("diffussm"))) / "configs"
    found = {file.stem: file for file in folder.glob("*.yaml")}
    return {name: found[name] for name in sorted(found)}


def read_recipe(name: str) -> tuple[Recipe, Execution]:
    """What a recipe says: its name, a YAML file, or the config.json of a run.

    Raises:
        ValueError, OSError: it is none; the message names the file and the option.
    """
    file = _file_of(name)
    with explain(f"{file} is no recipe", ValueError, yaml.YAMLError, RecursionError):
        return from_flat(_options_in(file))


def _file_of(name: str) -> Path:
    known = recipe_files()
    file = known.get(name) or Path(name)
    told = f"there is no recipe {name!r}, and no such file; {nearest(name, known)}"
    refuse(not file.is_file(), told)
    return file


def _options_in(file: Path) -> dict[str, Any]:
    """The options that a recipe says, as one mapping."""
    if file.name == "config.json":
        from diffussm.run_folder import read_run

        recipe, execution, *_ = read_run(file.parent)
        return flat(recipe, execution)
    return read_yaml(file)


def read_yaml(file: Path) -> dict[str, Any]:
    """The options in a file of YAML; ValueError if it holds none."""
    text = file.read_text(encoding="utf-8")
    aliased = any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text))
    refuse(aliased, "it has aliases (*name); write out what they stand for")
    values = yaml.safe_load(text)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError("expected lines such as 'steps: 1000' and a section 'model:'")
    return values


def open_data(
    recipe: Recipe, free: Collection[str] = (), beside: Path = Path(".")
) -> "Dataset":
    """What `recipe.data` names: digits, openmoji, a latent store, or `images_from`.

    Args:
        free: the options that the data may still decide, see `left_open`.
        beside: where the emoji are drawn, if they are not there.

    Raises:
        ValueError, OSError: it does not exist, is damaged, or not what the model takes.
    """
    from diffussm.batches import load_dataset
    from diffussm.zips import zip_of

    if recipe.data == "digits":
        return load_dataset(recipe)
    refuse(
        not recipe.data,
        "this recipe needs --data: images, or what diffussm encode wrote",
    )
    if recipe.data == "openmoji":
        return _open_images(partial(_drawn, beside), recipe, free)
    path = Path(recipe.data)
    expect_there(zip_of(path) or path, "digits, openmoji, latents, or images")
    if _holds_latents(path):
        return _open_latents(path, recipe, free)
    return _open_images(lambda size: path, recipe, free)


def _holds_latents(path: Path) -> bool:
    """Whether a latent store is there: whole, unfinished or damaged."""
    records = [path / "manifest.json", path / "plan.json"]
    there = [file for file in records if file.is_file()]
    shards = there and any(path.glob("shard-*.npy"))
    return bool(shards) or any(map(_is_of_latents, there))


def _is_of_latents(file: Path) -> bool:
    with suppress(ValueError):
        record = read_json(file)
        kind = record.get("format") if isinstance(record, dict) else None
        return str(kind).startswith("diffussm-latents")
    return False


def _open_latents(path: Path, recipe: Recipe, free: Collection[str]) -> "LatentStore":
    from diffussm.latents import LatentStore

    store = LatentStore(path)
    if recipe.flip and not store.flip and "flip" not in free:
        raise ValueError(f"{path} holds no mirrored images; train with --flip false")
    return store


def _open_images(
    place: Callable[[int], Path], recipe: Recipe, free: Collection[str]
) -> "Dataset":
    """The images at the place that a size has."""
    from diffussm.formats import images_from

    model, data = recipe.model, recipe.data
    refuse(
        takes_latents(model),
        f"{data} holds no latents; first diffussm encode {data} ..., or take a model "
        "of pixels, as train pixels or --model.in_channels 3 does",
    )
    classes = None if "model.num_classes" in free else model.num_classes > 0
    how = {"flip": recipe.flip, "exif_rotate": recipe.exif_rotate}
    size, told = model.height, f"{model.num_classes} classes, or --model.num_classes 0"
    with explain(told, ValueError) if classes else nullcontext():
        return images_from(place(size), size, conditional=classes, **how)


def images_at(data: Path, beside: Path, size: int, **how: Any) -> Any:
    """What `images_from` finds; the word openmoji draws them, unless it is a path."""
    from diffussm.formats import images_from

    drawn = str(data) == "openmoji" and not data.exists()
    return images_from(_drawn(beside, size) if drawn else data, size, **how)


def _drawn(beside: Path, size: int) -> Path:
    """The training images of OpenMoji in this size."""
    from diffussm.openmoji import draw_openmoji

    root = beside / f"openmoji-{size}"
    if not root.exists():
        beside.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".openmoji-", dir=beside) as own:
            drawn = draw_openmoji(Path(own) / "drawn", size)
            with suppress(OSError):  # another was first
                drawn.replace(root)
    return draw_openmoji(root, size) / "train"


def check_words(out: Path, **typed: str) -> None:
    """ValueError for an option that is a word for data, and a path as well.

    Not for a run that has begun in `out`, nor for the folder of the run itself.
    """
    for option, word in typed.items():
        known = word in ("digits", "openmoji") and Path(word).exists()
        own = (out / "config.json").is_file() or _within(out, Path(word))
        told = f"--{option} {word}: there is a {word} in this folder; type ./{word} "
        told += f"for that, or rename it and have the {word} of the package"
        refuse(known and not own, told)


def _within(inner: Path, outer: Path) -> bool:
    return inner.resolve().is_relative_to(outer.resolve())


def check_outside(out: Path, data: "Dataset", pictures: bool = False) -> None:
    """ValueError if `out`, not begun yet, would be read with a folder of images.

    That is as one of its classes or, if `pictures` will be in it, as images.
    """
    from diffussm.folders import ImageFolder
    from diffussm.zips import ZipFolder

    if not isinstance(data, ImageFolder) or isinstance(data, ZipFolder):
        return
    begun = any(out.glob("[!.]*"))  # as `check_run` does
    if not begun and (data.num_classes or pictures):
        told = "would be read as a class or as images of it; name a folder outside"
        refuse(_seen_in(data.root, out), f"{out} lies inside {data.root} and {told}")


def _seen_in(root: str, out: Path) -> bool:
    """Whether who walks through `root` comes to `out`; see `folders.visible`."""
    if not _within(out, Path(root)):
        return False
    parts = out.resolve().relative_to(Path(root).resolve()).parts
    return not any(part.startswith(".") for part in parts)


def takes_latents(model: "DiffuSSMConfig") -> bool:
    """Whether a model is of latents: an image has one channel or three."""
    return model.in_channels not in (1, 3)


def _is(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def open_held_out(
    name: str, recipe: Recipe, classes: Sequence[str], beside: Path = Path(".")
) -> "Dataset":
    """The images that `name` says, or those that the data of a recipe hold out.

    Raises:
        ValueError, OSError: there are none, or they have other classes than the run.
    """
    from diffussm.batches import load_dataset

    if name in ("", recipe.data) and recipe.data == "digits":
        return load_dataset(recipe, "test")
    if name in ("", recipe.data) and recipe.data == "openmoji":
        train = _drawn(beside, recipe.model.height)
        name = str(train.parent / "val")
    told = "say with --held_out which images the run does not see: others than --data"
    refuse(name in ("", recipe.data) or _is(Path(name), Path(recipe.data)), told)
    with explain(f"--held_out {name}", ValueError, OSError):
        found = open_data(replace(recipe, data=name, flip=False), ("flip",))
        ours, theirs = {"classes": found.classes}, {"classes": tuple(classes)}
        expect_same("it is not of the run's", ours, theirs, "Take other images")
    return found


_OF_SHAPE = {"model.in_channels", "model.input_size", "model.num_classes"}
_OF_DATA = _OF_SHAPE | {"batch_size", "flip"}
_OF_LENGTH = {"warmup", "cooldown"}


def left_open(name: str) -> frozenset[str]:
    """The options of a recipe that its data, or the number of steps, may decide."""
    options = _options_in(_file_of(name))
    said = {*options, *(f"model.{key}" for key in options["model"])}
    if name not in recipe_files():
        return frozenset((_OF_DATA | _OF_LENGTH) - said)
    general = "model.num_classes" not in said
    return frozenset(_OF_LENGTH | (_OF_DATA if general else set()))


def inferred(recipe: Recipe, data: "Dataset", free: Collection[str]) -> dict[str, Any]:
    """The options that the data decide, each with its value."""
    wanted = misfits(data, recipe)
    if recipe.flip and not data.flip:
        wanted["flip"] = False
    return {name: value for name, value in wanted.items() if name in free}


def fit(recipe: Recipe, data: "Dataset", free: Collection[str]) -> Recipe:
    """The recipe with all that its data decide."""
    values, model = inferred(recipe, data, free), {}
    for name in _OF_SHAPE & values.keys():
        model[name.removeprefix("model.")] = values.pop(name)
    return replace(recipe, model=replace(recipe.model, **model), **values)


def shortened(
    options: dict[str, Any], steps: int, free: Collection[str]
) -> dict[str, int]:
    """Warm-up and cool-down for fewer steps than they need, in proportion.

    `steps` are those that the recipe was made for. Empty if the options fit.
    """
    phases = [name for name in ("warmup", "cooldown") if options[name]]
    if sum(options[name] for name in phases) <= options["steps"]:
        return {}
    return {k: options[k] * options["steps"] // steps for k in phases if k in free}


def decided(run: Path, free: Collection[str]) -> dict[str, Any]:
    """The open options that a run, if one has begun in a folder, has decided."""
    if not (run / "config.json").is_file():
        return {}
    with suppress(ValueError, OSError):  # no run: who opens it will say so
        from diffussm.run_folder import read_run

        recipe = read_run(run).recipe
        kept = sorted((_OF_LENGTH | {"batch_size"}) & set(free))
        return {name: getattr(recipe, name) for name in kept}
    return {}


def open_decoder(
    vae: str, device: "torch.device", made_by: dict[str, Any] | None
) -> tuple[Callable[["Tensor"], "Tensor"], dict[str, Any]]:
    """What turns latents into images, and its identity.

    `made_by` identifies the encoder of the latents; ValueError if it is another.
    """
    from diffussm.autoencoder import check_encoder, decode, load_vae, vae_identity

    loaded = load_vae(vae, device)
    identity = vae_identity(loaded, vae)
    if made_by is not None:
        check_encoder(made_by, identity, f"--vae {vae}")
    return partial(decode, loaded), identity
