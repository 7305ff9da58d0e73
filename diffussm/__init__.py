"""DiffuSSM: class-conditional diffusion without attention (Yan, Gu and Rush, 2023).

Each module comes out of one chapter of `book/`. The names that most programs need can
be taken from here; the rest is in the modules.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING

__version__ = "0.1.0"  # the only place: pyproject.toml reads it here

__all__ = [
    "DiffuSSM",
    "DiffuSSMConfig",
    "DiffuSSMPipeline",
    "Execution",
    "GaussianDiffusion",
    "PRESETS",
    "Recipe",
    "__version__",
    "evaluate",
    "sample",
    "train",
]

# What earlier versions called otherwise
_RENAMED = {
    "TrainConfig": "Recipe (what is learned) and Execution (how it is carried out)",
    "on_chip": "diffussm.gpu_kernels",
}

if TYPE_CHECKING:
    from diffussm.diffusion import GaussianDiffusion as GaussianDiffusion
    from diffussm.evaluation import evaluate as evaluate
    from diffussm.model import DiffuSSM as DiffuSSM
    from diffussm.model_config import PRESETS as PRESETS
    from diffussm.model_config import DiffuSSMConfig as DiffuSSMConfig
    from diffussm.options import Execution as Execution
    from diffussm.options import Recipe as Recipe
    from diffussm.pipeline import DiffuSSMPipeline as DiffuSSMPipeline
    from diffussm.runs import train as train
    from diffussm.sampling import sample as sample
else:
    # the same names, imported on first use: `diffussm --help` does not wait for torch
    _HOMES = {
        "DiffuSSM": "model",
        "DiffuSSMConfig": "model_config",
        "DiffuSSMPipeline": "pipeline",
        "Execution": "options",
        "GaussianDiffusion": "diffusion",
        "PRESETS": "model_config",
        "Recipe": "options",
        "evaluate": "evaluation",
        "sample": "sampling",
        "train": "runs",
    }

    def __getattr__(name):
        if name in _RENAMED:
            raise ImportError(f"diffussm.{name} is now {_RENAMED[name]}")
        if name not in _HOMES:
            raise AttributeError(f"module 'diffussm' has no attribute {name!r}")
        return getattr(import_module(f"diffussm.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Renamed(MetaPathFinder):
    """Refuses the module names of earlier versions with the new ones."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        name = fullname.removeprefix("diffussm.")
        if fullname != name and name in _RENAMED:
            raise ModuleNotFoundError(f"{fullname} is now {_RENAMED[name]}")


sys.meta_path.append(_Renamed())  # after those that find modules
