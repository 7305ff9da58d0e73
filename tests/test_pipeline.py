"""The images of `sample` by another road, with any scheduler that is right."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffussm.diffusion import GaussianDiffusion
from diffussm.sampling import sample

diffusers = pytest.importorskip("diffusers")
from pipelines import NAMES, TINY, draw, network, piped, seeded, small_vae  # noqa: E402

from diffussm.denoiser import Denoiser  # noqa: E402
from diffussm.pipeline import DiffuSSMPipeline  # noqa: E402
from diffussm.schedulers import FEWEST_STEPS, ancestral_scheduler, scheduler_for  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning"
)


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
    """v = 1 against v = -1 in the network's second half changes what the ancestral
    scheduler draws.
    """

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
    """With the exact noise of a Gaussian every solver ends in that Gaussian,
    whatever v says.
    """
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
            "'v_prediction'.*make it with prediction_type='epsilon'",
        ),
        (
            lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
            "scheduler='FlowMatchEuler.*': did you mean .*EulerDiscreteScheduler",
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
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0: .* from 1 to 1000"),
        ({"num_inference_steps": 1001}, "expected an integer from 1 to 1000"),
        ({"num_inference_steps": 2.0}, "num_inference_steps=2.0: expected an integer"),
        ({"eta": 0.5}, "eta=0.5: DDPMScheduler has no such noise"),
        (
            {"clip_denoised": True},
            "clip_denoised=True.* clamps .* latents go beyond: .* clip_denoised=False",
        ),
        ({"output_type": "jpg"}, "output_type='jpg'"),
        ({"output_type": "pil"}, "no VAE to decode with: pass it, or output_type"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0: expected a finite number"),
        ({"guidance_channels": 5}, "guidance_channels=5: .* from 1 to 4"),
        ({"images_per_label": 0}, "images_per_label=0"),
        ({"num_images_per_prompt": 0}, "images_per_label=0"),
        ({"num_images_per_prompt": 2, "images_per_label": 3}, "are one option"),
        (
            {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
            "tensor input='prompt_embeds'.*latents",
        ),
        (
            {"latents": torch.zeros(1, 4, 4, 4)},
            r"latents has shape \(1, 4, 4, 4\): expected \(B=3, C=4, H=4, W=4\)",
        ),
        ({"generator": [seeded(), seeded()]}, "2 generators for 3 images"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_step(options, message):
    pipe = piped()
    pipe.denoiser.forward = lambda *_: pytest.fail("the network was called")
    with pytest.raises((ValueError, TypeError), match=message):
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


def test_callback_gets_the_tensors_that_it_asks_for():
    told, pipe = [], piped()

    class Asking:
        tensor_inputs = ()

        def __call__(self, pipe, step, timestep, tensors):
            told.append(tensors)
            assert pipe.num_timesteps == 5

    plain = draw(pipe)
    assert torch.equal(draw(pipe, callback_on_step_end=Asking()), plain)
    how = {"callback_on_step_end_tensor_inputs": []}
    draw(pipe, callback_on_step_end=lambda *given: told.append(given[-1]), **how)
    assert told == [{}] * 10


def test_callback_may_change_the_guidance_of_the_steps_that_follow():
    pipe, scales = piped(), []

    def weaken(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0 if step >= 1 else pipe.guidance_scale
        scales.append(pipe.guidance_scale)

    chain = {"guidance_scale": 3.0}
    changed = draw(pipe, callback_on_step_end=weaken, **chain)
    assert scales == [3.0, 1.0, 1.0, 1.0, 1.0]
    assert not torch.allclose(changed, draw(pipe, **chain))
    assert not torch.allclose(changed, draw(pipe))


def test_callback_may_end_the_chain():
    pipe, kept = piped(), []

    def stop(pipe, step, timestep, tensors):
        kept.append(tensors["latents"])
        pipe._interrupt = step == 1

    assert torch.equal(draw(pipe, callback_on_step_end=stop), kept[1])
    assert len(kept) == 2
    draw(pipe, callback_on_step_end=lambda *_: kept.append(None))
    assert len(kept) == 7  # the next chain is whole


def test_images_are_counted_under_the_name_that_diffusers_has():
    pipe = piped()
    ours = draw(pipe, images_per_label=2)
    assert torch.equal(draw(pipe, num_images_per_prompt=2), ours)
    assert draw(pipe, [[0, 1], [[2]]], num_images_per_prompt=2).shape[0] == 6


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
    with pytest.raises(
        ValueError, match="the model is unconditional: omit class_labels"
    ):
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
    with pytest.raises(ValueError, match="latents of 2 channels, not 4"):
        piped(vae=small_vae(2))
    pipe = piped()
    pipe.vae = small_vae(2)
    with pytest.raises(ValueError, match="latents of 2 channels"):
        draw(pipe)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_images_that_are_not_finite_are_an_error(output_type):
    pipe = piped(network(in_channels=1))
    with torch.no_grad():
        pipe.denoiser.head.bias.fill_(float("nan"))
    with pytest.raises(
        FloatingPointError, match="DDPMScheduler, 5 steps: .* not finite in 3 of 3"
    ):
        draw(pipe, output_type=output_type)
    pipe = piped(vae=small_vae())
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(float("inf"))
    if output_type != "latent":
        with pytest.raises(
            FloatingPointError, match="the VAE in torch.float32: .* not finite in 3"
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
        match=f"{option}=True.* in the scheduler.*make it with {option}=False",
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


def test_half_precision_keeps_the_chain_in_float32():
    full = draw(piped())
    half = draw(piped().to(torch.bfloat16))
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.05 * full.abs().max()


def test_importing_the_package_does_not_import_diffusers():
    code = "import sys, diffussm, diffussm.model, diffussm.runs\n"
    code += "assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
