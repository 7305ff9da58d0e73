"""The model card.

Generated from book/62_model_card.md by `make export`: edit there.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from diffussm.files import read_json

__all__ = ["model_card", "read_evaluation"]


_TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

A DiffuSSM: a {{ kind }} diffusion model of {{ model.height }} x {{ model.width }} \
{{ data }} with {{ model.in_channels }} channels, made of bidirectional state space \
models instead of attention.

## Use

{{ fence }}python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("<this folder>", trust_remote_code=True)
{{ made }} = pipe({{ call }}num_inference_steps=250{{ output }}).images[0]
{{ fence }}

`trust_remote_code` runs `pipeline.py`, which is in this folder to be read. With the \
package `diffussm` installed, `diffussm.pipeline.DiffuSSMPipeline.from_pretrained` \
loads the same folder and runs no code of it. The weights are safetensors.
{% if pixels %}
With a scheduler that adds no noise (DDIM, Euler, DPM-Solver++ and others) pass \
`clip_denoised=True`: without it single pixels can end far out of range.
{% endif %}{% if classes %}
<details><summary>{{ pipe.config.id2label|length }} classes</summary>

{{ classes }}

</details>
{% endif %}
## Model

{{ architecture }}

## Training

{{ training or "Not recorded." }}

## Evaluation

{{ scores or "Not measured." }}

## License and citation

The code in `pipeline.py` is under Apache-2.0. License of the weights: \
{{ license or "not stated" }}.

The architecture is that of

{{ fence }}bibtex
@article{diffussm,
  title = {Diffusion Models Without Attention},
  author = {Yan, Jing Nathan and Gu, Jiatao and Rush, Alexander M.},
  journal = {arXiv preprint arXiv:2311.18257},
  year = {2023},
}
{{ fence }}
"""


def model_card(
    pipe: Any, name: str, evaluation: dict[str, Any], license: str | None = None
) -> str:
    """The README.md of a saved pipeline: what it is, how to use it, how it was trained
    and measured.
    """
    data = ModelCardData(
        library_name="diffusers",
        license=license,
        pipeline_tag="unconditional-image-generation",
        tags=["diffussm", "state-space-model"],
    )
    texts = {**_texts(pipe), "name": name, "scores": _measured(evaluation)}
    card: ModelCard = ModelCard.from_template(data, template_str=_TEMPLATE, **texts)
    return f"{card.content.strip()}\n"


def _texts(pipe: Any) -> dict[str, Any]:
    """What the template says about the network and its training."""
    model = pipe.denoiser.config
    pixels = pipe.vae is None and model.in_channels in (1, 3)
    images = pixels or pipe.vae is not None
    return {
        "fence": "`" * 3,
        "pipe": pipe,
        "model": model,
        "kind": "class-conditional" if model.num_classes else "unconditional",
        "data": "inputs" if pixels else "latents",
        "call": _example(pipe),
        "made": "image" if images else "latent",
        "output": "" if images else ', output_type="latent"',
        "pixels": pixels,
        "classes": _table(("number", "name"), pipe.config.id2label),
        "architecture": _table(("what", "value"), {**_sizes(pipe), **asdict(model)}),
        "training": _table(("what", "value"), pipe.config.training),
    }


def _rows(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        several = isinstance(value, list) and all(isinstance(v, dict) for v in value)
        if isinstance(value, dict):
            yield from _rows(value, f"{prefix}{key}.")
        elif several:
            for number, one in enumerate(value, 1):
                named = key if len(value) == 1 else f"{key}.{number}"
                yield from _rows(one, f"{prefix}{named}.")
        elif value is not None and value != [] and value != "":
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            yield f"{prefix}{key}", text.replace("|", "\\|").replace("\n", " ")


def _table(head: tuple[str, str], values: dict[str, Any]) -> str:
    rows = list(_rows(values))
    lines = [head, ("---", "---"), *rows] if rows else []
    return "\n".join(f"| {left} | {right} |" for left, right in lines)


_SCORES = {
    *("fid", "sfid", "fid_infinity", "kid", "frechet_distance"),
    *("is", "inception_score", "precision", "recall"),
}
_NOT_SCORES = {"protocol", "real", "versions"}  # settings, and what real images have


def _measured(evaluation: dict[str, Any]) -> str:
    """Two tables: the scores, and what was measured, and how."""
    rows = dict(_rows(evaluation))
    parts = {key: set(key.lower().split(".")) for key in rows}
    named = {k for k, of in parts.items() if of & _SCORES and not of & _NOT_SCORES}
    scores = {key: value for key, value in rows.items() if key in named}
    how = {key: value for key, value in rows.items() if key not in scores}
    tables = [_table(("score", "value"), scores)] if scores else []
    if how:
        tables += ["What was measured, and how:", _table(("what", "value"), how)]
    return "\n\n".join(tables)


def _sizes(pipe: Any) -> dict[str, str]:
    count = sum(parameter.numel() for parameter in pipe.denoiser.parameters())
    schedule = f"linear, T = {pipe.config.num_train_timesteps}"
    return {"parameters": f"{count:,}", "noise schedule": schedule}


def _example(pipe: Any) -> str:
    """The first arguments of a call that shows how to use the model."""
    if not pipe.denoiser.config.num_classes:
        return ""
    names = list(pipe.config.id2label.values())
    first = repr(names[0]) if names and pipe.labels[names[0]] == [0] else "0"
    return f"{first}, guidance_scale=1.5, "


def read_evaluation(evaluation: dict[str, Any] | str | Path | None) -> dict[str, Any]:
    """The result of an evaluation, or the file that holds it, as a dictionary."""
    if isinstance(evaluation, str | Path):
        evaluation = read_json(Path(evaluation), "the evaluation")
    if not isinstance(evaluation, dict | None):
        raise ValueError(f"evaluation={evaluation!r:.40}: expected a JSON object")
    return evaluation or {}
