"""The model.

Generated from book/24_model.md by `make export`: edit there.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffussm.bidirectional import BidirectionalSSM
from diffussm.chunked import prepare_layers
from diffussm.convolution import without_autocast
from diffussm.embeddings import (
    Labels,
    as_labels,
    sincos_positions,
    timestep_features,
    to_image,
    to_stream,
)
from diffussm.files import read_tensors, write_json, write_tensors
from diffussm.guards import (
    differences,
    expect,
    expect_indices,
    expect_one_of,
    expect_real,
    expect_same,
    expect_there,
)
from diffussm.model_config import CONFIG_FILE, read_config
from diffussm.model_config import PRESETS as PRESETS
from diffussm.model_config import DiffuSSMConfig as DiffuSSMConfig
from diffussm.recomputation import Recompute, RecomputingBlock
from diffussm.two_level import multiplying_in

__all__ = ["DiffuSSM", "weights_file"]


class DiffuSSM(nn.Module):
    """The denoiser: noisy image, timestep, label in; predicted noise and variance out.

    A stack of `HourglassBlock` between two linear maps. A new model returns zeros.

    Args:
        config: A `DiffuSSMConfig`; `from_preset` has the paper's.

    Source: ch. "The model"; sections 3.2 and 4.1 of the paper.
    """

    def __init__(self, config: DiffuSSMConfig) -> None:
        super().__init__()
        if hasattr(config, "variant"):  # of ch. "Variants": what it builds is another
            raise ValueError(f"the variant {config.variant!r} is no plain DiffuSSM")
        self.config, D, M = config, config.d_model, config.downsample
        numbers = M * config.patch_size**2 * config.in_channels
        self.embed_x = nn.Linear(numbers, D)
        self.embed_t = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        classes = config.num_classes
        self.embed_y = nn.Embedding(classes + 1, D) if classes else None
        self.blocks = nn.ModuleList(
            RecomputingBlock(D, config.d_state, M) for _ in range(config.n_blocks)
        )
        self.final_norm = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.final_modulation = nn.Linear(D, 2 * D)
        self.head = nn.Linear(D, 2 * numbers)
        self._initialize()
        self.null_label = classes if classes else None  # means "no class"
        self.activation_checkpointing: Recompute = "none"
        self._samplers = 0  # how many cached_kernels() are open
        self._cache: _Cache | None = None

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Labels | None = None,
        prepared: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Predict noise and variance. Draws no random numbers, in training too.

        Args:
            x: Noisy input, (B, C, H, W), of any H and W that P and M divide.
            t: Timesteps, (B,), integer or real.
            y: Labels, (B,), the last one for "no class"; None if unconditional.
            prepared: What `prepare` returns for L = H W / P^2, if it is known.

        Returns:
            (B, 2C, H, W): the noise in the first C channels, in the others the place of
            the variance between its bounds. Of the precision of the weights.

        Raises:
            ValueError: shapes that do not fit, labels missing or outside the table.
            TypeError: `x` is not floating-point or `y` not integer.
        """
        self._check(x, t, prepared)
        P, M, (H, W) = self.config.patch_size, self.config.downsample, x.shape[2:]
        c = self._condition(t, self._labels(y, x))  # (B, D)
        x = self._embed(x)  # (B, J, D)
        known = self._prepared(H * W // P**2) if prepared is None else prepared
        for block, ready in zip(self.blocks, known, strict=True):
            x = block(x, c, ready, self.activation_checkpointing)  # (B, J, D)
        x = self._decode(x, c)  # (B, J, M P P 2C)
        return to_image(x, P, M, W).contiguous()  # (B, 2C, H, W)

    def _embed(self, x: Tensor) -> Tensor:
        sizes, dtype, (H, W) = self.config, self.head.weight.dtype, x.shape[2:]
        P, M, D = sizes.patch_size, sizes.downsample, sizes.d_model
        x = to_stream(x, P, M)  # (B, J, M P P C)
        x = self.embed_x(x.to(dtype)).to(dtype)  # (B, J, D)
        if sizes.pos_embed == "sincos":
            places = sincos_positions(H // P, W // P, D, x.device)  # (L, D)
            x = x + places[::M].to(dtype)
        return x

    def _condition(self, t: Tensor, y: Tensor | None) -> Tensor:
        features = timestep_features(t).to(self.head.weight.dtype)  # (B, 256)
        c: Tensor = self.embed_t(features)  # (B, D)
        if self.embed_y is not None and y is not None:
            c = c + self.embed_y(y)
        return c

    def _decode(self, x: Tensor, c: Tensor) -> Tensor:
        with without_autocast(x.device):
            modulation = self.final_modulation(F.silu(c.to(x.dtype)))  # (B, 2D)
            shift, scale = modulation.unsqueeze(1).chunk(2, dim=2)  # (B, 1, D) each
            x = self.final_norm(x) * (1 + scale) + shift  # (B, J, D)
            numbers: Tensor = self.head(x)  # (B, J, M P P 2C)
        return numbers

    def _initialize(self) -> None:
        nn.init.xavier_uniform_(self.embed_x.weight)
        nn.init.xavier_uniform_(self.final_modulation.weight)
        nn.init.zeros_(self.head.weight)
        for linear in (self.embed_x, self.final_modulation, self.head):
            nn.init.zeros_(linear.bias)
        for parameter in self.embed_t.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.zeros_(parameter)
        if self.embed_y is not None:
            nn.init.normal_(self.embed_y.weight, std=0.02)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """A new model of a size in PRESETS, say `"DiffuSSM-XL"` with `input_size=64`.

        Raises:
            ValueError: no such preset, or an override that `DiffuSSMConfig` refuses.
        """
        sizes = PRESETS[expect_one_of("preset", name, PRESETS)]
        return cls(DiffuSSMConfig.from_dict({**sizes, **overrides}))

    def drop_labels(
        self, y: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Replace a label by "no class" with probability label_dropout: (B,) -> (B,).

        Raises:
            ValueError: the model is unconditional.

        Source: ch. "The model" (as DiT does; the paper does not mention it).
        """
        if self.null_label is None:
            raise ValueError("an unconditional model has no labels to drop")
        device = y.device if generator is None else generator.device
        chance = torch.rand(y.shape, generator=generator, device=device)
        dropped = chance < self.config.label_dropout
        return torch.where(dropped.to(y.device), self.null_label, y)

    def prepare(self, length: int) -> list[Tensor]:
        """For each block what its convolution needs of the weights, for a length L."""
        return prepare_layers(
            [cast(BidirectionalSSM, b.ssm) for b in self.blocks], length
        )

    def _prepared(self, length: int) -> Sequence[Tensor | None]:
        """What the convolution of each block prepares; None: it does so by itself."""
        layers: list[Any] = [block.ssm for block in self.blocks]
        parameters: list[Tensor] = [p for layer in layers for p in layer.parameters()]
        if not self._may_keep(parameters):
            return [None] * len(layers)
        how = (length, *(layer.convolution for layer in layers))
        if self._cache is None or not self._cache.holds(parameters, how):
            self._cache = None  # before the new one is made: both need not have room
            with multiplying_in("ieee"):  # whatever the samples are drawn in
                ready = self.prepare(length)
            made_from = [p.detach().clone() for p in parameters]
            self._cache = _Cache(how, made_from, ready)
        return self._cache.prepared

    @contextmanager
    def cached_kernels(self) -> Iterator[None]:
        """Within this context, forward passes without gradients share their kernels.

        For samplers. A change of the parameters, of any kind, is noticed. Costs the
        memory of what is prepared, until it is left: the FFT's spectra are 16 D (L + 1)
        bytes a block in float32.
        """
        self._samplers += 1
        try:
            yield
        finally:
            self._samplers -= 1
            if not self._samplers:
                self._cache = None

    def _may_keep(self, parameters: list[Tensor]) -> bool:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not parameters:
            return False
        plain = (type(p) is nn.Parameter and not p.is_meta for p in parameters)
        return self._samplers > 0 and all(plain)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: not the kernels that somebody keeps."""
        return {**self.__dict__, "_samplers": 0, "_cache": None}

    def _labels(self, y: Labels | None, x: Tensor) -> Tensor | None:
        """The labels of the images as a tensor (B,); None in an unconditional model."""
        last = self.null_label
        if y is None and last is None:
            return None
        if last is None:
            raise ValueError("y was given to an unconditional model: pass y=None")
        if y is None:
            raise ValueError(f"y is missing: expected 0 to {last}, {last} for no class")
        y = as_labels(y).to(y.device if isinstance(y, Tensor) else x.device)
        expect("y", y, "B", B=x.shape[0])
        expect_indices("y", y, last + 1)
        return y

    def _check(self, x: Tensor, t: Tensor, prepared: Sequence[Tensor] | None) -> None:
        P, M, n = self.config.patch_size, self.config.downsample, len(self.blocks)
        if prepared is not None and len(prepared) != n:
            raise ValueError(
                f"prepared has {len(prepared)} entries, expected {n}, one for each "
                "block: pass what prepare(L) returns"
            )
        B, _, H, W = expect("x", x, "B C H W", C=self.config.in_channels)
        expect_real(x=x)
        expect("t", t, "B", B=B)
        if H % P or W % P or H * W == 0 or (H // P) * (W // P) % M:
            raise ValueError(
                f"x is {H} x {W}: crop or pad it to fit patch_size={P}, downsample={M}"
            )

    def save_pretrained(self, folder: str | Path, variant: str | None = None) -> None:
        """Write `config.json` and `model.safetensors`, each complete or not at all.

        Raises:
            ValueError: the folder holds another model; nothing is written.
            OSError: the folder cannot be made or written.
        """
        folder = Path(folder)
        _refuse_another(folder, self.config)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG_FILE, asdict(self.config))
        write_tensors(folder / weights_file(variant), self.state_dict())

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        variant: str | None = None,
    ) -> Self:
        """The model that `save_pretrained` wrote, in float32 at least.

        Raises:
            FileNotFoundError: the folder or one of its two files is missing.
            ValueError: a file is damaged, or does not belong to a model of this kind.
        """
        folder = Path(folder)
        weights = folder / weights_file(variant)
        for path in (folder, folder / CONFIG_FILE, weights):
            expect_there(path, "what save_pretrained writes")
        with torch.device("meta"):
            model = cls(read_config(folder / CONFIG_FILE))
        model.load_state_dict(_read_weights(weights, model), assign=True)
        return model.to(device)


@dataclass(frozen=True)
class _Cache:
    """What was prepared for all blocks, and what it was made from."""

    how: tuple[Any, ...]  # the length, and the way of each block
    parameters: list[Tensor]
    prepared: list[Tensor]

    def holds(self, parameters: list[Tensor], how: tuple[Any, ...]) -> bool:
        """Whether it is still right: number by number, with one look."""
        if how != self.how or any(
            p.dtype != old.dtype or p.device != old.device or p.shape != old.shape
            for p, old in zip(parameters, self.parameters, strict=True)
        ):
            return False
        changes = torch._foreach_sub(parameters, self.parameters)
        norms = torch._foreach_norm(changes, float("inf"))
        return bool(torch.stack(norms).max() == 0)  # never for a NaN


def weights_file(variant: str | None = None) -> str:
    """The name of the file of weights, or of a variant of them, such as "fp16"."""
    return f"model.{variant}.safetensors" if variant else "model.safetensors"


def _refuse_another(folder: Path, config: DiffuSSMConfig) -> None:
    """ValueError if a folder holds a model that is not of this configuration."""
    path, ours = folder / CONFIG_FILE, asdict(config)
    if not path.exists() and (folder / weights_file()).exists():
        raise ValueError(f"{folder} holds another model: it has no {CONFIG_FILE}")
    theirs = asdict(read_config(path)) if path.exists() else ours
    expect_same(f"{folder} holds another model:", ours, theirs, "Take a new folder.")


def _shapes(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The shape of each tensor; of one that is not floating-point, its type."""
    return {
        name: tuple(x.shape) if x.is_floating_point() else x.dtype
        for name, x in tensors.items()
    }


def _read_weights(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a model needs, from a file; in float32 at least."""
    found = read_tensors(path, "the model")
    if unlike := differences(_shapes(model.state_dict()), _shapes(found)):
        raise ValueError(
            f"{len(unlike)} tensors of {path} do not fit {CONFIG_FILE}: "
            f"{'; '.join(unlike[:3])}"
        )
    return {n: w.float() if w.element_size() < 4 else w for n, w in found.items()}
