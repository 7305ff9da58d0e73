"""Diffusion: what the network learns.

Generated from book/31_diffusion.md by `make export`: edit there.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor
from tqdm import tqdm

from diffussm.bound import bits_per_dim, discretized_gaussian_log_likelihood, normal_kl
from diffussm.forward_process import ForwardProcess, check_batch, working_dtype
from diffussm.guards import expect, expect_int, readable

__all__ = [
    "DenoisingModel",
    "GaussianDiffusion",
    "find_attribute",
    "NoiseSource",
    "standard_normal",
]


DenoisingModel = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of x_t, t, labels


class GaussianDiffusion(ForwardProcess):
    """A forward process and the reverse process that a network defines on it (paper,
    section 2.1).

    Args:
        betas: As for `ForwardProcess`.
        levels: Number of grey levels of the data in [-1, 1]: 256 for 8-bit images, 17
            for the digits. Only the term of the bound that codes x_0 depends on it.
        timestep_map: What the network is told instead of t, increasing integers (T,);
            default t itself.

    A *model* is any callable (x_t: (B, C, H, W), t: (B,), y: (B,) or None) ->
    (B, 2C, H, W): the predicted noise, then v, which places the variance.

    Raises:
        ValueError, TypeError: `betas`, `levels` or `timestep_map` cannot work.
    """

    def __init__(
        self, betas: Tensor, *, levels: int = 256, timestep_map: Tensor | None = None
    ) -> None:
        super().__init__(betas)
        self.levels = expect_int("levels", levels, least=2)
        if timestep_map is None:
            timestep_map = torch.arange(self.num_timesteps)
        _check_timestep_map(timestep_map, self.num_timesteps)
        self.timestep_map = timestep_map.detach().cpu()

    @classmethod
    def linear(cls, num_timesteps: int = 1000, levels: int = 256) -> Self:
        """T betas from 1e-4 to 0.02 in equal steps, multiplied by 1000 / T.

        Raises:
            ValueError: T is 20 or less; the last beta would be 1 or more.
        """
        expect_int("num_timesteps", num_timesteps, least=21)  # the last beta is 20 / T
        scale = 1000 / num_timesteps
        betas = torch.linspace(1e-4, 0.02, num_timesteps, dtype=torch.float64)
        return cls(scale * betas, levels=levels)

    def _predict(
        self, model: DenoisingModel, x_t: Tensor, t: Tensor, y: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The two halves of the network's output, noise and v, in the precision of
        x_t.
        """
        told = self._at("timestep_map", t, like=x_t).flatten().to(t.dtype)  # (B,)
        output = model(x_t, told, y)  # (B, 2C, H, W)
        B, C, H, W = x_t.shape
        expect("model output, noise and v,", output, "B C H W", B=B, C=2 * C, H=H, W=W)
        eps, v = output.to(x_t.dtype).chunk(2, dim=1)  # (B, C, H, W) each
        return eps, v

    def _predicted_image(
        self, eps: Tensor, x_t: Tensor, t: Tensor, clip_denoised: bool
    ) -> tuple[Tensor, Tensor]:
        """x_0 as the noise implies it (eq-diffusion-mean), and the noise it implies."""
        alpha_bar = self._at("alphas_cumprod", t, x_t)  # (B, 1, 1, 1)
        pred_xstart = (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
            eps = (x_t - alpha_bar.sqrt() * pred_xstart) / (1 - alpha_bar).sqrt()
        return pred_xstart, eps

    def _log_variance(self, v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Between the logarithms of beta-tilde and beta (eq-diffusion-variance)."""
        share = (v + 1) / 2  # -1, 1 -> 0, 1
        smallest = self._at("posterior_log_variance_clipped", t, x_t)
        return share * self._at("betas", t, x_t).log() + (1 - share) * smallest

    def _reverse(
        self,
        eps: Tensor,
        v: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = False,
    ) -> dict[str, Tensor]:
        """From the noise and v to mean and variance of p(x_{t-1} | x_t)."""
        pred_xstart, eps = self._predicted_image(eps, x_t, t, clip_denoised)
        mean, _, _ = self._posterior(pred_xstart, x_t, t)
        log_variance = self._log_variance(v, x_t, t)
        return {
            "mean": mean,
            "variance": log_variance.exp(),
            "log_variance": log_variance,
            "pred_xstart": pred_xstart,
            "eps": eps,
        }

    def p_mean_variance(
        self,
        model: DenoisingModel,
        x_t: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        clip_denoised: bool = False,
    ) -> dict[str, Tensor]:
        """The network's step back, p(x_{t-1} | x_t) (paper, equation 2).

        Args:
            model: See the class.
            x_t: Noisy images (B, C, H, W).
            t: Timesteps of this schedule, from 0 to T - 1, integer (B,).
            y: Labels (B,), handed to the model.
            clip_denoised: Clamp the predicted image to [-1, 1]: for pixels, not for
                latents.

        Returns:
            "mean", "variance", "log_variance", "pred_xstart" and "eps" (the noise that
            belongs to pred_xstart), all (B, C, H, W).

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit (the model's output
                included), NaN, t outside the schedule.
        """
        check_batch(self.num_timesteps, t, x_t=x_t)
        x_t = x_t.to(working_dtype(x_t))
        return self._reverse(*self._predict(model, x_t, t, y), x_t, t, clip_denoised)

    def _bound_term(
        self, x0: Tensor, x_t: Tensor, t: Tensor, p: dict[str, Tensor]
    ) -> Tensor:
        """L_t in bits per dimension, (B,) (eq-diffusion-bound)."""
        mean, _, log_variance = self._posterior(x0, x_t, t)
        step_back = p["mean"], p["log_variance"]
        kl = bits_per_dim(normal_kl(mean, log_variance, *step_back))
        if readable(t) and not bool((t == 0).any()):
            return kl
        log_mass = discretized_gaussian_log_likelihood(x0, *step_back, self.levels)
        return torch.where(t == 0, bits_per_dim(-log_mass), kl)

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
            (B,) each: "mse", the mean squared error of the predicted noise; "vb", the
            term L_t of the bound in bits per dimension, with no gradient to the
            predicted noise; "loss" = mse + T/1000 vb.

        Raises:
            ValueError, TypeError: as for `q_sample` and `p_mean_variance`.
        """
        x_t = self.q_sample(x0, t, noise)
        eps, v = self._predict(model, x_t, t, y)
        p = self._reverse(eps.detach(), v, x_t, t)  # the stop-gradient
        mse = ((noise - eps) ** 2).flatten(1).mean(1)
        vb = self._bound_term(x0, x_t, t, p)
        return {"loss": mse + self.num_timesteps / 1000 * vb, "mse": mse, "vb": vb}

    def _term(
        self,
        model: DenoisingModel,
        x0: Tensor,
        step: int,
        y: Tensor | None,
        generator: torch.Generator | None,
        clip_denoised: bool,
    ) -> dict[str, Tensor]:
        """What `vlb` says about one timestep, (B,) each."""
        t = torch.full((len(x0),), step, device=x0.device)
        noise = standard_normal(x0.shape, generator, x0.device, working_dtype(x0))
        x_t = self._noised(x0, t, noise)
        eps, v = self._predict(model, x_t, t, y)
        p = self._reverse(eps, v, x_t, t, clip_denoised)
        return {
            "vb": self._bound_term(x0, x_t, t, p),
            "mse": ((noise - p["eps"]) ** 2).flatten(1).mean(1),
            "xstart_mse": ((x0 - p["pred_xstart"]) ** 2).flatten(1).mean(1),
        }

    def _prior_bpd(self, x0: Tensor) -> Tensor:
        """L_T in bits per dimension, (B,): noise that is not quite noise."""
        last = torch.full((len(x0),), self.num_timesteps - 1, device=x0.device)
        alpha_bar = self._at("alphas_cumprod", last, x0)
        zero = torch.zeros_like(alpha_bar)
        kl = normal_kl(alpha_bar.sqrt() * x0, (1 - alpha_bar).log(), zero, zero)
        return bits_per_dim(kl)

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
        """The whole bound on -log p(x_0), one draw of noise per term
        (eq-diffusion-bound).

        Args:
            model, y, clip_denoised: As for `p_mean_variance`.
            x0: Images (B, C, H, W) on the grey levels of this diffusion.
            generator: Source of the noise; default torch's own.
            progress: Show a bar over the T terms on stderr.

        Returns:
            "total_bpd" and "prior_bpd" (B,), "vb" (B, T), all in bits per dimension;
            "mse" (B, T) of the predicted noise and "xstart_mse" (B, T) of the predicted
            image. Column t belongs to timestep t; total = prior + sum of vb.

        Raises:
            ValueError, TypeError: as for `q_sample` and `p_mean_variance`.
        """
        steps = range(self.num_timesteps)
        check_batch(len(steps), x0.new_zeros(len(x0)).long(), x0=x0)
        bar = tqdm(steps, "bound", unit="term", disable=not progress)
        with find_attribute(model, "cached_kernels", nullcontext)():  # for all terms
            given = y, generator, clip_denoised
            terms = [self._term(model, x0, step, *given) for step in bar]
        columns = {name: torch.stack([t[name] for t in terms], 1) for name in terms[0]}
        prior = self._prior_bpd(x0)
        return {
            "total_bpd": prior + columns["vb"].sum(1),
            "prior_bpd": prior,
            **columns,
        }

    def respace(self, num_timesteps: int) -> Self:
        """A shorter chain through some of the same noise levels, for the same network
        (equation eq-sampling-respace).

        The chosen timesteps are equally spaced, the first and the last among them, as
        in ADM's code for a plain number, not for its "ddimN". A single one is the last,
        ADM's is the first. The network is still given the original timestep.

        Raises:
            ValueError, TypeError: not an integer from 1 to T.
        """
        count = expect_int("steps", num_timesteps, least=1, most=self.num_timesteps)
        noisiest = self.num_timesteps - 1
        places = torch.linspace(noisiest, 0, count, dtype=torch.float64)
        chosen = places.round().long().flip(0)
        after = self.alphas_cumprod[chosen]
        before = torch.cat([after.new_ones(1), after[:-1]])
        told = self.timestep_map[chosen]
        return type(self)(1 - after / before, levels=self.levels, timestep_map=told)


def _check_timestep_map(timestep_map: Tensor, num_timesteps: int) -> None:
    expect("timestep_map", timestep_map, "T", T=num_timesteps)
    if timestep_map.is_floating_point():
        raise TypeError(f"timestep_map is {timestep_map.dtype}: expected integers")


def find_attribute(model: Any, name: str, default: Any = None) -> Any:
    """An attribute of a model, or of the model inside a wrapper such as
    DistributedDataParallel.
    """
    while not hasattr(model, name) and hasattr(model, "module"):
        model = model.module
    return getattr(model, name, default)


NoiseSource = torch.Generator | list[torch.Generator] | None  # for all, or of each


def standard_normal(
    shape: Sequence[int],
    generator: NoiseSource,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Noise drawn where the generator lives, then moved: a CPU generator gives every
    device the same. A list has a generator for each image.
    """
    if isinstance(generator, list):
        expect_int("the number of generators", len(generator), shape[0], shape[0])
        where = generator[0].device  # moved once, not image by image
        each = [standard_normal(shape[1:], g, where, dtype) for g in generator]
        return torch.stack(each).to(device)
    where = device if generator is None else generator.device
    return torch.randn(*shape, generator=generator, device=where, dtype=dtype).to(
        device
    )
