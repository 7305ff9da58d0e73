"""Recipes.

Generated from book/91_recipes.md by `make export`: edit there.
"""

from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from diffussm.autoencoder import check_encoder, decode, load_vae, vae_identity
from diffussm.data import Dataset
from diffussm.formats import images_from
from diffussm.guards import refuse
from diffussm.latents import LatentStore
from diffussm.model import DiffuSSMConfig
from diffussm.options import Execution, Recipe, from_flat, load_dataset

__all__ = ["recipe_files", "read_recipe", "open_data", "takes_latents", "open_decoder"]


def recipe_files() -> dict[str, Path]:
    """The YAML files that come with the package, by name."""
    folder = Path(str(files("diffussm"))) / "configs"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"), key=_stem)}


def _stem(file: Path) -> str:
    return file.stem


def read_recipe(name: str) -> tuple[Recipe, Execution]:
    """What a recipe says: one that comes with the package, by its name, or a YAML file.

    Raises:
        ValueError, OSError: it is none; the message names the file and the option.
    """
    file = _recipe_file(name)
    values = _read_yaml(file)
    try:
        return from_flat(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _recipe_file(name: str) -> Path:
    known = recipe_files()
    file = known.get(name) or Path(name)
    refuse(
        not file.is_file(),
        f"there is no recipe {name!r}; give a YAML file, or one of {', '.join(known)}",
    )
    return file


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError("it has aliases (*name), which a recipe does not need")
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(
            f"{file} is no recipe; expected lines such as 'steps: 1000' and a 'model:' "
            "section"
        )
    return values


def _data_path(recipe: Recipe) -> Path:
    path = Path(recipe.data)
    if not recipe.data:
        latents = takes_latents(recipe.model)
        written = "the folder that diffussm encode has written"
        what = written if latents else "a folder of images"
        raise ValueError(f"this recipe needs --data: {what}")
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}; --data is 'digits', a latent store, or a folder of "
            "images"
        )
    return path


def _open_latents(path: Path, recipe: Recipe) -> LatentStore:
    store = LatentStore(path)
    refuse(
        recipe.flip and not store.flip,
        f"{path} holds no mirrored images; encode without --no_flip, or train with "
        "--flip false",
    )
    return store


def _check_pixels(path: Path, model: DiffuSSMConfig) -> None:
    refuse(
        takes_latents(model),
        f"{path} holds no latents, and this model takes {model.in_channels} "
        f"channels; make them first: diffussm encode {path} LATENTS --vae VAE "
        "--size PIXELS",
    )


def open_data(recipe: Recipe) -> Dataset:
    """What `recipe.data` names: the digits, a latent store, or images (folder or LMDB).

    Raises:
        ValueError, OSError: it does not exist, is damaged, or not what the model takes.
    """
    if recipe.data == "digits":
        return load_dataset(recipe)
    path = _data_path(recipe)
    if (path / "manifest.json").exists() or (path / "plan.json").exists():
        return _open_latents(path, recipe)
    _check_pixels(path, recipe.model)
    return images_from(
        path,
        recipe.model.height,
        flip=recipe.flip,
        conditional=recipe.model.num_classes > 0,
        exif_rotate=recipe.exif_rotate,
    )


def takes_latents(model: DiffuSSMConfig) -> bool:
    """Whether a model is of latents: an image has one channel or three."""
    return model.in_channels not in (1, 3)


def open_decoder(
    vae: str, device: torch.device, made_by: dict[str, Any] | None
) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """What turns latents into images, and its identity.

    `made_by` identifies the encoder of the latents; ValueError if it is another.
    """
    loaded = load_vae(vae, device)
    identity = vae_identity(loaded, vae)
    if made_by is not None:
        check_encoder(made_by, identity, f"--vae {vae}")
    return partial(decode, loaded), identity
