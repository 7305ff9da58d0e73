"""The forward process: its jump, its posterior, its refusals."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from diffussm.forward_process import ForwardProcess

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHA_BAR = torch.tensor(np.cumprod(1 - BETAS.numpy()))


def test_jump_has_the_moments_of_single_steps():
    generator = torch.Generator().manual_seed(0)
    x = torch.full((200_000,), 0.7, dtype=torch.float64)
    betas = torch.tensor([0.1, 0.3, 0.02, 0.5], dtype=torch.float64)
    forward = ForwardProcess(betas)
    for t, beta in enumerate(betas):
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * torch.randn(
            x.shape, generator=generator, dtype=x.dtype
        )
        zero, one = torch.zeros(1, 1, 1, 1).double(), torch.ones(1, 1, 1, 1).double()
        mean = forward.q_sample(0.7 * one, torch.tensor([t]), zero).item()
        spread = forward.q_sample(zero, torch.tensor([t]), one).item()
        assert abs(x.mean() - mean) < 5 * spread / math.sqrt(len(x))
        assert abs(x.std() / spread - 1) < 5 / math.sqrt(2 * len(x))


def test_posterior_is_the_conditional_of_the_joint_gaussian():
    """x_{t-1} and x_t given x_0 are jointly Gaussian; condition by the covariance
    formula.
    """
    forward = ForwardProcess(BETAS)
    x0, x_t = 0.4, -1.3
    for t in (1, 7, 400, 999):
        before, a = ALPHA_BAR[t - 1], 1 - BETAS[t]
        prior_mean, prior_variance = before.sqrt() * x0, 1 - before
        covariance, total = a.sqrt() * prior_variance, a * prior_variance + BETAS[t]
        mean = prior_mean + covariance / total * (x_t - a.sqrt() * prior_mean)
        variance = prior_variance - covariance**2 / total
        pixel, noisy = torch.tensor([x0, x_t], dtype=torch.float64).view(2, 1, 1, 1, 1)
        got = forward.q_posterior(pixel, noisy, torch.tensor([t]))
        torch.testing.assert_close(got[0].squeeze(), mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(got[1].squeeze(), variance, rtol=1e-9, atol=0)
        torch.testing.assert_close(got[2].squeeze(), variance.log(), rtol=1e-9, atol=0)


def test_first_posterior_returns_the_image_with_a_borrowed_log_variance():
    forward = ForwardProcess(BETAS)
    x0, x_t = torch.randn(2, 1, 1, 2, 2, dtype=torch.float64)
    mean, variance, log_variance = forward.q_posterior(x0, x_t, torch.tensor([0]))
    torch.testing.assert_close(mean, x0)
    assert (
        variance.item() == 0
        and log_variance.item() == forward.posterior_log_variance_clipped[1].item()
    )


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda chain: pickle.loads(pickle.dumps(chain))]
)
def test_copies_carry_no_tables_of_a_device(copied):
    forward = ForwardProcess(BETAS[:25])
    x, t = torch.randn(2, 1, 2, 2), torch.tensor([0, 24])
    expected = forward.q_sample(x, t, x)
    twin = copied(forward)
    assert forward._tables and not twin._tables
    assert torch.equal(twin.q_sample(x, t, x), expected)


def test_what_is_private_trusts_what_was_checked():
    """Nothing below the public functions looks at the batch again."""
    forward = ForwardProcess(BETAS)
    x0, noise = torch.randn(2, 3, 1, 2, 2)
    t = torch.tensor([0, 5, 999])
    assert torch.equal(forward._noised(x0, t, noise), forward.q_sample(x0, t, noise))
    with pytest.raises(ValueError, match="x_t has shape"):
        forward.q_posterior(x0, noise[:2], t)
    with pytest.raises(ValueError, match="x0: numbers that are not finite"):
        forward.q_posterior(x0 / 0, noise, t)
