"""Weights in the box.

Generated from book/60_pretrained.md by `make export`: edit there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from diffussm.files import read_json
from diffussm.guards import expect_one_of
from diffussm.model import DiffuSSM
from diffussm.optimiser import DYNAMICS
from diffussm.options import Recipe
from diffussm.run_folder import read_run

__all__ = ["pretrained_names", "Pretrained", "load_pretrained", "halved"]


_BOX = Path(str(files("diffussm"))) / "weights"


def pretrained_names() -> list[str]:
    """What the weights in the box are called."""
    return sorted(record.parent.name for record in _BOX.glob("*/record.json"))


@dataclass(frozen=True)
class Pretrained:
    """Weights that come with the package, and what is known of them.

    Args:
        folder: where they are.
        recipe: of the run that trained them.
        data: what that run knew of its images: how many, their classes.
        record: command, seed, licence, and figures with how they were measured.
        vae: folder of the autoencoder; None for a network that makes pixels.
    """

    folder: Path
    recipe: Recipe
    data: dict[str, Any]
    record: dict[str, Any]
    vae: Path | None

    def model(self) -> DiffuSSM:
        """The network."""
        return DiffuSSM.from_pretrained(self.folder)


def load_pretrained(name: str) -> Pretrained:
    """The weights of a name; ValueError, with all names, for another."""
    folder = _BOX / expect_one_of("pretrained", name, pretrained_names())
    run, vae = read_run(folder, "run.json"), folder / "vae"
    record = read_json(folder / "record.json")
    known = vae if vae.is_dir() else None
    return Pretrained(folder, run.recipe, run.data, record, known)


_PRECISE = (*DYNAMICS, "kernel.C")


def halved(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights to store: in float16, but the kernels' parameters as they are."""
    return {
        name: tensor if name.endswith(_PRECISE) else tensor.half()
        for name, tensor in weights.items()
    }
