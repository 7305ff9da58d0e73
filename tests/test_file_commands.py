"""Commands from files to files: vae, encode, evaluate, statistics."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import diffussm

from diffussm import file_commands
from diffussm.autoencoder import load_vae


def test_encode_is_resumed_and_its_store_is_read(work, tmp_path):
    words = (
        "encode {w}/images {t}/store --vae {w}/vae --size 16 --shard_size 8 --device "
        "cpu"
    )
    diffussm(words, w=work, t=tmp_path)
    first = tmp_path / "store" / "shard-00000.npy"
    before, content = (
        first.stat().st_mtime_ns,
        (tmp_path / "store" / "shard-00001.npy").read_bytes(),
    )
    (tmp_path / "store" / "shard-00001.npy").unlink()
    said = diffussm(words + " --verify", w=work, t=tmp_path)
    assert "12 images in 2 classes" in said and "as it was written" in said
    assert first.stat().st_mtime_ns == before
    assert (tmp_path / "store" / "shard-00001.npy").read_bytes() == content


@pytest.mark.slow
def test_encode_under_torchrun_gives_the_same_bytes(work, tmp_path):
    torchrun = (
        "-m torch.distributed.run --standalone --nproc_per_node 2 -m diffussm".split()
    )
    words = (
        f"encode {work}/images {tmp_path}/store --vae {work}/vae --size 16 "
        "--shard_size 8 --device cpu"
    )
    environment = os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads())
    }  # it decides the last bits
    command = [sys.executable, *torchrun, *words.split()]
    done = subprocess.run(command, capture_output=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    for shard in sorted((work / "latents").glob("*.npy")):
        assert (tmp_path / "store" / shard.name).read_bytes() == shard.read_bytes()


def test_verify_names_a_flipped_byte(work, tmp_path):
    words = "encode {w}/images {t}/store --vae {w}/vae --size 16 --device cpu"
    diffussm(words, w=work, t=tmp_path)
    shard = tmp_path / "store" / "shard-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert "has changed" in diffussm(words + " --verify", 1, w=work, t=tmp_path)


def test_the_vae_command_writes_what_load_vae_reads(work):
    vae = load_vae(work / "vae")
    assert vae.config.scaling_factor > 0 and not list(work.glob(".*.tmp"))


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


def test_an_lmdb_has_no_classes_to_leave_out(work, tmp_path):
    import lmdb

    with (
        lmdb.open(str(tmp_path / "lmdb"), map_size=1 << 20) as environment,
        environment.begin(write=True) as put,
    ):
        for i in range(3):
            put.put(b"%d" % i, (work / "images" / "cats" / f"{i}.png").read_bytes())
    words = "encode {t}/lmdb {t}/store --vae {w}/vae --size 16 --device cpu"
    assert "--no_classes" in diffussm(words + " --no_classes", 1, w=work, t=tmp_path)
    assert "3 images in 0 classes" in diffussm(
        words + " --workers 1", w=work, t=tmp_path
    )


def test_encode_names_what_it_skipped(work, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    for i in range(2):
        (tmp_path / "images" / f"{i}.png").write_bytes(
            (work / "images" / "cats" / f"{i}.png").read_bytes()
        )
    said = diffussm(
        "encode {t}/images {t}/s --vae {w}/vae --size 16 --device cpu",
        w=work,
        t=tmp_path,
    )
    assert "1 skipped" in said and "broken.png" in said


def test_many_skipped_images_are_counted_after_the_first(capsys):
    file_commands.tell_skipped(
        [(f"{i}.png", "broken") for i in range(file_commands.SHOWN + 5)]
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == file_commands.SHOWN + 1 and "5 more" in lines[-1]


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
