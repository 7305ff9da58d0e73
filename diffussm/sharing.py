"""Sharing: to a folder and back.

Generated from book/62_sharing.md by `make export`: edit there.
"""

import inspect
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import AutoencoderKL

from diffussm.denoiser import Denoiser
from diffussm.files import apply_umask, read_json, whole_folder
from diffussm.guards import expect_empty, expect_one_of, expect_there, explain, refuse
from diffussm.model import weights_file
from diffussm.model_card import model_card, read_evaluation
from diffussm.one_file import COMPONENT_CODE, COMPONENT_FILE, self_contained_code
from diffussm.schedulers import ancestral_scheduler

__all__ = ["load_run", "save_pipeline", "load_pipeline"]


def load_run(
    run: Path, weights: str = "ema", vae: Any = None, step: int | None = None
) -> dict[str, Any]:
    """The arguments of a pipeline of a training run: "ema" weights, or "model", of the
    newest checkpoint or of `step`.

    `vae` is needed for a run on latents, and must have the encoder that made them (its
    decoder may be another): a folder, a name on the hub, or the module itself.

    Raises:
        FileNotFoundError: there is no run or no such checkpoint.
        ValueError: a VAE that does not fit.
    """
    runs, autoencoder = _readers()
    step = _found_step(runs, run, step)
    model, recipe, classes = runs.load_run(run, weights, step)
    made_by = runs.encoder_of(run, recipe.data)
    vae, identity = _identified(autoencoder, vae)
    if made_by is not None and identity is not None:
        autoencoder.check_encoder(made_by, identity, f"the latents of {run}")
    facts = _facts(recipe, weights, step) | _encoders(made_by, identity)
    numbered = enumerate(classes if model.config.num_classes else ())
    return {
        "denoiser": model,
        "scheduler": ancestral_scheduler(recipe.timesteps),
        "vae": vae,
        "id2label": {str(number): name for number, name in numbered},
        "num_train_timesteps": recipe.timesteps,
        "training": json.loads(json.dumps(facts)),  # as it comes back from a folder
    }


def _facts(recipe: Any, weights: str, step: Any) -> dict[str, Any]:
    facts = {"weights": weights, "step": step, "images_seen": step * recipe.batch_size}
    facts |= {key: value for key, value in asdict(recipe).items() if key != "model"}
    return {**facts, "data": Path(recipe.data).name}


def _encoders(made_by: Any, identity: Any) -> dict[str, Any]:
    """The autoencoder that made the latents, and the one that decodes them."""
    both: dict[str, Any] = {}
    if made_by is not None:
        both["latents"] = _without_place(made_by, "encoder_sha256", "scaling_factor")
    if identity is not None:
        both["vae"] = _without_place(identity, "encoder_sha256", "decoder_sha256")
    return both


def _without_place(identity: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The name of an autoencoder, and what else is asked."""
    place = Path(identity["name"])
    name = place.name if place.is_absolute() or place.exists() else identity["name"]
    return {"name": name, **{key: identity[key] for key in keys if key in identity}}


def _readers() -> tuple[Any, Any]:
    """The modules that read runs, looked up here: a saved pipeline has no training in
    its one file.
    """
    with explain("install diffussm, which reads runs", ImportError, error=ImportError):
        runs = import_module("diffussm.run_folder")
        return runs, import_module("diffussm.autoencoder")


def _found_step(runs: Any, run: Path, step: int | None) -> int | None:
    """Found once: a run that still trains may write another checkpoint meanwhile."""
    if not (run / "config.json").is_file():
        return step
    found = runs.find_checkpoint(run, step)
    return runs.step_of(found) if found else step


def _identified(autoencoder: Any, vae: Any) -> tuple[Any, dict[str, Any] | None]:
    """An autoencoder, and what tells it from others; None and None for none."""
    if vae is None:
        return None, None
    name = str(vae) if isinstance(vae, str | Path) else "a module"
    vae = autoencoder.load_vae(vae) if isinstance(vae, str | Path) else vae
    return vae, autoencoder.vae_identity(vae, name)


def save_pipeline(
    pipe: Any,
    folder: Path,
    name: str | None = None,
    evaluation: dict[str, Any] | str | Path | None = None,
    license: str | None = None,
    options: dict[str, Any] | None = None,
) -> None:
    """Write a folder that loads with or without this package: weights, code, and a
    model card.

    Args:
        pipe: the pipeline.
        folder: must not exist, or be empty. It appears complete or not at all.
        name: title of the model card; default the folder's name.
        evaluation: result of `diffussm evaluate`, or the JSON file that holds it.
        license: of the weights, as the hub writes it, such as "cc-by-nc-4.0".
        options: what diffusers passes besides, such as `variant="fp16"`, which goes
            into the names of the weights; pickles (`safe_serialization=False`) are
            refused.

    Raises:
        FileExistsError: the folder holds something; nothing is written.
        ValueError: an option that is not supported, an evaluation that is no JSON
            object.
    """
    options = dict(options or {})
    variant = options.pop("variant", None)
    _check_saving(folder, variant, options)
    evaluation = read_evaluation(evaluation)
    card = model_card(pipe, name or folder.resolve().name, evaluation, license)
    texts = {"README.md": card, **_code(), "model_index.json": _index(pipe)}
    with whole_folder(folder) as draft:
        _save_parts(pipe, draft, variant)
        for file, text in texts.items():
            (draft / file).write_text(text, encoding="utf-8")


def _save_parts(pipe: Any, folder: Path, variant: str | None) -> None:
    pipe.denoiser.save_pretrained(folder / "denoiser", variant)
    pipe.scheduler.save_pretrained(folder / "scheduler")
    if pipe.vae is not None:
        how = {"safe_serialization": True, "variant": variant}
        pipe.vae.save_pretrained(folder / "vae", **how)
    for weights in folder.rglob("*.safetensors"):
        apply_umask(weights)


def _code() -> dict[str, str]:
    """The files that let the folder load without this package."""
    component = f"denoiser/{COMPONENT_FILE}"
    return {component: COMPONENT_CODE, "pipeline.py": self_contained_code()}


def _index(pipe: Any) -> str:
    vae = [None, None] if pipe.vae is None else ["diffusers", type(pipe.vae).__name__]
    kept = ("id2label", "num_train_timesteps", "training")
    index = {
        "_class_name": ["pipeline", "DiffuSSMPipeline"],
        "_diffusers_version": diffusers.__version__,
        "denoiser": [COMPONENT_FILE.removesuffix(".py"), "Denoiser"],
        "scheduler": ["diffusers", type(pipe.scheduler).__name__],
        "vae": vae,
        **{key: pipe.config[key] for key in kept},
    }
    return json.dumps(index, indent=2) + "\n"


def _check_saving(folder: Path, variant: Any, options: dict[str, Any]) -> None:
    plain = isinstance(variant, str) and variant.replace("_", "").isalnum()
    refuse(variant and not plain, f"variant={variant!r}: expected letters and digits")
    whole = "safe_serialization"
    wrong = [f"{k}={v}" for k, v in options.items() if bool(v) != (k == whole)]
    refuse(wrong, f"save_pretrained with {wrong}: only whole safetensors are written")
    expect_empty(folder)


def load_pipeline(
    folder: Path,
    *,
    dtype: Any = None,
    torch_dtype: Any = None,
    variant: str | None = None,
    device_map: Any = None,
    scheduler: Any = None,
    vae: Any = None,
    **idle: Any,
) -> dict[str, Any]:
    """The arguments of the pipeline that `save_pipeline` wrote. Runs no code out of the
    folder.

    Args:
        folder: a local folder; where there is none of this name, weights that come
            with the package, such as "digits".
        dtype: of the weights; or a mapping from "denoiser", "vae" and "default".
            `torch_dtype` is its old name.
        variant: of the weights, as they were saved.
        device_map: one device for all components.
        scheduler, vae: instead of the saved ones.
        idle: what diffusers' loader takes and this one has no use for, such as
            `use_safetensors=True`.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: it holds another pipeline or another variant, or damaged files.
        TypeError: an unknown option.
    """
    dtypes, device = (
        _dtypes(torch_dtype if dtype is None else dtype),
        _device(device_map),
    )
    _check_idle(idle)
    places, settings = _places_of(folder)
    _check_variant(places, variant)
    if scheduler is None:
        scheduler = places.scheduler()
    if vae is None and places.vae is not None:
        how = {"torch_dtype": dtypes["vae"], "variant": variant, **_WHOLE}
        vae = _component(places.vae, AutoencoderKL, **how).to(device)
    how = {"torch_dtype": dtypes["denoiser"], "variant": variant}
    denoiser = Denoiser.from_pretrained(places.denoiser, device, **how)
    for name, part in (("denoiser", denoiser), ("scheduler", scheduler), ("vae", vae)):
        _DIFFUSERS.info("Loaded %s as %s from %s", name, type(part).__name__, folder)
    return {"denoiser": denoiser, "scheduler": scheduler, "vae": vae, **settings}


class _Places(NamedTuple):
    """Where the parts of a pipeline are, and what makes its scheduler."""

    denoiser: Path
    vae: Path | None
    scheduler: Callable[[], Any]


def _places_of(folder: Path) -> tuple[_Places, dict[str, Any]]:
    """The parts, and the settings, of a saved pipeline or of weights in the box."""
    if folder.name in _in_the_box() and (boxed := _boxed(folder)):
        return boxed
    names, settings = _read_index(folder / "model_index.json")
    scheduler = partial(_saved_scheduler, folder / "scheduler", names["scheduler"])
    vae = folder / "vae" if names["vae"] else None
    return _Places(folder / "denoiser", vae, scheduler), settings


def _boxed(folder: Path) -> tuple[_Places, dict[str, Any]] | None:
    """Weights in the box, by their name or their folder; None: it is another folder."""
    box = import_module("diffussm.pretrained").load_pretrained(folder.name)
    if folder != box.folder and (folder.exists() or str(folder) != folder.name):
        return None
    told = {key: box.record[key] for key in ("data", "licence")}
    told["pretrained"] = folder.name
    facts = _facts(box.recipe, "ema", box.record["steps"]) | told
    settings = {
        "id2label": {str(n): word for n, word in enumerate(box.data["classes"])},
        "num_train_timesteps": box.recipe.timesteps,
        "training": json.loads(json.dumps(facts)),
    }
    scheduler = partial(ancestral_scheduler, box.recipe.timesteps)
    return _Places(box.folder, box.vae, scheduler), settings


_DIFFUSERS = logging.getLogger("diffusers.pipelines.pipeline_utils")  # who asks it
_WHOLE = {"use_safetensors": True, "low_cpu_mem_usage": False}


def _dtypes(dtype: Any) -> dict[str, Any]:
    """The precision of each component that has one; None as it is loaded."""
    asked = dtype if isinstance(dtype, Mapping) else {"default": dtype}
    for name, kind in asked.items():
        expect_one_of("dtype", name, ("denoiser", "vae", "default"))
        wrong = kind is not None and not isinstance(kind, torch.dtype)
        refuse(wrong, f"dtype={kind!r}: expected torch's, as torch.float16", TypeError)
    return {name: asked.get(name, asked.get("default")) for name in ("denoiser", "vae")}


def _device(device_map: Any) -> torch.device:
    told = f"device_map={device_map!r}: expected one device for all, as 'cuda'"
    with explain(told, RuntimeError, TypeError):
        return torch.device(device_map or "cpu")


def _read_index(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Class names of the components, and the settings."""
    box = "".join(f", or {name}" for name in _in_the_box())
    expect_there(path, f"a saved pipeline (of the hub: download it first){box}")
    index = read_json(path, "the index")
    with explain(f"{path} is damaged", KeyError, TypeError, IndexError):
        kind = index["_class_name"][1]
        names = {"scheduler": index["scheduler"][1], "vae": index["vae"][0]}
        kept = ("id2label", "num_train_timesteps", "training")
        settings = {key: index[key] for key in kept}
    refuse(kind != "DiffuSSMPipeline", f"{path} holds a {kind}, no DiffuSSMPipeline")
    return names, settings


def _in_the_box() -> list[str]:
    """The names of the weights that come with the package, if it is there."""
    with suppress(ImportError):
        return list(import_module("diffussm.pretrained").pretrained_names())
    return []


def _saved_scheduler(folder: Path, name: Any) -> Any:
    return _component(folder, _scheduler_class(name))


def _scheduler_class(name: Any) -> Any:
    """The scheduler of diffusers with this name."""
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not inspect.isclass(kind) or not issubclass(kind, diffusers.SchedulerMixin):
        raise ValueError(f"the index has {name!r}: expected a scheduler of diffusers")
    return kind


_IDLE_HERE = "use_safetensors trust_remote_code local_files_only low_cpu_mem_usage"


def _check_idle(options: dict[str, Any]) -> None:
    for name in options:
        known = name in _IDLE_HERE.split()
        refuse(not known, f"from_pretrained has no option {name!r}", TypeError)
    pickled = options.get("use_safetensors") is False
    refuse(pickled, "use_safetensors=False: only safetensors are read")


def _check_variant(places: _Places, variant: str | None) -> None:
    """In diffusers' words, for which programs look."""
    if variant and not (places.denoiser / weights_file(variant)).is_file():
        told = f"You are trying to load the model files of the `variant={variant}`"
        raise ValueError(f"{told}, but {places.denoiser} has none")


def _component(folder: Path, kind: Any, **options: Any) -> Any:
    expect_there(folder, "a part of the pipeline; copy or save it again")
    with explain(f"{folder} is no usable {kind.__name__}", Exception):
        return kind.from_pretrained(str(folder), local_files_only=True, **options)
