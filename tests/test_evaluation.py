"""Scores can be repeated; nothing is scored that is not what it claims to be."""

import io
import json
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch
from PIL import Image
from scored import Colours, adm_inception_score, batches, odd_images, some

from diffussm import __version__
from diffussm.evaluation import evaluate, versions
from diffussm.features import load_reference, save_statistics, statistics
from diffussm.images import center_crop
from diffussm.metrics import SCORES, precision_recall


def test_folder_npz_and_batches_give_the_same_scores(tmp_path):
    images, others = some(30), some(40, 1)
    (tmp_path / "set").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "set" / f"{i:06d}.png")
    np.savez(tmp_path / "set.npz", images)
    np.savez(tmp_path / "reference.npz", arr_0=others)
    ways = [tmp_path / "set", tmp_path / "set.npz", batches(images)]
    results = [
        evaluate(way, tmp_path / "reference.npz", extractor=Colours(), batch_size=7)
        for way in ways
    ]
    for name in SCORES:
        assert results[0][name] is not None
        assert (
            results[0][name]
            == pytest.approx(results[1][name])
            == pytest.approx(results[2][name])
        )


def test_what_is_hidden_or_broken_does_not_count_and_what_is_broken_is_listed(tmp_path):
    odd_images(tmp_path / "set")
    before = evaluate(tmp_path / "set", tmp_path / "set", extractor=Colours())
    assert before["count"] == 5 and before["samples"]["left_out"]["count"] == 0
    Image.fromarray(some(1, 2, 16)[0]).save(
        tmp_path / "set" / ".ipynb_checkpoints" / "more.png"
    )
    (tmp_path / "set" / "samples.json").write_text("{}")
    again = evaluate(tmp_path / "set", tmp_path / "set", extractor=Colours())
    assert again == before
    (tmp_path / "set" / "broken.png").write_bytes(b"no picture")
    result = evaluate(tmp_path / "set", tmp_path / "set", extractor=Colours())
    assert result["samples"]["images_sha256"] == before["samples"]["images_sha256"]
    assert (
        result["samples"]["left_out"]["count"]
        == 1
        == result["reference"]["left_out"]["count"]
    )
    assert "broken.png" in result["samples"]["left_out"]["first"][0]
    assert any("1 were left out" in note for note in result["notes"])


def test_the_result_says_whether_exif_was_obeyed(tmp_path):
    odd_images(tmp_path / "set")
    plain, turned = (
        evaluate(
            tmp_path / "set", tmp_path / "set", extractor=Colours(), exif_rotate=on
        )
        for on in (False, True)
    )
    assert (
        plain["samples"]["exif_rotate"] is False
        and plain["reference"]["exif_rotate"] is False
    )
    assert (
        turned["samples"]["exif_rotate"] is True
        and turned["reference"]["exif_rotate"] is True
    )
    assert plain["samples"]["images_sha256"] != turned["samples"]["images_sha256"]
    kept = save_statistics(
        tmp_path / "set", tmp_path / "s.npz", extractor=Colours(), exif_rotate=True
    )
    assert (
        evaluate(tmp_path / "set", kept, extractor=Colours())["reference"][
            "exif_rotate"
        ]
        is True
    )


def of_ten_classes(n):
    """Images of which `Colours` is certain: each class has one bright pattern."""
    rng = np.random.default_rng(1)
    prototypes = rng.integers(0, 256, size=(10, 4, 4, 3))
    images = np.repeat(prototypes, n // 10, axis=0) + rng.integers(
        -9, 10, size=(n, 4, 4, 3)
    )
    return images.clip(0, 255).astype(np.uint8)


class Certain(Colours):
    """Colours with logits far apart, so that a part with few classes scores low."""

    def __call__(self, images):
        found = super().__call__(images)
        return found | {"logits": found["pool"] * 60}


def test_the_order_of_files_decides_no_score(tmp_path, monkeypatch):
    monkeypatch.setattr("diffussm.metrics.PART", 10)
    monkeypatch.setattr("diffussm.features.NEIGHBOURS", 20)
    images = of_ten_classes(100)
    names = {
        "sorted": np.arange(100),
        "shuffled": np.random.default_rng(3).permutation(100),
    }
    for name, places in names.items():
        (tmp_path / name).mkdir()
        for place, image in zip(places, images, strict=True):
            Image.fromarray(image).save(tmp_path / name / f"{place:03d}.png")
    np.savez(tmp_path / "reversed.npz", images[::-1])
    results = [
        evaluate(tmp_path / one, tmp_path / two, extractor=Certain(), batch_size=7)
        for one, two in (
            ("sorted", "shuffled"),
            ("shuffled", "reversed.npz"),
            ("reversed.npz", "sorted"),
        )
    ]
    for name in SCORES:
        values = [result[name] for result in results]
        assert values == pytest.approx([values[0]] * 3, rel=1e-5, abs=1e-6), name
    assert (
        len(
            {
                result[side]["images_sha256"]
                for result in results
                for side in ("samples", "reference")
            }
        )
        == 1
    )
    assert (
        0 < results[0]["precision"] < 1
    )  # the score does depend on which images are neighbours
    logits = (
        statistics(tmp_path / "sorted", Certain()).logits.numpy().astype(np.float64)
    )
    in_order = Certain()(torch.from_numpy(images).permute(0, 3, 1, 2))["logits"].numpy()
    assert results[0]["inception_score"] == pytest.approx(
        adm_inception_score(logits, 10), rel=1e-6
    )
    assert (
        adm_inception_score(in_order, 10) < 0.5 * results[0]["inception_score"]
    )  # as files lie: one class each


def test_precision_and_recall_take_so_many_images_of_the_reference(
    tmp_path, monkeypatch
):
    others, ours = some(60, 1), some(30)
    np.savez(tmp_path / "images.npz", others)
    monkeypatch.setattr("diffussm.features.NEIGHBOURS", 20)
    save_statistics(
        tmp_path / "images.npz",
        tmp_path / "statistics.npz",
        extractor=Colours(),
        batch_size=9,
    )
    results = [
        evaluate(batches(ours), tmp_path / name, extractor=Colours())
        for name in ("images.npz", "statistics.npz")
    ]
    whole = statistics(batches(others, 4), Colours()).pool
    expected = precision_recall(whole[:20], statistics(batches(ours), Colours()).pool)
    assert sorted(whole.tolist()) == sorted(
        Colours()(torch.cat(batches(others)))["pool"].float().tolist()
    )
    for result in results:
        assert (result["precision"], result["recall"]) == pytest.approx(expected)
        assert result["protocol"]["precision_recall"]["reference"] == 20
        assert result["reference"]["count"] == 60
    monkeypatch.setattr("diffussm.features.NEIGHBOURS", 10)
    with pytest.raises(ValueError, match="20 images.*make it again"):
        load_reference(tmp_path / "statistics.npz", Colours())


def test_distances_are_computed_where_the_extractor_is(tmp_path, monkeypatch):
    class Elsewhere(Colours):
        device = torch.device("meta")

    seen = []
    monkeypatch.setattr(
        "diffussm.metrics.precision_recall",
        lambda real, fake, k: seen.append((real, fake)) or (0.5, 0.25),
    )
    np.savez(tmp_path / "a.npz", some(20))
    result = evaluate(tmp_path / "a.npz", tmp_path / "a.npz", extractor=Elsewhere())
    assert [x.device.type for x in seen[0]] == ["meta", "meta"] and result[
        "recall"
    ] == 0.25
    assert (
        result["protocol"]["precision_recall"]["distances"] == "torch.float32 on meta"
    )


def test_the_protocol_is_computed_from_what_was_done(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", some(23))
    np.savez(tmp_path / "b.npz", some(40, 1))
    monkeypatch.setattr("diffussm.metrics.PART", 10)
    result = evaluate(
        tmp_path / "a.npz", tmp_path / "b.npz", extractor=Colours(), batch_size=9
    )
    protocol = result["protocol"]
    assert protocol["inception_score"] == {
        "parts": 3,
        "part": 10,
        "last_part": 3,
        "seed": 0,
    }
    assert protocol["precision_recall"] == {
        "k": 3,
        "reference": 40,
        "samples": 23,
        "seed": 0,
        "distances": "torch.float32 on cpu",
    }
    assert (
        protocol["batch_size"] == 9
        and protocol["device"] == "cpu"
        and "crop" not in protocol
    )
    assert any("last part" in note for note in result["notes"])
    assert any("float16" in one for one in protocol["differs_from_adm"])
    few = evaluate(batches(some(2)), tmp_path / "b.npz", extractor=Colours())[
        "protocol"
    ]
    assert "inception_score" not in few and "precision_recall" not in few
    assert not any("float16" in one for one in few["differs_from_adm"])


def test_a_tree_an_lmdb_and_an_npz_are_cropped_alike(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (20 + i % 3, 24, 3), dtype=np.uint8))
        for i in range(12)
    ]
    with (
        lmdb.open(str(tmp_path / "lsun"), map_size=1 << 22) as database,
        database.begin(write=True) as write,
    ):
        for i, picture in enumerate(pictures):
            (tmp_path / "tree" / f"class {i % 2}").mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / "tree" / f"class {i % 2}" / f"{i}.png")
            content = io.BytesIO()
            picture.save(content, "PNG")
            write.put(f"{i:03d}".encode(), content.getvalue())
        write.put(b"bad", b"no picture")
    cropped = [np.array(center_crop(picture, 8)) for picture in pictures]
    np.savez(tmp_path / "cropped.npz", np.stack(cropped))
    expected = evaluate(
        batches(some(11, size=8)), tmp_path / "cropped.npz", extractor=Colours()
    )
    with pytest.raises(ValueError, match="--size"):
        evaluate(batches(some(11, size=8)), tmp_path / "tree", extractor=Colours())
    for name, kind in (("tree", "folder"), ("lsun", "lmdb"), ("lsun/data.mdb", "lmdb")):
        kept = save_statistics(
            tmp_path / name, tmp_path / f"{kind}.npz", extractor=Colours(), size=8
        )
        for reference in (tmp_path / name, kept):
            result = evaluate(
                batches(some(11, size=8)), reference, extractor=Colours(), size=8
            )
            assert (
                result["fid"] == pytest.approx(expected["fid"])
                and result["recall"] == expected["recall"]
            )
            assert (
                result["reference"]["images_sha256"]
                == expected["reference"]["images_sha256"]
            )
            assert result["reference"]["crop"] == 8
            assert result["reference"]["left_out"]["count"] == (kind == "lmdb")
        assert load_reference(tmp_path / name, Colours(), size=8)[1] == kind
    again = evaluate(
        batches(some(11, size=11)),
        tmp_path / "cropped.npz",
        extractor=Colours(),
        size=8,
    )
    assert again["samples"]["image_size"] == [8, 8]
    for reference in ("folder.npz", "adm.npz"):
        found = statistics(tmp_path / "cropped.npz", Colours())
        np.savez(
            tmp_path / "adm.npz",
            arr_0=np.stack(cropped),
            mu=found.mu,
            sigma=found.sigma,
        )
        with pytest.raises(ValueError, match="size is 16, but the reference"):
            evaluate(
                batches(some(11, size=8)),
                tmp_path / reference,
                extractor=Colours(),
                size=16,
            )


def test_sets_that_are_not_there_or_not_alike_are_not_averaged_in_silence(tmp_path):
    class Busy(Colours):
        def __call__(self, images):
            raise AssertionError("work was done before all sets were looked for")

    np.savez(tmp_path / "a.npz", some(30))
    np.savez(tmp_path / "b.npz", some(31, 1))
    with pytest.raises(FileNotFoundError, match="none.npz"):
        evaluate(
            [tmp_path / "a.npz", tmp_path / "none.npz"],
            tmp_path / "a.npz",
            extractor=Busy(),
        )
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluate(tmp_path / "a.npz", tmp_path / "nowhere", extractor=Busy())
    result = evaluate(
        [tmp_path / "a.npz", tmp_path / "b.npz"],
        tmp_path / "a.npz",
        extractor=Colours(),
    )
    assert any("differ in their counts" in note for note in result["notes"])
    assert [one["samples"] for one in result["protocol"]] == [30, 31]
    result = evaluate(
        batches(some(20, size=8)), tmp_path / "a.npz", extractor=Colours()
    )
    assert any(
        "8" in note and "4" in note and "pixels" in note for note in result["notes"]
    )


def test_a_set_against_itself_is_perfect(tmp_path):
    np.savez(tmp_path / "a.npz", some(40))
    result = evaluate(tmp_path / "a.npz", tmp_path / "a.npz", extractor=Colours())
    assert result["fid"] == pytest.approx(0, abs=1e-6) and result[
        "sfid"
    ] == pytest.approx(0, abs=1e-6)
    assert (result["precision"], result["recall"]) == (1, 1)


def test_the_result_says_everything_and_several_seeds_give_a_spread(tmp_path):
    facts = {
        "steps": 250,
        "method": "ddpm",
        "cfg_scale": 1.5,
        "weights": "ema",
        "labels": "balanced",
    }
    for seed in (0, 1, 2):
        np.savez(tmp_path / f"{seed}.npz", some(30, seed))
        (tmp_path / f"{seed}.json").write_text(
            json.dumps({**facts, "seed": seed, "complete": True})
        )
    np.savez(tmp_path / "reference.npz", some(40, 9))
    paths = [tmp_path / f"{seed}.npz" for seed in (0, 1, 2)]
    result = evaluate(paths, tmp_path / "reference.npz", extractor=Colours())
    alone = [
        evaluate(path, tmp_path / "reference.npz", extractor=Colours())["fid"]
        for path in paths
    ]
    assert result["fid"]["mean"] == pytest.approx(np.mean(alone))
    assert result["fid"]["std"] == pytest.approx(np.std(alone, ddof=1))
    assert [s["seed"] for s in result["samples"]] == [0, 1, 2] and result["samples"][0][
        "steps"
    ] == 250
    assert (
        len(result["reference"]["sha256"]) == 64
        and result["extractor"]["name"] == "colours"
    )
    assert result["versions"]["torch"] and json.dumps(result)
    (tmp_path / "0.json").write_text(json.dumps({**facts, "complete": False}))
    with pytest.raises(ValueError, match="not complete"):
        evaluate(paths[0], tmp_path / "reference.npz", extractor=Colours())
    paths[0].unlink()  # while it is drawn there is no file yet
    with pytest.raises(ValueError, match="not complete; finish it with"):
        evaluate(paths[0], tmp_path / "reference.npz", extractor=Colours())


def test_moments_of_an_unknown_extractor_are_noted(tmp_path):
    np.savez(tmp_path / "a.npz", some(40))
    np.savez(tmp_path / "b.npz", some(40, 1))
    save_statistics(tmp_path / "b.npz", tmp_path / "ours.npz", extractor=Colours())
    with np.load(tmp_path / "ours.npz") as ours:
        np.savez(tmp_path / "theirs.npz", mu=ours["mu"], sigma=ours["sigma"])
    notes = [
        evaluate(tmp_path / "a.npz", tmp_path / name, extractor=Colours())["notes"]
        for name in ("ours.npz", "theirs.npz")
    ]
    assert notes[0] == [] and len(notes[1]) == 1
    assert "not known by which network" in notes[1][0] and "colours" in notes[1][0]


def test_too_few_images_are_noted(tmp_path):
    np.savez(tmp_path / "a.npz", some(8))
    result = evaluate(tmp_path / "a.npz", tmp_path / "a.npz", extractor=Colours())
    assert (
        "8 images for 10 features" in result["notes"][0]
        and result["inception_score"] is None
    )
    np.savez(tmp_path / "b.npz", some(11))
    notes = evaluate(tmp_path / "b.npz", tmp_path / "a.npz", extractor=Colours())[
        "notes"
    ]
    assert len(notes) == 1 and "8 images of the reference for 10" in notes[0]
    b, many = tmp_path / "b.npz", tmp_path / "c.npz"
    assert evaluate(b, b, extractor=Colours())["notes"] == []
    for count, told in ((100, ["fid_infinity"]), (110, [])):
        np.savez(many, some(count))
        found = evaluate(many, many, extractor=Colours(), extrapolate=True)["notes"]
        assert [note.partition(":")[0] for note in found] == told


def test_scores_without_weights_say_where_to_get_them(tmp_path):
    np.savez(tmp_path / "a.npz", some(20))
    with pytest.raises(ValueError, match="nothing is downloaded silently"):
        evaluate(tmp_path / "a.npz", tmp_path / "a.npz")


def test_the_version_is_known_where_nothing_is_installed(monkeypatch):
    def gone(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("diffussm.evaluation.version", gone)
    known = versions()
    assert known.pop("diffussm") == __version__ and set(known.values()) == {None}
