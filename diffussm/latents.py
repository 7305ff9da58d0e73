"""Latents.

Generated from book/54_latents.md by `make export`: edit there.
"""

import hashlib
import json
import logging
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffussm.data import (
    EXTENSIONS,
    WHITE,
    BadImage,
    Dataset,
    ImageFolder,
    Skipped,
    StoredImages,
    batch_indices,
    generator,
    is_folder,
    load_batch,
    visible,
)
from diffussm.training import UNSUPPORTED, _sha256

__all__ = [
    "LOG",
    "train_vae",
    "measure_scale",
    "load_vae",
    "vae_identity",
    "check_encoder",
    "full_precision",
    "moments",
    "decode",
    "LmdbImages",
    "images_from",
    "FORMAT",
    "OLD_FORMAT",
    "ENCODE_AGAIN",
    "npy_header",
    "open_shard",
    "make_plan",
    "encode",
    "read_manifest",
    "sign_manifest",
    "verify_store",
    "LatentStore",
]

LOG = logging.getLogger("diffussm.latents")


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
    """Train a small `diffusers.AutoencoderKL` on RGB images, and set its scaling factor (chapter 10).

    `channels` has one entry for each resolution, a multiple of 4; latents are 2**(len - 1) times smaller than
    images. Each of `steps` sees `batch_size` random crops of `crop` pixels. Returns it frozen, as `load_vae`
    does; the same arguments give the same weights on the same machine. `kl_weight` weighs sums over an
    image, as in latent diffusion: lambda of eq-latents-vae. Raises ValueError for sizes that do not fit.
    """
    side, factor = min(source[0][0].shape[-2:]), 2 ** (len(channels) - 1)
    if not (lr > 0 and kl_weight >= 0):
        raise ValueError(
            f"{lr=}, {kl_weight=}: expected a positive rate and a weight that is not negative"
        )
    if (
        crop > side
        or crop % factor
        or steps < 1
        or any(width % 4 for width in channels)
    ):
        raise ValueError(
            f"{crop=}, {steps=}, channels={tuple(channels)}: expected crops of {side} pixels at most and a "
            f"multiple of {factor}, a step or more, and channels that are multiples of 4"
        )
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator(seed, "weights", 0).get_state())
        vae: Any = AutoencoderKL(
            block_out_channels=tuple(channels),
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=4,
            mid_block_add_attention=False,
            sample_size=side,
        )
    _start_as_identity(vae)
    vae.to(memory_format=torch.channels_last)  # faster on a CPU
    optimizer = torch.optim.Adam(vae.parameters(), betas=(0.9, 0.99))
    for step in tqdm(range(steps), unit="step", disable=not progress):
        optimizer.param_groups[0]["lr"] = lr * min(
            (step + 1) / 10, (steps - step) / (0.6 * steps), 1
        )
        x, _ = load_batch(
            source, batch_indices(len(source), batch_size, step, seed)
        )  # (B, 3, H, W)
        draws = generator(seed, "crops", step)
        top, left = (
            int(torch.randint(n - crop + 1, (), generator=draws)) for n in x.shape[-2:]
        )
        x = x[..., top : top + crop, left : left + crop].contiguous(
            memory_format=torch.channels_last
        )
        posterior, noise = vae.encode(x).latent_dist, generator(seed, "posterior", step)
        error = vae.decode(posterior.sample(noise)).sample - x
        kl = (
            posterior.kl().mean() / x[0].numel()
        )  # per image; lambda weighs sums, the errors are means
        loss = error.abs().mean() + 3 * error.square().mean() + kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
    vae.requires_grad_(False).eval().to(memory_format=torch.contiguous_format)
    vae.register_to_config(scaling_factor=measure_scale(vae, source))
    return vae


@torch.no_grad()
def _start_as_identity(vae: Any) -> None:
    """Start near a network that passes colours on, so that a few hundred steps are enough."""
    for name, module in vae.named_modules():
        if name.endswith("conv2"):  # the end of a residual branch
            module.weight.zero_()
        elif isinstance(module, torch.nn.Conv2d) and not name.endswith("conv1"):
            module.weight.mul_(0.5).add_(
                torch.nn.init.dirac_(torch.empty_like(module.weight))
            )
    # A posterior of standard deviation 0.05: with 1, the decoder would first learn to ignore the latents.
    vae.quant_conv.bias[vae.config.latent_channels :] -= 6


@torch.no_grad()
def measure_scale(vae: Any, source: Dataset, images: int = 256) -> float:
    """One over the standard deviation of an autoencoder's latents (eq-latents-scale), from some images."""
    indices = batch_indices(len(source), min(images, len(source)), 0, 0)
    means = []
    for part in indices.split(16):
        x, _ = load_batch(source, part)
        means.append(vae.encode(x.to(vae.device)).latent_dist.mean)
    std = torch.cat(means).std().item()
    if not 0 < std < math.inf:
        raise ValueError(
            f"the latents have a standard deviation of {std}; are the images all alike?"
        )
    return round(1 / std, 5)


def load_vae(name_or_path: str | Path, device: str | torch.device = "cpu") -> Any:
    """A frozen `diffusers.AutoencoderKL`: float32, evaluation mode, no gradients.

    `name_or_path` is a folder with ``config.json`` and weights in safetensors (or with such a folder called
    ``vae`` in it), or a name on the Hugging Face hub, such as ``stabilityai/sd-vae-ft-ema``.

    Raises FileNotFoundError where there is no such folder, ValueError when what is there cannot be used,
    OSError when the hub does not give it.
    """
    folder = Path(name_or_path)
    if (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    local = folder.is_dir()
    if local and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no config.json; expected the folder of an AutoencoderKL"
        )
    if not local and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name_or_path)):
        raise FileNotFoundError(
            f"there is no folder {name_or_path}; expected one with config.json and safetensors weights, or a "
            "name on the hub such as stabilityai/sd-vae-ft-ema"
        )
    from diffusers import AutoencoderKL  # imported here: it costs seconds

    try:
        vae, found = AutoencoderKL.from_pretrained(
            str(folder),
            local_files_only=local,
            use_safetensors=True,  # never a pickle
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # the hub's client raises what it likes
        if local:
            raise ValueError(
                f"{folder} is no usable AutoencoderKL in safetensors: {error}"
            ) from error
        raise OSError(
            f"there is no folder {name_or_path}, and the Hugging Face hub does not give it: {error}. "
            "Download it where there is a network, and pass the folder"
        ) from error
    if wrong := [key for keys in found.values() for key in keys]:
        raise ValueError(
            f"the weights in {folder} do not fit its config.json: {len(wrong)} are missing, unknown or of "
            f"another shape, such as {wrong[0]}"
        )
    if getattr(vae.config, "shift_factor", None):
        raise ValueError(
            f"{folder} shifts its latents (shift_factor); only a scaling_factor is supported"
        )
    return vae.requires_grad_(False).eval().to(device)


def vae_identity(vae: Any, name: str | Path) -> dict[str, Any]:
    """Which autoencoder this is: checksums of its two halves, and what its latents are like.

    The encoder is ``encoder`` and ``quant_conv``, the decoder ``post_quant_conv`` and ``decoder``.
    """
    halves = {"encoder": hashlib.sha256(), "decoder": hashlib.sha256()}
    for key, tensor in sorted(vae.state_dict().items()):
        half = halves[
            "encoder" if key.startswith(("encoder.", "quant_conv.")) else "decoder"
        ]
        half.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        half.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return {
        "name": str(name),
        "class": type(vae).__name__,
        "encoder_sha256": halves["encoder"].hexdigest(),
        "decoder_sha256": halves["decoder"].hexdigest(),
        "scaling_factor": float(vae.config.scaling_factor),
        "latent_channels": vae.config.latent_channels,
        "downsampling": 2 ** (len(vae.config.block_out_channels) - 1),
    }


def check_encoder(made_by: dict[str, Any], identity: dict[str, Any], what: str) -> None:
    """Raises ValueError unless latents that `made_by` made are latents of the autoencoder `identity` too.

    Both are of :func:`vae_identity`; `what` names the latents in the message. They belong to an encoder and
    a scaling factor; another decoder of the same encoder is welcome.
    """
    if "encoder_sha256" not in made_by:
        raise ValueError(
            f"the record of the autoencoder of {what} names no encoder (encoder_sha256): an older version "
            "wrote it, which did not tell encoder and decoder apart. Encode the images again"
        )
    for key in ("encoder_sha256", "scaling_factor"):
        if made_by[key] != identity[key]:
            raise ValueError(
                f"{what}: made by the encoder of {made_by.get('name')!r} ({key} {made_by[key]}). "
                f"{identity['name']!r} has another ({key} {identity[key]}), to which these latents mean "
                "nothing. Use the autoencoder that made them, or one that differs from it in the decoder only"
            )


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32, which only newer GPUs have: the latents would depend on which GPU has made them."""
    backends: Any = (
        torch.backends
    )  # made when torch is imported: no checker knows its members
    convolutions, products = backends.cudnn.conv, backends.cuda.matmul
    before = convolutions.fp32_precision, products.fp32_precision
    convolutions.fp32_precision = products.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision, products.fp32_precision = before


@torch.no_grad()
def moments(vae: Any, images: Tensor) -> Tensor:
    """Mean and log-variance of q(z | image), eq-latents-posterior, as float16 on the CPU.

    images (B, 3, H, W) in [-1, 1] -> (B, 2, C, h, w). Raises ValueError if a moment is no finite float16.
    """
    with full_precision():
        posterior = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
    stored = torch.stack([posterior.mean, posterior.logvar], 1).to("cpu", torch.float16)
    if not stored.isfinite().all():
        raise ValueError(
            "the autoencoder gave moments beyond float16 (65504) or not a number; are the images in [-1, 1], "
            "and is it the right autoencoder?"
        )
    return stored


@torch.no_grad()
def decode(vae: Any, latents: Tensor, batch_size: int = 16) -> Tensor:
    """Scaled latents (B, C, h, w), as the diffusion model makes them, to images (B, 3, H, W) in [-1, 1]."""
    parts = (latents / vae.config.scaling_factor).split(batch_size)
    images = [
        vae.decode(part.to(vae.device, vae.dtype)).sample.clamp(-1, 1).float().cpu()
        for part in parts
    ]
    return torch.cat(images)


class LmdbImages(StoredImages):
    """The images of an LMDB, keys to encoded files, as LSUN distributes them: a `Dataset` without classes.

    They come in the order of their keys. A broken record is stepped over and listed in ``skipped`` by its
    key, see :class:`diffussm.data.StoredImages`. Reads are safe from several threads, and the object can be
    pickled: it opens the database again where it arrives. Needs the package ``lmdb``.

    Raises FileNotFoundError, OSError, ValueError: no LMDB there, a damaged one, an empty one.
    """

    def __init__(
        self,
        root: str | Path,
        size: int | None,
        flip: bool = False,
        *,
        background: tuple[int, int, int] = WHITE,
        exif_rotate: bool = False,
    ) -> None:
        super().__init__(root, size, flip, background, exif_rotate)
        self._env = _open_lmdb(self.root)
        with self._env.begin() as reading:
            keys = list(reading.cursor().iternext(keys=True, values=False))
        if not keys:
            raise ValueError(f"{self.root} is an empty LMDB; expected encoded images")
        # One block of bytes: LSUN's bedrooms have three million keys.
        self._keys = b"".join(keys)
        self._ends = np.cumsum([0] + [len(key) for key in keys])
        self.labels = torch.zeros(len(keys), dtype=torch.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_env"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._env = _open_lmdb(self.root)

    def key(self, index: int) -> bytes:
        """The key of image `index`."""
        index = range(len(self))[index]
        return self._keys[self._ends[index] : self._ends[index + 1]]

    def name(self, index: int) -> str:
        """The key of image `index` as text."""
        return self.key(index).decode(errors="backslashreplace")

    def _content(self, index: int) -> bytes:
        import lmdb

        try:
            with self._env.begin() as reading:
                content = reading.get(self.key(index))
        except lmdb.Error as error:
            raise OSError(
                f"record {self.name(index)!r} of {self.root} cannot be read: {error}"
            ) from error
        if content is None:
            raise BadImage("no longer there")
        return bytes(content)

    def _facts(self) -> Iterator[bytes]:
        yield self._keys
        yield self._ends.astype("<i8").tobytes()


# LMDB opens a file only once in a process; whoever asks again shares it.
_OPEN: WeakValueDictionary[tuple[int, int], Any] = WeakValueDictionary()


def _open_lmdb(root: str) -> Any:
    import lmdb

    data = Path(root) / "data.mdb" if Path(root).is_dir() else Path(root)
    if not data.is_file():
        raise FileNotFoundError(f"there is no {data}; expected the folder of an LMDB")
    _check_lmdb(data)
    file = (data.stat().st_dev, data.stat().st_ino)
    try:
        environment = _OPEN.get(file)
        if environment is None:
            environment = lmdb.open(
                str(data), subdir=False, readonly=True, lock=False, readahead=False
            )
            _OPEN[file] = environment
    except lmdb.Error as error:
        raise OSError(f"{data} cannot be read as an LMDB: {error}") from error
    return environment


def _check_lmdb(file: Path) -> None:
    """OSError for a file shorter than its header says: LMDB would end the whole process (bus error)."""
    with file.open("rb") as opened:
        head = opened.read(2 << 16)
    try:
        (page,) = struct.unpack_from("<I", head, 40)
        # The two headers take turns; the newer transaction is the valid one. (magic, last page, transaction)
        metas = [
            struct.unpack_from("<I116xQQ", head, start + 16) for start in (0, page)
        ]
    except struct.error:
        metas = [(0, 0, 0)]
    if any(magic != 0xBEEFC0DE for magic, _, _ in metas):
        raise OSError(f"{file} is no LMDB of a 64-bit machine, or damaged")
    size, needed = (
        file.stat().st_size,
        (max(metas, key=lambda meta: meta[2])[1] + 1) * page,
    )
    if size < needed:
        raise OSError(f"{file} is truncated: {size} of {needed} bytes")


def images_from(
    path: str | Path,
    size: int | None,
    *,
    flip: bool = False,
    conditional: bool | None = None,
    exif_rotate: bool = False,
) -> ImageFolder | LmdbImages:
    """The images below `path`, whatever it is: an LMDB, class folders as in ImageNet, or one plain folder.

    `conditional` says whether the sub-folders are classes; None: they are if no image lies beside them.
    `size` and `exif_rotate`: see :class:`diffussm.data.StoredImages`.
    """
    path = Path(path)
    if path.suffix == ".mdb" or (path / "data.mdb").is_file():
        if conditional:
            raise ValueError(
                f"{path} is an LMDB, which has no classes; omit conditional"
            )
        return LmdbImages(path, size, flip, exif_rotate=exif_rotate)
    if conditional is None and path.is_dir():
        loose = any(
            Path(e.name).suffix.lower() in EXTENSIONS
            for e in visible(path)
            if not is_folder(e)
        )
        conditional = not loose and any(is_folder(entry) for entry in visible(path))
    return ImageFolder(
        path, size, flip=flip, conditional=bool(conditional), exif_rotate=exif_rotate
    )


FORMAT = "diffussm-latents-2"
OLD_FORMAT = "diffussm-latents-1"
ENCODE_AGAIN = (
    f"this is a store of the format {OLD_FORMAT}, which did not tell encoder and decoder apart and turned "
    "images by EXIF; encode the images again, into a new folder"
)


def npy_header(shape: Sequence[int]) -> bytes:
    """The first bytes of a ``.npy`` file that holds little-endian float16 of this shape."""
    text = f"{{'descr': '<f2', 'fortran_order': False, 'shape': {tuple(shape)}, }}"
    length = -(-(10 + len(text) + 1) // 64) * 64  # data begin at a multiple of 64 bytes
    return (
        b"\x93NUMPY\x01\x00"
        + (length - 10).to_bytes(2, "little")
        + f"{text:<{length - 11}}\n".encode()
    )


def open_shard(path: Path, shape: Sequence[int]) -> np.ndarray:
    """Map a shard into memory, float16, read-only; ValueError or OSError unless it is exactly of this shape.

    The header must be the one expected, byte for byte. So nothing in the file is ever interpreted.
    """
    header = npy_header(shape)
    expected, size = len(header) + 2 * math.prod(shape), path.stat().st_size
    if size != expected:
        raise ValueError(
            f"{path} has {size} bytes, expected {expected}: truncated, or of another store"
        )
    content = np.memmap(path, np.uint8, "r").view(np.ndarray)
    if content[: len(header)].tobytes() != header:
        raise ValueError(
            f"{path} does not begin as a float16 array of shape {tuple(shape)}"
        )
    return content[len(header) :].view("<f2").reshape(shape)


def _publish(draft: Path, path: Path) -> None:
    """Make a finished file appear under its name, all at once and for good."""
    with draft.open("r+b") as file:
        os.fsync(file.fileno())
    draft.replace(path)
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """A renaming is not safe from a power failure before its folder is flushed; some systems cannot do it."""
    try:
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError as error:
        if (
            error.errno not in UNSUPPORTED
        ):  # a disk that is full or broken is another matter
            raise
        _warn_of_flushing(folder, str(error))


@lru_cache
def _warn_of_flushing(folder: Path, reason: str) -> None:
    """Once for each folder."""
    LOG.warning(
        "%s cannot be flushed to disk (%s); what was written there is complete, but may be gone after a "
        "power failure",
        folder,
        reason,
    )


def _write_json(path: Path, value: Any, rank: int) -> None:
    draft = path.with_name(f".{path.name}.{rank}.tmp")
    draft.write_text(json.dumps(value, indent=1) + "\n")
    _publish(draft, path)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def make_plan(
    source: Dataset,
    identity: dict[str, Any],
    *,
    batch_size: int,
    shard_size: int,
    flip: bool,
) -> dict[str, Any]:
    """All that decides the content of a store; ValueError if the images do not fit the autoencoder."""
    size = getattr(source, "size", None)
    height, width = (size, size) if size else source[0][0].shape[-2:]
    factor = identity["downsampling"]
    if height % factor or width % factor:
        raise ValueError(
            f"images of {height} x {width} pixels; this autoencoder needs multiples of {factor}"
        )
    return {
        "format": FORMAT,
        "vae": identity,
        "data": {
            "kind": type(source).__name__,
            "images": len(source),
            "sha256": _fingerprint(source),
        },
        "image_size": [height, width],
        "shape": [identity["latent_channels"], height // factor, width // factor],
        "flip": flip,
        "exif_rotate": bool(getattr(source, "exif_rotate", False)),
        "batch_size": batch_size,
        "shard_size": shard_size,
        "classes": list(source.classes),
    }


def _fingerprint(source: Dataset) -> str:
    """What tells a data set from others. In memory there are no names: look at the pixels."""
    if isinstance(source, StoredImages):
        return source.fingerprint
    digest = hashlib.sha256()
    for i in range(len(source)):
        image, label = source[i]
        digest.update(b"%b%d\n" % (image.contiguous().numpy().tobytes(), label))
    return digest.hexdigest()


def _settle(out: Path, plan: dict[str, Any], rank: int) -> dict[str, Any]:
    """The plan of folder `out`: this one if the folder is new, the one there if it means the same."""
    present = (
        {name for name in os.listdir(out) if not name.startswith(".")}
        if out.exists()
        else set()
    )
    if present and "plan.json" not in present:
        raise ValueError(
            f"{out} is not empty and holds no latents; choose a new folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "plan.json").exists():
        _write_json(out / "plan.json", plan, rank)
        return plan
    theirs = _read_json(out / "plan.json")
    if isinstance(theirs, dict) and theirs.get("format") == OLD_FORMAT:
        raise ValueError(f"{out}: {ENCODE_AGAIN}")
    there, here = _flat(theirs), _flat(json.loads(json.dumps(plan)))
    if differing := sorted(
        key for key in {*there, *here} if there.get(key) != here.get(key)
    ):
        facts = "; ".join(
            f"{key}: there {there.get(key)!r:.70}, now {here.get(key)!r:.70}"
            for key in differing
        )
        raise ValueError(
            f"{out} holds other latents ({facts}). Nothing was written; choose a new folder"
        )
    return theirs


def _flat(plan: Any) -> dict[str, Any]:
    """The entries of a plan by dotted names, without those that may differ: place and decoder of the VAE."""
    if not isinstance(plan, dict) or not isinstance(plan.get("vae"), dict):
        raise ValueError("plan.json is not the plan of a latent store")
    flat = {}
    for key, value in plan.items():
        flat.update(
            {f"{key}.{k}": v for k, v in value.items()}
            if isinstance(value, dict)
            else {key: value}
        )
    return {
        key: value
        for key, value in flat.items()
        if key not in ("vae.name", "vae.decoder_sha256")
    }


def encode(
    source: Dataset,
    out: str | Path,
    vae: Any,
    vae_name: str | Path,
    *,
    batch_size: int = 16,
    shard_size: int = 8192,
    flip: bool = True,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 4,
    progress: bool = True,
) -> "LatentStore | None":
    """Write the latent store of all images of `source` into folder `out`, or what is missing of it.

    Process `rank` of `world_size` makes the shards rank, rank + world_size, ...; whoever ends last writes
    the manifest. The bytes do not depend on the number of processes, nor on how often they were killed.
    `flip` stores the moments of the mirrored images too. Broken images are left out and listed. `workers`
    threads read ahead.

    Returns the store, or None while other processes are still at work. Raises ValueError when `out` holds
    something else: other data, another autoencoder or image size, other options.
    """
    if not 0 <= rank < world_size or min(batch_size, shard_size, workers) < 1:
        raise ValueError(
            f"impossible: rank {rank} of {world_size}, {batch_size=}, {shard_size=}, {workers=}"
        )
    out = Path(out)
    plan = make_plan(
        source,
        vae_identity(vae, vae_name),
        batch_size=batch_size,
        shard_size=shard_size,
        flip=flip,
    )
    plan = _settle(out, plan, rank)
    for stale in out.glob(
        ".*.tmp"
    ):  # of killed processes; each of ours sees to its own
        writer = stale.name.split(".")[-2]
        if writer.isdecimal() and int(writer) % world_size == rank:
            stale.unlink()
    shards = math.ceil(len(source) / shard_size)
    mine = range(rank, shards, world_size)
    for number in tqdm(mine, unit="shard", disable=not progress or rank > 0):
        if _finished(out, plan, number) is None:
            _encode_shard(source, vae, out, plan, number, rank, workers)
    records = [_finished(out, plan, number) for number in range(shards)]
    if None in records:
        return None
    _write_json(out / "manifest.json", sign_manifest({**plan, "shards": records}), rank)
    return LatentStore(out)


def _shard_shape(plan: dict[str, Any], images: int) -> tuple[int, ...]:
    return (images, 2 if plan["flip"] else 1, 2, *plan["shape"])


def _finished(out: Path, plan: dict[str, Any], number: int) -> dict[str, Any] | None:
    """The record of a shard that is complete on disk."""
    name = f"shard-{number:05d}"
    try:
        record = _read_json(out / f"{name}.json")
        if any(_shard_flaws(record, number, len(plan["classes"]))):
            return None
        open_shard(out / f"{name}.npy", _shard_shape(plan, record["images"]))
        return record
    except (OSError, ValueError):
        return None


def _encode_shard(
    source: Dataset,
    vae: Any,
    out: Path,
    plan: dict[str, Any],
    number: int,
    rank: int,
    workers: int,
) -> None:
    def read(index: int) -> tuple[Tensor, int] | Skipped:
        try:
            if not isinstance(source, StoredImages):
                return source[index]
            # Its own [] would put another image in the place of a broken one.
            return source.read(index), int(source.labels[index])
        except BadImage as error:
            name = (
                source.name(index) if isinstance(source, StoredImages) else str(index)
            )
            return Skipped(name, re.sub(r" at 0x[0-9a-f]+", "", str(error)))

    name = f"shard-{number:05d}"
    first = number * plan["shard_size"]
    indices = range(first, min(first + plan["shard_size"], len(source)))
    labels: list[int] = []
    skipped: list[Skipped] = []
    draft = out / f".{name}.npy.{rank}.tmp"
    with draft.open("wb") as file:
        file.write(npy_header(_shard_shape(plan, len(indices))))
        for batch in _read_ahead(read, indices, plan["batch_size"], workers):
            skipped += [item for item in batch if isinstance(item, Skipped)]
            good = [item for item in batch if not isinstance(item, Skipped)]
            if good:
                x = torch.stack([image for image, _ in good])  # (B, 3, H, W)
                versions = [x, x.flip(-1)] if plan["flip"] else [x]
                block = torch.stack(
                    [moments(vae, version) for version in versions], 1
                )  # (B, F, 2, C, h, w)
                file.write(block.numpy().tobytes())
                labels += [label for _, label in good]
        file.seek(0)
        file.write(
            npy_header(_shard_shape(plan, len(labels)))
        )  # now that the number of good images is known
    digest = _sha256(draft)
    _publish(draft, out / f"{name}.npy")
    record = {
        "name": f"{name}.npy",
        "images": len(labels),
        "sha256": digest,
        "labels": [[label, len(list(run))] for label, run in groupby(labels)],
        "skipped": skipped,
    }
    _write_json(out / f"{name}.json", record, rank)


def _read_ahead(
    read: Callable[[int], Any], indices: range, size: int, workers: int
) -> Iterator[list[Any]]:
    """Batches of what `read` gives for each index; the next is being read while one is used."""
    with ThreadPoolExecutor(workers) as pool:
        ahead = [pool.submit(read, i) for i in indices[:size]]
        for first in range(size, len(indices) + size, size):
            batch, ahead = (
                ahead,
                [pool.submit(read, i) for i in indices[first : first + size]],
            )
            yield [item.result() for item in batch]


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a store; ValueError or OSError unless every entry that anything relies on is sound."""
    file = Path(path) / "manifest.json"
    if not file.is_file():
        unfinished = (Path(path) / "plan.json").is_file()
        advice = (
            "it is unfinished: run the same encode again"
            if unfinished
            else "is it a latent store?"
        )
        raise FileNotFoundError(f"there is no {file}; {advice}")
    manifest = _read_json(file)
    if wrong := next(_flaws(manifest), None):
        raise ValueError(f"{file}: {wrong}")
    return manifest


def sign_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a checksum of all its other entries."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return content | {"checksum": digest}


def _natural(value: Any, least: int = 0, most: int = 2**40) -> bool:
    return type(value) is int and least <= value <= most


def _flaws(m: Any) -> Iterator[str]:
    """What is wrong with a manifest; a check may rely on all before it, so take one flaw and stop."""
    if isinstance(m, dict) and m.get("format") == OLD_FORMAT:
        yield ENCODE_AGAIN
    if not isinstance(m, dict) or m.get("format") != FORMAT:
        yield f"is not the manifest of a latent store ({FORMAT})"
    if m.get("checksum") != sign_manifest(m)["checksum"]:
        yield "its checksum does not fit its content; it was changed or damaged"
    vae, shape, classes, shards = (
        m.get(key) for key in ("vae", "shape", "classes", "shards")
    )
    if not isinstance(vae, dict) or not isinstance(vae.get("encoder_sha256"), str):
        yield f"vae is {vae!r:.80}; expected an identity with its encoder_sha256"
    scale = vae.get("scaling_factor")
    if type(scale) not in (int, float) or not 1e-6 < scale < 1e6:
        yield f"scaling_factor is {scale!r:.80}; expected a positive number"
    if (
        not isinstance(shape, list)
        or len(shape) != 3
        or not all(_natural(side, 1, 2**16) for side in shape)
    ):
        yield f"shape is {shape!r:.80}; expected three positive integers"
    if not isinstance(m.get("flip"), bool):
        yield f"flip is {m.get('flip')!r:.80}; expected true or false"
    if not isinstance(classes, list) or not all(
        isinstance(name, str) for name in classes
    ):
        yield f"classes are {classes!r:.80}; expected names"
    if not isinstance(shards, list) or not shards:
        yield "has no shards"
    for number, shard in enumerate(shards):
        yield from _shard_flaws(shard, number, len(classes))
    if sum(shard["images"] for shard in shards) == 0:
        yield "has no images"


def _shard_flaws(shard: Any, number: int, classes: int) -> Iterator[str]:
    name = f"shard-{number:05d}.npy"  # known beforehand, so that no manifest can lead anywhere else
    if not isinstance(shard, dict) or shard.get("name") != name:
        yield f"shard {number} is {shard!r:.80}; expected a name, {name!r}, and more"
    if not _natural(shard.get("images")) or not isinstance(shard.get("sha256"), str):
        yield f"{name} has no count of images or no sha256"
    runs = shard.get("labels")
    if not isinstance(runs, list) or not all(
        isinstance(run, list) and len(run) == 2 for run in runs
    ):
        yield f"the labels of {name} are not pairs of label and count"
    if not all(
        _natural(label, 0, max(classes - 1, 0)) and _natural(count, 1)
        for label, count in runs
    ):
        yield f"{name} has labels outside the {classes} classes"
    if sum(count for _, count in runs) != shard["images"]:
        yield f"the labels of {name} are not as many as its images"


def verify_store(path: str | Path) -> list[str]:
    """Read a whole store and compare every byte with its checksums; what is wrong, or an empty list."""
    try:
        manifest = read_manifest(path)
    except (OSError, ValueError) as error:
        return [str(error)]
    problems = []
    for shard in manifest["shards"]:
        file = Path(path) / shard["name"]
        try:
            open_shard(file, _shard_shape(manifest, shard["images"]))
            if _sha256(file) != shard["sha256"]:
                problems.append(
                    f"{file} has changed since it was written; delete it and encode again"
                )
        except (OSError, ValueError) as error:
            problems.append(str(error))
    return problems


class LatentStore:
    """The latents of a data set, ready for training: a `Dataset` whose images are drawn anew at each visit.

    ``batch(indices, flips, noise)`` draws from the posteriors, eq-latents-draw; ``store[i]`` is the scaled
    mean. Only what is asked for is read from disk, and the system keeps it in memory while there is room.

    Attributes:
        classes, num_classes, flip: see `Dataset`; flip says that mirrored images were encoded too.
        labels: int64 (n,). shape: (C, h, w). scale: latents are multiplied by it. vae: see `vae_identity`.
        manifest: all of ``manifest.json``. fingerprint: its checksum.

    Raises ValueError or OSError for a store that is incomplete, damaged or not one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.vae: dict[str, Any] = self.manifest["vae"]
        self.scale = float(self.vae["scaling_factor"])
        self.shape = tuple(self.manifest["shape"])
        self.flip: bool = self.manifest["flip"]
        self.classes = tuple(self.manifest["classes"])
        self.num_classes = len(self.classes)
        self.fingerprint: str = self.manifest["checksum"]
        shards = self.manifest["shards"]
        self._shards = [
            open_shard(
                self.path / shard["name"], _shard_shape(self.manifest, shard["images"])
            )
            for shard in shards
        ]
        self._ends = np.cumsum([shard["images"] for shard in shards])
        runs = torch.tensor(
            [run for shard in shards for run in shard["labels"]]
        )  # (runs, 2)
        self.labels = torch.repeat_interleave(runs[:, 0], runs[:, 1])

    def __len__(self) -> int:
        return len(self.labels)

    def moments(self, indices: Tensor, flips: Tensor | None = None) -> Tensor:
        """Stored means and log-variances: int64 (B,), bool (B,) -> float16 (B, 2, C, h, w)."""
        i = indices.numpy()
        if len(i) and not 0 <= i.min() <= i.max() < len(self):
            raise IndexError(
                f"indices {i.min()} to {i.max()}; the store has {len(self)} images"
            )
        shards = np.searchsorted(self._ends, i, side="right")
        rows = i - self._ends[shards] + [len(self._shards[shard]) for shard in shards]
        mirrored = (
            np.zeros(len(i), int)
            if flips is None or not self.flip
            else flips.numpy().astype(int)
        )
        out = np.empty((len(i), 2, *self.shape), np.float16)
        where = zip(shards.tolist(), rows.tolist(), mirrored.tolist(), strict=True)
        for place, (shard, row, side) in zip(out, where, strict=True):
            place[...] = self._shards[shard][row, side]
        return torch.from_numpy(out)

    def batch(
        self, indices: Tensor, flips: Tensor | None, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A fresh draw: int64 (B,), bool (B,), normal (B, C, h, w) -> x0 (B, C, h, w), labels (B,)."""
        mean, log_variance = (
            self.moments(indices, flips).float().unbind(1)
        )  # (B, C, h, w) each
        return (mean + torch.exp(log_variance / 2) * noise) * self.scale, self.labels[
            indices
        ]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = range(len(self))[index]
        return self.moments(torch.tensor([index]))[0, 0].float() * self.scale, int(
            self.labels[index]
        )

    def check_vae(self, vae: Any) -> None:
        """Raises ValueError unless `vae` has the encoder that made these latents: `check_encoder`."""
        check_encoder(
            self.vae,
            vae_identity(vae, "this autoencoder"),
            f"the latents in {self.path}",
        )
