"""Schedulers: samplers that we never wrote.

Generated from book/60_schedulers.md by `make export`: edit there.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler
from torch import Tensor

from diffussm.diffusion import GaussianDiffusion, NoiseSource, find_attribute
from diffussm.embeddings import Labels
from diffussm.guards import expect_int, expect_number, expect_one_of
from diffussm.sample_options import Sampler
from diffussm.sampling import guided

__all__ = [
    "ancestral_scheduler",
    "ABOVE_ZERO",
    "FEWEST_STEPS",
    "linear_alphas_cumprod",
    "scheduler_for",
    "respaced_scheduler",
    "step_options",
    "scheduled_walk",
    "answered",
    "DRAWS_NOISE",
    "named_scheduler",
]


def ancestral_scheduler(num_train_timesteps: int = 1000) -> Any:
    """Our ancestral sampling as diffusers has it: linear schedule, learned variance,
    the spacing of ch. "The reverse process: from noise to images".
    """
    scale = 1000 / num_train_timesteps  # as in GaussianDiffusion.linear
    return DDPMScheduler(
        num_train_timesteps=num_train_timesteps,
        beta_start=1e-4 * scale,
        beta_end=0.02 * scale,
        beta_schedule="linear",
        variance_type="learned_range",
        timestep_spacing="linspace",
        clip_sample=False,
    )


_DOWN_TO_ZERO = {
    "DDIMParallelScheduler": 1,
    "DDIMScheduler": 1,
    "DDPMParallelScheduler": 1,
    "DDPMScheduler": 1,
    "DEISMultistepScheduler": 1,
    "EulerAncestralDiscreteScheduler": 400,
    "EulerDiscreteScheduler": 1,
}
ABOVE_ZERO = {
    "DPMSolverMultistepScheduler": 1,
    "DPMSolverSinglestepScheduler": 64,
    "HeunDiscreteScheduler": 1,
    "KDPM2DiscreteScheduler": 1,
    "LMSDiscreteScheduler": 1,
    "PNDMScheduler": 1,
    "SASolverScheduler": 1,
    "UniPCMultistepScheduler": 1,
}
FEWEST_STEPS = _DOWN_TO_ZERO | ABOVE_ZERO


def linear_alphas_cumprod(num_train_timesteps: int) -> Tensor:
    """The schedule of training, float64 (T,)."""
    scale, T = 1000 / num_train_timesteps, num_train_timesteps
    betas = torch.linspace(1e-4 * scale, 0.02 * scale, T, dtype=torch.float64)
    return torch.cumprod(1 - betas, dim=0)


def scheduler_for(scheduler: Any, num_train_timesteps: int) -> tuple[Any, bool]:
    """The scheduler to run, and whether it takes the network's second half, v, as well
    as the noise.

    Raises:
        ValueError: it expects something else than predicted noise, was made for other
            noise levels, or is of a class or has options with which its images would be
            wrong.
    """
    _check_scheduler(scheduler, num_train_timesteps)
    kind, config = type(scheduler), scheduler.config
    learned = config.get("variance_type") == "learned_range"
    takes = isinstance(scheduler, DDPMScheduler | DDPMParallelScheduler)
    if learned and not takes and "variance_type" in inspect.signature(kind).parameters:
        scheduler = kind.from_config(config, variance_type=None)
    return scheduler, learned and takes


_SIGMAS = ("karras", "exponential", "beta", "flow")
# what an option may be, the best first; None and what is not said are right, too
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon",),
    "variance_type": tuple(
        "learned_range fixed_small fixed_small_log fixed_large fixed_large_log".split()
    ),
    # the others leave noise on the finished image
    "algorithm_type": tuple(
        "dpmsolver++ sde-dpmsolver++ deis data_prediction noise_prediction".split()
    ),
    "interpolation_type": ("linear",),
    **{f"use_{kind}_sigmas": (False,) for kind in _SIGMAS},
    "use_lu_lambdas": (False,),
}


def _check_scheduler(scheduler: Any, T: int) -> None:
    name, config = type(scheduler).__name__, scheduler.config
    expect_one_of("scheduler", name, FEWEST_STEPS)
    for option, (best, *others) in _ACCEPTED.items():
        given = config.get(option, best)
        if given not in (None, best, *others):
            raise ValueError(
                f"{name} with {option}={given!r} draws wrong images from a DiffuSSM: "
                f"make it with {option}={best!r}"
            )
    ours, theirs = linear_alphas_cumprod(T).float(), scheduler.alphas_cumprod
    if theirs.shape != ours.shape or not torch.allclose(theirs.cpu(), ours, rtol=1e-3):
        raise ValueError(
            f"{name} has another noise schedule than the model: make it with "
            f"{name}.from_config(diffussm.schedulers.ancestral_scheduler({T}).config)"
        )


def _walked(name: str, num_train_timesteps: int, steps: int) -> Tensor:
    """The timesteps of training that are walked, in increasing order, (n,)."""
    points = steps + 1 if name in ABOVE_ZERO and steps < num_train_timesteps else steps
    last = num_train_timesteps - 1
    chosen = torch.linspace(last, 0, points, dtype=torch.float64).round().long()
    return chosen[:steps].flip(0)


def _respaced_options(betas: Tensor) -> dict[str, Any]:
    return {
        "num_train_timesteps": len(betas),
        "trained_betas": betas.tolist(),
        "timestep_spacing": "trailing",
        "steps_offset": 0,
        "skip_prk_steps": True,
        "set_alpha_to_one": True,
        "final_sigmas_type": "zero",
        "lower_order_final": True,
    }


def _with_levels(scheduler: Any, levels: Tensor) -> Any:
    """A scheduler of the same class whose alphas_cumprod are `levels`."""
    betas = 1 - levels / torch.cat([levels.new_ones(1), levels[:-1]])
    known = inspect.signature(type(scheduler)).parameters
    options = {k: v for k, v in _respaced_options(betas).items() if k in known}
    short = type(scheduler).from_config(scheduler.config, **options)
    # of its own products over float32 betas the last digits are wrong
    short.alphas_cumprod = levels.float()
    return short


def _set_timesteps(short: Any, steps: int, device: Any) -> None:
    """Make a scheduler with `steps` levels ready to walk all of them."""
    if "timesteps" in inspect.signature(short.set_timesteps).parameters:
        short.set_timesteps(timesteps=[*reversed(range(steps))], device=device)
    else:  # which "trailing" gives, too
        short.set_timesteps(steps, device=device)
    if hasattr(short, "sigmas") and short.sigmas[-1] > 0:
        short.sigmas[-1] = 1e-6  # it knows no option for the end


def _log_sigma(alphas_cumprod: Tensor) -> Any:
    return ((1 - alphas_cumprod) / alphas_cumprod).log().div(2).numpy()


def _told(timesteps: Any, levels: Tensor, everywhere: Tensor) -> tuple[Tensor, Any]:
    """Training's timesteps, and alphas_cumprod, at those of a schedule of `levels`."""
    asked = np.interp(timesteps, np.arange(len(levels)), _log_sigma(levels))
    numbers = np.arange(float(len(everywhere)))
    times = np.interp(asked, _log_sigma(everywhere), numbers)
    return torch.from_numpy(times), 1 / (1 + np.exp(2 * asked))


def respaced_scheduler(
    scheduler: Any, num_train_timesteps: int, steps: int, device: Any = None
) -> tuple[Any, Tensor, list[float]]:
    """A scheduler of the same class whose whole schedule is the noise levels to be
    walked (equation eq-sampling-respace).

    Returns:
        It, with its timesteps set; what the network is to be told at each of its calls,
        (calls,); and the alphas_cumprod there, float64.

    Raises:
        ValueError: so few steps that the images would have a wrong spread.
    """
    name = type(scheduler).__name__
    expect_int(f"{name} with num_inference_steps", steps, least=FEWEST_STEPS[name])
    everywhere = linear_alphas_cumprod(num_train_timesteps)
    levels = everywhere[_walked(name, num_train_timesteps, steps)]
    short = _with_levels(scheduler, levels)
    _set_timesteps(short, steps, device)
    asked = short.timesteps.double().cpu().numpy()
    times, alphas_cumprod = _told(asked, levels, everywhere)
    if hasattr(short, "tau_func"):
        short.tau_func = _in_training_time(scheduler.tau_func, times)
    dtype = torch.int64 if bool((times == times.round()).all()) else torch.float32
    return short, times.to(device, dtype), alphas_cumprod.tolist()


def _in_training_time(
    function: Callable[[float], float], times: Tensor
) -> Callable[[Any], float]:
    """A function of training's timestep as one of the respaced timestep, n - 1 for the
    first of `times`.
    """
    return lambda t: function(float(times[len(times) - 1 - int(t)]))


def step_options(scheduler: Any, eta: float, generator: Any) -> dict[str, Any]:
    """`eta` and `generator`, if the step of this scheduler takes them."""
    name, step = type(scheduler).__name__, inspect.signature(scheduler.step)
    given = {"eta": expect_number("eta", eta, least=0, most=1), "generator": generator}
    if eta and "eta" not in step.parameters:
        raise ValueError(f"eta={eta}: {name} has no such noise, only DDIM; omit eta")
    return {key: value for key, value in given.items() if key in step.parameters}


@torch.no_grad()
def scheduled_walk(
    scheduler: Any,
    sampler: Sampler,
    model: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    y: Labels | None,
    *,
    generator: NoiseSource = None,
    noise: Tensor,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """As `sampling.walk`, by the steps of a scheduler, not by those of its method."""
    T, eta = diffusion.num_timesteps, sampler.eta
    plain, takes_v = scheduler_for(scheduler, T)
    short, times, levels = respaced_scheduler(plain, T, sampler.steps, noise.device)
    options = step_options(short, eta, generator)
    predict = guided(model, sampler.cfg_scale, sampler.guidance_channels)
    x, last = noise * short.init_noise_sigma, len(times) - 1
    x_t = short.scale_model_input(x, short.timesteps[0])
    with find_attribute(model, "cached_kernels", nullcontext)():
        for call, t in enumerate(short.timesteps):
            output = predict(x_t, times[call].expand(len(x)), y).to(x.dtype)
            answer, x0 = answered(output, x_t, levels[call], sampler.clip_denoised)
            answer = answer if takes_v else answer.chunk(2, dim=1)[0]
            x = short.step(answer, t, x, **options, return_dict=False)[0]
            following = short.timesteps[min(call + 1, last)]
            x_t = x if call == last else short.scale_model_input(x, following)
            yield int(times[call]), x_t, x0


def answered(
    output: Tensor, x_t: Tensor, alpha_bar: float, clip: bool
) -> tuple[Tensor, Tensor]:
    """What a network of noise and v answers, (B, 2C, H, W), and the image in it; with
    `clip` the image ends at -1 and 1, and the noise is that which belongs to it.
    """
    eps, v = output.chunk(2, dim=1)
    signal, spread = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    x0 = (x_t - spread * eps) / signal
    if clip:
        x0 = x0.clamp(-1, 1)
        eps = (x_t - signal * x0) / spread
    return torch.cat([eps, v], dim=1), x0


DRAWS_NOISE = {
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "SASolverScheduler",
}


def named_scheduler(name: str, num_train_timesteps: int) -> Any:
    """The scheduler of a class of diffusers, for a model trained with so many steps."""
    kind = getattr(diffusers, expect_one_of("scheduler", name, FEWEST_STEPS))
    return kind.from_config(ancestral_scheduler(num_train_timesteps).config)
