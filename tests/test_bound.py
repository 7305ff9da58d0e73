"""The terms of the bound: closed forms against integrals and sums."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffussm.bound import bits_per_dim, discretized_gaussian_log_likelihood, normal_kl


def test_kl_is_that_of_torch_distributions():
    torch.manual_seed(0)
    mean1, mean2, log1, log2 = torch.randn(4, 500, dtype=torch.float64)
    expected = kl_divergence(
        Normal(mean1, (log1 / 2).exp()), Normal(mean2, (log2 / 2).exp())
    )
    torch.testing.assert_close(normal_kl(mean1, log1, mean2, log2), expected)


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
def test_grey_levels_sum_to_one(levels):
    grey = torch.linspace(-1, 1, levels, dtype=torch.float64)[:, None]
    mean = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64)
    for log_variance in (-14.0, -7.0, 0.0, 3.0):
        log_mass = discretized_gaussian_log_likelihood(
            grey, mean, torch.tensor(log_variance).double(), levels
        )
        torch.testing.assert_close(
            log_mass.exp().sum(0), torch.ones(31).double(), rtol=0, atol=1e-10
        )


def test_bin_mass_is_the_integral_of_the_density():
    pixel, mean, spread = torch.tensor([0.25, 0.1, 0.3], dtype=torch.float64)
    grid = torch.linspace(0.25 - 1 / 16, 0.25 + 1 / 16, 20_001, dtype=torch.float64)
    density = Normal(mean, spread).log_prob(grid).exp()
    got = discretized_gaussian_log_likelihood(pixel, mean, 2 * spread.log(), levels=17)
    torch.testing.assert_close(
        got.exp(), torch.trapezoid(density, grid), rtol=1e-8, atol=0
    )


def test_likelihood_and_its_gradient_stay_finite_in_float32():
    grey = torch.linspace(-1, 1, 256)[:, None]
    mean = torch.linspace(-3, 3, 61).requires_grad_()
    for log_variance in (-10.0, -5.0, 1.0, 40.0):
        spread = torch.tensor(log_variance, requires_grad=True)
        value = discretized_gaussian_log_likelihood(grey, mean, spread, 256)
        gradients = torch.autograd.grad(value.sum(), (mean, spread))
        assert value.isfinite().all() and (value < 1e-6).all()
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_bits_per_dim_of_a_uniform_guess():
    nats = torch.full((2, 3, 4, 4), math.log(256))
    torch.testing.assert_close(bits_per_dim(nats), torch.full((2,), 8.0))
