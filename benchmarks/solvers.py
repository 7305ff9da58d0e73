"""How far solvers are from the curve they follow: ``python -m benchmarks.solvers``.

The digits that come with the package, without guidance and clipped, from the same
noise. The truth about the differential equation is our own DDIM with 1,000 steps; a
distance is the root mean square over all pixels, which span 2.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from torch import Tensor

from benchmarks.common import asked_runs, command, report
from diffussm.options import diffusion_of
from diffussm.pipeline import DiffuSSMPipeline
from diffussm.pretrained import load_pretrained
from diffussm.sample_options import Sampler
from diffussm.sampling import draw
from diffussm.schedulers import ancestral_scheduler

SOLVERS = {
    "DDIM": DDIMScheduler,
    "Euler": EulerDiscreteScheduler,
    "Heun": HeunDiscreteScheduler,
    "DPM++": DPMSolverMultistepScheduler,
}
STEPS = (5, 10, 20, 40)
TRUTH = 1000


def ends(
    pipe: DiffuSSMPipeline, kind: Any, steps: int, noise: Tensor
) -> tuple[Any, int]:
    """Images, and how often the network was called for them."""
    calls: list[int] = []
    pipe.scheduler = kind.from_config(ancestral_scheduler().config)
    hook = pipe.denoiser.register_forward_hook(lambda *_: calls.append(1))
    how = {"latents": noise, "output_type": "latent", "clip_denoised": True}
    labels = [number % 10 for number in range(len(noise))]
    images = pipe(labels, num_inference_steps=steps, **how).images
    hook.remove()
    return images, len(calls)


def main(argv: list[str] | None = None) -> int:
    runs = asked_runs("solvers", __doc__, argv, 1, "images of each class", kind=int)
    box, count = load_pretrained("digits"), 10 * runs
    pipe = DiffuSSMPipeline(box.model(), ancestral_scheduler())
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    truth = draw(
        Sampler(TRUTH, "ddim", clip_denoised=True),
        box.model(),
        diffusion_of(box.recipe),
        torch.arange(count) % 10,
        noise=noise,
        progress=False,
    )
    rows: list[dict[str, Any]] = []
    for name, kind in SOLVERS.items():
        for steps in STEPS:
            images, calls = ends(pipe, kind, steps, noise)
            distance = (images - truth).square().mean().sqrt().item()
            row = {"what": f"{name}, {steps} steps", "solver": name, "calls": calls}
            rows.append(row | {"distance": float(f"{distance:.4g}")})
    title = f"Distance of {count} digits from DDIM with {TRUTH:,} steps"
    settings = {"seed": 0, "images": count, "weights": "digits", "truth": TRUTH}
    return report("solvers", title, rows, settings=settings)


if __name__ == "__main__":
    raise SystemExit(command(main))
