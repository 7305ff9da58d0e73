"""The whole road at full scale, walked small: ``make rehearsal``.

An image folder (OpenMoji, 64 x 64) -> a small autoencoder -> latents, encoded by two
processes -> training with two processes -> SIGKILL in the middle of a save -> resumed
by one -> samples, decoded -> scores. The commands are those of the chapter on ImageNet,
and each step is checked before the next one starts. It needs no network and no GPU, and
a few minutes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

DIFFUSSM = [sys.executable, "-m", "diffussm"]
TORCHRUN = [
    *"-m torch.distributed.run --standalone --nproc_per_node 2 -m diffussm".split()
]


def command(*words: object, processes: int = 1) -> list[str]:
    """The command line of `diffussm`, under torchrun for two processes; printed as one
    would type it.
    """
    tail = [str(word) for word in words]
    launcher = "torchrun --standalone --nproc_per_node 2 -m " if processes == 2 else ""
    print(f"$ {launcher}diffussm {' '.join(tail)}", flush=True)
    return [sys.executable, *TORCHRUN, *tail] if processes == 2 else [*DIFFUSSM, *tail]


def run(*words: object, processes: int = 1) -> str:
    """Run a command to its end; its standard output. Leaves the rehearsal if the
    command fails.
    """
    done = subprocess.run(
        command(*words, processes=processes),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(
            "rehearsal: the command failed with "
            f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        )
    return done.stdout


def check(what: str, fine: object) -> None:
    """Say what held, or leave the rehearsal."""
    print(f"  {'ok' if fine else 'FAILED'}: {what}", flush=True)
    if not fine:
        raise SystemExit(f"rehearsal: this must hold, and does not: {what}")


def descendants(pid: int) -> list[int]:
    """A process and all that it started, from /proc."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        pid,
        *(grandchild for child in children for grandchild in descendants(int(child))),
    ]


def kill_in_a_save(words: list[object], run_folder: Path, after: int) -> int:
    """Train with two processes, and SIGKILL both while a checkpoint after step `after`
    is being written.
    """
    from diffussm.checkpoints import checkpoints_of, step_of

    job = subprocess.Popen(
        command(*words, processes=2),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    saves = run_folder / "checkpoints"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and job.poll() is None:
        if any(int(draft.name[6:14]) > after for draft in saves.glob(".step_*.tmp")):
            break
        time.sleep(0.0005)
    family = descendants(job.pid)
    for pid in reversed(family):
        os.kill(pid, signal.SIGKILL)
    job.wait()
    drafts = list(saves.glob(".step_*.tmp"))
    check(
        f"both were killed while {drafts[0].name if drafts else 'nothing'} was "
        "being written",
        len(drafts) == 1,
    )
    return max(map(step_of, checkpoints_of(run_folder)))


def steps_logged(run_folder: Path) -> list[int]:
    """The steps in a run's log."""
    return [
        json.loads(line)["step"]
        for line in (run_folder / "log.jsonl").read_text().splitlines()
    ]


def rehearse(folder: Path, steps: int, count: int) -> None:
    """All of it, in an empty folder."""
    from diffussm.latents import LatentStore, verify_store
    from diffussm.openmoji import draw_openmoji

    images, vae, store = folder / "openmoji", folder / "vae", folder / "latents"
    print("1. images", flush=True)
    draw_openmoji(images, 64)
    pictures = len(list((images / "train").glob("*/*.png")))
    check(
        f"{pictures} pictures in 14 classes",
        pictures > 500 and len(list((images / "train").iterdir())) == 14,
    )

    print("2. an autoencoder", flush=True)
    run("vae", images / "train", vae, "--size", 64, "--steps", 200)

    print("3. latents, by two processes", flush=True)
    sizes = ("--size", 64, "--shard_size", 200)
    to_latents = ("encode", images / "train", store, "--vae", vae, *sizes)
    run(*to_latents, processes=2)
    check(
        "the store holds every picture and its mirror image",
        len(LatentStore(store)) == pictures,
    )
    check("every shard is what the manifest says", verify_store(store) == [])
    before = {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
    run(*to_latents)
    after = {
        path.name: path.stat().st_mtime_ns
        for path in store.iterdir()
        if path.suffix == ".npy"
    }
    check(
        "the same command again encodes nothing",
        all(before[name] == when for name, when in after.items()),
    )

    print(
        "4. training with two processes, killed in a save, resumed by one", flush=True
    )
    words: list[object] = [
        "train",
        "openmoji",
        "--data",
        store,
        "--out",
        folder / "run",
    ]
    words += [
        "--steps",
        steps,
        "--save_every",
        10,
        "--log_every",
        5,
        "--device",
        "cpu",
        "--no_grid",
    ]
    saved = kill_in_a_save(words, folder / "run", steps // 2)
    check(f"the last whole checkpoint is of step {saved}", steps // 2 <= saved < steps)
    run(*words)
    whole = list(range(5, steps + 1, 5))
    check("every line of the log is there once", steps_logged(folder / "run") == whole)
    log = [
        json.loads(line)
        for line in (folder / "run" / "log.jsonl").read_text().splitlines()
    ]
    check(
        f"the loss fell from {log[0]['loss']:.3f} to {log[-1]['loss']:.3f}",
        log[-1]["loss"] < log[0]["loss"],
    )

    print("5. samples, drawn by two processes and decoded", flush=True)
    words = [
        "sample",
        "--from",
        folder / "run",
        "--out",
        folder / "samples.npz",
        "--vae",
        vae,
    ]
    words += [
        "--preset",
        "paper-fid-all",
        "--count",
        count,
        "--steps",
        10,
        "--method",
        "ddim",
    ]
    words += ["--batch_size", 14, "--device", "cpu"]
    run(*words, processes=2)
    with np.load(folder / "samples.npz", allow_pickle=False) as samples:
        drawn, labels = samples["arr_0"], samples["arr_1"]
    check(
        f"{count} pictures of 64 x 64 in colour",
        drawn.shape == (count, 64, 64, 3) and drawn.std() > 10,
    )
    check(
        "each class as often as the others",
        np.ptp(np.bincount(labels, minlength=14)) <= 1,
    )
    record, made_by = (
        json.loads((folder / name).read_text())
        for name in ("samples.json", "latents/plan.json")
    )
    check(
        "the record names the decoder, and the encoder is that of the latents",
        record["vae"]["decoder_sha256"]
        and record["vae"]["encoder_sha256"] == made_by["vae"]["encoder_sha256"],
    )

    print("6. scores", flush=True)
    score(folder, images)


def random_inception(path: Path) -> Path:
    """Write weights of Inception's shape; the real ones are a download."""
    import torch
    from torch import nn
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *_: object, **__: object) -> None:
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    torch.manual_seed(0)
    net = Blank("blank", ["2048"], feature_extractor_weights_path=nothing)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(net.state_dict(), path)
    return path


def score(folder: Path, images: Path) -> None:
    """Score samples, and held-out pictures, against the training pictures.

    With random weights in place of Inception's the whole path is walked, and distances
    still tell drawings from what is none; they have nothing to do with FID.
    """
    from diffussm.evaluation import evaluate
    from diffussm.features import Inception, save_statistics
    from diffussm.image_sets import read_images

    run("evaluate", "--self-test")
    inception = Inception(random_inception(folder / "inception.pth"), starts_with="")
    # A part of them: all would take minutes.
    some = [batch[::2] for batch in read_images(images / "train", 32)][::7]
    held_out = folder / "held_out"
    for picture in sorted((images / "val").glob("*/*.png"))[::3]:
        (held_out / picture.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, held_out / picture.parent.name)
    reference = folder / "reference.npz"
    save_statistics(held_out, reference, extractor=inception)
    real = evaluate(some, reference, extractor=inception)
    drawn = evaluate(folder / "samples.npz", reference, extractor=inception)
    itself = evaluate(held_out, reference, extractor=inception)
    check(
        f"pictures at {real['fid']:.2f}, samples at {drawn['fid']:.2f}",
        0 < real["fid"] < drawn["fid"],
    )
    check(
        "the reference is at distance 0 from itself", itself["fid"] < 1e-3 * real["fid"]
    )
    check("and covers itself", itself["precision"] == itself["recall"] == 1)
    check("the result says how the samples were drawn", drawn["samples"]["steps"] == 10)
    check(
        "and by what they were judged",
        drawn["extractor"]["sha256"] and drawn["reference"]["sha256"],
    )


def main() -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.rehearsal", description=__doc__
    )
    parser.add_argument(
        "--keep", type=Path, help="work in this new folder and leave it behind"
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--count", type=int, default=56)
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="diffussm-rehearsal-"))
    folder.mkdir(parents=True, exist_ok=options.keep is None)
    begun = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        rehearse(folder, options.steps, options.count)
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(
        f"rehearsal: everything held, in {time.monotonic() - begun:.0f} s", flush=True
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
