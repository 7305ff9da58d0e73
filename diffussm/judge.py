"""A judge of drawn images.

Generated from book/92_judge.md by `make export`: edit there.
"""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffussm.data import Dataset, generator
from diffussm.guards import expect_indices, expect_int
from diffussm.model import DiffuSSM
from diffussm.neighbours import Pairs, nearer_than_held_out, nearest_pairs
from diffussm.options import Recipe
from diffussm.plain_scores import against_real, as_images, named_features
from diffussm.sample_options import Sampler
from diffussm.watching import draw_finite

__all__ = ["Judge", "train_judge", "agreement", "Jury", "jury_of", "judged"]


class Judge:
    """A classifier of images, and what it sees in them; an `Extractor`."""

    name = "classifier"

    def __init__(self, classes: int) -> None:
        self.fields = named_features("pixels")
        self.body = nn.Sequential(nn.Linear(192, 128), nn.ReLU(), nn.Linear(128, 32))
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(32, classes))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) -> "pool" (B, 32), "logits" (B, classes)."""
        pool = self.body(self.fields(images)["pool"])
        return {"pool": pool, "logits": self.head(pool)}

    @property
    def checksum(self) -> str:
        """The checksum of the weights: only numbers of one judge may be compared."""
        weights = [*self.body.parameters(), *self.head.parameters()]
        numbers = torch.cat([w.detach().flatten() for w in weights]).numpy()
        return hashlib.sha256(numbers.tobytes()).hexdigest()


_STEPS = 400
_BATCH = 64


def train_judge(images: Tensor, labels: Tensor, classes: int) -> Judge:
    """A judge trained on uint8 images (n, 3, H, W) and labels (n,).

    Raises:
        ValueError: a label is none of the classes.
    """
    expect_indices("labels", labels, classes)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        judge = Judge(classes)
        x, layers = judge.fields(images)["pool"], nn.Sequential(judge.body, judge.head)
        optimizer = torch.optim.AdamW(layers.parameters(), lr=2e-3)
        for step in range(_STEPS):
            draws = generator(0, "batches of a judge", step)
            some = torch.randint(len(x), (_BATCH,), generator=draws)
            loss = functional.cross_entropy(layers(x[some]), labels[some])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return judge


def agreement(judge: Judge, images: Tensor, labels: Tensor) -> float:
    """The share of images (n, 3, H, W) in which it reads the class of `labels` (n,)."""
    read = judge(images)["logits"].argmax(1)
    return float((read == labels).float().mean())


class Jury:
    """A judge trained on images, and what it sees in them and in held-out ones.

    Args:
        data, held_out: What the judge is trained on, and images that it never sees.
        count: Of the held-out images; the drawn ones get their labels.
    """

    def __init__(self, data: Dataset, held_out: Dataset, count: int) -> None:
        self.known, labels = _some(data, _KNOWN)
        self.judge = train_judge(self.known, labels, data.num_classes)
        self.unseen, self.labels = _some(held_out, count)
        self.scale = self.judge(self.known)["pool"].var(0).sum().sqrt()
        self.unseen_pairs = self.pairs(self.unseen)

    def features(self, images: Tensor) -> Tensor:
        """What the judge sees in images (n, 3, H, W): (n, 32), scaled."""
        return self.judge(images)["pool"] / self.scale

    def pairs(self, images: Tensor) -> Pairs:
        """Images (n, 3, H, W), and the training image nearest to each."""
        parts = torch.split(self.known, 500)
        return nearest_pairs(images, parts, self.judge.fields)

    def compare(self, sets: Iterable[Tensor]) -> list[dict[str, Any]]:
        """Measures of sets (n, 3, H, W) drawn with `labels`, and of held-out images.

        "frechet" {"mean", "std"} over the draws, "agreement", "nearest" (mean distance
        to the nearest training image), and "near": the share of images nearer than all
        but one in a hundred held-out ones.
        """
        images, found = [*sets, self.unseen], []
        pools = [self.features(x) for x in images]
        known = self.features(self.known)
        count, (*distances, _) = against_real(pools, known, pools[-1])
        for x, each in zip(images, distances, strict=True):
            pairs = self.unseen_pairs if x is self.unseen else self.pairs(x)
            one: dict[str, Any] = {"images": count, "frechet": each["frechet_distance"]}
            one["agreement"] = agreement(self.judge, x, self.labels)
            one["nearest"] = float(pairs.distance.mean())
            one["near"] = nearer_than_held_out(pairs, self.unseen_pairs)
            found.append(one)
        return found


_KNOWN = 20_000


def _some(data: Dataset, count: int) -> tuple[Tensor, Tensor]:
    """At most so many images, always the same: uint8 (n, 3, H, W), labels (n,)."""
    draws = generator(0, "images of a jury", 0)
    chosen = torch.randperm(len(data), generator=draws)[:count]
    parts = [data.batch(some) for some in torch.split(chosen, 500)]
    images, labels = zip(*parts, strict=True)
    return torch.cat([as_images(x) for x in images]), torch.cat(labels)


@lru_cache(maxsize=2)
def jury_of(data: Dataset, held_out: Dataset, count: int) -> Jury:
    """The jury, trained once in a process."""
    expect_int("number of classes", data.num_classes, least=1)
    return Jury(data, held_out, count)


def _drawn(
    model: DiffuSSM, recipe: Recipe, labels: Tensor, cfg_scale: float
) -> Tensor | None:
    """Images of a model with these labels, uint8 (n, 3, H, W); None if not finite."""
    sizes, images = recipe.model, []
    sampler = Sampler(20, "ddim", cfg_scale=cfg_scale, clip_denoised=True)
    for number, y in enumerate(torch.split(labels, _BATCH)):
        shape = len(y), sizes.in_channels, sizes.height, sizes.width
        draws = generator(recipe.seed, "judged images", number)
        noise = torch.randn(shape, generator=draws)
        x = draw_finite(sampler, model, recipe, y, noise)
        if x is None:
            return None
        images.append(as_images(x))
    return torch.cat(images)


def judged(
    model: DiffuSSM, recipe: Recipe, jury: Jury, guidance: Iterable[float]
) -> dict[str, Any]:
    """What a jury says of a model with each scale of guidance, and of real images.

    "guidance" has by scale ("1.5") what `Jury.compare` says, or None where images are
    not finite; "real" is the same of held-out images.
    """
    drawn = {f"{w:g}": _drawn(model, recipe, jury.labels, w) for w in guidance}
    finite = {scale: images for scale, images in drawn.items() if images is not None}
    *found, real = jury.compare(finite.values())
    told = dict.fromkeys(drawn) | dict(zip(finite, found, strict=True))
    return {"classifier": jury.judge.checksum, "guidance": told, "real": real}
