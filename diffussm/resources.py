"""Memory.

Generated from book/43_resources.md by `make export`: edit there.
"""

from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from diffussm.hourglass import HourglassBlock
from diffussm.model import DiffuSSM, DiffuSSMConfig
from diffussm.training import Execution, Recipe, micro_batch_of

__all__ = ["parameter_count", "saved_bytes", "RESERVE", "memory_needed"]


@cache
def parameter_count(config: DiffuSSMConfig) -> int:
    """The number of parameters of a model; nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DiffuSSM(config).parameters())


@cache
def saved_bytes(model: DiffuSSMConfig, precision: str) -> tuple[float, float]:
    """What a block keeps for its backward pass: bytes in any case, bytes per image."""
    one, two = (_kept(model, precision, images) for images in (1, 2))
    return float(max(2 * one - two, 0)), float(two - one)


def _kept(model: DiffuSSMConfig, precision: str, images: int) -> int:
    places, storages = model.seq_len // model.downsample, {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with FakeTensorMode():
        block = HourglassBlock(model.d_model, model.d_state, model.downsample)
        own = {p.untyped_storage()._cdata for p in block.parameters()}
        x = torch.zeros(images, places, model.d_model, requires_grad=True)
        c = torch.zeros(images, model.d_model)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), autocast:
            block(x, c)
    return sum(s.nbytes() for key, s in storages.items() if key not in own)


RESERVE = 2e9  # bytes; assumed: what CUDA, NCCL and the allocator's gaps take


def memory_needed(
    recipe: Recipe, execution: Execution, processes: int = 1
) -> dict[str, float]:
    """Bytes that each process needs to train, by use, and "total"; computed.

    Raises ValueError if the batch cannot be shared by that many processes.
    """
    model, again = recipe.model, execution.activation_checkpointing
    images = micro_batch_of(recipe, execution, processes)
    fixed, each = saved_bytes(model, recipe.precision)
    block = fixed + images * each
    stream = 4.0 * images * model.seq_len // model.downsample * model.d_model
    states = 5 * 4.0 * parameter_count(model)
    parts = {
        "weights, gradients, average, moments": states,
        "kept for the backward pass": model.n_blocks * (stream if again else block),
        "one block at work": block + (block if again else 0.0),
        "reserve (assumed)": RESERVE,
    }
    if execution.strategy == "fsdp":
        parts["weights, gradients, average, moments"] /= processes
    return parts | {"total": sum(parts.values())}
