"""Scores one can trust.

Generated from book/57_trust.md by `make export`: edit there.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import (
    conv2d,
    gelu,
    interpolate,
    layer_norm,
    linear,
    scaled_dot_product_attention,
)

from diffussm.files import sha256
from diffussm.guards import expect_int, expect_there, explain, refuse
from diffussm.metrics import frechet_distance
from diffussm.two_level import multiplying_in

__all__ = [
    "growing_subsets",
    "fid_infinity",
    "DINOv2",
    "load_dinov2",
    "ADM_SCORES",
    "acceptance",
    "acceptance_files",
]


_SUBSETS = 15  # of a tenth of the samples to all of them, as in its authors' code


def growing_subsets(
    pool: Tensor, mu: np.ndarray, sigma: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of subsets of features (n, d), and their distances from (mu, sigma)."""
    n, x = expect_int("number of features", len(pool), least=100), pool.double().numpy()
    draw, sizes = np.random.default_rng(0), np.linspace(n // 10, n, _SUBSETS)
    distances = []
    for size in sizes.astype(int):
        part = x[draw.permutation(n)[:size]]
        moments = part.mean(0), np.cov(part, rowvar=False)
        distances.append(frechet_distance(*moments, mu, sigma))
    return sizes.astype(int), np.array(distances)


def fid_infinity(pool: Tensor, mu: np.ndarray, sigma: np.ndarray) -> float:
    """The Fréchet distance of features (n, d) extended to 1/n = 0, eq-trust-infinity.

    The bias of the reference's own moments stays. May be slightly negative, and is far
    off where the smallest subset, n/10, has no more than d images. Raises ValueError
    for fewer than 100 features.

    Source: Chong and Forsyth, CVPR 2020.
    """
    sizes, distances = growing_subsets(pool, mu, sigma)
    return float(np.polyfit(1 / sizes, distances, deg=1)[1])


_SIDE = 224  # pixels of an image
_PATCH = 14  # pixels of a patch
_HEAD = 64  # channels of an attention head


def _tokens(w: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """(B, 3, 224, 224) -> (B, 1 + 256, D), the class token first."""
    kernel, bias = w["patch_embed.proj.weight"], w["patch_embed.proj.bias"]
    patches = conv2d(images, kernel, bias, stride=_PATCH).flatten(2).mT
    first = w["cls_token"].expand(len(images), -1, -1)
    positions = _positions(w["pos_embed"], _SIDE // _PATCH)
    return torch.cat([first, patches], dim=1) + positions


def _positions(stored: Tensor, side: int) -> Tensor:
    """Those of n x n patches for side x side: (1, 1 + n^2, D) -> (1, 1 + side^2, D)."""
    n = math.isqrt(stored.shape[1] - 1)
    if n == side:
        return stored
    grid = stored[:, 1:].mT.reshape(1, -1, n, n)
    scale = (side + 0.1) / n
    grid = interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([stored[:, :1], grid.flatten(2).mT], dim=1)


def _block(w: Mapping[str, Tensor], i: int, x: Tensor) -> Tensor:
    """Block i: (B, L, D) -> (B, L, D)."""

    def of(name: str) -> tuple[Tensor, Tensor]:
        return w[f"blocks.{i}.{name}.weight"], w[f"blocks.{i}.{name}.bias"]

    def normed(name: str) -> Tensor:
        return layer_norm(x, x.shape[-1:], *of(name), eps=1e-6)

    qkv = linear(normed("norm1"), *of("attn.qkv"))
    qkv = qkv.reshape(*x.shape[:2], 3, -1, _HEAD)
    heads = scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
    attended = linear(heads.transpose(1, 2).flatten(2), *of("attn.proj"))
    x = x + w[f"blocks.{i}.ls1.gamma"] * attended
    hidden = gelu(linear(normed("norm2"), *of("mlp.fc1")))
    return x + w[f"blocks.{i}.ls2.gamma"] * linear(hidden, *of("mlp.fc2"))


_MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels
_STD = (0.229, 0.224, 0.225)


class DINOv2:
    """The network of FD-DINOv2, a ViT of any size with patches of 14; an `Extractor`.

    Stein et al. take ViT-L/14. `name` says how many blocks the file has, how wide.
    """

    def __init__(self, weights: str | Path, device: str | torch.device = "cpu") -> None:
        self.w, self.checksum = _dinov2_weights(weights), sha256(Path(weights))
        self.device = torch.device(device)
        self.w = {name: x.float().to(self.device) for name, x in self.w.items()}
        self.blocks = sum(name.endswith(".ls1.gamma") for name in self.w)
        self.name = f"dinov2, {self.blocks} blocks of {self.w['norm.bias'].numel()}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 images (B, 3, H, W) -> {"pool": (B, D)}."""
        x = images.to(self.device).float()
        x = interpolate(x, size=(_SIDE, _SIDE), mode="bicubic", antialias=True) / 255
        mean, std = (x.new_tensor(z).view(3, 1, 1) for z in (_MEAN, _STD))
        with multiplying_in("ieee"):
            x = _tokens(self.w, (x - mean) / std)
            for i in range(self.blocks):
                x = _block(self.w, i, x)
        norm = self.w["norm.weight"], self.w["norm.bias"]
        return {"pool": layer_norm(x[:, 0], x.shape[-1:], *norm, eps=1e-6).cpu()}


_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
_MAPS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def _dinov2_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors in the file; ValueError where it is not that of a DINOv2."""
    expect_there(Path(path), f"the weights of DINOv2, say {_URL}")
    told = f"{path} does not hold the weights of DINOv2, as {_URL} does"
    with explain(told, Exception):
        found = dict(torch.load(path, map_location="cpu", weights_only=True))
    blocks = [name.rpartition(".ls1.")[0] for name in found if ".ls1." in name]
    maps = [
        "patch_embed.proj",
        "norm",
        *(f"{b}.{part}" for b in blocks for part in _MAPS),
    ]
    wanted = {"cls_token", "pos_embed"} | {f"{block}.ls2.gamma" for block in blocks}
    wanted |= {f"{block}.ls1.gamma" for block in blocks}
    wanted |= {f"{part}.{kind}" for part in maps for kind in ("weight", "bias")}
    missing = sorted(wanted - found.keys())
    refuse(missing or not blocks, f"{told}: it lacks {(missing or ['blocks'])[0]}")
    width = found["norm.bias"].numel()
    refuse(width % _HEAD, f"{told}: its width {width} is no multiple of {_HEAD}")
    return {name: found[name] for name in wanted}


def load_dinov2(weights: str | Path | None, device: str) -> DINOv2:
    """DINOv2; ValueError where no file is named."""
    if weights is None:
        raise ValueError(
            f"--weights is missing: {_URL}; nothing is downloaded silently"
        )
    return DINOv2(weights, device)


ADM_SCORES = {  # of admnet_guided_upsampled_imagenet256.npz, by ADM's own program
    "fid": 3.9425574129223264,
    "sfid": 6.140433703346162,
    "inception_score": 215.8370361328125,
    "precision": 0.8265,
    "recall": 0.5309,
}

_ALLOWED = {
    "fid": 0.05,
    "sfid": 0.1,
    "inception_score": 2.0,
    "precision": 0.01,
    "recall": 0.01,
}


def acceptance(found: Mapping[str, Any]) -> dict[str, Any]:
    """Our scores of ADM's samples beside ADM's own; "accepted" if all are near.

    `found` is what `evaluate` says of the files of `acceptance_files`.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, theirs in ADM_SCORES.items():
        ours = float(found[name])
        row = {"theirs": theirs, "ours": ours, "difference": ours - theirs}
        near = abs(ours - theirs) <= _ALLOWED[name]
        rows[name] = row | {"allowed": _ALLOWED[name], "near": near}
    return {"accepted": all(row["near"] for row in rows.values()), "scores": rows}


_PLACE = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches"
_SAMPLES = "admnet_guided_upsampled_imagenet256.npz"
_REFERENCE = "VIRTUAL_imagenet256_labeled.npz"


def acceptance_files(folder: str | Path) -> tuple[Path, Path]:
    """ADM's samples and reference in a folder; FileNotFoundError says what to fetch."""
    files = Path(folder) / _SAMPLES, Path(folder) / _REFERENCE
    missing = [file.name for file in files if not file.is_file()]
    fetch = " and ".join(f"{_PLACE}/imagenet/256/{name}" for name in missing)
    refuse(missing, f"{folder} lacks files of ADM's: fetch {fetch}", FileNotFoundError)
    return files
