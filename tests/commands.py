"""Run commands in a test, here or as a shell would, and what they work on."""

import contextlib
import io
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from diffussm import cli

SMALL = (
    "--model.d_model 16 --model.n_blocks 1 --model.d_state 4 --batch_size 8 "
    "--cooldown 0 --warmup 0 --log_every 4 --device cpu"
)


def diffussm(command, code=0, **names):
    """Run a command in this process; what it said on both streams.

    The exit code must be among `code`.
    """
    out, err = io.StringIO(), io.StringIO()
    words = [word.format(**names) for word in command.split()]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        got = cli.main(words)
    said = out.getvalue() + err.getvalue()
    assert got in (code if isinstance(code, tuple) else (code,)), said
    assert "Traceback" not in said
    assert "\r" not in said, "a bar where nobody watches"
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


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """Images, an autoencoder, latents, and two runs, all made by the commands."""
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
        "encode {w}/images {w}/latents --vae {w}/vae --size 16 --shard_size 8 "
        "--device cpu --verify",
        w=work,
    )
    (work / "tiny.yaml").write_text(
        "model: {input_size: 4, num_classes: 2, d_model: 16, n_blocks: 1, d_state: 4}\n"
        "steps: 4\nbatch_size: 4\nflip: true\nlog_every: 2\nsave_every: 4\n"
    )
    diffussm(
        "train {w}/tiny.yaml --data {w}/latents --out {w}/latent-run --vae {w}/vae "
        "--sample_every 4 "
        "--tensorboard --device cpu",
        w=work,
    )
    diffussm(f"train digits --out {work}/digits --steps 4 {SMALL}")
    return work


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """A run on pixels without classes, of three steps and 30 timesteps."""
    folder = tmp_path_factory.mktemp("plain")
    rng = np.random.default_rng(1)
    (folder / "images").mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(
            folder / "images" / f"{i}.png"
        )
    (folder / "plain.yaml").write_text(
        "model: "
        "{input_size: 8, in_channels: 3, num_classes: 0, "
        "d_model: 16, n_blocks: 1, d_state: 4}\n"
        "steps: 3\nbatch_size: 4\ntimesteps: 30\nlr: 0.1\n"
    )
    words = (
        "train {f}/plain.yaml --data {f}/images --out {f}/run --device cpu "
        "--sample_every 1 --keep_last 1"
    )
    said = diffussm(words + " --keep 1,2", f=folder)
    return SimpleNamespace(folder=folder, run=folder / "run", said=said)


def grid(run, path, options, code=0):
    """A grid of two images for each class: its bytes, or why it was refused."""
    said = diffussm(
        f"sample --from {run} --per_class 2 --device cpu --grid {path} --overwrite "
        f"{options}",
        code,
    )
    return path.read_bytes() if code == 0 else said


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


ALONE = re.compile(
    r"(?:[\r\n]|\x1b\[A)(a line)\n"
)  # tqdm has gone to the beginning of a line
