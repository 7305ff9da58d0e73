"""Sampling: from noise to images.

Generated from book/32_sampling.md by `make export`: edit there.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffussm.diffusion import GaussianDiffusion, find_attribute, standard_normal
from diffussm.model import Labels, as_labels

__all__ = ["ancestral_step", "ddim_step", "guided", "denoise", "sample"]


@torch.no_grad()
def ancestral_step(
    model: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    x_t: Tensor,
    step: int,
    y: Tensor | None = None,
    generator: torch.Generator | None = None,
    clip_denoised: bool = False,
) -> tuple[Tensor, Tensor]:
    """Draw x_{t-1} from p(x_{t-1} | x_t) at t = `step` (paper, equation 2; eq-sampling-ancestral).

    Returns x_{t-1} and the predicted x_0, (B, C, H, W) each. The other arguments are those of `denoise`.
    """
    t = torch.full((len(x_t),), step, device=x_t.device)  # (B,)
    p = diffusion.p_mean_variance(model, x_t, t, y, clip_denoised)
    if step == 0:
        return p["mean"], p[
            "pred_xstart"
        ]  # noise on the finished image would only be seen
    noise = standard_normal(x_t.shape, generator, x_t.device, p["mean"].dtype)
    return p["mean"] + torch.exp(0.5 * p["log_variance"]) * noise, p["pred_xstart"]


@torch.no_grad()
def ddim_step(
    model: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    x_t: Tensor,
    step: int,
    y: Tensor | None = None,
    generator: torch.Generator | None = None,
    clip_denoised: bool = False,
    eta: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One step of DDIM (equation eq-sampling-ddim): deterministic for eta = 0, as noisy as DDPM for eta = 1.

    Arguments and results as for `ancestral_step`; v is not used.
    """
    t = torch.full((len(x_t),), step, device=x_t.device)  # (B,)
    p = diffusion.p_mean_variance(model, x_t, t, y, clip_denoised)
    alpha_bar = diffusion.alphas_cumprod[step].item()
    alpha_bar_prev = diffusion.alphas_cumprod_prev[step].item()
    sigma = eta * math.sqrt(
        (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    )
    x = (
        math.sqrt(alpha_bar_prev) * p["pred_xstart"]
        + math.sqrt(1 - alpha_bar_prev - sigma**2) * p["eps"]
    )
    if sigma > 0:
        x = x + sigma * standard_normal(x_t.shape, generator, x_t.device, x.dtype)
    return x, p["pred_xstart"]


def guided(
    model: Callable[..., Tensor], cfg_scale: float, guidance_channels: int | None = None
) -> Callable[..., Tensor]:
    """A model that exaggerates what the label changes: classifier-free guidance (eq-sampling-guidance).

    Args:
        model: (x, t, y) -> (B, 2C, H, W), with an attribute `null_label`, the label for "no class"; or a
            wrapper of one, such as DistributedDataParallel.
        cfg_scale: w >= 0. 0 is the unconditional model, 1 the conditional one (`model` itself), more guides.
        guidance_channels: Guide only the first so many channels of the noise; default all. DiT's code does 3.

    Returns:
        A model of the same form. It runs `model` once, on a batch of 2B; v is that of the conditional half.

    Raises:
        ValueError: a scale or number of channels that cannot work, or a model without `null_label`.
    """
    if not (math.isfinite(cfg_scale) and cfg_scale >= 0):
        raise ValueError(
            f"cfg_scale={cfg_scale}: expected a finite number of at least 0; 1 is the conditional model, the "
            "paper guides with 1.5"
        )
    n = guidance_channels
    if n is not None and (isinstance(n, bool) or not isinstance(n, Integral) or n < 1):
        raise ValueError(
            f"guidance_channels={guidance_channels!r}: expected None (all) or at least 1"
        )
    if cfg_scale == 1:
        return model
    null_label = find_attribute(model, "null_label")
    if null_label is None:
        raise ValueError(
            f"cfg_scale={cfg_scale}: this model has no label for 'no class' (null_label), hence "
            "nothing to guide away from; use cfg_scale=1"
        )

    def guided_model(x: Tensor, t: Tensor, y: Labels) -> Tensor:
        y = as_labels(y).to(x.device)
        if n is not None and n > x.shape[1]:
            raise ValueError(f"guidance_channels={n}: the images have {x.shape[1]}")
        guide = x.shape[1] if n is None else n
        both = torch.cat([y, torch.full_like(y, null_label)])  # (2B,)
        output = model(torch.cat([x, x]), torch.cat([t, t]), both)  # (2B, 2C, H, W)
        # A difference of nearby numbers, magnified: not in bf16.
        conditional, unconditional = output.to(
            torch.promote_types(output.dtype, torch.float32)
        ).chunk(2)
        eps, eps_null = conditional[:, :guide], unconditional[:, :guide]
        eps = eps_null + cfg_scale * (eps - eps_null)
        return torch.cat([eps, conditional[:, guide:]], dim=1)  # (B, 2C, H, W)

    return guided_model


def denoise(
    model: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    y: Labels | None,
    *,
    steps: int = 250,
    method: str = "ddpm",
    cfg_scale: float = 1.0,
    guidance_channels: int | None = None,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    shape: tuple[int, int, int] | None = None,
    clip_denoised: bool = False,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Walk from noise to images, one denoising step per item.

    Args:
        model: (x: (B, C, H, W), t: (B,), y) -> (B, 2C, H, W), a `DiffuSSM` for example.
        diffusion: The schedule that the model was trained with.
        y: Labels, integers (B,): a tensor, an array or a list. None for an unconditional model; then `noise`
            says how many.
        steps: Length of the chain, 1 to diffusion.num_timesteps.
        method: "ddpm" (ancestral sampling with the learned variance) or "ddim".
        cfg_scale: Guidance, see `guided`.
        guidance_channels: See `guided`.
        eta: Noise of DDIM, 0 (none) to 1.
        generator: Source of all noise; the same state gives the same images. Default torch's own.
        noise: Start of the chain, (B, C, H, W); default drawn from `generator`.
        shape: (C, H, W) of one image; default from `noise` or `model.config`.
        clip_denoised: Clamp each predicted image to [-1, 1]: for pixels, not for latents.

    Yields:
        The timestep as the model saw it, x after the step, and the predicted clean image, (B, C, H, W) both.

    Raises:
        ValueError, TypeError: options that cannot work, before the first step.
    """
    if method not in ("ddpm", "ddim"):
        raise ValueError(f"method={method!r}: expected 'ddpm' or 'ddim'")
    if not 0 <= eta <= 1:
        raise ValueError(
            f"eta={eta}: expected 0 (deterministic) to 1 (as noisy as ddpm)"
        )
    if eta and method == "ddpm":
        raise ValueError(
            f"eta={eta} with method='ddpm': eta belongs to 'ddim', ddpm learns its variance"
        )
    if y is None and cfg_scale != 1:
        raise ValueError(
            f"cfg_scale={cfg_scale} without labels: guidance needs y, use cfg_scale=1"
        )
    labels = None if y is None else as_labels(y)
    x = _start(model, labels, generator, noise, shape)
    labels = None if labels is None else labels.to(x.device)
    shorter = diffusion.respace(steps)
    predict = guided(model, cfg_scale, guidance_channels)

    def steps_back(x: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        with find_attribute(model, "cached_kernels", nullcontext)():
            for step in reversed(range(steps)):
                if method == "ddpm":
                    x, pred_xstart = ancestral_step(
                        predict, shorter, x, step, labels, generator, clip_denoised
                    )
                else:
                    x, pred_xstart = ddim_step(
                        predict, shorter, x, step, labels, generator, clip_denoised, eta
                    )
                yield int(shorter.timestep_map[step]), x, pred_xstart

    return steps_back(x)


def _start(
    model: Callable[..., Tensor],
    y: Tensor | None,
    generator: torch.Generator | None,
    noise: Tensor | None,
    shape: tuple[int, int, int] | None,
) -> Tensor:
    """Check labels, noise and shape against each other; return x_T (B, C, H, W)."""
    if y is not None and y.ndim != 1:
        raise ValueError(
            f"y has shape {tuple(y.shape)}: expected (B,), one label per image to draw"
        )
    config = find_attribute(model, "config")
    if shape is None and noise is None and config is not None:
        shape = (config.in_channels, config.height, config.width)
    if noise is not None:
        batch = len(noise) if y is None else len(y)
        expected = (batch, *(noise.shape[1:] if shape is None else shape))
        if noise.ndim != 4 or noise.shape != expected:
            wanted = "(B, C, H, W)" if len(expected) != 4 else expected
            raise ValueError(f"noise has shape {tuple(noise.shape)}: expected {wanted}")
        if not noise.is_floating_point():
            raise TypeError(f"noise has dtype {noise.dtype}: expected floating point")
        return noise
    if y is None:
        raise ValueError(
            "y=None and no noise: pass noise (B, C, H, W) to say how many images to draw"
        )
    if shape is None or len(shape) != 3:
        raise ValueError(
            f"shape={shape}: expected (C, H, W) of one image; a model with a config knows it"
        )
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    weight = next(parameters, None)
    device = y.device if weight is None else weight.device
    return standard_normal((len(y), *shape), generator, device, torch.float32)


def sample(
    model: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    y: Labels | None,
    steps: int = 250,
    method: str = "ddpm",
    cfg_scale: float = 1.0,
    generator: torch.Generator | None = None,
    progress: bool = True,
    **options: Any,
) -> Tensor:
    """Draw images: the last item of `denoise`, with a progress bar on stderr.

    Args:
        model, diffusion, y, steps, method, cfg_scale, generator: As for `denoise`.
        progress: Show the bar.
        options: The other options of `denoise`: guidance_channels, eta, noise, shape, clip_denoised.

    Returns:
        (B, C, H, W), not clipped; as empty as `y`.

    Raises:
        ValueError, TypeError: as for `denoise`, before the first step.
    """
    chain = denoise(
        model,
        diffusion,
        y,
        steps=steps,
        method=method,
        cfg_scale=cfg_scale,
        generator=generator,
        **options,
    )
    for _, x, _ in tqdm(
        chain,
        total=steps,
        desc=f"sampling ({method})",
        unit="step",
        disable=not progress,
    ):
        images = x
    return images
