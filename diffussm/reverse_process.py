"""The reverse process: from noise to images.

Generated from book/32_reverse_process.md by `make export`: edit there.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffussm.diffusion import GaussianDiffusion, NoiseSource, standard_normal

__all__ = ["ancestral_step", "ddim_step"]


@torch.no_grad()
def ancestral_step(
    model: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    x_t: Tensor,
    step: int,
    y: Tensor | None = None,
    generator: NoiseSource = None,
    clip_denoised: bool = False,
) -> tuple[Tensor, Tensor]:
    """Draw x_{t-1} from p(x_{t-1} | x_t) at t = `step` (paper, equation 2;
    eq-sampling-ancestral).

    Returns x_{t-1} and the predicted x_0, (B, C, H, W) each. `model` and `y` are as for
    `GaussianDiffusion.p_mean_variance`, `generator` is the source of the noise.
    """
    t = torch.full((len(x_t),), step, device=x_t.device)  # (B,)
    p = diffusion.p_mean_variance(model, x_t, t, y, clip_denoised)
    if step == 0:  # noise on the finished image would only be seen
        return p["mean"], p["pred_xstart"]
    noise = standard_normal(x_t.shape, generator, x_t.device, p["mean"].dtype)
    return p["mean"] + torch.exp(0.5 * p["log_variance"]) * noise, p["pred_xstart"]


def _largest_sigma(diffusion: GaussianDiffusion, step: int) -> float:
    """sigma_t for eta = 1 (equation eq-sampling-ddim): the root of beta-tilde."""
    ab = diffusion.alphas_cumprod[step].item()
    ab_prev = diffusion.alphas_cumprod_prev[step].item()
    return math.sqrt((1 - ab_prev) / (1 - ab) * (1 - ab / ab_prev))


@torch.no_grad()
def ddim_step(
    model: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    x_t: Tensor,
    step: int,
    y: Tensor | None = None,
    generator: NoiseSource = None,
    clip_denoised: bool = False,
    eta: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One step of DDIM (equation eq-sampling-ddim): deterministic for eta = 0, as noisy
    as DDPM for eta = 1.

    Arguments and results as for `ancestral_step`; v is not used.
    """
    t = torch.full((len(x_t),), step, device=x_t.device)  # (B,)
    p = diffusion.p_mean_variance(model, x_t, t, y, clip_denoised)
    ab_prev = diffusion.alphas_cumprod_prev[step].item()
    sigma = eta * _largest_sigma(diffusion, step)
    x = math.sqrt(ab_prev) * p["pred_xstart"]
    x = x + math.sqrt(1 - ab_prev - sigma**2) * p["eps"]
    if sigma > 0:
        x = x + sigma * standard_normal(x_t.shape, generator, x_t.device, x.dtype)
    return x, p["pred_xstart"]
