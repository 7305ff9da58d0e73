"""A trained model for the rendered page: its weights as text, and a first digit.

A page runs it in JavaScript (`book/_js/network.js`). The appendix *The model in a page*
explains what is here.
"""

from __future__ import annotations

import base64
import copy
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffussm.bidirectional import kernel_spectra
from diffussm.diffusion import GaussianDiffusion
from diffussm.model import DiffuSSM
from diffussm.options import diffusion_of
from diffussm.pretrained import load_pretrained
from diffussm.sampling import denoise

__all__ = [
    "COLUMNS",
    "GLUED",
    "computing_with",
    "levels",
    "live_model",
    "numbers",
    "for_page",
    "pack",
    "rounded",
    "shipped",
    "strip",
    "unpack",
]

GLUED = "page-model"  # the name under which the chapter hands its model to the book
COLUMNS = 8  # of a strip


@torch.no_grad()
def numbers(model: DiffuSSM) -> dict[str, Tensor]:
    """What the page computes with, in float32: the weights by their names, but for each
    block both kernels at the model's length, with the skips in lag 0.
    """
    found = {n: w.float() for n, w in model.state_dict().items() if ".ssm." not in n}
    for i, block in enumerate(model.blocks):
        layer, L = block.ssm, model.config.seq_len
        kernels = torch.stack([layer.forward_kernel(L), layer.backward_kernel(L)])
        kernels[:, :, 0] += layer.skip.view(2, -1)
        found[f"blocks.{i}.kernels"] = kernels.float()  # (2, D, L)
    return found


def pack(model: DiffuSSM) -> dict[str, Any]:
    """Sizes, places and numbers of a model, as JSON can hold them; float16, base 64.

    Raises:
        ValueError: the model is of a kind that the page does not run.
    """
    sizes = model.config
    kind = sizes.in_channels, sizes.patch_size, sizes.pos_embed, sizes.num_classes > 0
    if kind != (1, 1, "none", True):
        raise ValueError(f"{sizes}: a page runs one channel, no patches, and classes")
    names = {"D": "d_model", "M": "downsample", "L": "seq_len", "blocks": "n_blocks"}
    tensors, halves, start = {}, [], 0
    for name, tensor in numbers(model).items():
        tensors[name] = [start, tensor.numel()]
        halves.append(tensor.numpy().astype("<f2").ravel())
        start += tensor.numel()
    half = base64.b64encode(np.concatenate(halves).tobytes()).decode()
    told = {
        k: getattr(sizes, v) for k, v in (names | {"classes": "num_classes"}).items()
    }
    return {"sizes": told, "tensors": tensors, "half": half}


def unpack(packed: dict[str, Any]) -> dict[str, np.ndarray]:
    """The numbers by name, flat, as the page reads them."""
    half = np.frombuffer(base64.b64decode(packed["half"]), "<f2").astype(np.float32)
    return {name: half[i : i + n] for name, (i, n) in packed["tensors"].items()}


def computing_with(given: dict[str, np.ndarray], model: DiffuSSM) -> DiffuSSM:
    """A copy of a model that computes with the page's numbers, and nothing else."""
    made = copy.deepcopy(model).eval().requires_grad_(False)
    flat = {name: torch.tensor(values) for name, values in given.items()}
    kernels = [flat.pop(f"blocks.{i}.kernels") for i in range(len(made.blocks))]
    shapes = {name: w.shape for name, w in made.state_dict().items()}
    weights = {name: values.view(shapes[name]) for name, values in flat.items()}
    left = made.load_state_dict(weights, strict=False).missing_keys
    assert all(".ssm." in name for name in left), left
    for block, both in zip(made.blocks, kernels, strict=True):
        spectra = kernel_spectra(*both.view(2, -1, model.config.seq_len))
        block.ssm.prepare = lambda length, spectra=spectra: spectra
    return made


def rounded(model: DiffuSSM) -> DiffuSSM:
    """A copy that computes with what the page has: weights and kernels in float16."""
    return computing_with(unpack(pack(model)), model)


def strip(
    model: DiffuSSM, diffusion: GaussianDiffusion, label: int, seed: int, **options: Any
) -> Tensor:
    """A digit that grows, (2, columns, 8, 8): above what the chain holds, below the
    image that the network then believes in. `options` are those of a `Sampler`.
    """
    draws = torch.Generator().manual_seed(seed)
    x, y = torch.randn(1, 1, 8, 8, generator=draws), torch.tensor([label])
    how = {"steps": 25, "cfg_scale": 1.5, "clip_denoised": True} | options
    before, believed = [], []
    for _, after, image in denoise(
        model, diffusion, y, noise=x, generator=draws, **how
    ):
        before.append(x)
        believed.append(image)
        x = after
    chosen = np.linspace(0, len(before) - 1, min(COLUMNS, len(before))).round()
    rows = [
        torch.cat([row[int(k)] for k in chosen])[:, 0] for row in (before, believed)
    ]
    return torch.stack(rows)


def levels(images: Tensor) -> str:
    """Images in [-1, 1] as a text of bytes, 0 for black, 255 for white."""
    grey = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
    return base64.b64encode(grey.numpy().tobytes()).decode()


def for_page(model: DiffuSSM, diffusion: GaussianDiffusion) -> dict[str, Any]:
    """All that the rendered pages need of a model: its weights, and a digit it drew."""
    grown = strip(model, diffusion, label=3, seed=0, method="ddim")
    return {"packed": pack(model), "label": 3, "strip": levels(grown)}


@cache
def shipped() -> dict[str, Any]:
    """The same of the weights that come with the package."""
    box = load_pretrained("digits")
    return for_page(box.model().eval(), diffusion_of(box.recipe))


def live_model(
    model: DiffuSSM, diffusion: GaussianDiffusion, page: dict[str, Any]
) -> None:
    """Show it: in the rendered page what draws there, at a kernel widgets."""
    from explorables import Presses, explorable  # not where Sphinx imports this module
    from ipywidgets import FloatSlider, IntSlider

    from plotting import image_grid

    def grow(label: int, seed: int, steps: int, guidance: float, method: str) -> Any:
        """A digit grows from noise in eight steps: above, what the chain holds; below,
        the digit that the network then believes in.
        """
        how: dict[str, Any] = {"steps": steps, "cfg_scale": guidance, "method": method}
        grown = strip(model, diffusion, label, seed, **how)  # (2, columns, 8, 8)
        return image_grid(grown.flatten(0, 1).numpy(), ncols=grown.shape[1])

    explorable(
        "live-model",
        grow,
        data={"strip": page["strip"]},
        anchor="live-model",
        label=IntSlider(page["label"], min=0, max=9, description="digit"),
        seed=Presses(0, description="other noise"),
        steps=IntSlider(
            25, min=5, max=50, continuous_update=False, description="steps"
        ),
        guidance=FloatSlider(1.5, min=0, max=6, step=0.5, description="guidance"),
        method=["ddim", "ddpm"],
    )
