"""Distances on features that need no download, beside those of real images."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch

from diffussm.features import save_statistics
from diffussm.metrics import frechet_distance, kernel_distance
from diffussm.plain_scores import (
    FEATURES,
    against_real,
    as_images,
    named_features,
    plain_scores,
    real_images,
)


def pictures(n, seed=0, size=16, low=0):
    draw = torch.Generator().manual_seed(seed)
    small = torch.randint(low, 256, (n, 3, 4, 4), generator=draw, dtype=torch.uint8)
    return small.repeat_interleave(size // 4, 2).repeat_interleave(size // 4, 3)


def test_pixels_are_means_of_fields():
    found = named_features("pixels")(pictures(3))["pool"].view(3, 3, 8, 8)
    for i, j in ((0, 0), (5, 7)):
        field = pictures(3)[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].double()
        expected = field.mean((2, 3)) / 127.5 - 1
        assert torch.allclose(found[:, :, i, j].double(), expected, atol=1e-6)


def test_random_edges_are_convolutions_written_out():
    features, image = named_features("random"), pictures(1, size=8)
    x = image[0].double().numpy() / 127.5 - 1
    around = np.pad(x, ((0, 0), (1, 1), (1, 1)), mode="edge")
    w = features.filters[0, 5].double().numpy()
    answers = [
        abs((w * around[:, i : i + 3, j : j + 3]).sum())
        for i in range(8)
        for j in range(8)
    ]
    assert float(features(image)["pool"][0, 5]) == pytest.approx(np.mean(answers), 1e-5)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("size", [1, 2, 7, 33])
def test_features_take_images_of_any_size(name, size):
    images = pictures(5, size=64)[:, :, :size, :size]
    found = named_features(name)(images)["pool"]
    assert found.shape == (5, 192) and bool(found.isfinite().all())


def test_features_do_not_depend_on_the_batch():
    images = pictures(7)
    for name in FEATURES:
        of = named_features(name)
        apart = torch.cat([of(images[:3])["pool"], of(images[3:])["pool"]])
        assert torch.allclose(of(images)["pool"], apart, atol=1e-6)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="did you mean 'pixels'"):
        named_features("pixel")


def test_the_floor_is_of_other_real_images_as_many():
    real, held_out = (torch.randn(n, 4) for n in (30, 20))
    count, rows = against_real([torch.randn(11, 4)], real, draws=3)
    assert count == 11 and len(rows) == 2
    assert against_real([held_out], real, draws=3)[0] == 15
    count, (ours, floor) = against_real([held_out], real, held_out, draws=3)
    assert count == 20 and ours == floor  # the same images, in the same draws


def test_draws_are_plain_distances_of_disjoint_halves():
    numbers = torch.randn(6, 2)
    count, (row, floor) = against_real([numbers + 5], numbers, draws=2)
    assert count == 3
    halves = [
        (list(ours), sorted({*range(6)} - {*ours}))
        for ours in combinations(range(6), 3)
    ]
    possible = [kernel_distance(numbers[a], numbers[b]) for a, b in halves]
    mean, std = floor["kid"]["mean"], floor["kid"]["std"]
    for value in (mean - std / 2**0.5, mean + std / 2**0.5):  # the two draws
        assert any(abs(value - one) < 1e-9 for one in possible)
    assert row["kid"]["mean"] > 10 * max(possible)
    assert row["frechet_distance"]["mean"] > 40  # a shift by 5 in 2 axes


def test_a_set_scores_the_same_alone_and_beside_others():
    real, a, b = (torch.randn(n, 3) for n in (40, 20, 20))
    alone, both = (against_real(sets, real, draws=3)[1] for sets in ([a], [b, a]))
    assert alone == both[1:]


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="number of images to compare=1"):
        against_real([torch.randn(9, 2)], torch.randn(3, 2))


def test_faults_score_worse_than_real_images(tmp_path):
    real, held_out = pictures(80), pictures(40, seed=1)
    smooth = torch.nn.functional.avg_pool2d(held_out.float(), 5, 1, 2).byte()
    darker = pictures(40, seed=1) // 2
    for name, fault in (("random", smooth), ("pixels", darker)):
        result = plain_scores([[fault]], [real], name, held_out=[held_out])
        for distance in ("kid", "frechet_distance"):
            floor, found = result["real"][distance], result["samples"][0][distance]
            assert found["mean"] > floor["mean"] + 4 * floor["std"]
        assert '"fid"' not in json.dumps(result).lower()


def test_a_result_says_what_was_left_out_few_or_of_another_size(tmp_path):
    (tmp_path / "set").mkdir()
    np.savez(tmp_path / "a.npz", pictures(8).permute(0, 2, 3, 1).numpy())
    (tmp_path / "set" / "bad.png").write_bytes(b"no picture")
    from PIL import Image

    for i, image in enumerate(pictures(6, size=8).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(tmp_path / "set" / f"{i}.png")
    result = plain_scores([tmp_path / "set"], tmp_path / "a.npz")
    told = "\n".join(result["notes"])
    assert "1 images of set" in told and "few" in told and "[8, 8]" in told
    assert result["samples"][0]["count"] == 6 and result["compared"]["images"] == 4
    assert result["real"]["images"] == "the rest of the reference"


def test_statistics_that_were_stored_are_a_reference(tmp_path):
    real = pictures(20)
    file = save_statistics(
        [real], tmp_path / "x.npz", extractor=named_features("random")
    )
    kept, given = (
        plain_scores([[pictures(10, 1)]], source, "random") for source in (file, [real])
    )
    assert kept["samples"][0]["kid"] == given["samples"][0]["kid"]
    with pytest.raises(ValueError, match="made with random"):
        plain_scores([[real]], file, "pixels")


def test_digits_are_named_unless_a_folder_has_that_name(tmp_path, monkeypatch):
    assert len(torch.cat(list(real_images("digits/test")))) == 359
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits" / "test").mkdir(parents=True)
    assert real_images("digits/test").is_dir()


def test_a_frechet_distance_is_of_covariances():
    a, b = torch.randn(50, 3), torch.randn(50, 3) * 2
    _, (row, _) = against_real([b], a, b, draws=2)
    moments = [f(z.double().numpy()) for z in (a, b) for f in (mean, covariance)]
    assert row["frechet_distance"]["mean"] == pytest.approx(frechet_distance(*moments))


def mean(z):
    return z.mean(0)


def covariance(z):
    return np.cov(z, rowvar=False)


def test_grey_numbers_become_images():
    x = torch.tensor([-1.0, 0.0, 1.0, 5.0]).view(1, 1, 2, 2)
    assert as_images(x)[0, 2].flatten().tolist() == [0, 128, 255, 255]
    with pytest.raises(ValueError, match="diverged"):
        as_images(x * torch.nan)
