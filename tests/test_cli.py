"""The command line: exit codes, files, and sentences. Most of it runs in this process."""

import contextlib
import io
import json
import math
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffussm import cli
from diffussm.data import BadImage, ImageFolder
from diffussm.latents import LatentStore, load_vae, read_manifest, sign_manifest, verify_store
from diffussm.model import PRESETS, DiffuSSM, DiffuSSMConfig
from diffussm.training import RECIPES, TrainConfig, World, diffusion_of

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
        command, capture_output=True, text=True, cwd=cwd, timeout=300, env=os.environ | environment
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
    diffussm("vae {w}/images {w}/other --size 16 --steps 2 --batch_size 2 --seed 1", w=work)
    diffussm(
        "encode {w}/images {w}/latents --vae {w}/vae --size 16 --shard_size 8 --device cpu --verify", w=work
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
    assert cli.read_recipe("digits") == RECIPES["digits"]


@pytest.mark.parametrize("name", cli.recipe_files())
def test_every_recipe_is_read_and_its_model_is_a_preset(name):
    config = cli.read_recipe(name)
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
            **PRESETS[preset], input_size=size, num_classes=classes, label_dropout=dropout
        )
    elif name.endswith("-m1"):
        assert config.model == replace(cli.read_recipe(name[:-3]).model, downsample=1)
    elif name != "openmoji":
        assert config.model == DiffuSSMConfig(**PRESETS["digits" if name == "digits" else "emoji"])
    if config.model.d_model == 1152:  # the paper's appendix
        paper = {"batch_size": 256, "lr": 1e-4, "weight_decay": 0.0, "ema_decay": 0.9999, "timesteps": 1000}
        assert {key: getattr(config, key) for key in paper} == paper
        assert config.warmup == config.cooldown == 0 and config.flip and config.precision == "bf16"
        assert "paper" in cli.recipe_files()[name].read_text()


def test_the_lengths_are_those_of_table_1():
    images = {name: (r := cli.read_recipe(name)).steps * r.batch_size for name in cli.recipe_files()}
    assert round(images["imagenet256"] / 1e6) == 550 and round(images["imagenet512"] / 1e6) == 192


@pytest.mark.parametrize("name", cli.recipe_files())
def test_every_recipe_fits_eight_gpus_of_80_gb(name):
    assert cli.memory_needed(cli.read_recipe(name), 8)["total"] < 80e9


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
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [4]
    assert (run / "checkpoints" / "step_00000004" / "ema" / "model.safetensors").is_file()
    assert np.asarray(Image.open(run / "samples.png")).shape == (10 * 52, 8 * 52)


def test_training_on_latents_draws_decoded_pictures_and_remembers_the_autoencoder(work):
    run = work / "latent-run"
    for picture in (run / "samples.png", run / "samples" / "step_00000004.png"):
        assert np.asarray(Image.open(picture)).shape == (2 * 52, 8 * 52, 3)  # 16 pixels, three times as large
    assert json.loads((run / "vae.json").read_text()) == LatentStore(work / "latents").vae
    assert list((run / "tensorboard").glob("events.*"))


def test_training_says_how_large_how_fast_and_how_long(tmp_path):
    said = diffussm(f"train digits --out {tmp_path}/run --steps 4 --no_grid {SMALL}")
    for words in ("million parameters", "dynamics", "images/s", " s left", "4 steps done"):
        assert words in said


def test_the_same_command_resumes(work, tmp_path):
    out = tmp_path / "run"
    diffussm(f"train digits --out {out} --steps 4 --no_grid {SMALL}")
    diffussm(f"train digits --out {out} --steps 8 --no_grid {SMALL}")
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [4, 8]


def test_options_come_from_a_yaml_file_and_are_overruled_by_words(work, tmp_path):
    words = "train {w}/tiny.yaml --data {w}/latents --out {t}/run --batch_size 2 --device cpu --no_grid"
    diffussm(words, w=work, t=tmp_path)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (stored["steps"], stored["model"]["d_model"], stored["batch_size"]) == (4, 16, 2)
    (tmp_path / "part.yaml").write_text("steps: 2\nmodel:\n  d_model: 8\n")
    diffussm(words.replace("run", "run2") + " --config {t}/part.yaml", w=work, t=tmp_path)
    stored = json.loads((tmp_path / "run2" / "config.json").read_text())
    assert (stored["steps"], stored["model"]["d_model"], stored["model"]["num_classes"]) == (2, 8, 2)


def test_training_takes_an_image_folder_without_classes(work, tmp_path):
    (tmp_path / "pixels.yaml").write_text(
        "model: {input_size: 8, in_channels: 3, num_classes: 0, d_model: 16, n_blocks: 1, d_state: 4}\n"
        "steps: 2\nbatch_size: 4\n"
    )
    words = "train {t}/pixels.yaml --data {w}/images --out {t}/run --device cpu"
    diffussm(words, w=work, t=tmp_path)
    assert np.asarray(Image.open(tmp_path / "run" / "samples.png")).shape == (52, 8 * 52, 3)


def test_encode_is_resumed_and_its_store_is_read(work, tmp_path):
    words = "encode {w}/images {t}/store --vae {w}/vae --size 16 --shard_size 8 --device cpu"
    diffussm(words, w=work, t=tmp_path)
    first = tmp_path / "store" / "shard-00000.npy"
    before, content = first.stat().st_mtime_ns, (tmp_path / "store" / "shard-00001.npy").read_bytes()
    (tmp_path / "store" / "shard-00001.npy").unlink()
    said = diffussm(words + " --verify", w=work, t=tmp_path)
    assert "12 images in 2 classes" in said and "as it was written" in said
    assert first.stat().st_mtime_ns == before
    assert (tmp_path / "store" / "shard-00001.npy").read_bytes() == content


def test_encode_under_torchrun_gives_the_same_bytes(work, tmp_path):
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2 -m diffussm".split()
    words = f"encode {work}/images {tmp_path}/store --vae {work}/vae --size 16 --shard_size 8 --device cpu"
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # it decides the last bits
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
    first, again, other = ((tmp_path / f"{name}.png").read_bytes() for name in ("first", "again", "other"))
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
        assert made["arr_0"].shape == (6, 16, 16, 3) and made["arr_1"].tolist() == [0, 1] * 3
        images = made["arr_0"]
    how = json.loads((tmp_path / "set.json").read_text())
    made_by = LatentStore(work / "latents").vae
    assert how["cfg_scale"] == 1.0
    assert how["vae"] == {
        "name": str(work / "vae"),
        "encoder_sha256": made_by["encoder_sha256"],
        "decoder_sha256": made_by["decoder_sha256"],
    }
    diffussm(words + "folder", w=work, t=tmp_path)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "folder" / "000003.png")), images[3])


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


def test_statistics_and_evaluate_give_scores_that_say_how_they_came_about(work, tmp_path, averages):
    words = "sample --from {w}/digits --count 12 --steps 2 --batch_size 12 --device cpu --out {t}/"
    diffussm(words + "a.npz", w=work, t=tmp_path)
    diffussm(words + "b.npz --seed 1", w=work, t=tmp_path)
    diffussm("statistics {t}/a.npz {t}/stats.npz --device cpu", t=tmp_path)
    same = "evaluate {t}/a.npz --reference {t}/stats.npz --out {t}/same.json --device cpu"
    assert '"fid"' in diffussm(same, t=tmp_path)
    result = json.loads((tmp_path / "same.json").read_text())
    assert abs(result["fid"]) < 1e-3 and result["precision"] == result["recall"] == 1
    assert result["samples"]["steps"] == 2 and result["samples"]["weights"] == "ema"
    before = (tmp_path / "same.json").read_bytes()
    assert "exists" in diffussm(same, 1, t=tmp_path) and (tmp_path / "same.json").read_bytes() == before
    assert "exists" in diffussm("statistics {t}/b.npz {t}/stats.npz", 1, t=tmp_path)
    diffussm(
        "evaluate {t}/a.npz {t}/b.npz --reference {t}/stats.npz --out {t}/both.json --device cpu", t=tmp_path
    )
    both = json.loads((tmp_path / "both.json").read_text())
    assert both["fid"]["values"][0] == result["fid"] < both["fid"]["values"][1]


def test_the_self_test_passes_and_says_when_it_does_not(monkeypatch):
    from diffussm import evaluation

    assert "known answers" in diffussm("evaluate --self-test")
    monkeypatch.setattr(evaluation, "frechet_distance", lambda *moments: 1.0)
    assert "wrong here" in diffussm("evaluate --self-test", 1)


# Mistakes

MISTAKES = [
    ("dream", "no command 'dream'"),
    ("sample --from {w}/digits --classes eleven --grid {t}/x.png", "'eleven' is no class"),
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
    ("sample --from {w}/latent-run --out {t}/y --vae {w}/other", "is not the autoencoder"),
    ("sample --from {w}/latent-run --out {t}/y --vae {t}/nowhere", "nowhere"),
    ("sample --from {w}/digits --out {w}/images", "no set of samples"),
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
    ("train digits --out {w}/digits --lr 0.5", "holds another run"),
    ("train digits --out {w}/images", "holds no training run"),
    ("train imagenet256 --out {t}/new", "--data"),
    ("train imagenet256 --out {t}/new --data {w}/images", "diffussm encode"),
    ("train imagenet256 --out {t}/new --data {w}/latents", "the model takes"),
    ("train {w}/tiny.yaml --out {t}/new --data {w}/latents --sample_every 2", "--vae"),
    ("train {w}/tiny.yaml --out {t}/new --data {w}/latents --vae {w}/other", "is not the autoencoder"),
    ("train {w}/tiny.yaml --out {t}/new --data {w}/latents --model.num_classes 3", "classes"),
    ("encode {w}/images {w}/latents --vae {w}/vae --size 8", "other latents"),
    ("encode {w}/images {w}/latents --vae {w}/other --size 16 --shard_size 8", "other latents"),
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
    ("evaluate {w}/images --reference {w}/images --out {w}/digits/config.json", "exists"),
    ("evaluate {w}/images --reference {w}/images --out {t}/no/x.json", "does not exist"),
    ("statistics {w}/images {t}/x.csv", ".npz"),
    ("statistics {w}/images {t}/no/x.npz", "does not exist"),
    ("evaluate {w}/images --reference {w}/images", "--weights"),
    ("evaluate {w}/images --reference {w}/images --weights {t}/none --out {t}/x.json", "does not exist"),
    ("evaluate {w}/images --reference {w}/images --weights {w}/tiny.yaml --out {t}/x.json", "tiny.yaml"),
    ("statistics {w}/images {t}/x.npz", "--weights"),
    ("doctor cats", "no recipe"),
    ("doctor digits --limit 0", "--limit"),
    ("doctor", "recipe"),
]


@pytest.mark.parametrize(("command", "said"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_gets_a_sentence_and_writes_nothing(work, tmp_path, monkeypatch, command, said):
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
    for name in ("vae", "encode", "doctor", "train", "sample", "evaluate", "statistics"):
        assert name in said
    code = "import sys; from diffussm.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_import_pulls_in_no_heavy_library():
    heavy = ("diffusers", "sklearn", "matplotlib", "torchvision", "torch_fidelity", "tensorboard", "lmdb")
    code = (
        "import sys, torch, diffussm, diffussm.cli; from diffussm import DiffuSSM, sample, train; "
        f"assert not [m for m in {heavy} if m in sys.modules]"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# Doctor


def asked(**options):
    """What the parser of `doctor` would have made of a command line."""
    defaults = {"device": "cpu", "processes": 1, "limit": 60.0, "quick": False, "out": Path(".")}
    return SimpleNamespace(**{"vae": None, "weights": None, "reference": None} | defaults | options)


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
    assert "16 x 16 pixels" in lines["pass  autoencoder"] and "checksum" in lines["pass  data"]
    assert not (work / "new").exists()


def test_doctor_fails_with_everything_that_is_wrong_at_once(work, tmp_path):
    said = diffussm(
        "doctor imagenet512 --data {w}/latents --vae {w}/other --out {t} --device cpu --processes 1 "
        "--limit 0.01 --reference {t}/none --micro_batch 256 --weights {w}/tiny.yaml",
        1,
        w=work,
        t=tmp_path,
    )
    for what in ("memory", "processes", "data", "autoencoder", "Inception", "reference"):
        assert f"FAIL  {what}" in said, said
    assert "--micro_batch" in said and "is not the autoencoder" in said and not list(tmp_path.iterdir())


def test_doctor_reads_every_byte_unless_told_to_be_quick(work, tmp_path):
    diffussm("encode {w}/images {t}/s --vae {w}/vae --size 16 --device cpu", w=work, t=tmp_path)
    shard = tmp_path / "s" / "shard-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    config = replace(cli.read_recipe(str(work / "tiny.yaml")), data=str(tmp_path / "s"))
    for quick, verdict in ((True, "pass"), (False, "FAIL")):
        options = asked(quick=quick)
        question = dict(cli.doctor_questions(config, options))["data"]
        assert cli.examine("data", question).verdict == verdict


def test_a_hang_between_processes_is_cut_off_and_ends_them(tmp_path):
    mark = tmp_path / "pids"
    program = f"import os, time; open({str(mark)!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(600)"
    begun = time.monotonic()
    with pytest.raises(OSError, match="GLOO_SOCKET_IFNAME"):
        cli.probe_all_reduce("cpu", 2, limit=2.0, program=program)
    assert time.monotonic() - begun < 30
    assert not [pid for pid in mark.read_text().split() if Path(f"/proc/{pid}").exists()]


def test_a_process_that_fails_is_reported_with_its_last_words():
    with pytest.raises(OSError, match="no cable.*NCCL_DEBUG"):
        cli.probe_all_reduce("cuda", 1, limit=60, program="raise SystemExit('no cable')")


def test_a_full_or_read_only_disk_fails(monkeypatch, tmp_path):
    config = cli.read_recipe("imagenet256")
    options = asked(processes=8, out=tmp_path / "run")
    disk = dict(cli.doctor_questions(config, options))["disk"]
    usage = type("", (), {"free": 10e9})
    monkeypatch.setattr(cli.shutil, "disk_usage", lambda path: usage)
    finding = cli.examine("disk", disk)
    assert finding.verdict == "FAIL" and "10.0 GB free" in finding.told
    monkeypatch.setattr(cli.os, "access", lambda path, how: False)
    assert "cannot be written" in cli.examine("disk", disk).told


def test_the_memory_estimate_is_what_autograd_really_keeps():
    """The fake run of one block against a real one: a whole model, batch of 1 and of 3, float32."""
    model = DiffuSSM(
        DiffuSSMConfig(input_size=8, in_channels=1, num_classes=2, d_model=32, n_blocks=3, d_state=8)
    )

    def kept(images):
        storages = {}

        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = model(torch.randn(images, 1, 8, 8), torch.zeros(images).long(), torch.zeros(images).long())
        del out
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        return sum(count for key, count in storages.items() if key not in own)

    _, each = cli.saved_bytes(model.config, "float32")
    real = (kept(3) - kept(1)) / 2
    assert 0.8 < 3 * each / real < 1.1  # the ends of the model keep something too


def test_memory_falls_with_recompute_fsdp_and_smaller_parts():
    config = cli.read_recipe("imagenet256")
    total = cli.memory_needed(config, 8)["total"]
    for option in ({"recompute": True}, {"parallel": "fsdp"}, {"micro_batch": 8}):
        assert cli.memory_needed(replace(config, **option), 8)["total"] < total
    states = cli.memory_needed(config, 8)["weights, gradients, average, moments"]
    with torch.device("meta"):
        assert states == 20 * sum(p.numel() for p in DiffuSSM(config.model).parameters())


# A thousand pieces of nonsense

REFUSED = (ValueError, OSError)


def nonsense(rng):
    """A value that somebody, or a damaged disk, might have put there."""
    depth = rng.random()
    if depth < 0.08:
        return [nonsense(rng) for _ in range(rng.randrange(3))]
    if depth < 0.16:
        return {rng.choice(["a", "model", 3, "steps"]): nonsense(rng) for _ in range(rng.randrange(3))}
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
    names = [field.name for field in fields(TrainConfig)] + ["stepz"]
    inner = [field.name for field in fields(DiffuSSMConfig)] + ["d_mode"]
    file, read = tmp_path / "recipe.yaml", 0
    for turn in range(500):
        values = asdict(RECIPES["digits"])
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
            text = text[:where] + bytes([rng.randrange(256)]) + text[where + rng.randrange(3) :]
        file.write_bytes(text)
        try:
            config = cli.read_recipe(str(file))
        except REFUSED as error:
            assert len(str(error)) < 2000
        else:
            assert TrainConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
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
    config = replace(cli.read_recipe(str(work / "tiny.yaml")), data=str(store))
    for turn in range(250):
        values = json.loads(json.dumps(good))
        place = rng.choice([values, values, values["vae"], values["shards"][0], values["data"]])
        place[rng.choice(list(place))] = nonsense(rng)
        values = json.loads(json.dumps(values))  # keys become strings
        text = json.dumps(sign_manifest(values) if turn % 2 else values).encode()
        if turn % 5 == 0:
            where = rng.randrange(len(text))
            text = text[:where] + bytes([rng.randrange(256)]) * rng.randrange(2) + text[where + 1 :]
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
            assert image.shape == (3, 8, 8) and bool(image.isfinite().all()) and label == 0
        assert listing(folder) == before
        file.unlink()
    assert 25 < refused < 250


def test_100_fuzzed_command_lines_are_refused_without_a_file(work, tmp_path, monkeypatch):
    rng = random.Random(3)
    monkeypatch.chdir(tmp_path)
    before = listing(work)
    options = (
        "--out --from --grid --vae --size --steps --count --device --weights --limit --lr --config".split()
    )
    values = ["", "-1", "0", "x", "nan", "../nowhere", "1e999", "[]", "{", "null", "--", "\u2028"]
    for _ in range(100):
        name = rng.choice(["vae", "encode", "doctor", "train", "sample", "statistics", "dream"])
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
    with cli._cluster("cpu") as world:
        assert isinstance(world, World) and (world.rank, world.size) == (0, 1)
