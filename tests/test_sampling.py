"""Moments and modes, reproducible noise, guidance as defined, the trajectory of
diffusers.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffussm.diffusion import GaussianDiffusion
from diffussm.model import DiffuSSM, DiffuSSMConfig
from diffussm.sample_options import Sampler
from diffussm.sampling import denoise, guided, sample, walk
from diffussm.sampling import draw as draw_with

DIFFUSION = GaussianDiffusion.linear(1000)
CENTRES = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.4, -0.9]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
SPREAD = 0.15


class Mixture:
    """The exact denoiser by autograd: the noise is -sqrt(1 - alpha-bar) times the
    gradient of log p(x_t).

    The covariance of x_0 given x_t is (1 - ab) / ab (1 + (1 - ab) Hessian), so its
    diagonal follows too. Class k is cluster k, label 3 is none.
    """

    config = SimpleNamespace(in_channels=2, height=1, width=1)
    null_label = 3

    def __call__(self, x, t, y):
        y = torch.full((len(x),), 3) if y is None else y
        ab = DIFFUSION.alphas_cumprod[t].view(-1, 1)
        with torch.enable_grad():
            point = x.detach().double().flatten(1).requires_grad_()
            distance = ((point[:, None] - ab.sqrt()[:, :, None] * CENTRES) ** 2).sum(2)
            variance = ab * SPREAD**2 + 1 - ab
            logits = WEIGHTS.log() - distance / (2 * variance)
            logits = logits.masked_fill(
                (y[:, None] != torch.arange(3)) & (y[:, None] != 3), -torch.inf
            )
            (score,) = torch.autograd.grad(
                torch.logsumexp(logits, 1).sum(), point, create_graph=True
            )
            bend = [
                torch.autograd.grad(score[:, i].sum(), point, retain_graph=True)[0][
                    :, i
                ]
                for i in range(2)
            ]
        unknown = (1 - ab) / ab * (1 + (1 - ab) * torch.stack(bend, 1))
        eps = -(1 - ab).sqrt() * score.detach()
        total = (
            DIFFUSION.posterior_variance[t, None]
            + DIFFUSION.posterior_x0_factor[t, None] ** 2 * unknown
        )
        low, high = (
            DIFFUSION.posterior_log_variance_clipped[t, None],
            DIFFUSION.betas[t, None].log(),
        )
        v = (2 * (total.log() - low) / (high - low) - 1).clamp(-1, 1)
        return torch.cat([eps, v], 1)[:, :, None, None]


class Noise:
    """Answers with a fixed random image for each label: nothing agrees by accident."""

    null_label = 9

    def __call__(self, x, t, y):
        size = (2 * x.shape[1], *x.shape[2:])
        return torch.stack(
            [
                torch.randn(size, generator=torch.Generator().manual_seed(int(k)))
                for k in y
            ]
        )


def smooth(x, t, y):
    """Bounded, different at every timestep, different for every label."""
    extra = 0 if y is None else y.view(-1, 1, 1, 1)
    return torch.tanh(
        torch.cat([x.flip(1) + 0.3 * x, x - extra], 1)
        + torch.cos(t / 100).view(-1, 1, 1, 1)
    )


smooth.null_label = 5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(model=smooth, y=None, **options):
    y = torch.tensor([0, 1, 2]) if y is None else y
    options = {
        "steps": 7,
        "generator": seeded(),
        "shape": (2, 2, 2),
        "progress": False,
    } | options
    return sample(model, DIFFUSION, y, **options)


# Moments and modes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "steps", "slack", "options"),
    [
        ("ddpm", 250, 0.03, {}),
        ("ddpm", 1000, 0.015, {}),
        ("ddim", 100, 0.06, {}),
        ("ddim", 500, 0.03, {}),
        ("ddim", 500, 0.08, {"eta": 1.0}),
    ],
)
def test_samples_of_a_mixture_have_its_moments_and_modes(method, steps, slack, options):
    n = 3000
    x = sample(
        Mixture(),
        DIFFUSION,
        torch.full((n,), 3),
        steps,
        method,
        generator=seeded(1),
        progress=False,
        **options,
    )
    assert x.shape == (n, 2, 1, 1)
    points = x.flatten(1).double()
    nearest = torch.cdist(points, CENTRES).argmin(1)
    for k in range(3):
        own, expected = points[nearest == k], n * WEIGHTS[k]
        assert abs(len(own) - expected) < 5 * math.sqrt(expected * (1 - WEIGHTS[k]))
        assert (own.mean(0) - CENTRES[k]).abs().max() < 5 * SPREAD / math.sqrt(
            expected
        ) + slack * SPREAD
        assert (own.std(0) / SPREAD - 1).abs().max() < 5 / math.sqrt(
            2 * expected
        ) + slack


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_labels_choose_the_mode(method):
    labels = torch.arange(300) % 3
    x = sample(
        Mixture(), DIFFUSION, labels, 50, method, generator=seeded(2), progress=False
    )
    assert torch.equal(torch.cdist(x.flatten(1).double(), CENTRES).argmin(1), labels)


def test_learned_variance_matters_when_steps_are_few():
    def width(model):
        x = sample(
            model,
            DIFFUSION,
            torch.full((2000,), 3),
            50,
            generator=seeded(3),
            shape=(2, 1, 1),
            progress=False,
        )
        points = x.flatten(1).double()
        return (
            points - CENTRES[torch.cdist(points, CENTRES).argmin(1)]
        ).std().item() / SPREAD

    def largest(x, t, y):
        return torch.cat([Mixture()(x, t, y)[:, :2], torch.ones(len(x), 2, 1, 1)], 1)

    assert abs(width(Mixture()) - 1) < 0.1 < width(largest) - 1


# Whole chains


@pytest.mark.slow
def test_ddim_moves_one_image_and_one_noise_between_levels():
    """If the network always names the true noise, every x_t of the chain is a mixture
    of the same two.
    """
    image, noise = torch.randn(2, 1, 1, 4, 4, generator=seeded(6), dtype=torch.float64)
    last = DIFFUSION.alphas_cumprod[-1]
    chain = denoise(
        lambda x, t, y: torch.cat([noise, 0 * noise], 1),
        DIFFUSION,
        None,
        steps=40,
        method="ddim",
        noise=last.sqrt() * image + (1 - last).sqrt() * noise,
    )
    timesteps = DIFFUSION.respace(40).timestep_map.flip(0).tolist()
    for k, (t, x, guess) in enumerate(chain):
        assert t == timesteps[k]
        ab = (
            DIFFUSION.alphas_cumprod[timesteps[k + 1]]
            if k < 39
            else torch.ones(()).double()
        )
        torch.testing.assert_close(x, ab.sqrt() * image + (1 - ab).sqrt() * noise)
        torch.testing.assert_close(guess, image)
    assert k == 39


# Reproducibility


@pytest.mark.parametrize(
    ("method", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7)]
)
def test_same_generator_same_sample(method, eta):
    state = torch.random.get_rng_state()
    first = draw(method=method, eta=eta)
    torch.manual_seed(99)
    assert torch.equal(draw(method=method, eta=eta), first)
    assert not torch.equal(draw(method=method, eta=eta, generator=seeded(1)), first)
    torch.random.set_rng_state(state)
    draw(method=method, eta=eta)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_sample_is_the_end_of_denoise():
    chain = list(
        denoise(
            smooth,
            DIFFUSION,
            torch.tensor([0, 1, 2]),
            steps=7,
            generator=seeded(),
            shape=(2, 2, 2),
        )
    )
    assert [t for t, _, _ in chain] == [999, 832, 666, 500, 333, 166, 0]
    assert torch.equal(chain[-1][1], draw())


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_a_sampler_draws_what_sample_draws(method):
    options = {"cfg_scale": 2.0, "guidance_channels": 1, "clip_denoised": True}
    sampler, y = Sampler(7, method, **options), torch.tensor([0, 1, 2])
    how = {"generator": seeded(), "shape": (2, 2, 2)}
    images = draw_with(sampler, smooth, DIFFUSION, y, progress=False, **how)
    assert torch.equal(images, draw(method=method, **options))
    how = {"generator": seeded(), "shape": (2, 2, 2)}
    walked = walk(sampler, smooth, DIFFUSION, y, **how)
    assert torch.equal([x for _, x, _ in walked][-1], images)


@pytest.mark.parametrize(("method", "eta"), [("ddpm", 0.0), ("ddim", 0.7)])
def test_a_generator_for_each_image_makes_it_independent_of_the_others(method, eta):
    def images(*seeds):
        y, generators = torch.tensor(seeds), [seeded(10 + seed) for seed in seeds]
        return draw(method=method, eta=eta, y=y, generator=generators)

    three = images(2, 0, 1)
    for place, seed in enumerate((2, 0, 1)):
        assert torch.allclose(images(seed)[0], three[place], atol=1e-6)
    assert not torch.allclose(three[0], three[1], atol=1e-2)
    with pytest.raises(ValueError, match="number of generators"):
        draw(method=method, eta=eta, generator=[seeded(), seeded()])


def test_eta_brings_the_noise_back():
    """Without eta the end depends on the starting noise alone; with it, on the
    generator.
    """
    noise = torch.randn(3, 2, 2, 2, generator=seeded())
    for eta, same in ((0.0, True), (0.5, False)):
        a, b = (
            draw(method="ddim", eta=eta, noise=noise, generator=seeded(k))
            for k in (1, 2)
        )
        assert torch.equal(a, b) == same


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_clipping_reaches_every_step(method):
    for clip, within in ((True, True), (False, False)):
        chain = denoise(
            smooth,
            DIFFUSION,
            torch.tensor([0, 1]),
            steps=5,
            method=method,
            shape=(2, 2, 2),
            generator=seeded(),
            clip_denoised=clip,
        )
        assert (max(guess.abs().max().item() for _, _, guess in chain) <= 1) == within


LABELS = {
    "list": [0, 1, 2],
    "NumPy integers": [np.int64(0), np.uint8(1), np.int32(2)],
    "array": np.array([0, 1, 2]),
    "small integers": np.array([0, 1, 2], dtype=np.uint8),
    "tensor of small integers": torch.tensor([0, 1, 2], dtype=torch.int16),
}


@pytest.mark.parametrize("y", LABELS.values(), ids=LABELS.keys())
def test_integers_of_any_kind_are_labels(y):
    model = small_model()
    options = {"cfg_scale": 2.0, "generator": seeded(), "progress": False}
    expected = sample(model, DIFFUSION, torch.tensor([0, 1, 2]), np.int64(3), **options)
    options["generator"] = seeded()
    assert torch.equal(
        sample(model, DIFFUSION, y, 3, guidance_channels=np.int64(1), **options),
        expected,
    )
    x, t = torch.randn(3, 1, 4, 4), torch.tensor([1, 2, 3])
    with torch.no_grad():
        assert torch.equal(model(x, t, y), model(x, t, torch.tensor([0, 1, 2])))
        assert torch.equal(
            guided(model, 3.0)(x, t, y),
            guided(model, 3.0)(x, t, torch.tensor([0, 1, 2])),
        )


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
@pytest.mark.parametrize(
    "y", [[], np.array([]), torch.zeros(0, dtype=torch.long)], ids=type
)
def test_no_labels_give_no_images(method, y):
    options = {"cfg_scale": 2.0, "generator": seeded(), "progress": False}
    assert sample(
        smooth, DIFFUSION, y, 3, method, shape=(2, 4, 4), **options
    ).shape == (0, 2, 4, 4)
    assert sample(small_model(), DIFFUSION, y, 3, method, **options).shape == (
        0,
        1,
        4,
        4,
    )
    nothing = torch.zeros(0, 2, 4, 4)
    assert sample(
        smooth, DIFFUSION, None, 3, method, noise=nothing, progress=False
    ).shape == (0, 2, 4, 4)


def test_given_noise_is_the_start():
    noise = torch.randn(3, 2, 2, 2, generator=seeded())
    assert torch.equal(
        draw(method="ddim", noise=noise, generator=None), draw(method="ddim")
    )
    assert draw(y=None, noise=noise.double()).dtype == torch.float64


def test_given_noise_and_labels_go_where_the_model_is():
    model, noise = small_model().to("meta"), torch.randn(2, 1, 4, 4)
    for _, x, x0 in denoise(model, DIFFUSION, [0, 1], noise=noise, steps=2):
        assert x.is_meta and x0.is_meta and x.shape == noise.shape


def test_no_graph_is_kept_and_grad_mode_is_left_alone():
    model = DiffuSSM(
        DiffuSSMConfig(
            input_size=4, in_channels=1, num_classes=3, d_model=8, n_blocks=1, d_state=4
        )
    )
    chain = denoise(
        model,
        DIFFUSION,
        torch.tensor([0, 2]),
        steps=3,
        generator=seeded(),
        cfg_scale=1.5,
    )
    for _, x, guess in chain:
        assert (
            torch.is_grad_enabled() and not x.requires_grad and not guess.requires_grad
        )
        assert x.shape == guess.shape == (2, 1, 4, 4)
    (x * torch.ones(1, requires_grad=True)).sum().backward()  # x is an ordinary tensor


def test_progress_bar_goes_to_stderr_or_nowhere(capsys):
    draw(progress=True)
    shown = capsys.readouterr()
    assert "7/7" in shown.err and not shown.out
    draw(progress=False)
    assert capsys.readouterr() == ("", "")


# Guidance


def small_model(num_classes=3):
    """A DiffuSSM with random weights, and zeros nowhere."""
    torch.manual_seed(11)
    model = DiffuSSM(
        DiffuSSMConfig(
            input_size=4,
            in_channels=1,
            num_classes=num_classes,
            d_model=8,
            n_blocks=1,
            d_state=4,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_guidance_one_is_the_conditional_model_bit_for_bit():
    model = small_model()
    y = torch.tensor([0, 1, 2])
    x, t = torch.randn(3, 1, 4, 4), torch.tensor([3, 500, 999])
    with torch.no_grad():
        assert torch.equal(guided(model, 1.0)(x, t, y), model(x, t, y))
    plain = sample(model, DIFFUSION, y, steps=5, generator=seeded(), progress=False)
    assert torch.equal(
        sample(
            model, DIFFUSION, y, 5, cfg_scale=1.0, generator=seeded(), progress=False
        ),
        plain,
    )
    assert not torch.equal(
        sample(
            model, DIFFUSION, y, 5, cfg_scale=1.5, generator=seeded(), progress=False
        ),
        plain,
    )


@pytest.mark.parametrize("w", [0.0, 0.5, 1.5, 4.0])
def test_guidance_extrapolates_the_noise_and_keeps_the_conditional_variance(w):
    model, x, t = Noise(), torch.zeros(3, 4, 2, 2), torch.tensor([0, 4, 9])
    y = torch.tensor([1, 2, 7])
    with_label, without = model(x, t, y), model(x, t, torch.full_like(y, 9))
    got = guided(model, w)(x, t, y)
    torch.testing.assert_close(
        got[:, :4], w * with_label[:, :4] + (1 - w) * without[:, :4]
    )
    assert torch.equal(got[:, 4:], with_label[:, 4:])


def test_three_channel_guidance_leaves_the_fourth_conditional():
    model, x, t, y = (
        Noise(),
        torch.zeros(2, 4, 2, 2),
        torch.tensor([0, 4]),
        torch.tensor([1, 2]),
    )
    all_channels, three = (
        guided(model, 3.0)(x, t, y),
        guided(model, 3.0, guidance_channels=3)(x, t, y),
    )
    assert torch.equal(three[:, :3], all_channels[:, :3])
    assert torch.equal(three[:, 3:], model(x, t, y)[:, 3:])
    assert not torch.equal(three[:, 3], all_channels[:, 3])


def test_guidance_runs_the_model_once_on_both_halves():
    calls = []

    def model(x, t, y):
        calls.append((x.shape, t.tolist(), y.tolist()))
        return torch.cat([x, x], 1).bfloat16()

    model.null_label = 5
    output = guided(model, 2.0)(
        torch.zeros(2, 1, 2, 2), torch.tensor([7, 8]), torch.tensor([0, 3])
    )
    assert calls == [((4, 1, 2, 2), [7, 8, 7, 8], [0, 3, 5, 5])]
    assert output.dtype == torch.float32


def test_guidance_under_autocast_is_the_combination_in_float32():
    model, y = small_model(), torch.tensor([0, 1, 2])
    x, t = torch.randn(3, 1, 4, 4, generator=seeded()), torch.tensor([3, 500, 999])
    answers = []
    model.register_forward_hook(lambda module, args, output: answers.append(output))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = guided(model, 4.0)(x, t, y)
    (answer,) = answers
    assert answer.dtype == got.dtype == torch.float32
    assert not torch.equal(
        answer, answer.bfloat16().float()
    )  # it was never rounded to bfloat16
    with_label, without = answer.double().chunk(2)
    expected = 4 * with_label[:, :1] - 3 * without[:, :1]
    torch.testing.assert_close(got[:, :1].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(got[:, 1:], answer[:3, 1:])


@pytest.fixture
def process_group():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "DataParallel": torch.nn.DataParallel,
    "DistributedDataParallel": torch.nn.parallel.DistributedDataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "two of them": lambda model: torch.nn.DataParallel(
        torch.optim.swa_utils.AveragedModel(model)
    ),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_models_inside_wrappers_are_sampled_alike(wrap, process_group, monkeypatch):
    model, y = small_model(), torch.tensor([0, 1, 2])
    expected = sample(
        model, DIFFUSION, y, 4, cfg_scale=2.0, generator=seeded(), progress=False
    )
    bound = GaussianDiffusion.linear(25).vlb(model, expected, y, seeded())
    kept = []
    real = DiffuSSM.cached_kernels
    monkeypatch.setattr(
        DiffuSSM, "cached_kernels", lambda self: kept.append(self) or real(self)
    )
    wrapped = wrap(model)
    got = sample(
        wrapped, DIFFUSION, y, 4, cfg_scale=2.0, generator=seeded(), progress=False
    )
    assert torch.equal(got, expected)
    assert torch.equal(
        GaussianDiffusion.linear(25).vlb(wrapped, expected, y, seeded())["vb"],
        bound["vb"],
    )
    assert len(kept) == 2  # once for the samples, once for the bound


def test_wrapper_of_a_model_without_classes_is_refused_with_the_true_reason():
    model = torch.nn.DataParallel(small_model(num_classes=0))
    with pytest.raises(ValueError, match="no label for 'no class'"):
        guided(model, 2.0)


def test_guidance_moves_samples_away_from_the_other_classes():
    class Wide(Mixture):
        def __call__(self, x, t, y):
            ab = DIFFUSION.alphas_cumprod[t].view(-1, 1, 1, 1)
            sign = torch.where(
                (y == 3).view(-1, 1, 1, 1),
                torch.tanh(ab.sqrt() * x[:, :1] / (1 - 0.75 * ab)),
                1.0,
            )
            offset = torch.cat([sign, torch.zeros_like(sign)], 1)
            eps = (1 - ab).sqrt() / (1 - 0.75 * ab) * (x - ab.sqrt() * offset)
            return torch.cat([eps, torch.zeros_like(eps)], 1)

    zero = torch.zeros(1000, dtype=torch.long)
    means = [
        sample(Wide(), DIFFUSION, zero, 50, "ddim", w, seeded(), progress=False)[:, 0]
        .mean()
        .item()
        for w in (0.0, 1.0, 2.0, 4.0)
    ]
    assert abs(means[0]) < 0.15 and abs(means[1] - 1) < 0.1
    assert means[1] + 0.03 < means[2] and means[2] + 0.03 < means[3]


# The same as other people's


def test_trajectory_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        timestep_spacing="linspace",
        variance_type="learned_range",
        clip_sample=False,
    )
    scheduler.set_timesteps(250)
    noise = torch.randn(4, 2, 4, 4, generator=seeded(12))
    generator, theirs = seeded(13), noise
    chain = denoise(
        smooth, DIFFUSION, None, steps=250, noise=noise, generator=seeded(13)
    )
    for (t, ours, _), expected_t in zip(chain, scheduler.timesteps, strict=True):
        output = smooth(theirs, expected_t.expand(4), None)
        theirs = scheduler.step(
            output, expected_t, theirs, generator=generator
        ).prev_sample
        assert t == int(expected_t)
        assert (ours - theirs).abs().max() < 5e-5 * theirs.abs().max()


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "euler"}, ValueError, "method='euler': expected 'ddpm' or 'ddim'"),
        ({"steps": 1001}, ValueError, "steps=1001: expected an integer from 1 to 1000"),
        ({"steps": 0}, ValueError, "steps=0: expected an integer of at least 1"),
        ({"eta": 0.5}, ValueError, "eta belongs to 'ddim'"),
        (
            {"eta": 2.0, "method": "ddim"},
            ValueError,
            "eta=2.0: expected a number from 0 to 1",
        ),
        (
            {"cfg_scale": -1.0},
            ValueError,
            "cfg_scale=-1.0: expected a number of at least 0",
        ),
        ({"cfg_scale": float("nan")}, ValueError, "cfg_scale=nan"),
        (
            {"cfg_scale": 2.0, "guidance_channels": 0},
            ValueError,
            "guidance_channels=0: expected",
        ),
        (
            {"cfg_scale": 2.0, "guidance_channels": 3},
            ValueError,
            "guidance_channels=3: expected an integer from 1 to 2",
        ),
        (
            {"y": torch.tensor([[1]])},
            ValueError,
            r"y has shape \(1, 1\): expected \(B\)",
        ),
        (
            {"y": torch.tensor([0.5])},
            TypeError,
            "y is torch.float32: expected an integer tensor",
        ),
        (
            {"y": ["cat", "dog"]},
            TypeError,
            "y is list of <U3: expected an integer tensor, array or list",
        ),
        (
            {"y": np.array([0.5])},
            TypeError,
            "y is ndarray of float64: expected an integer tensor",
        ),
        ({"y": 1}, ValueError, r"y has shape \(\): expected \(B\)"),
        ({"steps": 2.0}, ValueError, "steps=2.0: expected an integer"),
        (
            {"noise": torch.zeros(4, 2, 2, 2)},
            ValueError,
            r"noise has shape \(4, 2, 2, 2\): expected \(B=3, C=2, H=2, W=2\)",
        ),
        (
            {"noise": torch.zeros(3, 2, 2)},
            ValueError,
            r"noise has shape \(3, 2, 2\): expected",
        ),
        (
            {"noise": torch.zeros(3, 2, 2, 2, dtype=torch.long)},
            TypeError,
            "noise is torch.int64: expected a real floating-point tensor",
        ),
        ({"shape": None}, ValueError, r"shape=None: expected \(C, H, W\)"),
    ],
)
def test_bad_options_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        draw(**options)


def test_options_are_refused_before_the_first_step():
    def never(x, t, y):
        raise AssertionError("the model was called")

    for options in ({"steps": 5000}, {"method": "x"}, {"cfg_scale": 2.0}, {"eta": 0.1}):
        with pytest.raises(ValueError):
            denoise(never, DIFFUSION, torch.tensor([0]), shape=(1, 2, 2), **options)
    never.null_label, guidance = 3, {"cfg_scale": 2.0, "guidance_channels": 2}
    with pytest.raises(ValueError, match="guidance_channels=2: expected"):
        denoise(never, DIFFUSION, torch.tensor([0]), shape=(1, 2, 2), **guidance)
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=f"y reaches from {wrong}"):
            denoise(never, DIFFUSION, torch.tensor([wrong]), shape=(1, 2, 2))
    assert denoise(never, DIFFUSION, torch.tensor([3]), shape=(1, 2, 2))


def test_missing_labels_and_missing_null_class_are_explained():
    with pytest.raises(ValueError, match="pass noise"):
        sample(smooth, DIFFUSION, None, steps=2, shape=(1, 2, 2), progress=False)
    with pytest.raises(ValueError, match="guidance needs y"):
        sample(
            smooth,
            DIFFUSION,
            None,
            steps=2,
            cfg_scale=2.0,
            noise=torch.zeros(1, 1, 2, 2),
            progress=False,
        )
    with pytest.raises(ValueError, match="no label for 'no class'"):
        guided(lambda x, t, y: x, 2.0)
