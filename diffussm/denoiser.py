"""The denoiser: what diffusers asks of a network.

Generated from book/61_denoiser.md by `make export`: edit there.
"""

from pathlib import Path
from typing import Any, Self

import torch

from diffussm.model import DiffuSSM

__all__ = ["Denoiser"]


class Denoiser(DiffuSSM):
    """A `DiffuSSM` as diffusers wants components: it knows its device and dtype, and
    loads with a dtype.
    """

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        torch_dtype: torch.dtype | None = None,
        **_: Any,
    ) -> Self:
        """As `DiffuSSM.from_pretrained`; what else diffusers passes is ignored."""
        model = super().from_pretrained(folder, device)
        return model.to(dtype=torch_dtype).requires_grad_(False).eval()

    @classmethod
    def of(cls, model: DiffuSSM) -> Self:
        """The same network; the weights are shared, not copied."""
        with torch.device("meta"):
            same = cls(model.config)
        same.load_state_dict(model.state_dict(), assign=True)
        return same.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_x.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are."""
        return self.embed_x.weight.dtype
