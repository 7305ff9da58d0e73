"""DiffuSSM: class-conditional diffusion models without attention (Yan, Gu and Rush, 2023).

Each module comes out of one chapter of `book/`. The names that most programs need can be taken from here; the
rest is in the modules.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "DiffuSSM": "model",
    "DiffuSSMConfig": "model",
    "PRESETS": "model",
    "GaussianDiffusion": "diffusion",
    "sample": "sampling",
    "evaluate": "evaluation",
    "DiffuSSMPipeline": "pipeline",
    "TrainConfig": "training",
    "train": "training",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    # Looked up on first use, so that `diffussm --help` does not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'diffussm' has no attribute {name!r}")
    return getattr(import_module(f"diffussm.{_HOMES[name]}"), name)
