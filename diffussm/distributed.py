"""Scaling out.

Generated from book/11_scaling_out.md by `make export`: edit there.
"""

import json
import os
import signal
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from diffussm.data import hash64
from diffussm.diffusion import GaussianDiffusion
from diffussm.model import DiffuSSM, DiffuSSMConfig
from diffussm.sampling import sample
from diffussm.training import Snapshot, TrainConfig, World, stream, write_checkpoint

__all__ = [
    "T",
    "SIGNALS",
    "EXIT_PREEMPTED",
    "Cluster",
    "PEAK_FLOPS",
    "peak_flops",
    "linear_macs",
    "SampleConfig",
    "LABELS",
    "SAMPLE_PRESETS",
    "draw_samples",
    "to_uint8",
]

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: not an error, try again


class Cluster(World):
    """The processes that torchrun started, or this one alone, with all that a long run needs (chapter 11).

    Checkpoints are written by a thread while training goes on. SIGTERM and SIGUSR1 set `stopping`. Use it
    as a context manager; it leaves the process group and the signal handlers as it found them.

    Raises ValueError when torchrun started more processes than there are GPUs.
    """

    def __init__(self, device: str | torch.device | None = None, timeout: float = 1800.0) -> None:
        super().__init__(device)
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        if self.device.type == "cuda" and self.device.index is None:
            local = int(os.environ.get("LOCAL_RANK", 0))
            if local >= torch.cuda.device_count():
                raise ValueError(
                    f"process {local} of this machine has no GPU of its own: there are "
                    f"{torch.cuda.device_count()}; start torchrun with --nproc_per_node "
                    f"{torch.cuda.device_count()}, or pass --device cpu"
                )
            self.device = torch.device("cuda", local)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32 where bf16 is not used
        if self.size > 1:
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._written: Future[Path] | None = None
        self._handlers = {number: signal.signal(number, self._stop) for number in SIGNALS}

    def _stop(self, number: int, _: object) -> None:
        self.stopping = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown(wait=True)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self.size > 1:
            dist.destroy_process_group()

    def shard(self, module: nn.Module, config: TrainConfig) -> None:
        """See World. Blocks are compiled one by one: all are the same graph, which is compiled once."""
        if config.compile:
            for block in module.blocks:  # type: ignore[union-attr]
                block.compile()
        if self.size > 1 and config.parallel == "fsdp":
            from torch.distributed.fsdp import fully_shard  # imported where it is used: it costs seconds

            mesh = dist.init_device_mesh(self.device.type, (self.size,))
            for block in module.blocks:  # type: ignore[union-attr]
                fully_shard(block, mesh=mesh)
            fully_shard(module, mesh=mesh)

    def wrap(self, model: DiffuSSM, config: TrainConfig) -> nn.Module:
        """See World."""
        if self.size == 1 or config.parallel == "fsdp":
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def exchange(self, network: nn.Module, now: bool) -> AbstractContextManager[object]:
        """See World."""
        if isinstance(network, DistributedDataParallel):
            return nullcontext() if now else network.no_sync()
        if hasattr(network, "set_requires_gradient_sync"):  # FSDP2
            network.set_requires_gradient_sync(now)  # type: ignore[operator]
        return nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """See World."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """See World."""
        if self.size > 1:
            dist.barrier()

    def once(self, function: Callable[[], T]) -> T:
        """See World. The result travels between our own processes, never through a file."""
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        if self.size > 1:
            dist.broadcast_object_list(outcome, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise outcome[1]
        return cast(T, outcome[0])

    def whole(self, tensor: Tensor) -> Tensor:
        """See World."""
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def place(self, tensor: Tensor, like: Tensor) -> Tensor:
        """See World. Every process has read the whole tensor from the checkpoint; each keeps its slice."""
        tensor = tensor.to(like.device)
        if hasattr(like, "placements"):
            from torch.distributed.tensor import distribute_tensor

            mesh, slices = like.device_mesh, like.placements  # type: ignore[attr-defined]
            return distribute_tensor(tensor, mesh, slices, src_data_rank=None)
        return tensor

    def save(self, run: Path, snapshot: Snapshot, config: TrainConfig) -> None:
        """See World. Waits for the write before this one, not for this one."""
        self.finish()
        if self.rank == 0:
            self._written = self._writer.submit(
                write_checkpoint, run, snapshot, config.keep_last, config.keep_every, config.keep_steps
            )

    def save_error(self) -> Exception | None:
        """See World."""
        error = self._written.exception() if self._written is not None and self._written.done() else None
        return error if isinstance(error, Exception) else None

    def finish(self) -> None:
        """See World."""

        def wait() -> None:
            if self._written is not None:
                self._written.result()

        self.once(wait)

    def vitals(self, config: TrainConfig, images_per_second: float) -> dict[str, float]:
        """See World: the share of the GPUs' peak that is used (MFU), and the peak of memory in GB."""
        if self.device.type != "cuda":
            return {}
        figures = {"memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}
        peak = peak_flops(torch.cuda.get_device_name())
        if peak is not None:
            used = 6 * linear_macs(config.model) * images_per_second
            figures["mfu"] = round(used / (peak * self.size), 4)
        return figures


PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flops(device_name: str) -> float | None:
    """The maker's figure for dense bf16 products, operations per second; None for a GPU not in the table."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device_name), None)


def linear_macs(config: DiffuSSMConfig) -> float:
    """Multiply-adds of the linear maps of all blocks for one image: (13 L/M + L) D^2 each (chapter 4)."""
    length = config.height * config.width // config.patch_size**2
    return config.n_blocks * (13 / config.downsample + 1) * length * config.d_model**2


@dataclass(frozen=True)
class SampleConfig:
    """Everything that decides a set of samples; the defaults are the paper's (section 4.2).

    `labels` is ``"balanced"`` (each class as often as any other) or ``"random"`` (uniform, by `seed`).
    `guidance_channels` None means all. `batch_size` matters: each batch has a random stream of its own.
    Raises ValueError for values that cannot work.
    """

    count: int = 50_000
    labels: str = "balanced"
    steps: int = 250
    method: str = "ddpm"
    cfg_scale: float = 1.5
    guidance_channels: int | None = None
    clip_denoised: bool = False
    precision: str = "float32"
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("count", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must not be negative")
        choices = {
            "labels": ("balanced", "random"),
            "method": ("ddpm", "ddim"),
            "precision": ("float32", "bf16"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(known)}")

    def label(self, indices: range, num_classes: int) -> Tensor:
        """The labels of these samples, int64 (n,): a pure function of the configuration."""
        numbers = np.arange(indices.start, indices.stop)
        if self.labels == "random":
            numbers = (hash64(self.seed, LABELS, 0, numbers) >> np.uint64(1)).astype(np.int64)
        return torch.from_numpy(numbers % num_classes)


LABELS = 3  # the stream of `hash64`, after those of chapter 8
SAMPLE_PRESETS = {
    "paper-fid": SampleConfig(),
    "paper-fid-unguided": SampleConfig(cfg_scale=1.0),
    "pretty": SampleConfig(count=64, cfg_scale=4.0, batch_size=16),
}


def draw_samples(
    model: DiffuSSM,
    diffusion: GaussianDiffusion,
    config: SampleConfig,
    out: str | Path,
    *,
    world: World,
    facts: dict[str, Any],
    decode: Callable[[Tensor], Tensor] | None = None,
    progress: bool = True,
) -> Path:
    """Draw a set of samples as PNG files in a folder, or into one ``.npz``; resumes an interrupted one.

    Args:
        model: called as it is, on `world.device`.
        out: a folder (``000000.png`` ... and ``samples.json``), or a name that ends in ``.npz`` (``arr_0``
            uint8 (n, H, W, 3), ``arr_1`` labels; the facts lie beside it as ``.json``).
        facts: what else decided the set (which weights, of which step): stored, and compared on resume.
        decode: latents (B, C, h, w) -> images (B, 3, H, W) in [-1, 1]; None for a model of pixels.

    Raises:
        ValueError: `out` holds another set of samples, or something else; nothing is written.
    """
    out = Path(out)
    packed = out.suffix == ".npz"
    record = out.with_suffix(".json") if packed else out / "samples.json"
    parts = out.with_suffix(".parts") if packed else out / ".parts"
    conditional = model.null_label is not None
    how = json.loads(json.dumps(asdict(config) | facts))
    if not conditional:
        how |= {"labels": "none", "cfg_scale": 1.0}
    world.once(lambda: _claim(out, record, parts, how))
    if json.loads(record.read_text()).get("complete"):
        return out
    starts = range(0, config.count, config.batch_size)
    shape = (config.batch_size, model.config.in_channels, model.config.height, model.config.width)
    mine = [
        number
        for number in range(world.rank, len(starts), world.size)
        if not (parts / f"{number:06d}.npy").exists()
    ]
    for number in tqdm(mine, unit="batch", disable=not progress or world.rank > 0, dynamic_ncols=True):
        indices = range(starts[number], min(starts[number] + config.batch_size, config.count))
        generator = stream(config.seed, "samples", number)
        noise = torch.randn(shape, generator=generator).to(world.device)
        # a whole batch even at the end: its numbers then do not depend on `count`
        whole = range(indices.start, indices.start + config.batch_size)
        y = config.label(whole, model.config.num_classes).to(world.device) if conditional else None
        with torch.autocast(world.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            x = sample(
                model,
                diffusion,
                y,
                steps=config.steps,
                method=config.method,
                cfg_scale=config.cfg_scale if conditional else 1.0,
                guidance_channels=config.guidance_channels,
                clip_denoised=config.clip_denoised,
                generator=generator,
                noise=noise,
                progress=False,
            )
        x = x.float()[: len(indices)]
        images = to_uint8(x if decode is None else decode(x))
        if not packed:
            _write_pngs(out, indices, images)
        draft = parts / f".{number:06d}.tmp"
        with draft.open("wb") as file:
            np.save(file, images if packed else np.zeros(0, np.uint8))
        draft.replace(parts / f"{number:06d}.npy")
    world.sum(torch.zeros(1))  # all have drawn theirs
    world.once(lambda: _complete(out, record, parts, how, config, model.config.num_classes, len(starts)))
    return out


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (n, 1 or 3, H, W) in [-1, 1] as RGB, uint8 (n, H, W, 3), rounded to the nearest level.

    Raises ValueError for latents, which have to be decoded first, and for images that are not finite.
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(
            f"these samples have {images.shape[1]} channels: latents, which an autoencoder must decode; "
            "pass --vae"
        )
    if not bool(images.isfinite().all()):
        raise ValueError("the model drew images that are not finite; its weights have probably diverged")
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().expand(-1, 3, -1, -1)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _claim(out: Path, record: Path, parts: Path, how: dict[str, Any]) -> None:
    if record.exists():
        try:
            theirs = json.loads(record.read_text())
        except ValueError as error:
            raise ValueError(f"{record} is damaged ({error}); choose another name") from error
        different = [
            f"{key} (there {theirs.get(key)!r}, asked {how.get(key)!r})"
            for key in sorted(set(how) | set(theirs))
            if key != "complete" and theirs.get(key) != how.get(key)
        ]
        if different:
            raise ValueError(
                f"{out} holds other samples, which differ in {'; '.join(different)}; choose another name"
            )
    elif out.exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no set of samples; choose another name")
    else:
        parts.mkdir(parents=True)
        draft = record.with_name(f".{record.name}.tmp")
        draft.write_text(json.dumps({**how, "complete": False}, indent=2) + "\n")
        draft.replace(record)


def _write_pngs(folder: Path, indices: range, images: np.ndarray) -> None:
    from PIL import Image

    for index, image in zip(indices, images, strict=True):
        draft = folder / f".{index:06d}.tmp"
        Image.fromarray(image).save(draft, format="PNG")
        draft.replace(folder / f"{index:06d}.png")


def _complete(
    out: Path,
    record: Path,
    parts: Path,
    how: dict[str, Any],
    config: SampleConfig,
    num_classes: int,
    batches: int,
) -> None:
    files = [parts / f"{number:06d}.npy" for number in range(batches)]
    if out.suffix == ".npz":
        labels = (
            config.label(range(config.count), num_classes)
            if num_classes
            else torch.zeros(config.count).long()
        )
        draft = out.with_name(f".{out.name}.tmp")
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:  # never whole in memory
                shape = (config.count, *np.load(files[0], allow_pickle=False).shape[1:])
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for part in files:
                    file.write(np.load(part, allow_pickle=False).tobytes())
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, labels.numpy())
        draft.replace(out)
    draft = record.with_name(f".{record.name}.tmp")
    draft.write_text(json.dumps({**how, "complete": True}, indent=2) + "\n")
    draft.replace(record)
    for part in files:
        part.unlink()
    parts.rmdir()
