"""A small pipeline for tests: a network with random weights, and ways to draw from
it.
"""

from dataclasses import replace

import diffusers
import torch

from diffussm.model import DiffuSSM, DiffuSSMConfig
from diffussm.pipeline import DiffuSSMPipeline
from diffussm.schedulers import ancestral_scheduler

NAMES = {"0": "great white shark, white shark", "1": "crane", "2": "crane"}
TINY = DiffuSSMConfig(
    input_size=4, in_channels=4, num_classes=3, d_model=16, n_blocks=1, d_state=4
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network(**changes):
    """Random weights everywhere: a new DiffuSSM would return zeros."""
    generator = seeded(1)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = DiffuSSM(replace(TINY, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("log_dt", "log_A_real", "A_imag")):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def piped(model=None, **options):
    model = network() if model is None else model
    options = {"id2label": NAMES if model.config.num_classes == 3 else None} | options
    pipe = DiffuSSMPipeline(
        model, options.pop("scheduler", ancestral_scheduler()), **options
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, labels=(0, 2, 1), **options):
    options = {
        "num_inference_steps": 5,
        "generator": seeded(),
        "output_type": "latent",
    } | options
    return pipe(list(labels) if isinstance(labels, tuple) else labels, **options).images


def small_vae(latent_channels=4):
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        scaling_factor=0.5,
    ).eval()
