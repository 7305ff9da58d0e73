"""Efficiency.

Generated from book/71_efficiency.md by `make export`: edit there.
"""

import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffussm.embeddings import sincos_positions, timestep_features, to_image, to_stream
from diffussm.hourglass import linear_macs
from diffussm.model_config import DiffuSSMConfig

__all__ = [
    "convolution_macs",
    "diffussm_macs",
    "dit_macs",
    "DiTBlock",
    "Attention",
    "explicit_attention",
    "DiT",
]


def convolution_macs(length: int, d_model: int) -> float:
    """Multiply-adds of both directions of the convolution of an image, kernels given.

    By the usual count of a real FFT, 5/4 n log2 n multiply-adds for n numbers.

    Source: ch. "Efficiency", eq-efficiency-convolution.
    """
    n = 2 * length
    return d_model * (3 * 1.25 * n * math.log2(n) + 8 * (length + 1))


def diffussm_macs(
    config: DiffuSSMConfig, length: int | None = None
) -> dict[str, float]:
    """Multiply-adds of a DiffuSSM's forward pass, by what they are spent on.

    Args:
        config: The model.
        length: L, positions of the sequence; default the configuration's.

    Returns:
        "linear maps" (of all blocks), "convolution", "conditioning" and "ends" (first
        and last map) of one image; and "kernels", computed once for a whole batch.

    Source: ch. "Efficiency", eq-efficiency-block; section 3.2 of the paper.
    """
    L, D, N = length or config.seq_len, config.d_model, config.d_state
    return {
        "linear maps": linear_macs(config, L),
        "convolution": config.n_blocks * convolution_macs(L, D),
        "conditioning": (config.n_blocks + 1) * 2 * D**2 + 256 * D + D**2,
        "ends": 3 * L * config.in_channels * config.patch_size**2 * D,
        "kernels": config.n_blocks * 2 * L * N * D,
    }


def dit_macs(config: DiffuSSMConfig, length: int | None = None) -> dict[str, float]:
    """As `diffussm_macs`, for a `DiT`: "attention", but no "convolution" or "kernels".

    Source: ch. "Efficiency", eq-efficiency-dit.
    """
    L, D = length or config.seq_len, config.d_model
    return {
        "linear maps": config.n_blocks * 12 * L * D**2,
        "attention": config.n_blocks * 2 * L**2 * D,
        "conditioning": config.n_blocks * 6 * D**2 + 2 * D**2 + 256 * D + D**2,
        "ends": 3 * L * config.in_channels * config.patch_size**2 * D,
    }


class DiTBlock(nn.Module):
    """A transformer block with adaptive layer norm: attention, then an MLP.

    Args:
        d_model: D, width.
        n_heads: Heads of the attention, a divisor of D.

    Attributes:
        attention: What turns queries, keys and values, (B, heads, L, D / heads) each,
            into the mixture; at first PyTorch's fused kernel.

    Source: ch. "Efficiency"; DiT (Peebles and Xie, 2023), section 3.2, "adaLN-Zero".
    """

    def __init__(self, d_model: int, n_heads: int = 16) -> None:
        super().__init__()
        D = d_model
        if n_heads < 1 or D % n_heads:
            raise ValueError(f"n_heads={n_heads}: expected a divisor of d_model={D}")
        self.n_heads = n_heads
        self.attention: Attention = F.scaled_dot_product_attention
        self.norm1 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp_in, self.mlp_out = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.modulation = nn.Linear(D, 6 * D)
        self._reset()

    def _reset(self) -> None:
        for linear in (self.qkv, self.proj, self.mlp_in, self.mlp_out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """One step of the stream: x (B, L, D), condition c (B, D) -> (B, L, D)."""
        modulation = self.modulation(F.silu(c)).unsqueeze(1)  # (B, 1, 6D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=2)
        h = self.norm1(x) * (1 + scale1) + shift1  # (B, L, D)
        heads = "b l (three h d) -> three b h l d"
        q, k, v = rearrange(self.qkv(h), heads, three=3, h=self.n_heads)
        h = rearrange(self.attention(q, k, v), "b h l d -> b l (h d)")
        x = x + gate1 * self.proj(h)  # (B, L, D)
        h = self.norm2(x) * (1 + scale2) + shift2
        h = F.gelu(self.mlp_in(h), approximate="tanh")  # (B, L, 4D)
        y: Tensor = x + gate2 * self.mlp_out(h)
        return y


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (B, heads, L, d)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as defined, with the L x L matrix: (B, heads, L, d) thrice -> same."""
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])  # (B, heads, L, L)
    return scores.softmax(3) @ v


class DiT(nn.Module):
    """A plain diffusion transformer to measure against, with the ends of a DiffuSSM.

    For timing only. Its embeddings and its last modulation start as PyTorch's defaults,
    where DiT has small normal numbers and zero: no baseline of quality.

    Args:
        config: As for a DiffuSSM; `downsample` and `d_state` mean nothing here. DiT-XL
            is d_model=1152, n_blocks=28, and "/2" is patch_size=2.
        n_heads: Heads of each block.

    Source: ch. "Efficiency".
    """

    def __init__(self, config: DiffuSSMConfig, n_heads: int = 16) -> None:
        super().__init__()
        self.config, self.activation_checkpointing = config, False
        D, classes = config.d_model, config.num_classes
        numbers = config.in_channels * config.patch_size**2
        self.null_label = classes if classes else None
        self.embed_x = nn.Linear(numbers, D)
        self.embed_t = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.embed_y = nn.Embedding(classes + 1, D) if classes else None
        blocks = (DiTBlock(D, n_heads) for _ in range(config.n_blocks))
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.final_modulation = nn.Linear(D, 2 * D)
        self.head = nn.Linear(D, 2 * numbers)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """As `DiffuSSM.forward`: (B, C, H, W) -> (B, 2C, H, W)."""
        P, D, (H, W) = self.config.patch_size, self.config.d_model, x.shape[2:]
        x = self.embed_x(to_stream(x, P, 1)).to(self.head.weight.dtype)  # (B, L, D)
        x = x + sincos_positions(H // P, W // P, D, x.device)
        c = self.embed_t(timestep_features(t).to(x.dtype))  # (B, D)
        if self.embed_y is not None and y is not None:
            c = c + self.embed_y(y)
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, c, use_reentrant=False)
            else:
                x = block(x, c)
        shift, scale = self.final_modulation(F.silu(c)).unsqueeze(1).chunk(2, dim=2)
        x = self.head(self.final_norm(x) * (1 + scale) + shift)  # (B, L, 2 P P C)
        return to_image(x, P, 1, W)
