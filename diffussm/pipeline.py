"""The pipeline.

Generated from book/61_pipeline.md by `make export`: edit there.
"""

import ast
import difflib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMParallelScheduler, DDPMScheduler
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from diffussm.files import apply_umask
from diffussm.model import DiffuSSM
from diffussm.sampling import guided

__all__ = [
    "ancestral_scheduler",
    "TAKES_VARIANCE",
    "DOWN_TO_ZERO",
    "ABOVE_ZERO",
    "FEWEST_STEPS",
    "OWN_LEVELS",
    "linear_alphas_cumprod",
    "scheduler_for",
    "respaced_scheduler",
    "Denoiser",
    "DiffuSSMPipeline",
    "COMPONENT_FILE",
    "COMPONENT_CODE",
    "self_contained_code",
    "CITATION",
    "CLIP_ADVICE",
    "SCORES",
    "model_card",
]


def ancestral_scheduler(num_train_timesteps: int = 1000) -> Any:
    """Our ancestral sampling as diffusers has it: linear schedule, learned variance, chapter 7's spacing."""
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


TAKES_VARIANCE = (DDPMScheduler, DDPMParallelScheduler)
# The schedulers that end where they should, and the fewest steps with which they do. Every class of diffusers
# is walked by tests/test_pipeline_schedulers.py. These visit the timesteps of chapter 7, T - 1 to 0, ...
DOWN_TO_ZERO = {
    "DDIMParallelScheduler": 1,
    "DDIMScheduler": 1,
    "DDPMParallelScheduler": 1,
    "DDPMScheduler": 1,
    "DEISMultistepScheduler": 1,
    "EulerAncestralDiscreteScheduler": 400,
    "EulerDiscreteScheduler": 1,
}
# ... and these all but 0, where a solver that extrapolates stumbles, so steeply does the noise fall there.
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
FEWEST_STEPS = DOWN_TO_ZERO | ABOVE_ZERO
# options with which a scheduler leaves the noise levels that the pipeline gives it, and what to set instead
OWN_LEVELS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "interpolation_type": "linear",
}


def linear_alphas_cumprod(num_train_timesteps: int) -> Tensor:
    """The schedule of training, float64 (T,): that of `ancestral_scheduler`, without its rounding."""
    scale = 1000 / num_train_timesteps
    betas = torch.linspace(
        1e-4 * scale, 0.02 * scale, num_train_timesteps, dtype=torch.float64
    )
    return torch.cumprod(1 - betas, dim=0)


def scheduler_for(scheduler: Any, num_train_timesteps: int) -> tuple[Any, bool]:
    """The scheduler to run, and whether it takes the network's second half, v, as well as the noise.

    Raises:
        ValueError: it expects something else than predicted noise, was made for other noise levels, or is of
            a class or has options with which its images would be wrong.
    """
    name, config, T = type(scheduler).__name__, scheduler.config, num_train_timesteps
    _check_kind(name, config)
    ours, theirs = linear_alphas_cumprod(T).float(), scheduler.alphas_cumprod
    if theirs.shape != ours.shape or not torch.allclose(theirs.cpu(), ours, rtol=1e-3):
        raise ValueError(
            f"{name} has another noise schedule than the one in which this model was trained, linear betas "
            f"from {0.1 / T:g} to {20 / T:g}, {T} of them. Make it with "
            f"{name}.from_config(diffussm.pipeline.ancestral_scheduler({T}).config)"
        )
    variance = config.get("variance_type")
    if variance == "learned":
        raise ValueError(
            f"{name} has variance_type='learned'; a DiffuSSM learns a 'learned_range'"
        )
    if isinstance(scheduler, TAKES_VARIANCE):
        return scheduler, variance == "learned_range"
    if (
        variance == "learned_range"
        and "variance_type" in inspect.signature(type(scheduler)).parameters
    ):
        # inherited through from_config: these solvers have no use for v, and cut the noise to 3 channels
        scheduler = type(scheduler).from_config(config, variance_type=None)
    return scheduler, False


def _check_kind(name: str, config: Any) -> None:
    """ValueError unless this is a class whose walk is known to be right, with options that keep it so."""
    known = ", ".join(sorted(FEWEST_STEPS))
    if config.get("prediction_type") != "epsilon":
        raise ValueError(
            f"{name} has prediction_type={config.get('prediction_type')!r}; a DiffuSSM predicts the noise: "
            f"expected 'epsilon', and one of {known}"
        )
    if name not in FEWEST_STEPS:
        raise ValueError(
            f"{name} is not among the schedulers that draw right images from a DiffuSSM; the others need "
            f"other noise levels, serve another task or give the images a wrong spread. Use one of {known}"
        )
    for option, expected in OWN_LEVELS.items():
        if config.get(option, expected) not in (expected, None):
            raise ValueError(
                f"{name} has {option}={config[option]!r}; the noise levels are the pipeline's to choose, "
                f"equally spaced in t: make it with {option}={expected!r}"
            )
    if config.get("algorithm_type") in ("dpmsolver", "sde-dpmsolver"):
        raise ValueError(
            f"{name} has algorithm_type={config['algorithm_type']!r}, which leaves noise on the finished "
            f"image; use '{config['algorithm_type']}++'"
        )


def respaced_scheduler(
    scheduler: Any, num_train_timesteps: int, steps: int, device: Any = None
) -> tuple[Any, Tensor, list[float]]:
    """A scheduler of the same class whose whole schedule is the noise levels to be walked (chapter 7).

    Returns:
        It, with its timesteps set; what the network is to be told at each of its calls, (calls,); and the
        alphas_cumprod there, float64.

    Raises:
        ValueError: so few steps that the images would have a wrong spread.
    """
    kind, name = type(scheduler), type(scheduler).__name__
    if steps < FEWEST_STEPS[name]:
        raise ValueError(
            f"{name} with num_inference_steps={steps}: the spread of its images would be wrong by over 2%. "
            f"Use {FEWEST_STEPS[name]} steps or more, or DDPMScheduler, whose learned variance needs few"
        )
    points = steps + 1 if name in ABOVE_ZERO and steps < num_train_timesteps else steps
    chosen = (
        torch.linspace(num_train_timesteps - 1, 0, points, dtype=torch.float64)
        .round()
        .long()
    )
    everywhere = linear_alphas_cumprod(num_train_timesteps)
    levels = everywhere[chosen[:steps].flip(0)]  # (n,), less and less signal
    betas = 1 - levels / torch.cat([levels.new_ones(1), levels[:-1]])
    schedule = {
        "num_train_timesteps": steps,
        "trained_betas": betas.tolist(),
        "timestep_spacing": "trailing",
    }
    schedule |= {
        "steps_offset": 0,
        "skip_prk_steps": True,
    }  # PNDM's first steps need timesteps in between
    # the last step ends at the image
    schedule |= {
        "set_alpha_to_one": True,
        "final_sigmas_type": "zero",
        "lower_order_final": True,
    }
    known = inspect.signature(kind).parameters
    short = kind.from_config(
        scheduler.config, **{key: schedule[key] for key in schedule if key in known}
    )
    short.alphas_cumprod = (
        levels.float()
    )  # of its own products over float32 betas the last digits are wrong
    if "timesteps" in inspect.signature(short.set_timesteps).parameters:
        short.set_timesteps(timesteps=[*reversed(range(steps))], device=device)
    else:  # which "trailing" gives, too
        short.set_timesteps(steps, device=device)
    if (
        hasattr(short, "sigmas") and short.sigmas[-1] > 0
    ):  # it knows no option for the end
        short.sigmas[-1] = 1e-6

    def log_sigma(alphas_cumprod: Tensor) -> Any:
        return ((1 - alphas_cumprod) / alphas_cumprod).log().div(2).numpy()

    # an integer t stands for itself; between two of them, log sigma is interpolated, as the schedulers do
    asked = np.interp(
        short.timesteps.double().cpu().numpy(), np.arange(steps), log_sigma(levels)
    )
    times = torch.from_numpy(
        np.interp(asked, log_sigma(everywhere), np.arange(float(num_train_timesteps)))
    )
    if hasattr(
        short, "tau_func"
    ):  # SASolver: where it adds noise, which depends on the timestep of training
        short.tau_func = _in_training_time(scheduler.tau_func, times)
    whole = bool((times == times.round()).all())
    times = times.to(device, torch.int64 if whole else torch.float32)
    return short, times, (1 / (1 + np.exp(2 * asked))).tolist()


def _in_training_time(
    function: Callable[[float], float], times: Tensor
) -> Callable[[Any], float]:
    """A function of training's timestep as a function of the respaced one, n - 1 for the first of `times`."""
    return lambda t: function(float(times[len(times) - 1 - int(t)]))


class Denoiser(DiffuSSM):
    """A `DiffuSSM` as diffusers wants components: it knows its device and dtype, and loads with a dtype."""

    @classmethod
    def of(cls, model: DiffuSSM) -> Self:
        """The same network; the weights are shared, not copied."""
        with torch.device("meta"):
            same = cls(model.config)
        same.load_state_dict(model.state_dict(), assign=True)
        return same.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        torch_dtype: torch.dtype | None = None,
        **_: Any,
    ) -> Self:
        """As `DiffuSSM.from_pretrained`; what else diffusers passes to every component is ignored."""
        model = super().from_pretrained(folder, device)
        return model.to(dtype=torch_dtype).requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_x.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are."""
        return self.embed_x.weight.dtype


class DiffuSSMPipeline(DiffusionPipeline):
    """A trained DiffuSSM with all that turns labels into images, for diffusers (chapter 13).

    Args:
        denoiser: the network; a `DiffuSSM` is wrapped in a `Denoiser`, taken out of a `DataParallel` or a
            `DistributedDataParallel` if it stands in one.
        scheduler: one of the classes in `FEWEST_STEPS`; see `ancestral_scheduler`. Exchange it with
            ``pipe.scheduler = Other.from_config(pipe.scheduler.config)``. Its spacing of timesteps and its
            last noise level are not read: the pipeline respaces the schedule as chapter 7 does.
        vae: the autoencoder whose latents the network makes; None if it makes pixels.
        id2label: names by class number, ``{"1": "goldfish, Carassius auratus"}``: a comma separates synonyms.
        num_train_timesteps: T of the linear schedule in which the network was trained.
        training: what is known of the training run, for the model card.

    Raises:
        ValueError: names outside the table, a VAE of other channels, a scheduler that cannot work.
    """

    config: Any
    denoiser: Any
    scheduler: Any
    vae: Any
    model_cpu_offload_seq: Any = "denoiser->vae"
    _optional_components = ["vae"]  # noqa: RUF012, as diffusers declares it

    def __init__(
        self,
        denoiser: nn.Module,
        scheduler: Any,
        vae: AutoencoderKL | None = None,
        id2label: dict[Any, str] | None = None,
        num_train_timesteps: int = 1000,
        training: dict[Any, Any] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(denoiser, nn.DataParallel | nn.parallel.DistributedDataParallel):
            denoiser = denoiser.module
        if isinstance(denoiser, DiffuSSM) and not isinstance(denoiser, Denoiser):
            denoiser = Denoiser.of(denoiser)
        self.register_modules(denoiser=denoiser, scheduler=scheduler, vae=vae)
        names = {str(number): name for number, name in (id2label or {}).items()}
        classes = self.denoiser.config.num_classes
        for number, name in names.items():
            if (
                not number.isdecimal()
                or int(number) >= classes
                or not isinstance(name, str)
            ):
                raise ValueError(
                    f"id2label has {number!r}: {name!r}, but the classes are 0 to {classes - 1}"
                )
        # a mapping, never a list: diffusers takes every list in model_index.json for a component
        self.register_to_config(
            id2label=names,
            num_train_timesteps=num_train_timesteps,
            training=training or {},
        )
        self._check_vae()
        scheduler_for(scheduler, num_train_timesteps)

    def _check_vae(self) -> None:
        if not hasattr(self.denoiser, "config"):
            raise TypeError(
                f"the denoiser is a {type(self.denoiser).__name__}: expected a DiffuSSM. Take it out of its "
                "wrapper: pipe.denoiser = pipe.denoiser.module"
            )
        channels = self.denoiser.config.in_channels
        if self.vae is not None and self.vae.config.latent_channels != channels:
            raise ValueError(
                f"the VAE has latents of {self.vae.config.latent_channels} channels, but the model makes "
                f"{channels}; pass the VAE that encoded its training data"
            )

    @property
    def labels(self) -> dict[str, list[int]]:
        """Every name, and every synonym, with the numbers of the classes that bear it."""
        table: dict[str, list[int]] = {}
        for number, names in self.config.id2label.items():
            for name in dict.fromkeys(
                [names, *(part.strip() for part in names.split(","))]
            ):
                table.setdefault(name, []).append(int(number))
        return table

    def get_label_ids(self, labels: Any) -> list[int]:
        """Class numbers of labels given by name or number: one, or an array, tensor or (nested) list of them.

        Raises:
            ValueError: an unknown name (with the nearest known), an ambiguous one, a number out of range.
            TypeError: neither name nor number.
        """
        if isinstance(labels, Tensor | np.ndarray | np.generic):
            labels = labels.tolist()
        if isinstance(labels, str):
            return [self._numbered(labels)]
        if isinstance(labels, Iterable):
            return [number for label in labels for number in self.get_label_ids(label)]
        count = self.denoiser.config.num_classes
        if isinstance(labels, bool) or not isinstance(labels, Integral):
            raise TypeError(f"class label {labels!r}: expected a name or an integer")
        number = int(labels)
        if not 0 <= number < count:
            raise ValueError(
                f"class label {number}: this model has classes 0 to {count - 1}"
            )
        return [number]

    def _numbered(self, name: str) -> int:
        table = self.labels
        if name not in table:
            near = difflib.get_close_matches(name, table, n=3)
            known = (
                f"did you mean {', '.join(near)}?"
                if near
                else f"known are {', '.join([*table][:12])}"
            )
            raise ValueError(f"this model has no class {name!r}; {known}")
        if len(table[name]) > 1:
            raise ValueError(
                f"{name!r} is the name of classes {table[name]}; give the number"
            )
        return table[name][0]

    def _labels(
        self, class_labels: Any, images_per_label: int
    ) -> tuple[Tensor | None, int]:
        """y (B,) on the device, or None, and B."""
        if (
            isinstance(images_per_label, bool)
            or not isinstance(images_per_label, Integral)
            or images_per_label < 1
        ):
            raise ValueError(
                f"images_per_label={images_per_label!r}: expected an integer of at least 1"
            )
        if not self.denoiser.config.num_classes:
            if class_labels is not None:
                raise ValueError(
                    "class_labels were given, but this model is unconditional; leave them out"
                )
            return None, int(images_per_label)
        if class_labels is None:
            raise ValueError(
                f"class_labels are missing: this model has {self.denoiser.config.num_classes} classes"
            )
        y = torch.tensor(
            self.get_label_ids(class_labels),
            dtype=torch.int64,
            device=self._execution_device,
        )
        return y.repeat_interleave(int(images_per_label)), len(y) * int(
            images_per_label
        )

    def _check_clipping(self, scheduler: Any, clip_denoised: bool) -> None:
        """ValueError if predicted images were to be clipped to [-1, 1] and are latents, which go beyond."""
        if self.vae is None and self.denoiser.config.in_channels in (1, 3):
            return
        if clip_denoised:
            raise ValueError(
                "clip_denoised=True clamps what the network takes for the clean image to [-1, 1], the range "
                "of pixels; this model makes latents, which go beyond: omit it"
            )
        for option in ("clip_sample", "thresholding"):
            if scheduler.config.get(option):
                raise ValueError(
                    f"{type(scheduler).__name__} has {option}=True, which clamps predicted images to the "
                    f"range of pixels; this model makes latents, which go beyond: make it with {option}=False"
                )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Any = None,
        images_per_label: int = 1,
        *,
        guidance_scale: float = 1.0,
        guidance_channels: int | None = None,
        num_inference_steps: int = 250,
        eta: float = 0.0,
        clip_denoised: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images.

        Args:
            class_labels: names or numbers, one or many (a list, an array, a tensor); none gives no images.
                None for an unconditional model.
            images_per_label: how many of each (in all, if unconditional).
            guidance_scale: w of classifier-free guidance (eq-sampling-guidance); 1 is none.
            guidance_channels: guide only the first so many channels; default all. DiT's code does 3.
            num_inference_steps: steps of the scheduler, 1 to T.
            eta: noise of DDIM, 0 to 1; other schedulers have none.
            clip_denoised: clamp what the network takes for the clean image to [-1, 1] at each of its calls.
                For pixels, and for solvers without noise, which otherwise throw single pixels far out.
            generator: source of all noise, or one for each image.
            latents: start of the chain, standard normal (B, C, H, W); default drawn from `generator`.
            output_type: "pil", "np" (B, H, W, 3) or "pt" (B, 3, H, W), both in [0, 1], or "latent": what the
                chain ends with, undecoded.
            return_dict: False gives a tuple.
            callback_on_step_end: called as (pipe, call, timestep, {"latents": x}) after each call of the
                network; may return other latents.

        Raises:
            ValueError, TypeError: arguments that cannot work, before the first step.
            FloatingPointError: images that are not finite, of a diverged network or an overflow.
        """
        self._check_vae()
        config, T = self.denoiser.config, self.config.num_train_timesteps
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(
                f"output_type={output_type!r}: expected 'pil', 'np', 'pt' or 'latent'"
            )
        if (
            output_type != "latent"
            and self.vae is None
            and config.in_channels not in (1, 3)
        ):
            raise ValueError(
                f"the model makes latents of {config.in_channels} channels and there is no VAE to decode "
                "them; pass vae= to the pipeline, or output_type='latent'"
            )
        scheduler, takes_variance = scheduler_for(self.scheduler, T)
        self._check_clipping(scheduler, clip_denoised)
        steps = num_inference_steps
        if (
            isinstance(steps, bool)
            or not isinstance(steps, Integral)
            or not 1 <= steps <= T
        ):
            raise ValueError(
                f"num_inference_steps={steps!r}: expected 1 to {T}, an integer"
            )
        y, count = self._labels(class_labels, images_per_label)
        model = guided(self.denoiser, guidance_scale, guidance_channels)
        if guidance_channels is not None and guidance_channels > config.in_channels:
            raise ValueError(
                f"guidance_channels={guidance_channels}: the model has {config.in_channels}"
            )
        shape = (count, config.in_channels, config.height, config.width)
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(
                f"{len(generator)} generators for {count} images: expected one for each"
            )
        if latents is not None and latents.shape != shape:
            raise ValueError(
                f"latents has shape {tuple(latents.shape)}: expected {shape}"
            )

        device = self._execution_device
        # x stays in float32 also when the weights are not: a step changes it by less than bfloat16 resolves
        dtype = torch.promote_types(self.denoiser.dtype, torch.float32)
        scheduler, times, alphas_cumprod = respaced_scheduler(
            scheduler, T, int(steps), device
        )
        options = _step_options(scheduler, eta, generator)
        x = (
            randn_tensor(shape, generator, device, dtype)
            if latents is None
            else latents.to(device, dtype)
        )
        x = x * scheduler.init_noise_sigma
        with self.denoiser.cached_kernels():
            for call, t in enumerate(
                self.progress_bar(scheduler.timesteps if count else [])
            ):
                scaled = scheduler.scale_model_input(x, t)
                output = model(scaled, times[call].expand(count), y).to(
                    dtype
                )  # (B, 2C, H, W)
                eps, v = output.split(config.in_channels, dim=1)  # (B, C, H, W) each
                if clip_denoised:
                    eps = _clipped(eps, scaled, alphas_cumprod[call])
                output = torch.cat([eps, v], dim=1) if takes_variance else eps
                x = scheduler.step(output, t, x, **options, return_dict=False)[0]
                if callback_on_step_end is not None:
                    answer = callback_on_step_end(
                        self, call, times[call], {"latents": x}
                    )
                    x = (answer or {}).get("latents", x)
        _check_finite(
            x, "the chain ended with", f"{type(scheduler).__name__}, {steps} steps"
        )
        images = self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _decode(self, x: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x
        if self.vae is not None:
            x = self._decode_latents(x)
        images = (x.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).cpu().numpy()
        return array if output_type == "np" else self.numpy_to_pil(array)

    def _decode_latents(self, latents: Tensor) -> Tensor:
        x = (
            latents if len(latents) else latents.new_zeros(1, *latents.shape[1:])
        )  # a VAE wants one at least
        x = x / self.vae.config.scaling_factor + (
            self.vae.config.get("shift_factor") or 0.0
        )
        images: Tensor = self.vae.decode(x.to(self.vae.dtype)).sample[: len(latents)]
        _check_finite(
            images,
            "the VAE decoded to",
            f"latents up to {x.abs().max():.3g}, {self.vae.dtype}",
        )
        return images

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        *,
        name: str | None = None,
        evaluation: dict[str, Any] | str | Path | None = None,
        license: str | None = None,
        **options: Any,
    ) -> None:
        """Write a folder that loads with or without this package: weights, code, and a model card.

        Args:
            save_directory: must not exist, or be empty. It appears complete or not at all.
            name: title of the model card; default the folder's name.
            evaluation: result of `diffussm evaluate`, or the JSON file that holds it.
            license: of the weights, as the hub writes it, such as "cc-by-nc-4.0".
            options: what diffusers passes besides; pickles (``safe_serialization=False``) are refused.

        Raises:
            FileExistsError: the folder holds something; nothing is written.
            ValueError: an option that is not supported, an evaluation that is no JSON object.
        """
        _save_pipeline(self, Path(save_directory), name, evaluation, license, options)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> Self:
        """The pipeline that `save_pretrained` wrote. Runs no code out of the folder.

        Args:
            pretrained_model_name_or_path: a local folder.
            options: ``torch_dtype`` of the weights; ``scheduler`` or ``vae`` instead of the saved ones.

        Raises:
            FileNotFoundError: the folder or a file is missing.
            ValueError: it holds another pipeline, or damaged files.
            TypeError: an unknown option.
        """
        return cls(**_load_pipeline(Path(pretrained_model_name_or_path), options))

    @classmethod
    def from_run(
        cls,
        run: str | Path,
        weights: str = "ema",
        vae: Any = None,
        step: int | None = None,
    ) -> Self:
        """The pipeline of a training run: "ema" weights, or "model", of the newest checkpoint or of `step`.

        `vae` is needed for a run on latents, and must have the encoder that made them (its decoder may be
        another): a folder, a name on the hub, or the module itself. Raises FileNotFoundError where there is
        no run or no such checkpoint, ValueError for a VAE that does not fit.
        """
        return cls(**_load_run(Path(run), weights, vae, step))


def _step_options(
    scheduler: Any,
    eta: float,
    generator: torch.Generator | list[torch.Generator] | None,
) -> dict[str, Any]:
    """Those of the two that the step of this scheduler takes; ValueError for an eta that would be ignored."""
    known = inspect.signature(scheduler.step).parameters
    if not 0 <= eta <= 1:
        raise ValueError(
            f"eta={eta}: expected 0 (no noise) to 1 (as much as ancestral sampling)"
        )
    if eta and "eta" not in known:
        raise ValueError(
            f"eta={eta}: {type(scheduler).__name__} has no such noise, only DDIM; omit eta"
        )
    return {
        name: value
        for name, value in (("eta", eta), ("generator", generator))
        if name in known
    }


def _clipped(eps: Tensor, x_t: Tensor, alpha_bar: float) -> Tensor:
    """The noise that belongs to the predicted image, clamped to [-1, 1] (as `p_mean_variance`, chapter 6)."""
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    pred_xstart = ((x_t - noise * eps) / signal).clamp(-1, 1)
    return (x_t - signal * pred_xstart) / noise


def _check_finite(x: Tensor, what: str, how: str) -> None:
    """Black squares for numbers that are no numbers would be taken for images."""
    bad = (~x.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise FloatingPointError(
            f"{what} numbers that are not finite in {len(bad)} of {len(x)} images ({how}): the weights have "
            "diverged, or half precision overflowed (torch_dtype=torch.float32 does not)"
        )


def _load_run(
    run: Path, weights: str, vae: Any, step: int | None = None
) -> dict[str, Any]:
    """The arguments of DiffuSSMPipeline."""
    try:  # looked up here: a saved pipeline has no training in its one file
        trained, autoencoder = (
            import_module("diffussm.run_folder"),
            import_module("diffussm.autoencoder"),
        )
    except ModuleNotFoundError as error:
        raise ImportError(
            "a training run is read by the package diffussm; install it"
        ) from error
    # found once: a run that is still training may write another checkpoint meanwhile
    found = (
        trained.find_checkpoint(run, step) if (run / "config.json").is_file() else None
    )
    step = int(found.name.removeprefix("step_")) if found else step
    model, config, classes = trained.load_run(run, weights, step)
    facts = {"weights": weights, "step": step, "images_seen": step * config.batch_size}
    facts |= {key: value for key, value in asdict(config).items() if key != "model"}
    facts["data"] = Path(config.data).name  # not where it lies on someone's disk
    made_by = trained.encoder_of(run, config.data)
    if made_by is not None:
        facts["latents"] = _without_place(made_by, "encoder_sha256", "scaling_factor")
    if vae is not None:
        name, vae = (
            (str(vae), autoencoder.load_vae(vae))
            if isinstance(vae, str | Path)
            else ("a module", vae)
        )
        identity = autoencoder.vae_identity(vae, name)
        if made_by is not None:
            autoencoder.check_encoder(made_by, identity, f"the latents of {run}")
        facts["vae"] = _without_place(identity, "encoder_sha256", "decoder_sha256")
    names = (
        {str(number): name for number, name in enumerate(classes)}
        if model.config.num_classes
        else {}
    )
    return {
        "denoiser": model,
        "scheduler": ancestral_scheduler(config.timesteps),
        "vae": vae,
        "id2label": names,
        "num_train_timesteps": config.timesteps,
        "training": json.loads(
            json.dumps(facts)
        ),  # as it comes back from a saved folder
    }


def _without_place(identity: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The name of an autoencoder, which is not where it lies on someone's disk, and what else is asked."""
    place = Path(identity["name"])
    name = place.name if place.is_absolute() or place.exists() else identity["name"]
    return {"name": name, **{key: identity[key] for key in keys if key in identity}}


COMPONENT_FILE = "modeling_diffussm.py"
# diffusers loads a component's code from the component's folder; ours is in pipeline.py, loaded just before
COMPONENT_CODE = (
    '"""The denoiser of this pipeline; its code is in pipeline.py, beside this folder."""\n\n'
    "from diffusers_modules.local.pipeline import Denoiser\n\n"
    '__all__ = ["Denoiser"]\n'
)


class _Source:
    """A module of this package, taken apart into what it defines and what it imports."""

    def __init__(self, module: str) -> None:
        spec = find_spec(f"diffussm.{module}")
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                f"the package diffussm has no module {module}; install it again"
            )
        text = Path(spec.origin).read_text(encoding="utf-8")
        self.lines, tree = text.splitlines(), ast.parse(text)
        self.title = f"# {module}: {(ast.get_docstring(tree) or '').splitlines()[0]}"
        self.defined: dict[str, ast.stmt] = {}
        self.imported: dict[
            str, list[tuple[str, str]]
        ] = {}  # name -> (from where or "", what)
        self.ours: dict[
            str, str
        ] = {}  # name -> the module of this package that it comes from
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                self.defined[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in (
                    node.targets if isinstance(node, ast.Assign) else [node.target]
                ):
                    self.defined[ast.unparse(target)] = node
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "diffussm."
            ):
                self.ours |= {
                    alias.name: str(node.module).removeprefix("diffussm.")
                    for alias in node.names
                }
            elif isinstance(node, ast.Import | ast.ImportFrom):
                origin = str(node.module) if isinstance(node, ast.ImportFrom) else ""
                for alias in node.names:
                    name = alias.asname or alias.name.partition(".")[0]
                    self.imported.setdefault(name, []).append(
                        (origin, ast.unparse(alias))
                    )

    def text(self, name: str) -> str:
        """A definition as it is written, with its decorators and the comment above it."""
        node = self.defined[name]
        first = min(
            [node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]
        )
        while self.lines[first - 2].startswith("#"):
            first -= 1
        return "\n".join(self.lines[first - 1 : node.end_lineno])


def self_contained_code(
    module: str = "pipeline", name: str = "DiffuSSMPipeline"
) -> str:
    """One file with a class of this package and all that it needs of it, and nothing that it does not need.

    Raises RuntimeError if two of the modules give different things the same name.
    """
    if __name__.startswith("diffusers_modules."):
        return Path(__file__).read_text(encoding="utf-8")  # this is that file
    sources: dict[str, _Source] = {}
    chosen: dict[str, str] = {}  # name -> module
    imports: dict[str, set[str]] = {}  # from where or "" -> what
    seen: set[tuple[str, str]] = set()

    def need(module: str, name: str) -> None:
        source = sources.get(module) or sources.setdefault(module, _Source(module))
        if name in source.ours:
            need(source.ours[name], name)
        elif name in source.imported:
            for origin, what in source.imported[name]:
                imports.setdefault(origin, set()).add(what)
        elif name in source.defined:
            if chosen.setdefault(name, module) != module:
                raise RuntimeError(
                    f"{module} and {chosen[name]} both define {name}; rename one of them"
                )
            if (module, name) not in seen:
                seen.add((module, name))
                for node in ast.walk(source.defined[name]):
                    if isinstance(node, ast.Name):
                        need(module, node.id)

    need(module, name)
    if "later" in chosen:  # what modules name in a text instead of importing it
        need("fft_convolution", "convolve")
        need("two_level", "vandermonde_two_level")
    order: list[str] = []  # a module after those it imports

    def place(module: str) -> None:
        if module in sources and module not in order:
            for other in sources[module].ours.values():
                place(other)
            order.append(module)

    for other in (module, "fft_convolution", "two_level"):
        place(other)
    parts = [
        '"""DiffuSSM, diffusion models without attention, as a pipeline for diffusers, in one file.\n\n'
        f"Written by save_pretrained out of modules of the package diffussm:\n{', '.join(order)}.\n"
        'License: Apache-2.0.\n"""\n',
        "\n".join(f"import {what}" for what in sorted(imports.pop("", ()))),
        "\n".join(
            f"from {origin} import {', '.join(sorted(imports[origin]))}"
            for origin in sorted(imports)
        ),
        "",
    ]
    for module in order:
        source = sources[module]
        names = [name for name in source.defined if chosen.get(name) == module]
        if names:
            parts.append(
                "\n\n".join(
                    [
                        f"\n{source.title}\n",
                        *(f"{source.text(name)}\n" for name in names),
                    ]
                )
            )
    # in the file, a function of a later chapter is one of this file
    home = "home = import_module(f\"{__package__ or 'diffussm'}.{module}\")"
    here = "home = import_module(__name__)"
    return "\n".join(parts).replace(home, here)


def _read_evaluation(evaluation: dict[str, Any] | str | Path | None) -> dict[str, Any]:
    if isinstance(evaluation, str | Path):
        try:
            evaluation = json.loads(Path(evaluation).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"the evaluation is no JSON: {error}") from error
    if not isinstance(evaluation, dict | None):
        raise ValueError(
            f"the evaluation is a {type(evaluation).__name__}: expected a JSON object"
        )
    return evaluation or {}


def _rows(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as rows of a table, ``how.guidance``; None and empty values are left out."""
    rows = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _rows(value, f"{prefix}{key}.")
        elif value is not None and value != [] and value != "":
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            rows.append((f"{prefix}{key}", text.replace("|", "\\|").replace("\n", " ")))
    return rows


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    return "\n".join(
        f"| {left} | {right} |" for left, right in [head, ("---", "---"), *rows]
    )


CITATION = """\
@article{diffussm,
  title = {Diffusion Models Without Attention},
  author = {Yan, Jing Nathan and Gu, Jiatao and Rush, Alexander M.},
  journal = {arXiv preprint arXiv:2311.18257},
  year = {2023},
}"""
CLIP_ADVICE = (
    "With a scheduler that adds no noise (DDIM, Euler, DPM-Solver++ and others) pass `clip_denoised=True`: "
    "without it single pixels can end far out of range."
)
SCORES = {
    "fid",
    "sfid",
    "is",
    "inception_score",
    "precision",
    "recall",
    "frechet_distance",
}


def model_card(
    pipe: "DiffuSSMPipeline",
    name: str,
    evaluation: dict[str, Any],
    license: str | None = None,
) -> str:
    """The README.md of a saved pipeline: what it is, how to use it, how it was trained and measured."""
    model = pipe.denoiser.config
    parameters = sum(p.numel() for p in pipe.denoiser.parameters())
    head = [
        "---",
        "library_name: diffusers",
        *([f"license: {license}"] if license else []),
    ]
    head += [
        "pipeline_tag: unconditional-image-generation",
        "tags: [diffussm, state-space-model]",
        "---",
    ]
    labels = list(pipe.config.id2label.values())
    first = repr(labels[0]) if labels and pipe.labels[labels[0]] == [0] else "0"
    call = f"{first}, guidance_scale=1.5, " if model.num_classes else ""
    sizes = {
        "parameters": f"{parameters:,}",
        "noise schedule": f"linear, T = {pipe.config.num_train_timesteps}",
    }
    scores = [
        row for row in _rows(evaluation) if SCORES & set(row[0].lower().split("."))
    ]
    how = [row for row in _rows(evaluation) if row not in scores]
    sections = [
        "\n".join(head),
        f"# {name}",
        f"A DiffuSSM: a {'class-conditional' if model.num_classes else 'unconditional'} diffusion model of "
        f"{model.height} x {model.width} {'latents' if pipe.vae else 'inputs'} with {model.in_channels} "
        "channels, made of bidirectional state space models instead of attention.",
        "## Use",
        "```python\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("<this folder>", trust_remote_code=True)\n'
        f"image = pipe({call}num_inference_steps=250).images[0]\n```",
        "`trust_remote_code` runs `pipeline.py`, which is in this folder to be read. With the package "
        "`diffussm` installed, `diffussm.pipeline.DiffuSSMPipeline.from_pretrained` loads the same folder "
        "and runs no code of it. The weights are safetensors.",
        *([CLIP_ADVICE] if pipe.vae is None and model.in_channels in (1, 3) else []),
        "## Model",
        _table(("what", "value"), [*_rows(sizes), *_rows(asdict(model))]),
        "## Training",
        _table(("what", "value"), _rows(pipe.config.training))
        if pipe.config.training
        else "Not recorded.",
        "## Evaluation",
        *([] if evaluation else ["Not measured."]),
        *([_table(("score", "value"), scores)] if scores else []),
        *(
            ["What was measured, and how:", _table(("what", "value"), how)]
            if how
            else []
        ),
        "## License and citation",
        f"The code in `pipeline.py` is under Apache-2.0. License of the weights: {license or 'not stated'}.",
        f"The architecture is that of\n\n```bibtex\n{CITATION}\n```",
    ]
    if labels:
        classes = _rows(pipe.config.id2label)
        sections.insert(
            sections.index("## Model"),
            f"<details><summary>{len(classes)} classes</summary>\n\n"
            f"{_table(('number', 'name'), classes)}\n\n</details>",
        )
    return "\n\n".join(sections) + "\n"


def _save_pipeline(
    pipe: "DiffuSSMPipeline",
    folder: Path,
    name: str | None,
    evaluation: dict[str, Any] | str | Path | None,
    license: str | None,
    options: dict[str, Any],
) -> None:
    refused = [
        key for key, value in options.items() if value and key != "safe_serialization"
    ]
    if options.get("safe_serialization", True) is not True:
        refused.append("safe_serialization=False")
    if refused:
        raise ValueError(
            f"save_pretrained with {', '.join(refused)}: only whole files in safetensors are written"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists and is not an empty folder; nothing was written"
        )
    card = model_card(
        pipe, name or folder.resolve().name, _read_evaluation(evaluation), license
    )
    index = {
        "_class_name": ["pipeline", "DiffuSSMPipeline"],
        "_diffusers_version": diffusers.__version__,
        "denoiser": [COMPONENT_FILE.removesuffix(".py"), "Denoiser"],
        "scheduler": ["diffusers", type(pipe.scheduler).__name__],
        "vae": [None, None]
        if pipe.vae is None
        else ["diffusers", type(pipe.vae).__name__],
        **{
            key: pipe.config[key]
            for key in ("id2label", "num_train_timesteps", "training")
        },
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        pipe.denoiser.save_pretrained(draft / "denoiser")
        pipe.scheduler.save_pretrained(draft / "scheduler")
        if pipe.vae is not None:
            pipe.vae.save_pretrained(draft / "vae", safe_serialization=True)
        (draft / "denoiser" / COMPONENT_FILE).write_text(
            COMPONENT_CODE, encoding="utf-8"
        )
        (draft / "pipeline.py").write_text(self_contained_code(), encoding="utf-8")
        (draft / "model_index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
        (draft / "README.md").write_text(card, encoding="utf-8")
        for file in draft.rglob("*.safetensors"):
            apply_umask(file)
        draft.chmod(0o755)  # mkdtemp makes it private
        draft.rename(
            folder
        )  # an empty folder is replaced, a full one refused by the system
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _load_pipeline(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of DiffuSSMPipeline."""
    unknown = options.keys() - {"torch_dtype", "scheduler", "vae"}
    if unknown:
        raise TypeError(
            f"unknown options {sorted(unknown)}: expected torch_dtype, scheduler or vae"
        )
    dtype = options.get("torch_dtype")
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder} is no folder with a model_index.json, as save_pretrained writes. A name on the "
            "hub: download it first, or use diffusers.DiffusionPipeline with trust_remote_code=True"
        )
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        kind, scheduler_name, with_vae = (
            index["_class_name"][1],
            index["scheduler"][1],
            bool(index["vae"][0]),
        )
        settings = {
            key: index[key] for key in ("id2label", "num_train_timesteps", "training")
        }
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{folder / 'model_index.json'} is damaged: {error!r}"
        ) from error
    if kind != "DiffuSSMPipeline":
        raise ValueError(f"{folder} holds a {kind}: expected a DiffuSSMPipeline")
    scheduler, vae = options.get("scheduler"), options.get("vae")
    if scheduler is None:
        scheduler = _component(
            folder / "scheduler", scheduler_name, diffusers.SchedulerMixin
        )
    if vae is None and with_vae:
        vae = _component(
            folder / "vae", "AutoencoderKL", AutoencoderKL, torch_dtype=dtype
        )
    denoiser = Denoiser.from_pretrained(folder / "denoiser", torch_dtype=dtype)
    return {"denoiser": denoiser, "scheduler": scheduler, "vae": vae, **settings}


def _component(folder: Path, name: str, base: Any, **options: Any) -> Any:
    kind: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    fits = inspect.isclass(kind) and issubclass(kind, base)
    if not fits:
        raise ValueError(
            f"model_index.json names {name!r}: expected a {base.__name__} of diffusers"
        )
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is missing; the pipeline was copied in part, copy or save it again"
        )
    if base is AutoencoderKL:
        options |= {"use_safetensors": True, "low_cpu_mem_usage": False}
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, **options)
    except Exception as error:  # whatever its libraries raise
        raise ValueError(f"{folder} is no usable {name}: {error}") from error
