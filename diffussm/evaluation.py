"""Evaluation.

Generated from book/12_evaluation.md by `make export`: edit there.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = [
    "frechet_distance",
    "precision_recall",
    "inception_score",
    "WEIGHTS",
    "Extractor",
    "check_weights",
    "Inception",
    "Source",
    "read_images",
    "Statistics",
    "statistics",
    "save_statistics",
    "load_reference",
    "scores",
    "evaluate",
    "self_test",
]


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Fréchet distance of two Gaussians, eq-evaluation-frechet: means (d,), covariances (d, d).

    Raises ValueError for shapes that do not fit and values that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    d = mu1.shape
    if len(d) != 1 or mu2.shape != d or sigma1.shape != d * 2 or sigma2.shape != d * 2:
        shapes = [a.shape for a in (mu1, sigma1, mu2, sigma2)]
        raise ValueError(f"shapes {shapes}: expected (d,), (d, d), (d,), (d, d) with the same d")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("a mean or covariance is not finite; look at the images and at the features")
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    crossed = np.linalg.eigvalsh(root @ sigma2 @ root).clip(min=0)
    squared = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(crossed).sum()
    return max(float(squared), 0.0)  # round-off can leave -1e-10


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, block: int = 4096) -> tuple[float, float]:
    """Improved precision and recall: features (n, d) and (m, d), balls to the k-th nearest neighbour.

    Distances are computed in the features' own precision, `block` rows at a time. Raises ValueError when
    there are too few points or a feature is not finite.
    """
    for name, points in (("real", real), ("fake", fake)):
        if points.ndim != 2 or len(points) <= k:
            raise ValueError(f"{name} features have shape {tuple(points.shape)}: expected (n, d), n over {k}")
        if not bool(torch.isfinite(points).all()):
            raise ValueError(f"{name} features are not finite")

    def radii(points: Tensor) -> Tensor:
        near = [torch.cdist(part, points).kthvalue(k + 1, dim=1).values for part in points.split(block)]
        return torch.cat(near)  # (n,): k + 1, because each point is its own nearest

    def covered(points: Tensor, centres: Tensor, radius: Tensor) -> float:
        inside = [(torch.cdist(part, centres) <= radius).any(dim=1) for part in points.split(block)]
        return float(torch.cat(inside).double().mean())

    return covered(fake, real, radii(real)), covered(real, fake, radii(fake))


def inception_score(logits: Tensor, splits: int = 10) -> float:
    """exp of the mean KL from p(y | x) to p(y), in `splits` consecutive parts, averaged: (n, classes)."""
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} images cannot be cut into {splits} parts")
    log_p = logits.double().log_softmax(dim=1)
    scores = []
    for part in log_p.tensor_split(splits):
        log_marginal = part.logsumexp(dim=0) - np.log(len(part))
        scores.append(float(((part.exp() * (part - log_marginal)).sum(dim=1)).mean().exp()))
    return float(np.mean(scores))


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
    """The network that FID is defined by, in torch-fidelity's port; an `Extractor` (chapter 12).

    `starts_with` is what the file's sha256 must start with; tests pass "" for weights of their own.
    """

    name = "inception-v3-compat"

    def __init__(
        self, weights: str | Path, device: str | torch.device = "cpu", starts_with: str = "6726825d"
    ) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError("Inception comes with torch-fidelity: pip install torch-fidelity") from error
        self.checksum = check_weights(weights, starts_with)
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except Exception as error:  # of many kinds
            raise ValueError(f"{weights} does not hold the weights of a network: {error}") from error
        safe = io.BytesIO()  # torch-fidelity loads pickles; it gets one that we have just written
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
        pool, logits = self.net(images.to(self.device))
        assert self._map is not None
        spatial = self._map[:, :7].permute(0, 2, 3, 1).flatten(1)
        return {"pool": pool.cpu(), "spatial": spatial.cpu(), "logits": logits.cpu()}


Source = str | Path | Iterable[Tensor]


def read_images(source: Source, batch_size: int = 64) -> Iterator[Tensor]:
    """uint8 (B, 3, H, W) in order: of a folder of pictures, of ``arr_0`` of an .npz, or as given.

    Raises ValueError or OSError, which name the file, for anything that is no set of images of one size.
    """
    if not isinstance(source, str | Path):
        batches: Iterator[Tensor] = iter(source)
    elif Path(source).is_dir():
        batches = _from_folder(Path(source), batch_size)
    elif Path(source).suffix == ".npz" and Path(source).is_file():
        batches = _from_npz(Path(source), batch_size)
    else:
        raise FileNotFoundError(f"{source} is neither a folder of images nor an .npz file")
    shape = None
    for batch in batches:
        if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] != 3:
            raise ValueError(f"images are {batch.dtype} {tuple(batch.shape)}: expected uint8 (B, 3, H, W)")
        shape = shape or batch.shape[2:]
        if batch.shape[2:] != shape:
            raise ValueError(f"images of {tuple(shape)} and {tuple(batch.shape[2:])}: expected one size")
        yield batch


def _from_folder(folder: Path, batch_size: int) -> Iterator[Tensor]:
    from diffussm.data import EXTENSIONS

    paths = sorted(path for path in folder.rglob("[!.]*") if path.suffix.lower() in EXTENSIONS)
    if not paths:
        raise ValueError(f"there are no images below {folder}")

    def pixels(path: Path) -> Tensor:
        try:
            with Image.open(path) as image:
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except Exception as error:  # Pillow raises nearly everything for a broken file
            raise ValueError(f"{path} cannot be read as an image: {error}") from error

    for start in range(0, len(paths), batch_size):
        images = [pixels(path) for path in paths[start : start + batch_size]]
        if len({image.shape for image in images}) > 1:
            raise ValueError(f"the images below {folder} are not of one size; crop them alike first")
        yield torch.stack(images)


def _from_npz(path: Path, batch_size: int) -> Iterator[Tensor]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            version = np.lib.format.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"its array has format {version}")
            form = np.lib.format
            read = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
            shape, fortran, dtype = read(file)
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or 0 in shape:
                raise ValueError(f"arr_0 is {dtype} {shape}, expected uint8 (n, H, W, 3)")
            size = int(np.prod(shape[1:]))
            for start in range(0, shape[0], batch_size):
                count = min(batch_size, shape[0] - start)
                data = file.read(count * size)
                if len(data) != count * size:
                    raise ValueError("the file ends early")
                images = np.frombuffer(bytearray(data), np.uint8).reshape(count, *shape[1:])
                yield torch.from_numpy(images).permute(0, 3, 1, 2)
    except (ValueError, KeyError, OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{path} is no set of images in ADM's form: {error}") from error


@dataclass(frozen=True)
class Statistics:
    """What scores need to know of a set: moments of pooled and of spatial features, and the pooled ones.

    mu (d,), sigma (d, d), mu_s (s,), sigma_s (s, s) float64; pool (n, d) and logits (n, classes) float32.
    What an extractor or a file does not have is None.
    """

    count: int
    mu: np.ndarray
    sigma: np.ndarray
    mu_s: np.ndarray | None = None
    sigma_s: np.ndarray | None = None
    pool: Tensor | None = None
    logits: Tensor | None = None


class _Moments:
    """Mean and covariance of a stream, in float64, about the first batch's mean so that nothing cancels."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, x: Tensor) -> None:
        x = x.double()
        if not self.count:
            self.origin = x.mean(dim=0)
            self.first, self.second = torch.zeros_like(self.origin), x.new_zeros(x.shape[1], x.shape[1])
        x = x - self.origin
        self.count += len(x)
        self.first += x.sum(dim=0)
        self.second += x.T @ x

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        mean = self.first / self.count
        sigma = (self.second - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return (mean + self.origin).numpy(), sigma.numpy()


def statistics(source: Source, extractor: Extractor, batch_size: int = 64) -> Statistics:
    """Run every image through the extractor; raises ValueError for fewer than two, or features not finite."""
    moments: dict[str, _Moments] = {}
    kept: dict[str, list[Tensor]] = {"pool": [], "logits": []}
    for images in read_images(source, batch_size):
        for name, x in extractor(images).items():
            if not bool(torch.isfinite(x).all()):
                raise ValueError(f"the {name} features of {extractor.name} are not finite for some images")
            if name != "logits":
                moments.setdefault(name, _Moments()).add(x)
            if name in kept:
                kept[name].append(x.float())
    if not moments or moments["pool"].count < 2:
        raise ValueError(f"{source} holds fewer than two images; nothing can be said of it")
    mu, sigma = moments["pool"].read()
    mu_s, sigma_s = moments["spatial"].read() if "spatial" in moments else (None, None)
    logits = torch.cat(kept["logits"]) if kept["logits"] else None
    return Statistics(moments["pool"].count, mu, sigma, mu_s, sigma_s, torch.cat(kept["pool"]), logits)


def save_statistics(
    source: Source,
    out: str | Path,
    *,
    extractor: Extractor | None = None,
    weights: str | Path | None = None,
    batch_size: int = 64,
    device: str = "cpu",
) -> Path:
    """Write the statistics of a reference as an .npz that `evaluate` reads, without pickles."""
    extractor = extractor or _inception(weights, device)
    found = statistics(source, extractor, batch_size)
    arrays: dict[str, Any] = {"mu": found.mu, "sigma": found.sigma, "count": np.array(found.count)}
    if found.mu_s is not None and found.sigma_s is not None:
        arrays |= {"mu_s": found.mu_s, "sigma_s": found.sigma_s}
    if found.pool is not None:
        arrays["pool"] = found.pool.numpy()
    arrays["extractor"] = np.array(f"{extractor.name} {extractor.checksum}")
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


def load_reference(path: str | Path, extractor: Extractor, batch_size: int = 64) -> tuple[Statistics, str]:
    """The statistics of a reference and its kind: "folder", "images", "statistics" or "adm".

    ADM's files hold moments of the whole set and some images of it, which precision and recall use.
    Raises ValueError for statistics of another extractor, and for a file that is neither.
    """
    path = Path(path)
    if path.is_dir():
        return statistics(path, extractor, batch_size), "folder"
    if not path.is_file():
        raise FileNotFoundError(f"the reference {path} does not exist")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = set(archive.files)
            if "mu" not in names:
                return statistics(path, extractor, batch_size), "images"
            wanted = names & {"mu", "sigma", "mu_s", "sigma_s", "pool", "count"}
            arrays = {name: np.asarray(archive[name]) for name in wanted}
            if any(array.dtype.kind not in "fiu" for array in arrays.values()):
                raise ValueError("it holds other things than numbers")
            made_by = str(archive["extractor"]) if "extractor" in names else None
    except (ValueError, KeyError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"the reference {path} cannot be read: {error}") from error
    if made_by is not None and made_by != f"{extractor.name} {extractor.checksum}":
        raise ValueError(
            f"the reference {path} was made with {made_by}, not with {extractor.name}: make it again"
        )
    d = np.shape(arrays["mu"])
    if len(d) != 1 or arrays.get("sigma", np.empty(0)).shape != d * 2:
        raise ValueError(f"the reference {path} has mu {d} and no sigma {d * 2}")
    moments = (arrays["mu"], arrays["sigma"], arrays.get("mu_s"), arrays.get("sigma_s"))
    if made_by is None and "arr_0" in names:
        some = statistics(path, extractor, batch_size)
        return Statistics(some.count, *moments, pool=some.pool), "adm"
    pool = torch.from_numpy(arrays["pool"]) if "pool" in arrays else None
    return Statistics(int(arrays.get("count", 0)), *moments, pool=pool), "statistics"


def scores(samples: Statistics, reference: Statistics) -> dict[str, float | None]:
    """FID, sFID, Inception score, precision and recall; None for what the features do not allow."""
    result: dict[str, float | None] = dict.fromkeys(("fid", "sfid", "inception_score", "precision", "recall"))
    result["fid"] = frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma)
    ours, theirs = (samples.mu_s, samples.sigma_s), (reference.mu_s, reference.sigma_s)
    if ours[0] is not None and ours[1] is not None and theirs[0] is not None and theirs[1] is not None:
        result["sfid"] = frechet_distance(ours[0], ours[1], theirs[0], theirs[1])
    if samples.logits is not None and samples.count >= 10:
        result["inception_score"] = inception_score(samples.logits)
    if (
        samples.pool is not None
        and reference.pool is not None
        and min(samples.count, len(reference.pool)) > 3
    ):
        result["precision"], result["recall"] = precision_recall(reference.pool, samples.pool)
    return result


def evaluate(
    samples: Source | list[Path],
    reference: str | Path,
    *,
    extractor: Extractor | None = None,
    weights: str | Path | None = None,
    batch_size: int = 64,
    device: str = "cpu",
    how: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Score samples against a reference; the result says everything that is needed to repeat it.

    `samples` may be a list of sets drawn with different seeds: then each score comes with its mean and
    standard deviation. What `diffussm sample` wrote beside a set goes into the result; `how` adds to it.

    Raises ValueError, OSError as `read_images`, `load_reference` and `check_weights` do.
    """
    several = isinstance(samples, list) and all(isinstance(one, str | Path) for one in samples)
    sets: list[Any] = list(samples) if several else [samples]  # type: ignore[arg-type]
    extractor = extractor or _inception(weights, device)
    known, kind = load_reference(reference, extractor, batch_size)
    rows, notes, facts = [], [], []
    for one in sets:
        found = statistics(one, extractor, batch_size)
        rows.append(scores(found, known) | {"count": found.count})
        facts.append(_facts(one) | (how or {}))
        if found.count <= len(found.mu):
            notes.append(
                f"{found.count} images for {len(found.mu)} features: the covariance is singular and the "
                "distance far too high; compare it only with others of the same count"
            )
    path = Path(reference)
    result: dict[str, Any] = dict(rows[0])
    if len(rows) > 1:
        names = [name for name, value in rows[0].items() if value is not None and name != "count"]
        for name in names:
            values = np.array([row[name] for row in rows], dtype=np.float64)
            result[name] = {"mean": values.mean(), "std": values.std(ddof=1), "values": values.tolist()}
    return result | {
        "samples": facts if len(facts) > 1 else facts[0],
        "reference": {"name": path.name, "kind": kind, "count": known.count, "sha256": _checksum(path)},
        "extractor": {"name": extractor.name, "sha256": extractor.checksum},
        "protocol": "ADM: moments in float64, precision and recall with k = 3, IS in 10 parts, in order",
        "notes": notes,
        "versions": {name: _version(name) for name in ("diffussm", "torch", "torch-fidelity", "numpy")},
    }


def _facts(source: Source) -> dict[str, Any]:
    if not isinstance(source, str | Path):
        return {"name": "given"}
    path = Path(source)
    record = path.with_suffix(".json") if path.suffix == ".npz" else path / "samples.json"
    facts: dict[str, Any] = {"name": path.name, "sha256": _checksum(path)}
    try:
        written = json.loads(record.read_text())
    except (OSError, ValueError):
        return facts
    if isinstance(written, dict):
        if written.get("complete") is False:
            raise ValueError(f"{path} is not complete; give the same `diffussm sample` command again first")
        facts |= written
    return facts


def _checksum(path: Path) -> str:
    """sha256 of a file, or of the names and contents of all files below a folder."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("[!.]*") if p.is_file()):
        if path.is_dir():
            digest.update(file.relative_to(path).as_posix().encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def self_test() -> None:
    """Metrics on data with known answers; raises AssertionError when one is wrong.

    What went wrong in other projects: a set against itself must give 0 and (1, 1); the spatial features must
    be laid out position by position; moments of a stream must be those of the whole.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 8))
    mu, sigma = x.mean(0), np.cov(x, rowvar=False)
    assert frechet_distance(mu, sigma, mu, sigma) < 1e-9, "a set is not at distance 0 from itself"
    shifted = frechet_distance(mu, sigma, mu + 1, sigma)
    assert abs(shifted - 8) < 1e-9, f"a shift by 1 in 8 dimensions gives {shifted}, not 8"
    scaled = frechet_distance(np.zeros(8), np.eye(8), np.zeros(8), 9 * np.eye(8))
    assert abs(scaled - 32) < 1e-9, f"standard deviations 1 and 3 in 8 dimensions give {scaled}, not 32"
    points = torch.from_numpy(x)
    assert precision_recall(points, points) == (1.0, 1.0), "a set does not cover itself"
    assert precision_recall(points, points + 1e3) == (0.0, 0.0), "sets far apart cover each other"
    moments = _Moments()
    for part in points.split(37):
        moments.add(part)
    assert np.allclose(moments.read()[1], sigma, rtol=1e-10), "moments of a stream are not those of the whole"
