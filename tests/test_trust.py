"""What a score can be trusted for: its count, its features, its evaluator."""

import json
import os

import numpy as np
import pytest
import torch
from commands import diffussm
from scored import Colours, some

from diffussm.evaluation import evaluate
from diffussm.features import statistics
from diffussm.metrics import frechet_distance
from diffussm.trust import (
    ADM_SCORES,
    DINOv2,
    acceptance,
    acceptance_files,
    fid_infinity,
    growing_subsets,
    load_dinov2,
)

NAMES = "admnet_guided_upsampled_imagenet256.npz", "VIRTUAL_imagenet256_labeled.npz"


def random_vit(width=64, blocks=2, grid=37, seed=0):
    """Random weights with the names and shapes of a DINOv2."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + grid**2, width)}
    shapes |= {"mask_token": (1, width), "patch_embed.proj.weight": (width, 3, 14, 14)}
    shapes |= dict.fromkeys(
        ("patch_embed.proj.bias", "norm.weight", "norm.bias"), (width,)
    )
    for i in range(blocks):
        of = {"norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width)}
        of |= {"attn.proj": (width, width), "mlp.fc1": (4 * width, width)}
        of |= {"mlp.fc2": (width, 4 * width)}
        for name, shape in of.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
        shapes |= {f"blocks.{i}.ls{j}.gamma": (width,) for j in (1, 2)}
    return {
        name: torch.randn(shape, generator=draw) / 8 for name, shape in shapes.items()
    }


@pytest.fixture
def vit(tmp_path):
    torch.save(random_vit(), tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


def test_the_extrapolated_distance_is_nearer_to_the_true_one():
    draw, d = np.random.default_rng(0), 16
    shift, true = 0.2, 16 * 0.04
    errors = []
    for _ in range(8):
        x = draw.normal(size=(1000, d)) + shift
        zero, one = np.zeros(d), np.eye(d)
        plain = frechet_distance(x.mean(0), np.cov(x, rowvar=False), zero, one)
        errors.append(
            (plain - true, fid_infinity(torch.from_numpy(x), zero, one) - true)
        )
    plain, extended = np.mean(errors, axis=0)
    assert plain > 0.05 and abs(extended) < plain / 2


def test_subsets_grow_from_a_tenth_to_all_and_are_the_same_again():
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(500, 3)))
    sizes, distances = growing_subsets(x, np.zeros(3), np.eye(3))
    again = growing_subsets(x, np.zeros(3), np.eye(3))
    assert len(sizes) == 15 and (sizes[0], sizes[-1]) == (50, 500)
    np.testing.assert_array_equal(distances, again[1])
    moments = x.numpy().mean(0), np.cov(x.numpy(), rowvar=False)
    assert distances[-1] == pytest.approx(
        frechet_distance(*moments, np.zeros(3), np.eye(3))
    )
    with pytest.raises(ValueError, match="number of features"):
        fid_infinity(x[:99], np.zeros(3), np.eye(3))


def test_evaluate_adds_the_extrapolated_distance_if_asked(tmp_path):
    np.savez(tmp_path / "set.npz", some(120))
    np.savez(tmp_path / "reference.npz", some(200, 1))
    places = tmp_path / "set.npz", tmp_path / "reference.npz"
    plain = evaluate(*places, extractor=Colours())
    extended = evaluate(*places, extractor=Colours(), extrapolate=True)
    ours, theirs = (statistics(place, Colours()) for place in places)
    expected = fid_infinity(ours.pool, theirs.mu, theirs.sigma)
    assert extended["fid_infinity"] == pytest.approx(expected)
    assert "fid_infinity" not in plain and extended["fid"] == plain["fid"]


def test_dinov2_sees_images_of_any_size_and_says_what_it_is(vit):
    net = DINOv2(vit)
    images = torch.from_numpy(some(3, size=40)).permute(0, 3, 1, 2)
    features = net(images)["pool"]
    assert features.shape == (3, 64) and net.name == "dinov2, 2 blocks of 64"
    larger = images.repeat_interleave(7, 2).repeat_interleave(7, 3)
    assert net(larger)["pool"].shape == (3, 64)
    assert not torch.allclose(features[0], features[1])
    torch.testing.assert_close(net(images[1:2])["pool"], features[1:2])
    assert len(net.checksum) == 64


def test_positions_of_the_stored_grid_are_taken_as_they_are(tmp_path):
    weights = random_vit(grid=16)
    torch.save(weights, tmp_path / "small.pth")
    net, zero = DINOv2(tmp_path / "small.pth"), torch.zeros(1, 3, 224, 224)
    from diffussm.trust import _tokens

    tokens = _tokens(net.w, zero)
    expected = weights["patch_embed.proj.bias"] + weights["pos_embed"][:, 1:]
    torch.testing.assert_close(tokens[:, 1:], expected)


def test_files_that_hold_no_dinov2_are_refused_by_name(tmp_path, vit):
    with pytest.raises(ValueError, match="--weights is missing"):
        load_dinov2(None, "cpu")
    with pytest.raises(FileNotFoundError, match="weights of DINOv2"):
        DINOv2(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="does not hold the weights of DINOv2"):
        DINOv2(tmp_path / "text.pth")
    weights = random_vit()
    del weights["blocks.1.mlp.fc2.bias"]
    torch.save(weights, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"it lacks blocks.1.mlp.fc2.bias"):
        DINOv2(tmp_path / "part.pth")
    torch.save({"norm.bias": torch.zeros(64)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="it lacks"):
        DINOv2(tmp_path / "other.pth")


def test_dinov2_scores_by_command(tmp_path, vit):
    np.savez(tmp_path / "set.npz", some(8, size=16))
    np.savez(tmp_path / "real.npz", some(9, 1, size=16))
    how = "--features dinov2 --weights {t}/vit.pth --device cpu"
    diffussm("statistics {t}/real.npz {t}/stats.npz " + how, t=tmp_path)
    words = "evaluate {t}/set.npz --reference {t}/%s.npz --out {t}/%s.json " + how
    for name in ("real", "stats"):
        diffussm(words % (name, name), t=tmp_path)
    first, second = (
        json.loads((tmp_path / f"{n}.json").read_text()) for n in ("real", "stats")
    )
    assert first["fid"] == pytest.approx(second["fid"]) and first["fid"] > 0
    assert first["extractor"]["name"].startswith("dinov2") and first["sfid"] is None
    differs = " ".join(first["protocol"]["differs_from_adm"])
    assert "dinov2" in differs and "torch-fidelity" not in differs
    said = diffussm(
        "evaluate {t}/set.npz --reference {t}/real.npz --features dinov2", 1, t=tmp_path
    )
    assert "--weights is missing" in said and "dinov2_vitl14" in said


def test_acceptance_allows_a_little_and_no_more():
    assert acceptance(ADM_SCORES)["accepted"]
    for name, theirs in ADM_SCORES.items():
        result = acceptance(ADM_SCORES | {name: theirs * 1.05})
        assert not result["accepted"] and not result["scores"][name]["near"]
        assert sum(row["near"] for row in result["scores"].values()) == 4


def test_acceptance_says_what_is_missing(tmp_path):
    said = diffussm("evaluate --acceptance {t}", 1, t=tmp_path)
    assert all(f"imagenet/256/{name}" in said for name in NAMES)
    (tmp_path / NAMES[0]).write_bytes(b"")
    with pytest.raises(FileNotFoundError) as error:
        acceptance_files(tmp_path)
    assert NAMES[1] in str(error.value) and NAMES[0] not in str(error.value)
    for words, told in (
        ("{t}/x.npz", "alone"),
        ("--size 8", "--size would have no effect"),
    ):
        assert told in diffussm(f"evaluate --acceptance {{t}} {words}", 1, t=tmp_path)


def test_acceptance_compares_what_it_scores(tmp_path, monkeypatch):
    np.savez(tmp_path / NAMES[0], some(30))
    np.savez(tmp_path / NAMES[1], some(40, 1))
    monkeypatch.setattr("diffussm.evaluation.load_inception", lambda *_: Colours())
    words = "evaluate --acceptance {t} --device cpu --out {t}/told.json"
    diffussm(words, 1, t=tmp_path)
    told = json.loads((tmp_path / "told.json").read_text())
    assert not told["accepted"]
    for name, row in told["scores"].items():
        assert row["ours"] == told["evaluation"][name]
        assert row["difference"] == pytest.approx(row["ours"] - ADM_SCORES[name])


@pytest.mark.slow
def test_adms_own_samples_have_the_scores_that_adm_publishes(tmp_path):
    """With DIFFUSSM_ADM, a folder of ADM's files, and DIFFUSSM_INCEPTION, weights."""
    given = [os.environ.get(name) for name in ("DIFFUSSM_ADM", "DIFFUSSM_INCEPTION")]
    if not all(given):
        pytest.skip(
            "DIFFUSSM_ADM and DIFFUSSM_INCEPTION do not say where the files are"
        )
    diffussm("evaluate --acceptance {f} --weights {w}", f=given[0], w=given[1])
