"""The command line, as a shell sees it: exit codes, files, and sentences instead of tracebacks."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

SMALL = (
    "--model.d_model 16 --model.n_blocks 1 --model.d_state 4 --batch_size 8 "
    "--cooldown 0 --warmup 0 --log_every 4 --device cpu"
).split()


def diffussm(*arguments, cwd=None):
    command = [sys.executable, "-m", "diffussm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "digits"
    done = diffussm("train", "digits", "--out", folder, "--steps", 4, *SMALL)
    assert done.returncode == 0, done.stderr
    return folder


def test_train_leaves_a_log_checkpoints_and_a_picture(run):
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [4]
    assert (run / "checkpoints" / "step_00000004" / "ema" / "model.safetensors").is_file()
    assert np.asarray(Image.open(run / "samples.png")).shape == (10 * 52, 8 * 52)


def test_the_same_command_resumes(run):
    done = diffussm("train", "digits", "--out", run, "--steps", 8, *SMALL)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [4, 8]


def test_sample_draws_a_row_per_class(run, tmp_path):
    picture = tmp_path / "out.png"
    few = "--classes 3,7 --per_class 3 --steps 4 --device cpu".split()
    done = diffussm("sample", "--from", run, *few, "--grid", picture)
    assert done.returncode == 0, done.stderr
    assert np.asarray(Image.open(picture)).shape == (2 * 52, 3 * 52)
    first = picture.read_bytes()
    refused = diffussm("sample", "--from", run, "--grid", picture)
    assert refused.returncode == 1 and "exists" in refused.stderr and picture.read_bytes() == first
    again = tmp_path / "again.png"
    diffussm("sample", "--from", run, *few, "--grid", again)
    assert again.read_bytes() == first  # same seed, same picture
    other = tmp_path / "other.png"
    diffussm("sample", "--from", run, *few, "--grid", other, "--seed", 1)
    assert other.read_bytes() != first


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("sample --from {run} --classes eleven --grid x.png", "'eleven' is no class"),
        ("sample --from {run} --classes 10 --grid x.png", "'10' is no class"),
        ("sample --from nowhere --grid x.png", "not a training run"),
        ("sample --from {run} --grid x.jpg", "ends in .png"),
        ("sample --from {run} --grid no/such/folder/x.png", "does not exist"),
        ("sample --from {run} --grid x.png --per_class 0", "at least one"),
        ("sample --from {run} --grid x.png --steps 0 --device cpu", "steps"),
        ("sample --from {run} --grid x.png --steps many", "steps"),
        ("sample --from {run} --grid x.png --method euler", "ddim"),
        ("sample --grid x.png", "from"),
        ("train digits --out new --lr 2", "learning rate"),
        ("train digits --out new --model.d_state 3", "3"),
        ("train digits --out new --model.d_mode 3", "d_mode"),
        ("train digits --out new --model.downsample 3", "3"),
        ("train digits --out new --stepz 3", "stepz"),
        ("train digits --out new --data nowhere", "nowhere"),
        ("train cats --out new", "digits"),
        ("train digits", "out"),
        ("train digits --out {run} --lr 0.5", "holds another run"),
        ("dream", "no command 'dream'"),
    ],
)
def test_a_mistake_gets_a_sentence_and_writes_nothing(run, tmp_path, arguments, said):
    before = sorted(path for path in run.rglob("*"))
    done = diffussm(*arguments.format(run=run).split(), cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert said in done.stderr and "Traceback" not in done.stderr + done.stdout
    assert not list(tmp_path.iterdir()) and before == sorted(path for path in run.rglob("*"))


def test_help_lists_the_commands_and_does_not_wait_for_torch():
    done = diffussm("--help")
    assert done.returncode == 0 and "train" in done.stdout and "sample" in done.stdout
    code = "import sys; from diffussm.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_import_pulls_in_no_heavy_library():
    heavy = ("diffusers", "sklearn", "matplotlib")
    code = (
        "import sys, torch, diffussm; from diffussm import DiffuSSM, sample, train; "
        f"assert not [m for m in {heavy} if m in sys.modules]"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_options_can_come_from_a_yaml_file(tmp_path):
    config = tmp_path / "short.yaml"
    small = "model:\n  d_model: 16\n  n_blocks: 1\n  d_state: 4\n"
    config.write_text("steps: 4\nlog_every: 2\ncooldown: 0\nwarmup: 0\n" + small)
    out = tmp_path / "run"
    done = diffussm("train", "digits", "--out", out, "--config", config, "--batch_size", 8, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    stored = json.loads((out / "config.json").read_text())
    assert (
        stored["steps"],
        stored["model"]["d_model"],
        stored["model"]["num_classes"],
        stored["batch_size"],
    ) == (4, 16, 10, 8)
