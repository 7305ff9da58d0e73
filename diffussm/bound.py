"""The variational bound: what an image costs in bits.

Generated from book/31_bound.md by `make export`: edit there.
"""

import math

import torch
from torch import Tensor

__all__ = ["normal_kl", "discretized_gaussian_log_likelihood", "bits_per_dim"]


def normal_kl(
    mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor
) -> Tensor:
    """KL(N1 || N2) of diagonal Gaussians, elementwise, in nats (equation
    eq-diffusion-kl). The arguments broadcast.
    """
    ratio = torch.exp(log_variance1 - log_variance2)
    distance = (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    return 0.5 * (log_variance2 - log_variance1 + ratio + distance - 1)


def _log_mass(distance: Tensor, half_bin: float, sigma: Tensor) -> Tensor:
    """log of the mass within half_bin of a point at this distance from the mean."""
    log_upper: Tensor = torch.special.log_ndtr((half_bin - distance) / sigma)
    log_lower = torch.special.log_ndtr((-half_bin - distance) / sigma)
    nearly_one = torch.expm1((log_lower - log_upper).clamp(max=-1e-12))
    return log_upper + torch.log(-nearly_one)


def discretized_gaussian_log_likelihood(
    x: Tensor, mean: Tensor, log_variance: Tensor, levels: int = 256
) -> Tensor:
    """The log of the mass that N(mean, variance) puts on the bin of x, in nats
    (eq-diffusion-bin).

    Args:
        x: Data in [-1, 1] on `levels` equidistant grey levels; the outermost two bins
            reach to infinity.
        mean, log_variance: Of the Gaussian; they broadcast against `x`.
        levels: Number of grey levels, at least 2.

    Returns:
        As `x`. Summed over all levels, the exponentials give one.
    """
    half_bin = 1 / (levels - 1)
    sigma = torch.exp(0.5 * log_variance)
    inside = _log_mass((x - mean).abs(), half_bin, sigma)
    lowest = torch.special.log_ndtr((x - mean + half_bin) / sigma)
    highest = torch.special.log_ndtr((mean - x + half_bin) / sigma)
    inside = torch.where(x > 1 - half_bin, highest, inside)
    return torch.where(x < -1 + half_bin, lowest, inside)


def bits_per_dim(nats: Tensor) -> Tensor:
    """(B, C, H, W) in nats -> (B,): the mean over the dimensions of an image, in
    bits.
    """
    return nats.flatten(1).mean(1) / math.log(2)
