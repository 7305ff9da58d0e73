"""The sizes of a model.

Generated from book/23_model_config.md by `make export`: edit there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from diffussm.files import read_json
from diffussm.guards import bounded, check_fields, explain, from_dict, refuse

__all__ = ["DiffuSSMConfig", "PRESETS", "CONFIG_FILE", "read_config"]


@dataclass(frozen=True)
class DiffuSSMConfig:
    """Everything that decides the shape of a `DiffuSSM`; checked when made.

    Args:
        input_size: Side of the square input, or (H, W), in pixels of the latent.
        in_channels: C, channels of the input.
        num_classes: Classes; 0 makes an unconditional model.
        d_model: D, width of the residual stream.
        n_blocks: Hourglass blocks.
        d_state: N, real state size of each channel, even.
        downsample: M, neighbours that share a place in the stream; divides L and 2D.
        patch_size: P, side of the patches that become one position; 1 is none.
        label_dropout: Probability with which a label is replaced by "no class".
        pos_embed: "none", or "sincos" to tell every place its row and column.

    Raises:
        ValueError: a value has the wrong type or range, or two do not fit together.

    Source: ch. "The sizes of a model"; sections 3.2 and 4.1 of the paper.
    """

    input_size: int | tuple[int, int] = bounded(32, least=1)
    in_channels: int = bounded(4, least=1)
    num_classes: int = bounded(1000, least=0)
    d_model: int = bounded(1152, least=1)
    n_blocks: int = bounded(29, least=1)
    d_state: int = bounded(64, least=2)
    downsample: int = bounded(2, least=1)
    patch_size: int = bounded(1, least=1)
    label_dropout: float = bounded(0.1, least=0, most=1)
    pos_embed: Literal["none", "sincos"] = "none"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The configuration that a dictionary describes; absent keys are defaults."""
        return from_dict(cls, values, "a model configuration")

    def __post_init__(self) -> None:
        if isinstance(self.input_size, list):  # as JSON and YAML write a pair
            object.__setattr__(self, "input_size", tuple(self.input_size))
        check_fields(self)
        (H, W), P, L = (self.height, self.width), self.patch_size, self.seq_len
        D, M, N = self.d_model, self.downsample, self.d_state
        sincos = self.pos_embed == "sincos"
        for wrong, why in (
            (min(H, W) < 1, f"input_size={self.input_size}: expected positive sides"),
            (N % 2, f"d_state={N} is odd: states come in pairs, take an even number"),
            (H % P or W % P, f"patch_size={P} does not divide input_size={H} x {W}"),
            (L % M, f"downsample={M} does not divide the {L} positions of {H} x {W}"),
            (2 * D % M, f"downsample={M} does not divide 2 * d_model = {2 * D}"),
            (D % 4 and sincos, f"d_model={D}: expected a multiple of 4 with 'sincos'"),
        ):
            refuse(wrong, why)

    @property
    def height(self) -> int:
        """H, the height of the input, in pixels of the latent."""
        return (
            self.input_size if isinstance(self.input_size, int) else self.input_size[0]
        )

    @property
    def width(self) -> int:
        """W, the width of the input, in pixels of the latent."""
        return (
            self.input_size if isinstance(self.input_size, int) else self.input_size[1]
        )

    @property
    def seq_len(self) -> int:
        """L = HW / P^2, positions of the sequence that the state space models read."""
        return (self.height // self.patch_size) * (self.width // self.patch_size)


_WIDTH_AND_DEPTH = {"S": (384, 12), "B": (768, 12), "L": (1024, 24), "XL": (1152, 29)}
_OF_LATENTS: dict[str, dict[str, Any]] = {
    f"DiffuSSM-{size}{suffix}": {"d_model": D, "n_blocks": n, "patch_size": P}
    for suffix, P in (("", 1), ("/2", 2))
    for size, (D, n) in _WIDTH_AND_DEPTH.items()
}

_DIGITS = {"input_size": 8, "in_channels": 1, "num_classes": 10}
_EMOJI = {"input_size": 32, "in_channels": 3, "num_classes": 14, "patch_size": 2}

PRESETS: dict[str, dict[str, Any]] = _OF_LATENTS | {
    "digits": _DIGITS | {"d_model": 96, "n_blocks": 3, "d_state": 16},
    "emoji": _EMOJI | {"d_model": 128, "n_blocks": 6, "d_state": 32},
}

CONFIG_FILE = "config.json"


def read_config(path: Path) -> DiffuSSMConfig:
    """The configuration in a file; ValueError if there is another thing in it."""
    with explain(f"{path} is not the configuration of a DiffuSSM", ValueError):
        values = read_json(path)
        if isinstance(values, dict) and "variant" in values:
            raise ValueError(f"it is of the variant {values['variant']!r}")
        return DiffuSSMConfig.from_dict(values)
