"""Variants.

Generated from book/76_variants.md by `make export`: edit there.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffussm.bidirectional import BidirectionalSSM
from diffussm.convolution import INITIALISATIONS, S4DKernel
from diffussm.efficiency import DiT, diffussm_macs, dit_macs
from diffussm.embeddings import Labels
from diffussm.guards import expect_one_of, refuse
from diffussm.model import DiffuSSM, DiffuSSMConfig
from diffussm.recomputation import RecomputingBlock

__all__ = [
    "Taps",
    "OneWay",
    "places",
    "network",
    "image_macs",
    "count_parameters",
    "matched",
]


class Taps(nn.Module):
    """A kernel of `width` free numbers, zero beyond: called with L it is (D, L)."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        taps = torch.randn(d_model, width) / math.sqrt(max(width, 1))
        if width:
            self.taps = nn.Parameter(taps)
        else:  # nothing to learn: only on which device to make zeros
            self.register_buffer("taps", taps, persistent=False)

    def forward(self, length: int) -> Tensor:
        """The first `length` values."""
        taps = self.taps[:, :length]
        return F.pad(taps, (0, length - taps.shape[1]))


def _with_kernels(config: DiffuSSMConfig, kernel: Callable[[], nn.Module]) -> DiffuSSM:
    """A model whose layers have other kernels, in both directions."""
    model = DiffuSSM(config)
    for block in model.blocks:
        layer: Any = block.ssm
        layer.forward_kernel, layer.backward_kernel = kernel(), kernel()
    return model


def _started(config: DiffuSSMConfig, start: str) -> nn.Module:
    """A state space kernel with the eigenvalues that a start names."""
    known = [*INITIALISATIONS, "real"]
    expect_one_of("start", start, known)
    init = "lin" if start == "real" else start
    kernel = S4DKernel(config.d_model, config.d_state, init=init)
    if start == "real":
        with torch.no_grad():
            decay = config.d_state / 2 * torch.rand_like(kernel.log_A_real)
            kernel.log_A_real.copy_(decay.clamp(min=1e-2).log())
            kernel.A_imag.zero_()
    return kernel


class OneWay(BidirectionalSSM):
    """Both kernels read in the same direction: from the start, or from the end."""

    from_end = False

    def prepare(self, length: int) -> Tensor:
        """As of the layer with two directions, but for a conjugate of spectra."""
        forward, backward = super().prepare(length)
        told = "one direction needs a convolution by spectra: convolution=fft"
        refuse(not forward.is_complex(), told)
        if self.from_end:
            return torch.stack([forward.conj(), backward])
        return torch.stack([forward, backward.conj()])


class _Same(nn.Module):
    """The kernel of the other direction."""

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.other = (kernel,)

    def forward(self, length: int) -> Tensor:
        kernel: Tensor = self.other[0](length)
        return kernel

    def discrete(self) -> tuple[Tensor, Tensor]:
        """As of the other direction."""
        system: tuple[Tensor, Tensor] = cast(Any, self.other[0]).discrete()
        return system


def _directed(config: DiffuSSMConfig, direction: str) -> DiffuSSM:
    """A model that reads forward only, alternating, or with one shared kernel."""
    expect_one_of("direction", direction, ["forward", "alternating", "shared"])
    model = DiffuSSM(config)
    for number, block in enumerate(model.blocks):
        layer: Any = block
        if direction == "shared":
            layer.ssm.backward_kernel = _Same(layer.ssm.forward_kernel)
        else:
            layer.ssm = OneWay(config.d_model, config.d_state)
            layer.ssm.from_end = direction == "alternating" and number % 2 == 1
    return model


class _SumBlock(RecomputingBlock):
    """An hourglass block that adds where the paper's multiplies."""

    def _gated(self, path: Tensor, gate: Tensor) -> Tensor:
        return (path + gate) / 2  # (B, J, 2D)


def places(order: str, height: int, width: int) -> Tensor:
    """The pixels in the order in which they are visited, row-major numbers (H W,)."""
    rows = torch.arange(height * width).view(height, width)
    if order == "snake":
        rows[1::2] = rows[1::2].flip(1)
    if order == "hilbert":
        side = height.bit_length() - 1
        unfit = height != width or height != 2**side
        refuse(unfit, "Hilbert's curve needs a square, its side a power of 2")
        return _hilbert(side)
    expect_one_of("order", order, ["row", "snake", "hilbert"])
    return rows.flatten()


def _hilbert(level: int) -> Tensor:
    """Row-major numbers of a square of side 2^level along Hilbert's curve."""
    rows, columns = torch.zeros(1).long(), torch.zeros(1).long()
    for half in (2**k for k in range(level)):
        rows, columns = (
            torch.cat([columns, rows, rows + half, 2 * half - 1 - columns]),
            torch.cat([rows, columns + half, columns + half, half - 1 - rows]),
        )
    return rows * (1 << level) + columns


_Kept = Sequence[Tensor] | None  # what the layers prepared


class _Ordered(DiffuSSM):
    """A model that visits the pixels in another order."""

    order = "row"

    def forward(
        self, x: Tensor, t: Tensor, y: Labels | None = None, prepared: _Kept = None
    ) -> Tensor:
        """As `DiffuSSM.forward`."""
        way = places(self.order, *x.shape[2:]).to(x.device)  # (L,)
        walked = x.flatten(2)[..., way].view_as(x)
        out = super().forward(walked, t, y, prepared)  # (B, 2C, H, W)
        back: Tensor = out.flatten(2)[..., way.argsort()]
        return back.view_as(out)


def _ordered(config: DiffuSSMConfig, order: str) -> DiffuSSM:
    plain = config.patch_size == 1 and config.pos_embed == "none"
    refuse(not plain, "an order needs patch_size=1 and pos_embed='none'")
    places(order, config.height, config.width)
    model = _Ordered(config)
    model.order = order
    return model


class _FixedVariance(DiffuSSM):
    """A model whose variance is not learned; its hybrid loss is the simple one."""

    def forward(
        self, x: Tensor, t: Tensor, y: Labels | None = None, prepared: _Kept = None
    ) -> Tensor:
        """As `DiffuSSM.forward`, with v = 1."""
        eps, v = super().forward(x, t, y, prepared).chunk(2, dim=1)
        return torch.cat([eps, torch.ones_like(v)], dim=1)


class _Transformer(DiT):
    """A diffusion transformer that starts as DiT does, to be trained."""

    def __init__(self, config: DiffuSSMConfig, hidden: int, n_heads: int = 4) -> None:
        super().__init__(config, n_heads)
        D = config.d_model
        for block in cast(Any, self.blocks):
            block.mlp_in, block.mlp_out = nn.Linear(D, hidden), nn.Linear(hidden, D)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (self.embed_t[0], self.embed_t[2], self.embed_y):
            if linear is not None:
                nn.init.normal_(cast(Any, linear).weight, std=0.02)
        modulations = [block.modulation for block in cast(Any, self.blocks)]
        for linear in (*modulations, self.final_modulation, self.head):
            nn.init.zeros_(linear.weight)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, prepared: _Kept = None
    ) -> Tensor:
        """As `DiT.forward`."""
        return super().forward(x, t, y)

    def prepare(self, length: int) -> list[Tensor]:
        """Nothing depends on the weights alone."""
        return []

    drop_labels = DiffuSSM.drop_labels  # the trainer asks for both


@dataclass(frozen=True)
class _VariantConfig(DiffuSSMConfig):
    """The sizes of a variant and its name; a `DiffuSSM` does not take them."""

    variant: str = ""


def network(variant: str, config: DiffuSSMConfig) -> DiffuSSM:
    """A new network, by the name of a variant.

    Raises:
        ValueError: there is no such variant, or not of this configuration.
    """
    kind, _, value = variant.partition(":")
    refuse(variant and not kind, f"variant={variant!r}: expected a kind before the :")
    model = _KINDS[expect_one_of("variant", kind, _KINDS)](config, value)
    if kind not in ("", "start"):
        model.config = _VariantConfig(**asdict(config), variant=variant)
    return model


def _taps(config: DiffuSSMConfig, width: str) -> DiffuSSM:
    count, L = _number("taps", width, 0), config.seq_len
    refuse(count > L, f"variant=taps:{count}: expected {L} at most, as many as lags")
    return _with_kernels(config, lambda: Taps(config.d_model, count))


def _number(kind: str, value: str, least: int) -> int:
    good = value.isdecimal() and int(value) >= least
    refuse(not good, f"variant={kind}:{value}: expected a number, as in {kind}:9")
    return int(value)


def _sum(config: DiffuSSMConfig, gate: str) -> DiffuSSM:
    expect_one_of("gate", gate, ["sum"])
    model = DiffuSSM(config)
    sizes = config.d_model, config.d_state, config.downsample
    model.blocks = nn.ModuleList(_SumBlock(*sizes) for _ in model.blocks)
    return model


def _fixed(config: DiffuSSMConfig, variance: str) -> DiffuSSM:
    expect_one_of("variance", variance, ["fixed"])
    return _FixedVariance(config)


def _attention(config: DiffuSSMConfig, hidden: str) -> DiffuSSM:
    width = _number("attention", hidden, 1)
    told = f"d_model={config.d_model}: expected a multiple of 4, for the 4 heads"
    refuse(config.d_model % 4, told)
    return cast(DiffuSSM, _Transformer(config, width))


_KINDS: dict[str, Callable[[DiffuSSMConfig, str], DiffuSSM]] = {
    "": lambda config, _: DiffuSSM(config),
    "taps": _taps,
    "start": lambda config, start: _with_kernels(
        config, lambda: _started(config, start)
    ),
    "direction": _directed,
    "gate": _sum,
    "order": _ordered,
    "variance": _fixed,
    "attention": _attention,
}


def image_macs(variant: str, config: DiffuSSMConfig) -> float:
    """Multiply-adds of a forward pass of one image, without those of a whole batch."""
    kind, _, value = variant.partition(":")
    L, D, blocks = config.seq_len, config.d_model, config.n_blocks
    if kind == "attention":
        macs = dit_macs(config)
        macs["linear maps"] = blocks * L * (4 * D**2 + 2 * D * int(value))
    else:
        macs = diffussm_macs(config)
        del macs["kernels"]  # once for a batch
        if kind == "taps":
            macs["convolution"] = blocks * 2 * int(value) * L * D
    return sum(macs.values())


@cache
def count_parameters(variant: str, config: DiffuSSMConfig) -> int:
    """The parameters of a variant; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in network(variant, config).parameters())


def matched(
    variant: str, config: DiffuSSMConfig, parameters: int
) -> tuple[str, DiffuSSMConfig]:
    """The variant with the width that has so many parameters, to one percent.

    Raises:
        ValueError: no width has.
    """
    if variant.startswith("attention:"):
        one, two = (count_parameters(f"attention:{h}", config) for h in (1, 2))
        more = round((parameters - one) / (two - one))
        variant = f"attention:{1 + max(more, 0)}"
    else:
        config = _nearest(variant, config, parameters)
    found = count_parameters(variant, config)
    told = f"{variant or 'the model'}: the nearest width has {found:,} parameters, not "
    refuse(abs(found / parameters - 1) > 0.01, f"{told}{parameters:,} to one percent")
    return variant, config


def _nearest(variant: str, config: DiffuSSMConfig, parameters: int) -> DiffuSSMConfig:
    """The configuration with the width whose count is nearest."""
    step = math.lcm(2, config.downsample) // 2  # of D, as M divides 2D
    step = math.lcm(4, step) if config.pos_embed == "sincos" else step

    def sized(number: int) -> DiffuSSMConfig:
        return replace(config, d_model=step * number)

    def off(number: int) -> int:
        return count_parameters(variant, sized(number)) - parameters

    place = bisect_left(range(1, 2 * config.d_model), 0, key=off)
    return sized(min((max(place, 1), place + 1), key=lambda number: abs(off(number))))
