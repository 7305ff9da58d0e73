"""Put the averaged weights of a run into the package.

``python -m tools.weights RUN NAME`` writes ``diffussm/weights/NAME``: config.json,
model.safetensors in half precision, and record.json, which says how they were made and
what they can do. The digits come from
``diffussm train digits --out RUN``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from diffussm.data import digits
from diffussm.diffusion import GaussianDiffusion
from diffussm.model import DiffuSSM
from diffussm.optimiser import DYNAMICS
from diffussm.sampling import sample
from tools.book import ROOT

STEPS, SCALE, EACH = 50, 1.5, 50
PRECISE = (*DYNAMICS, "kernel.C")


def figures_of_digits(model: DiffuSSM) -> dict[str, Any]:
    """What the stored weights draw: what a classifier makes of it, and distances."""
    from sklearn.svm import SVC

    images, labels = digits("train")
    held_out, theirs = digits("test")
    judge = SVC(C=10, gamma=0.02).fit(images.flatten(1).numpy(), labels.numpy())
    y = torch.arange(10).repeat_interleave(EACH)
    drawn = sample(
        model, GaussianDiffusion.linear(1000), y,
        steps=STEPS, method="ddim", cfg_scale=SCALE, clip_denoised=True,
        generator=torch.Generator().manual_seed(0), progress=False,
    )  # fmt: skip

    def nearest(some: torch.Tensor) -> float:
        return (
            torch.cdist(some.flatten(1), images.flatten(1))
            .min(dim=1)
            .values.mean()
            .item()
        )

    return {
        "sampling": f"DDIM, {STEPS} steps, guidance {SCALE}, clipped, {EACH} of "
        "each class, seed 0",
        "recognised by a support vector machine": float(
            (judge.predict(drawn.flatten(1)) == y.numpy()).mean()
        ),
        "held-out digits that it recognises": float(
            judge.score(held_out.flatten(1), theirs)
        ),
        "mean distance to the nearest training digit": round(nearest(drawn), 4),
        "the same of held-out digits": round(nearest(held_out), 4),
    }


def main() -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.weights", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "weights",
        type=Path,
        help="folder with config.json and model.safetensors: "
        "RUN/checkpoints/step_X/ema",
    )
    parser.add_argument("name", choices=["digits"], help="what the package calls them")
    parser.add_argument(
        "--made",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="what else the record says",
    )
    options = parser.parse_args()
    out = ROOT / "diffussm" / "weights" / options.name
    out.mkdir(parents=True, exist_ok=True)
    weights = safetensors.torch.load_file(options.weights / "model.safetensors")
    # what half precision would change too much: the parameters that the state spaces
    # keep in float32
    half = {
        name: tensor if name.endswith(PRECISE) else tensor.half()
        for name, tensor in weights.items()
    }
    safetensors.torch.save_file(
        half, out / "model.safetensors", metadata={"format": "pt"}
    )
    (out / "model.safetensors").chmod(0o644)
    (out / "config.json").write_text((options.weights / "config.json").read_text())
    made = dict(pair.split("=", 1) for pair in options.made)
    numbers = {
        key: json.loads(value)
        for key, value in made.items()
        if value.replace(".", "", 1).isdecimal()
    }
    record = {
        "command": f"diffussm train {options.name} --out RUN --device cpu",
        "weights": "moving average of the last step, in float16; log dt, A and C of "
        "the kernels in float32",
        "seed": 0,
        **(made | numbers),
        "data": "the handwritten digits of E. Alpaydin and C. Kaynak (UCI), as "
        "scikit-learn has them",
        "figures": figures_of_digits(DiffuSSM.from_pretrained(out)),
    }
    (out / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
