"""Features.

Generated from book/57_features.md by `make export`: edit there.
"""

import io
import json
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffussm.adapters import IndexedImages
from diffussm.files import sha256, whole_file
from diffussm.formats import LmdbImages, holds_images
from diffussm.guards import (
    expect,
    expect_finite,
    expect_int,
    expect_there,
    explain,
    refuse,
)
from diffussm.image_sets import FirstByKey, ImageSet, Source, digests_of, keys_of
from diffussm.metrics import FeatureStatistics, RunningMoments
from diffussm.two_level import multiplying_in
from diffussm.zips import ZipFolder

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
        """The features of a batch."""
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
        with multiplying_in("ieee"):
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
    expect_there(path, f"{WEIGHTS}, a release of torch-fidelity (v0.2.0), as --weights")
    digest = sha256(path)
    if not digest.startswith(starts_with):
        raise ValueError(f"{path} has sha256 {digest[:8]}, not {starts_with}")
    return digest


def _network(name: str, weights: str | Path) -> Any:
    with explain("pip install torch-fidelity", ImportError, error=ImportError):
        from torch_fidelity import feature_extractor_inceptionv3
    with explain(f"{weights} does not hold the weights of a network", Exception):
        state = torch.load(weights, map_location="cpu", weights_only=True)
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
            f"--weights is missing: {WEIGHTS}, of torch-fidelity's release v0.2.0; "
            "nothing is downloaded silently. --features pixels or random need none"
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
    moments: dict[str, RunningMoments] = defaultdict(RunningMoments)
    kept, digests, shape = FirstByKey(keep), list[bytes](), tuple[int, ...]()
    for batch in images.batches(batch_size):
        found, features = digests_of(batch), extractor(batch)
        _add(moments, features)
        single = {name: x.float() for name, x in features.items() if name != "spatial"}
        kept.add(keys_of(found), single)
        digests, shape = digests + found, tuple(batch.shape[2:])
    expect_int(f"number of images in {images.name}", len(digests), least=2)
    return _read(moments, kept.read()[1], images.record(digests, shape))


def _add(moments: dict[str, RunningMoments], features: dict[str, Tensor]) -> None:
    for name, x in features.items():
        expect_finite(f"{name} features of a batch", x, "look at these images")
        if name != "logits":
            moments[name].add(x)


def _read(
    moments: dict[str, RunningMoments], some: dict[str, Tensor], record: dict[str, Any]
) -> FeatureStatistics:
    pool, kept = moments["pool"], (some["pool"], some.get("logits"))
    mu_s, sigma_s = moments["spatial"].read() if "spatial" in moments else (None, None)
    return FeatureStatistics(pool.count, *pool.read(), mu_s, sigma_s, *kept, record)


NEIGHBOURS = 10_000  # images that precision and recall look at, as in ADM's file


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
    told = f"{source} holds moments already, of more images: give it to `evaluate`"
    refuse(_has_moments(source), told)
    images = ImageSet(source, size, exif_rotate)
    extractor = extractor or load_inception(weights, device)
    found = statistics(images, extractor, batch_size, keep=NEIGHBOURS)
    out = Path(out)
    with whole_file(out) as draft, draft.open("wb") as file:
        np.savez(file, **_as_arrays(found, extractor))
    return out


def _has_moments(source: Source) -> bool:
    if not isinstance(source, str | Path) or not zipfile.is_zipfile(source):
        return False
    with zipfile.ZipFile(source) as archive:
        return "mu.npy" in archive.namelist()


_NUMBERS = ("mu", "sigma", "mu_s", "sigma_s", "pool", "count")


def _as_arrays(found: FeatureStatistics, extractor: Extractor) -> dict[str, Any]:
    """What the file of a reference holds."""
    numbers = {name: getattr(found, name) for name in _NUMBERS}
    arrays = {name: np.asarray(x) for name, x in numbers.items() if x is not None}
    arrays["extractor"] = np.array(f"{extractor.name} {extractor.checksum}")
    arrays["record"] = np.array(json.dumps(found.record))
    return arrays


def load_reference(
    path: str | Path,
    extractor: Extractor,
    batch_size: int = 64,
    size: int | None = None,
    exif_rotate: bool = False,
) -> tuple[FeatureStatistics, str]:
    """A reference and its kind: "folder", "images" (.npz), "statistics", "adm", ...

    "moments": of a file that does not say which extractor they are of.

    `size` crops images, and is refused for moments of images of another size. Raises
    ValueError for that, for statistics of another extractor, and for other files.
    """
    path = Path(path)
    arrays = _arrays(path)
    if "mu" not in arrays:
        images = ImageSet(path, size, exif_rotate)
        return statistics(images, extractor, batch_size, keep=NEIGHBOURS), _kind(images)
    _check_reference(path, arrays, extractor, size)
    if not arrays["adm"]:
        return _stored(arrays), "statistics" if "extractor" in arrays else "moments"
    some = statistics(path, extractor, batch_size, keep=NEIGHBOURS)
    arrays |= {"count": 0, "pool": some.pool, "record": some.record}
    return _stored(arrays), "adm"


def _stored(arrays: dict[str, Any]) -> FeatureStatistics:
    names = ("mu", "sigma", "mu_s", "sigma_s", "record")
    known: dict[str, Any] = {name: arrays.get(name) for name in names}
    pool = torch.as_tensor(arrays["pool"]) if "pool" in arrays else None
    return FeatureStatistics(int(arrays.get("count", 0)), pool=pool, **known)


def _kind(images: ImageSet) -> str:
    if images.files is None:
        return "images"
    kinds = {LmdbImages: "lmdb", ZipFolder: "zip", IndexedImages: "data set"}
    return kinds.get(type(images.files), "folder")


_UNREADABLE = (ValueError, TypeError, KeyError, OSError, EOFError, zipfile.BadZipFile)


def _arrays(path: Path) -> dict[str, Any]:
    """What a reference's .npz holds besides images; nothing where there are no moments.

    "adm" says whether it is ADM's, with images whose features are not stored.
    """
    if holds_images(path):
        return {}
    expect_there(path, "images, ADM's .npz, or a file of `diffussm statistics`")
    with (
        explain(f"the reference {path} cannot be read", *_UNREADABLE),
        path.open("rb") as file,
        np.load(file, allow_pickle=False) as archive,
    ):
        names = set(archive.files)
        if "mu" not in names:
            return {}
        wanted = {"mu", "sigma"} | names & {*_NUMBERS}
        numbers = {name: np.asarray(archive[name]) for name in wanted}
        kinds = {array.dtype.kind for array in numbers.values()}
        refuse(kinds - {*"fiu"}, "it holds other things than numbers")
        texts = {name: str(archive[name]) for name in names & {"extractor", "record"}}
        adm = "extractor" not in names and "arr_0" in names
        record = dict(json.loads(texts.get("record", "{}")))
        return {**numbers, **texts, "record": record, "adm": adm}


def _size_of(path: Path, arrays: dict[str, Any]) -> list[int] | None:
    """[H, W] of the images that stored moments are of, where it is known."""
    if arrays["adm"]:
        return [*next(ImageSet(path).batches(1)).shape[2:]]
    size: list[int] | None = arrays["record"].get("image_size")
    return size


def _check_reference(
    path: Path, arrays: dict[str, Any], extractor: Extractor, size: int | None
) -> None:
    ours = f"{extractor.name} {extractor.checksum}"
    if (made_by := arrays.get("extractor", ours)) != ours:
        raise ValueError(f"{path} was made with {made_by}: make it with {ours}")
    (d,) = expect(f"mu of {path}", arrays["mu"], "d")
    expect(f"sigma of {path}", arrays["sigma"], "d d", d=d)
    if (n := len(arrays.get("pool", ()))) > NEIGHBOURS:
        raise ValueError(f"{path} has {n} images, over {NEIGHBOURS}: make it again")
    stored = _size_of(path, arrays)
    if size is not None and stored not in (None, [size, size]):
        raise ValueError(
            f"size is {size}, but the reference {path} has {stored} pixels: omit size"
        )
