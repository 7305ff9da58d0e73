"""Autoencoder.

Generated from book/53_autoencoder.md by `make export`: edit there.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffussm.data import Dataset, batch_indices, generator
from diffussm.guards import (
    expect_finite,
    expect_int,
    expect_number,
    expect_same,
    expect_there,
    explain,
    refuse,
)
from diffussm.two_level import multiplying_in

__all__ = [
    "train_vae",
    "measure_scale",
    "load_vae",
    "vae_identity",
    "check_encoder",
    "moments",
    "decode",
]


def _vae_loss(vae: Any, x: Tensor, kl_weight: float, noise: torch.Generator) -> Tensor:
    """eq-latents-vae of images (B, 3, H, W): the mean over their numbers, a scalar."""
    posterior = vae.encode(x).latent_dist
    error = vae.decode(posterior.sample(noise)).sample - x
    kl = posterior.kl().mean() / x[0].numel()  # lambda weighs sums over an image
    loss: Tensor = error.abs().mean() + 3 * error.square().mean() + kl_weight * kl
    return loss


def _kind() -> Any:
    """The class; imported only now, for that costs seconds."""
    from diffusers import AutoencoderKL

    return AutoencoderKL


def _new_vae(
    channels: Sequence[int], latent_channels: int, side: int, seed: int
) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator(seed, "weights", 0).get_state())
        vae = _kind()(
            block_out_channels=tuple(channels),
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=4,
            mid_block_add_attention=False,
            sample_size=side,
        )
    return vae.to(memory_format=torch.channels_last)  # faster on a CPU


@torch.no_grad()
def _start_as_identity(vae: Any) -> None:
    """Pass colours on from the start."""
    for name, module in vae.named_modules():
        if name.endswith("conv2"):  # the end of a residual branch
            module.weight.zero_()
        elif isinstance(module, torch.nn.Conv2d) and not name.endswith("conv1"):
            identity = torch.nn.init.dirac_(torch.empty_like(module.weight))
            module.weight.mul_(0.5).add_(identity)
    # deviations of 0.05: with 1, the decoder would first learn to ignore the latents
    vae.quant_conv.bias[vae.config.latent_channels :] -= 6


def _random_crop(x: Tensor, crop: int, draws: torch.Generator) -> Tensor:
    """The same square of `crop` pixels of all images: (B, 3, H, W) -> (B, 3, c, c)."""
    top, left = (
        int(torch.randint(n - crop + 1, (), generator=draws)) for n in x.shape[-2:]
    )
    x = x[..., top : top + crop, left : left + crop]
    return x.contiguous(memory_format=torch.channels_last)


def train_vae(
    source: Dataset,
    *,
    channels: Sequence[int] = (8, 16, 32),
    latent_channels: int = 4,
    steps: int = 380,
    batch_size: int = 4,
    crop: int = 32,
    lr: float = 4e-3,
    kl_weight: float = 1e-6,
    seed: int = 0,
    progress: bool = True,
) -> Any:
    """Train a small `diffusers.AutoencoderKL` on RGB images; returned as by `load_vae`.

    `channels` has one entry for each resolution, a multiple of 4. The same arguments
    give the same weights on the same machine. `kl_weight` is lambda of eq-latents-vae.
    Raises ValueError for sizes that do not fit.
    """
    expect_number("lr", lr, above=0)
    expect_number("kl_weight", kl_weight, least=0)
    expect_int("steps", steps, least=1)
    side = min(source[0][0].shape[-2:])
    expect_int("crop", crop, least=1, most=side)
    factor = 2 ** (len(channels) - 1)
    if crop % factor or any(width % 4 for width in channels):
        raise ValueError(
            f"{crop=}, {channels=}: expected a multiple of {factor}, and multiples of 4"
        )
    vae = _new_vae(channels, latent_channels, side, seed)
    _start_as_identity(vae)
    optimizer = torch.optim.Adam(vae.parameters(), betas=(0.9, 0.99))
    for step in tqdm(range(steps), unit="step", disable=not progress):
        rise, fall = (step + 1) / 10, (steps - step) / (0.6 * steps)
        optimizer.param_groups[0]["lr"] = lr * min(rise, fall, 1)
        x, _ = source.batch(batch_indices(len(source), batch_size, step, seed))
        x = _random_crop(x, crop, generator(seed, "crops", step))
        noise = generator(seed, "posterior", step)
        loss: Any = _vae_loss(vae, x, kl_weight, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
    vae.requires_grad_(False).eval().to(memory_format=torch.contiguous_format)
    vae.register_to_config(scaling_factor=measure_scale(vae, source))
    return vae


@torch.no_grad()
def measure_scale(vae: Any, source: Dataset, images: int = 256) -> float:
    """The factor f of eq-latents-scale, by some images; ValueError if all are alike."""
    indices = batch_indices(len(source), min(images, len(source)), 0, 0)
    batches = (source.batch(part)[0] for part in torch.split(indices, 16))
    z = torch.cat([vae.encode(x.to(vae.device)).latent_dist.mean for x in batches])
    std = z.std().item()
    refuse(not 0 < std < math.inf, f"std of latents {std}: are the images all alike?")
    return round(1 / std, 5)


def load_vae(name_or_path: str | Path, device: str | torch.device = "cpu") -> Any:
    """A frozen `diffusers.AutoencoderKL`: float32, evaluation mode, no gradients.

    `name_or_path` is a folder (or has it in `vae`), or a name on the Hugging Face hub.
    Raises FileNotFoundError, ValueError, OSError for what cannot be used.
    """
    folder = Path(name_or_path)
    if (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    local, name = folder.is_dir(), str(name_or_path)
    vae, found = _from_folder(folder) if local else _from_hub(name)
    odd = [key for keys in found.values() for key in keys]
    refuse(odd, f"the weights of {name} do not fit its config.json, such as {odd[:1]}")
    if vae.config.get("shift_factor"):
        raise ValueError(f"{name} has a shift_factor; only a scaling_factor is known")
    return vae.requires_grad_(False).eval().to(device)


def _from_folder(folder: Path) -> Any:
    expect_there(folder / "config.json", "that of an AutoencoderKL")
    with explain(f"{folder} is no usable AutoencoderKL in safetensors", Exception):
        return _from_pretrained(str(folder), local_files_only=True)


def _from_hub(name: str) -> Any:
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise FileNotFoundError(f"there is no folder {name}; the hub has OWNER/NAME")
    with explain(
        f"there is no folder {name}, and the hub does not give it: download it where "
        "there is a network, and pass the folder",
        Exception,  # the hub's client raises what it likes
        error=OSError,
    ):
        return _from_pretrained(name)


def _from_pretrained(place: str, **options: Any) -> Any:
    return _kind().from_pretrained(
        place,
        use_safetensors=True,  # never a pickle
        low_cpu_mem_usage=False,
        output_loading_info=True,
        **options,
    )


def _half_sha256(vae: Any, encoder: bool) -> str:
    """Of one half's names, types, shapes and numbers."""
    digest = hashlib.sha256()
    for key, tensor in sorted(vae.state_dict().items()):
        if key.startswith(("encoder.", "quant_conv.")) == encoder:
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def vae_identity(vae: Any, name: str | Path) -> dict[str, Any]:
    """Which autoencoder this is: checksums of its two halves, what its latents are."""
    return {
        "name": str(name),
        "class": type(vae).__name__,
        "encoder_sha256": _half_sha256(vae, encoder=True),
        "decoder_sha256": _half_sha256(vae, encoder=False),
        "scaling_factor": float(vae.config.scaling_factor),
        "latent_channels": vae.config.latent_channels,
        "downsampling": 2 ** (len(vae.config.block_out_channels) - 1),
    }


def check_encoder(made_by: dict[str, Any], identity: dict[str, Any], what: str) -> None:
    """Refuse latents of another encoder: ValueError; another decoder is welcome.

    Identities of who made the latents and of who is to use them; `what` names them.
    """
    if "encoder_sha256" not in made_by:  # an older version wrote it
        raise ValueError(f"{what}: no encoder is on record. Encode the images again")
    deciding = ("encoder_sha256", "scaling_factor")
    expect_same(
        f"{what}: made by the encoder of {made_by.get('name')!r}. This one differs in",
        {key: identity[key] for key in deciding},
        {key: made_by[key] for key in deciding},
        "Use the autoencoder that made them, or one with another decoder only",
    )


@torch.no_grad()
def moments(vae: Any, images: Tensor) -> Tensor:
    """Mean and log-variance, eq-latents-posterior; float16 on the CPU.

    images (B, 3, H, W) in [-1, 1] -> (B, 2, C, h, w), finite, or a ValueError.
    """
    with multiplying_in("ieee"):
        posterior = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
    stored = torch.stack([posterior.mean, posterior.logvar], 1).to("cpu", torch.float16)
    expect_finite("moments in float16", stored, "are the images in [-1, 1]?")
    return stored


@torch.no_grad()
def decode(vae: Any, latents: Tensor, batch_size: int = 16) -> Tensor:
    """Scaled latents (B, C, h, w) to images (B, 3, H, W) in [-1, 1], on the CPU."""
    parts = torch.split(latents / vae.config.scaling_factor, batch_size)
    with multiplying_in("ieee"):
        images = [
            vae.decode(part.to(vae.device, vae.dtype)).sample.clamp(-1, 1).float().cpu()
            for part in parts
        ]
    return torch.cat(images)
