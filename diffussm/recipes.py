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
from diffussm.guards import expect_there, explain, nearest, refuse
from diffussm.latents import LatentStore
from diffussm.model import DiffuSSMConfig
from diffussm.options import Execution, Recipe, from_flat, load_dataset
from diffussm.zips import zip_of

__all__ = ["recipe_files", "read_recipe", "open_data", "takes_latents", "open_decoder"]


def recipe_files() -> dict[str, Path]:
    """The YAML files that come with the package, by name."""
    folder = Path(str(files("diffussm"))) / "configs"
    found = {file.stem: file for file in folder.glob("*.yaml")}
    return {name: found[name] for name in sorted(found)}


def read_recipe(name: str) -> tuple[Recipe, Execution]:
    """What a recipe says: one that comes with the package, by its name, or a YAML file.

    Raises:
        ValueError, OSError: it is none; the message names the file and the option.
    """
    known = recipe_files()
    file = known.get(name) or Path(name)
    told = f"there is no recipe {name!r}, and no such file; {nearest(name, known)}"
    refuse(not file.is_file(), told)
    with explain(f"{file} is no recipe", ValueError, yaml.YAMLError, RecursionError):
        return from_flat(_read_yaml(file))


def _read_yaml(file: Path) -> dict[str, Any]:
    text = file.read_text(encoding="utf-8")
    aliased = any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text))
    refuse(aliased, "it has aliases (*name); write out what they stand for")
    values = yaml.safe_load(text)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError("expected lines such as 'steps: 1000' and a section 'model:'")
    return values


def open_data(recipe: Recipe) -> Dataset:
    """What `recipe.data` names: the digits, a latent store, or images (`images_from`).

    Raises:
        ValueError, OSError: it does not exist, is damaged, or not what the model takes.
    """
    if recipe.data == "digits":
        return load_dataset(recipe)
    refuse(
        not recipe.data,
        "this recipe needs --data: images, or what diffussm encode wrote",
    )
    path = Path(recipe.data)
    expect_there(zip_of(path) or path, "'digits', a latent store, or images")
    if (path / "manifest.json").exists() or (path / "plan.json").exists():
        return _open_latents(path, recipe)
    return _open_images(path, recipe)


def _open_latents(path: Path, recipe: Recipe) -> LatentStore:
    store = LatentStore(path)
    if recipe.flip and not store.flip:
        raise ValueError(f"{path} holds no mirrored images; train with --flip false")
    return store


def _open_images(path: Path, recipe: Recipe) -> Dataset:
    model, classes = recipe.model, recipe.model.num_classes > 0
    how = {"flip": recipe.flip, "exif_rotate": recipe.exif_rotate}
    if takes_latents(model):
        raise ValueError(f"{path} holds no latents; first diffussm encode {path} ...")
    return images_from(path, model.height, conditional=classes, **how)


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
