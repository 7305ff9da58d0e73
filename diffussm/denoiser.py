"""The denoiser: what diffusers asks of a network.

Generated from book/61_denoiser.md by `make export`: edit there.
"""

from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from diffussm.model import DiffuSSM

__all__ = ["Denoiser", "as_denoiser"]


class Denoiser(DiffuSSM):
    """A `DiffuSSM` as diffusers wants components: it knows its device and dtype, and
    loads with a dtype.
    """

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        variant: str | None = None,
        torch_dtype: torch.dtype | None = None,
        **_: Any,
    ) -> Self:
        """As in `DiffuSSM`, then in `torch_dtype`; other options are ignored."""
        variant = variant or _only_variant(Path(folder))
        model = super().from_pretrained(folder, device, variant)
        return model.to(dtype=torch_dtype).requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.embed_x.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self.embed_x.weight.dtype

    @classmethod
    def of(cls, model: DiffuSSM) -> Self:
        """The same network; the weights are shared, not copied."""
        with torch.device("meta"):
            same = cls(model.config)
        same.load_state_dict(model.state_dict(), assign=True)
        return same.requires_grad_(False).eval()


def _only_variant(folder: Path) -> str | None:
    """The variant of the only weights in a folder; None for plain ones or several."""
    names = [file.name for file in folder.glob("model*.safetensors")]
    parts = names[0].split(".") if len(names) == 1 else []
    return parts[1] if len(parts) == 3 else None


def as_denoiser(network: Any) -> Any:
    """A network as a `Denoiser`, out of its wrapper; another module as it is."""
    if isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
        network = network.module
    plain = isinstance(network, DiffuSSM) and not isinstance(network, Denoiser)
    return Denoiser.of(network) if plain else network
