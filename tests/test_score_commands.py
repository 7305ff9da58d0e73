"""Commands that score: evaluate, statistics."""

import json

import numpy as np
import pytest
import torch
from commands import diffussm
from PIL import Image

from diffussm.data import digits
from diffussm.plain_scores import as_images


class Averages:
    """Features that need no download: the mean colour, and four pixels."""

    name, checksum = "averages", "0" * 64

    def __call__(self, images):
        return {
            "pool": images.float().mean((2, 3)),
            "spatial": images[:, :, 1:3, 1:3].float().flatten(1),
            "logits": images.float().mean(3).flatten(1) / 32,
        }


@pytest.fixture
def averages(monkeypatch):
    from diffussm import evaluation, features

    for module in (evaluation, features):
        monkeypatch.setattr(module, "load_inception", lambda *_: Averages())


def test_statistics_and_evaluate_give_scores_that_say_how_they_came_about(
    work, tmp_path, averages
):
    words = (
        "sample --from {w}/digits --count 12 --steps 2 --batch_size 12 --device cpu "
        "--out {t}/"
    )
    diffussm(words + "a.npz", w=work, t=tmp_path)
    diffussm(words + "b.npz --seed 1", w=work, t=tmp_path)
    diffussm("statistics {t}/a.npz {t}/stats.npz --device cpu", t=tmp_path)
    same = (
        "evaluate {t}/a.npz --reference {t}/stats.npz --out {t}/same.json --device cpu"
    )
    assert '"fid"' in diffussm(same, t=tmp_path)
    result = json.loads((tmp_path / "same.json").read_text())
    assert abs(result["fid"]) < 1e-3 and result["precision"] == result["recall"] == 1
    assert result["samples"]["steps"] == 2 and result["samples"]["weights"] == "ema"
    before = (tmp_path / "same.json").read_bytes()
    assert (
        "exists" in diffussm(same, 1, t=tmp_path)
        and (tmp_path / "same.json").read_bytes() == before
    )
    assert "exists" in diffussm("statistics {t}/b.npz {t}/stats.npz", 1, t=tmp_path)
    diffussm(
        "evaluate {t}/a.npz {t}/b.npz --reference {t}/stats.npz --out {t}/both.json "
        "--device cpu",
        t=tmp_path,
    )
    both = json.loads((tmp_path / "both.json").read_text())
    assert both["fid"]["values"][0] == result["fid"] < both["fid"]["values"][1]


def test_a_tree_an_lmdb_and_cropped_images_are_references_alike(
    work, tmp_path, averages
):
    import lmdb

    files = sorted((work / "images").rglob("*.png"))
    with (
        lmdb.open(str(tmp_path / "lmdb"), map_size=1 << 20) as environment,
        environment.begin(write=True) as put,
    ):
        for i, file in enumerate(files):
            put.put(b"%04d" % i, file.read_bytes())
    for name, source in (("tree", work / "images"), ("lmdb", tmp_path / "lmdb")):
        diffussm(
            "statistics {s} {t}/{n}.npz --size 16 --device cpu",
            s=source,
            n=name,
            t=tmp_path,
        )
    tree, lmdb_ = (np.load(tmp_path / f"{name}.npz") for name in ("tree", "lmdb"))
    assert tree["count"] == 12 and np.allclose(tree["mu"], lmdb_["mu"])
    words = (
        "evaluate {w}/images --reference {t}/tree.npz --size 16 --exif_rotate "
        "--device cpu --out {t}/x.json"
    )
    diffussm(words, w=work, t=tmp_path)
    result = json.loads((tmp_path / "x.json").read_text())
    assert abs(result["fid"]) < 1e-3 and "exif_rotate" in json.dumps(result)


def test_the_self_test_passes_and_says_when_it_does_not(monkeypatch):
    from diffussm import metrics

    assert "known answers" in diffussm("evaluate --self-test")
    monkeypatch.setattr(metrics, "frechet_distance", lambda *moments: 1.0)
    assert "wrong here" in diffussm("evaluate --self-test", 1)


def test_a_result_never_takes_the_place_of_the_record_of_a_set(work, tmp_path):
    (tmp_path / "set.npz").write_bytes(b"")
    said = diffussm(
        f"evaluate {tmp_path}/set.npz --reference {tmp_path}/set.npz --out "
        f"{tmp_path}/set.json",
        code=1,
    )
    assert "set.scores.json" in said


def test_pictures_of_an_npz_are_not_turned(tmp_path):
    for command in ("evaluate {0} --reference {0}", "statistics {0} {1}/out.npz"):
        words = command.format(f"{tmp_path}/set.npz", tmp_path)
        said = diffussm(f"{words} --exif_rotate", code=1)
        assert "--exif_rotate would have no effect" in said


def test_without_inception_a_result_names_its_features_and_has_a_floor(tmp_path):
    held_out = as_images(digits("test")[0]).permute(0, 2, 3, 1).numpy()
    noise = np.random.default_rng(0).integers(0, 256, held_out.shape, dtype=np.uint8)
    np.savez(tmp_path / "real.npz", held_out)
    np.savez(tmp_path / "noise.npz", noise)
    words = (
        "evaluate {t}/real.npz {t}/noise.npz --reference digits/train "
        "--held_out digits/test --features pixels --out {t}/x.json"
    )
    said = diffussm(words, t=tmp_path)
    assert '"fid"' not in said.lower()
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["features"]["name"] == "pixels" and result["features"]["sees"]
    assert result["compared"]["images"] == len(held_out)
    real, noise = (row["kid"]["mean"] for row in result["samples"])
    assert real == result["real"]["kid"]["mean"] < noise / 100


def test_copies_among_samples_are_laid_on_a_sheet(tmp_path):
    x = as_images(torch.cat([digits("train")[0][:20], digits("test")[0][:40]]))
    np.savez(tmp_path / "set.npz", x.permute(0, 2, 3, 1).numpy())
    words = (
        "neighbours {t}/set.npz --train digits/train --held_out digits/test --count 60 "
        "--sheet {t}/sheet.png --out {t}/x.json"
    )
    diffussm(words, t=tmp_path)
    told = json.loads((tmp_path / "x.json").read_text())
    assert 0.3 < told["nearer_than_held_out"] < 0.4 and told["images"] == 60
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 5 * 48
    assert "exists" in diffussm(words, 1, t=tmp_path)


SMALL = (
    "--model.d_model 16 --model.n_blocks 1 --model.d_state 4 --batch_size 8 --warmup 0 "
    "--cooldown 0 --log_every 2 --save_every 4 --no_grid --device cpu --timesteps 30"
)


def test_a_run_is_scored_while_it_trains_and_after(tmp_path):
    words = "train digits --out {t}/run --steps 4 --score_every 2 --score_images 8 "
    diffussm(words + SMALL, t=tmp_path)
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(row["held_out_loss"] and row["score_kid_pixels"] for row in rows)
    said = diffussm("show {t}/run", t=tmp_path)
    assert "held_out_train_loss" in said and "score_kid_random_real" in said
    said = diffussm("bound {t}/run --count 8 --steps 5 --device cpu", t=tmp_path)
    told = json.loads(said[said.index("{") : said.rindex("}") + 1])
    assert 0 < told["standard_error"] < told["bits_per_dim"]
    assert (told["images"], told["steps"]) == (8, 5)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--held_out nowhere", "--held_out would have no effect"),
        ("--score_images 3", "--score_images would have no effect"),
        ("--score_every 3", "multiple of log_every=2"),
        ("--score_every 2 --held_out nowhere", "--held_out nowhere"),
    ],
)
def test_scores_that_cannot_be_are_refused_before_anything_is_written(
    words, told, tmp_path
):
    said = diffussm(f"train digits --out {tmp_path}/run {words} {SMALL}", 1)
    assert told in said and not (tmp_path / "run").exists()


REFUSED = [
    ("--features random --weights {t}", "--weights would have no effect"),
    ("--features pixels --device cpu", "--device would have no effect"),
    ("--held_out digits/test", "--held_out would have no effect"),
    ("--features dino", "dino"),
    ("--features pixels --held_out {t}/none", "none"),
]


@pytest.mark.parametrize(("words", "told"), REFUSED)
def test_what_has_no_effect_on_features_is_refused(words, told, tmp_path):
    np.savez(tmp_path / "set.npz", np.zeros((4, 8, 8, 3), np.uint8))
    command = "evaluate {t}/set.npz --reference digits/train "
    assert told in diffussm(command + words, 2 if "dino" in words else 1, t=tmp_path)
