"""Metrics.

Generated from book/50_metrics.md by `make export`: edit there.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffussm.guards import expect, expect_finite, expect_int, refuse

__all__ = [
    "frechet_distance",
    "RunningMoments",
    "kernel_distance",
    "DISTANCES",
    "precision_recall",
    "PART",
    "inception_score",
    "FeatureStatistics",
    "SCORES",
    "scores",
    "protocol",
    "self_test",
]


def frechet_distance(
    mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray
) -> float:
    """Squared Fréchet distance of two Gaussians, eq-evaluation-frechet.

    Means (d,), covariances (d, d). Raises ValueError for other shapes and for values
    that are not finite.
    """
    given = (mu1, sigma1, mu2, sigma2)
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, dtype=np.float64) for x in given)
    _check_moments(mu1=mu1, sigma1=sigma1, mu2=mu2, sigma2=sigma2)
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    crossed = np.linalg.eigvalsh(root @ sigma2 @ root).clip(min=0)
    squared = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2)
    squared -= 2 * np.sqrt(crossed).sum()
    return max(float(squared), 0.0)  # round-off can leave -1e-10


def _check_moments(**moments: np.ndarray) -> None:
    sizes: dict[str, int] = {}
    for name, x in moments.items():
        d, *_ = expect(name, x, "d d" if name.startswith("sigma") else "d", **sizes)
        sizes["d"] = d
        refuse(not np.isfinite(x).all(), f"{name} is not finite: look at the features")


class RunningMoments:
    """Mean and covariance of a stream of vectors, in float64."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Count the rows of `x` (B, d) in."""
        x = x.double()
        if not self.count:
            self.origin = x.mean(dim=0)
            self.first = torch.zeros_like(self.origin)
            self.second = x.new_zeros(x.shape[1], x.shape[1])
        x = x - self.origin
        self.count += len(x)
        self.first += x.sum(dim=0)
        self.second += x.T @ x

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """The mean (d,) and the covariance (d, d), with n - 1 in its denominator."""
        mean = self.first / self.count
        sigma = (self.second - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return (mean + self.origin).numpy(), sigma.numpy()


def _squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """eq-metrics-kid: x and y (m, d) -> scalar; may be negative."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    m, xx, yy = len(x), kernel(x, x), kernel(y, y)
    within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
    return within / (m * (m - 1)) - 2 * kernel(x, y).mean()


_BLOCK = 1000  # points of a block, as in its authors' code


def kernel_distance(real: Tensor, fake: Tensor, block: int = _BLOCK) -> float:
    """KID: the mean of eq-metrics-kid over pairs of blocks, features (n, d) and (m, d).

    Its unit is that of the kernel, eq-metrics-kernel; papers often show it times 1,000.
    Without bias, so that it may be slightly negative. Computed in float64; points that
    fill no block are left out. Raises ValueError as `precision_recall` does.

    Source: Bińkowski et al., "Demystifying MMD GANs", ICLR 2018.
    """
    _check_clouds(real, fake, least=2)
    size = min(block, len(real), len(fake))
    x, y = (torch.split(z.double(), size)[: len(z) // size] for z in (real, fake))
    pairs = ((x[i % len(x)], y[i % len(y)]) for i in range(max(len(x), len(y))))
    return float(torch.stack([_squared_mmd(*pair) for pair in pairs]).mean())


def _check_clouds(real: Tensor, fake: Tensor, least: int) -> None:
    for name, points in (("real features", real), ("fake features", fake)):
        n, _ = expect(name, points, "n d")
        expect_int(f"number of {name}", n, least)
        expect_finite(name, points, "look at these images")


_NEAREST = 3  # the neighbour whose distance is a ball's radius


def _radii(points: Tensor, k: int, rows: int) -> Tensor:
    """The distance of each point to its k-th nearest: (n, d) -> (n,)."""
    near = [
        torch.cdist(part, points).kthvalue(k + 1, dim=1).values
        for part in torch.split(points, rows)
    ]
    return torch.cat(near)  # k + 1, because each point is its own nearest


def _covered(points: Tensor, centres: Tensor, radius: Tensor, rows: int) -> float:
    """The share of `points` that lie in some ball."""
    inside = [
        (torch.cdist(part, centres) <= radius).any(dim=1)
        for part in torch.split(points, rows)
    ]
    return float(torch.cat(inside).double().mean())


DISTANCES = 2**27  # held at once at the most: half a gigabyte of float32


def precision_recall(
    real: Tensor, fake: Tensor, k: int = _NEAREST, block: int = 4096
) -> tuple[float, float]:
    """Improved precision and recall: features (n, d) and (m, d), balls to the k-th.

    Distances are computed in the features' own precision and on their device, `block`
    rows at a time, or fewer where that would be more than DISTANCES. Raises ValueError
    when there are too few points or a feature is not finite.
    """
    _check_clouds(real, fake, least=k + 1)
    rows = max(1, min(block, DISTANCES // max(len(real), len(fake))))
    precision = _covered(fake, real, _radii(real, k, rows), rows)
    recall = _covered(real, fake, _radii(fake, k, rows), rows)
    return precision, recall


PART = 5000  # images of one part, ADM's number


def inception_score(logits: Tensor, part: int = PART) -> float:
    """Inception score, eq-evaluation-inception: logits (n, classes), mean over parts.

    Parts are of `part` rows, as in ADM's code, the last may be shorter. With more than
    one their order matters. Raises ValueError when there are no rows.
    """
    refuse(not len(logits), "no logits: an Inception score needs images")
    log_p = logits.double().log_softmax(dim=1)
    scores = []
    for rows in torch.split(log_p, part):
        log_marginal = rows.logsumexp(dim=0) - np.log(len(rows))
        divergence = (rows.exp() * (rows - log_marginal)).sum(dim=1)
        scores.append(float(divergence.mean().exp()))
    return float(np.mean(scores))


@dataclass(frozen=True)
class FeatureStatistics:
    """What scores need to know of a set of images; float64 moments, float32 features.

    mu (d,), sigma (d, d) of pooled features, mu_s (s,), sigma_s (s, s) of spatial ones;
    pool (n, d) and logits (n, classes) of all images or of some, in an order that says
    nothing. `record` says what was read.
    """

    count: int
    mu: np.ndarray
    sigma: np.ndarray
    mu_s: np.ndarray | None = None
    sigma_s: np.ndarray | None = None
    pool: Tensor | None = None
    logits: Tensor | None = None
    record: dict[str, Any] = field(default_factory=dict)


SCORES = ("fid", "sfid", "kid", "inception_score", "precision", "recall")


def scores(
    samples: FeatureStatistics,
    reference: FeatureStatistics,
    device: str | torch.device = "cpu",
) -> dict[str, float | None]:
    """All of SCORES, computed on `device` where distances between features are."""
    ours, theirs = samples, reference
    found: dict[str, float | None] = dict.fromkeys(SCORES)
    found["fid"] = frechet_distance(ours.mu, ours.sigma, theirs.mu, theirs.sigma)
    spatial = (ours.mu_s, ours.sigma_s, theirs.mu_s, theirs.sigma_s)
    if all(moment is not None for moment in spatial):
        found["sfid"] = frechet_distance(*spatial)  # type: ignore[arg-type]
    if ours.logits is not None and len(ours.logits) >= 10:
        found["inception_score"] = inception_score(ours.logits, PART)
    real, fake = theirs.pool, ours.pool
    if real is not None and fake is not None and min(len(real), len(fake)) > _NEAREST:
        found["kid"] = kernel_distance(real, fake, _BLOCK)
        covered = precision_recall(real.to(device), fake.to(device), _NEAREST)
        found["precision"], found["recall"] = covered
    return found


def protocol(
    samples: FeatureStatistics,
    reference: FeatureStatistics,
    found: dict[str, float | None],
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """How each of the scores was computed."""
    how: dict[str, Any] = {"samples": samples.count}
    how["moments"] = str(samples.sigma.dtype)
    if found["inception_score"] is not None and samples.logits is not None:
        how["inception_score"] = _parts(samples.logits)
    real, fake = reference.pool, samples.pool
    if found["kid"] is not None and real is not None and fake is not None:
        how |= _pairs(real, fake, device)
    return how


def _parts(logits: Tensor) -> dict[str, int]:
    """In which parts an Inception score was taken."""
    sizes = [len(rows) for rows in torch.split(logits, PART)]
    return {"parts": len(sizes), "part": PART, "last_part": sizes[-1]}


def _pairs(real: Tensor, fake: Tensor, device: str | torch.device) -> dict[str, Any]:
    """Of which pairs the kernel distance, precision and recall were taken."""
    sets = {"reference": len(real), "samples": len(fake)}
    block = min(_BLOCK, *sets.values())
    how = {"distances": f"{real.dtype} on {torch.device(device).type}"}
    kid = {"block": block, "blocks": max(sets.values()) // block}
    return {"kid": kid, "precision_recall": {"k": _NEAREST, **sets, **how}}


def _known_answers() -> Iterator[tuple[str, object, object]]:
    """What is computed, what came out, what must."""
    x = np.random.default_rng(0).normal(size=(400, 8))
    mu, sigma, zero, one = x.mean(0), np.cov(x, rowvar=False), np.zeros(8), np.eye(8)
    yield "a set at distance 0 from itself", frechet_distance(mu, sigma, mu, sigma), 0
    yield "a shift by 1 in 8 axes", frechet_distance(mu, sigma, mu + 1, sigma), 8
    yield "deviations 1 and 3 in 8 axes", frechet_distance(zero, one, zero, 9 * one), 32
    points = torch.from_numpy(x)
    yield "a set that covers itself", precision_recall(points, points), (1, 1)
    yield "sets far apart", precision_recall(points, points + 1e3), (0, 0)
    corner = torch.ones(5, 8)
    yield "a corner of a cube and its centre", kernel_distance(corner, 0 * corner), 7
    yield "ten certain classes", inception_score(50 * torch.eye(10)), 10
    stream = RunningMoments()
    for part in torch.split(points, 37):
        stream.add(part)
    yield "the covariance of a stream", stream.read()[1], sigma


def self_test() -> None:
    """Metrics on data with known answers; raises AssertionError when one is wrong."""
    for what, found, expected in _known_answers():
        if not np.allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=1e-9):
            raise AssertionError(f"{what}: found {found}, expected {expected}")
