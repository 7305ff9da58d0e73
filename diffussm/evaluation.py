"""Evaluation.

Generated from book/57_evaluation.md by `make export`: edit there.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffussm.autoencoder import full_precision
from diffussm.data import random_bits
from diffussm.folders import ImageFolder, Skipped
from diffussm.formats import LmdbImages, images_from
from diffussm.images import BadImage, center_crop
from diffussm.metrics import (
    NEAREST,
    PART,
    RunningMoments,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from diffussm.training import _sha256

__all__ = [
    "WEIGHTS",
    "Extractor",
    "check_weights",
    "Inception",
    "Source",
    "RECORDS",
    "ImageSet",
    "read_images",
    "SEED",
    "Statistics",
    "statistics",
    "NEIGHBOURS",
    "save_statistics",
    "load_reference",
    "SCORES",
    "scores",
    "evaluate",
]

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


class Extractor(Protocol):
    """uint8 images (B, 3, H, W) -> {"pool": (B, d), and perhaps "spatial": (B, s), "logits": (B, classes)}.

    `name` and `checksum` go into every result: scores of different extractors have nothing in common.
    """

    name: str
    checksum: str

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """See above."""
        ...


def check_weights(path: str | Path, starts_with: str = "6726825d") -> str:
    """The sha256 of the file of Inception's weights.

    Raises FileNotFoundError when it is not there, ValueError when it is another file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Scores need Inception's weights: get {WEIGHTS} from the releases of "
            "torch-fidelity (v0.2.0) on a machine with network, and name the file with --weights"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(starts_with):
        raise ValueError(
            f"{path} is not {WEIGHTS}: its sha256 starts with {digest[:8]}, not with {starts_with}"
        )
    return digest


class Inception:
    """The network that FID is defined by, in torch-fidelity's port; an `Extractor`.

    `starts_with` is what the file's sha256 must start with; tests pass "" for weights of their own.
    """

    name = "inception-v3-compat"

    def __init__(
        self,
        weights: str | Path,
        device: str | torch.device = "cpu",
        starts_with: str = "6726825d",
    ) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import (
                FeatureExtractorInceptionV3,
            )
        except ImportError as error:
            raise ImportError(
                "Inception comes with torch-fidelity: pip install torch-fidelity"
            ) from error
        self.checksum = check_weights(weights, starts_with)
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except Exception as error:  # of many kinds
            raise ValueError(
                f"{weights} does not hold the weights of a network: {error}"
            ) from error
        safe = (
            io.BytesIO()
        )  # torch-fidelity loads pickles; it gets one that we have just written
        torch.save(state, safe)
        safe.seek(0)
        self.net: Any = FeatureExtractorInceptionV3(
            self.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=safe
        ).to(device)
        self.device = torch.device(device)
        self._map: Tensor | None = None
        self.net.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: object, inputs: object, output: Tensor) -> None:
        self._map = output  # (B, 192, 17, 17), after its ReLU

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """See `Extractor`: pool (B, 2048), spatial (B, 2023), logits (B, 1008) without bias, as ADM."""
        with full_precision():
            pool, logits = self.net(images.to(self.device))
        assert self._map is not None
        spatial = self._map[:, :7].permute(0, 2, 3, 1).flatten(1)
        return {"pool": pool.cpu(), "spatial": spatial.cpu(), "logits": logits.cpu()}


Source = str | Path | Iterable[Tensor]
RECORDS = {
    "samples.json",
    "labels.json",
}  # what `diffussm sample` writes beside its images


class ImageSet:
    """Images to be scored, however they are stored: a folder, a tree, an LMDB, an .npz, or batches.

    Args:
        source: where they are; batches are uint8 (B, 3, H, W).
        size: crop to size x size as ADM does (`diffussm.images.center_crop`); None: as they are.
        exif_rotate: turn pictures as EXIF asks, which ADM does not.

    `left_out` lists what is not in the set, and why; it is complete when the batches have been read.
    Raises FileNotFoundError, ValueError, OSError for what is no set of images.
    """

    def __init__(
        self, source: Source, size: int | None = None, exif_rotate: bool = False
    ) -> None:
        self.source, self.size, self.exif_rotate = source, size, exif_rotate
        self.files: ImageFolder | LmdbImages | None = None
        self.by_name: list[Skipped] = []
        if isinstance(source, str | Path):
            path = Path(source)
            if path.is_dir() or path.suffix == ".mdb":
                self.files = images_from(
                    path, size, conditional=False, exif_rotate=exif_rotate
                )
                self.by_name = [
                    one
                    for one in self.files.skipped
                    if Path(one.path).name not in RECORDS
                ]
            elif path.suffix != ".npz" or not path.is_file():
                raise FileNotFoundError(
                    f"{source} is neither a folder or LMDB of images nor an .npz file"
                )
        self.left_out = list(self.by_name)

    def batches(self, batch_size: int = 64) -> Iterator[Tensor]:
        """uint8 (B, 3, H, W) in the order of their names; ValueError unless all are images of one size."""
        self.left_out = list(self.by_name)
        shape = None
        for batch in self._stored(batch_size):
            if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] != 3:
                raise ValueError(
                    f"images are {batch.dtype} {tuple(batch.shape)}: expected uint8 (B, 3, H, W)"
                )
            if self.size is not None and self.files is None:
                batch = _cropped(batch, self.size)
            shape = shape or batch.shape[2:]
            self._check_size(shape, batch.shape[2:])
            yield batch

    def _stored(self, batch_size: int) -> Iterator[Tensor]:
        if self.files is not None:
            return self._from_files(batch_size)
        if isinstance(self.source, str | Path):
            return _from_npz(Path(self.source), batch_size)
        return iter(self.source)

    def _from_files(self, batch_size: int) -> Iterator[Tensor]:
        batch: list[Tensor] = []
        for pixels in self._good_files():
            self._check_size(
                batch[0].shape[1:] if batch else pixels.shape[1:], pixels.shape[1:]
            )
            batch.append(pixels)
            if len(batch) == batch_size:
                yield torch.stack(batch)
                batch = []
        if batch:
            yield torch.stack(batch)

    def _good_files(self) -> Iterator[Tensor]:
        assert self.files is not None
        for i in range(len(self.files)):
            try:
                pixels = self.files.read(i)  # (3, H, W) in [-1, 1]
            except BadImage as error:
                self.left_out.append(Skipped(self.files.name(i), str(error)))
            else:
                yield ((pixels + 1) * 127.5).round().to(torch.uint8)

    def _check_size(self, first: torch.Size, other: torch.Size) -> None:
        if first != other:
            where = f" in {self.source}" if isinstance(self.source, str | Path) else ""
            raise ValueError(
                f"images of {tuple(first)} and {tuple(other)} pixels{where}: expected one size; "
                "give a size (--size) to crop them as ADM does"
            )


def read_images(
    source: Source,
    batch_size: int = 64,
    size: int | None = None,
    exif_rotate: bool = False,
) -> Iterator[Tensor]:
    """uint8 (B, 3, H, W): the batches of an `ImageSet`, see there."""
    return ImageSet(source, size, exif_rotate).batches(batch_size)


def _cropped(batch: Tensor, size: int) -> Tensor:
    images = [
        center_crop(Image.fromarray(x.permute(1, 2, 0).numpy()), size) for x in batch
    ]
    return torch.stack(
        [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    )


def _from_npz(path: Path, batch_size: int) -> Iterator[Tensor]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            version = np.lib.format.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"its array has format {version}")
            form = np.lib.format
            read = (
                form.read_array_header_1_0
                if version == (1, 0)
                else form.read_array_header_2_0
            )
            shape, fortran, dtype = read(file)
            if dtype != np.uint8:
                raise ValueError(
                    f"arr_0 holds {dtype}, expected uint8: round to 0 ... 255 and convert"
                )
            if len(shape) != 4 or shape[3] != 3 or 0 in shape:
                raise ValueError(f"arr_0 has shape {shape}, expected (n, H, W, 3)")
            if fortran:
                raise ValueError(
                    "arr_0 is in Fortran order, so its images do not lie one after the other: "
                    "store np.ascontiguousarray(images)"
                )
            size = int(np.prod(shape[1:]))
            for start in range(0, shape[0], batch_size):
                count = min(batch_size, shape[0] - start)
                data = file.read(count * size)
                if len(data) != count * size:
                    raise ValueError("the file ends early")
                images = np.frombuffer(bytearray(data), np.uint8).reshape(
                    count, *shape[1:]
                )
                yield torch.from_numpy(images).permute(0, 3, 1, 2)
    except (
        ValueError,
        KeyError,
        OSError,
        zipfile.BadZipFile,
        NotImplementedError,
    ) as error:
        raise ValueError(
            f"{path} is no set of images in ADM's form: {error}"
        ) from error


SEED = 0  # of the keys


def _keys(digests: list[bytes]) -> np.ndarray:
    numbers = np.frombuffer(b"".join(digest[:8] for digest in digests), "<u8")
    return random_bits(SEED, "keys", numbers)


class _Kept:
    """The features of the `most` images with the smallest keys (None: of all), in the order of the keys."""

    def __init__(self, most: int | None) -> None:
        self.most, self.count = most, 0
        self.parts: list[tuple[np.ndarray, dict[str, Tensor]]] = []

    def add(self, keys: np.ndarray, features: dict[str, Tensor]) -> None:
        self.parts.append((keys, features))
        self.count += len(keys)
        if self.most is not None and self.count > 2 * self.most:
            self.parts = [self.read()]
            self.count = self.most

    def read(self) -> tuple[np.ndarray, dict[str, Tensor]]:
        keys = np.concatenate([keys for keys, _ in self.parts])
        order = np.argsort(keys, kind="stable")[: self.most]
        chosen = torch.from_numpy(order)
        names = self.parts[0][1]
        features = {
            name: torch.cat([part[name] for _, part in self.parts])[chosen]
            for name in names
        }
        return keys[order], features


@dataclass(frozen=True)
class Statistics:
    """What scores need to know of a set: moments of pooled and of spatial features, and the pooled ones.

    mu (d,), sigma (d, d), mu_s (s,), sigma_s (s, s) float64; pool (n, d) and logits (n, classes) float32, of
    all images or of some, in the order of their keys. What an extractor or a file does not have is None.
    `record` says what was read: see `ImageSet`, `statistics`.
    """

    count: int
    mu: np.ndarray
    sigma: np.ndarray
    mu_s: np.ndarray | None = None
    sigma_s: np.ndarray | None = None
    pool: Tensor | None = None
    logits: Tensor | None = None
    record: dict[str, Any] = field(default_factory=dict)


def statistics(
    source: Source | ImageSet,
    extractor: Extractor,
    batch_size: int = 64,
    keep: int | None = None,
) -> Statistics:
    """Run every image through the extractor; keep the features of `keep` images only, chosen by their keys.

    The record holds `images_sha256` (of the pixels, whatever their order), `image_size`, the crop, whether
    EXIF was obeyed, and what was left out. Raises ValueError for fewer than two images, or features not
    finite.
    """
    images = source if isinstance(source, ImageSet) else ImageSet(source)
    moments: dict[str, RunningMoments] = {}
    kept = _Kept(keep)
    digests: list[bytes] = []
    shape: tuple[int, ...] = ()
    for batch in images.batches(batch_size):
        shape = tuple(batch.shape[2:])
        digests += [hashlib.sha256(x.numpy().tobytes()).digest() for x in batch]
        features = extractor(batch)
        for name, x in features.items():
            if not bool(torch.isfinite(x).all()):
                raise ValueError(
                    f"the {name} features of {extractor.name} are not finite for some images"
                )
            if name != "logits":
                moments.setdefault(name, RunningMoments()).add(x)
        single = {name: x.float() for name, x in features.items() if name != "spatial"}
        kept.add(_keys(digests[-len(batch) :]), single)
    if len(digests) < 2:
        raise ValueError(
            f"{images.source} holds fewer than two images; nothing can be said of it"
        )
    mu, sigma = moments["pool"].read()
    mu_s, sigma_s = moments["spatial"].read() if "spatial" in moments else (None, None)
    _, features = kept.read()
    record = _record(images, digests, shape)
    return Statistics(
        len(digests),
        mu,
        sigma,
        mu_s,
        sigma_s,
        features["pool"],
        features.get("logits"),
        record,
    )


def _record(
    images: ImageSet, digests: list[bytes], shape: tuple[int, ...]
) -> dict[str, Any]:
    of_all = hashlib.sha256(repr(shape).encode() + b"".join(sorted(digests)))
    first = [f"{one.path}: {one.reason}" for one in images.left_out[:10]]
    return {
        "images_sha256": of_all.hexdigest(),
        "image_size": list(shape),
        "crop": images.size,
        "exif_rotate": images.exif_rotate if images.files is not None else None,
        "left_out": {"count": len(images.left_out), "first": first},
    }


NEIGHBOURS = 10_000  # images of the reference that precision and recall look at, as many as ADM's file has


def save_statistics(
    source: Source,
    out: str | Path,
    *,
    extractor: Extractor | None = None,
    weights: str | Path | None = None,
    batch_size: int = 64,
    device: str = "cpu",
    size: int | None = None,
    exif_rotate: bool = False,
) -> Path:
    """Write the statistics of a reference as an .npz that `evaluate` reads, without pickles.

    `size` and `exif_rotate` as for `ImageSet`; they are recorded, with all else that was read or left out.
    """
    images = ImageSet(source, size, exif_rotate)
    extractor = extractor or _inception(weights, device)
    found = statistics(images, extractor, batch_size, keep=NEIGHBOURS)
    arrays: dict[str, Any] = {
        "mu": found.mu,
        "sigma": found.sigma,
        "count": np.array(found.count),
    }
    if found.mu_s is not None and found.sigma_s is not None:
        arrays |= {"mu_s": found.mu_s, "sigma_s": found.sigma_s}
    if found.pool is not None:
        arrays["pool"] = found.pool.numpy()
    arrays["extractor"] = np.array(f"{extractor.name} {extractor.checksum}")
    arrays["record"] = np.array(json.dumps(found.record))
    out = Path(out)
    draft = out.with_name(f".{out.name}.tmp")
    with draft.open("wb") as file:
        np.savez(file, **arrays)
    draft.replace(out)
    return out


def _inception(weights: str | Path | None, device: str) -> Extractor:
    if weights is None:
        raise ValueError(
            f"scores need Inception's weights: name the file {WEIGHTS} with --weights (it is in the releases "
            "of torch-fidelity, v0.2.0); nothing is downloaded silently"
        )
    return Inception(weights, device)


def load_reference(
    path: str | Path,
    extractor: Extractor,
    batch_size: int = 64,
    size: int | None = None,
    exif_rotate: bool = False,
) -> tuple[Statistics, str]:
    """The statistics of a reference and its kind: "folder", "lmdb", "images", "statistics" or "adm".

    ADM's files hold moments of the whole set and some images of it, which precision and recall use; of other
    sets they use NEIGHBOURS, chosen by their keys. `size` crops images, and is refused for moments of images
    of another size. Raises ValueError for that, for statistics of another extractor, and for a file that is
    neither.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"the reference {path} does not exist")
    arrays = {} if path.is_dir() or path.suffix == ".mdb" else _arrays(path)
    if "mu" not in arrays:
        images = ImageSet(path, size, exif_rotate)
        return statistics(images, extractor, batch_size, keep=NEIGHBOURS), _kind(images)
    made_by = arrays.get("extractor")
    if made_by is not None and made_by != f"{extractor.name} {extractor.checksum}":
        raise ValueError(
            f"the reference {path} was made with {made_by}, not with {extractor.name}: make it again"
        )
    d = np.shape(arrays["mu"])
    if len(d) != 1 or np.shape(arrays.get("sigma", 0)) != d * 2:
        raise ValueError(f"the reference {path} has mu {d} and no sigma {d * 2}")
    moments = (arrays["mu"], arrays["sigma"], arrays.get("mu_s"), arrays.get("sigma_s"))
    if made_by is None and "arr_0" in arrays:
        images = ImageSet(path)
        _check_crop(path, list(next(images.batches(1)).shape[2:]), size)
        some = statistics(images, extractor, batch_size, keep=NEIGHBOURS)
        return Statistics(0, *moments, pool=some.pool, record=some.record), "adm"
    record = _loaded(path, arrays.get("record", "{}"))
    _check_crop(path, record.get("image_size"), size)
    pool = torch.from_numpy(arrays["pool"]) if "pool" in arrays else None
    if pool is not None and len(pool) > NEIGHBOURS:
        raise ValueError(
            f"the reference {path} holds features of {len(pool)} images in the order of their files; "
            f"precision and recall take {NEIGHBOURS}: make it again with `diffussm statistics`"
        )
    return Statistics(
        int(arrays.get("count", 0)), *moments, pool=pool, record=record
    ), "statistics"


def _arrays(path: Path) -> dict[str, Any]:
    """What a reference's .npz holds besides images; of arr_0 only that it is there."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = set(archive.files)
            wanted = (
                names & {"mu", "sigma", "mu_s", "sigma_s", "pool", "count"}
                if "mu" in names
                else set()
            )
            arrays: dict[str, Any] = {
                name: np.asarray(archive[name]) for name in wanted
            }
            if any(array.dtype.kind not in "fiu" for array in arrays.values()):
                raise ValueError("it holds other things than numbers")
            texts = names & {"extractor", "record"}
            return (
                arrays
                | {name: str(archive[name]) for name in texts}
                | ({"arr_0": None} if "arr_0" in names else {})
            )
    except (ValueError, KeyError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"the reference {path} cannot be read: {error}") from error


def _loaded(path: Path, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"the reference {path} has a record that is no JSON: {error}"
        ) from error
    if not isinstance(record, dict):
        raise ValueError(f"the reference {path} has a record that is no JSON object")
    return record


def _check_crop(path: Path, made_of: list[int] | None, size: int | None) -> None:
    if size is not None and made_of is not None and made_of != [size, size]:
        raise ValueError(
            f"size is {size}, but the reference {path} holds moments of images of {tuple(made_of)} pixels, "
            "which nothing can crop any more: omit size, or make the reference again"
        )


def _kind(images: ImageSet) -> str:
    if images.files is None:
        return "images"
    return "lmdb" if isinstance(images.files, LmdbImages) else "folder"


SCORES = ("fid", "sfid", "kid", "inception_score", "precision", "recall")


def scores(
    samples: Statistics, reference: Statistics, device: str | torch.device = "cpu"
) -> dict[str, float | None]:
    """FID, sFID, KID, Inception score, precision and recall; None for what the features do not allow.

    Distances between features are computed on `device`.
    """
    return _scored(samples, reference, device)[0]


def _scored(
    samples: Statistics, reference: Statistics, device: str | torch.device
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """The scores, and how each was computed."""
    result: dict[str, float | None] = dict.fromkeys(SCORES)
    how: dict[str, Any] = {
        "samples": samples.count,
        "moments": str(samples.sigma.dtype),
    }
    result["fid"] = frechet_distance(
        samples.mu, samples.sigma, reference.mu, reference.sigma
    )
    ours, theirs = (samples.mu_s, samples.sigma_s), (reference.mu_s, reference.sigma_s)
    if (
        ours[0] is not None
        and ours[1] is not None
        and theirs[0] is not None
        and theirs[1] is not None
    ):
        result["sfid"] = frechet_distance(ours[0], ours[1], theirs[0], theirs[1])
    if samples.logits is not None and len(samples.logits) >= 10:
        result["inception_score"] = inception_score(samples.logits, PART)
        sizes = [len(rows) for rows in samples.logits.split(PART)]
        how["inception_score"] = {
            "parts": len(sizes),
            "part": PART,
            "last_part": sizes[-1],
            "seed": SEED,
        }
    if samples.pool is not None and reference.pool is not None:
        real, fake = reference.pool.to(device), samples.pool.to(device)
        if min(len(real), len(fake)) > NEAREST:
            result["precision"], result["recall"] = precision_recall(
                real, fake, NEAREST
            )
            how["precision_recall"] = {
                "k": NEAREST,
                "reference": len(real),
                "samples": len(fake),
                "seed": SEED,
                "distances": f"{real.dtype} on {real.device.type}",
            }
            result["kid"] = kernel_distance(reference.pool, samples.pool)
    return result, how


def _differs_from_adm(
    extractor: Extractor, how: dict[str, Any], kind: str
) -> list[str]:
    """In what these scores were computed otherwise than by ADM's evaluator, as far as it applies to them."""
    differs = ["means in float64; ADM's in float32"]
    if isinstance(extractor, Inception):
        differs.append(
            "weights converted to PyTorch by torch-fidelity from those of ADM's graph"
        )
    else:
        differs.append(f"the features are those of {extractor.name}, not Inception's")
    if how.get("inception_score", {}).get("parts", 1) > 1:
        differs.append(
            "parts of the Inception score in the order of the images' keys; ADM's in that of the file"
        )
    if "precision_recall" in how:
        differs.append(
            "distances between features in float32; ADM's in float16 where these are finite"
        )
        if kind != "adm":
            differs.append(
                "the reference's images for precision and recall are others than those in ADM's file"
            )
    return differs


def evaluate(
    samples: Source | list[Path],
    reference: str | Path,
    *,
    extractor: Extractor | None = None,
    weights: str | Path | None = None,
    batch_size: int = 64,
    device: str = "cpu",
    how: dict[str, Any] | None = None,
    size: int | None = None,
    exif_rotate: bool = False,
) -> dict[str, Any]:
    """Score samples against a reference; the result says everything that is needed to repeat it.

    `samples` may be a list of sets drawn with different seeds: then each score comes with its mean and
    standard deviation. What `diffussm sample` wrote beside a set goes into the result; `how` adds to it.
    `size` and `exif_rotate` hold for the samples and for a reference of images, see `ImageSet`.

    Raises ValueError, OSError as `ImageSet`, `load_reference` and `check_weights` do.
    """
    several = isinstance(samples, list) and all(
        isinstance(one, str | Path) for one in samples
    )
    sources: list[Any] = list(samples) if several else [samples]  # type: ignore[arg-type]
    sets = [
        ImageSet(one, size, exif_rotate) for one in sources
    ]  # all of them are there, before any is scored
    facts = [_facts(one) | (how or {}) for one in sources]
    extractor = extractor or _inception(weights, device)
    known, kind = load_reference(reference, extractor, batch_size, size, exif_rotate)
    place = getattr(extractor, "device", "cpu")
    setting = {"batch_size": batch_size, "device": str(place)}
    rows, protocols, notes = [], [], []
    for images, fact in zip(sets, facts, strict=True):
        found = statistics(images, extractor, batch_size)
        row, protocol = _scored(found, known, place)
        rows.append(row | {"count": found.count})
        protocols.append(
            setting
            | protocol
            | {"differs_from_adm": _differs_from_adm(extractor, protocol, kind)}
        )
        fact |= found.record
        notes += _notes(found, known, protocol)
    if len({row["count"] for row in rows}) > 1:
        notes.append(
            "the sets differ in their counts: their scores have different biases, and so has the mean"
        )
    path = Path(reference)
    file = {"sha256": _sha256(path)} if path.is_file() else {}
    return _summary(rows) | {
        "samples": facts if several and len(facts) > 1 else facts[0],
        "reference": {"name": path.name, "kind": kind, "count": known.count or None}
        | file
        | known.record,
        "extractor": {"name": extractor.name, "sha256": extractor.checksum},
        "protocol": protocols[0]
        if all(one == protocols[0] for one in protocols)
        else protocols,
        "notes": list(dict.fromkeys(notes)),
        "versions": {
            name: _version(name)
            for name in ("diffussm", "torch", "torch-fidelity", "numpy")
        },
    }


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One set's scores as they are; of several, mean, standard deviation and values of each."""
    result = dict(rows[0])
    if len(rows) == 1:
        return result
    for name, value in rows[0].items():
        if value is not None and name != "count":
            values = np.array([row[name] for row in rows], dtype=np.float64)
            result[name] = {
                "mean": values.mean(),
                "std": values.std(ddof=1),
                "values": values.tolist(),
            }
    return result


def _notes(found: Statistics, known: Statistics, how: dict[str, Any]) -> list[str]:
    """What a reader of these scores must be told."""
    notes = []
    if found.count <= len(found.mu):
        notes.append(
            f"{found.count} images for {len(found.mu)} features: the covariance is singular and the "
            "distance far too high; compare it only with others of the same count"
        )
    parts = how.get("inception_score", {"parts": 1})
    if parts["parts"] > 1 and parts["last_part"] < parts["part"]:
        notes.append(
            f"the last part of the Inception score has {parts['last_part']} images, not {parts['part']}, and "
            "counts as much as the others, as in ADM's code"
        )
    for what, record in (("samples", found.record), ("reference", known.record)):
        if record.get("left_out", {}).get("count"):
            notes.append(
                f"the {what} are not all that lay there: {record['left_out']['count']} were left out"
            )
    ours, theirs = found.record["image_size"], known.record.get("image_size")
    if theirs is not None and ours != theirs:
        notes.append(
            f"the samples have {tuple(ours)} pixels, the reference {tuple(theirs)}: sets of different "
            "sizes differ in sharpness too"
        )
    return notes


def _facts(source: Source) -> dict[str, Any]:
    if not isinstance(source, str | Path):
        return {"name": "given"}
    path = Path(source)
    record = path.with_suffix(".json") if path.is_file() else path / "samples.json"
    facts: dict[str, Any] = {"name": path.name}
    if path.is_file():
        facts["sha256"] = _sha256(path)
    try:
        written = json.loads(record.read_text())
    except (OSError, ValueError):
        return facts
    if isinstance(written, dict):
        if written.get("complete") is False:
            raise ValueError(
                f"{path} is not complete; give the same `diffussm sample` command again first"
            )
        facts |= written
    return facts


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
