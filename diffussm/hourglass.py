"""The hourglass block.

Generated from book/21_hourglass.md by `make export`: edit there.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from diffussm.bidirectional import BidirectionalSSM
from diffussm.guards import expect, expect_int, refuse

__all__ = ["PositionLinear", "HourglassBlock", "linear_macs"]


class PositionLinear(nn.Module):
    """M linear maps, map k for place k of every group: (B, J, M, in) -> (B, J, M, out).

    Args:
        n_positions: M, places in a group.
        in_features, out_features: Widths.

    Attributes:
        weight: (M, out, in), each map Xavier-uniform by itself.
        bias: (M, out), zero.

    Source: ch. "The hourglass block", eq-hourglass-down; section 3.2 of the paper.
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

    The stream has J = L / M positions. Inside, every position becomes M, the state
    space model runs over all L, and M outputs are folded into one again.

    Args:
        d_model: D, width of the stream.
        d_state: N, real state size of the state space model, even.
        downsample: M, a divisor of 2D. 1 switches the hourglass off.

    Raises:
        ValueError: a size is not positive, or M does not divide 2D.

    Source: ch. "The hourglass block"; section 3.2 of the paper.
    """

    def __init__(self, d_model: int, d_state: int = 64, downsample: int = 2) -> None:
        super().__init__()
        D = expect_int("d_model", d_model, least=1)
        self.downsample = M = expect_int("downsample", downsample, least=1)
        refuse(2 * D % M, f"downsample={M} does not divide 2 * d_model = {2 * D}")
        self.norm = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(D, 2 * D)  # scale and shift
        self.w0 = nn.Linear(D, D)
        self.w_up = nn.Linear(D, M * D)
        self.ssm = BidirectionalSSM(D, d_state)
        self.w_down = PositionLinear(M, 2 * D, 2 * D // M)
        self.w1 = nn.Linear(D, 2 * D)
        self.w2 = nn.Linear(2 * D, 2 * D)
        self.w3 = nn.Linear(2 * D, D)
        self._initialize()

    def forward(self, x: Tensor, c: Tensor, prepared: Tensor | None = None) -> Tensor:
        """One step of the residual stream.

        Args:
            x: The stream, (B, J, D), for any J.
            c: The condition, (B, D): embeddings of timestep and class, added.
            prepared: What `ssm.prepare(L)` returns, if it is known; None computes it.

        Returns:
            (B, J, D).

        Raises:
            ValueError: the shapes do not fit.
        """
        B, _, D = expect("x", x, "B J D", D=self.w0.in_features)
        expect("c", c, "B D", B=B, D=D)
        shift, scale = (
            self.modulation(F.silu(c)).unsqueeze(1).chunk(2, dim=2)
        )  # (B, 1, D)
        I = self.norm(x) * (1 + scale) + shift  # (B, J, D)
        U = F.gelu(self.w_up(F.gelu(self.w0(I))))  # (B, J, MD)
        U = rearrange(U, "b j (k d) -> b (j k) d", k=self.downsample)  # (B, L, D)
        Y = self.ssm(U, prepared)  # (B, L, 2D)
        Y = rearrange(Y, "b (j k) e -> b j k e", k=self.downsample)  # (B, J, M, 2D)
        I_prime = F.gelu(self.w_down(Y)).flatten(2)  # (B, J, 2D)
        O: Tensor = self.w3(self._gated(F.gelu(self.w2(I_prime)), F.gelu(self.w1(I))))
        return x + O  # (B, J, D)

    def _gated(self, path: Tensor, gate: Tensor) -> Tensor:
        return path * gate  # (B, J, 2D)

    def _initialize(self) -> None:
        for linear in (self.modulation, self.w0, self.w_up, self.w1, self.w2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.w3.weight)  # a new block adds nothing
        nn.init.zeros_(self.w3.bias)


def linear_macs(config: Any, length: int | None = None) -> float:
    """Multiply-adds of the dense maps of all blocks for one image.

    Args:
        config: Sizes of a model: `n_blocks`, `d_model`, `downsample`, `seq_len`.
        length: L, positions of the sequence; by default the configuration's.

    Source: ch. "The hourglass block", eq-hourglass-flops.
    """
    L, M, D = length or config.seq_len, config.downsample, config.d_model
    macs: float = config.n_blocks * (13 * L / M + L) * D**2
    return macs
