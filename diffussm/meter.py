"""What a run measures of itself.

Generated from book/35_meter.md by `make export`: edit there.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Meter", "Look"]


class Meter:
    """Running means of the loss terms, and of mse by quartile of t, on the device."""

    names = ("loss", "mse", "vb", "mse_q1", "mse_q2", "mse_q3", "mse_q4", "grad_norm")

    def __init__(self, device: torch.device | str = "cpu") -> None:
        shape = 3, len(self.names)
        self.values = torch.zeros(shape, dtype=torch.float64, device=device)
        self.steps = 0  # since the last look

    @property
    def sums(self) -> Tensor:
        """Sums, and what to divide them by: (2, 8), in the order of `names`."""
        return self.values[:2]

    @classmethod
    def tally(cls, losses: dict[str, Tensor], t: Tensor, timesteps: int) -> Tensor:
        """What images add: losses (B,) each, t (B,) in [0, timesteps) -> (2, 8)."""
        sums = torch.zeros(2, len(cls.names), dtype=torch.float64, device=t.device)
        terms = torch.stack([losses[name].detach().double() for name in cls.names[:3]])
        sums[0, :3], sums[1, :3] = terms.sum(1), len(t)
        quartile = torch.arange(4, device=t.device)[:, None]  # (4, 1)
        inside = 4 * t // timesteps == quartile  # (4, B)
        sums[0, 3:7] = torch.where(inside, terms[1], 0.0).sum(1)
        sums[1, 3:7] = inside.sum(1)
        return sums

    def add(self, tally: Tensor, grad_norm: Tensor) -> Tensor:
        """One step: the tally of all its images, and the norm of its gradient.

        Returns whether it is finite, as all since the last look: a bool on the device.
        """
        step, finite = tally.clone(), self.values[2]
        step[0, 7] += grad_norm
        step[1, 7] = 1.0
        before = finite[0] == self.steps
        fine = before & step.isfinite().all()
        finite[1] = torch.where(before, grad_norm, finite[1])
        finite[0] += fine
        self.sums.add_(torch.where(fine, step, 0.0))
        self.steps += 1
        return fine

    def look(self) -> "Look":
        """Read the device; the steps are counted from 0 again, the means go on."""
        sums, counts, (finite, norm, *_) = self.values.tolist()
        steps, self.steps = self.steps, 0
        self.values[2] = 0
        means = [s / n if n else None for s, n in zip(sums, counts, strict=True)]
        named = dict(zip(self.names, means, strict=True))
        return Look(steps, int(finite), norm, named)

    def read_and_reset(self) -> dict[str, float | None]:
        """The means since the last call; FloatingPointError if one is not finite."""
        look = self.look()
        if look.finite < look.steps:
            raise FloatingPointError(
                f"loss or gradient of step {look.finite + 1} of {look.steps} was not "
                "finite, and nothing has moved since"
            )
        self.sums.zero_()
        return look.means


class Look(NamedTuple):
    """What a meter shows of the steps since the last look, or since its reset.

    Attributes:
        steps: Since the last look.
        finite: Of these steps, those before the first that was not finite.
        grad_norm: Of that first one.
        means: Since the reset, by name; None: not one image.
    """

    steps: int
    finite: int
    grad_norm: float
    means: dict[str, float | None]
