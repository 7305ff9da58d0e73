"""Sets of samples.

Generated from book/55_samples.md by `make export`: edit there.
"""

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffussm.data import RANDOM, generator, random_bits
from diffussm.diffusion import GaussianDiffusion, standard_normal
from diffussm.distributed import (
    Preempted,
    all_reduce,
    barrier,
    deal,
    on_rank_zero,
    rank,
    stopping,
    together,
)
from diffussm.files import read_json, whole_file, write_json
from diffussm.guards import expect_int, expect_same, expect_there, refuse
from diffussm.model import DiffuSSM
from diffussm.pictures import Decode, computing_in, image_shape, to_uint8
from diffussm.run_folder import locked
from diffussm.sample_options import SampleSet
from diffussm.sampling import walk

__all__ = ["labels_of", "draw_batch", "draw_samples"]


def labels_of(wanted: SampleSet, indices: range, num_classes: int) -> Tensor | None:
    """The labels of these samples, int64 (n,); None for a model without classes."""
    if not num_classes:
        return None
    among = torch.tensor(wanted.classes or range(num_classes))
    numbers = np.arange(indices.start, indices.stop, dtype=np.uint64)
    if wanted.labels == "random":
        numbers = random_bits(wanted.seed, "labels", numbers)
    chosen = (numbers % np.uint64(len(among))).astype(np.int64)
    return among[torch.from_numpy(chosen)]


def draw_batch(
    model: DiffuSSM,
    diffusion: GaussianDiffusion,
    wanted: SampleSet,
    indices: range,
    *,
    device: torch.device,
    decode: Decode | None = None,
) -> np.ndarray | None:
    """These images, at most a batch, uint8 (n, H, W, 3); None if asked to stop."""
    y, noise, draws = _begin(model, wanted, indices.start, device)
    chain = walk(wanted.sampler, model, diffusion, y, generator=draws, noise=noise)
    with computing_in(wanted.precision, device):
        for _, latest, _ in chain:
            x = latest  # (B, C, H, W)
            if stopping():
                return None
    x = x.float()[: len(indices)]
    return to_uint8(x if decode is None else decode(x))


def _begin(
    model: DiffuSSM, wanted: SampleSet, first: int, device: torch.device
) -> tuple[Tensor | None, Tensor, list[torch.Generator]]:
    """Labels and noise of a batch, and the streams from which the rest is drawn."""
    numbers = range(first, first + wanted.batch_size)
    y = labels_of(wanted, numbers, model.config.num_classes)
    draws = [generator(wanted.seed, "samples", number) for number in numbers]
    shape = len(numbers), *image_shape(model)
    noise = standard_normal(shape, draws, device, torch.float32)
    return None if y is None else y.to(device), noise, draws


_SAMPLES_FORMAT = "diffussm-samples-3"  # 2 had a stream for each batch


def draw_samples(
    model: DiffuSSM,
    diffusion: GaussianDiffusion,
    wanted: SampleSet,
    out: str | Path,
    *,
    device: torch.device,
    facts: dict[str, Any],
    decode: Decode | None = None,
    progress: bool = True,
) -> Path:
    """Draw a set into a folder of PNG files or one `.npz`; resumes an interrupted one.

    Args:
        model: called as it is, on `device`.
        diffusion: the schedule that it was trained with.
        wanted: which images.
        out: a folder (`000000.png` ..., `samples.json` and, with classes,
            `labels.json`), or a name that ends in `.npz` (`arr_0` uint8 (n, H, W, 3),
            `arr_1` labels; the record lies beside it as `.json`).
        facts: what else decided the set (which weights, what decodes): recorded, and
            compared on resume, but for the name of an autoencoder.
        decode: latents (B, C, h, w) -> images (B, 3, H, W); None for a model of pixels.
        progress: show a bar.

    Raises:
        ValueError: `out` holds something else, or another process draws it;
            nothing is written.
        FileNotFoundError: a batch that was drawn has vanished; the others are kept.
        Preempted: asked to stop; the batches that are done are kept.
    """
    wanted = wanted.of(model.config).on(device.type)
    expect_int("batch_size", wanted.batch_size, least=1)
    classes = model.config.num_classes
    how = {"format": _SAMPLES_FORMAT, "random": RANDOM, **wanted.record(classes)}
    files = _SampleFiles(Path(out), how | facts)
    if on_rank_zero(files.claim):
        return files.out
    draw = partial(draw_batch, model, diffusion, wanted, device=device, decode=decode)
    labels = labels_of(wanted, range(wanted.count), classes)
    with locked(files.parts):
        batches = _draw_missing(draw, files, wanted, progress)
        on_rank_zero(lambda: files.complete(batches, labels))
    on_rank_zero(files.claim)  # a complete set: tidies up
    return files.out


def _draw_missing(
    draw: Callable[[range], np.ndarray | None],
    files: "_SampleFiles",
    wanted: SampleSet,
    progress: bool,
) -> list[range]:
    """Share the batches that are missing; returns all. Preempted if stopped."""
    there, missing = on_rank_zero(lambda: files.missing(wanted))
    kept, batches, drawn = len(there), len(there) + len(missing), 0
    how: dict[str, Any] = {"unit": "batch", "dynamic_ncols": True}
    how["disable"] = rank() > 0 or not progress
    with tqdm(total=batches, **how) as bar:
        for number in deal(range(len(missing))):
            bar.update(kept + number - bar.n)
            images = draw(missing[number])
            if images is not None:
                files.keep(missing[number], images)
                drawn += 1
        barrier()
        done = kept + int(all_reduce(torch.tensor([drawn])))
        bar.update(done - bar.n)
    if done < batches:
        raise together(
            Preempted(f"asked to stop: {done} of {batches} batches are kept")
        )
    return sorted(there + missing, key=lambda one: one.start)


@dataclass(frozen=True)
class _SampleFiles:
    """The files of a set: `out`, a folder or a `.npz` file, and `how` it is drawn."""

    out: Path
    how: dict[str, Any]

    @property
    def packed(self) -> bool:
        """One `.npz` file?"""
        return self.out.suffix == ".npz"

    @property
    def record(self) -> Path:
        """Where `how` is written."""
        beside = self.out.with_suffix(".json")
        return beside if self.packed else self.out / "samples.json"

    @property
    def parts(self) -> Path:
        """The folder of the batches that are done."""
        return self.out.with_suffix(".parts") if self.packed else self.out / ".parts"

    def claim(self) -> bool:
        """Begin the set, or go on with it; True if it is complete."""
        if not self.record.exists():
            self._check_free()
            self.record.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.record, {**self.how, "complete": False})
        complete = self._is_complete()
        if complete:  # and then killed, perhaps, before all was tidy
            shutil.rmtree(self.parts, ignore_errors=True)
        else:
            self.parts.mkdir(exist_ok=True)
        return complete

    def _is_complete(self) -> bool:
        """Whether all is drawn; ValueError if the set that is there is another."""
        theirs = read_json(self.record, "the record of the set")
        complete = bool(theirs.get("complete"))
        ours = json.loads(json.dumps(self.how))
        older = {
            "random": 1,
            "weights_sha256": ours.get("weights_sha256"),
        }  # unrecorded
        a, b = (_deciding(one, complete) for one in (ours, older | theirs))
        what = f"{self.out} holds other samples, which differ in"
        expect_same(what, a, b, "Choose another name.")
        return complete

    def part(self, indices: range) -> Path:
        """The file of a batch that is done: its images, or nothing beside PNG files."""
        return self.parts / f"{indices.start:06d}-{indices.stop:06d}.npy"

    def done(self) -> list[range]:
        """The batches that are done, in order."""
        names = (path.stem.split("-") for path in self.parts.glob("*-*.npy"))
        return sorted(
            (range(int(a), int(b)) for a, b in names), key=lambda one: one.start
        )

    def missing(self, wanted: SampleSet) -> tuple[list[range], list[range]]:
        """The batches that are done, and those that are not."""
        done, size = self.done(), wanted.batch_size
        begins = [0, *(one.stop for one in done)]
        gaps = zip(begins, [*(one.start for one in done), wanted.count], strict=True)
        firsts = [(i, stop) for begin, stop in gaps for i in range(begin, stop, size)]
        missing = [range(i, min(i + size, stop)) for i, stop in firsts]
        told = f"{self.parts} holds images twice; remove it, and all are drawn again"
        refuse(sum(map(len, done + missing)) != wanted.count, told)
        return done, missing

    def keep(self, indices: range, images: np.ndarray) -> None:
        """Write a batch, uint8 (n, H, W, 3)."""
        if not self.packed:
            for index, image in zip(indices, images, strict=True):
                with whole_file(self.out / f"{index:06d}.png") as draft:
                    Image.fromarray(image).save(draft, format="PNG")
        with whole_file(self.part(indices)) as draft, draft.open("wb") as file:
            np.save(file, images if self.packed else np.zeros(0, np.uint8))

    def complete(self, batches: list[range], labels: Tensor | None) -> None:
        """All batches are done: put them together, with the labels."""
        count = batches[-1].stop
        parts = [
            expect_there(self.part(one), "a batch that was drawn") for one in batches
        ]
        if self.packed:
            _write_npz(self.out, parts, count, labels)
        else:
            names = [f"{index:06d}.png" for index in range(count)]
            for name in names:
                expect_there(self.out / name, "an image that was drawn")
            if labels is not None:
                of_each = dict(zip(names, labels.tolist(), strict=True))
                write_json(self.out / "labels.json", of_each)
            for stale in self.out.glob(".*.tmp"):  # of a process that was killed
                stale.unlink()
        write_json(self.record, {**self.how, "complete": True})

    def _check_free(self) -> None:
        """ValueError unless nothing is there but what a start left that was killed."""
        there = list(self.out.iterdir()) if self.out.is_dir() else []
        strange = [p for p in there if p != self.parts and not p.match(".*.tmp")]
        if strange or self.out.is_file():
            raise ValueError(f"{self.out} is no set of samples; choose another name")
        if self.parts.exists() and any(self.parts.iterdir()):
            raise ValueError(f"{self.parts} is of a set without a record; remove it")


def _deciding(how: dict[str, Any], complete: bool) -> dict[str, Any]:
    """What must be the same to go on with a set: an autoencoder may have moved."""
    free = {"complete", "batch_size"} | ({"random"} if complete else set())
    there = {key: value for key, value in how.items() if value is not None}
    kept = {key: value for key, value in there.items() if key not in free}
    if isinstance(vae := kept.get("vae"), dict):
        kept["vae"] = {key: value for key, value in vae.items() if key != "name"}
    return kept


def _write_npz(out: Path, parts: list[Path], count: int, labels: Tensor | None) -> None:
    """`arr_0` from the parts, never whole in memory; `arr_1`, the labels or zeros."""
    shape = (count, *np.load(parts[0], allow_pickle=False).shape[1:])
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    classes = torch.zeros(count).long() if labels is None else labels
    written = 0
    with whole_file(out) as draft, zipfile.ZipFile(draft, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                images = np.load(part, allow_pickle=False)
                file.write(images.tobytes())
                written += len(images)
        refuse(written != count, f"{parts[0].parent} holds {written} of {count} images")
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, classes.numpy())
