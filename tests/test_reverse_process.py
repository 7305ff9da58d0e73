"""Single steps: ancestral sampling and DDIM as their formulas say."""

import pytest
import torch

from diffussm.diffusion import GaussianDiffusion
from diffussm.reverse_process import ancestral_step, ddim_step

DIFFUSION = GaussianDiffusion.linear(1000)


def smooth(x, t, y):
    """Bounded, different at every timestep."""
    return torch.tanh(
        torch.cat([x.flip(1) + 0.3 * x, x], 1) + torch.cos(t / 100).view(-1, 1, 1, 1)
    )


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_ancestral_step_is_mean_plus_scaled_noise():
    torch.manual_seed(0)
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    got, guess = ancestral_step(smooth, DIFFUSION, x, 400, None, seeded(4))
    eps, v = smooth(x, torch.tensor([400, 400]), None).chunk(2, 1)
    ab, before = DIFFUSION.alphas_cumprod[400], DIFFUSION.alphas_cumprod[399]
    beta = 1 - ab / before
    share = (v + 1) / 2
    variance = (beta * (1 - before) / (1 - ab)) ** (1 - share) * beta**share
    noise = torch.randn(x.shape, generator=seeded(4), dtype=x.dtype)
    expected = (x - beta / (1 - ab).sqrt() * eps) / (
        1 - beta
    ).sqrt() + variance.sqrt() * noise
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(guess, (x - (1 - ab).sqrt() * eps) / ab.sqrt())


@pytest.mark.parametrize("step_back", [ancestral_step, ddim_step])
def test_last_step_adds_no_noise(step_back):
    x = torch.randn(2, 1, 2, 2, generator=seeded())
    generator = seeded(5)
    state = generator.get_state()
    last, guess = step_back(smooth, DIFFUSION, x, 0, None, generator)
    assert torch.equal(generator.get_state(), state)
    torch.testing.assert_close(last, guess, rtol=1e-4, atol=1e-5)


def test_ddim_with_eta_one_is_ancestral_with_the_smallest_variance():
    def low(x, t, y):
        return torch.cat([smooth(x, t, y)[:, :2], -torch.ones_like(x)], 1)

    x = torch.randn(3, 2, 2, 2, generator=seeded(7), dtype=torch.float64)
    for step in (1, 13, 39):
        few = DIFFUSION.respace(40)
        a, _ = ancestral_step(low, few, x, step, None, seeded(8))
        b, _ = ddim_step(low, few, x, step, None, seeded(8), eta=1.0)
        torch.testing.assert_close(a, b)
