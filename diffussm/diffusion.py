"""Diffusion: from data to noise, and the way back.

Generated from book/31_diffusion.md by `make export`: edit there.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from numbers import Integral
from typing import Any, Self

import torch
from torch import Tensor
from tqdm import tqdm

__all__ = [
    "ForwardProcess",
    "normal_kl",
    "discretized_gaussian_log_likelihood",
    "bits_per_dim",
    "standard_normal",
    "DenoisingModel",
    "find_attribute",
    "GaussianDiffusion",
]


class ForwardProcess:
    """The fixed Markov chain q that turns data into noise (paper, equation 1); nothing here is learned.

    Args:
        betas: Variance added at each step, floating point (T,), each strictly between 0 and 1.

    Its tables, float64 (T,) on the CPU: `betas`, `alphas_cumprod`, `alphas_cumprod_prev`,
    `posterior_variance`, `posterior_log_variance_clipped`. Timestep t of the code is step t + 1 of the paper.

    Raises:
        ValueError: `betas` is not such a vector.
    """

    def __init__(self, betas: Tensor) -> None:
        if betas.ndim != 1 or not len(betas) or not betas.is_floating_point():
            raise ValueError(
                f"betas has shape {tuple(betas.shape)} and dtype {betas.dtype}: expected floating-point (T,)"
            )
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(
                f"betas reach from {betas.min().item():.3g} to {betas.max().item():.3g}: expected each, the "
                "variance of a step, strictly between 0 and 1"
            )
        self.betas = betas.detach().to("cpu", torch.float64)
        self.num_timesteps = len(betas)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        self.alphas_cumprod_prev = torch.cat(
            [self.betas.new_ones(1), self.alphas_cumprod[:-1]]
        )

        before, after = self.alphas_cumprod_prev, self.alphas_cumprod
        self.posterior_variance = self.betas * (1 - before) / (1 - after)
        # The first is 0: x_0 is known when x_0 is given. No KL uses its logarithm, only the learned variance
        # does, as its lower end; there, as in ADM, it borrows from its neighbour.
        clipped = self.posterior_variance.clone()
        clipped[0] = clipped[1] if self.num_timesteps > 1 else self.betas[0]
        self.posterior_log_variance_clipped = clipped.log()
        self.posterior_x0_factor = self.betas * before.sqrt() / (1 - after)
        self.posterior_x_t_factor = (1 - before) * (1 - self.betas).sqrt() / (1 - after)
        self._tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle takes no tables along that lie on somebody's GPU."""
        return {**self.__dict__, "_tables": {}}

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """The entries t of a table, (B, 1, 1, 1), in the precision and on the device of `like`."""
        dtype, device = _working_dtype(like), like.device
        if (
            name,
            device,
            dtype,
        ) not in self._tables:  # one copy to a GPU, not one per step
            self._tables[name, device, dtype] = getattr(self, name).to(dtype).to(device)
        return self._tables[name, device, dtype][t.to(device)].view(-1, 1, 1, 1)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw x_t given x_0 in one jump (equation eq-diffusion-jump, the paper's equation 1).

        Args:
            x0: Images or latents, floating point (B, C, H, W).
            t: Timesteps from 0 to T - 1, integer (B,).
            noise: Standard normal, as `x0`.

        Returns:
            (B, C, H, W).

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit, NaN or infinite images, t outside the
                schedule.
        """
        _check_images("x0", x0)
        _check_same("noise", noise, x0)
        _check_timesteps(t, x0, self.num_timesteps)
        alpha_bar = self._at("alphas_cumprod", t, x0)  # (B, 1, 1, 1)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise  # (B, C, H, W)

    def q_posterior(
        self, x0: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step back when x_0 is known: q(x_{t-1} | x_t, x_0) (equation eq-diffusion-posterior).

        Returns:
            Mean (B, C, H, W), variance and clipped log-variance (B, 1, 1, 1).

        Raises:
            ValueError, TypeError: as for `q_sample`.
        """
        _check_same("x_t", x_t, x0)
        _check_timesteps(t, x0, self.num_timesteps)
        mean = self._at("posterior_x0_factor", t, x0) * x0
        mean = mean + self._at("posterior_x_t_factor", t, x0) * x_t  # (B, C, H, W)
        variance = self._at("posterior_variance", t, x0)
        return mean, variance, self._at("posterior_log_variance_clipped", t, x0)


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _readable(x: Tensor) -> bool:
    """Whether a look at the values is cheap: it makes a GPU wait and breaks a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_images(name: str, x: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected (B, C, H, W)")
    if not x.is_floating_point():
        raise TypeError(
            f"{name} has dtype {x.dtype}: expected floating point, images scaled to [-1, 1]"
        )
    if _readable(x) and not bool(torch.isfinite(x).all()):
        bad = (~torch.isfinite(x)).flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(
            f"{name} has NaN or infinite values in samples {bad[:10]} of the batch: leave these images "
            "out, or find what made them so"
        )


def _check_same(name: str, x: Tensor, x0: Tensor) -> None:
    if x.shape != x0.shape:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}: expected {tuple(x0.shape)}, that of the images"
        )
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}: expected floating point")


def _check_timesteps(t: Tensor, x: Tensor, num_timesteps: int) -> None:
    if t.shape != x.shape[:1]:
        raise ValueError(
            f"t has shape {tuple(t.shape)}: expected ({len(x)},), one timestep per sample"
        )
    if t.is_floating_point() or t.dtype == torch.bool:
        raise TypeError(
            f"t has dtype {t.dtype}: expected integers from 0 to {num_timesteps - 1}"
        )
    if (
        _readable(t)
        and len(t)
        and not 0 <= int(t.min()) <= int(t.max()) < num_timesteps
    ):
        raise ValueError(
            f"t reaches from {int(t.min())} to {int(t.max())}: expected 0 to {num_timesteps - 1}, the "
            "timesteps of this schedule"
        )


def normal_kl(
    mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor
) -> Tensor:
    """KL(N1 || N2) of diagonal Gaussians, elementwise, in nats (equation eq-diffusion-kl).

    The arguments broadcast; the result has their common shape.
    """
    ratio = torch.exp(log_variance1 - log_variance2)
    distance = (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    return 0.5 * (log_variance2 - log_variance1 + ratio + distance - 1)


def discretized_gaussian_log_likelihood(
    x: Tensor, mean: Tensor, log_variance: Tensor, levels: int = 256
) -> Tensor:
    """The log of the mass that N(mean, variance) puts on the bin of x, in nats (eq-diffusion-bin).

    Args:
        x: Data in [-1, 1] on `levels` equidistant grey levels; the outermost two bins reach to infinity.
        mean, log_variance: Of the Gaussian; they broadcast against `x`.
        levels: Number of grey levels, at least 2.

    Returns:
        As `x`. Summed over all levels, the exponentials give one.
    """
    half_bin = 1 / (levels - 1)
    sigma = torch.exp(0.5 * log_variance)
    # A normal distribution is symmetric: move the bin to the left tail, where log_ndtr keeps its digits.
    distance = (x - mean).abs()
    log_upper = torch.special.log_ndtr((half_bin - distance) / sigma)
    log_lower = torch.special.log_ndtr((-half_bin - distance) / sigma)
    inside = log_upper + torch.log(
        -torch.expm1((log_lower - log_upper).clamp(max=-1e-12))
    )
    lowest = torch.special.log_ndtr((x - mean + half_bin) / sigma)
    highest = torch.special.log_ndtr((mean - x + half_bin) / sigma)
    return torch.where(
        x < -1 + half_bin, lowest, torch.where(x > 1 - half_bin, highest, inside)
    )


def bits_per_dim(nats: Tensor) -> Tensor:
    """(B, C, H, W) in nats -> (B,): the mean over the dimensions of an image, in bits."""
    return nats.flatten(1).mean(1) / math.log(2)


def standard_normal(
    shape: Sequence[int],
    generator: torch.Generator | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Noise drawn where the generator lives, then moved: a CPU generator gives every device the same."""
    where = device if generator is None else generator.device
    return torch.randn(*shape, generator=generator, device=where, dtype=dtype).to(
        device
    )


DenoisingModel = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def find_attribute(model: Any, name: str, default: Any = None) -> Any:
    """An attribute of a model, or of the model inside a wrapper such as DistributedDataParallel."""
    while not hasattr(model, name) and hasattr(model, "module"):
        model = model.module
    return getattr(model, name, default)


class GaussianDiffusion(ForwardProcess):
    """A forward process and the reverse process that a network defines on it (paper, section 2.1).

    Args:
        betas: As for `ForwardProcess`.
        levels: Number of grey levels of the data in [-1, 1]: 256 for 8-bit images, 17 for the digits of
            chapter 8. Only the term of the bound that codes x_0 depends on it.
        timestep_map: What the network is told instead of t, increasing integers (T,); default t itself.

    A *model* is any callable (x_t: (B, C, H, W), t: (B,), y: (B,) or None) -> (B, 2C, H, W): the predicted
    noise, then v, which places the variance.

    Raises:
        ValueError: `betas`, `levels` or `timestep_map` cannot work.
    """

    def __init__(
        self, betas: Tensor, *, levels: int = 256, timestep_map: Tensor | None = None
    ) -> None:
        super().__init__(betas)
        if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
            raise ValueError(
                f"levels={levels!r}: expected the number of grey levels, at least 2"
            )
        if timestep_map is None:
            timestep_map = torch.arange(self.num_timesteps)
        if timestep_map.shape != self.betas.shape or timestep_map.is_floating_point():
            raise ValueError(
                f"timestep_map has shape {tuple(timestep_map.shape)} and dtype {timestep_map.dtype}: "
                f"expected integers ({self.num_timesteps},), one for each of the betas"
            )
        self.levels = levels
        self.timestep_map = timestep_map.detach().cpu()

    @classmethod
    def linear(cls, num_timesteps: int = 1000, levels: int = 256) -> Self:
        """ADM's schedule: T betas from 1e-4 to 0.02 in equal steps, multiplied by 1000 / T.

        Raises:
            ValueError: T is 20 or less; the last beta would be 1 or more.
        """
        if num_timesteps <= 20:
            raise ValueError(
                f"num_timesteps={num_timesteps}: expected over 20, the last beta is 20 / T"
            )
        scale = 1000 / num_timesteps
        return cls(
            scale * torch.linspace(1e-4, 0.02, num_timesteps, dtype=torch.float64),
            levels=levels,
        )

    def respace(self, num_timesteps: int) -> Self:
        """A shorter chain through some of the same noise levels, for the same network (chapter 7).

        The chosen timesteps are equally spaced, the first and the last among them (a single one is the last);
        so ADM's code has it for a plain number, not for its "ddimN". The betas follow from their
        alphas_cumprod. The network is still told the original timestep.

        Raises:
            ValueError, TypeError: not an integer from 1 to T.
        """
        if isinstance(num_timesteps, bool) or not isinstance(num_timesteps, Integral):
            raise TypeError(f"{num_timesteps!r} steps: expected an integer")
        if not 1 <= num_timesteps <= self.num_timesteps:
            raise ValueError(
                f"{num_timesteps} steps: expected 1 to {self.num_timesteps}, the length of the schedule"
            )
        last = self.num_timesteps - 1
        # From the noisy end, so that a single step starts from noise.
        chosen = (
            torch.linspace(last, 0, int(num_timesteps), dtype=torch.float64)
            .round()
            .long()
            .flip(0)
        )
        after = self.alphas_cumprod[chosen]
        before = torch.cat([after.new_ones(1), after[:-1]])
        return type(self)(
            1 - after / before,
            levels=self.levels,
            timestep_map=self.timestep_map[chosen],
        )

    def p_mean_variance(
        self,
        model: DenoisingModel,
        x_t: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        clip_denoised: bool = False,
    ) -> dict[str, Tensor]:
        """The network's step back, p(x_{t-1} | x_t) (paper, equation 2; eq-diffusion-variance).

        Args:
            model: See the class.
            x_t: Noisy images (B, C, H, W).
            t: Timesteps of this schedule, from 0 to T - 1, integer (B,).
            y: Labels (B,), handed to the model.
            clip_denoised: Clamp the predicted image to [-1, 1]: for pixels, not for latents.

        Returns:
            "mean", "variance", "log_variance", "pred_xstart" and "eps" (the noise that belongs to
            pred_xstart), all (B, C, H, W).

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit (the model's output included), NaN, t
                outside the schedule.
        """
        _check_images("x_t", x_t)
        x_t = x_t.to(_working_dtype(x_t))
        return self._reverse(*self._predict(model, x_t, t, y), x_t, t, clip_denoised)

    def _predict(
        self, model: DenoisingModel, x_t: Tensor, t: Tensor, y: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The two halves of the network's output, noise and v, in the precision of x_t."""
        _check_timesteps(t, x_t, self.num_timesteps)
        output = model(x_t, self.timestep_map.to(t.device)[t], y)  # (B, 2C, H, W)
        batch, channels, *size = x_t.shape
        if output.shape != (batch, 2 * channels, *size):
            raise ValueError(
                f"the model returned {tuple(output.shape)} for x_t of {tuple(x_t.shape)}: expected "
                f"{(batch, 2 * channels, *size)}, the noise and v"
            )
        eps, v = output.to(x_t.dtype).chunk(2, dim=1)  # (B, C, H, W) each
        return eps, v

    def _reverse(
        self,
        eps: Tensor,
        v: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = False,
    ) -> dict[str, Tensor]:
        """From the noise and v to mean and variance of p(x_{t-1} | x_t)."""
        alpha_bar = self._at("alphas_cumprod", t, x_t)  # (B, 1, 1, 1)
        pred_xstart = (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
            eps = (x_t - alpha_bar.sqrt() * pred_xstart) / (1 - alpha_bar).sqrt()
        mean, _, smallest = self.q_posterior(pred_xstart, x_t, t)

        share = (v + 1) / 2  # -1, 1 -> 0, 1
        log_variance = share * self._at("betas", t, x_t).log() + (1 - share) * smallest
        return {
            "mean": mean,
            "variance": log_variance.exp(),
            "log_variance": log_variance,
            "pred_xstart": pred_xstart,
            "eps": eps,
        }

    def _bound_term(
        self, x0: Tensor, x_t: Tensor, t: Tensor, p: dict[str, Tensor]
    ) -> Tensor:
        """L_t in bits per dimension, (B,): a KL, or at t = 0 the code length of x_0 (eq-diffusion-bound)."""
        mean, _, log_variance = self.q_posterior(x0, x_t, t)
        kl = normal_kl(mean, log_variance, p["mean"], p["log_variance"])
        if _readable(t) and not bool((t == 0).any()):
            return bits_per_dim(
                kl
            )  # nearly always; the likelihood is the costlier half
        likelihood = discretized_gaussian_log_likelihood(
            x0, p["mean"], p["log_variance"], self.levels
        )
        return torch.where(t == 0, bits_per_dim(-likelihood), bits_per_dim(kl))

    def losses(
        self,
        model: DenoisingModel,
        x0: Tensor,
        t: Tensor,
        y: Tensor | None,
        noise: Tensor,
    ) -> dict[str, Tensor]:
        """The hybrid loss of Nichol and Dhariwal (equation eq-diffusion-hybrid).

        Args:
            model: See the class.
            x0: Images (B, C, H, W).
            t: Timesteps (B,).
            y: Labels (B,) or None, handed to the model.
            noise: Standard normal (B, C, H, W).

        Returns:
            (B,) each: "mse", the mean squared error of the predicted noise; "vb", the term L_t of the bound
            in bits per dimension, with no gradient to the predicted noise; "loss" = mse + T/1000 vb.

        Raises:
            ValueError, TypeError: as for `q_sample` and `p_mean_variance`.
        """
        x_t = self.q_sample(x0, t, noise)
        eps, v = self._predict(model, x_t, t, y)
        p = self._reverse(eps.detach(), v, x_t, t)  # the stop-gradient
        mse = ((noise - eps) ** 2).flatten(1).mean(1)
        vb = self._bound_term(x0, x_t, t, p)
        return {"loss": mse + self.num_timesteps / 1000 * vb, "mse": mse, "vb": vb}

    @torch.no_grad()
    def vlb(
        self,
        model: DenoisingModel,
        x0: Tensor,
        y: Tensor | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
        clip_denoised: bool = False,
    ) -> dict[str, Tensor]:
        """The whole bound on -log p(x_0), one draw of noise per term (equation eq-diffusion-bound).

        Args:
            model: See the class.
            x0: Images (B, C, H, W) on the grey levels of this diffusion.
            y: Labels (B,) or None, handed to the model.
            generator: Source of the noise; default torch's own.
            progress: Show a bar over the T terms on stderr.
            clip_denoised: As for `p_mean_variance`.

        Returns:
            "total_bpd" and "prior_bpd" (B,), "vb" (B, T), all in bits per dimension; "mse" (B, T) of the
            predicted noise and "xstart_mse" (B, T) of the predicted image. Column t belongs to timestep t;
            total = prior + sum of vb.

        Raises:
            ValueError, TypeError: as for `q_sample` and `p_mean_variance`.
        """
        _check_images("x0", x0)
        columns: dict[str, list[Tensor]] = {"vb": [], "mse": [], "xstart_mse": []}
        with find_attribute(
            model, "cached_kernels", nullcontext
        )():  # the same kernels for all terms
            for step in tqdm(
                range(self.num_timesteps),
                desc="bound",
                unit="term",
                disable=not progress,
            ):
                t = torch.full((len(x0),), step, device=x0.device)
                noise = standard_normal(
                    x0.shape, generator, x0.device, _working_dtype(x0)
                )
                x_t = self.q_sample(x0, t, noise)
                p = self.p_mean_variance(model, x_t, t, y, clip_denoised)
                columns["vb"].append(self._bound_term(x0, x_t, t, p))
                columns["mse"].append(((noise - p["eps"]) ** 2).flatten(1).mean(1))
                columns["xstart_mse"].append(
                    ((x0 - p["pred_xstart"]) ** 2).flatten(1).mean(1)
                )
        terms = {
            name: torch.stack(values, dim=1) for name, values in columns.items()
        }  # (B, T)

        last = torch.full((len(x0),), self.num_timesteps - 1, device=x0.device)
        alpha_bar = self._at("alphas_cumprod", last, x0)
        zero = torch.zeros_like(alpha_bar)
        prior = bits_per_dim(
            normal_kl(alpha_bar.sqrt() * x0, (1 - alpha_bar).log(), zero, zero)
        )
        return {"total_bpd": prior + terms["vb"].sum(1), "prior_bpd": prior, **terms}
