"""What guidance does to the scores of samples: ``python -m benchmarks.guidance``.

For each scale as many digits as are held out are drawn with the weights that come with
the package, from the same noise and for the same labels, and scored against the
training digits. The features are the last hidden layer of a small classifier, as in
the chapter *Evaluation*. The last row is the held-out digits themselves.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import command, report
from diffussm.data import digits
from diffussm.evaluation import evaluate
from diffussm.features import save_statistics
from diffussm.options import diffusion_of
from diffussm.pretrained import load_pretrained
from diffussm.sampling import sample

SCALES = (1.0, 1.1, 1.25, 1.5, 2.0)
SCORES = ("fid", "precision", "recall")


class DigitFeatures:
    """The last hidden layer of a classifier of digits, and its logits."""

    name, checksum = "a classifier of digits", "trained with seed 0"

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        torch.manual_seed(0)
        layers = (nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
        self.net = nn.Sequential(*layers, nn.ReLU(), nn.Linear(16, 10))
        optimizer = torch.optim.Adam(self.net.parameters(), lr=3e-3)
        for _ in range(300):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.net(images), labels).backward()
            optimizer.step()

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 (B, 3, 8, 8) -> "pool" (B, 16), "logits" (B, 10)."""
        hidden = self.net[:-1](pixels[:, :1].float() / 127.5 - 1)
        return {"pool": hidden, "logits": self.net[-1](hidden)}


def as_bytes(x: Tensor) -> Tensor:
    """(B, 1, 8, 8) in [-1, 1] -> uint8 (B, 3, 8, 8)."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().expand(-1, 3, -1, -1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.guidance", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--steps", type=int, default=10, help="steps of DDIM (default: 10)"
    )
    parser.add_argument(
        "--runs",
        type=int,
        default=2,
        help="sets, drawn with seeds 0, 1, ... (default: 2)",
    )
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.runs < 2:
        parser.error("--steps must be positive, and --runs at least 2")

    (images, labels), (held_out, wanted) = digits("train"), digits("test")
    features, box = DigitFeatures(images, labels), load_pretrained("digits")
    model, diffusion = box.model(), diffusion_of(box.recipe)
    how = {"steps": arguments.steps, "method": "ddim", "clip_denoised": True}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder, "reference.npz")
        save_statistics(as_bytes(images).split(64), reference, extractor=features)
        for scale in SCALES:
            sets = []
            for seed in range(arguments.runs):
                noise = torch.Generator().manual_seed(seed)
                more = {"cfg_scale": scale, "generator": noise, "progress": False}
                drawn = as_bytes(sample(model, diffusion, wanted, **how, **more))
                sets.append(Path(folder, f"{scale}-{seed}.npz"))
                np.savez(sets[-1], drawn.permute(0, 2, 3, 1).numpy())
            found = evaluate(sets, reference, extractor=features)
            row: dict[str, Any] = {"what": f"guidance {scale:g}", "scale": scale}
            row |= {name: round(found[name]["mean"], 4) for name in SCORES}
            rows.append(row | {"of each seed": {n: found[n]["values"] for n in SCORES}})
        real = evaluate(as_bytes(held_out).split(64), reference, extractor=features)
    rows.append({"what": "held-out digits"} | {n: round(real[n], 4) for n in SCORES})
    title = f"Scores of {len(wanted)} samples of the packaged digits, by guidance"
    seeds = list(range(arguments.runs))
    settings = {"seeds": seeds, "images": len(wanted), "weights": "digits", **how}
    return report("guidance", title, rows, settings=settings)


if __name__ == "__main__":
    raise SystemExit(command(main))
