"""Features.

Generated from book/57_features.md by `make export`: edit there.
"""

import io
import json
import zipfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffussm.autoencoder import full_precision
from diffussm.files import sha256, whole_file
from diffussm.formats import LmdbImages
from diffussm.guards import refuse
from diffussm.image_sets import FirstByKey, ImageSet, Source, digests_of, keys_of
from diffussm.metrics import FeatureStatistics, RunningMoments

__all__ = [
    "Extractor",
    "Inception",
    "WEIGHTS",
    "check_weights",
    "load_inception",
    "statistics",
    "NEIGHBOURS",
    "save_statistics",
    "load_reference",
]


class Extractor(Protocol):
    """uint8 images (B, 3, H, W) -> {"pool": (B, d), and perhaps more}.

    "spatial" (B, s) is for sFID, "logits" (B, classes) for the Inception score. `name`
    and `checksum` go into every result: scores of different extractors have nothing in
    common.
    """

    name: str
    checksum: str

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """See above."""
        ...


class Inception:
    """The network that FID is defined by, in torch-fidelity's port; an `Extractor`.

    `starts_with` is what the file's sha256 must start with; tests pass "" for weights
    of their own.
    """

    name = "inception-v3-compat"

    def __init__(
        self,
        weights: str | Path,
        device: str | torch.device = "cpu",
        starts_with: str = "6726825d",
    ) -> None:
        self.checksum = check_weights(weights, starts_with)
        self.device = torch.device(device)
        self.net: Any = _network(self.name, weights).to(device)
        self._map: Tensor | None = None
        self.net.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: object, inputs: object, output: Tensor) -> None:
        self._map = output  # (B, 192, 17, 17), after its ReLU

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """pool (B, 2048), spatial (B, 2023), logits (B, 1008) without bias, as ADM."""
        with full_precision():
            pool, logits = self.net(images.to(self.device))
        assert self._map is not None
        spatial = self._map[:, :7].permute(0, 2, 3, 1).flatten(1)
        return {"pool": pool.cpu(), "spatial": spatial.cpu(), "logits": logits.cpu()}


WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


def check_weights(path: str | Path, starts_with: str = "6726825d") -> str:
    """The sha256 of the file of Inception's weights.

    Raises FileNotFoundError when it is not there, ValueError when it is another file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Scores need Inception's weights: get {WEIGHTS} "
            "from the releases of torch-fidelity (v0.2.0) on a machine with network, "
            "and name the file with --weights"
        )
    digest = sha256(path)
    if not digest.startswith(starts_with):
        raise ValueError(
            f"{path} is not {WEIGHTS}: its sha256 starts with {digest[:8]}, not with "
            f"{starts_with}"
        )
    return digest


def _network(name: str, weights: str | Path) -> Any:
    try:
        from torch_fidelity import feature_extractor_inceptionv3
    except ImportError as error:
        raise ImportError(
            "Inception comes with torch-fidelity: pip install torch-fidelity"
        ) from error
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds
        raise ValueError(
            f"{weights} does not hold the weights of a network: {error}"
        ) from error
    safe = io.BytesIO()  # torch-fidelity loads pickles; it gets one of ours
    torch.save(state, safe)
    safe.seek(0)
    kind: Any = feature_extractor_inceptionv3.FeatureExtractorInceptionV3
    outputs = ["2048", "logits_unbiased"]
    return kind(name, outputs, feature_extractor_weights_path=safe)


def load_inception(weights: str | Path | None, device: str) -> Extractor:
    """Inception; ValueError where no file is named."""
    if weights is None:
        raise ValueError(
            f"scores need Inception's weights: name the file {WEIGHTS} with --weights "
            "(it is in the releases of torch-fidelity, v0.2.0); nothing is downloaded "
            "silently"
        )
    return Inception(weights, device)


def statistics(
    source: Source | ImageSet,
    extractor: Extractor,
    batch_size: int = 64,
    keep: int | None = None,
) -> FeatureStatistics:
    """Run every image through the extractor; keep the features of `keep` images only.

    The record holds `images_sha256` (of the pixels, whatever their order),
    `image_size`, the crop, whether EXIF was obeyed, and what was left out. Raises
    ValueError for fewer than two images, or features not finite.
    """
    images = source if isinstance(source, ImageSet) else ImageSet(source)
    moments: dict[str, RunningMoments] = {}
    kept = FirstByKey(keep)
    digests: list[bytes] = []
    shape: tuple[int, ...] = ()
    for batch in images.batches(batch_size):
        found, features = digests_of(batch), extractor(batch)
        _check_finite(features, extractor)
        for name in features.keys() - {"logits"}:
            moments.setdefault(name, RunningMoments()).add(features[name])
        single = {name: x.float() for name, x in features.items() if name != "spatial"}
        kept.add(keys_of(found), single)
        digests, shape = digests + found, tuple(batch.shape[2:])
    _check_enough(digests, images)
    record = images.record(digests, shape)
    return _read(len(digests), moments, kept.read()[1], record)


def _read(
    count: int,
    moments: dict[str, RunningMoments],
    kept: dict[str, Tensor],
    record: dict[str, Any],
) -> FeatureStatistics:
    mu, sigma = moments["pool"].read()
    mu_s, sigma_s = moments["spatial"].read() if "spatial" in moments else (None, None)
    pool, logits = kept["pool"], kept.get("logits")
    return FeatureStatistics(count, mu, sigma, mu_s, sigma_s, pool, logits, record)


def _check_finite(features: dict[str, Tensor], extractor: Extractor) -> None:
    for name, x in features.items():
        refuse(
            not bool(torch.isfinite(x).all()),
            f"the {name} features of {extractor.name} are not finite for some images",
        )


def _check_enough(digests: list[bytes], images: ImageSet) -> None:
    refuse(
        len(digests) < 2,
        f"{images.source} holds fewer than two images; nothing can be said of it",
    )


NEIGHBOURS = (
    10_000  # images that precision and recall look at, as many as in ADM's file
)


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
    """Write the statistics of a reference as an .npz for `evaluate`, without pickles.

    `size` and `exif_rotate` as for `ImageSet`; they are recorded, with all else that
    was read or left out.
    """
    images = ImageSet(source, size, exif_rotate)
    extractor = extractor or load_inception(weights, device)
    found = statistics(images, extractor, batch_size, keep=NEIGHBOURS)
    arrays: dict[str, Any] = {"mu": found.mu, "sigma": found.sigma}
    optional = {"mu_s": found.mu_s, "sigma_s": found.sigma_s, "pool": found.pool}
    arrays |= {name: x for name, x in optional.items() if x is not None}
    arrays["count"] = np.array(found.count)
    arrays["extractor"] = np.array(f"{extractor.name} {extractor.checksum}")
    arrays["record"] = np.array(json.dumps(found.record))
    out = Path(out)
    with whole_file(out) as draft, draft.open("wb") as file:
        np.savez(file, **arrays)
    return out


def load_reference(
    path: str | Path,
    extractor: Extractor,
    batch_size: int = 64,
    size: int | None = None,
    exif_rotate: bool = False,
) -> tuple[FeatureStatistics, str]:
    """A reference and its kind: "folder", "lmdb", "images", "statistics" or "adm".

    `size` crops images, and is refused for moments of images of another size. Raises
    ValueError for that, for statistics of another extractor, and for other files.
    """
    path = Path(path)
    arrays = _arrays(path)
    if "mu" not in arrays:
        images = ImageSet(path, size, exif_rotate)
        return statistics(images, extractor, batch_size, keep=NEIGHBOURS), _kind(images)
    _check_reference(path, arrays, extractor)
    if "extractor" not in arrays and "arr_0" in arrays:
        images = ImageSet(path)
        _check_crop(path, list(next(images.batches(1)).shape[2:]), size)
        some = statistics(images, extractor, batch_size, keep=NEIGHBOURS)
        return _stored(arrays, 0, some.pool, some.record), "adm"
    record = _loaded(path, arrays.get("record", "{}"))
    _check_crop(path, record.get("image_size"), size)
    pool = torch.from_numpy(arrays["pool"]) if "pool" in arrays else None
    count = int(arrays.get("count", 0))
    return _stored(arrays, count, pool, record), "statistics"


def _stored(
    arrays: dict[str, Any], count: int, pool: Tensor | None, record: dict[str, Any]
) -> FeatureStatistics:
    moments = {name: arrays.get(name) for name in ("mu_s", "sigma_s")}
    known: dict[str, Any] = {"pool": pool, "record": record, **moments}
    return FeatureStatistics(count, arrays["mu"], arrays["sigma"], **known)


def _kind(images: ImageSet) -> str:
    if images.files is None:
        return "images"
    return "lmdb" if isinstance(images.files, LmdbImages) else "folder"


_MOMENTS = {"mu", "sigma", "mu_s", "sigma_s", "pool", "count"}
_TEXTS = {"extractor", "record"}


def _arrays(path: Path) -> dict[str, Any]:
    """What a reference's .npz holds besides images; of arr_0 only that it is there."""
    if not path.exists():
        raise FileNotFoundError(f"the reference {path} does not exist")
    if path.is_dir() or path.suffix == ".mdb":
        return {}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = set(archive.files)
            wanted = names & _MOMENTS if "mu" in names else set()
            numbers = {name: np.asarray(archive[name]) for name in wanted}
            refuse(
                any(array.dtype.kind not in "fiu" for array in numbers.values()),
                "it holds other things than numbers",
            )
            texts = {name: str(archive[name]) for name in names & _TEXTS}
            return numbers | texts | ({"arr_0": None} if "arr_0" in names else {})
    except (ValueError, KeyError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"the reference {path} cannot be read: {error}") from error


def _check_reference(path: Path, arrays: dict[str, Any], extractor: Extractor) -> None:
    made_by = arrays.get("extractor")
    refuse(
        made_by not in (None, f"{extractor.name} {extractor.checksum}"),
        f"the reference {path} was made with {made_by}, not with {extractor.name}: "
        "make it again",
    )
    d = np.shape(arrays["mu"])
    refuse(
        len(d) != 1 or np.shape(arrays.get("sigma", 0)) != d * 2,
        f"the reference {path} has mu {d} and no sigma {d * 2}",
    )
    if len(arrays.get("pool", ())) > NEIGHBOURS:
        raise ValueError(
            f"the reference {path} holds features of {len(arrays['pool'])} images in "
            f"the order of their files; precision and recall take {NEIGHBOURS}: make "
            "it again with `diffussm statistics`"
        )


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
            f"size is {size}, but the reference {path} holds moments of images of "
            f"{tuple(made_of)} pixels, which nothing can crop any more: omit size, or "
            "make the reference again"
        )
