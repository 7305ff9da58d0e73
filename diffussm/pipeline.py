"""The pipeline.

Generated from book/61_pipeline.md by `make export`: edit there.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from diffussm.class_names import check_names, class_numbers, label_table
from diffussm.convolution import later
from diffussm.denoiser import as_denoiser
from diffussm.guards import (
    expect,
    expect_finite,
    expect_int,
    expect_number,
    expect_one_of,
    refuse,
)
from diffussm.sampling import guided
from diffussm.schedulers import (
    answered,
    respaced_scheduler,
    scheduler_for,
    step_options,
)

__all__ = ["DiffuSSMPipeline"]


class DiffuSSMPipeline(DiffusionPipeline):
    """A trained DiffuSSM with all that turns labels into images, for diffusers.

    Args:
        denoiser: the network; a `DiffuSSM` is wrapped in a `Denoiser`, taken out of a
            `DataParallel` or a `DistributedDataParallel` if it stands in one.
        scheduler: one of the classes in `FEWEST_STEPS`, such as `ancestral_scheduler`.
            Exchange it with `pipe.scheduler =
            Other.from_config(pipe.scheduler.config)`. The pipeline respaces its
            schedule, whatever its own spacing.
        vae: the autoencoder whose latents the network makes; None if it makes pixels.
        id2label: names by class number, synonyms separated by commas.
        num_train_timesteps: T of the linear schedule in which the network was trained.
        training: what is known of the training run, for the model card.

    Raises ValueError for names outside the table, a VAE of other channels, a scheduler
    that cannot work.
    """

    config: Any
    denoiser: Any
    scheduler: Any
    vae: Any
    model_cpu_offload_seq: Any = "denoiser->vae"
    _optional_components = ["vae"]  # noqa: RUF012, as diffusers declares it
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

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
        network = as_denoiser(denoiser)
        self.register_modules(denoiser=network, scheduler=scheduler, vae=vae)
        # a mapping, never a list: in model_index.json a list is a component
        names = {str(number): name for number, name in (id2label or {}).items()}
        check_names(names, self.denoiser.config.num_classes)
        facts = {"num_train_timesteps": num_train_timesteps, "training": training or {}}
        self.register_to_config(id2label=names, **facts)
        self._check_vae()
        scheduler_for(scheduler, num_train_timesteps)

    @property
    def labels(self) -> dict[str, list[int]]:
        """Every name and synonym, with the numbers of the classes that bear it."""
        return label_table(self.config.id2label)

    def get_label_ids(self, labels: Any) -> list[int]:
        """Class numbers of labels given by name or number: see `class_numbers`."""
        return class_numbers(labels, self.labels, self.denoiser.config.num_classes)

    def _labels(
        self, class_labels: Any, images_per_label: int
    ) -> tuple[Tensor | None, int]:
        """y (B,) on the device, or None, and B."""
        each = expect_int("images_per_label", images_per_label, least=1)
        given, classes = class_labels is not None, self.denoiser.config.num_classes
        refuse(given and not classes, "the model is unconditional: omit class_labels")
        refuse(classes and not given, f"class_labels are missing for {classes} classes")
        if not classes:
            return None, each
        numbers, device = self.get_label_ids(class_labels), self._execution_device
        y = torch.tensor(numbers, dtype=torch.int64, device=device)
        return y.repeat_interleave(each), len(y) * each

    def _walk(
        self,
        x: Tensor,
        scheduler: Any,
        times: Tensor,
        ask: Callable[[Tensor, int], Tensor],
        options: dict[str, Any],
        tell: Callable[[int, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """From standard normal x to what the chain ends with, (B, C, H, W) both."""
        x = x * scheduler.init_noise_sigma
        self.num_timesteps, self._interrupt = len(scheduler.timesteps), False
        with self.denoiser.cached_kernels():
            steps = self.progress_bar(scheduler.timesteps if len(x) else [])
            for call, t in enumerate(steps):
                output = ask(scheduler.scale_model_input(x, t), call)
                x = scheduler.step(output, t, x, **options, return_dict=False)[0]
                x = tell(call, times[call], x)
                if self._interrupt:
                    break
        return x

    def _telling(
        self, callback: Callable[..., Any] | None, names: Sequence[str]
    ) -> Callable[[int, Tensor, Tensor], Tensor]:
        """What is done with x after each call: the callback is told, and may answer."""
        names = getattr(callback, "tensor_inputs", names)
        for name in names:
            expect_one_of("tensor input", name, self._callback_tensor_inputs)

        def tell(call: int, t: Tensor, x: Tensor) -> Tensor:
            if callback is None:
                return x
            told = {"latents": x} if names else {}
            answer: Tensor = (callback(self, call, t, told) or {}).get("latents", x)
            return answer

        return tell

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Any = None,
        images_per_label: int = 1,
        *,
        num_images_per_prompt: int | None = None,
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
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images.

        Args:
            class_labels: names or numbers, one or many (list, array, tensor; lists of
                lists); none gives no images. None for an unconditional model.
            images_per_label, num_images_per_prompt: how many of each (in all, if
                unconditional).
            guidance_scale, guidance_channels: see `guided`; a scale of 1 is none.
            num_inference_steps: steps of the scheduler, 1 to T.
            eta: noise of DDIM, 0 to 1; other schedulers have none.
            clip_denoised: clamp the predicted image to [-1, 1], for pixels.
            generator: source of all noise, or one for each image.
            latents: start of the chain, standard normal (B, C, H, W), not drawn.
            output_type: "pil", "np" (B, H, W, 3), "pt" (B, 3, H, W), both in [0, 1], or
                "latent": what the chain ends with, undecoded.
            return_dict: False gives a tuple.
            callback_on_step_end: called as (pipe, call, timestep, {"latents": x}) after
                each call of the network; may return other latents. Without the name in
                `callback_on_step_end_tensor_inputs` it gets an empty dictionary.

        Raises ValueError or TypeError for arguments that cannot work, before the first
        step; FloatingPointError for images that are not finite.
        """
        self._check_output(output_type)
        T, device = self.config.num_train_timesteps, self._execution_device
        scheduler, takes_variance = scheduler_for(self.scheduler, T)
        self._check_clipping(scheduler, clip_denoised)
        steps = expect_int("num_inference_steps", num_inference_steps, least=1, most=T)
        each = (
            images_per_label if num_images_per_prompt is None else num_images_per_prompt
        )
        told = f"images_per_label={images_per_label}, num_images_per_prompt={each}"
        refuse(images_per_label not in (1, each), f"{told} are one option: give either")
        y, count = self._labels(class_labels, each)
        tell = self._telling(callback_on_step_end, callback_on_step_end_tensor_inputs)
        model = self._guided(guidance_scale, guidance_channels)
        scheduler, times, levels = respaced_scheduler(scheduler, T, steps, device)
        options = step_options(scheduler, eta, generator)
        x = self._start(count, generator, latents)
        ask = _asking(model, y, times, levels, takes_variance, clip_denoised, x.dtype)
        x = self._walk(x, scheduler, times, ask, options, tell)
        _check_finite(f"{type(scheduler).__name__}, {steps} steps", x)
        images = self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _start(self, count: int, generator: Any, latents: Tensor | None) -> Tensor:
        """x_T, standard normal (B, C, H, W)."""
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} images")
        dtype = torch.promote_types(self.denoiser.dtype, torch.float32)
        config, where = self.denoiser.config, self._execution_device
        size = count, config.in_channels, config.height, config.width
        if latents is None:
            x: Tensor = randn_tensor(size, generator, where, dtype)
            return x
        expect("latents", latents, "B C H W", **dict(zip("BCHW", size, strict=True)))
        return latents.to(where, dtype)

    def _decode(self, x: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x
        if self.vae is not None:
            x = self._decode_latents(x)
        return self._as_asked((x.float() / 2 + 0.5).clamp(0, 1), output_type)

    def _as_asked(self, images: Tensor, output_type: str) -> Any:
        """Images (B, C, H, W) in [0, 1] as "pt", "np" or "pil"."""
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).cpu().numpy()
        return array if output_type == "np" else self.numpy_to_pil(array)

    def _decode_latents(self, latents: Tensor) -> Tensor:
        x = latents if len(latents) else latents.new_zeros(1, *latents.shape[1:])
        shift = self.vae.config.get("shift_factor") or 0.0
        x = x / self.vae.config.scaling_factor + shift
        images: Tensor = self.vae.decode(x.to(self.vae.dtype)).sample[: len(latents)]
        _check_finite(f"the VAE in {self.vae.dtype}", images)
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
        """Write a folder that loads with or without this package: see
        `save_pipeline`.
        """
        save = later("sharing:save_pipeline")
        save(self, Path(save_directory), name, evaluation, license, options)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> Self:
        """The pipeline that `save_pretrained` wrote, or of weights that come with the
        package, such as "digits": see `load_pipeline`.
        """
        load = later("sharing:load_pipeline")
        return cls(**load(Path(pretrained_model_name_or_path), **options))

    @classmethod
    def from_run(
        cls,
        run: str | Path,
        weights: str = "ema",
        vae: Any = None,
        step: int | None = None,
    ) -> Self:
        """The pipeline of a training run: see `load_run`."""
        return cls(**later("sharing:load_run")(Path(run), weights, vae, step))

    def _check_vae(self) -> None:
        if not hasattr(self.denoiser, "config"):
            kind = type(self.denoiser).__name__
            raise TypeError(f"the denoiser is a {kind}: expected pipe.denoiser.module")
        ours = self.denoiser.config.in_channels
        theirs = ours if self.vae is None else self.vae.config.latent_channels
        if theirs != ours:
            raise ValueError(f"the VAE has latents of {theirs} channels, not {ours}")

    def _makes_pixels(self) -> bool:
        channels: int = self.denoiser.config.in_channels
        return self.vae is None and channels in (1, 3)

    def _check_output(self, output_type: str) -> None:
        self._check_vae()
        expect_one_of("output_type", output_type, ("pil", "np", "pt", "latent"))
        if output_type != "latent" and self.vae is None and not self._makes_pixels():
            raise ValueError("no VAE to decode with: pass it, or output_type='latent'")

    def _check_clipping(self, scheduler: Any, clip_denoised: bool) -> None:
        options = {**scheduler.config, "clip_denoised": clip_denoised}
        for option in ("clip_denoised", "clip_sample", "thresholding"):
            if options.get(option) and not self._makes_pixels():
                raise ValueError(
                    f"{option}=True, here or in the scheduler, clamps to the range of "
                    f"pixels; latents go beyond: make it with {option}=False"
                )

    def _guided(self, scale: float, channels: int | None) -> Callable[..., Tensor]:
        if channels is not None:
            most = self.denoiser.config.in_channels
            expect_int("guidance_channels", channels, least=1, most=most)
        self._guidance_scale = expect_number("guidance_scale", scale, least=0)
        guided(self.denoiser, scale, channels)  # refused before the first step
        return lambda *x: guided(self.denoiser, self._guidance_scale, channels)(*x)

    @property
    def guidance_scale(self) -> float:
        """The scale of the next step."""
        return self._guidance_scale


def _asking(
    model: Callable[..., Tensor],
    y: Tensor | None,
    times: Tensor,
    alphas_cumprod: list[float],
    takes_variance: bool,
    clip_denoised: bool,
    dtype: torch.dtype,
) -> Callable[[Tensor, int], Tensor]:
    """What a scheduler is given at each call: the noise in x_t, and v if it wants
    it.
    """

    def ask(x_t: Tensor, call: int) -> Tensor:
        output = model(x_t, times[call].expand(len(x_t)), y).to(dtype)  # (B, 2C, H, W)
        answer, _ = answered(output, x_t, alphas_cumprod[call], clip_denoised)
        return answer if takes_variance else answer.chunk(2, dim=1)[0]

    return ask


def _check_finite(what: str, x: Tensor) -> None:
    advice = "the weights have diverged, or half precision overflowed: try float32"
    expect_finite(what, x, advice, FloatingPointError)
