"""Efficiency.

Generated from book/71_efficiency.md by `make export`: edit there.
"""

import math
import os
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from diffussm.embeddings import sincos_positions, timestep_features
from diffussm.hourglass import linear_macs
from diffussm.model import DiffuSSMConfig

__all__ = [
    "convolution_macs",
    "diffussm_macs",
    "dit_macs",
    "DiTBlock",
    "DiT",
    "explicit_attention",
    "KINDS",
    "time_by_kind",
]


def convolution_macs(length: int, d_model: int) -> float:
    """Multiply-adds of both directions of the long convolution for one image, kernels given.

    By the usual count of a real FFT, 5/4 n log2 n multiply-adds for n numbers: per channel one forward and
    two inverse transforms of n = 2L points, and two complex products at each of L + 1 frequencies.

    Source: chapter 15, equation eq-efficiency-convolution.
    """
    n = 2 * length
    return d_model * (3 * 1.25 * n * math.log2(n) + 8 * (length + 1))


def diffussm_macs(
    config: DiffuSSMConfig, length: int | None = None
) -> dict[str, float]:
    """Multiply-adds of one forward pass of a :class:`~diffussm.model.DiffuSSM`, by what they are spent on.

    Args:
        config: The model.
        length: L, positions of the sequence; default the configuration's.

    Returns:
        "linear maps" (of all blocks), "convolution", "conditioning" and "ends" (first and last map) of one
        image; and "kernels", which are computed once for a whole batch.

    Source: chapter 15, equation eq-efficiency-block; section 3.2 of the paper.
    """
    L, D, N = length or config.seq_len, config.d_model, config.d_state
    numbers = config.in_channels * config.patch_size**2
    return {
        "linear maps": linear_macs(config, L),
        "convolution": config.n_blocks * convolution_macs(L, D),
        "conditioning": (config.n_blocks + 1) * 2 * D**2 + 256 * D + D**2,
        "ends": 3 * L * numbers * D,
        "kernels": config.n_blocks * 2 * L * N * D,
    }


def dit_macs(config: DiffuSSMConfig, length: int | None = None) -> dict[str, float]:
    """The same for a :class:`DiT` of this width, depth and patch size: "attention" in place of "convolution".

    Source: chapter 15, equation eq-efficiency-dit.
    """
    L, D = length or config.seq_len, config.d_model
    numbers = config.in_channels * config.patch_size**2
    return {
        "linear maps": config.n_blocks * 12 * L * D**2,
        "attention": config.n_blocks * 2 * L**2 * D,
        "conditioning": config.n_blocks * 6 * D**2 + 2 * D**2 + 256 * D + D**2,
        "ends": 3 * L * numbers * D,
    }


class DiTBlock(nn.Module):
    """A transformer block with adaptive layer norm: attention, then an MLP, each with scale, shift and gate.

    Args:
        d_model: D, width.
        n_heads: Heads of the attention, a divisor of D.

    Attributes:
        attention: What turns queries, keys and values, (B, heads, L, D / heads) each, into the mixture; at
            first PyTorch's fused kernel.

    Source: chapter 15; DiT (Peebles and Xie, 2023), section 3.2, "adaLN-Zero".
    """

    def __init__(self, d_model: int, n_heads: int = 16) -> None:
        super().__init__()
        D = d_model
        if n_heads < 1 or D % n_heads:
            raise ValueError(f"n_heads={n_heads}: expected a divisor of d_model={D}")
        self.n_heads = n_heads
        self.attention: Callable[[Tensor, Tensor, Tensor], Tensor] = (
            F.scaled_dot_product_attention
        )
        self.norm1, self.norm2 = (
            nn.LayerNorm(D, elementwise_affine=False, eps=1e-6) for _ in range(2)
        )
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp_in, self.mlp_out = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.modulation = nn.Linear(D, 6 * D)
        for linear in (self.qkv, self.proj, self.mlp_in, self.mlp_out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.modulation.weight)  # a new block is the identity
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """One step of the residual stream: x (B, L, D), condition c (B, D) -> (B, L, D)."""
        modulation = self.modulation(F.silu(c)).unsqueeze(1)  # (B, 1, 6D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=2)
        h = self.norm1(x) * (1 + scale1) + shift1  # (B, L, D)
        q, k, v = rearrange(
            self.qkv(h), "b l (three h d) -> three b h l d", three=3, h=self.n_heads
        )
        h = rearrange(self.attention(q, k, v), "b h l d -> b l (h d)")
        x = x + gate1 * self.proj(h)
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.mlp_out(F.gelu(self.mlp_in(h), approximate="tanh"))


class DiT(nn.Module):
    """A plain diffusion transformer to measure against: the interface and the ends of a DiffuSSM.

    For timing only. Its embeddings and its last modulation start as PyTorch's defaults, where DiT starts them
    at small normal numbers and at zero: do not train it as a baseline of quality.

    Args:
        config: Width, depth, patch size and input as for a DiffuSSM; ``downsample`` and ``d_state`` mean
            nothing here. DiT-XL is d_model=1152, n_blocks=28, and "/2" is patch_size=2.
        n_heads: Heads of each block.

    Source: chapter 15.
    """

    def __init__(self, config: DiffuSSMConfig, n_heads: int = 16) -> None:
        super().__init__()
        D, numbers = config.d_model, config.in_channels * config.patch_size**2
        self.config = config
        self.activation_checkpointing = False
        self.null_label = config.num_classes if config.num_classes else None
        self.embed_x = nn.Linear(numbers, D)
        self.embed_t = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.embed_y = (
            nn.Embedding(config.num_classes + 1, D) if config.num_classes else None
        )
        self.blocks = nn.ModuleList(
            DiTBlock(D, n_heads) for _ in range(config.n_blocks)
        )
        self.final_norm = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.final_modulation = nn.Linear(D, 2 * D)
        self.head = nn.Linear(D, 2 * numbers)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """As :meth:`diffussm.model.DiffuSSM.forward`: (B, C, H, W) -> (B, 2C, H, W)."""
        P = self.config.patch_size
        h, w = x.shape[2] // P, x.shape[3] // P
        x = self.embed_x(
            rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=P, q=P)
        )  # (B, L, D)
        x = x.to(self.embed_x.weight.dtype) + sincos_positions(
            h, w, self.config.d_model, x.device
        )
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
        return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=P, q=P)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as it is defined, with the L x L matrix in memory: (B, heads, L, d) thrice -> the same."""
    weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(
        3
    )  # (B, heads, L, L)
    return weights @ v


# Which words in the name of an operation, or of a kernel on a GPU, say what it is. The first match counts.
KINDS = {
    "attention": ("attention", "flash", "fmha"),
    "FFT": (
        "fft",
        "_forward_kernel",
        "_grad_u_kernel",
        "_grad_h_kernel",
    ),  # the latter: ch-gpu-kernels
    "matrix products": (
        "::mm",
        "addmm",
        "bmm",
        "gemm",
        "cutlass",
        "nvjet",
        "xmma",
        "wgmma",
    ),
}


def time_by_kind(job: Callable[[], object]) -> dict[str, float]:
    """Where the time of one call of ``job`` goes, as PyTorch's profiler sees it.

    Returns:
        Seconds of "matrix products", "attention", "FFT" and "other": those of the kernels on a GPU, or of a
        job that launches none the operations on the CPU, each without those it calls.

    Source: chapter 15.
    """
    seconds = _profiled(job, on_gpu=torch.cuda.is_available())
    return seconds if any(seconds.values()) else _profiled(job, on_gpu=False)


def _profiled(job: Callable[[], object], on_gpu: bool) -> dict[str, float]:
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # or the profiler writes about itself to stderr
    with profile(
        activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    ) as recorded:
        job()
        if on_gpu:
            torch.cuda.synchronize()
    seconds = dict.fromkeys(("matrix products", "attention", "FFT", "other"), 0.0)
    for event in recorded.key_averages():
        name = event.key.lower()
        kind = next(
            (
                kind
                for kind, words in KINDS.items()
                if any(word in name for word in words)
            ),
            "other",
        )
        seconds[kind] += (
            event.self_device_time_total if on_gpu else event.self_cpu_time_total
        ) / 1e6
    return seconds
