"""Sampling, and guidance.

Generated from book/32_sampling.md by `make export`: edit there.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffussm.diffusion import (
    GaussianDiffusion,
    NoiseSource,
    find_attribute,
    standard_normal,
)
from diffussm.embeddings import Labels, as_labels
from diffussm.forward_process import working_dtype
from diffussm.guards import (
    expect,
    expect_indices,
    expect_int,
    expect_number,
    expect_real,
)
from diffussm.reverse_process import ancestral_step, ddim_step
from diffussm.sample_options import Sampler

__all__ = ["guided", "walk", "draw", "denoise", "sample"]


def guided(
    model: Callable[..., Tensor], cfg_scale: float, guidance_channels: int | None = None
) -> Callable[..., Tensor]:
    """A model that exaggerates what the label changes: classifier-free guidance
    (eq-sampling-guidance).

    Args:
        model: (x, t, y) -> (B, 2C, H, W), with an attribute `null_label`, the label for
            "no class"; or a wrapper of one, such as DistributedDataParallel.
        cfg_scale: w >= 0. 0 is the unconditional model, 1 the conditional one (`model`
            itself), more guides.
        guidance_channels: Guide only the first so many channels of the noise; default
            all. DiT's code does 3.

    Returns:
        A model of the same form. It runs `model` once, on a batch of 2B; v is that of
        the conditional half.

    Raises:
        ValueError: a scale or number of channels that cannot work, or a model without
            `null_label`.
    """
    if expect_number("cfg_scale", cfg_scale, least=0) == 1:
        return model
    null_label = find_attribute(model, "null_label")
    if null_label is None:
        raise ValueError(f"{cfg_scale=}: this model has no label for 'no class', use 1")

    def guided_model(x: Tensor, t: Tensor, y: Labels) -> Tensor:
        C = x.shape[1]
        n = C if guidance_channels is None else guidance_channels
        expect_int("guidance_channels", n, least=1, most=C)
        y = as_labels(y).to(x.device)
        both = torch.cat([y, torch.full_like(y, null_label)])  # (2B,)
        output = model(torch.cat([x, x]), torch.cat([t, t]), both)  # (2B, 2C, H, W)
        return _exaggerated(output, cfg_scale, n)

    return guided_model


def _exaggerated(output: Tensor, w: float, n: int) -> Tensor:
    """Guide n channels (eq-sampling-guidance): answers (2B, 2C, H, W), first those with
    the label, become one (B, 2C, H, W).
    """
    conditional, unconditional = output.to(working_dtype(output)).chunk(2)
    eps, eps_null = conditional[:, :n], unconditional[:, :n]
    return torch.cat([eps_null + w * (eps - eps_null), conditional[:, n:]], dim=1)


def _step_back(sampler: Sampler, *arguments: Any) -> tuple[Tensor, Tensor]:
    """One step: arguments and results as for `ancestral_step`."""
    options: dict[str, Any] = {"clip_denoised": sampler.clip_denoised}
    if sampler.method == "ddpm":
        return ancestral_step(*arguments, **options)
    return ddim_step(*arguments, **options | {"eta": sampler.eta})


def _steps_back(
    sampler: Sampler,
    model: Callable[..., Tensor],
    predict: Callable[..., Tensor],
    chain: GaussianDiffusion,
    x: Tensor,
    y: Tensor | None,
    generator: NoiseSource,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    with find_attribute(model, "cached_kernels", nullcontext)():
        for step in reversed(range(sampler.steps)):
            x, x0 = _step_back(sampler, predict, chain, x, step, y, generator)
            yield int(chain.timestep_map[step]), x, x0


def walk(
    sampler: Sampler,
    model: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    y: Labels | None,
    *,
    generator: NoiseSource = None,
    noise: Tensor | None = None,
    shape: tuple[int, ...] | None = None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """From noise to images, step by step: arguments and items as for `denoise`."""
    if y is None and sampler.cfg_scale != 1:
        raise ValueError(f"cfg_scale={sampler.cfg_scale}: guidance needs y, or use 1")
    predict = guided(model, sampler.cfg_scale, sampler.guidance_channels)
    chain = diffusion.respace(sampler.steps)
    x, labels = _start(model, y, generator, noise, shape)
    if sampler.cfg_scale != 1 and (n := sampler.guidance_channels) is not None:
        expect_int("guidance_channels", n, least=1, most=x.shape[1])
    return _steps_back(sampler, model, predict, chain, x, labels, generator)


def _start(
    model: Callable[..., Tensor],
    y: Labels | None,
    generator: NoiseSource,
    noise: Tensor | None,
    shape: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor | None]:
    """x_T (B, C, H, W) and the labels (B,), both on the device of the model."""
    sizes = dict(zip("CHW", _image_shape(model, noise, shape), strict=False))
    labels = None if y is None else as_labels(y)
    if labels is not None:
        (sizes["B"],) = expect("y", labels, "B")
        if (null_label := find_attribute(model, "null_label")) is not None:
            expect_indices("y", labels, null_label + 1)
    if noise is None:
        noise = _drawn_noise(model, labels, generator, **sizes)
    expect_real(noise=noise)
    expect("noise", noise, "B C H W", **sizes)
    noise = noise.to(_home(model, noise))
    return noise, None if labels is None else labels.to(noise.device)


def _drawn_noise(
    model: Callable[..., Tensor],
    labels: Tensor | None,
    generator: NoiseSource,
    **sizes: int,
) -> Tensor:
    if labels is None:
        raise ValueError("y=None without noise: pass noise (B, C, H, W)")
    size = [sizes[letter] for letter in "BCHW"]
    return standard_normal(size, generator, _home(model, labels), torch.float32)


def _home(model: Callable[..., Tensor], otherwise: Tensor) -> torch.device:
    """The device of the model's weights; of a tensor, for a model that has none."""
    weights = model.parameters() if isinstance(model, torch.nn.Module) else ()
    return next(iter(weights), otherwise).device


def _image_shape(
    model: Callable[..., Tensor], noise: Tensor | None, shape: tuple[int, ...] | None
) -> tuple[int, ...]:
    """(C, H, W); nothing where the noise has a shape and no other is asked for."""
    if shape is None and noise is not None:
        return ()
    config = find_attribute(model, "config")
    if shape is None and config is not None:
        return config.in_channels, config.height, config.width
    if shape is None or len(shape) != 3:
        raise ValueError(f"{shape=}: expected (C, H, W), or a model with a config")
    return shape


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Numbers of NumPy as Python's."""
    return {k: v.item() if hasattr(v, "item") else v for k, v in options.items()}


def draw(
    sampler: Sampler,
    model: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    y: Labels | None,
    *,
    progress: bool = True,
    **start: Any,
) -> Tensor:
    """Images (B, C, H, W), not clipped.

    `progress` shows a bar on stderr; the other arguments are those of `walk`.
    """
    chain = walk(sampler, model, diffusion, y, **start)
    title = f"sampling ({sampler.method})"
    bar = tqdm(chain, title, sampler.steps, unit="step", disable=not progress)
    for _, x, _ in bar:
        images: Tensor = x
    return images


def denoise(
    model: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    y: Labels | None,
    *,
    generator: NoiseSource = None,
    noise: Tensor | None = None,
    shape: tuple[int, int, int] | None = None,
    **options: Any,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Walk from noise to images, one denoising step per item.

    Args:
        model: (x: (B, C, H, W), t: (B,), y) -> (B, 2C, H, W), a `DiffuSSM` for example.
        diffusion: The schedule that the model was trained with.
        y: Labels, integers (B,): a tensor, an array or a list. None for an
            unconditional model; then `noise` says how many.
        generator: Source of all noise, or one for each image; default torch's own.
        noise: Start of the chain, (B, C, H, W), moved to the device of the model;
            default drawn from `generator`.
        shape: (C, H, W) of one image; default from `noise` or `model.config`.
        options: The fields of `Sampler`.

    Yields:
        The timestep as the model saw it, x after the step, and the predicted clean
        image, (B, C, H, W) both.

    Raises:
        ValueError, TypeError: options, noise or labels that cannot work, before the
            first step.
    """
    start: dict[str, Any] = {"generator": generator, "noise": noise, "shape": shape}
    return walk(Sampler(**_plain(options)), model, diffusion, y, **start)


def sample(
    model: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    y: Labels | None,
    steps: int = 250,
    method: str = "ddpm",
    cfg_scale: float = 1.0,
    generator: NoiseSource = None,
    progress: bool = True,
    **options: Any,
) -> Tensor:
    """Images (B, C, H, W), not clipped: the last item of `denoise`, whose arguments
    these are.
    """
    given = [key for key in ("noise", "shape") if key in options]
    start: dict[str, Any] = {key: options.pop(key) for key in given}
    start |= {"generator": generator, "progress": progress}
    options |= {"steps": steps, "method": method, "cfg_scale": cfg_scale}
    return draw(Sampler(**_plain(options)), model, diffusion, y, **start)
