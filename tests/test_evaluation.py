"""Chapter 12: scores equal independent definitions; nothing is scored that is not what it claims to be."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffussm.evaluation import (
    Inception,
    Statistics,
    check_weights,
    evaluate,
    frechet_distance,
    inception_score,
    load_reference,
    precision_recall,
    read_images,
    save_statistics,
    scores,
    self_test,
    statistics,
)
from tools.rehearsal import random_inception


class Colours:
    """Ten numbers of each image: a cheap extractor whose features are known."""

    name, checksum = "colours", "0"

    def __call__(self, images):
        x = images.double() / 255
        pool = torch.cat([x.mean((2, 3)), x.std((2, 3)), x[:, :, 0, 0], x[:, :1, 1, 1]], dim=1)
        return {"pool": pool, "spatial": x[:, 0].flatten(1)[:, :8], "logits": pool * 5}


def some(n, seed=0, size=4):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, size=(n, size, size, 3), dtype=np.uint8)


def batches(images, size=7):
    return list(torch.from_numpy(images).permute(0, 3, 1, 2).split(size))


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
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(mu1, sigma1, mu1, sigma1) == pytest.approx(0, abs=1e-6)


def test_gaussians_of_known_moments_give_the_closed_form():
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
    expected = 3 * 2.0**2 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2
    assert frechet_distance(np.zeros(3), np.diag(a), np.full(3, 2.0), np.diag(b)) == pytest.approx(expected)


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
                others = sorted(np.linalg.norm(c - o) for j, o in enumerate(centres) if j != i)
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
    assert inception_score(torch.tensor(logits)) == pytest.approx(np.mean(expected), rel=1e-9)


def test_moments_of_a_stream_are_those_of_the_whole():
    images = some(50)
    found = statistics(batches(images), Colours())
    whole = Colours()(torch.from_numpy(images).permute(0, 3, 1, 2))
    for name, mu, sigma in (("pool", found.mu, found.sigma), ("spatial", found.mu_s, found.sigma_s)):
        np.testing.assert_allclose(mu, whole[name].numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(sigma, np.cov(whole[name].numpy(), rowvar=False), atol=1e-12)
    assert found.count == 50


def test_folder_npz_and_batches_give_the_same_scores(tmp_path):
    images, others = some(30), some(40, 1)
    (tmp_path / "set").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "set" / f"{i:06d}.png")
    np.savez(tmp_path / "set.npz", images)
    np.savez(tmp_path / "reference.npz", arr_0=others)
    ways = [tmp_path / "set", tmp_path / "set.npz", batches(images)]
    results = [evaluate(way, tmp_path / "reference.npz", extractor=Colours(), batch_size=7) for way in ways]
    for name in ("fid", "sfid", "inception_score", "precision", "recall"):
        assert results[0][name] is not None
        assert results[0][name] == pytest.approx(results[1][name]) == pytest.approx(results[2][name])


def test_a_set_against_itself_is_perfect(tmp_path):
    np.savez(tmp_path / "a.npz", some(40))
    result = evaluate(tmp_path / "a.npz", tmp_path / "a.npz", extractor=Colours())
    assert result["fid"] == pytest.approx(0, abs=1e-6) and result["sfid"] == pytest.approx(0, abs=1e-6)
    assert (result["precision"], result["recall"]) == (1, 1)


def test_every_kind_of_reference_gives_the_same_distance(tmp_path):
    others = some(40, 1)
    np.savez(tmp_path / "images.npz", others)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(others):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i}.png")
    save_statistics(tmp_path / "images.npz", tmp_path / "statistics.npz", extractor=Colours())
    found = statistics(tmp_path / "images.npz", Colours())
    moments = {"mu": found.mu, "sigma": found.sigma, "mu_s": found.mu_s, "sigma_s": found.sigma_s}
    np.savez(tmp_path / "adm.npz", arr_0=others[:10], **moments)  # moments of all, some of the images
    results = {}
    for name in ("images.npz", "folder", "statistics.npz", "adm.npz"):
        kind = name.removesuffix(".npz")
        assert load_reference(tmp_path / name, Colours())[1] == kind
        results[kind] = evaluate(batches(some(30)), tmp_path / name, extractor=Colours())
        assert results[kind]["fid"] == pytest.approx(results["images"]["fid"], rel=1e-6)
        assert results[kind]["sfid"] == pytest.approx(results["images"]["sfid"], rel=1e-6)
    assert results["statistics"]["recall"] == results["images"]["recall"]


def test_the_result_says_everything_and_several_seeds_give_a_spread(tmp_path):
    facts = {"steps": 250, "method": "ddpm", "cfg_scale": 1.5, "weights": "ema", "labels": "balanced"}
    for seed in (0, 1, 2):
        np.savez(tmp_path / f"{seed}.npz", some(30, seed))
        (tmp_path / f"{seed}.json").write_text(json.dumps({**facts, "seed": seed, "complete": True}))
    np.savez(tmp_path / "reference.npz", some(40, 9))
    paths = [tmp_path / f"{seed}.npz" for seed in (0, 1, 2)]
    result = evaluate(paths, tmp_path / "reference.npz", extractor=Colours())
    alone = [evaluate(path, tmp_path / "reference.npz", extractor=Colours())["fid"] for path in paths]
    assert result["fid"]["mean"] == pytest.approx(np.mean(alone))
    assert result["fid"]["std"] == pytest.approx(np.std(alone, ddof=1))
    assert [s["seed"] for s in result["samples"]] == [0, 1, 2] and result["samples"][0]["steps"] == 250
    assert len(result["reference"]["sha256"]) == 64 and result["extractor"]["name"] == "colours"
    assert result["versions"]["torch"] and json.dumps(result)
    (tmp_path / "0.json").write_text(json.dumps({**facts, "complete": False}))
    with pytest.raises(ValueError, match="not complete"):
        evaluate(paths[0], tmp_path / "reference.npz", extractor=Colours())


def test_too_few_images_are_noted(tmp_path):
    np.savez(tmp_path / "a.npz", some(8))
    result = evaluate(tmp_path / "a.npz", tmp_path / "a.npz", extractor=Colours())
    assert "8 images for 10 features" in result["notes"][0] and result["inception_score"] is None
    np.savez(tmp_path / "b.npz", some(11))
    assert evaluate(tmp_path / "b.npz", tmp_path / "a.npz", extractor=Colours())["notes"] == []


def test_statistics_of_another_extractor_are_refused(tmp_path):
    class Other(Colours):
        name = "other"

    save_statistics(batches(some(20)), tmp_path / "s.npz", extractor=Other())
    with pytest.raises(ValueError, match="made with other"):
        evaluate(batches(some(20)), tmp_path / "s.npz", extractor=Colours())


def test_features_that_are_not_finite_are_refused():
    class Broken(Colours):
        def __call__(self, images):
            return {"pool": torch.full((len(images), 3), float("nan"))}

    with pytest.raises(ValueError, match="not finite"):
        statistics(batches(some(20)), Broken())
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(np.full(2, np.nan), np.eye(2), np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="not finite"):
        precision_recall(torch.full((9, 2), float("inf")), torch.zeros(9, 2))


@pytest.mark.parametrize(
    "what", ["float", "grey", "sizes", "empty", "text", "missing", "truncated", "pickle"]
)
def test_what_is_no_set_of_images_is_refused(tmp_path, what):
    path = tmp_path / "set.npz"
    if what == "float":
        np.savez(path, some(4).astype(np.float32))
    elif what == "grey":
        np.savez(path, some(4)[..., 0])
    elif what == "sizes":
        path = tmp_path / "set"
        path.mkdir()
        for side in (4, 5):
            Image.new("RGB", (side, side)).save(path / f"{side}.png")
    elif what == "empty":
        path = tmp_path / "set"
        path.mkdir()
    elif what == "text":
        path.write_text("no archive")
    elif what == "truncated":
        np.savez(path, some(40))
        path.write_bytes(path.read_bytes()[:-500])
    elif what == "pickle":
        with zipfile.ZipFile(path, "w") as archive:
            content = io.BytesIO()
            np.lib.format.write_array(content, np.array([{"harm": 1}], dtype=object), allow_pickle=True)
            archive.writestr("arr_0.npy", content.getvalue())
    with pytest.raises((ValueError, FileNotFoundError), match="set"):
        list(read_images(path))
    with pytest.raises((ValueError, FileNotFoundError), match="set"):
        load_reference(path, Colours())


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 2))
def test_garbage_is_refused_with_a_sentence(tmp_path_factory, content, kind):
    path = tmp_path_factory.mktemp("fuzz") / "set.npz"
    if kind == 0:
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy" if kind == 1 else "mu.npy", content)
    for read in (lambda: list(read_images(path)), lambda: load_reference(path, Colours())):
        with pytest.raises((ValueError, OSError), match="set"):
            read()


def test_the_metrics_test_themselves_and_notice_a_fault(monkeypatch):
    self_test()
    monkeypatch.setattr("diffussm.evaluation.frechet_distance", lambda *_: 0.1)
    with pytest.raises(AssertionError, match="distance 0"):
        self_test()


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    weights = random_inception(tmp_path_factory.mktemp("inception") / "weights.pth")
    return Inception(weights, starts_with="")


def test_spatial_features_lie_position_by_position(inception):
    images = torch.from_numpy(some(2, size=32)).permute(0, 3, 1, 2)
    seen = []
    inception.net.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    found = inception(images)
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "pool": (2, 2048),
        "spatial": (2, 2023),
        "logits": (2, 1008),
    }
    for row, column, channel in ((0, 0, 0), (3, 11, 6), (16, 16, 2)):
        place = (row * 17 + column) * 7 + channel
        assert torch.equal(found["spatial"][:, place], seen[0][:, channel, row, column])
    assert found["spatial"].std() > 0 and found["pool"].std() > 0


def test_inception_scores_a_set_against_itself(inception):
    images = batches(some(14, size=8))
    found = statistics(images, inception)
    result = scores(found, found)
    size = float(np.trace(found.sigma))
    assert result["fid"] < 1e-4 * size and (result["precision"], result["recall"]) == (1, 1)


def test_weights_are_checked_before_they_are_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match="--weights"):
        check_weights(tmp_path / "nowhere.pth")
    (tmp_path / "other.pth").write_bytes(b"other weights")
    with pytest.raises(ValueError, match="not with 6726825d"):
        Inception(tmp_path / "other.pth")

    class Harm:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    (tmp_path / "harm.pth").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(ValueError, match="does not hold the weights"):
        Inception(tmp_path / "harm.pth", starts_with="")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "few.pth")
    with pytest.raises((ValueError, RuntimeError), match="fc.weight|does not hold"):
        Inception(tmp_path / "few.pth", starts_with="")


def test_scores_without_weights_say_where_to_get_them(tmp_path):
    np.savez(tmp_path / "a.npz", some(20))
    with pytest.raises(ValueError, match="nothing is downloaded silently"):
        evaluate(tmp_path / "a.npz", tmp_path / "a.npz")


def test_statistics_without_spatial_features_have_no_sfid():
    one = Statistics(9, np.zeros(2), np.eye(2))
    found = scores(one, one)
    assert found.pop("fid") == 0 and set(found.values()) == {None}
