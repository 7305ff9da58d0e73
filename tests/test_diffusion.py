"""The learned variance, the hybrid loss, the whole bound, respacing, refusals."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffussm.diffusion import GaussianDiffusion, standard_normal

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHA_BAR = torch.tensor(np.cumprod(1 - BETAS.numpy()))


def column(values):
    return values.view(-1, 1, 1, 1)


def constant(eps, v):
    """A network with one answer."""
    return lambda x, t, y: torch.cat([eps, v], dim=1)


def interpolated(t, v, alpha_bar=ALPHA_BAR):
    """The learned variance by its definition: beta-tilde^(1 - s) beta^s with s = (v
    + 1) / 2; t > 0.
    """
    before, after = column(alpha_bar[t - 1]), column(alpha_bar[t])
    beta = 1 - after / before
    share = (v + 1) / 2
    return (beta * (1 - before) / (1 - after)) ** (1 - share) * beta**share


# The schedule


def test_linear_schedule_is_adms():
    diffusion = GaussianDiffusion.linear(1000)
    torch.testing.assert_close(diffusion.betas, BETAS, rtol=1e-13, atol=0)
    assert diffusion.alphas_cumprod[-1].item() == pytest.approx(
        4.0358e-5, rel=1e-3
    )  # guided-diffusion's table
    assert GaussianDiffusion.linear(100).betas[-1].item() == pytest.approx(0.2)


# The reverse process


def test_mean_is_the_noise_form_of_ho():
    torch.manual_seed(1)
    t = torch.tensor([0, 1, 50, 999])
    x_t, eps, v = torch.randn(3, 4, 2, 3, 3, dtype=torch.float64)
    p = GaussianDiffusion(BETAS).p_mean_variance(constant(eps, v), x_t, t)
    a, ab = column(1 - BETAS[t]), column(ALPHA_BAR[t])
    torch.testing.assert_close(
        p["mean"],
        (x_t - (1 - a) / (1 - ab).sqrt() * eps) / a.sqrt(),
        rtol=1e-8,
        atol=1e-9,
    )
    torch.testing.assert_close(
        ab.sqrt() * p["pred_xstart"] + (1 - ab).sqrt() * p["eps"], x_t
    )


def test_variance_interpolates_logarithms():
    torch.manual_seed(2)
    t = torch.tensor([1, 2, 300, 999])
    x_t, eps, v = torch.randn(3, 4, 1, 2, 2, dtype=torch.float64)
    p = GaussianDiffusion(BETAS).p_mean_variance(constant(eps, v), x_t, t)
    torch.testing.assert_close(p["variance"], interpolated(t, v), rtol=1e-8, atol=0)
    torch.testing.assert_close(p["log_variance"].exp(), p["variance"])


def test_clipping_keeps_the_image_in_range_and_the_noise_consistent():
    torch.manual_seed(3)
    t = torch.tensor([500, 900])
    x_t, eps, v = torch.randn(3, 2, 1, 4, 4, dtype=torch.float64)
    diffusion = GaussianDiffusion(BETAS)
    p = diffusion.p_mean_variance(constant(eps, v), x_t, t, clip_denoised=True)
    assert p["pred_xstart"].abs().max() == 1
    ab = column(ALPHA_BAR[t])
    torch.testing.assert_close(
        ab.sqrt() * p["pred_xstart"] + (1 - ab).sqrt() * p["eps"], x_t
    )
    torch.testing.assert_close(
        p["mean"], diffusion.q_posterior(p["pred_xstart"], x_t, t)[0]
    )


# The loss


def losses_of(answer, t, x0, noise, levels=17):
    diffusion = GaussianDiffusion(BETAS, levels=levels)
    return diffusion.losses(lambda x, t, y: answer, x0, t, None, noise)


def test_losses_against_torch_distributions():
    torch.manual_seed(4)
    t = torch.tensor([1, 20, 500, 999])
    x0 = (torch.randint(0, 17, (4, 1, 3, 3)) / 8 - 1).double()
    noise, eps, v = torch.randn(3, 4, 1, 3, 3, dtype=torch.float64)
    losses = losses_of(torch.cat([eps, v], 1), t, x0, noise)
    a, ab, before = column(1 - BETAS[t]), column(ALPHA_BAR[t]), column(ALPHA_BAR[t - 1])
    x_t = ab.sqrt() * x0 + (1 - ab).sqrt() * noise
    truth = Normal(
        (before.sqrt() * (1 - a) * x0 + a.sqrt() * (1 - before) * x_t) / (1 - ab),
        ((1 - before) / (1 - ab) * (1 - a)).sqrt(),
    )
    guess = Normal(
        (x_t - (1 - a) / (1 - ab).sqrt() * eps) / a.sqrt(), interpolated(t, v).sqrt()
    )
    vb = kl_divergence(truth, guess).mean((1, 2, 3)) / math.log(2)
    torch.testing.assert_close(losses["vb"], vb, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(losses["mse"], (noise - eps).square().mean((1, 2, 3)))
    torch.testing.assert_close(losses["loss"], losses["mse"] + losses["vb"])


def test_first_term_is_the_code_length_of_the_grey_levels():
    torch.manual_seed(5)
    t = torch.zeros(3, dtype=torch.long)
    x0 = (torch.randint(0, 17, (3, 1, 4, 4)) / 8 - 1).double()
    noise, eps = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    losses = losses_of(
        torch.cat([eps, torch.ones_like(eps)], 1), t, x0, noise
    )  # v = 1: the variance is beta
    x_t = math.sqrt(1 - 1e-4) * x0 + 0.01 * noise
    p = Normal((x_t - 0.01 * eps) / math.sqrt(1 - 1e-4), 0.01)
    upper = torch.where(x0 == 1, torch.ones(()).double(), p.cdf(x0 + 1 / 16))
    lower = torch.where(x0 == -1, torch.zeros(()).double(), p.cdf(x0 - 1 / 16))
    expected = -(upper - lower).log2().mean((1, 2, 3))
    torch.testing.assert_close(losses["vb"], expected, rtol=1e-5, atol=1e-12)


def test_variance_term_sends_no_gradient_to_the_mean():
    torch.manual_seed(6)
    t = torch.tensor([0, 1, 500])
    x0, noise = torch.randn(2, 3, 1, 4, 4).clamp(-1, 1)
    answer = torch.randn(3, 2, 4, 4, requires_grad=True)
    losses = losses_of(answer, t, x0, noise, levels=256)
    (to_vb,) = torch.autograd.grad(losses["vb"].sum(), answer, retain_graph=True)
    (to_mse,) = torch.autograd.grad(losses["mse"].sum(), answer)
    assert to_vb[:, 0].abs().max() == 0 and (to_vb[:, 1].abs().amax((1, 2)) > 0).all()
    assert to_mse[:, 1].abs().max() == 0 and (to_mse[:, 0].abs().amax((1, 2)) > 0).all()


def test_bound_weighs_less_in_a_shorter_chain():
    short = GaussianDiffusion.linear(1000).respace(250)
    x0 = torch.rand(2, 1, 2, 2)
    losses = short.losses(
        constant(torch.zeros_like(x0), x0),
        x0,
        torch.tensor([3, 100]),
        None,
        torch.ones_like(x0),
    )
    torch.testing.assert_close(losses["loss"], losses["mse"] + 0.25 * losses["vb"])


# The whole bound


def exact_model(diffusion, s):
    before, after, beta = (
        diffusion.alphas_cumprod_prev,
        diffusion.alphas_cumprod,
        diffusion.betas,
    )
    total_before, total = before * s**2 + 1 - before, after * s**2 + 1 - after
    low, high = diffusion.posterior_log_variance_clipped, beta.log()
    v = 2 * ((total_before / total * beta).log() - low) / (high - low) - 1

    def model(x, t, y):
        return torch.cat(
            [column(((1 - after).sqrt() / total)[t]) * x, column(v[t]).expand_as(x)],
            dim=1,
        )

    return model


def test_bound_of_gaussian_pixels_is_their_likelihood():
    s, levels = 0.2, 256
    generator = torch.Generator().manual_seed(7)
    diffusion = GaussianDiffusion.linear(200, levels=levels)
    x0 = s * torch.randn(512, 1, 8, 8, generator=generator, dtype=torch.float64)
    x0 = ((x0 + 1) / 2 * 255).round() / 255 * 2 - 1
    bound = diffusion.vlb(exact_model(diffusion, s), x0, generator=generator)
    normal = Normal(torch.zeros(()).double(), s)
    truth = (
        -(normal.cdf(x0 + 1 / 255) - normal.cdf(x0 - 1 / 255)).log2().mean((1, 2, 3))
    )
    excess = bound["total_bpd"] - truth
    error = excess.std() / math.sqrt(len(excess))
    assert abs(excess.mean()) < 4 * error < 0.05
    lie = diffusion.vlb(
        lambda x, t, y: -exact_model(diffusion, s)(x, t, y), x0, generator=generator
    )
    assert lie["total_bpd"].mean() > truth.mean() + 1


def test_bound_is_the_sum_of_its_parts():
    torch.manual_seed(8)
    diffusion = GaussianDiffusion(
        torch.linspace(0.01, 0.1, 30)
    )  # so short that the prior costs something
    scale = torch.tensor(0.5, requires_grad=True)
    x0 = torch.rand(3, 2, 4, 4, dtype=torch.float64) * 2 - 1
    seen = []

    def model(x, t, y):
        seen.append((int(t[0]), y))
        return torch.cat([scale * x, torch.zeros_like(x)], dim=1)

    labels = torch.tensor([4, 5, 6])
    bound = diffusion.vlb(model, x0, labels, generator=torch.Generator().manual_seed(0))
    assert [t for t, _ in seen] == list(range(30)) and all(y is labels for _, y in seen)
    assert (
        bound["vb"].shape == bound["mse"].shape == bound["xstart_mse"].shape == (3, 30)
    )
    assert bound["total_bpd"].shape == bound["prior_bpd"].shape == (3,)
    torch.testing.assert_close(
        bound["total_bpd"], bound["prior_bpd"] + bound["vb"].sum(1)
    )
    ab = diffusion.alphas_cumprod[-1]
    prior = kl_divergence(
        Normal(ab.sqrt() * x0, (1 - ab).sqrt()), Normal(0.0, 1.0)
    ).mean((1, 2, 3))
    torch.testing.assert_close(
        bound["prior_bpd"], prior / math.log(2), rtol=1e-8, atol=0
    )
    # x0 - pred_xstart = sqrt((1 - ab) / ab) (eps - noise)
    snr = diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod)
    torch.testing.assert_close(bound["mse"], bound["xstart_mse"] * snr)
    again = diffusion.vlb(model, x0, labels, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again["vb"], bound["vb"]) and not bound["vb"].requires_grad


# Respacing


@pytest.mark.parametrize("steps", [2, 21, 50, 250, 600, 1000])
def test_respacing_is_adms_for_a_plain_number(steps):
    """A running sum of the stride, rounded. Where it meets a half, round-off
    decides.
    """
    place, expected = 0.0, []
    for _ in range(steps):
        expected.append(round(place))
        place += 999 / (steps - 1)
    chosen = GaussianDiffusion.linear(1000).respace(steps).timestep_map
    difference = (chosen - torch.tensor(expected)).abs()
    assert (
        difference.max() <= (0 if steps in (50, 250, 1000) else 1)
        and (difference > 0).sum() <= 1
    )
    assert chosen.diff().min() >= 1


def test_respaced_chain_keeps_the_noise_levels_and_the_original_timesteps():
    diffusion = GaussianDiffusion.linear(1000, levels=17)
    short = diffusion.respace(250)
    chosen = [round(i * 999 / 249) for i in range(250)]  # ADM's space_timesteps
    assert (
        short.timestep_map.tolist() == chosen
        and short.num_timesteps == 250
        and short.levels == 17
    )
    torch.testing.assert_close(
        torch.cumprod(1 - short.betas, 0), ALPHA_BAR[chosen], rtol=1e-11, atol=0
    )
    told = []

    def model(x, t, y):
        told.extend(t.tolist())
        return torch.zeros(2, 2, 1, 1)

    short.p_mean_variance(model, torch.zeros(2, 1, 1, 1), torch.tensor([1, 249]))
    assert told == [chosen[1], 999]
    assert short.respace(10).timestep_map.tolist() == [
        chosen[round(i * 249 / 9)] for i in range(10)
    ]
    assert diffusion.respace(1).timestep_map.tolist() == [999]
    torch.testing.assert_close(diffusion.respace(1000).betas, BETAS, rtol=1e-10, atol=0)


# Precision


def test_an_empty_batch_gives_empty_results():
    diffusion, nothing = GaussianDiffusion.linear(25), torch.zeros(0, 2, 4, 4)
    t, y = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    weight = torch.ones((), requires_grad=True)

    def model(x, t, y):
        return weight * torch.cat([x, x], dim=1)

    losses = diffusion.losses(model, nothing, t, y, nothing)
    assert {name: value.shape for name, value in losses.items()} == dict.fromkeys(
        losses, (0,)
    )
    losses["loss"].sum().backward()
    assert weight.grad == 0
    bound = diffusion.vlb(model, nothing, y)
    assert bound["total_bpd"].shape == bound["prior_bpd"].shape == (0,)
    assert (
        bound["vb"].shape == bound["mse"].shape == bound["xstart_mse"].shape == (0, 25)
    )


def test_bf16_output_is_computed_in_float32():
    torch.manual_seed(9)
    x0, noise = torch.rand(4, 1, 4, 4) * 2 - 1, torch.randn(4, 1, 4, 4)
    t = torch.tensor([0, 1, 500, 999])
    answer = torch.randn(4, 2, 4, 4).bfloat16()
    diffusion = GaussianDiffusion(BETAS)
    coarse = diffusion.losses(lambda x, t, y: answer, x0, t, None, noise)
    fine = diffusion.losses(lambda x, t, y: answer.float(), x0, t, None, noise)
    assert all(value.dtype == torch.float32 for value in coarse.values())
    assert all(torch.equal(coarse[name], fine[name]) for name in fine)
    assert diffusion.q_sample(x0.bfloat16(), t, noise.bfloat16()).dtype == torch.float32
    assert diffusion.q_sample(x0.double(), t, noise.double()).dtype == torch.float64


def test_losses_under_autocast_agree():
    torch.manual_seed(10)
    x0, noise, t = (
        torch.rand(2, 1, 4, 4),
        torch.randn(2, 1, 4, 4),
        torch.tensor([0, 700]),
    )
    diffusion = GaussianDiffusion(BETAS)
    answer = torch.randn(2, 2, 4, 4)
    plain = diffusion.losses(lambda x, t, y: answer, x0, t, None, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = diffusion.losses(lambda x, t, y: answer, x0, t, None, noise)
    assert all(torch.equal(plain[name], cast[name]) for name in plain)


def test_noise_comes_from_the_given_generator_only():
    before = torch.random.get_rng_state()
    draws = [
        standard_normal(
            (2, 3), torch.Generator().manual_seed(1), torch.device("cpu"), torch.float32
        )
        for _ in "ab"
    ]
    assert torch.equal(*draws) and torch.equal(torch.random.get_rng_state(), before)


# Bad input


IMAGES, NOISE, T = (
    torch.zeros(2, 1, 4, 4),
    torch.zeros(2, 1, 4, 4),
    torch.tensor([0, 9]),
)
NAN = IMAGES.clone()
NAN[1, 0, 2, 2] = float("nan")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"t": torch.tensor([0, 1000])},
            ValueError,
            r"t reaches from 0 to 1000: expected 0 to 999",
        ),
        ({"t": torch.tensor([-1, 3])}, ValueError, r"from -1 to 3: expected 0 to 999"),
        (
            {"t": torch.tensor([0.5, 0.1])},
            TypeError,
            r"t is float32: expected integers from 0 to 999",
        ),
        ({"t": torch.tensor(3)}, ValueError, r"t has shape \(\): expected \(B=2\)"),
        (
            {"x0": torch.zeros(2, 4, 4)},
            ValueError,
            r"x0 has shape \(2, 4, 4\): expected \(B, C, H, W\)",
        ),
        (
            {"x0": IMAGES.to(torch.uint8)},
            TypeError,
            r"x0 is torch.uint8: expected a real floating-point tensor",
        ),
        (
            {"x0": NAN},
            ValueError,
            r"x0: numbers that are not finite in 1 of 2 \(at 1\); leave these",
        ),
        (
            {"noise": torch.zeros(2, 1, 4, 1)},
            ValueError,
            r"noise has shape .*expected \(B=2, C=1, H=4, W=4\)",
        ),
        (
            {"noise": NOISE.long()},
            TypeError,
            r"noise is torch.int64: expected a real floating-point tensor",
        ),
    ],
)
def test_bad_batches_are_refused(change, error, message):
    arguments = {"x0": IMAGES, "t": T, "noise": NOISE} | change
    diffusion = GaussianDiffusion(BETAS)
    with pytest.raises(error, match=message):
        diffusion.q_sample(**arguments)
    with pytest.raises(error, match=message):
        diffusion.losses(lambda x, t, y: torch.zeros(2, 2, 4, 4), y=None, **arguments)


def test_model_output_of_another_shape_is_refused():
    diffusion = GaussianDiffusion(BETAS)
    for call in (
        lambda model: diffusion.losses(model, IMAGES, T, None, NOISE),
        lambda model: diffusion.p_mean_variance(model, IMAGES, T),
    ):
        with pytest.raises(
            ValueError,
            match=r"noise and v, has shape \(2, 1, 4, 4\): expected \(B=2, C=2,",
        ):
            call(lambda x, t, y: x)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: GaussianDiffusion(torch.tensor([0.1, 1.0])),
            ValueError,
            r"beta=1\.0: expected a finite number above 0 and below 1",
        ),
        (
            lambda: GaussianDiffusion(torch.tensor([0.1, float("nan")])),
            ValueError,
            "beta=nan: expected a finite number above 0",
        ),
        (
            lambda: GaussianDiffusion(torch.ones(2, 2)),
            ValueError,
            r"betas has shape \(2, 2\): expected \(T\)",
        ),
        (
            lambda: GaussianDiffusion(BETAS, levels=1),
            ValueError,
            "levels=1: expected an integer of at least 2",
        ),
        (
            lambda: GaussianDiffusion(BETAS, timestep_map=T),
            ValueError,
            r"timestep_map has shape \(2,\): expected \(T=1000\)",
        ),
        (
            lambda: GaussianDiffusion.linear(20),
            ValueError,
            "num_timesteps=20: expected an integer of at least 21",
        ),
        (
            lambda: GaussianDiffusion(BETAS).respace(1001),
            ValueError,
            "steps=1001: expected an integer from 1 to 1000",
        ),
        (
            lambda: GaussianDiffusion(BETAS).respace(0),
            ValueError,
            "steps=0: expected an integer from 1 to 1000",
        ),
        (
            lambda: GaussianDiffusion(BETAS).respace(2.5),
            TypeError,
            "steps=2.5: expected an integer",
        ),
    ],
)
def test_bad_schedules_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
