"""Memory and time.

Generated from book/44_resources.md by `make export`: edit there.
"""

import platform
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from diffussm.data import Dataset
from diffussm.distributed import world_size
from diffussm.hourglass import linear_macs
from diffussm.model import DiffuSSM, DiffuSSMConfig
from diffussm.options import Execution, Recipe, check_data, warn
from diffussm.parallel import check_gpu, check_way, chooser, micro_batch_of
from diffussm.recomputation import Recompute, kept_by, kept_by_kernels

__all__ = [
    "parameter_count",
    "saved_bytes",
    "RESERVE",
    "memory_needed",
    "utilisation",
    "peak_flops",
    "PEAK_FLOPS",
    "processor",
    "check_training",
]


@cache
def parameter_count(config: DiffuSSMConfig) -> int:
    """The number of parameters of a model; nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DiffuSSM(config).parameters())


@cache
def saved_bytes(
    config: DiffuSSMConfig, precision: str, recompute: Recompute = "none"
) -> tuple[float, float]:
    """What a block keeps for its backward pass: bytes in any case, bytes per image."""
    runs = (kept_by(config, precision, images, recompute) for images in (1, 2))
    one, two = (float(kept.total()) for kept in runs)
    return max(2 * one - two, 0.0), two - one


RESERVE = 2e9  # bytes


def memory_needed(
    recipe: Recipe, execution: Execution, processes: int = 1
) -> dict[str, float]:
    """Bytes that each process needs to train, by use, and their sum as "total".

    Raises:
        ValueError: the batch cannot be shared by that many processes.
    """
    model, how = recipe.model, execution.activation_checkpointing
    images = micro_batch_of(recipe, execution, processes)
    ways: tuple[Recompute, Recompute] = ("none", how)
    whole, kept = (saved_bytes(model, recipe.precision, way) for way in ways)
    block, left = (fixed + images * each for fixed, each in (whole, kept))
    shared = processes if execution.strategy == "fsdp" else 1
    parts = {
        "weights, gradients, average, moments": 20.0 * parameter_count(model) / shared,
        "kept for the backward pass": model.n_blocks * left,
        "kernels, prepared once": model.n_blocks * kept_by_kernels(model),
        "one block at work": block + (block if how != "none" else 0.0),
        "reserve (assumed)": RESERVE,
    }
    return parts | {"total": sum(parts.values())}


def utilisation(
    config: DiffuSSMConfig, images_per_second: float, device: torch.device
) -> dict[str, float]:
    """Figures of a GPU: peak of memory (GB) since the last call, and MFU."""
    if device.type != "cuda":
        return {}
    figures = {"memory_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 2)}
    torch.cuda.reset_peak_memory_stats(device)
    card = torch.cuda.get_device_name(device)
    if (peak := peak_flops(card)) is not None:
        used = 6 * linear_macs(config) * images_per_second
        figures["mfu"] = round(used / (peak * world_size()), 4)
    else:
        warn(f"the peak of {card!r} is not known, so no mfu is logged; see PEAK_FLOPS")
    return figures


def peak_flops(device_name: str) -> float | None:
    """The maker's figure for dense bf16 products, operations per second.

    `device_name` is what CUDA says, such as "NVIDIA A100-SXM4-80GB". None for a GPU
    that is not in the table, or a part of one (MIG).
    """
    words = [
        word
        for word in re.split(r"[\s-]+", device_name)
        if word and not _PLAIN.fullmatch(word)
    ]
    known = {name.casefold(): flops for name, flops in PEAK_FLOPS.items()}
    return known.get(" ".join(words).casefold())


# parts of a name that say nothing about speed: maker, form of the module, memory
_PLAIN = re.compile(r"NVIDIA|Tesla|GeForce|SXM\d*|HBM\d\w*|\d+GB?", re.IGNORECASE)

PEAK_FLOPS = {
    # nvidia.com/en-us/data-center/a100; the A800 is an A100 with a slower NVLink
    "A100": 312e12,
    "A100 PCIe": 312e12,
    "A800": 312e12,
    "A800 PCIe": 312e12,
    # nvidia.com/en-us/data-center/h100, h200 and grace-hopper-superchip, halved: the
    # sheets count zeros of sparse matrices. H100 PCIe: product brief PB-11133. The H800
    # is an H100 with a slower NVLink.
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H800": 989e12,
    "H800 PCIe": 756e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "GH200": 989e12,
    # no public sheet; what resellers and frameworks (verl, Megatron-Bridge) give
    "H20": 148e12,
    # nvidia.com/en-us/data-center/hgx and gb200-nvl72, halved
    "B200": 2250e12,
    "GB200": 2500e12,
    "L40S": 362e12,  # nvidia.com/en-us/data-center/l40s
    # "NVIDIA Ada GPU Architecture", appendix A, with sums in float32
    "RTX 4090": 165e12,
}


@cache
def processor() -> str:
    """What this machine's processor calls itself."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def check_training(
    recipe: Recipe,
    execution: Execution,
    data: Dataset,
    device: torch.device,
    network: Callable[[DiffuSSMConfig], DiffuSSM] = DiffuSSM,
) -> None:
    """ValueError if all processes together cannot train so; allocates nothing."""
    micro_batch_of(recipe, execution, world_size())
    if chooser(execution.convolution) is None:
        check_gpu(execution.convolution, device)
    check_way(network, recipe, execution)
    check_data(data, recipe)
