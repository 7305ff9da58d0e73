"""Chapter 13: the images of chapter 7 by another road, any scheduler, and a folder that needs nobody."""

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffussm.diffusion import GaussianDiffusion
from diffussm.model import DiffuSSM, DiffuSSMConfig
from diffussm.options import RECIPES
from diffussm.runs import train
from diffussm.sampling import sample

diffusers = pytest.importorskip("diffusers")
pipeline = pytest.importorskip("diffussm.pipeline")
from diffussm.pipeline import (  # noqa: E402
    FEWEST_STEPS,
    Denoiser,
    DiffuSSMPipeline,
    ancestral_scheduler,
    scheduler_for,
    self_contained_code,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning"
)
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


# The same images as ours


@pytest.mark.parametrize(
    ("steps", "scale", "channels"),
    [(1, 1.0, None), (2, 1.0, None), (50, 1.0, None), (50, 2.0, None), (250, 1.5, 3)],
)
def test_ancestral_images_are_those_of_sample(steps, scale, channels):
    model, y = network(), torch.tensor([0, 2, 1])
    ours = sample(
        model,
        GaussianDiffusion.linear(),
        y,
        steps,
        "ddpm",
        scale,
        seeded(),
        progress=False,
        guidance_channels=channels,
    )
    theirs = draw(
        piped(model),
        num_inference_steps=steps,
        guidance_scale=scale,
        guidance_channels=channels,
    )
    assert (ours - theirs).abs().max() < 1e-4 * ours.abs().max()


@pytest.mark.parametrize("timesteps", [100, 1000])
def test_schedule_is_that_of_training(timesteps):
    ours = GaussianDiffusion.linear(timesteps).alphas_cumprod
    theirs = ancestral_scheduler(timesteps).alphas_cumprod
    torch.testing.assert_close(theirs.double(), ours, rtol=1e-4, atol=0)


def test_shorter_training_schedules_work_too():
    model, y = network(), torch.tensor([0, 2, 1])
    ours = sample(
        model,
        GaussianDiffusion.linear(100),
        y,
        20,
        "ddpm",
        1.0,
        seeded(),
        progress=False,
    )
    pipe = piped(model, scheduler=ancestral_scheduler(100), num_train_timesteps=100)
    assert (
        ours - draw(pipe, num_inference_steps=20)
    ).abs().max() < 1e-4 * ours.abs().max()


def test_ddim_is_ours_where_the_timesteps_agree():
    model, y = network(), torch.tensor([0, 2, 1])
    for steps in (
        1,
        3,
        20,
        1000,
    ):  # diffusers' own list and its own step agree for the last only
        ours = sample(
            model,
            GaussianDiffusion.linear(),
            y,
            steps,
            "ddim",
            1.0,
            seeded(),
            progress=False,
        )
        scheduler = diffusers.DDIMScheduler.from_config(ancestral_scheduler().config)
        theirs = draw(piped(model, scheduler=scheduler), num_inference_steps=steps)
        assert (ours - theirs).abs().max() < 1e-3 * ours.abs().max()


def test_learned_variance_is_honoured():
    """v = 1 against v = -1 in the network's second half changes what the ancestral scheduler draws."""

    def with_v(value):
        model = network()
        with torch.no_grad():
            weight = model.head.weight.view(-1, 8, 16)  # (M, 2C, D) with P = 1
            weight[:, 4:] = 0
            model.head.bias.view(-1, 8)[:, 4:] = value
        return model

    low, high = (piped(with_v(value)) for value in (-1.0, 1.0))
    assert not torch.allclose(draw(low), draw(high))
    for pipe in (low, high):  # the fixed variance is that of v = -1
        pipe.scheduler = diffusers.DDPMScheduler.from_config(
            pipe.scheduler.config, variance_type="fixed_small"
        )
    torch.testing.assert_close(draw(low), draw(high))
    torch.testing.assert_close(
        draw(low), draw(piped(with_v(-1.0))), rtol=1e-4, atol=1e-4
    )


# Any scheduler

SOLVERS = [
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
]
MEAN = torch.tensor([0.4, -0.3, 0.2, 0.1]).view(1, 4, 1, 1)


class Gaussian(Denoiser):
    """The exact noise of data from N(MEAN, 0.25 I), and rubbish for the variance."""

    def forward(self, x, t, y=None):
        alphas_cumprod = GaussianDiffusion.linear().alphas_cumprod.float()
        t = t.float()  # Euler's timesteps are not whole numbers
        low = t.floor().long().clamp(0, 998)
        share = t - low
        ab = (
            (1 - share) * alphas_cumprod[low].log()
            + share * alphas_cumprod[low + 1].log()
        ).exp()
        ab = ab.view(-1, 1, 1, 1)
        eps = (1 - ab).sqrt() * (x - ab.sqrt() * MEAN) / (0.25 * ab + 1 - ab)
        return torch.cat([eps, torch.full_like(eps, 7.0)], 1)


@pytest.mark.parametrize("name", SOLVERS)
def test_schedulers_draw_the_known_distribution(name):
    """With the exact noise of a Gaussian every solver ends in that Gaussian, whatever v says."""
    steps = {"DDPMParallelScheduler": 200}.get(
        name, max(50, FEWEST_STEPS[name])
    )  # fixed_small converges slowly
    options = (
        {"variance_type": "fixed_small"} if name == "DDPMParallelScheduler" else {}
    )
    scheduler = getattr(diffusers, name).from_config(
        ancestral_scheduler().config, **options
    )
    exact = Gaussian(replace(TINY, input_size=8))
    x = draw(
        piped(exact, scheduler=scheduler),
        0,
        images_per_label=100,
        num_inference_steps=steps,
    )
    assert x.shape == (100, 4, 8, 8)
    torch.testing.assert_close(x.mean((0, 2, 3)), MEAN.flatten(), atol=0.03, rtol=0)
    assert abs(x.std((0, 2, 3)).mean() / 0.5 - 1) < 0.06


def test_schedulers_do_not_see_the_variance_unless_they_want_it(monkeypatch):
    seen = []
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        ancestral_scheduler().config
    )
    assert (
        scheduler.config.variance_type == "learned_range"
    )  # which would cut epsilon to three channels
    runs, takes = scheduler_for(scheduler, 1000)
    assert runs.config.variance_type is None and not takes
    assert (
        scheduler.config.variance_type == "learned_range"
    )  # the user's own is left alone
    assert scheduler_for(ancestral_scheduler(), 1000)[1] is True
    step = diffusers.DDPMScheduler.step

    def noted(self, output, t, x, generator=None, **more):
        seen.append(output.shape[1])
        return step(self, output, t, x, generator=generator, **more)

    monkeypatch.setattr(diffusers.DDPMScheduler, "step", noted)
    draw(piped(), num_inference_steps=2)
    assert seen == [8, 8]


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            lambda: diffusers.DDIMScheduler(prediction_type="v_prediction"),
            "'v_prediction'.*expected 'epsilon'",
        ),
        (
            lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
            "FlowMatchEuler.*expected 'epsilon'",
        ),
        (
            lambda: diffusers.DDIMScheduler(beta_schedule="scaled_linear"),
            "another noise schedule",
        ),
        (
            lambda: diffusers.DDIMScheduler(num_train_timesteps=500),
            "another noise schedule.*from_config",
        ),
        (
            lambda: diffusers.DDIMScheduler(rescale_betas_zero_snr=True),
            "another noise schedule",
        ),
        (lambda: diffusers.DDPMScheduler(variance_type="learned"), "'learned_range'"),
    ],
)
def test_schedulers_of_another_kind_are_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        piped(scheduler=scheduler())
    pipe = piped()
    pipe.scheduler = scheduler()
    with pytest.raises(ValueError, match=message):
        draw(pipe)


# Calling it


def test_labels_by_name_and_number_are_the_same():
    pipe = piped()
    by_number = draw(pipe, (0, 2))
    assert torch.equal(draw(pipe, ("white shark", 2)), by_number)
    assert torch.equal(draw(pipe, torch.tensor([0, 2])), by_number)
    assert (
        pipe.get_label_ids("great white shark") == pipe.get_label_ids(NAMES["0"]) == [0]
    )
    assert torch.equal(draw(pipe, 0, images_per_label=2), draw(pipe, (0, 0)))
    for labels in (
        np.array([0, 2]),
        [np.int64(0), np.uint8(2)],
        [[0], [2]],
        np.array([[0], [2]], np.int32),
    ):
        assert torch.equal(draw(pipe, labels), by_number)
    assert torch.equal(draw(pipe, np.int64(0)), draw(pipe, 0))
    assert torch.equal(draw(pipe, 0, images_per_label=np.int64(2)), draw(pipe, (0, 0)))


@pytest.mark.parametrize("labels", [[], np.array([], dtype=np.int64), torch.empty(0)])
@pytest.mark.parametrize("vae", [False, True])
def test_no_labels_give_no_images(labels, vae):
    pipe = piped(vae=small_vae()) if vae else piped(network(in_channels=3))
    side = 8 if vae else 4
    assert draw(pipe, labels).shape == (0, 4 if vae else 3, 4, 4)
    assert draw(pipe, labels, output_type="pt").shape == (0, 3, side, side)
    assert draw(pipe, labels, output_type="np").shape == (0, side, side, 3)
    assert draw(pipe, labels, output_type="pil") == []


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ("white shrak", ValueError, "no class 'white shrak'; did you mean white shark"),
        ("crane", ValueError, r"classes \[1, 2\]; give the number"),
        (3, ValueError, "class label 3: this model has classes 0 to 2"),
        ([0, -1], ValueError, "class label -1"),
        (True, TypeError, "class label True"),
        ([0.5], TypeError, "class label 0.5: expected a name or an integer"),
        ([[0], [3]], ValueError, "class label 3: this model has classes 0 to 2"),
        (np.array([0.0]), TypeError, "class label 0.0: expected a name or an integer"),
        (np.array([True]), TypeError, "class label True"),
        (None, ValueError, "class_labels are missing: this model has 3 classes"),
    ],
)
def test_bad_labels_are_explained(labels, error, message):
    with pytest.raises(error, match=message):
        draw(piped(), labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0: expected 1 to 1000"),
        ({"num_inference_steps": 1001}, "expected 1 to 1000"),
        (
            {"num_inference_steps": 2.0},
            "num_inference_steps=2.0: expected 1 to 1000, an integer",
        ),
        ({"eta": 0.5}, "eta=0.5: DDPMScheduler has no such noise"),
        (
            {"clip_denoised": True},
            "clip_denoised=True clamps .* latents, which go beyond: omit it",
        ),
        ({"output_type": "jpg"}, "output_type='jpg'"),
        ({"output_type": "pil"}, "there is no VAE to decode"),
        ({"guidance_scale": -1.0}, "cfg_scale=-1.0"),
        ({"guidance_channels": 5}, "guidance_channels=5: the model has 4"),
        ({"images_per_label": 0}, "images_per_label=0"),
        (
            {"latents": torch.zeros(1, 4, 4, 4)},
            r"latents has shape \(1, 4, 4, 4\): expected \(3, 4, 4, 4\)",
        ),
        ({"generator": [seeded(), seeded()]}, "2 generators for 3 images"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_step(options, message):
    pipe = piped()
    pipe.denoiser.forward = lambda *_: pytest.fail("the network was called")
    with pytest.raises(ValueError, match=message):
        draw(pipe, **options)


def test_three_channel_guidance_leaves_the_fourth_alone():
    pipe = piped()
    noise = torch.randn(1, 4, 4, 4, generator=seeded(3))
    plain, three, whole = (
        draw(pipe, (0,), num_inference_steps=1, latents=noise, **options)
        for options in (
            {},
            {"guidance_scale": 3.0, "guidance_channels": 3},
            {"guidance_scale": 3.0},
        )
    )
    torch.testing.assert_close(three[:, 3], plain[:, 3])
    torch.testing.assert_close(three[:, :3], whole[:, :3])
    assert not torch.allclose(whole[:, 3], plain[:, 3])


def test_a_generator_for_each_image_makes_images_independent_of_the_batch():
    together = draw(piped(), (0, 1), generator=[seeded(5), seeded(6)])
    alone = draw(piped(), (1,), generator=seeded(6))
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


def test_callback_sees_every_step_and_may_change_it():
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append((step, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 4 else None

    assert not draw(piped(), callback_on_step_end=note).any()
    assert seen == [(0, 999), (1, 749), (2, 500), (3, 250), (4, 0)]


def test_global_random_state_is_untouched_with_a_generator():
    before = torch.random.get_rng_state()
    draw(piped())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_progress_bar_can_be_silenced(capsys):
    pipe = piped()
    draw(pipe)
    assert capsys.readouterr() == ("", "")
    pipe.set_progress_bar_config(disable=False)
    draw(pipe)
    assert "5/5" in capsys.readouterr().err


def test_unconditional_models_take_a_number():
    pipe = piped(network(num_classes=0))
    assert draw(pipe, None, images_per_label=2).shape == (2, 4, 4, 4)
    with pytest.raises(ValueError, match="unconditional; leave them out"):
        draw(pipe, 0)
    with pytest.raises(ValueError, match="no label for 'no class'"):
        draw(pipe, None, guidance_scale=2.0)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_pixels_come_out_as_asked(channels, mode):
    pipe = piped(network(in_channels=channels))
    x = draw(pipe)
    expected = (x / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(draw(pipe, output_type="pt"), expected)
    torch.testing.assert_close(
        torch.from_numpy(draw(pipe, output_type="np")), expected.permute(0, 2, 3, 1)
    )
    images = draw(pipe, output_type="pil")
    assert [image.mode for image in images] == [mode] * 3 and images[0].size == (4, 4)
    assert isinstance(pipe(0, num_inference_steps=1, return_dict=False), tuple)


def test_latents_are_unscaled_and_decoded():
    vae = small_vae()
    pipe = piped(vae=vae)
    with torch.no_grad():
        expected = (vae.decode(draw(pipe) / 0.5).sample / 2 + 0.5).clamp(0, 1)
    assert expected.shape == (3, 3, 8, 8)
    torch.testing.assert_close(draw(pipe, output_type="pt"), expected)


def test_a_vae_of_other_channels_is_refused():
    with pytest.raises(
        ValueError, match="latents of 2 channels, but the model makes 4"
    ):
        piped(vae=small_vae(2))
    pipe = piped()
    pipe.vae = small_vae(2)
    with pytest.raises(ValueError, match="latents of 2 channels"):
        draw(pipe)


def test_names_outside_the_table_are_refused():
    with pytest.raises(ValueError, match="'3': 'dog', but the classes are 0 to 2"):
        piped(id2label={3: "dog"})


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_images_that_are_not_finite_are_an_error(output_type):
    pipe = piped(network(in_channels=1))
    with torch.no_grad():
        pipe.denoiser.head.bias.fill_(float("nan"))
    with pytest.raises(
        FloatingPointError, match="not finite in 3 of 3 images .DDPMScheduler, 5 steps"
    ):
        draw(pipe, output_type=output_type)
    pipe = piped(vae=small_vae())
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(float("inf"))
    if output_type != "latent":
        with pytest.raises(
            FloatingPointError, match="the VAE decoded to numbers that are not finite"
        ):
            draw(pipe, output_type=output_type)


@pytest.mark.parametrize(
    ("name", "method"), [("DDPMScheduler", "ddpm"), ("DDIMScheduler", "ddim")]
)
def test_clipping_is_that_of_sample(name, method):
    model, y = network(in_channels=1), torch.tensor([0, 2, 1])
    options = {"steps": 20, "method": method, "clip_denoised": True, "progress": False}
    ours = sample(model, GaussianDiffusion.linear(), y, generator=seeded(), **options)
    pipe = piped(
        model,
        scheduler=getattr(diffusers, name).from_config(ancestral_scheduler().config),
    )
    theirs = draw(pipe, num_inference_steps=20, clip_denoised=True)
    assert (ours - theirs).abs().max() < 1e-4
    assert (
        draw(pipe, num_inference_steps=20) - theirs
    ).abs().max() > 0.1  # it matters here


@pytest.mark.parametrize("name", sorted(FEWEST_STEPS))
def test_clipping_works_with_every_scheduler(name):
    """Random weights without it end at numbers in the hundreds."""
    scheduler = getattr(diffusers, name).from_config(ancestral_scheduler().config)
    steps = max(20, FEWEST_STEPS[name])
    x = draw(
        piped(network(in_channels=1), scheduler=scheduler),
        num_inference_steps=steps,
        clip_denoised=True,
    )
    assert x.abs().max() < 1.5


@pytest.mark.parametrize("option", ["clip_sample", "thresholding"])
def test_schedulers_that_clip_latents_are_refused(option):
    scheduler = diffusers.DDIMScheduler.from_config(
        ancestral_scheduler().config, **{option: True}
    )
    with pytest.raises(
        ValueError,
        match=f"DDIMScheduler has {option}=True.*make it with {option}=False",
    ):
        draw(piped(scheduler=scheduler))
    draw(piped(network(in_channels=1), scheduler=scheduler))


def test_a_network_in_a_wrapper_is_taken_out_of_it():
    model = network()
    expected = draw(piped(model), guidance_scale=2.0)
    pipe = DiffuSSMPipeline(torch.nn.DataParallel(model), ancestral_scheduler())
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(draw(pipe, guidance_scale=2.0), expected)
    pipe.denoiser = torch.nn.DataParallel(pipe.denoiser)
    with pytest.raises(
        TypeError, match="the denoiser is a DataParallel.*pipe.denoiser.module"
    ):
        draw(pipe)


def test_wrapping_shares_the_weights():
    model = network()
    pipe = piped(model)
    assert pipe.denoiser.head.weight.data_ptr() == model.head.weight.data_ptr()
    assert (
        isinstance(pipe.denoiser, Denoiser)
        and not pipe.denoiser.head.weight.requires_grad
    )
    assert model.head.weight.requires_grad
    assert pipe.device.type == "cpu" and pipe.dtype == torch.float32
    assert {"denoiser", "scheduler", "vae"} == set(pipe.components)


def states(pipe):
    """dtypes of the S4D parameters and of all others."""
    found = {True: set(), False: set()}
    for name, parameter in pipe.denoiser.named_parameters():
        found[name.endswith(("log_dt", "log_A_real", "A_imag", ".C"))].add(
            parameter.dtype
        )
    return found[True], found[False]


@pytest.mark.parametrize("way", ["torch_dtype", "to", "half", "diffusers"])
def test_half_precision_leaves_the_state_spaces_in_float32(
    saved, way, tmp_path, monkeypatch
):
    dtype = torch.float16 if way == "half" else torch.bfloat16
    if way == "torch_dtype":
        pipe = load(saved.folder, torch_dtype=dtype)
    elif way == "diffusers":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(
            "diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path)
        )
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            str(saved.folder), trust_remote_code=True, torch_dtype=dtype
        )
        assert type(pipe.denoiser).__module__.startswith("diffusers_modules")
    else:
        pipe = load(saved.folder)
        pipe = pipe.to(dtype) if way == "to" else pipe
        pipe.denoiser = pipe.denoiser.half() if way == "half" else pipe.denoiser
    pipe.set_progress_bar_config(disable=True)
    assert states(pipe) == ({torch.float32}, {dtype})
    full = draw(load(saved.folder))
    assert 0 < (draw(pipe) - full).abs().max() < 0.05 * full.abs().max()


COPIES = """
import sys, torch, diffusers
from diffusers import DiffusionPipeline
from diffussm.pipeline import DiffuSSMPipeline

def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    return pipe(0, num_inference_steps=3, generator=seed, output_type="latent").images

ours = DiffuSSMPipeline.from_pretrained(FOLDER)
expected = draw(ours)
for copy in range(10):  # each time diffusers runs the code in the folder again
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        del sys.modules[name]
    other = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    assert type(other.denoiser) is not type(ours.denoiser)
    assert torch.equal(draw(other), expected) and torch.equal(draw(ours), expected), copy
with torch.enable_grad():
    for pipe in (ours, other):
        pipe.denoiser.requires_grad_(True)
        pipe.denoiser(torch.randn(1, 4, 4, 4), torch.tensor([5]), torch.tensor([1])).sum().backward()
        assert all(p.grad.isfinite().all() for p in pipe.denoiser.parameters() if p.grad is not None)
print("right")
"""


def test_ten_copies_of_the_code_live_beside_the_package(saved, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "dev",
            "-W",
            "ignore",
            "-c",
            f"FOLDER = {str(saved.folder)!r}\n{COPIES}",
        ],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.strip() == "right", done.stderr[-2000:]


def test_half_precision_keeps_the_chain_in_float32():
    full = draw(piped())
    half = draw(piped().to(torch.bfloat16))
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.05 * full.abs().max()


# Saving and loading


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "tiny-shark"
    pipe = piped(vae=small_vae(), training={"step": 7, "data": "sharks", "flip": None})
    pipe.save_pretrained(
        folder,
        license="cc-by-4.0",
        evaluation={
            "FID": 2.5,
            "precision": 0.75,
            "how": {"steps": 250, "guidance": {"scale": 1.5}},
        },
    )
    return SimpleNamespace(
        folder=folder,
        images=draw(pipe, ("white shark", 1), output_type="pt"),
        pipe=pipe,
    )


def load(folder, **options):
    pipe = DiffuSSMPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_saved_folder_loads_with_the_package(saved):
    pipe = load(saved.folder)
    assert torch.equal(draw(pipe, ("white shark", 1), output_type="pt"), saved.images)
    assert dict(pipe.config.id2label) == NAMES and pipe.config.training["step"] == 7
    weights = DiffuSSM.from_pretrained(saved.folder / "denoiser").state_dict()
    for name, tensor in saved.pipe.denoiser.state_dict().items():
        assert torch.equal(weights[name], tensor)
    assert load(saved.folder, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    other = diffusers.DDIMScheduler.from_config(saved.pipe.scheduler.config)
    assert load(saved.folder, scheduler=other).scheduler is other


ALONE = """
import sys

class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffussm":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Nowhere())
sys.path[:] = [path for path in sys.path if path not in ("", ROOT)]
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler

try:
    import diffussm
    raise SystemExit("diffussm could be imported")
except ModuleNotFoundError:
    pass
pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
options = {"num_inference_steps": 5, "output_type": "pt"}
images = pipe(["white shark", 1], generator=torch.Generator().manual_seed(0), **options).images
torch.save(images, OUT)
pipe.save_pretrained(AGAIN)
pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
assert pipe(0, guidance_scale=2.0, **options).images.isfinite().all()
try:
    type(pipe).from_run("nowhere")
except ImportError as error:
    assert "install" in str(error)
assert not [name for name in sys.modules if name.partition(".")[0] == "diffussm"]
"""


def test_saved_folder_needs_no_package(saved, tmp_path):
    places = {
        "FOLDER": saved.folder,
        "OUT": tmp_path / "images.pt",
        "AGAIN": tmp_path / "again",
    }
    places["ROOT"] = os.path.dirname(os.path.dirname(pipeline.__file__))
    names = "".join(f"{name} = {str(path)!r}\n" for name, path in places.items())
    done = subprocess.run(
        [sys.executable, "-c", names + ALONE],
        cwd=tmp_path,
        env={
            **os.environ,
            "HF_MODULES_CACHE": str(tmp_path / "code"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "might require the following packages" not in done.stderr
    assert "Expected types" not in done.stderr and "not expected by" not in done.stderr
    assert torch.equal(torch.load(places["OUT"], weights_only=True), saved.images)
    for name in (
        "pipeline.py",
        "model_index.json",
        "denoiser/modeling_diffussm.py",
    ):  # a copy of a copy
        assert (places["AGAIN"] / name).read_bytes() == (
            saved.folder / name
        ).read_bytes()
    assert torch.equal(
        draw(load(places["AGAIN"]), ("white shark", 1), output_type="pt"), saved.images
    )


def test_diffusers_asks_before_it_runs_code(saved, tmp_path):
    with pytest.raises(ValueError, match="trust_remote_code"):
        diffusers.DiffusionPipeline.from_pretrained(str(saved.folder))


def test_folder_holds_safetensors_and_readable_code_only(saved):
    files = {
        str(path.relative_to(saved.folder))
        for path in saved.folder.rglob("*")
        if path.is_file()
    }
    assert files == {
        "README.md",
        "denoiser/config.json",
        "denoiser/model.safetensors",
        "denoiser/modeling_diffussm.py",
        "model_index.json",
        "pipeline.py",
        "scheduler/scheduler_config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert [path.name for path in saved.folder.parent.iterdir()] == [
        "tiny-shark"
    ]  # no draft is left


def test_the_one_file_is_complete_and_holds_nothing_idle():
    tree = ast.parse(self_contained_code())
    imports = [
        node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    origins = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert not [origin for origin in origins if origin.startswith(("diffussm", "."))]
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    used |= {str(text).partition(":")[2] for text in texts}  # those named for `later`
    for node in tree.body:
        if (
            isinstance(node, ast.FunctionDef | ast.ClassDef)
            and node.name != "DiffuSSMPipeline"
        ):
            assert node.name in used, f"{node.name} is never used"
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F,E9", "-"],
        input=self_contained_code(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout  # no undefined name, no idle import
    names = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    assert (
        len(names) == len(set(names)) and "DiffuSSM" in names and "train" not in names
    )


def test_only_components_are_lists_in_the_index(saved):
    """diffusers takes every list in model_index.json for a component and looks for its files on the hub."""
    index = json.loads((saved.folder / "model_index.json").read_text())
    lists = {key for key, value in index.items() if isinstance(value, list)}
    assert lists == {"_class_name", "denoiser", "scheduler", "vae"}
    from diffusers.pipelines.pipeline_loading_utils import (
        _get_custom_components_and_folders,
    )

    files = [
        str(path.relative_to(saved.folder))
        for path in saved.folder.rglob("*")
        if path.is_file()
    ]
    custom, _ = _get_custom_components_and_folders("someone/tiny-shark", index, files)
    assert custom == {"denoiser": "modeling_diffussm"}


def test_model_card_has_the_figures(saved):
    card = (saved.folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\nlicense: cc-by-4.0\n")
    parameters = sum(
        parameter.numel() for parameter in saved.pipe.denoiser.parameters()
    )
    for line in (
        "# tiny-shark",
        f"| parameters | {parameters:,} |",
        "| d_model | 16 |",
        "| step | 7 |",
        "| FID | 2.5 |",
        "| precision | 0.75 |",
        "| how.guidance.scale | 1.5 |",
        "| 0 | great white shark, white shark |",
    ):
        assert line in card.splitlines()
    assert "flip" not in card and "@article{diffussm" in card
    call = re.search(r"pipe\((.+?)\)\.images", card).group(1)
    assert call.startswith("'great white shark, white shark', guidance_scale=1.5")


def test_model_card_does_not_invent_figures(tmp_path):
    piped().save_pretrained(tmp_path / "bare")
    card = (tmp_path / "bare" / "README.md").read_text()
    assert "Not measured." in card and "Not recorded." in card and "not stated" in card
    assert "clip_denoised" not in card  # which latents cannot be
    piped(network(in_channels=1)).save_pretrained(tmp_path / "pixels")
    assert (
        "pass `clip_denoised=True`" in (tmp_path / "pixels" / "README.md").read_text()
    )
    assert "license:" not in card


def test_evaluation_is_read_from_its_file(tmp_path):
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"fid": 9.25, "reference": {"sha256": "abc"}}))
    piped().save_pretrained(tmp_path / "scored", evaluation=result, name="Scored")
    card = (tmp_path / "scored" / "README.md").read_text()
    assert (
        "| fid | 9.25 |" in card
        and "| reference.sha256 | abc |" in card
        and "# Scored" in card
    )
    result.write_text("FID: 9")
    with pytest.raises(ValueError, match="no JSON"):
        piped().save_pretrained(tmp_path / "broken", evaluation=result)
    with pytest.raises(FileNotFoundError):
        piped().save_pretrained(tmp_path / "broken", evaluation=tmp_path / "none.json")
    assert not (tmp_path / "broken").exists()


def test_nothing_is_overwritten(saved, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for folder in (saved.folder, tmp_path / "full", tmp_path / "full" / "thesis.txt"):
        with pytest.raises(FileExistsError, match="nothing was written"):
            piped().save_pretrained(folder)
    with pytest.raises(ValueError, match="safetensors"):
        piped().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(ValueError, match="push_to_hub"):
        piped().save_pretrained(tmp_path / "pushed", push_to_hub=True)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    pipe = piped()
    monkeypatch.setattr(
        pipe.scheduler,
        "save_pretrained",
        lambda _: (_ for _ in ()).throw(OSError("full")),
    )
    with pytest.raises(OSError, match="full"):
        pipe.save_pretrained(tmp_path / "half")
    assert not list(tmp_path.iterdir())


def damaged(saved, tmp_path):
    import shutil

    return shutil.copytree(saved.folder, tmp_path / "copy")


@pytest.mark.parametrize(
    ("file", "text", "error", "message"),
    [
        (
            "model_index.json",
            None,
            FileNotFoundError,
            "no folder with a model_index.json",
        ),
        ("model_index.json", "{", ValueError, "is damaged"),
        ("model_index.json", "[]", ValueError, "is damaged"),
        (
            "denoiser/model.safetensors",
            None,
            FileNotFoundError,
            "model.safetensors does not exist",
        ),
        ("denoiser/config.json", "{}", ValueError, "another model"),
        (
            "scheduler/scheduler_config.json",
            None,
            ValueError,
            "no usable DDPMScheduler",
        ),
        (
            "vae/diffusion_pytorch_model.safetensors",
            None,
            ValueError,
            "no usable AutoencoderKL",
        ),
        (
            "vae/diffusion_pytorch_model.safetensors",
            "x",
            ValueError,
            "no usable AutoencoderKL",
        ),
    ],
)
def test_missing_and_damaged_files_are_named(
    saved, tmp_path, file, text, error, message
):
    folder = damaged(saved, tmp_path)
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    with pytest.raises(error, match=message):
        load(folder)


@pytest.mark.parametrize(
    "name", ["os", "logging", "AutoencoderKL", "DiffusionPipeline", 3]
)
def test_an_index_cannot_make_us_call_anything_else(saved, tmp_path, name):
    folder = damaged(saved, tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", name]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected a SchedulerMixin"):
        load(folder)


def test_our_loader_runs_no_code_of_the_folder(saved, tmp_path):
    folder = damaged(saved, tmp_path)
    for file in folder.rglob("*.py"):
        file.write_text("raise SystemExit('code of the folder was run')")
    load(folder)


def test_other_pipelines_and_unknown_options_are_refused(saved, tmp_path):
    with pytest.raises(TypeError, match=r"unknown options \['variant'\]"):
        load(saved.folder, variant="fp16")
    folder = damaged(saved, tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({**index, "_class_name": ["p", "DiTPipeline"]})
    )
    with pytest.raises(ValueError, match="holds a DiTPipeline"):
        load(folder)


# From a training run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    recipe = RECIPES["digits"]
    config = replace(
        recipe,
        model=replace(recipe.model, d_model=8, n_blocks=1, d_state=4),
        steps=2,
        batch_size=4,
        warmup=0,
        cooldown=0,
    )
    folder = tmp_path_factory.mktemp("runs") / "digits"
    return folder, train(config, folder, device="cpu", progress=False)


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_a_run_becomes_a_pipeline(run, weights, tmp_path):
    folder, state = run
    pipe = DiffuSSMPipeline.from_run(folder, weights)
    for name, tensor in getattr(state, weights).state_dict().items():
        assert torch.equal(pipe.denoiser.state_dict()[name], tensor)
    assert pipe.get_label_ids(["7", 3]) == [7, 3]
    facts = dict(pipe.config.training)
    assert (facts["weights"], facts["step"], facts["images_seen"]) == (weights, 2, 8)
    pipe.save_pretrained(tmp_path / "digits")
    assert "| images_seen | 8 |" in (tmp_path / "digits" / "README.md").read_text()
    assert dict(load(tmp_path / "digits").config.training) == facts


def test_a_kept_step_becomes_a_pipeline(run):
    folder, state = run
    pipe = DiffuSSMPipeline.from_run(folder, "model", step=2)
    assert torch.equal(pipe.denoiser.head.weight, state.model.head.weight)
    with pytest.raises(
        FileNotFoundError, match="has no checkpoint of step 1; there are 2"
    ):
        DiffuSSMPipeline.from_run(folder, step=1)


def test_latents_of_another_encoder_are_refused_and_the_decoder_is_recorded(
    tmp_path, monkeypatch
):
    """Of a run on latents; the encoder must be theirs, the decoder may be another."""
    from diffussm import autoencoder, run_folder

    vae = small_vae()
    made_by = autoencoder.vae_identity(vae, "/data/models/sd-vae")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text(json.dumps({"vae": made_by}))
    (tmp_path / "config.json").touch()
    config = replace(RECIPES["digits"], data=str(tmp_path / "store"))
    monkeypatch.setattr(
        run_folder, "load_run", lambda *_: (network(), config, ["a", "b", "c"])
    )
    monkeypatch.setattr(
        run_folder, "find_checkpoint", lambda *_: tmp_path / "step_00000007"
    )
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(1)
    pipe = DiffuSSMPipeline.from_run(tmp_path, vae=vae)
    facts = pipe.config.training
    assert facts["latents"]["name"] == "sd-vae"  # not where it lies on someone's disk
    assert (
        facts["vae"]["encoder_sha256"]
        == made_by["encoder_sha256"]
        == facts["latents"]["encoder_sha256"]
    )
    assert facts["vae"]["decoder_sha256"] != made_by["decoder_sha256"]
    pipe.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert f"| vae.decoder_sha256 | {facts['vae']['decoder_sha256']} |" in card
    with torch.no_grad():
        vae.encoder.conv_in.bias.add_(1)
    with pytest.raises(ValueError, match="made by the encoder of"):
        DiffuSSMPipeline.from_run(tmp_path, vae=vae)


def test_no_run_is_an_error_that_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a training run"):
        DiffuSSMPipeline.from_run(tmp_path)


def test_importing_the_package_does_not_import_diffusers():
    code = "import sys, diffussm, diffussm.model, diffussm.runs; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
