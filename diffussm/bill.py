"""The bill.

Generated from book/92_bill.md by `make export`: edit there.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffussm.features import WEIGHTS
from diffussm.files import sha256
from diffussm.hourglass import linear_macs
from diffussm.model import DiffuSSMConfig
from diffussm.options import Execution, Recipe
from diffussm.sample_options import SampleSet

__all__ = ["checkpoints_kept", "Download", "VAE_FILE", "DOWNLOADS", "published"]


def _training_operations(recipe: Recipe) -> float:
    """Operations of a whole run (eq-cli-hours): six for each multiply-add."""
    return 6 * linear_macs(recipe.model) * recipe.steps * recipe.batch_size


def _hours(operations: float, peak: float, share: float, cards: int = 1) -> float:
    """Hours for so many operations, at a share (MFU) of the peak of so many cards."""
    return operations / (3600 * peak * share * cards)


def _sampling_operations(
    model: DiffuSSMConfig, wanted: SampleSet, decode: float = 0.0
) -> dict[str, float]:
    """Operations to draw a set, by precision; to decode an image takes `decode`."""
    guided = wanted.sampler.cfg_scale != 1
    passes = wanted.count * wanted.sampler.steps * (2 if guided else 1)
    network = 2.0 * linear_macs(model) * passes
    counted: dict[str, float] = {wanted.precision: network}
    counted["float32"] = counted.get("float32", 0.0) + wanted.count * decode
    return counted


def _autoencoder_operations(vae: Any, side: int) -> tuple[float, float]:
    """Operations to encode an image of side x side pixels, and to decode it.

    `vae` is an AutoencoderKL; on the device "meta" nothing is computed but shapes.
    """
    where = next(vae.parameters()).device
    small = side // 2 ** (len(vae.config.block_out_channels) - 1)
    image = torch.zeros(1, 3, side, side, device=where)
    latents = torch.zeros(1, vae.config.latent_channels, small, small, device=where)
    return _counted(vae.encode, image), _counted(vae.decode, latents)


def _counted(call: Any, x: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(x)
    return float(counter.get_total_flops())


def checkpoints_kept(recipe: Recipe, execution: Execution) -> int:
    """How many checkpoints lie on the disk at most, while a run writes its last one."""
    named = execution.keep_steps(recipe.batch_size)
    kept = {step for step in named if step <= recipe.steps}
    if every := execution.keep_every:
        kept |= set(range(every, recipe.steps + 1, every))
    return len(kept) + execution.keep_last + 1


class Download(NamedTuple):
    """A file that others publish and a run needs, `size` in bytes; None: not known."""

    name: str
    use: str
    url: str
    size: int | None = None
    sha256: str | None = None


_HUB = "https://huggingface.co/stabilityai"
_ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches"
_FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"
VAE_FILE = "diffusion_pytorch_model.safetensors"
DOWNLOADS = (
    Download(
        f"sd-vae-ft-ema/{VAE_FILE}",
        "encodes, decodes",
        f"{_HUB}/sd-vae-ft-ema",
        334_643_276,
        "32db726da04f06c1b6b14c0043ce115cc87a501482945c5add89a40d838fcb46",
    ),
    Download(
        f"sd-vae-ft-mse/{VAE_FILE}",
        "another decoder",
        f"{_HUB}/sd-vae-ft-mse",
        334_643_276,
        "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
    ),
    Download(
        "VIRTUAL_imagenet256_labeled.npz",
        "reference",
        f"{_ADM}/imagenet/256/VIRTUAL_imagenet256_labeled.npz",
        2_037_122_530,
        "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758",
    ),
    Download(
        "VIRTUAL_imagenet512.npz",
        "reference",
        f"{_ADM}/imagenet/512/VIRTUAL_imagenet512.npz",
    ),
    Download(
        "VIRTUAL_lsun_bedroom256.npz",
        "reference",
        f"{_ADM}/lsun/bedroom/VIRTUAL_lsun_bedroom256.npz",
    ),
    Download(
        WEIGHTS,
        "scores",
        f"{_FIDELITY}/{WEIGHTS}",
        95_628_359,
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
)


def published(file: Path) -> Download | None:
    """Which of `DOWNLOADS` a file is; ValueError if only its name is that of one."""
    found = sha256(file)
    for known in DOWNLOADS:
        if known.sha256 == found:
            return known
        if known.sha256 and known.name == file.name:
            raise ValueError(f"{file} is not the published one; fetch {known.url}")
    return None
