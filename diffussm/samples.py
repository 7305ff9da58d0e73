"""Sets of samples.

Generated from book/55_samples.md by `make export`: edit there.
"""

import json
import math
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffussm.data import RANDOM, generator, random_bits
from diffussm.diffusion import GaussianDiffusion
from diffussm.model import DiffuSSM, DiffuSSMConfig
from diffussm.sampling import denoise
from diffussm.training import Preempted, World

__all__ = [
    "SampleConfig",
    "SAMPLE_PRESETS",
    "draw_batch",
    "precision",
    "draw_samples",
    "SAMPLES_FORMAT",
    "to_uint8",
    "SampleFiles",
]


@dataclass(frozen=True)
class SampleConfig:
    """Everything that decides a set of samples; the defaults are those of ``paper-fid`` (chapter "Sets of samples").

    `labels` is ``"random"`` (uniform, by `seed`) or ``"balanced"`` (each class as often as any other), among
    `classes` (numbers; None: all). `guidance_channels` guides the first so many channels (None, or more than
    there are: all). `precision` is ``"float32"``, ``"tf32"`` (a GPU rounds the factors of matrix products;
    on a CPU the same as float32) or ``"bf16"`` (autocast). `batch_size` matters: each batch has a random
    stream of its own. Raises ValueError for values that cannot work.
    """

    count: int = 50_000
    labels: str = "random"
    classes: tuple[int, ...] | None = None
    steps: int = 250
    method: str = "ddpm"
    cfg_scale: float = 1.5
    guidance_channels: int | None = 3
    clip_denoised: bool = False
    precision: str = "tf32"
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("count", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must not be negative")
        choices = {
            "labels": ("random", "balanced"),
            "method": ("ddpm", "ddim"),
            "precision": ("float32", "tf32", "bf16"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: choose one of {', '.join(known)}"
                )
        if self.classes is not None and not (
            self.classes
            and min(self.classes) >= 0
            and len(set(self.classes)) == len(self.classes)
        ):
            raise ValueError(
                f"classes={self.classes}: expected class numbers, each once, or None for all"
            )

    def label(self, indices: range, num_classes: int) -> Tensor:
        """The labels of these samples, int64 (n,): a pure function of the configuration."""
        among = (
            torch.arange(num_classes)
            if self.classes is None
            else torch.tensor(self.classes)
        )
        numbers = np.arange(indices.start, indices.stop)
        if self.labels == "random":
            numbers = random_bits(self.seed, "labels", numbers)
        chosen = numbers % numbers.dtype.type(len(among))
        return among[torch.from_numpy(chosen.astype(np.int64))]

    def of(self, model: DiffuSSMConfig) -> "SampleConfig":
        """What of this applies to a model; ValueError for classes that it does not have."""
        if self.classes is not None and max(self.classes) >= model.num_classes:
            has = (
                f"classes 0 to {model.num_classes - 1}"
                if model.num_classes
                else "no classes"
            )
            raise ValueError(f"classes={self.classes}: this model has {has}")
        channels = self.guidance_channels
        if channels is not None and channels >= model.in_channels:
            channels = None
        if model.num_classes == 0 or self.cfg_scale == 1:
            channels = None  # nothing is guided
        return replace(
            self,
            guidance_channels=channels,
            cfg_scale=self.cfg_scale if model.num_classes else 1.0,
        )


SAMPLE_PRESETS = {
    "paper-fid": SampleConfig(),
    "paper-fid-all": SampleConfig(labels="balanced", guidance_channels=None),
    "paper-fid-unguided": SampleConfig(cfg_scale=1.0),
    "pretty": SampleConfig(
        count=64,
        labels="balanced",
        cfg_scale=4.0,
        guidance_channels=None,
        precision="float32",
        batch_size=16,
    ),
}


def draw_batch(
    model: DiffuSSM,
    diffusion: GaussianDiffusion,
    config: SampleConfig,
    number: int,
    *,
    world: World,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> np.ndarray | None:
    """Batch `number` of a set, uint8 (n, H, W, 3); None if `world` was asked to stop before it was done.

    A pure function of the weights, `config` and `number`. See `draw_samples` for the arguments.
    """
    first = number * config.batch_size
    shape = (
        config.batch_size,
        model.config.in_channels,
        model.config.height,
        model.config.width,
    )
    draws = generator(config.seed, "samples", number)
    y = None
    if model.null_label is not None:
        y = config.label(
            range(first, first + config.batch_size), model.config.num_classes
        ).to(world.device)
    chain = denoise(
        model,
        diffusion,
        y,
        steps=config.steps,
        method=config.method,
        cfg_scale=config.cfg_scale,
        guidance_channels=config.guidance_channels,
        clip_denoised=config.clip_denoised,
        generator=draws,
        noise=torch.randn(shape, generator=draws).to(world.device),
    )
    with precision(config.precision, world.device):
        for _, latest, _ in chain:
            x = latest  # (B, C, H, W)
            if world.stopping:
                return None
    x = x.float()[: config.count - first]
    return to_uint8(x if decode is None else decode(x))


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """A context in which a network computes as `SampleConfig.precision` says."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if name == "float32" else "high")
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


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
        out: a folder (``000000.png`` ..., ``samples.json`` and, for a model with classes, ``labels.json``:
            ``{"000000.png": 3, ...}``), or a name that ends in ``.npz`` (``arr_0`` uint8 (n, H, W, 3),
            ``arr_1`` labels; the facts lie beside it as ``.json``).
        facts: what else decided the set (which weights, of which step; what decodes): stored, and compared
            on resume, all but the name of the autoencoder ``facts["vae"]["name"]``.
        decode: latents (B, C, h, w) -> images (B, 3, H, W) in [-1, 1]; None for a model of pixels.

    Raises:
        ValueError: `out` holds another set of samples, or something else; nothing is written.
        Preempted: the world was told to stop; the batches that are done are kept.
    """
    config = config.of(model.config)
    how = (
        asdict(config)
        if model.config.num_classes
        else asdict(config) | {"labels": "none"}
    )
    files = SampleFiles(
        Path(out),
        json.loads(
            json.dumps({"format": SAMPLES_FORMAT, "random": RANDOM} | how | facts)
        ),
    )
    if world.once(files.claim):
        return files.out
    batches = math.ceil(config.count / config.batch_size)
    missing = world.once(lambda: files.missing(batches))
    drawn = 0
    with tqdm(
        total=batches,
        unit="batch",
        disable=not progress or world.rank > 0,
        dynamic_ncols=True,
    ) as bar:
        for number in world.deal(missing):
            bar.update(number - bar.n)
            images = draw_batch(
                model, diffusion, config, number, world=world, decode=decode
            )
            if images is not None:
                files.keep(number, number * config.batch_size, images)
                drawn += 1
        world.barrier()
        done = batches - len(missing) + int(world.sum(torch.tensor([drawn])))
        bar.update(done - bar.n)
    if done < batches:
        raise world.together(
            Preempted(f"asked to stop: {done} of {batches} batches are drawn and kept")
        )
    labels = (
        config.label(range(config.count), model.config.num_classes)
        if model.config.num_classes
        else None
    )
    world.once(lambda: files.complete(batches, config.count, labels))
    return files.out


SAMPLES_FORMAT = "diffussm-samples-2"  # 1 drew from the streams of training


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
        raise ValueError(
            "the model drew images that are not finite; its weights have probably diverged"
        )
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().expand(-1, 3, -1, -1)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


class SampleFiles(NamedTuple):
    """The files of a set of samples: `out`, a folder or a ``.npz`` file, and `how` it is drawn (JSON)."""

    out: Path
    how: dict[str, Any]

    @property
    def packed(self) -> bool:
        """One ``.npz`` file?"""
        return self.out.suffix == ".npz"

    @property
    def record(self) -> Path:
        """Where `how` is written."""
        return (
            self.out.with_suffix(".json") if self.packed else self.out / "samples.json"
        )

    @property
    def parts(self) -> Path:
        """The folder of the batches that are done."""
        return self.out.with_suffix(".parts") if self.packed else self.out / ".parts"

    def part(self, number: int) -> Path:
        """The file of a batch that is done: its images, or nothing if they are PNG files already."""
        return self.parts / f"{number:06d}.npy"

    def claim(self) -> bool:
        """Begin the set, or go on with it; True if it is complete. ValueError if something else is there."""
        if self.record.exists():
            return self._go_on()
        drafts = {
            self.parts,
            self.record.with_name(f".{self.record.name}.tmp"),
        }  # of a start that was killed
        if self.out.is_file() or (
            self.out.exists() and set(self.out.iterdir()) - drafts
        ):
            raise ValueError(
                f"{self.out} exists and is no set of samples; choose another name"
            )
        if self.parts.exists() and any(self.parts.iterdir()):
            raise ValueError(
                f"{self.parts} is left of a set of samples without a record; remove it"
            )
        self.parts.mkdir(parents=True, exist_ok=True)
        self._write_json(self.record, {**self.how, "complete": False})
        return False

    def _go_on(self) -> bool:
        try:
            theirs = json.loads(self.record.read_text())
        except ValueError as error:
            raise ValueError(
                f"{self.record} is damaged ({error}); choose another name"
            ) from error
        complete = bool(theirs.get("complete"))
        if not complete and theirs.get("random", 1) != RANDOM:
            raise ValueError(
                f"{self.out} was begun by a version that drew its random numbers in another way, so that "
                "the rest would not belong to the same set; choose another name, or finish it with that version"
            )
        there, asked = _deciding(theirs), _deciding(self.how)
        different = [
            f"{key} (there {there.get(key)!r}, asked {asked.get(key)!r})"
            for key in sorted({*there, *asked})
            if there.get(key) != asked.get(key)
        ]
        if different:
            raise ValueError(
                f"{self.out} holds other samples, which differ in {'; '.join(different)}; choose another name"
            )
        if complete:  # and then killed, perhaps, before all was tidy
            shutil.rmtree(self.parts, ignore_errors=True)
        else:
            self.parts.mkdir(exist_ok=True)
        return complete

    def missing(self, batches: int) -> list[int]:
        """The batches that are not done."""
        done = {path.name for path in self.parts.iterdir()}
        return [
            number for number in range(batches) if self.part(number).name not in done
        ]

    def keep(self, number: int, first: int, images: np.ndarray) -> None:
        """Write a batch, images uint8 (n, H, W, 3), the first of which is image `first` of the set."""
        if not self.packed:
            _write_pngs(self.out, first, images)
        draft = self.parts / f".{number:06d}.tmp"
        with draft.open("wb") as file:
            np.save(file, images if self.packed else np.zeros(0, np.uint8))
        draft.replace(self.part(number))

    def complete(self, batches: int, count: int, labels: Tensor | None) -> None:
        """All batches are done: put them together, with the labels int64 (count,), and tidy up."""
        if self.packed:
            parts = [self.part(number) for number in range(batches)]
            _write_npz(
                self.out,
                parts,
                count,
                torch.zeros(count).long() if labels is None else labels,
            )
        elif labels is not None:
            names = {
                f"{index:06d}.png": label for index, label in enumerate(labels.tolist())
            }
            self._write_json(self.out / "labels.json", names)
        if not self.packed:
            for stale in self.out.glob(".*.tmp"):  # of a process that was killed
                stale.unlink()
        self._write_json(self.record, {**self.how, "complete": True})
        shutil.rmtree(self.parts)

    @staticmethod
    def _write_json(path: Path, value: dict[str, Any]) -> None:
        draft = path.with_name(f".{path.name}.tmp")
        draft.write_text(json.dumps(value, indent=2) + "\n")
        draft.replace(path)


def _deciding(how: dict[str, Any]) -> dict[str, Any]:
    """What must be the same to go on with a set: an autoencoder may have moved."""
    kept = {
        key: value for key, value in how.items() if key not in ("complete", "random")
    }
    if isinstance(vae := kept.get("vae"), dict):
        kept["vae"] = {key: value for key, value in vae.items() if key != "name"}
    return kept


def _write_pngs(folder: Path, first: int, images: np.ndarray) -> None:
    from PIL import Image

    for index, image in enumerate(images, first):
        draft = folder / f".{index:06d}.tmp"
        Image.fromarray(image).save(draft, format="PNG")
        draft.replace(folder / f"{index:06d}.png")


def _write_npz(out: Path, parts: list[Path], count: int, labels: Tensor) -> None:
    draft = out.with_name(f".{out.name}.tmp")
    with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open(
            "arr_0.npy", "w", force_zip64=True
        ) as file:  # never whole in memory
            shape = (count, *np.load(parts[0], allow_pickle=False).shape[1:])
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(np.load(part, allow_pickle=False).tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, labels.numpy())
    draft.replace(out)
