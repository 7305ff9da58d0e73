"""Put the averaged weights of a run into the package.

``python -m tools.weights RUN NAME`` writes ``diffussm/weights/NAME``: the network in
half precision, the configuration of the run, its autoencoder if it has one, and
record.json, which says how the weights were made and what they can do. What the record
says of one of the same name is kept where no option changes it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from diffussm.autoencoder import decode, load_vae, vae_identity
from diffussm.checkpoints import find_checkpoint, step_of
from diffussm.command_line import call, preset_group
from diffussm.files import apply_umask, write_json
from diffussm.model import DiffuSSM
from diffussm.neighbours import find_copies
from diffussm.options import diffusion_of
from diffussm.plain_scores import plain_scores, real_images
from diffussm.pretrained import Pretrained, halved, load_pretrained
from diffussm.run_folder import read_run
from diffussm.sample_command import sample
from diffussm.sample_options import Sampler
from diffussm.sampling import draw
from tools.book import ROOT

BOX = ROOT / "diffussm" / "weights"
STEPS, SCALE = 50, 1.5


def sampler_of(box: Pretrained) -> Sampler:
    """The one of the figures: latents cannot be clipped, and keep their noise."""
    if box.vae is not None:
        return Sampler(STEPS, cfg_scale=SCALE)
    return Sampler(STEPS, "ddim", cfg_scale=SCALE, clip_denoised=True)


def drawn(box: Pretrained, model: DiffuSSM) -> Tensor:
    """An image of each class, decoded if they are latents, always the same noise."""
    y = torch.arange(len(box.data["classes"]))
    x = draw(
        sampler_of(box),
        model.eval(),
        diffusion_of(box.recipe),
        y,
        generator=torch.Generator().manual_seed(0),
        progress=False,
    )
    return x if box.vae is None else decode(load_vae(box.vae), x)


def told_of(box: Pretrained) -> str:
    """How the images of the figures are drawn."""
    clipped = ", clipped" if box.vae is None else ""
    method = sampler_of(box).method.upper()
    return f"{method}, {STEPS} steps, guidance {SCALE}{clipped}"


def half_precision(box: Pretrained, exact: DiffuSSM) -> dict[str, Any]:
    """How far images of rounded weights are from those of the weights in float32."""
    coarse = box.model()
    coarse.load_state_dict({n: w.half() for n, w in exact.state_dict().items()})
    first = drawn(box, exact)
    found = {"as stored": box.model(), "all of them in float16": coarse}
    return {
        "stored": "in float16; log dt, A and C of the kernels in float32",
        "largest difference": {
            name: round((drawn(box, model) - first).abs().max().item(), 4)
            for name, model in found.items()
        },
        "of": f"an image of each class in [-1, 1], {told_of(box)}, the same noise",
    }


def figures(box: Pretrained, train: str, held_out: str, count: int) -> dict[str, Any]:
    """KID beside its noise floor, nearest training images beside those of held-out."""
    images, others = real_images(train), real_images(held_out)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "set.npz")
        draw_set(box, out, count)
        scores = plain_scores([out], images, "pixels", held_out=others)
        mirrored = box.recipe.flip
        _, _, near = find_copies(out, images, others, count=count, mirrored=mirrored)
    return {
        "sampling": f"{told_of(box)}, {count} images, balanced classes, seed 0",
        "features": scores["features"]["sees"],
        "compared": scores["compared"],
        "KID to training images": scores["samples"][0]["kid"],
        "KID of held-out images to training images": scores["real"]["kid"],
        "nearest training image": near,
    }


def draw_set(box: Pretrained, out: Path, count: int) -> None:
    """By the command that everybody has."""
    words = f"--pretrained {box.folder.name} --out {out} --count {count}"
    words += f" --batch_size {min(count, 64)} --device cpu"
    method = sampler_of(box).method
    how = f"--method {method} --steps {STEPS} --cfg_scale {SCALE}"
    clip = "--clip_denoised true" if box.vae is None else ""
    if call(sample, f"{words} {how} {clip}".split(), preset_group):
        raise SystemExit("the set was not drawn")


def rounded(value: Any) -> Any:
    """Floats to four digits, in whatever holds them."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def store(run: Path, step: int | None, vae: Path | None, out: Path) -> Path:
    """Write all but the record; returns the folder of the checkpoint."""
    found = find_checkpoint(run, step)
    if found is None:
        raise SystemExit(f"{run} has no checkpoint of step {step}")
    out.mkdir(parents=True, exist_ok=True)
    config = read_run(run)
    config.write(out)
    (out / "config.json").rename(out / "run.json")
    halve(found / "ema" / "model.safetensors", out / "model.safetensors")
    shutil.copyfile(found / "ema" / "config.json", out / "config.json")
    if vae is not None:
        store_vae(vae, out)
    return found


def halve(source: Path, out: Path) -> None:
    """A file of weights, in half precision."""
    weights = halved(safetensors.torch.load_file(source))
    safetensors.torch.save_file(weights, out, metadata={"format": "pt"})
    apply_umask(out)


def store_vae(vae: Path, out: Path) -> None:
    """An autoencoder in half precision, and which one it is: its own encoder, rounded,
    stands for the one that made the latents.
    """
    file = "diffusion_pytorch_model.safetensors"
    (out / "vae").mkdir(exist_ok=True)
    shutil.copyfile(vae / "config.json", out / "vae" / "config.json")
    halve(vae / file, out / "vae" / file)
    exact = vae_identity(load_vae(vae), vae.name)["encoder_sha256"]
    identity = vae_identity(load_vae(out / "vae"), out.name)
    write_json(out / "vae.json", identity | {"rounded_from": exact})


def parser() -> argparse.ArgumentParser:
    """Of the command."""
    made = argparse.ArgumentParser(
        prog="python -m tools.weights", description=(__doc__ or "").splitlines()[0]
    )
    add = made.add_argument
    add("run", type=Path, help="folder of the run")
    add("name", help="what the package calls its weights")
    add("--step", type=int, help="of the checkpoint; default: the newest")
    add("--vae", type=Path, help="the autoencoder of a run on latents")
    add("--train", help="images that it learnt from, for the figures")
    add("--held_out", help="images that it did not")
    add("--count", type=int, default=500, help="how many are drawn for the figures")
    told = "what the record says of KEY, such as command, data or licence; repeatable"
    add("--said", action="append", default=[], metavar="KEY=TEXT", help=told)
    return made


def main() -> int:
    """The command; returns the exit status."""
    options = parser().parse_args()
    out = BOX / options.name
    found = store(options.run, options.step, options.vae, out)
    steps = step_of(found)
    path, seed = out / "record.json", read_run(options.run).recipe.seed
    earlier = json.loads(path.read_text()) if path.exists() else {}
    known = earlier | {"seed": seed, "steps": steps}
    record = known | dict(one.split("=", 1) for one in options.said)
    write_json(path, record)  # so that the name is known
    box = load_pretrained(options.name)
    record["half precision"] = half_precision(
        box, DiffuSSM.from_pretrained(found / "ema")
    )
    if options.train:
        about = options.train, options.held_out, options.count
        record["figures"] = figures(box, *about)
    write_json(path, rounded(record))
    print(path.read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
