"""Data.

Generated from book/33_data.md by `make export`: edit there.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffussm.guards import expect, expect_int, expect_number, expect_one_of, refuse

__all__ = [
    "Fetch",
    "Dataset",
    "TensorData",
    "random_bits",
    "RANDOM",
    "generator",
    "sample_order",
    "batch_indices",
    "batch_flips",
    "stratified_split",
    "digits",
]


Fetch = Callable[[Callable[[int], Any], Iterable[int]], Iterable[Any]]  # as map does


class Dataset(Protocol):
    """What training asks of data; who inherits from it gets `batch` and `identity`.

    `dataset[i]` is a float32 tensor (C, H, W) in [-1, 1] and a label (0 if there are
    none).

    Attributes:
        classes: one name for each label.
        num_classes: how many; 0 for unconditional data.
        flip: whether a mirrored image is as good as the image.
        levels: grey levels of a pixel; None for latents.
    """

    classes: tuple[str, ...]
    num_classes: int
    flip: bool
    levels: int | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...

    def batch(
        self,
        indices: Tensor,
        flips: Tensor | None = None,
        noise: Tensor | None = None,
        fetch: Fetch = map,
    ) -> tuple[Tensor, Tensor]:
        """Images float32 (B, C, H, W), some of them mirrored, and labels int64 (B,).

        Args:
            indices: (B,), see `batch_indices`.
            flips: bool (B,), see `batch_flips`; ignored where `flip` is False.
            noise: standard normal (B, C, H, W), for images that are drawn; unused here.
            fetch: `map`, or what does its work in several threads.
        """
        (B,) = expect("indices", indices, "B")
        images, labels = zip(*fetch(self.__getitem__, indices.tolist()), strict=True)
        x = torch.stack(images)  # (B, C, H, W)
        if flips is not None:
            expect("flips", flips, "B", B=B)
            x = torch.where(flips[:, None, None, None] & self.flip, x.flip(-1), x)
        return x, torch.tensor(labels, dtype=torch.int64)

    @property
    def identity(self) -> dict[str, Any]:
        """What images these are, alike on every machine."""
        checksum = getattr(self, "fingerprint", None)
        names = list(self.classes)
        return {"images": len(self), "classes": names, "fingerprint": checksum}


class TensorData(Dataset):
    """A data set that is in memory.

    Args:
        images: float (n, C, H, W) in [-1, 1], finite.
        labels: integer (n,), from 0; None for unconditional data.
        flip: whether a mirrored image is as good as the image. Not for digits.
        classes: one name for each label; the labels' own numbers if absent.
        levels: grey levels of a pixel; None for latents.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        flip: bool = False,
        classes: Sequence[str] | None = None,
        levels: int | None = 256,
    ) -> None:
        _check_images(images)
        self.images = images.to(torch.float32)
        self.labels, self.classes = _labelled(len(images), labels, classes)
        self.num_classes, self.flip, self.levels = len(self.classes), flip, levels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    @cached_property
    def fingerprint(self) -> str:
        """A checksum of images and labels."""
        digest = hashlib.sha256()
        for tensor in (self.images, self.labels):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def _labelled(
    n: int, labels: Tensor | None, classes: Sequence[str] | None
) -> tuple[Tensor, tuple[str, ...]]:
    """Labels int64 (n,), 0 if there are none, and the names of their classes."""
    if labels is None:
        refuse(classes, "class names were given without labels")
        return torch.zeros(n, dtype=torch.int64), ()
    expect("labels, one per image,", labels, "n", n=n)
    expect_int("label", labels.min().item(), least=0)
    last = expect_int("label", labels.max().item())
    names = tuple(map(str, range(last + 1)) if classes is None else classes)
    expect_int("label", last, most=len(names) - 1)
    return labels.to(torch.int64), names


def _check_images(images: Tensor) -> None:
    if not images.is_floating_point():
        raise TypeError(f"images are {images.dtype}: expected floats, byte / 127.5 - 1")
    expect("images", images, "n C H W")
    expect_int("number of images", len(images), least=1)
    expect_number("images.min()", images.min().item(), least=-1)
    expect_number("images.max()", images.max().item(), most=1)


def random_bits(seed: int, purpose: str, number: int | np.ndarray) -> np.ndarray:
    """64 random bits for each `number` >= 0: a function of the three arguments alone.

    Two numbers never get the same bits. Returns uint64 in the shape of `number`.
    Source: SplitMix64 (Steele, Lea and Flood, 2014), ch. "Data", eq-data-bits.
    """
    key = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8]
    z = np.atleast_1d(number).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = z + np.frombuffer(key, "<u8")
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits: np.ndarray = z ^ (z >> np.uint64(31))
    return bits.reshape(np.shape(number))


RANDOM = 2  # how random numbers are drawn; 1: before eq-data-bits


def generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """A CPU generator that depends on its arguments alone: make it, draw once.

    Draw for the whole batch and take your slice, and the number of processes does not
    matter. Noise has a stream for each image instead (`diffussm.batches.noise_at`).
    """
    return torch.Generator().manual_seed(int(random_bits(seed, purpose, number)))


@lru_cache(maxsize=2)  # a batch touches two epochs at most
def _order(n: int, seed: int, epoch: int) -> Tensor:
    bits = random_bits(seed, "order", epoch * n + np.arange(n))
    return torch.from_numpy(np.argsort(bits))


def sample_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits `n` samples: a permutation, int64 (n,)."""
    expect_int("seed", seed, least=0)
    expect_int("epoch", epoch, least=0)
    return _order(n, seed, epoch).clone()


def _positions(n: int, batch_size: int, step: int) -> range:
    """Where in the endless row a batch stands."""
    expect_int("step", step, least=0)
    expect_int("batch_size", batch_size, least=1)
    if batch_size > n:
        raise ValueError(f"batch_size={batch_size}: the data set has {n} images in all")
    return range(step * batch_size, (step + 1) * batch_size)


def _windows(
    n: int, batch_size: int, step: int, seed: int
) -> Iterator[tuple[int, Tensor]]:
    """(epoch, indices) of each part of a batch: one, or two across an epoch's end."""
    expect_int("seed", seed, least=0)
    row = _positions(n, batch_size, step)
    for epoch in range(row[0] // n, row[-1] // n + 1):
        first, end = max(row.start - epoch * n, 0), row.stop - epoch * n
        yield epoch, _order(n, seed, epoch)[first:end]


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The samples of global batch `step`, int64 (batch_size,); nothing is dropped.

    Raises:
        ValueError: batch_size is greater than n, or a number is negative.
    """
    parts = _windows(n, batch_size, step, seed)
    return torch.cat([indices for _, indices in parts])


def batch_flips(n: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Which samples of global batch `step` are mirrored: a fair coin for each epoch.

    Returns:
        bool (batch_size,), in the order of `batch_indices`.
    """
    coins = [
        random_bits(seed, "flips", epoch * n + i.numpy()) >> np.uint64(63)
        for epoch, i in _windows(n, batch_size, step, seed)
    ]
    return torch.from_numpy(np.concatenate(coins).astype(bool))


def stratified_split(
    labels: Tensor, test_size: float, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Split numbers 0 .. n-1 in two, the same share of each class in both.

    Args:
        labels: integers (n,).
        test_size: share of the second part, between 0 and 1; rounded per class.
        seed: decides which.

    Returns:
        train int64 (n - m,), test int64 (m,), both ascending.
    """
    expect_number("test_size", test_size, above=0, below=1)
    expect_int("seed", seed, least=0)
    bits = random_bits(seed, "split", np.arange(len(labels)))
    draw = torch.from_numpy(bits.astype(np.float64))
    test = torch.zeros(len(labels), dtype=torch.bool)
    for c in sorted(set(labels.tolist())):
        members = torch.nonzero(labels == c).flatten()
        lottery = members[draw[members].argsort(stable=True)]
        test[lottery[: round(test_size * len(members))]] = True
    return torch.nonzero(~test).flatten(), torch.nonzero(test).flatten()


def _digits_table() -> np.ndarray:
    """A digit a row: 64 levels and its label, as scikit-learn's `load_digits` has them.

    Its file is read without importing it, for that costs seconds at each start.
    """
    home = find_spec("sklearn")
    if home is None or home.origin is None:
        raise ImportError("the digits are scikit-learn's: pip install scikit-learn")
    file = Path(home.origin).parent / "datasets" / "data" / "digits.csv.gz"
    return np.loadtxt(file, delimiter=",")


def digits(
    split: str = "train", seed: int = 0, test_size: float = 0.2
) -> tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits of scikit-learn: 8x8 pixels, 17 grey levels.

    Args:
        split: "train", "test" or "all".
        seed, test_size: see `stratified_split`.

    Returns:
        images float32 (n, 1, 8, 8) in [-1, 1], level / 8 - 1; labels int64 (n,).
    """
    expect_one_of("split", split, ("train", "test", "all"))
    table = _digits_table()
    images = torch.from_numpy(table[:, :-1].reshape(-1, 1, 8, 8) / 8 - 1).float()
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    if split == "all":
        return images, labels
    train, test = stratified_split(labels, test_size, seed)
    chosen = train if split == "train" else test
    return images[chosen], labels[chosen]
