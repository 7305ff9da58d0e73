"""The hourglass block.

Generated from book/21_hourglass.md by `make export`: edit there.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from diffussm.bidirectional import BidirectionalSSM

__all__ = ["PositionLinear", "HourglassBlock", "linear_macs"]


class PositionLinear(nn.Module):
    """M linear maps, map k for place k of every group: (B, J, M, in) -> (B, J, M, out).

    Args:
        n_positions: M, places in a group.
        in_features, out_features: Widths.

    Attributes:
        weight: (M, out, in), each map Xavier-uniform by itself.
        bias: (M, out), zero.

    Source: chapter 4, equation eq-hourglass-down (the W-down with subscript k of section 3.2).
    """

    def __init__(self, n_positions: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_positions, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(n_positions, out_features))
        for weight in self.weight:
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply map k to place k: (B, J, M, in) -> (B, J, M, out)."""
        y = torch.einsum("bjki,koi->bjko", x, self.weight)
        return y + self.bias.to(y.dtype)


class HourglassBlock(nn.Module):
    """The paper's block: gated, bidirectional, long only where it is cheap.

    The stream has J = L / M positions. Inside, every position becomes M, the state space model runs over all
    L, and M outputs are folded into one again. A new block is the identity.

    Args:
        d_model: D, width of the stream.
        d_state: N, real state size of the state space model, even.
        downsample: M, a divisor of 2D. 1 switches the hourglass off.

    Attributes:
        w0, w1, w2, w3, w_up, w_down: The paper's maps (chapter 4 has the table of their shapes).
        modulation: Scale and shift from the condition.
        ssm: The state space model, at full length.

    Raises:
        ValueError: a size is not a positive integer, or M does not divide 2D.

    Source: chapter 4, equations eq-hourglass-norm to eq-hourglass-out; section 3.2 of the paper.
    """

    def __init__(self, d_model: int, d_state: int = 64, downsample: int = 2) -> None:
        super().__init__()
        D, M = d_model, downsample
        for name, size in (("d_model", D), ("downsample", M)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}={size!r}: expected a positive integer")
        if 2 * D % M:
            raise ValueError(
                f"downsample={M} does not divide 2 * d_model = {2 * D}: each of the M pieces has width 2D/M"
            )
        self.downsample = M
        self.norm = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(D, 2 * D)
        self.w0 = nn.Linear(D, D)
        self.w_up = nn.Linear(D, M * D)
        self.ssm = BidirectionalSSM(D, d_state)
        self.w_down = PositionLinear(M, 2 * D, 2 * D // M)
        self.w1 = nn.Linear(D, 2 * D)
        self.w2 = nn.Linear(2 * D, 2 * D)
        self.w3 = nn.Linear(2 * D, D)
        for linear in (self.modulation, self.w0, self.w_up, self.w1, self.w2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.w3.weight)  # a new block adds nothing
        nn.init.zeros_(self.w3.bias)

    def forward(self, x: Tensor, c: Tensor, spectra: Tensor | None = None) -> Tensor:
        """One step of the residual stream.

        Args:
            x: The stream, (B, J, D), for any J.
            c: The condition, (B, D): embeddings of timestep and class, added.
            spectra: What ``ssm.spectra(L)`` returns, if it is known (chapter 3); None computes it.

        Returns:
            (B, J, D).

        Raises:
            ValueError: the shapes do not fit.
        """
        D, M = self.w0.in_features, self.downsample
        if x.ndim != 3 or x.shape[2] != D or c.shape != (x.shape[0], D):
            raise ValueError(
                f"x has shape {tuple(x.shape)} and c {tuple(c.shape)}: expected (B, J, {D}) and (B, {D})"
            )
        shift, scale = (
            self.modulation(F.silu(c)).unsqueeze(1).chunk(2, dim=2)
        )  # (B, 1, D) each
        I = self.norm(x) * (1 + scale) + shift  # (B, J, D)
        U = F.gelu(self.w_up(F.gelu(self.w0(I))))  # (B, J, MD)
        U = rearrange(U, "b j (k d) -> b (j k) d", k=M)  # (B, L, D)
        Y = self.ssm(U, spectra)  # (B, L, 2D)
        Y = rearrange(Y, "b (j k) e -> b j k e", k=M)  # (B, J, M, 2D)
        I_prime = F.gelu(self.w_down(Y)).flatten(2)  # (B, J, 2D)
        O = self.w3(F.gelu(self.w2(I_prime)) * F.gelu(self.w1(I)))  # (B, J, D)
        return x + O


def linear_macs(config: Any, length: int | None = None) -> float:
    """Multiply-adds of the dense maps of all blocks for one image.

    Args:
        config: Sizes of a model: `n_blocks`, `d_model`, `downsample`, `seq_len`.
        length: L, positions of the sequence; by default the configuration's.

    Source: chapter 4, equation eq-hourglass-flops.
    """
    L, M, D = length or config.seq_len, config.downsample, config.d_model
    return config.n_blocks * (13 * L / M + L) * D**2
