"""The pipeline.

Generated from book/13_pipeline.md by `make export`: edit there.
"""

import ast
import difflib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMParallelScheduler, DDPMScheduler
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from diffussm.model import DiffuSSM, apply_umask
from diffussm.sampling import guided

__all__ = [
    "ancestral_scheduler",
    "TAKES_VARIANCE",
    "scheduler_for",
    "Denoiser",
    "DiffuSSMPipeline",
    "COMPONENT_FILE",
    "COMPONENT_CODE",
    "self_contained_code",
    "CITATION",
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


def scheduler_for(scheduler: Any, num_train_timesteps: int) -> tuple[Any, bool]:
    """The scheduler to run, and whether it takes the network's second half, v, as well as the noise.

    Raises:
        ValueError: it expects something else than predicted noise, or was made for other noise levels.
    """
    name = type(scheduler).__name__
    kind = scheduler.config.get("prediction_type")
    if kind != "epsilon":
        raise ValueError(
            f"{name} has prediction_type={kind!r}; a DiffuSSM predicts the noise: expected 'epsilon'"
        )
    ours = ancestral_scheduler(num_train_timesteps).alphas_cumprod
    theirs = getattr(scheduler, "alphas_cumprod", None)
    if theirs is None or theirs.shape != ours.shape or not torch.allclose(theirs.cpu(), ours, rtol=1e-3):
        raise ValueError(
            f"{name} has another noise schedule than the linear one of {num_train_timesteps} steps in which "
            f"this model was trained; make it with {name}.from_config(pipeline.scheduler.config)"
        )
    variance = scheduler.config.get("variance_type")
    if variance == "learned":
        raise ValueError(f"{name} has variance_type='learned'; a DiffuSSM learns a 'learned_range'")
    if isinstance(scheduler, TAKES_VARIANCE):
        return scheduler, variance == "learned_range"
    if variance == "learned_range" and "variance_type" in inspect.signature(type(scheduler)).parameters:
        # inherited through from_config: these solvers have no use for v, and cut the noise to 3 channels
        scheduler = type(scheduler).from_config(scheduler.config, variance_type=None)
    return scheduler, False


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
        denoiser: the network; a `DiffuSSM` is wrapped in a `Denoiser`.
        scheduler: any scheduler of diffusers that takes predicted noise; see `ancestral_scheduler`. Exchange
            it with ``pipe.scheduler = Other.from_config(pipe.scheduler.config)``.
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
        if isinstance(denoiser, DiffuSSM) and not isinstance(denoiser, Denoiser):
            denoiser = Denoiser.of(denoiser)
        self.register_modules(denoiser=denoiser, scheduler=scheduler, vae=vae)
        names = {str(number): name for number, name in (id2label or {}).items()}
        classes = self.denoiser.config.num_classes
        for number, name in names.items():
            if not number.isdecimal() or int(number) >= classes or not isinstance(name, str):
                raise ValueError(f"id2label has {number!r}: {name!r}, but the classes are 0 to {classes - 1}")
        # a mapping, never a list: diffusers takes every list in model_index.json for a component
        self.register_to_config(
            id2label=names, num_train_timesteps=num_train_timesteps, training=training or {}
        )
        self._check_vae()
        scheduler_for(scheduler, num_train_timesteps)

    def _check_vae(self) -> None:
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
            for name in dict.fromkeys([names, *(part.strip() for part in names.split(","))]):
                table.setdefault(name, []).append(int(number))
        return table

    def get_label_ids(self, labels: int | str | Tensor | Iterable[int | str]) -> list[int]:
        """Class numbers of labels given by name or number, one or many.

        Raises:
            ValueError: an unknown name (with the nearest known), an ambiguous one, a number out of range.
            TypeError: neither name nor number.
        """
        if isinstance(labels, Tensor):
            labels = labels.tolist()
        table, count = self.labels, self.denoiser.config.num_classes
        numbers = []
        for label in [labels] if isinstance(labels, int | str) else labels:
            if isinstance(label, str):
                if label not in table:
                    near = difflib.get_close_matches(label, table, n=3)
                    known = (
                        f"did you mean {', '.join(near)}?"
                        if near
                        else f"known are {', '.join([*table][:12])}"
                    )
                    raise ValueError(f"this model has no class {label!r}; {known}")
                if len(table[label]) > 1:
                    raise ValueError(f"{label!r} is the name of classes {table[label]}; give the number")
                numbers += table[label]
            elif isinstance(label, bool) or not isinstance(label, int):
                raise TypeError(f"class label {label!r}: expected a name or an integer")
            elif not 0 <= label < count:
                raise ValueError(f"class label {label}: this model has classes 0 to {count - 1}")
            else:
                numbers.append(label)
        return numbers

    def _labels(self, class_labels: Any, images_per_label: int) -> tuple[Tensor | None, int]:
        """y (B,) on the device, or None, and B."""
        if (
            isinstance(images_per_label, bool)
            or not isinstance(images_per_label, int)
            or images_per_label < 1
        ):
            raise ValueError(f"images_per_label={images_per_label!r}: expected an integer of at least 1")
        if not self.denoiser.config.num_classes:
            if class_labels is not None:
                raise ValueError("class_labels were given, but this model is unconditional; leave them out")
            return None, images_per_label
        if class_labels is None:
            raise ValueError(
                f"class_labels are missing: this model has {self.denoiser.config.num_classes} classes"
            )
        numbers = self.get_label_ids(class_labels)
        if not numbers:
            raise ValueError("class_labels is empty: expected at least one label")
        y = torch.tensor(numbers, device=self._execution_device).repeat_interleave(images_per_label)
        return y, len(y)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Tensor | Sequence[int | str] | None = None,
        images_per_label: int = 1,
        *,
        guidance_scale: float = 1.0,
        guidance_channels: int | None = None,
        num_inference_steps: int = 250,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images.

        Args:
            class_labels: names or numbers, one or many; None for an unconditional model.
            images_per_label: how many of each (in all, if unconditional).
            guidance_scale: w of classifier-free guidance (eq-sampling-guidance); 1 is none.
            guidance_channels: guide only the first so many channels; default all. DiT's code does 3.
            num_inference_steps: steps of the scheduler, 1 to T.
            eta: noise of DDIM, 0 to 1; other schedulers do not read it.
            generator: source of all noise, or one for each image.
            latents: start of the chain, standard normal (B, C, H, W); default drawn from `generator`.
            output_type: "pil", "np" (B, H, W, 3) or "pt" (B, 3, H, W), both in [0, 1], or "latent": what the
                chain ends with, undecoded.
            return_dict: False gives a tuple.
            callback_on_step_end: called as (pipe, step, timestep, {"latents": x}); may return other latents.

        Raises:
            ValueError, TypeError: arguments that cannot work, before the first step.
        """
        config = self.denoiser.config
        self._check_vae()
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r}: expected 'pil', 'np', 'pt' or 'latent'")
        if output_type != "latent" and self.vae is None and config.in_channels not in (1, 3):
            raise ValueError(
                f"the model makes latents of {config.in_channels} channels and there is no VAE to decode "
                "them; pass vae= to the pipeline, or output_type='latent'"
            )
        scheduler, takes_variance = scheduler_for(self.scheduler, self.config.num_train_timesteps)
        if not 1 <= num_inference_steps <= self.config.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps={num_inference_steps}: expected 1 to {self.config.num_train_timesteps}"
            )
        y, count = self._labels(class_labels, images_per_label)
        model = guided(self.denoiser, guidance_scale, guidance_channels)
        if guidance_channels is not None and guidance_channels > config.in_channels:
            raise ValueError(f"guidance_channels={guidance_channels}: the model has {config.in_channels}")
        shape = (count, config.in_channels, config.height, config.width)
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} images: expected one for each")
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}: expected {shape}")

        device = self._execution_device
        # x stays in float32 also when the weights are not: a step changes it by less than bfloat16 resolves
        dtype = torch.promote_types(self.denoiser.dtype, torch.float32)
        x = randn_tensor(shape, generator, device, dtype) if latents is None else latents.to(device, dtype)
        scheduler.set_timesteps(num_inference_steps, device=device)
        x = x * scheduler.init_noise_sigma
        known = inspect.signature(scheduler.step).parameters
        options = {name: value for name, value in (("eta", eta), ("generator", generator)) if name in known}
        with self.denoiser.cached_kernels():
            for step, t in enumerate(self.progress_bar(scheduler.timesteps)):
                scaled = scheduler.scale_model_input(x, t)
                output = model(scaled, t.expand(count), y).to(dtype)  # (B, 2C, H, W)
                if not takes_variance:
                    output = output[:, : config.in_channels]  # (B, C, H, W)
                x = scheduler.step(output, t, x, **options, return_dict=False)[0]
                if callback_on_step_end is not None:
                    x = (callback_on_step_end(self, step, t, {"latents": x}) or {}).get("latents", x)
        images = self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _decode(self, x: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x
        if self.vae is not None:
            x = x / self.vae.config.scaling_factor + (self.vae.config.get("shift_factor") or 0.0)
            x = self.vae.decode(x.to(self.vae.dtype)).sample
        images = (x.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).cpu().numpy()
        return array if output_type == "np" else self.numpy_to_pil(array)

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
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Self:
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
    def from_run(cls, run: str | Path, weights: str = "ema", vae: Any = None) -> Self:
        """The pipeline of a training run's newest checkpoint: "ema" weights, or "model".

        `vae` is needed for a run on latents, and must be the one that encoded them: a folder, a name on the
        hub, or the module itself. Raises FileNotFoundError where there is no run, ValueError for a VAE that
        does not fit.
        """
        return cls(**_load_run(Path(run), weights, vae))


def _load_run(run: Path, weights: str, vae: Any) -> dict[str, Any]:
    """The arguments of DiffuSSMPipeline."""
    try:  # looked up here: a saved pipeline has no training in its one file
        training, latents = import_module("diffussm.training"), import_module("diffussm.latents")
    except ModuleNotFoundError as error:
        raise ImportError("a training run is read by the package diffussm; install it") from error
    model, config, classes = training.load_run(run, weights)
    if isinstance(vae, str | Path):
        vae = latents.load_vae(vae)
    if vae is not None and (Path(config.data) / "manifest.json").is_file():
        latents.LatentStore(config.data).check_vae(vae)
    step = int(training.find_checkpoint(run).name.removeprefix("step_"))
    facts = {"weights": weights, "step": step, "images_seen": step * config.batch_size}
    facts |= {key: value for key, value in asdict(config).items() if key != "model"}
    facts["data"] = Path(config.data).name  # not where it lies on someone's disk
    names = {str(number): name for number, name in enumerate(classes)} if model.config.num_classes else {}
    return {
        "denoiser": model,
        "scheduler": ancestral_scheduler(config.timesteps),
        "vae": vae,
        "id2label": names,
        "num_train_timesteps": config.timesteps,
        "training": facts,
    }


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
            raise FileNotFoundError(f"the package diffussm has no module {module}; install it again")
        text = Path(spec.origin).read_text(encoding="utf-8")
        self.lines, tree = text.splitlines(), ast.parse(text)
        self.title = f"# {module}: {(ast.get_docstring(tree) or '').splitlines()[0]}"
        self.defined: dict[str, ast.stmt] = {}
        self.imported: dict[str, list[tuple[str, str]]] = {}  # name -> (from where or "", what)
        self.ours: dict[str, str] = {}  # name -> the module of this package that it comes from
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                self.defined[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self.defined[ast.unparse(target)] = node
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffussm."):
                self.ours |= {alias.name: str(node.module).removeprefix("diffussm.") for alias in node.names}
            elif isinstance(node, ast.Import | ast.ImportFrom):
                origin = str(node.module) if isinstance(node, ast.ImportFrom) else ""
                for alias in node.names:
                    name = alias.asname or alias.name.partition(".")[0]
                    self.imported.setdefault(name, []).append((origin, ast.unparse(alias)))

    def text(self, name: str) -> str:
        """A definition as it is written, with its decorators and the comment above it."""
        node = self.defined[name]
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        while self.lines[first - 2].startswith("#"):
            first -= 1
        return "\n".join(self.lines[first - 1 : node.end_lineno])


def self_contained_code(module: str = "pipeline", name: str = "DiffuSSMPipeline") -> str:
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
                raise RuntimeError(f"{module} and {chosen[name]} both define {name}; rename one of them")
            if (module, name) not in seen:
                seen.add((module, name))
                for node in ast.walk(source.defined[name]):
                    if isinstance(node, ast.Name):
                        need(module, node.id)

    need(module, name)
    order: list[str] = []  # a module after those it imports

    def place(module: str) -> None:
        if module in sources and module not in order:
            for other in sources[module].ours.values():
                place(other)
            order.append(module)

    place(module)
    parts = [
        '"""DiffuSSM, diffusion models without attention, as a pipeline for diffusers, in one file.\n\n'
        f"Written by save_pretrained out of modules of the package diffussm:\n{', '.join(order)}.\n"
        'License: Apache-2.0.\n"""\n',
        "\n".join(f"import {what}" for what in sorted(imports.pop("", ()))),
        "\n".join(f"from {origin} import {', '.join(sorted(imports[origin]))}" for origin in sorted(imports)),
        "",
    ]
    for module in order:
        source = sources[module]
        names = [name for name in source.defined if chosen.get(name) == module]
        if names:
            parts.append("\n\n".join([f"\n{source.title}\n", *(f"{source.text(name)}\n" for name in names)]))
    return "\n".join(parts)


def _read_evaluation(evaluation: dict[str, Any] | str | Path | None) -> dict[str, Any]:
    if isinstance(evaluation, str | Path):
        try:
            evaluation = json.loads(Path(evaluation).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"the evaluation is no JSON: {error}") from error
    if not isinstance(evaluation, dict | None):
        raise ValueError(f"the evaluation is a {type(evaluation).__name__}: expected a JSON object")
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
    return "\n".join(f"| {left} | {right} |" for left, right in [head, ("---", "---"), *rows])


CITATION = """\
@article{diffussm,
  title = {Diffusion Models Without Attention},
  author = {Yan, Jing Nathan and Gu, Jiatao and Rush, Alexander M.},
  journal = {arXiv preprint arXiv:2311.18257},
  year = {2023},
}"""
SCORES = {"fid", "sfid", "is", "inception_score", "precision", "recall", "frechet_distance"}


def model_card(
    pipe: "DiffuSSMPipeline", name: str, evaluation: dict[str, Any], license: str | None = None
) -> str:
    """The README.md of a saved pipeline: what it is, how to use it, how it was trained and measured."""
    model = pipe.denoiser.config
    parameters = sum(p.numel() for p in pipe.denoiser.parameters())
    head = ["---", "library_name: diffusers", *([f"license: {license}"] if license else [])]
    head += ["pipeline_tag: unconditional-image-generation", "tags: [diffussm, state-space-model]", "---"]
    labels = list(pipe.config.id2label.values())
    first = repr(labels[0]) if labels and pipe.labels[labels[0]] == [0] else "0"
    call = f"{first}, guidance_scale=1.5, " if model.num_classes else ""
    sizes = {
        "parameters": f"{parameters:,}",
        "noise schedule": f"linear, T = {pipe.config.num_train_timesteps}",
    }
    scores = [row for row in _rows(evaluation) if SCORES & set(row[0].lower().split("."))]
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
        "## Model",
        _table(("what", "value"), [*_rows(sizes), *_rows(asdict(model))]),
        "## Training",
        _table(("what", "value"), _rows(pipe.config.training)) if pipe.config.training else "Not recorded.",
        "## Evaluation",
        *([] if evaluation else ["Not measured."]),
        *([_table(("score", "value"), scores)] if scores else []),
        *(["What was measured, and how:", _table(("what", "value"), how)] if how else []),
        "## License and citation",
        f"The code in `pipeline.py` is under Apache-2.0. License of the weights: {license or 'not stated'}.",
        f"The architecture is that of\n\n```bibtex\n{CITATION}\n```",
    ]
    if labels:
        classes = _rows(pipe.config.id2label)
        sections.insert(
            5,
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
    refused = [key for key, value in options.items() if value and key != "safe_serialization"]
    if options.get("safe_serialization", True) is not True:
        refused.append("safe_serialization=False")
    if refused:
        raise ValueError(
            f"save_pretrained with {', '.join(refused)}: only whole files in safetensors are written"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder; nothing was written")
    card = model_card(pipe, name or folder.resolve().name, _read_evaluation(evaluation), license)
    index = {
        "_class_name": ["pipeline", "DiffuSSMPipeline"],
        "_diffusers_version": diffusers.__version__,
        "denoiser": [COMPONENT_FILE.removesuffix(".py"), "Denoiser"],
        "scheduler": ["diffusers", type(pipe.scheduler).__name__],
        "vae": [None, None] if pipe.vae is None else ["diffusers", type(pipe.vae).__name__],
        **{key: pipe.config[key] for key in ("id2label", "num_train_timesteps", "training")},
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        pipe.denoiser.save_pretrained(draft / "denoiser")
        pipe.scheduler.save_pretrained(draft / "scheduler")
        if pipe.vae is not None:
            pipe.vae.save_pretrained(draft / "vae", safe_serialization=True)
        (draft / "denoiser" / COMPONENT_FILE).write_text(COMPONENT_CODE, encoding="utf-8")
        (draft / "pipeline.py").write_text(self_contained_code(), encoding="utf-8")
        (draft / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (draft / "README.md").write_text(card, encoding="utf-8")
        for file in draft.rglob("*.safetensors"):
            apply_umask(file)
        draft.chmod(0o755)  # mkdtemp makes it private
        draft.rename(folder)  # an empty folder is replaced, a full one refused by the system
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _load_pipeline(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of DiffuSSMPipeline."""
    unknown = options.keys() - {"torch_dtype", "scheduler", "vae"}
    if unknown:
        raise TypeError(f"unknown options {sorted(unknown)}: expected torch_dtype, scheduler or vae")
    dtype = options.get("torch_dtype")
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder} is no folder with a model_index.json, as save_pretrained writes. A name on the "
            "hub: download it first, or use diffusers.DiffusionPipeline with trust_remote_code=True"
        )
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        kind, scheduler_name, with_vae = index["_class_name"][1], index["scheduler"][1], bool(index["vae"][0])
        settings = {key: index[key] for key in ("id2label", "num_train_timesteps", "training")}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{folder / 'model_index.json'} is damaged: {error!r}") from error
    if kind != "DiffuSSMPipeline":
        raise ValueError(f"{folder} holds a {kind}: expected a DiffuSSMPipeline")
    scheduler, vae = options.get("scheduler"), options.get("vae")
    if scheduler is None:
        scheduler = _component(folder / "scheduler", scheduler_name, diffusers.SchedulerMixin)
    if vae is None and with_vae:
        vae = _component(folder / "vae", "AutoencoderKL", AutoencoderKL, torch_dtype=dtype)
    denoiser = Denoiser.from_pretrained(folder / "denoiser", torch_dtype=dtype)
    return {"denoiser": denoiser, "scheduler": scheduler, "vae": vae, **settings}


def _component(folder: Path, name: str, base: Any, **options: Any) -> Any:
    kind: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    fits = inspect.isclass(kind) and issubclass(kind, base)
    if not fits:
        raise ValueError(f"model_index.json names {name!r}: expected a {base.__name__} of diffusers")
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
