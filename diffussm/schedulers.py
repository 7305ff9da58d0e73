"""Schedulers: samplers that we never wrote.

Generated from book/60_schedulers.md by `make export`: edit there.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler
from torch import Tensor

from diffussm.guards import expect_number

__all__ = [
    "ancestral_scheduler",
    "ABOVE_ZERO",
    "FEWEST_STEPS",
    "linear_alphas_cumprod",
    "scheduler_for",
    "respaced_scheduler",
    "step_options",
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


_TAKES_VARIANCE = (DDPMScheduler, DDPMParallelScheduler)


def scheduler_for(scheduler: Any, num_train_timesteps: int) -> tuple[Any, bool]:
    """The scheduler to run, and whether it takes the network's second half, v, as well
    as the noise.

    Raises:
        ValueError: it expects something else than predicted noise, was made for other
            noise levels, or is of a class or has options with which its images would be
            wrong.
    """
    kind, config = type(scheduler), scheduler.config
    _check_scheduler(scheduler, kind.__name__, config, num_train_timesteps)
    learned = config.get("variance_type") == "learned_range"
    if isinstance(scheduler, _TAKES_VARIANCE):
        return scheduler, learned
    if learned and "variance_type" in inspect.signature(kind).parameters:
        return kind.from_config(config, variance_type=None), False
    return scheduler, False


# options with which a scheduler leaves the noise levels that the pipeline gives it, and
# what to set instead
_OWN_LEVELS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "interpolation_type": "linear",
}


def _check_scheduler(scheduler: Any, name: str, config: Any, T: int) -> None:
    _check_kind(name, config)
    _check_options(name, config)
    ours, theirs = linear_alphas_cumprod(T).float(), scheduler.alphas_cumprod
    if theirs.shape != ours.shape or not torch.allclose(theirs.cpu(), ours, rtol=1e-3):
        raise ValueError(
            f"{name} has another noise schedule than the one in which this model was "
            f"trained, linear betas from {0.1 / T:g} to {20 / T:g}, {T} of them. Make "
            f"it with {name}.from_config("
            f"diffussm.schedulers.ancestral_scheduler({T}).config)"
        )
    if config.get("variance_type") == "learned":
        raise ValueError(
            f"{name} has variance_type='learned'; a DiffuSSM learns a 'learned_range'"
        )


def _check_kind(name: str, config: Any) -> None:
    known = ", ".join(sorted(FEWEST_STEPS))
    if config.get("prediction_type") != "epsilon":
        raise ValueError(
            f"{name} has prediction_type={config.get('prediction_type')!r}; a DiffuSSM "
            f"predicts the noise: expected 'epsilon', and one of {known}"
        )
    if name not in FEWEST_STEPS:
        raise ValueError(
            f"{name} is not among the schedulers that draw right images from a "
            "DiffuSSM; the others need other noise levels, serve another task or give "
            f"the images a wrong spread. Use one of {known}"
        )


def _check_options(name: str, config: Any) -> None:
    for option, expected in _OWN_LEVELS.items():
        if config.get(option, expected) not in (expected, None):
            raise ValueError(
                f"{name} has {option}={config[option]!r}; the noise levels are the "
                f"pipeline's to choose, equally spaced in t: make it with "
                f"{option}={expected!r}"
            )
    kind = config.get("algorithm_type")
    if kind in ("dpmsolver", "sde-dpmsolver"):
        raise ValueError(
            f"{name} has algorithm_type={kind!r}, which leaves noise on the finished "
            f"image; use '{kind}++'"
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


def _with_levels(scheduler: Any, levels: Tensor, device: Any) -> Any:
    """A scheduler of the same class whose alphas_cumprod are `levels`, ready to
    step.
    """
    kind, steps = type(scheduler), len(levels)
    betas = 1 - levels / torch.cat([levels.new_ones(1), levels[:-1]])
    known = inspect.signature(kind).parameters
    options = {k: v for k, v in _respaced_options(betas).items() if k in known}
    short = kind.from_config(scheduler.config, **options)
    # of its own products over float32 betas the last digits are wrong
    short.alphas_cumprod = levels.float()
    if "timesteps" in inspect.signature(short.set_timesteps).parameters:
        short.set_timesteps(timesteps=[*reversed(range(steps))], device=device)
    else:  # which "trailing" gives, too
        short.set_timesteps(steps, device=device)
    if hasattr(short, "sigmas") and short.sigmas[-1] > 0:
        short.sigmas[-1] = 1e-6  # it knows no option for the end
    return short


def _log_sigma(alphas_cumprod: Tensor) -> Any:
    return ((1 - alphas_cumprod) / alphas_cumprod).log().div(2).numpy()


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
    _check_steps(name, steps)
    everywhere = linear_alphas_cumprod(num_train_timesteps)
    levels = everywhere[_walked(name, num_train_timesteps, steps)]
    short = _with_levels(scheduler, levels, device)

    asked = short.timesteps.double().cpu().numpy()
    asked = np.interp(asked, np.arange(steps), _log_sigma(levels))
    numbers = np.arange(float(num_train_timesteps))
    times = torch.from_numpy(np.interp(asked, _log_sigma(everywhere), numbers))
    if hasattr(short, "tau_func"):
        short.tau_func = _in_training_time(scheduler.tau_func, times)
    whole = bool((times == times.round()).all())
    times = times.to(device, torch.int64 if whole else torch.float32)
    return short, times, (1 / (1 + np.exp(2 * asked))).tolist()


def _in_training_time(
    function: Callable[[float], float], times: Tensor
) -> Callable[[Any], float]:
    """A function of training's timestep as one of the respaced timestep, n - 1 for the
    first of `times`.
    """
    return lambda t: function(float(times[len(times) - 1 - int(t)]))


def step_options(scheduler: Any, eta: float, generator: Any) -> dict[str, Any]:
    """Those of the two that the step of this scheduler takes."""
    known = inspect.signature(scheduler.step).parameters
    expect_number("eta", eta, least=0, most=1)
    if eta and "eta" not in known:
        raise ValueError(
            f"eta={eta}: {type(scheduler).__name__} has no such noise, only DDIM; "
            "omit eta"
        )
    given = {"eta": eta, "generator": generator}
    return {name: value for name, value in given.items() if name in known}


def _check_steps(name: str, steps: int) -> None:
    if steps < FEWEST_STEPS[name]:
        raise ValueError(
            f"{name} with num_inference_steps={steps}: the spread of its images would "
            f"be wrong by over 2%. Use {FEWEST_STEPS[name]} steps or more, or "
            "DDPMScheduler, whose learned variance needs few"
        )
