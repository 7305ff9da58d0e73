"""Scores equal independent definitions."""

import numpy as np
import pytest
import scipy.linalg
import torch
from scored import adm_inception_score

from diffussm.metrics import (
    FeatureStatistics,
    RunningMoments,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    scores,
    self_test,
)


def features(n, d, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


@pytest.mark.parametrize("d", [1, 5, 40])
def test_frechet_distance_equals_the_matrix_square_root(d):
    x, y = features(300, d, 1), features(200, d, 2)
    mu1, mu2 = x.mean(0), y.mean(0)
    sigma1, sigma2 = (np.atleast_2d(np.cov(a, rowvar=False)) for a in (x, y))
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(
        expected, rel=1e-6
    )
    assert frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(
        expected, rel=1e-6
    )
    assert frechet_distance(mu1, sigma1, mu1, sigma1) == pytest.approx(0, abs=1e-6)


def test_gaussians_of_known_moments_give_the_closed_form():
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
    expected = 3 * 2.0**2 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2
    assert frechet_distance(
        np.zeros(3), np.diag(a), np.full(3, 2.0), np.diag(b)
    ) == pytest.approx(expected)


def test_a_singular_covariance_gives_a_number():
    x = features(5, 20, 0)  # rank 4 in 20 dimensions
    sigma = np.cov(x, rowvar=False)
    d = frechet_distance(x.mean(0), sigma, x.mean(0), np.eye(20))
    assert np.isfinite(d) and d > 0


def brute_force(real, fake, k):
    def covered(points, centres):
        count = 0
        for p in points:
            for i, c in enumerate(centres):
                others = sorted(
                    np.linalg.norm(c - o) for j, o in enumerate(centres) if j != i
                )
                if np.linalg.norm(p - c) <= others[k - 1]:
                    count += 1
                    break
        return count / len(points)

    return covered(fake, real), covered(real, fake)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_a_loop_over_all_pairs(k):
    real, fake = features(40, 3, 1), features(30, 3, 1)[::-1] * 0.6 + 0.4
    for block in (7, 4096):
        got = precision_recall(torch.tensor(real), torch.tensor(fake.copy()), k, block)
        assert got == pytest.approx(brute_force(real, fake, k), abs=1e-6)
    assert 0 < got[0] < 1 and 0 < got[1] < 1


def test_a_set_covers_itself_and_nothing_far_away():
    x = torch.tensor(features(50, 4, 0))
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 1e4) == (0.0, 0.0)


def test_inception_score_equals_its_definition():
    logits = np.random.default_rng(0).normal(size=(60, 7)) * 3
    expected = []
    for part in logits.reshape(10, 6, 7):
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        expected.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    assert inception_score(torch.tensor(logits), part=6) == pytest.approx(
        np.mean(expected), rel=1e-9
    )


@pytest.mark.parametrize("n", [500, 5000, 5001, 12_345])
def test_inception_score_is_cut_as_adm_cuts_it(n):
    logits = np.random.default_rng(n).normal(size=(n, 16)) * 2
    assert inception_score(torch.from_numpy(logits)) == pytest.approx(
        adm_inception_score(logits), rel=1e-9
    )


def test_another_order_of_random_labels_moves_a_score_by_less_than_a_thousandth():
    rng = np.random.default_rng(0)
    logits = (
        rng.normal(size=(50_000, 20)) + 6 * np.eye(20)[rng.integers(20, size=50_000)]
    )
    ours = inception_score(torch.from_numpy(logits[rng.permutation(50_000)]))
    assert ours == pytest.approx(adm_inception_score(logits), rel=1e-3)


def test_distances_are_held_in_blocks_of_bounded_size(monkeypatch):
    held, cdist = [], torch.cdist

    def spy(a, b):
        held.append(len(a) * len(b))
        return cdist(a, b)

    real, fake = (
        torch.tensor(features(90, 3, 1)),
        torch.tensor(features(70, 3, 1) * 0.7),
    )
    whole = precision_recall(real, fake)
    monkeypatch.setattr(torch, "cdist", spy)
    monkeypatch.setattr("diffussm.metrics.DISTANCES", 500)
    assert precision_recall(real, fake) == whole and max(held) <= 500


def pair_by_pair(x, y):
    """The unbiased squared discrepancy of two lists of m points, pair by pair."""
    m, d = len(x), len(x[0])

    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / d + 1) ** 3

    total = 0.0
    for i in range(m):
        for j in range(m):
            if i != j:
                total += (k(x[i], x[j]) + k(y[i], y[j])) / (m * (m - 1))
            total -= 2 * k(x[i], y[j]) / m**2
    return total


def test_kernel_distance_equals_a_loop_over_all_pairs():
    x, y = features(30, 4, 1), features(30, 4, 2)
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    expected = pair_by_pair(x.tolist(), y.tolist())
    assert kernel_distance(*tensors) == pytest.approx(expected, rel=1e-10)
    in_blocks = [
        pair_by_pair(x[i : i + 7].tolist(), y[i : i + 7].tolist())
        for i in (0, 7, 14, 21)
    ]
    found = kernel_distance(*tensors, block=7)  # two points fill no block
    assert found == pytest.approx(np.mean(in_blocks), rel=1e-10)
    assert kernel_distance(tensors[1], tensors[0], block=7) == pytest.approx(found)


def test_the_smaller_set_gives_the_blocks_of_the_kernel_distance():
    x, y = features(20, 3, 1), features(9, 3, 2)
    expected = np.mean(
        [pair_by_pair(x[i : i + 9].tolist(), y.tolist()) for i in (0, 9)]
    )
    found = kernel_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(expected, rel=1e-10)


def test_the_further_blocks_of_the_larger_set_count_in_the_kernel_distance():
    x, y = torch.randn(2 * 7 + 3, 3).double(), torch.randn(5 * 7 + 1, 3).double()
    pairs = [(i % 2, i) for i in range(5)]
    alone = [
        kernel_distance(x[7 * i : 7 * i + 7], y[7 * j : 7 * j + 7]) for i, j in pairs
    ]
    assert kernel_distance(x, y, block=7) == pytest.approx(sum(alone) / 5)
    assert kernel_distance(y, x, block=7) == pytest.approx(sum(alone) / 5)


def test_kernel_distance_has_no_bias_and_notices_a_difference():
    rng = np.random.default_rng(0)

    def draws(shift):
        return [
            kernel_distance(
                torch.from_numpy(rng.normal(size=(20, 3))),
                torch.from_numpy(rng.normal(size=(20, 3)) + shift),
            )
            for _ in range(400)
        ]

    same, other = np.array(draws(0.0)), np.array(draws(1.0))
    error = same.std(ddof=1) / len(same) ** 0.5
    assert abs(same.mean()) < 4 * error and (same < 0).any()
    assert other.mean() > 20 * error


def test_running_moments_are_those_of_the_whole():
    x = torch.from_numpy(features(50, 4, 0) + 1e6)
    stream = RunningMoments()
    for part in x.split(7):
        stream.add(part)
    mu, sigma = stream.read()
    np.testing.assert_allclose(mu, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.numpy(), rowvar=False), rtol=1e-6)


@pytest.mark.parametrize("which", range(4))
def test_moments_that_do_not_fit_are_refused(which):
    moments = [np.zeros(2), np.eye(2), np.zeros(2), np.eye(2)]
    moments[which] = np.zeros((3,) * moments[which].ndim)
    with pytest.raises(ValueError, match="expected .d="):
        frechet_distance(*moments)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(np.full(2, np.nan), np.eye(2), np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="not finite"):
        precision_recall(torch.full((9, 2), float("inf")), torch.zeros(9, 2))
    with pytest.raises(ValueError, match="not finite"):
        kernel_distance(torch.full((9, 2), float("nan")), torch.zeros(9, 2))


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="number of real features=3: .*at least 4"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
    with pytest.raises(ValueError, match="expected .n, d."):
        precision_recall(torch.zeros(9), torch.zeros(9, 2))
    with pytest.raises(ValueError, match="number of fake features=1: .*at least 2"):
        kernel_distance(torch.zeros(9, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="no logits"):
        inception_score(torch.zeros(0, 5))


def test_the_metrics_test_themselves_and_notice_a_fault(monkeypatch):
    self_test()
    monkeypatch.setattr("diffussm.metrics.frechet_distance", lambda *_: 0.1)
    with pytest.raises(AssertionError, match="distance 0"):
        self_test()


def test_statistics_without_spatial_features_have_no_sfid():
    one = FeatureStatistics(9, np.zeros(2), np.eye(2))
    found = scores(one, one)
    assert found.pop("fid") == 0 and set(found.values()) == {None}
