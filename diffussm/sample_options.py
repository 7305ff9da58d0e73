"""What decides a sample.

Generated from book/32_sample_options.md by `make export`: edit there.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from diffussm.guards import bounded, check_fields
from diffussm.model_config import DiffuSSMConfig

__all__ = ["Sampler", "SampleSet", "SAMPLE_PRESETS"]


@dataclass(frozen=True)
class Sampler:
    """How images are drawn: by which steps, how many, guided how strongly.

    Args:
        steps: Length of the chain, 1 to the number of timesteps in training.
        method: "ddpm" (ancestral sampling with the learned variance) or "ddim".
        eta: Noise of DDIM, 0 (none) to 1.
        cfg_scale: Guidance, at least 0; 1 is none.
        guidance_channels: Guide only the first so many channels; None is all.
        clip_denoised: Clamp each predicted image to [-1, 1]: for pixels, not for
            latents.
    """

    steps: int = bounded(250, least=1)
    method: Literal["ddpm", "ddim"] = "ddpm"
    eta: float = bounded(0.0, least=0, most=1)
    cfg_scale: float = bounded(1.0, least=0)
    guidance_channels: int | None = bounded(None, least=1)
    clip_denoised: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.eta and self.method == "ddpm":
            raise ValueError(f"eta={self.eta}: eta belongs to 'ddim', not to 'ddpm'")


_DIT = Sampler(cfg_scale=1.5, guidance_channels=3)


@dataclass(frozen=True)
class SampleSet:
    """Everything that decides a set of samples; the defaults are those of `paper-fid`.

    Args:
        count: Images of the set.
        labels: Classes at random, or each as often as any other.
        classes: Numbers of those that are drawn; None is all.
        precision: With tf32 a GPU rounds the factors of matrix products; bf16 is
            autocast; auto is bf16 on a GPU and float32 elsewhere.
        batch_size: Images at once, which change nothing; 0 tries how many fit.
        seed: Decides all that is random.
        sampler: How each is drawn.
    """

    count: int = bounded(50_000, least=1)
    labels: Literal["random", "balanced"] = "random"
    classes: tuple[int, ...] | None = None
    precision: Literal["auto", "float32", "tf32", "bf16"] = "auto"
    batch_size: int = bounded(64, least=0)
    seed: int = bounded(0, least=0)
    sampler: Sampler = _DIT

    def __post_init__(self) -> None:
        check_fields(self)
        chosen = (0,) if self.classes is None else self.classes
        if min(chosen, default=-1) < 0 or len({*chosen}) < len(chosen):
            raise ValueError(f"classes={chosen}: expected numbers from 0, each once")

    def of(self, model: DiffuSSMConfig) -> "SampleSet":
        """What of this applies to a model; ValueError for classes that it lacks."""
        known = model.num_classes
        if self.classes and max(self.classes) >= known:
            raise ValueError(f"classes={self.classes}: this model has {known}, from 0")
        scale = self.sampler.cfg_scale if known else 1.0
        channels = self.sampler.guidance_channels
        if scale == 1 or (channels is not None and channels >= model.in_channels):
            channels = None  # nothing is guided, or all of it
        sampler = replace(self.sampler, cfg_scale=scale, guidance_channels=channels)
        return replace(self, sampler=sampler)

    def on(self, device: str) -> "SampleSet":
        """The same with the precision that "auto" means on a "cuda" or a "cpu"."""
        if self.precision != "auto":
            return self
        return replace(self, precision="bf16" if device == "cuda" else "float32")

    def record(self, num_classes: int) -> dict[str, Any]:
        """How the set is drawn, as one flat mapping that JSON can hold."""
        how = asdict(self)
        sampler = how.pop("sampler")
        if not sampler["eta"]:
            del sampler["eta"]  # DDIM without noise: sets of earlier versions
        labels = self.labels if num_classes else "none"
        return {**how, **sampler, "labels": labels}


SAMPLE_PRESETS = {
    "paper-fid": SampleSet(),
    "paper-fid-all": SampleSet(labels="balanced", sampler=Sampler(cfg_scale=1.5)),
    "paper-fid-unguided": SampleSet(sampler=Sampler(guidance_channels=3)),
    "pretty": SampleSet(
        count=64,
        labels="balanced",
        precision="float32",
        batch_size=16,
        sampler=Sampler(cfg_scale=4.0),
    ),
}
