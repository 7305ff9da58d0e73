"""Adapters.

Generated from book/52_adapters.md by `make export`: edit there.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffussm.folders import StoredImages
from diffussm.guards import expect_one_of, explain, refuse
from diffussm.images import WHITE, BadImage, listed_content

__all__ = ["IndexedImages", "is_saved", "saved_images"]


_Part = str | int  # a key of a mapping, or a place in a tuple
_PICTURE: tuple[_Part, ...] = ("image", "img", 0)
_LABEL: tuple[_Part, ...] = ("label", "fine_label", 1)


def _part(
    what: str, given: _Part | None, usual: Sequence[_Part], parts: Sequence[_Part]
) -> _Part | None:
    """The part that is given, or the first usual one that there is."""
    if given is not None:
        return expect_one_of(what, given, parts)
    return next((part for part in usual if part in parts), None)


def _parts(dataset: Any) -> list[_Part]:
    """How the parts of an item are named; nothing if an item is the picture itself."""
    item = _columns(dataset) or dataset[0]
    if isinstance(item, Mapping):
        return list(item)
    return list(range(len(item))) if isinstance(item, tuple | list) else []


def _columns(dataset: Any) -> Mapping[str, Any]:
    """The columns of a data set of Hugging Face's; of others nothing."""
    columns = getattr(dataset, "features", None)
    return columns if isinstance(columns, Mapping) else {}


def _check_form(dataset: Any, name: str) -> None:
    splits = isinstance(dataset, Mapping)  # a DatasetDict is one, too
    refuse(splits, f"{name} holds several data sets: take one, as in dataset['train']")
    counted = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    stream = f"{name} has no length and index: load all of it, no stream"
    refuse(not counted, stream, TypeError)
    refuse(not len(dataset), f"{name} holds no images")


def _labels(dataset: Any, part: _Part) -> torch.Tensor:
    """int64 (n,), in the order of the data set."""
    if _columns(dataset):
        found = dataset.with_format(None)[part][:]
    elif part == 1 and getattr(dataset, "target_transform", None) is None:
        found = getattr(dataset, "targets", None)
    else:
        found = None
    if found is None or len(found) != len(dataset):
        found = [dataset[i][part] for i in range(len(dataset))]
    labels = np.asarray(found)
    _check_labels(labels, part)
    return torch.from_numpy(labels.astype(np.int64))


def _check_labels(labels: np.ndarray, part: _Part) -> None:
    integers = labels.ndim == 1 and labels.dtype.kind in "iu"
    what = f"the labels, {part!r}, are such as {labels[0]!r:.60}"
    refuse(
        not integers,
        f"{what}: expected integers from 0; `class_encode_column` of `datasets` makes "
        "them of texts, and conditional=False takes none",
    )
    unknown = "a label is negative, for unknown: conditional=False takes no labels"
    refuse(integers and labels.min() < 0, unknown)


def _class_names(dataset: Any, part: _Part, most: int) -> tuple[str, ...]:
    """The names of the classes; the labels' own numbers where there are none."""
    column = _columns(dataset).get(str(part))
    names = getattr(column or dataset, "names" if column else "classes", None)
    if names is None:
        return tuple(map(str, range(most + 1)))
    refuse(len(names) <= most, f"a label is {most}, and {len(names)} classes are named")
    return tuple(name if isinstance(name, str) else ", ".join(name) for name in names)


class IndexedImages(StoredImages):
    """A data set of anyone's that has a length and an index.

    An item is a picture, or a tuple or mapping with a picture and perhaps a label. A
    picture is what Pillow opens, the bytes of a file, or uint8 (H, W, 3) or (H, W).
    `fingerprint` is of all labels and of 64 images: a change to others is not noticed.

    Args:
        dataset: such as those of `torchvision.datasets`, or a `datasets.Dataset`.
        size, flip, background, exif_rotate: as for `ImageFolder`.
        image: key or place of the picture; None: "image", "img" or 0.
        label: key or place of the label; None: "label", "fine_label" or 1, if there.
        conditional: False takes no labels; True refuses a data set without.
        root: what messages call the data set.

    Raises:
        ValueError, TypeError: no items, or not of this form.
    """

    def __init__(
        self,
        dataset: Any,
        size: int | None,
        flip: bool = False,
        *,
        image: _Part | None = None,
        label: _Part | None = None,
        conditional: bool | None = None,
        background: tuple[int, int, int] = WHITE,
        exif_rotate: bool = False,
        root: str = "",
    ) -> None:
        name = root or type(dataset).__name__
        super().__init__(name, size, flip, background, exif_rotate)
        _check_form(dataset, name)
        parts = _parts(dataset)
        self._part = _part("image", image, _PICTURE, parts)
        lacking = f"{name}: an item has {parts}; say which is the picture, image=..."
        refuse(parts and self._part is None, lacking)
        self._dataset = _undecoded(dataset, self._part)
        part = _part("label", label, _LABEL, parts)
        refuse(conditional and part is None, f"{name} has no labels: omit conditional")
        self._settle(None if conditional is False else part)
        with suppress(BadImage), explain(name, TypeError, error=TypeError):
            self._content(0)  # a wrong form is better said now than in training

    def _settle(self, part: _Part | None) -> None:
        """Order, labels and classes."""
        self.labels = torch.zeros(len(self._dataset), dtype=torch.int64)
        if part is not None:
            with explain(f"{self.root} cannot be read", ValueError):
                self.labels = _labels(self._dataset, part)
                most = int(self.labels.max())
                self.classes = _class_names(self._dataset, part, most)
        self.num_classes = len(self.classes)
        self.labels, self._order = self.labels.sort(stable=True)

    def _content(self, index: int) -> bytes | Image.Image:
        number = int(self._order[index])
        try:
            with nullcontext() if _columns(self._dataset) else _ALONE:
                item = self._dataset[number]
        except (OSError, SyntaxError) as error:  # by Pillow, for what it cannot decode
            if getattr(error, "errno", None):  # by the system
                raise
            raise BadImage(f"cannot be decoded: {error}") from error
        return _as_stored(item if self._part is None else item[self._part])

    def name(self, index: int) -> str:
        """The place of image `index` in the data set, as text."""
        return str(int(self._order[index]))

    def path(self, index: int) -> str:
        """The data set and the place in it."""
        return f"{self.root}[{self.name(index)}]"

    def _facts(self) -> Iterator[bytes]:
        """All labels, and so many images: a change to others is not noticed."""
        n, k = len(self), min(len(self), _LOOKED_AT)
        yield self.labels.numpy().astype("<i8").tobytes()
        for i in range(k):
            try:
                yield _as_bytes(self._content(i * n // k))
            except BadImage:
                yield b"broken"


def _undecoded(dataset: Any, part: _Part | None) -> Any:
    """The data set, with the bytes of its pictures where it has them."""
    column: Any = _columns(dataset).get(str(part))
    if getattr(column, "decode", False) and dataset.format["type"] is None:
        return dataset.cast_column(part, type(column)(decode=False))
    return dataset


def _as_stored(picture: Any) -> bytes | Image.Image:
    """What a data set gives for a picture, in the form that `decode_image` takes."""
    if isinstance(picture, Mapping):  # Hugging Face's: bytes, or where they are
        content, path = picture.get("bytes"), picture.get("path")
        picture = listed_content(path) if path and content is None else content
    refuse(picture is None, "no picture", BadImage)
    levels = isinstance(picture, np.ndarray) and picture.dtype == np.uint8
    if levels and picture.shape[2:] in ((), (3,), (4,)):
        return Image.fromarray(picture)
    if not isinstance(picture, bytes | Image.Image):
        raise TypeError(f"a picture is {_told(picture)}; leave transforms out")
    return picture


def _told(picture: Any) -> str:
    """What was given for a picture, and what is expected."""
    form = [getattr(picture, "dtype", ""), tuple(getattr(picture, "shape", ()))]
    given = " ".join([type(picture).__name__, *(str(part) for part in form if part)])
    return f"{given}: expected one of Pillow's, bytes, or uint8 (H, W, 3)"


_ALONE = threading.Lock()


_LOOKED_AT = 64  # images for the fingerprint


def _as_bytes(picture: bytes | Image.Image) -> bytes:
    if isinstance(picture, bytes):
        return picture
    return f"{picture.mode} {picture.size} ".encode() + picture.tobytes()


def is_saved(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of Hugging Face's `datasets`."""
    one = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return one or (path / "dataset_dict.json").is_file()


def saved_images(path: Path, size: int | None, **how: Any) -> IndexedImages:
    """The images of a folder that `save_to_disk` wrote; `how`: see `IndexedImages`.

    Raises:
        ValueError, OSError: the package is missing, the folder damaged or of splits.
    """
    splits = f"{path} holds several splits: name one, as in {path / 'train'}"
    refuse((path / "dataset_dict.json").is_file(), splits)
    with explain(f"{path} needs the package datasets (pip install)", ImportError):
        from datasets import load_from_disk
    with explain(f"{path} cannot be read by the package datasets", *_UNREADABLE):
        dataset = load_from_disk(str(path))
    return IndexedImages(dataset, size, root=str(path), **how)


_UNREADABLE = (OSError, ValueError, KeyError, TypeError)  # damaged files
