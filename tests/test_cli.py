"""The command line: exit codes, files, and sentences. Most of it runs in this process."""

import contextlib
import io
import json
import logging
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffussm import cli
from diffussm.autoencoder import load_vae
from diffussm.data import TensorData, batch_indices, digits
from diffussm.folders import ImageFolder
from diffussm.images import BadImage
from diffussm.latents import LatentStore, read_manifest, verify_store, with_checksum
from diffussm.model import PRESETS, DiffuSSM, DiffuSSMConfig
from diffussm.training import (
    RECIPES,
    Execution,
    Recipe,
    World,
    diffusion_of,
    flat,
    from_flat,
)

SMALL = (
    "--model.d_model 16 --model.n_blocks 1 --model.d_state 4 --batch_size 8 "
    "--cooldown 0 --warmup 0 --log_every 4 --device cpu"
)


def diffussm(command, code=0, **names):
    """Run a command in this process; what it said on both streams. The exit code must be among `code`."""
    out, err = io.StringIO(), io.StringIO()
    words = [word.format(**names) for word in command.split()]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        got = cli.main(words)
    said = out.getvalue() + err.getvalue()
    assert got in (code if isinstance(code, tuple) else (code,)), said
    assert "Traceback" not in said
    return said


def shell(*arguments, cwd=None, **environment):
    command = [sys.executable, "-m", "diffussm", *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        env=os.environ | environment,
    )


def listing(*folders):
    return {
        path: path.stat().st_mtime_ns
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Images, an autoencoder, latents, and two runs: digits and latents; all made by the commands."""
    work = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (work / "images" / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(work / "images" / name / f"{i}.png")
    diffussm("vae {w}/images {w}/vae --size 16 --steps 2 --batch_size 2", w=work)
    diffussm(
        "vae {w}/images {w}/other --size 16 --steps 2 --batch_size 2 --seed 1", w=work
    )
    diffussm(
        "encode {w}/images {w}/latents --vae {w}/vae --size 16 --shard_size 8 --device cpu --verify",
        w=work,
    )
    (work / "tiny.yaml").write_text(
        "model: {input_size: 4, num_classes: 2, d_model: 16, n_blocks: 1, d_state: 4}\n"
        "steps: 4\nbatch_size: 4\nflip: true\nlog_every: 2\nsave_every: 4\n"
    )
    diffussm(
        "train {w}/tiny.yaml --data {w}/latents --out {w}/latent-run --vae {w}/vae --sample_every 4 "
        "--tensorboard --device cpu",
        w=work,
    )
    diffussm(f"train digits --out {work}/digits --steps 4 {SMALL}")
    return work


# The recipes


def test_the_shipped_digits_recipe_is_the_one_of_chapter_9():
    assert cli.read_recipe("digits") == (RECIPES["digits"], Execution(save_every=500))


@pytest.mark.parametrize("name", cli.recipe_files())
def test_every_recipe_is_read_and_its_model_is_a_preset(name):
    config, _ = cli.read_recipe(name)
    presets = {
        "imagenet256": ("DiffuSSM-XL", 32, 1000),
        "imagenet256-p2": ("DiffuSSM-XL/2", 32, 1000),
        "imagenet512": ("DiffuSSM-XL", 64, 1000),
        "imagenet512-p2": ("DiffuSSM-XL/2", 64, 1000),
        "church256": ("DiffuSSM-XL", 32, 0),
        "bedroom256": ("DiffuSSM-XL", 32, 0),
    }
    if name in presets:
        preset, size, classes = presets[name]
        dropout = 0.1 if classes else 0.0
        assert config.model == DiffuSSMConfig(
            **PRESETS[preset],
            input_size=size,
            num_classes=classes,
            label_dropout=dropout,
        )
    elif name.endswith("-m1"):
        assert config.model == replace(
            cli.read_recipe(name[:-3])[0].model, downsample=1
        )
    elif name != "openmoji":
        assert config.model == DiffuSSMConfig(
            **PRESETS["digits" if name == "digits" else "emoji"]
        )
    if config.model.d_model == 1152:  # the paper's appendix
        paper = {
            "batch_size": 256,
            "lr": 1e-4,
            "weight_decay": 0.0,
            "ema_decay": 0.9999,
            "timesteps": 1000,
        }
        assert {key: getattr(config, key) for key in paper} == paper
        assert (
            config.warmup == config.cooldown == 0
            and config.flip
            and config.precision == "bf16"
        )
        assert "paper" in cli.recipe_files()[name].read_text()


def test_the_lengths_are_those_of_table_1():
    images = {
        name: (r := cli.read_recipe(name)[0]).steps * r.batch_size
        for name in cli.recipe_files()
    }
    assert (
        round(images["imagenet256"] / 1e6) == 550
        and round(images["imagenet512"] / 1e6) == 192
    )


@pytest.mark.parametrize("name", cli.recipe_files())
def test_every_recipe_fits_eight_gpus_of_80_gb(name):
    assert cli.memory_needed(*cli.read_recipe(name), 8)["total"] < 80e9


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {}\nlr: 1e-4", "1.0e-4"),
        ("model: {}\nstepz: 3", "stepz"),
        ("model: {d_mode: 3}", "d_mode"),
        ("steps: 3", "model"),
        ("model: {}\nsteps: 3.5", "expected int"),
        ("model: {}\nsteps: yes", "expected int"),
        ("model: {}\nflip: 1", "expected bool"),
        ("model: {}\ndata: 3", "expected str"),
        ("a: &a [1]\nb: *a", "alias"),
        ("model: {d_model: 3, d_state: 3}", "d_state"),
        ("- 1", "no recipe"),
        ("", "no recipe"),
        ("{", "YAML"),
        ("!!python/object/apply:os.system [echo]", "YAML"),
        ("model: {}\nlr: .nan", "lr"),
        ("model: 3", "mapping"),
        ("model: {}\nkeep: 1.5", "keep"),
        ("model: {}\nkeep: null", "keep"),
        ("model: {}\nkeep: [soon]", "keep"),
        ("1: 2", "no recipe"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(tmp_path, text, said):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        cli.read_recipe(str(file))


# The commands


def test_train_leaves_a_log_checkpoints_and_a_picture(work):
    run = work / "digits"
    assert [
        json.loads(line)["step"]
        for line in (run / "log.jsonl").read_text().splitlines()
    ] == [4]
    assert (
        run / "checkpoints" / "step_00000004" / "ema" / "model.safetensors"
    ).is_file()
    assert np.asarray(Image.open(run / "samples.png")).shape == (10 * 52, 8 * 52)


def test_training_on_latents_draws_decoded_pictures_and_remembers_the_autoencoder(work):
    run = work / "latent-run"
    for picture in (run / "samples.png", run / "samples" / "step_00000004.png"):
        assert np.asarray(Image.open(picture)).shape == (
            2 * 52,
            8 * 52,
            3,
        )  # 16 pixels, three times as large
    assert (
        json.loads((run / "vae.json").read_text()) == LatentStore(work / "latents").vae
    )
    assert list((run / "tensorboard").glob("events.*"))


def test_training_says_how_large_how_fast_and_how_long(tmp_path):
    said = diffussm(f"train digits --out {tmp_path}/run --steps 4 --no_grid {SMALL}")
    for words in (
        "million parameters",
        "dynamics",
        "images/s",
        " s left",
        "4 steps done",
    ):
        assert words in said


def test_a_step_that_was_left_out_is_said_and_reaches_the_board_as_numbers(
    tmp_path, monkeypatch
):
    class TooLarge(TensorData):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return (
                image + 1e30
                if index == int(batch_indices(len(self), 8, 1, 0)[0])
                else image
            ), label

    seen = []
    board = SimpleNamespace(
        add_scalar=lambda name, value, step: seen.append(float(value)),
        close=lambda: None,
    )
    monkeypatch.setattr(cli, "_tensorboard", lambda: lambda folder: board)
    monkeypatch.setattr(cli, "open_data", lambda config: TooLarge(*digits("train")))
    said = diffussm(
        f"train digits --out {tmp_path}/run --steps 3 --no_grid --tensorboard {SMALL} --log_every 1"
    )
    assert "step 2 of 3: loss not finite" in said and len(seen) > 20


def test_the_same_command_resumes(work, tmp_path):
    out = tmp_path / "run"
    diffussm(f"train digits --out {out} --steps 4 --no_grid {SMALL}")
    diffussm(f"train digits --out {out} --steps 8 --no_grid {SMALL}")
    assert [
        json.loads(line)["step"]
        for line in (out / "log.jsonl").read_text().splitlines()
    ] == [4, 8]


def test_options_come_from_a_yaml_file_and_are_overruled_by_words(work, tmp_path):
    words = "train {w}/tiny.yaml --data {w}/latents --out {t}/run --batch_size 2 --device cpu --no_grid"
    diffussm(words, w=work, t=tmp_path)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]
    assert (stored["steps"], stored["model"]["d_model"], stored["batch_size"]) == (
        4,
        16,
        2,
    )
    (tmp_path / "part.yaml").write_text("steps: 2\nmodel:\n  d_model: 8\n")
    diffussm(
        words.replace("run", "run2") + " --config {t}/part.yaml", w=work, t=tmp_path
    )
    stored = json.loads((tmp_path / "run2" / "config.json").read_text())["recipe"]
    assert (
        stored["steps"],
        stored["model"]["d_model"],
        stored["model"]["num_classes"],
    ) == (2, 8, 2)


def test_training_takes_an_image_folder_without_classes(work, tmp_path):
    (tmp_path / "pixels.yaml").write_text(
        "model: {input_size: 8, in_channels: 3, num_classes: 0, d_model: 16, n_blocks: 1, d_state: 4}\n"
        "steps: 2\nbatch_size: 4\n"
    )
    words = "train {t}/pixels.yaml --data {w}/images --out {t}/run --device cpu"
    diffussm(words, w=work, t=tmp_path)
    assert np.asarray(Image.open(tmp_path / "run" / "samples.png")).shape == (
        52,
        8 * 52,
        3,
    )


def test_encode_is_resumed_and_its_store_is_read(work, tmp_path):
    words = "encode {w}/images {t}/store --vae {w}/vae --size 16 --shard_size 8 --device cpu"
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


def test_encode_under_torchrun_gives_the_same_bytes(work, tmp_path):
    torchrun = (
        "-m torch.distributed.run --standalone --nproc_per_node 2 -m diffussm".split()
    )
    words = f"encode {work}/images {tmp_path}/store --vae {work}/vae --size 16 --shard_size 8 --device cpu"
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


def test_sample_draws_a_row_per_class(work, tmp_path):
    words = "sample --from {w}/digits --classes 3,7 --per_class 3 --steps 4 --device cpu --grid {t}/"
    for name in ("first.png", "again.png", "other.png --seed 1"):
        diffussm(words + name, w=work, t=tmp_path)
    first, again, other = (
        (tmp_path / f"{name}.png").read_bytes() for name in ("first", "again", "other")
    )
    assert np.asarray(Image.open(tmp_path / "first.png")).shape == (2 * 52, 3 * 52)
    assert first == again != other
    assert "exists" in diffussm(words + "first.png", 1, w=work, t=tmp_path)
    assert (tmp_path / "first.png").read_bytes() == first
    diffussm(words + "first.png --overwrite --seed 1", w=work, t=tmp_path)
    assert (tmp_path / "first.png").read_bytes() == other


def test_sample_writes_a_set_of_decoded_images(work, tmp_path):
    words = (
        "sample --from {w}/latent-run --vae {w}/vae --preset paper-fid-unguided --count 6 --steps 2 "
        "--batch_size 4 --device cpu --out {t}/"
    )
    diffussm(words + "set.npz", w=work, t=tmp_path)
    with np.load(tmp_path / "set.npz", allow_pickle=False) as made:
        assert made["arr_0"].shape == (6, 16, 16, 3)
        images, labels = made["arr_0"], made["arr_1"].tolist()
    how = json.loads((tmp_path / "set.json").read_text())
    made_by = LatentStore(work / "latents").vae
    assert how["cfg_scale"] == 1.0
    assert how["vae"] == {
        "name": str(work / "vae"),
        "encoder_sha256": made_by["encoder_sha256"],
        "decoder_sha256": made_by["decoder_sha256"],
    }
    diffussm(words + "folder", w=work, t=tmp_path)
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "folder" / "000003.png")), images[3]
    )
    assert (
        list(json.loads((tmp_path / "folder" / "labels.json").read_text()).values())
        == labels
    )


def test_the_vae_command_writes_what_load_vae_reads(work):
    vae = load_vae(work / "vae")
    assert vae.config.scaling_factor > 0 and not list(work.glob(".*.tmp"))


class Averages:
    """Features that need no download: the mean colour, and four pixels; `diffussm.evaluation.Extractor`."""

    name, checksum = "averages", "0" * 64

    def __call__(self, images):
        return {
            "pool": images.float().mean((2, 3)),
            "spatial": images[:, :, 1:3, 1:3].float().flatten(1),
            "logits": images.float().mean(3).flatten(1) / 32,
        }


@pytest.fixture
def averages(monkeypatch):
    from diffussm import evaluation

    monkeypatch.setattr(evaluation, "_inception", lambda weights, device: Averages())


def test_statistics_and_evaluate_give_scores_that_say_how_they_came_about(
    work, tmp_path, averages
):
    words = "sample --from {w}/digits --count 12 --steps 2 --batch_size 12 --device cpu --out {t}/"
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
        "evaluate {t}/a.npz {t}/b.npz --reference {t}/stats.npz --out {t}/both.json --device cpu",
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
    words = "evaluate {w}/images --reference {t}/tree.npz --size 16 --exif_rotate --device cpu --out {t}/x.json"
    diffussm(words, w=work, t=tmp_path)
    result = json.loads((tmp_path / "x.json").read_text())
    assert abs(result["fid"]) < 1e-3 and "exif_rotate" in json.dumps(result)


def test_the_self_test_passes_and_says_when_it_does_not(monkeypatch):
    from diffussm import metrics

    assert "known answers" in diffussm("evaluate --self-test")
    monkeypatch.setattr(metrics, "frechet_distance", lambda *moments: 1.0)
    assert "wrong here" in diffussm("evaluate --self-test", 1)


# Mistakes

MISTAKES = [
    ("dream", "no command 'dream'"),
    (
        "sample --from {w}/digits --classes eleven --grid {t}/x.png",
        "'eleven' is no class",
    ),
    ("sample --from {w}/digits --classes 10 --grid {t}/x.png", "'10' is no class"),
    ("sample --from {t}/nowhere --grid {t}/x.png", "not a training run"),
    ("sample --from {w}/digits --grid {t}/x.jpg", "ends in .png"),
    ("sample --from {w}/digits --grid {t}/no/such/folder/x.png", "does not exist"),
    ("sample --from {w}/digits --grid {t}/x.png --per_class 0", "at least one"),
    ("sample --from {w}/digits --grid {t}/x.png --steps 0", "steps"),
    ("sample --from {w}/digits --grid {t}/x.png --steps many", "steps"),
    ("sample --from {w}/digits --grid {t}/x.png --method euler", "ddim"),
    ("sample --from {w}/digits --grid {t}/x.png --preset ugly", "pretty"),
    ("sample --from {w}/digits --grid {t}/x.png --vae {w}/vae", "pixels"),
    ("sample --from {w}/digits --grid {t}/x.png --out {t}/y", "either"),
    ("sample --from {w}/digits --grid {t}/x.png --device quantum", "quantum"),
    ("sample --from {w}/digits", "either"),
    ("sample --from {w}/latent-run --grid {t}/x.png", "--vae"),
    (
        "sample --from {w}/latent-run --out {t}/y --vae {w}/other",
        "made by the encoder of",
    ),
    ("sample --from {w}/latent-run --out {t}/y --vae {t}/nowhere", "nowhere"),
    ("sample --from {w}/digits --out {w}/images --count 3", "no set of samples"),
    ("sample --grid {t}/x.png", "from"),
    ("train", "name what to train"),
    ("train --out {t}/new digits", "name what to train"),
    ("train digits --out {t}/new --lr 2", "learning rate"),
    ("train digits --out {t}/new --model.d_state 3", "3"),
    ("train digits --out {t}/new --model.d_mode 3", "d_mode"),
    ("train digits --out {t}/new --model.downsample 3", "3"),
    ("train digits --out {t}/new --stepz 3", "stepz"),
    ("train digits --out {t}/new --data {t}/nowhere", "nowhere"),
    ("train digits --out {t}/new --data {w}/images", "the model takes"),
    ("train digits --out {t}/new --micro_batch 5", "micro_batch"),
    ("train digits --out {t}/new --batch_size 100000", "batch_size"),
    ("train cats --out {t}/new", "digits"),
    ("train {w}/images --out {t}/new", "no recipe"),
    ("train {w}/vae/config.json --out {t}/new", "config.json"),
    ("train digits", "out"),
    ("train digits --out {t}/new --convolution fast", "convolution"),
    ("train digits --out {t}/new --keep soon", "keep"),
    ("sample --from {w}/digits --grid {t}/x.png --step 3", "step 3"),
    ("evaluate {w}/images --self_test", "alone"),
    ("statistics {w}/images {t}/x.npz --size 0", "at least 1"),
    ("encode {w}/images {t}/new --vae {w}/vae --size 16 --workers 0", "at least 1"),
    ("train digits --out {w}/digits --lr 0.5", "holds another run"),
    ("train digits --out {w}/images", "holds no training run"),
    ("train imagenet256 --out {t}/new", "--data"),
    ("train imagenet256 --out {t}/new --data {w}/images", "diffussm encode"),
    ("train imagenet256 --out {t}/new --data {w}/latents", "the model takes"),
    ("train {w}/tiny.yaml --out {t}/new --data {w}/latents --sample_every 2", "--vae"),
    (
        "train {w}/tiny.yaml --out {t}/new --data {w}/latents --vae {w}/other",
        "made by the encoder of",
    ),
    (
        "train {w}/tiny.yaml --out {t}/new --data {w}/latents --model.num_classes 3",
        "classes",
    ),
    ("encode {w}/images {w}/latents --vae {w}/vae --size 8", "other latents"),
    (
        "encode {w}/images {w}/latents --vae {w}/other --size 16 --shard_size 8",
        "other latents",
    ),
    ("encode {w}/images {w}/vae --vae {w}/vae --size 16", "holds no latents"),
    ("encode {w}/images {t}/new --vae {w}/vae --size 15", "multiples of 4"),
    ("encode {w}/images {t}/new --vae {w}/vae --size 0", "at least 1"),
    ("encode {w}/images {t}/new --vae {w}/images --size 16", "config.json"),
    ("encode {w}/images {t}/new --vae {t}/nowhere --size 16", "nowhere"),
    ("encode {t}/nowhere {t}/new --vae {w}/vae --size 16", "nowhere"),
    ("encode {w}/latents {t}/new --vae {w}/vae --size 16", "no images"),
    ("encode {w}/images {t}/new --size 16", "vae"),
    ("vae {w}/images {w}/vae --size 16", "exists"),
    ("vae {w}/images {t}/new --size 15 --steps 1", "multiple of"),
    ("vae {w}/images {t}/new --size 16 --steps 0", "at least 1"),
    ("vae {t}/nowhere {t}/new", "nowhere"),
    ("evaluate {w}/images", "--reference"),
    ("evaluate {w}/images --reference {w}/images --out {w}/tiny.yaml", ".json"),
    (
        "evaluate {w}/images --reference {w}/images --out {w}/digits/config.json",
        "exists",
    ),
    (
        "evaluate {w}/images --reference {w}/images --out {t}/no/x.json",
        "does not exist",
    ),
    ("statistics {w}/images {t}/x.csv", ".npz"),
    ("statistics {w}/images {t}/no/x.npz", "does not exist"),
    ("evaluate {w}/images --reference {w}/images", "--weights"),
    (
        "evaluate {w}/images --reference {w}/images --weights {t}/none --out {t}/x.json",
        "does not exist",
    ),
    (
        "evaluate {w}/images --reference {w}/images --weights {w}/tiny.yaml --out {t}/x.json",
        "tiny.yaml",
    ),
    ("statistics {w}/images {t}/x.npz", "--weights"),
    ("doctor cats", "no recipe"),
    ("doctor digits --limit 0", "--limit"),
    ("doctor", "recipe"),
]


@pytest.mark.parametrize(("command", "said"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_gets_a_sentence_and_writes_nothing(
    work, tmp_path, monkeypatch, command, said
):
    before = listing(work)
    monkeypatch.chdir(tmp_path)
    assert said in diffussm(command, (1, 2), w=work, t=tmp_path)
    assert not list(tmp_path.iterdir()) and listing(work) == before


def test_the_shell_sees_the_same_sentence_and_exit_code(tmp_path):
    done = shell("train", "digits", "--out", "new", "--model.d_mode", "3", cwd=tmp_path)
    assert done.returncode in (1, 2) and "d_mode" in done.stderr and not done.stdout
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_a_bug_still_shows_its_traceback(monkeypatch):
    def broken(arguments):
        """broken"""
        raise TypeError("a bug")

    monkeypatch.setitem(cli.COMMANDS, "train", broken)
    with pytest.raises(TypeError):
        cli.main(["train"])


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError("no room"), 1, "no room"),
        (FloatingPointError("diverged"), 1, "diverged"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "--micro_batch"),
    ],
)
def test_exit_codes_are_those_of_the_table(monkeypatch, error, code, said):
    def stopped(arguments):
        """stopped"""
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", stopped)
    assert said in diffussm("train", code)


def test_a_later_process_says_which_it_is(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert "[process 3]" in diffussm("train", 1)


def test_help_lists_the_commands_and_does_not_wait_for_torch():
    said = diffussm("--help")
    for name in (
        "vae",
        "encode",
        "doctor",
        "train",
        "sample",
        "evaluate",
        "statistics",
    ):
        assert name in said
    code = "import sys; from diffussm.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def test_import_pulls_in_no_heavy_library():
    heavy = (
        "diffusers",
        "sklearn",
        "matplotlib",
        "torchvision",
        "torch_fidelity",
        "tensorboard",
        "lmdb",
    )
    code = (
        "import sys, torch, diffussm, diffussm.cli; from diffussm import DiffuSSM, sample, train; "
        f"assert not [m for m in {heavy} if m in sys.modules]"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


# What the commands say, refuse and keep


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run on pixels without classes, of two steps and 30 timesteps; both steps are kept."""
    folder = tmp_path_factory.mktemp("plain")
    rng = np.random.default_rng(1)
    (folder / "images").mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(
            folder / "images" / f"{i}.png"
        )
    (folder / "plain.yaml").write_text(
        "model: {input_size: 8, in_channels: 3, num_classes: 0, d_model: 16, n_blocks: 1, d_state: 4}\n"
        "steps: 3\nbatch_size: 4\ntimesteps: 30\nlr: 0.1\n"
    )
    words = "train {f}/plain.yaml --data {f}/images --out {f}/run --device cpu --sample_every 1 --keep_last 1"
    said = diffussm(words + " --keep 1,2", f=folder)
    return SimpleNamespace(folder=folder, run=folder / "run", said=said)


def grid(run, path, options, code=0):
    """A grid of two images for each class: its bytes, or what was said when it was refused."""
    said = diffussm(
        f"sample --from {run} --per_class 2 --device cpu --grid {path} --overwrite {options}",
        code,
    )
    return path.read_bytes() if code == 0 else said


IDLE = [
    ("sample --from {w}/digits --grid {t}/x.png --count 3", "--count"),
    (
        "sample --from {w}/digits --grid {t}/x.png --labels random --batch_size=3",
        "--labels and --batch_size",
    ),
    ("sample --from {w}/digits --out {t}/x --per_class 3", "--per_class"),
    ("sample --from {w}/digits --out {t}/x --overwrite", "--overwrite"),
    (
        "sample --from {w}/digits --out {t}/x --cfg_scale 1 --guidance_channels 1",
        "--guidance_channels",
    ),
    (
        "sample --from {w}/digits --grid {t}/x.png --guidance_channels 3",
        "--guidance_channels 3",
    ),
    ("sample --from {p}/run --grid {t}/x.png --classes 1", "--classes"),
    (
        "sample --from {p}/run --out {t}/x --cfg_scale 2 --labels random",
        "--labels and --cfg_scale",
    ),
    ("train digits --out {t}/x --exif_rotate true", "--exif_rotate"),
    ("train digits --out {t}/x --workers 2", "--workers"),
    ("train digits --out {t}/x --vae {w}/vae", "--vae"),
    ("train {w}/tiny.yaml --data {w}/latents --out {t}/x --workers 2", "--workers"),
    (
        "train {w}/tiny.yaml --data {w}/latents --out {t}/x --vae {w}/vae --no_grid",
        "--vae",
    ),
    ("train {p}/plain.yaml --data {p}/images --out {t}/x --vae {w}/vae", "--vae"),
    ("doctor digits --vae {w}/vae", "--vae"),
    ("evaluate --self_test --size 8 --exif_rotate", "--size and --exif_rotate"),
    ("evaluate --self_test --weights {w}/tiny.yaml", "--weights"),
]


@pytest.mark.parametrize(("command", "names"), IDLE, ids=range(len(IDLE)))
def test_an_option_that_would_change_nothing_is_refused_by_name(
    work, plain, tmp_path, command, names
):
    said = diffussm(command, 1, w=work, p=plain.folder, t=tmp_path)
    assert names in said.splitlines()[-1] and not list(tmp_path.iterdir())


def test_defaults_recipes_and_presets_are_not_taken_for_options_that_were_given(
    work, tmp_path
):
    """paper-fid guides three channels, of which digits have one; the recipe may name workers."""
    (tmp_path / "recipe.yaml").write_text(
        (work / "tiny.yaml").read_text() + "workers: 2\n"
    )
    diffussm(
        "train {t}/recipe.yaml --data {w}/latents --out {t}/run --no_grid --device cpu",
        w=work,
        t=tmp_path,
    )
    grid(
        work / "digits", tmp_path / "x.png", "--preset paper-fid --steps 2 --classes 1"
    )


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


def test_a_set_of_one_class_holds_that_class_and_says_so(work, tmp_path):
    words = f"sample --from {work}/digits --count 5 --steps 2 --device cpu --classes 3 --out {tmp_path}/threes"
    diffussm(words)
    labels = json.loads((tmp_path / "threes" / "labels.json").read_text())
    assert labels == {f"{i:06d}.png": 3 for i in range(5)}
    assert json.loads((tmp_path / "threes" / "samples.json").read_text())[
        "classes"
    ] == [3]


def test_a_grid_honours_precision_and_clipping(work, tmp_path):
    drawn = {
        options: grid(
            work / "digits", tmp_path / "x.png", f"--steps 3 --classes 1 {options}"
        )
        for options in (
            "",
            "--precision bf16",
            "--clip_denoised false",
            "--clip_denoised true",
        )
    }
    assert drawn[""] == drawn["--clip_denoised true"]  # pixels are clipped
    assert len(set(drawn.values())) == 3


def test_nobody_draws_more_images_than_were_learnt_from_unless_they_say_so(
    work, tmp_path
):
    said = diffussm(f"sample --from {work}/digits --device cpu --out {tmp_path}/x", 1)
    assert (
        "50,000" in said
        and "1,438" in said
        and "--count" in said
        and not list(tmp_path.iterdir())
    )
    # 3 batches of 4, 2 steps, with and without the class; more images than the 12 that the run has seen
    said = diffussm(
        f"sample --from {work}/digits --device cpu --out {tmp_path}/x --count 9 --batch_size 4 --steps 2"
    )
    assert (
        "9 images in 3 batches of 4, 2 steps" in said
        and f" {12 * 2 * 2} passes" in said
    )


def test_samples_come_from_the_step_that_is_asked_for(plain, tmp_path):
    kept = sorted(path.name for path in (plain.run / "checkpoints").iterdir())
    assert kept == [f"step_{step:08d}" for step in (1, 2, 3)]
    newest = grid(plain.run, tmp_path / "x.png", "")
    assert (
        newest
        == grid(plain.run, tmp_path / "x.png", "--step 3")
        != grid(plain.run, tmp_path / "x.png", "--step 1")
    )
    words = f"sample --from {plain.run} --count 2 --steps 2 --device cpu --out {tmp_path}/set --step 2"
    diffussm(words)
    assert (
        json.loads((tmp_path / "set" / "samples.json").read_text())["checkpoint"]
        == "step_00000002"
    )
    assert "there are 1, 2, 3" in grid(
        plain.run, tmp_path / "y.png", "--step 7", code=1
    )


def test_a_schedule_of_30_timesteps_is_drawn_from_in_training_and_after(
    plain, tmp_path
):
    assert (plain.run / "samples.png").is_file() and len(
        list((plain.run / "samples").iterdir())
    ) == 3
    assert grid(plain.run, tmp_path / "x.png", "") == grid(
        plain.run, tmp_path / "x.png", "--steps 30"
    )
    assert "30 timesteps" in grid(plain.run, tmp_path / "y.png", "--steps 31", code=1)
    # a set is of a protocol, so its steps are not lowered without a word
    said = diffussm(
        f"sample --from {plain.run} --count 2 --device cpu --out {tmp_path}/set", 1
    )
    assert "--steps 250" in said and not (tmp_path / "set").exists()


def test_another_decoder_of_the_same_encoder_may_decode_and_is_recorded(work, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(work / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"] = tensors["decoder.conv_out.bias"] + 0.5
    save_file(tensors, file)
    words = "sample --from {w}/latent-run --count 2 --steps 2 --device cpu --vae {v} --out {t}/"
    diffussm(words + "mine.npz", w=work, v=work / "vae", t=tmp_path)
    diffussm(words + "other.npz", w=work, v=tmp_path / "vae", t=tmp_path)
    mine, other = (
        json.loads((tmp_path / f"{name}.json").read_text())["vae"]
        for name in ("mine", "other")
    )
    assert mine["encoder_sha256"] == other["encoder_sha256"]
    assert mine["decoder_sha256"] != other["decoder_sha256"]
    images = [
        np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int)
        for name in ("mine", "other")
    ]
    assert (images[1] - images[0]).mean() > 20


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
    cli._tell_skipped([(f"{i}.png", "broken") for i in range(cli.TOLD + 5)])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == cli.TOLD + 1 and "5 more" in lines[-1]


def interrupting(*_, **__):
    raise KeyboardInterrupt


INTERRUPTED = [
    (
        "diffussm.autoencoder.train_vae",
        "vae {w}/images {t}/new --size 16",
        "nothing is kept",
    ),
    (
        "diffussm.autoencoder.load_vae",
        "encode {w}/images {w}/latents --vae {w}/vae --size 16",
        "2 finished shards",
    ),
    (
        "diffussm.cli.draw_grid",
        "sample --from {w}/digits --grid {t}/x.png --device cpu",
        "nothing is kept",
    ),
    (
        "diffussm.training.train",
        "train digits --out {w}/digits --steps 4 " + SMALL,
        "goes on from step 4",
    ),
    ("diffussm.training.train", "train digits --out {t}/new " + SMALL, "begins again"),
    (
        "diffussm.evaluation.evaluate",
        "evaluate {w}/images --reference {w}/images",
        "nothing is kept",
    ),
    (
        "diffussm.evaluation.save_statistics",
        "statistics {w}/images {t}/x.npz",
        "nothing is kept",
    ),
    (
        "diffussm.samples.draw_samples",
        "sample --from {w}/digits --out {t}/new --count 2 --device cpu",
        "finished batches are kept",
    ),
]


@pytest.mark.parametrize(
    ("where", "command", "said"), INTERRUPTED, ids=range(len(INTERRUPTED))
)
def test_an_interrupted_command_says_what_is_kept(
    work, tmp_path, monkeypatch, where, command, said
):
    monkeypatch.setattr(where, interrupting)
    assert said in diffussm(command, 130, w=work, t=tmp_path)


def test_ctrl_c_saves_the_run_and_the_same_command_goes_on(tmp_path, monkeypatch):
    def once_shown(line):
        if line.startswith("step 2 "):
            os.kill(os.getpid(), signal.SIGINT)

    words = (
        f"train digits --out {tmp_path}/run --steps 6 --no_grid {SMALL} --log_every 1"
    )
    with monkeypatch.context() as patch:
        patch.setattr(cli, "_say", once_shown)
        said = diffussm(words, 75)
    step = json.loads(
        (tmp_path / "run" / "checkpoints" / "step_00000003" / "state.json").read_text()
    )["step"]
    assert step == 3 and "goes on from there" in said and "step 3 of 6" in said
    assert (tmp_path / "run" / "preempted").read_text().strip() in said
    assert "6 steps done" in diffussm(words)


def test_ctrl_c_keeps_the_batches_of_a_set(work, tmp_path, monkeypatch):
    from diffussm import samples

    words = f"sample --from {work}/digits --out {tmp_path}/set --count 6 --batch_size 2 --steps 2 --device cpu"
    drawn, draw = [], samples.draw_batch

    def first_one(*arguments, **options):
        drawn.append(draw(*arguments, **options))
        os.kill(os.getpid(), signal.SIGINT)
        return drawn[-1]

    with monkeypatch.context() as patch:
        patch.setattr(samples, "draw_batch", first_one)
        said = diffussm(words, 75)
    assert len(drawn) == 1 and "1 of 3 batches" in said and "draws the others" in said
    diffussm(words)
    assert len(list((tmp_path / "set").glob("*.png"))) == 6


class Gone(io.StringIO):
    """A stream whose reader has left."""

    def __init__(self, file):
        super().__init__()
        self.file = file

    def fileno(self):
        return self.file.fileno()

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


def test_a_reader_that_leaves_ends_the_output_and_not_the_command(tmp_path):
    with (
        (tmp_path / "stream").open("w") as file,
        contextlib.redirect_stdout(Gone(file)),
    ):
        assert cli.main(["evaluate", "--self_test"]) == 0
        assert os.readlink(f"/proc/self/fd/{file.fileno()}") == os.devnull


def test_training_goes_on_when_its_reader_leaves_and_writes_few_lines(tmp_path):
    command = [
        sys.executable,
        "-m",
        "diffussm",
        *f"train digits --out {tmp_path}/run --steps 30 {SMALL}".split(),
    ]
    job = subprocess.Popen(
        [*command, "--no_grid"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    job.stdout.close()
    with job.stderr as stream:
        said = stream.read().decode()
    assert job.wait(timeout=400) == 0, said
    assert (tmp_path / "run" / "checkpoints" / "step_00000030").is_dir()
    assert "Traceback" not in said and "Broken pipe" not in said
    assert "step/s" not in said  # nobody watches a bar


ALONE = re.compile(
    r"(?:[\r\n]|\x1b\[A)(a line)\n"
)  # tqdm has gone to the beginning of a line


def test_a_line_of_output_does_not_stick_to_the_bar():
    from tqdm import tqdm

    stream = io.StringIO()
    with (
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
        tqdm(total=3) as bar,
    ):
        bar.update()
        cli._say("a line")
    assert ALONE.search(stream.getvalue())[1] == "a line"


def test_what_the_package_warns_of_does_not_stick_to_the_bar(tmp_path, monkeypatch):
    from tqdm import tqdm

    def busy(arguments):
        """busy"""
        with tqdm(total=3, mininterval=0) as bar:
            bar.update()
            logging.getLogger("diffussm.folders").warning("a line")
        return 0

    monkeypatch.setitem(cli.COMMANDS, "train", busy)
    assert ALONE.search(diffussm("train"))


def test_a_run_goes_on_with_other_pictures_only_when_told(plain, tmp_path):
    import shutil

    shutil.copytree(plain.run, tmp_path / "run")
    shutil.copytree(plain.folder / "images", tmp_path / "images")
    (tmp_path / "images" / "0.png").rename(tmp_path / "images" / "7.png")
    words = "train {f}/plain.yaml --data {t}/images --out {t}/run --device cpu --steps 4 --no_grid --keep_last 1"
    assert "--other_data" in diffussm(words, 1, f=plain.folder, t=tmp_path)
    assert "4 steps done" in diffussm(
        words + " --other_data", f=plain.folder, t=tmp_path
    )


def test_the_weights_are_where_the_last_line_says(plain):
    assert f"{plain.run}/checkpoints/step_00000003/ema" in plain.said
    assert (
        plain.run / "checkpoints" / "step_00000003" / "ema" / "model.safetensors"
    ).is_file()


def test_kept_checkpoints_are_named_without_brackets(plain):
    assert json.loads((plain.run / "config.json").read_text())["execution"]["keep"] == [
        "1",
        "2",
    ]


# Doctor


def asked(**options):
    """What the parser of `doctor` would have made of a command line."""
    defaults = {
        "device": "cpu",
        "processes": 1,
        "limit": 60.0,
        "quick": False,
        "out": Path("."),
    }
    return SimpleNamespace(
        **{"vae": None, "weights": None, "reference": None} | defaults | options
    )


def test_doctor_passes_what_is_fine_and_skips_what_was_not_asked(work):
    said = diffussm(
        "doctor {w}/tiny.yaml --data {w}/latents --vae {w}/vae --out {w}/new --device cpu --processes 2",
        w=work,
    )
    lines = dict(line.split(": ", 1) for line in said.splitlines())
    for what in ("memory", "processes", "disk", "data", "autoencoder"):
        assert f"pass  {what}" in lines, said
    for what in ("GPU", "bf16", "Inception", "reference"):
        assert f"skip  {what}" in lines, said
    assert (
        "16 x 16 pixels" in lines["pass  autoencoder"]
        and "checksum" in lines["pass  data"]
    )
    assert not (work / "new").exists()


def test_doctor_fails_with_everything_that_is_wrong_at_once(work, tmp_path):
    said = diffussm(
        "doctor imagenet512 --data {w}/latents --vae {w}/other --out {t} --device cpu --processes 1 "
        "--limit 0.01 --reference {t}/none --micro_batch 256 --weights {w}/tiny.yaml",
        1,
        w=work,
        t=tmp_path,
    )
    for what in (
        "memory",
        "processes",
        "data",
        "autoencoder",
        "Inception",
        "reference",
    ):
        assert f"FAIL  {what}" in said, said
    assert (
        "--micro_batch" in said
        and "made by the encoder of" in said
        and not list(tmp_path.iterdir())
    )


def test_doctor_reads_every_byte_unless_told_to_be_quick(work, tmp_path):
    diffussm(
        "encode {w}/images {t}/s --vae {w}/vae --size 16 --device cpu",
        w=work,
        t=tmp_path,
    )
    shard = tmp_path / "s" / "shard-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    config = replace(
        cli.read_recipe(str(work / "tiny.yaml"))[0], data=str(tmp_path / "s")
    )
    for quick, verdict in ((True, "pass"), (False, "FAIL")):
        options = asked(quick=quick)
        question = dict(cli.doctor_questions(config, Execution(), options))["data"]
        assert cli.examine("data", question).verdict == verdict


def test_a_hang_between_processes_is_cut_off_and_ends_them(tmp_path):
    mark = tmp_path / "pids"
    program = f"import os, time; open({str(mark)!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(600)"
    begun = time.monotonic()
    with pytest.raises(OSError, match="GLOO_SOCKET_IFNAME"):
        cli.probe_all_reduce("cpu", 2, limit=2.0, program=program)
    assert time.monotonic() - begun < 30
    assert not [
        pid for pid in mark.read_text().split() if Path(f"/proc/{pid}").exists()
    ]


def test_a_process_that_fails_is_reported_with_its_last_words():
    with pytest.raises(OSError, match="no cable.*NCCL_DEBUG"):
        cli.probe_all_reduce(
            "cuda", 1, limit=60, program="raise SystemExit('no cable')"
        )


def test_a_full_or_read_only_disk_fails(monkeypatch, tmp_path):
    config, execution = cli.read_recipe("imagenet256")
    options = asked(processes=8, out=tmp_path / "run")
    disk = dict(cli.doctor_questions(config, execution, options))["disk"]
    usage = type("", (), {"free": 10e9})
    monkeypatch.setattr(cli.shutil, "disk_usage", lambda path: usage)
    finding = cli.examine("disk", disk)
    assert finding.verdict == "FAIL" and "10.0 GB free" in finding.told
    monkeypatch.setattr(cli.os, "access", lambda path, how: False)
    assert "cannot be written" in cli.examine("disk", disk).told


def test_the_memory_estimate_is_what_autograd_really_keeps():
    """The fake run of one block against a real one: a whole model, batch of 1 and of 3, float32."""
    model = DiffuSSM(
        DiffuSSMConfig(
            input_size=8,
            in_channels=1,
            num_classes=2,
            d_model=32,
            n_blocks=3,
            d_state=8,
        )
    )

    def kept(images):
        storages = {}

        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = (
                tensor.untyped_storage().nbytes()
            )
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = model(
                torch.randn(images, 1, 8, 8),
                torch.zeros(images).long(),
                torch.zeros(images).long(),
            )
        del out
        own = {
            parameter.untyped_storage().data_ptr() for parameter in model.parameters()
        }
        return sum(count for key, count in storages.items() if key not in own)

    _, each = cli.saved_bytes(model.config, "float32")
    real = (kept(3) - kept(1)) / 2
    assert 0.8 < 3 * each / real < 1.1  # the ends of the model keep something too


def test_memory_falls_with_recompute_fsdp_and_smaller_parts():
    config, execution = cli.read_recipe("imagenet256")
    total = cli.memory_needed(config, execution, 8)["total"]
    for option in (
        {"activation_checkpointing": True},
        {"strategy": "fsdp"},
        {"micro_batch": 8},
    ):
        assert (
            cli.memory_needed(config, replace(execution, **option), 8)["total"] < total
        )
    states = cli.memory_needed(config, execution, 8)[
        "weights, gradients, average, moments"
    ]
    with torch.device("meta"):
        assert states == 20 * sum(
            p.numel() for p in DiffuSSM(config.model).parameters()
        )


def as_process(monkeypatch, rank, gpus):
    """As torchrun would start it, on a machine with so many GPUs."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, str(rank))
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


def test_under_torchrun_each_process_asks_for_its_own_gpu(monkeypatch, work):
    as_process(monkeypatch, rank=5, gpus=8)
    seen = []

    def memory(device):
        seen.append(device)
        return 1e12, 1e12

    def decoder(name, device, made_by):
        seen.append(device)
        raise ValueError("no GPU here")

    def card(index):
        seen.append(torch.device("cuda", index))
        return SimpleNamespace(name="a card", total_memory=80e9)

    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", card)
    monkeypatch.setattr(cli, "_decoder", decoder)
    config = replace(
        cli.read_recipe(str(work / "tiny.yaml"))[0],
        data=str(work / "latents"),
        batch_size=8,
    )
    questions = dict(
        cli.doctor_questions(config, Execution(), asked(device=None, vae="x"))
    )
    for what in ("GPU", "memory", "autoencoder"):
        cli.examine(what, questions[what])
    assert seen == [torch.device("cuda", 5)] * 3


def test_a_process_without_a_gpu_fails_before_it_takes_that_of_another(monkeypatch):
    as_process(monkeypatch, rank=2, gpus=2)
    questions = dict(
        cli.doctor_questions(*cli.read_recipe("imagenet256"), asked(device=None))
    )
    finding = cli.examine("GPU", questions["GPU"])
    assert finding.verdict == "FAIL" and "there are 2" in finding.told


def test_only_the_first_process_reads_data_disk_and_files(monkeypatch, work):
    from diffussm import evaluation, latents

    read = []
    monkeypatch.setattr(latents, "verify_store", lambda path: read.append(path) or [])
    monkeypatch.setattr(evaluation, "check_weights", read.append)
    monkeypatch.setattr(cli, "published", read.append)
    monkeypatch.setattr(
        cli.shutil,
        "disk_usage",
        lambda path: read.append(path) or SimpleNamespace(free=1e15),
    )
    config = replace(
        cli.read_recipe(str(work / "tiny.yaml"))[0], data=str(work / "latents")
    )
    paths = {
        "weights": work / "tiny.yaml",
        "reference": work / "tiny.yaml",
        "vae": str(work / "vae"),
    }
    for rank, verdict in ((1, "skip"), (0, "pass")):
        read.clear()
        monkeypatch.setenv("RANK", str(rank))
        questions = dict(cli.doctor_questions(config, Execution(), asked(**paths)))
        for what in ("disk", "data", "Inception", "reference"):
            assert cli.examine(what, questions[what]).verdict == verdict
        cli.examine("autoencoder", questions["autoencoder"])
        assert len(read) == (5 if rank == 0 else 0)
    assert "--processes" in diffussm_under_torchrun(
        monkeypatch, "doctor digits --processes 2"
    )


def diffussm_under_torchrun(monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    return diffussm(command, 1)


def test_the_disk_must_hold_the_checkpoints_that_are_kept():
    config = replace(cli.read_recipe("digits")[0], steps=800)
    execution = Execution(keep_every=200, keep_last=2)
    assert cli.checkpoints_kept(config, execution) == 4 + 2 + 1
    assert (
        cli.checkpoints_kept(config, replace(execution, keep=("30", "400", "900")))
        == 4 + 2 + 1 + 1
    )


def test_doctor_passes_over_the_memory_where_the_system_does_not_tell(monkeypatch):
    real = Path.read_text

    def read_text(self, *arguments, **options):
        if str(self) == "/proc/meminfo":
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    memory = dict(cli.doctor_questions(*cli.read_recipe("digits"), asked()))["memory"]
    assert cli.examine("memory", memory).verdict == "skip"


def test_doctor_takes_the_options_of_the_recipe(plain):
    words = f"doctor digits --data {plain.folder}/images --device cpu --processes 1 --quick "
    assert "FAIL  data" in diffussm(words, 1)
    said = diffussm(
        words + "--model.in_channels 3 --model.num_classes 0 --batch_size 4"
    )
    assert "pass  data: 6 images" in said


def test_a_file_with_the_name_of_a_published_one_must_be_that_one(
    tmp_path, monkeypatch
):
    file = tmp_path / "VIRTUAL_imagenet256_labeled.npz"
    file.write_bytes(b"abc")
    with pytest.raises(ValueError, match="is not the published"):
        cli.published(file)
    known = cli.Download(
        file.name,
        "",
        "",
        3,
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    )
    monkeypatch.setattr(cli, "DOWNLOADS", (known,))
    assert cli.published(file) == known
    other = tmp_path / "other.npz"
    other.write_bytes(b"x")
    assert cli.published(other) is None


def test_published_checksums_agree_with_the_name_and_the_evaluator():
    from diffussm import evaluation

    weights = next(one for one in cli.DOWNLOADS if one.name == evaluation.WEIGHTS)
    assert weights.sha256[:8] in weights.name
    assert all(one.sha256 is None or len(one.sha256) == 64 for one in cli.DOWNLOADS)


def test_without_signals_and_locks_of_unix_the_commands_work(tmp_path):
    """As on Windows: no SIGUSR1, no fcntl; simulated here."""
    commands = [
        f"train digits --out {tmp_path}/run --steps 2 --no_grid {SMALL}",
        f"sample --from {tmp_path}/run --grid {tmp_path}/x.png --steps 2 --classes 1 --device cpu",
        f"sample --from {tmp_path}/run --out {tmp_path}/x.npz --steps 2 --count 2 --device cpu",
        "doctor digits --quick --device cpu --processes 1",
    ]
    program = (
        "import signal, sys; del signal.SIGUSR1; sys.modules['fcntl'] = None\n"
        "from diffussm.cli import main\n"
        f"sys.exit(max(main(words.split()) for words in {commands!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "x.png").is_file() and "Traceback" not in done.stderr


# A thousand pieces of nonsense

REFUSED = (ValueError, OSError)


def nonsense(rng):
    """A value that somebody, or a damaged disk, might have put there."""
    depth = rng.random()
    if depth < 0.08:
        return [nonsense(rng) for _ in range(rng.randrange(3))]
    if depth < 0.16:
        return {
            rng.choice(["a", "model", 3, "steps"]): nonsense(rng)
            for _ in range(rng.randrange(3))
        }
    plain = [
        None,
        True,
        0,
        -1,
        1,
        2,
        7,
        10**30,
        1e-4,
        -0.5,
        math.inf,
        math.nan,
        "",
        "x",
        "1e-4",
        "../..",
        "\u2028",
    ]
    return rng.choice(plain)


def test_500_fuzzed_configs_are_read_or_refused(tmp_path):
    import yaml

    rng = random.Random(0)
    names = [field.name for field in (*fields(Recipe), *fields(Execution))] + ["stepz"]
    inner = [field.name for field in fields(DiffuSSMConfig)] + ["d_mode"]
    file, read = tmp_path / "recipe.yaml", 0
    for turn in range(500):
        values = flat(RECIPES["digits"], Execution())
        for _ in range(rng.randrange(4)):
            if rng.random() < 0.4:
                values["model"][rng.choice(inner)] = nonsense(rng)
            else:
                values[rng.choice(names)] = nonsense(rng)
            if not isinstance(values["model"], dict):
                break
        text = yaml.safe_dump(values, allow_unicode=True).encode()
        if turn % 3 == 0:  # and a slip of the keyboard
            where = rng.randrange(len(text))
            text = (
                text[:where]
                + bytes([rng.randrange(256)])
                + text[where + rng.randrange(3) :]
            )
        file.write_bytes(text)
        try:
            config, execution = cli.read_recipe(str(file))
        except REFUSED as error:
            assert len(str(error)) < 2000
        else:
            again = json.loads(json.dumps(flat(config, execution)))
            assert from_flat(again) == (config, execution)
            diffusion_of(replace(config, timesteps=min(config.timesteps, 1000)))
            read += 1
        assert file.read_bytes() == text and [file] == list(tmp_path.iterdir())
    assert 50 < read < 450  # the fuzz is neither all noise nor all harmless


def test_250_fuzzed_manifests_are_read_or_refused(work, tmp_path):
    rng = random.Random(1)
    good = read_manifest(work / "latents")
    store = tmp_path / "store"
    store.mkdir()
    for shard in (work / "latents").glob("shard-*"):
        (store / shard.name).write_bytes(shard.read_bytes())
    shards = listing(store)
    config = replace(cli.read_recipe(str(work / "tiny.yaml"))[0], data=str(store))
    for turn in range(250):
        values = json.loads(json.dumps(good))
        place = rng.choice(
            [values, values, values["vae"], values["shards"][0], values["data"]]
        )
        place[rng.choice(list(place))] = nonsense(rng)
        values = json.loads(json.dumps(values))  # keys become strings
        text = json.dumps(with_checksum(values) if turn % 2 else values).encode()
        if turn % 5 == 0:
            where = rng.randrange(len(text))
            text = (
                text[:where]
                + bytes([rng.randrange(256)]) * rng.randrange(2)
                + text[where + 1 :]
            )
        (store / "manifest.json").write_bytes(text)
        with contextlib.suppress(*REFUSED):
            found = cli.open_data(config)
            found[0], found.labels
        assert isinstance(verify_store(store), list)
        assert (store / "manifest.json").read_bytes() == text
        (store / "manifest.json").unlink()
        assert listing(store) == shards


def test_250_fuzzed_images_are_read_or_refused(tmp_path):
    rng = random.Random(2)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    originals = []
    for kind, mode in (
        ("png", "RGB"),
        ("png", "P"),
        ("jpeg", "RGB"),
        ("jpeg", "CMYK"),
        ("gif", "P"),
        ("webp", "RGB"),
        ("bmp", "RGB"),
    ):
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(buffer, format=kind)
        originals.append((kind, buffer.getvalue()))
    folder, refused = tmp_path / "images", 0
    folder.mkdir()
    for _ in range(250):
        kind, content = rng.choice(originals)
        damaged = bytearray(content)
        for _ in range(rng.randrange(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        if rng.random() < 0.4:
            del damaged[rng.randrange(len(damaged)) :]
        file = folder / f"image.{kind}"
        file.write_bytes(damaged)
        before = listing(folder)
        try:
            image, label = ImageFolder(folder, 8, conditional=False)[0]
        except BadImage:
            refused += 1
        else:
            assert (
                image.shape == (3, 8, 8) and bool(image.isfinite().all()) and label == 0
            )
        assert listing(folder) == before
        file.unlink()
    assert 25 < refused < 250


def test_100_fuzzed_command_lines_are_refused_without_a_file(
    work, tmp_path, monkeypatch
):
    rng = random.Random(3)
    monkeypatch.chdir(tmp_path)
    before = listing(work)
    options = "--out --from --grid --vae --size --steps --count --device --weights --limit --lr --config".split()
    values = [
        "",
        "-1",
        "0",
        "x",
        "nan",
        "../nowhere",
        "1e999",
        "[]",
        "{",
        "null",
        "--",
        "\u2028",
    ]
    for _ in range(100):
        name = rng.choice(
            ["vae", "encode", "doctor", "train", "sample", "statistics", "dream"]
        )
        words = [name, *rng.choices(values, k=rng.randrange(3))]
        for _ in range(rng.randrange(4)):
            words += [rng.choice(options), rng.choice(values)]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert cli.main(words) in (1, 2), words
        assert "Traceback" not in err.getvalue() and err.getvalue().strip()
        assert not list(tmp_path.iterdir()), words
    assert listing(work) == before


def test_the_world_of_one_process_is_the_default():
    with cli._cluster("train", "cpu") as world:
        assert isinstance(world, World) and (world.rank, world.size) == (0, 1)


def test_a_whole_configuration_may_say_what_does_not_matter_here(tmp_path):
    """`exif_rotate` and `workers` are refused for digits where they are typed, not in a file that has all."""
    from diffussm import cli

    parser = cli._new_parser("train", "")
    parser.add_argument("--config", action="config")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1)
    (tmp_path / "all.yaml").write_text("workers: 2\nsteps: 3\n")
    for words in (
        ["--config", str(tmp_path / "all.yaml")],
        [f"--config={tmp_path / 'all.yaml'}"],
    ):
        options, typed = cli._parse(parser, [*words, "--steps", "5"])
        assert (
            options.workers,
            options.steps,
            "workers" in typed,
            "steps" in typed,
        ) == (2, 5, False, True)
    assert "workers" in cli._parse(parser, ["--workers", "2"])[1]


def test_latents_are_not_clamped_to_the_range_of_pixels(work, tmp_path):
    said = diffussm(
        f"sample --from {work}/latent-run --vae {work}/vae --clip_denoised true --grid {tmp_path}/a.png",
        code=1,
    )
    assert "--clip_denoised true" in said and not (tmp_path / "a.png").exists()


def test_a_result_never_takes_the_place_of_the_record_of_a_set(work, tmp_path):
    (tmp_path / "set.npz").write_bytes(b"")
    said = diffussm(
        f"evaluate {tmp_path}/set.npz --reference {tmp_path}/set.npz --out {tmp_path}/set.json",
        code=1,
    )
    assert "set.scores.json" in said


def test_pictures_of_an_npz_are_not_turned(tmp_path):
    for command in ("evaluate {0} --reference {0}", "statistics {0} {1}/out.npz"):
        words = command.format(f"{tmp_path}/set.npz", tmp_path)
        said = diffussm(f"{words} --exif_rotate", code=1)
        assert "--exif_rotate would have no effect" in said
