"""Features and their statistics; references of every kind, and what is refused."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scored import Colours, batches, some

from diffussm.evaluation import evaluate
from diffussm.features import (
    Inception,
    check_weights,
    load_reference,
    save_statistics,
    statistics,
)
from diffussm.image_sets import read_images
from diffussm.metrics import scores
from tools.rehearsal import random_inception


def test_moments_of_a_stream_are_those_of_the_whole():
    images = some(50)
    found = statistics(batches(images), Colours())
    whole = Colours()(torch.from_numpy(images).permute(0, 3, 1, 2))
    for name, mu, sigma in (
        ("pool", found.mu, found.sigma),
        ("spatial", found.mu_s, found.sigma_s),
    ):
        np.testing.assert_allclose(mu, whole[name].numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(
            sigma, np.cov(whole[name].numpy(), rowvar=False), atol=1e-12
        )
    assert found.count == 50


def test_every_kind_of_reference_gives_the_same_distance(tmp_path):
    others = some(40, 1)
    np.savez(tmp_path / "images.npz", others)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(others):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i}.png")
    save_statistics(
        tmp_path / "images.npz", tmp_path / "statistics.npz", extractor=Colours()
    )
    found = statistics(tmp_path / "images.npz", Colours())
    moments = {
        "mu": found.mu,
        "sigma": found.sigma,
        "mu_s": found.mu_s,
        "sigma_s": found.sigma_s,
    }
    np.savez(
        tmp_path / "adm.npz", arr_0=others[:10], **moments
    )  # moments of all, some of the images
    results = {}
    for name in ("images.npz", "folder", "statistics.npz", "adm.npz"):
        kind = name.removesuffix(".npz")
        assert load_reference(tmp_path / name, Colours())[1] == kind
        results[kind] = evaluate(
            batches(some(30)), tmp_path / name, extractor=Colours()
        )
        assert results[kind]["fid"] == pytest.approx(results["images"]["fid"], rel=1e-6)
        assert results[kind]["sfid"] == pytest.approx(
            results["images"]["sfid"], rel=1e-6
        )
    assert results["statistics"]["recall"] == results["images"]["recall"]


def test_statistics_are_not_made_of_a_file_that_has_them(tmp_path):
    file = tmp_path / "adm.npz"
    np.savez(file, arr_0=np.zeros((2, 8, 8, 3), np.uint8), mu=np.zeros(3))
    with pytest.raises(ValueError, match="holds moments already"):
        save_statistics(file, tmp_path / "out.npz", extractor=Colours())


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


@pytest.mark.parametrize(
    "what",
    ["float", "grey", "sizes", "empty", "text", "missing", "truncated", "pickle"],
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
            np.lib.format.write_array(
                content, np.array([{"harm": 1}], dtype=object), allow_pickle=True
            )
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
    for read in (
        lambda: list(read_images(path)),
        lambda: load_reference(path, Colours()),
    ):
        with pytest.raises((ValueError, OSError), match="set"):
            read()


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    weights = random_inception(tmp_path_factory.mktemp("inception") / "weights.pth")
    return Inception(weights, starts_with="")


def test_spatial_features_lie_position_by_position(inception):
    images = torch.from_numpy(some(2, size=32)).permute(0, 3, 1, 2)
    seen = []
    inception.net.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
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


def test_weights_are_checked_before_they_are_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match="--weights"):
        check_weights(tmp_path / "nowhere.pth")
    (tmp_path / "other.pth").write_bytes(b"other weights")
    with pytest.raises(ValueError, match="not 6726825d"):
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


def test_inception_scores_a_set_against_itself(inception):
    images = batches(some(14, size=8))
    found = statistics(images, inception)
    result = scores(found, found)
    size = float(np.trace(found.sigma))
    assert result["fid"] < 1e-4 * size and (result["precision"], result["recall"]) == (
        1,
        1,
    )
