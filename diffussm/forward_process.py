"""The forward process: from data to noise.

Generated from book/30_forward_process.md by `make export`: edit there.
"""

from typing import Any

import torch
from torch import Tensor

from diffussm.guards import (
    expect,
    expect_finite,
    expect_indices,
    expect_int,
    expect_number,
    expect_real,
    readable,
)

__all__ = ["ForwardProcess", "working_dtype", "check_batch"]


class ForwardProcess:
    """The fixed Markov chain q that turns data into noise (paper, equation 1); nothing
    here is learned.

    Args:
        betas: Variance added at each step, floating point (T,), each strictly between 0
            and 1.

    Its tables, float64 (T,) on the CPU: `betas`, `alphas_cumprod`,
    `alphas_cumprod_prev`, `posterior_variance`, `posterior_log_variance_clipped`.
    Timestep t of the code is step t + 1 of the paper.

    Raises:
        ValueError, TypeError: `betas` is not such a vector.
    """

    def __init__(self, betas: Tensor) -> None:
        _check_betas(betas)
        self.betas = betas.detach().to("cpu", torch.float64)
        self.num_timesteps = len(betas)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        ones = self.betas.new_ones(1)
        self.alphas_cumprod_prev = torch.cat([ones, self.alphas_cumprod[:-1]])
        self._tabulate_means()
        self._tabulate_variances()
        self._tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Entries t of a table, (B, 1, 1, 1), in precision and on the device of
        `like`.
        """
        key = name, like.device, working_dtype(like)
        if key not in self._tables:
            self._tables[key] = getattr(self, name).to(key[2]).to(key[1])
        return self._tables[key][t.to(like.device)].view(-1, 1, 1, 1)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle takes no tables along that lie on somebody's GPU."""
        return {**self.__dict__, "_tables": {}}

    def _noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t given x_0 in one jump (equation eq-diffusion-jump)."""
        alpha_bar = self._at("alphas_cumprod", t, x0)  # (B, 1, 1, 1)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise  # (B, C, H, W)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw x_t given x_0 (equation eq-diffusion-jump, the paper's equation 1).

        Args:
            x0: Images or latents, floating point (B, C, H, W).
            t: Timesteps from 0 to T - 1, integer (B,).
            noise: Standard normal, as `x0`.

        Returns:
            (B, C, H, W).

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit, NaN or infinite
                images, t outside the schedule.
        """
        check_batch(self.num_timesteps, t, x0=x0, noise=noise)
        return self._noised(x0, t, noise)

    def _tabulate_means(self) -> None:
        """What x_0 and x_t are multiplied by in eq-diffusion-posterior, (T,) each."""
        before, after = self.alphas_cumprod_prev, self.alphas_cumprod
        self.posterior_x0_factor = self.betas * before.sqrt() / (1 - after)
        self.posterior_x_t_factor = (1 - before) * (1 - self.betas).sqrt() / (1 - after)

    def _tabulate_variances(self) -> None:
        """beta-tilde of eq-diffusion-posterior and its clipped logarithm, (T,) each."""
        before, after = self.alphas_cumprod_prev, self.alphas_cumprod
        self.posterior_variance = self.betas * (1 - before) / (1 - after)
        clipped = self.posterior_variance.clone()
        clipped[0] = clipped[1] if self.num_timesteps > 1 else self.betas[0]
        self.posterior_log_variance_clipped = clipped.log()

    def _posterior(
        self, x0: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance (equation eq-diffusion-posterior)."""
        mean = self._at("posterior_x0_factor", t, x0) * x0
        mean = mean + self._at("posterior_x_t_factor", t, x0) * x_t  # (B, C, H, W)
        variance = self._at("posterior_variance", t, x0)
        return mean, variance, self._at("posterior_log_variance_clipped", t, x0)

    def q_posterior(
        self, x0: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step back when x_0 is known: q(x_{t-1} | x_t, x_0)
        (eq-diffusion-posterior).

        Returns:
            Mean (B, C, H, W), variance and clipped log-variance (B, 1, 1, 1).

        Raises:
            ValueError, TypeError: as for `q_sample`.
        """
        check_batch(self.num_timesteps, t, x0=x0, x_t=x_t)
        return self._posterior(x0, x_t, t)


def working_dtype(x: Tensor) -> torch.dtype:
    """The precision of x, or float32 if that is lower."""
    return torch.promote_types(x.dtype, torch.float32)


def _check_betas(betas: Tensor) -> None:
    expect_real(betas=betas)
    (T,) = expect("betas", betas, "T")
    expect_int("number of betas", T, least=1)
    for beta in betas.tolist():
        expect_number("beta", beta, above=0, below=1)


def check_batch(num_timesteps: int, t: Tensor, **images: Tensor) -> None:
    """Refuse images (B, C, H, W) and timesteps (B,) that do not fit each other."""
    (first, x), *others = images.items()
    B, C, H, W = expect(first, x, "B C H W")
    for name, other in others:
        expect(name, other, "B C H W", B=B, C=C, H=H, W=W)
    expect_real(**images)
    if readable(x):
        expect_finite(first, x, "leave these images out, or find what made them so")
    expect("t", t, "B", B=B)
    expect_indices("t", t, num_timesteps)
