"""One batch, many GPUs.

Generated from book/43_parallel.md by `make export`: edit there.
"""

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from shutil import which
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from diffussm.batches import Batch
from diffussm.bidirectional import BidirectionalSSM, Convolution, way
from diffussm.chunked import Prepare
from diffussm.diffusion import GaussianDiffusion
from diffussm.distributed import on_rank_zero, rank, world_size
from diffussm.guards import explain, refuse
from diffussm.meter import Meter
from diffussm.model import DiffuSSM, DiffuSSMConfig
from diffussm.options import Execution, Recipe, warn
from diffussm.training import TrainState, backward
from diffussm.two_level import multiplying_in

__all__ = [
    "wrap",
    "micro_batch_of",
    "accumulate_gradients",
    "create_state",
    "speed_up",
    "carry_out",
    "check_way",
    "compiler_lacking",
    "convolution_for",
    "chooser",
    "check_gpu",
]


def _shard(model: DiffuSSM) -> None:
    """Share out the parameters among the processes, in place, block by block."""
    from torch.distributed.fsdp import fully_shard  # here, for it costs seconds

    mesh = init_device_mesh(_device_of(model).type, (world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def wrap(model: DiffuSSM, execution: Execution) -> nn.Module:
    """What to call in training: the same parameters, gradients averaged over all."""
    if world_size() == 1 or execution.strategy == "fsdp":
        return model
    averaged = _WholeBlocks if execution.compile else DistributedDataParallel
    return averaged(model, gradient_as_bucket_view=True)


def _gradient_sync(network: nn.Module, now: bool) -> AbstractContextManager[object]:
    """A context for a backward pass; gradients are averaged over all only `now`."""
    if isinstance(network, DistributedDataParallel):
        return nullcontext() if now else network.no_sync()
    if hasattr(network, "set_requires_gradient_sync"):  # FSDP2
        network.set_requires_gradient_sync(now)  # type: ignore[operator]
    return nullcontext()


def micro_batch_of(recipe: Recipe, execution: Execution, processes: int = 1) -> int:
    """How many images each process takes through the network at once.

    Raises:
        ValueError: the batch does not split into such parts.
    """
    B, n = recipe.batch_size, processes
    if B % n or n > B:
        raise ValueError(
            f"batch_size={B} cannot be shared by {n} processes: take a multiple of {n}"
        )
    micro = execution.micro_batch or B // n
    if B // n % micro:
        raise ValueError(
            f"micro_batch={micro} does not divide {B // n} images a process"
        )
    return micro


def accumulate_gradients(
    network: nn.Module,
    diffusion: GaussianDiffusion,
    batch: Batch,
    recipe: Recipe,
    execution: Execution,
    device: torch.device,
) -> Tensor:
    """The gradients of a process's share, one micro-batch after another; its tally."""
    micro = micro_batch_of(recipe, execution, world_size())
    tally = torch.zeros(2, len(Meter.names), dtype=torch.float64, device=device)
    with multiplying_in("ieee"):
        prepared = _prepare(network)
        leaves = [s.detach().requires_grad_() for s in prepared]
        handed = partial(network, prepared=leaves)
        for first in range(0, len(batch.t), micro):
            part = batch.part(slice(first, first + micro), device)
            with _gradient_sync(network, now=first + micro >= len(batch.t)):
                tally += backward(handed, diffusion, part, recipe, world_size())
        torch.autograd.backward(prepared, [leaf.grad for leaf in leaves])
    return tally


def _prepare(network: nn.Module) -> list[Tensor]:
    """What the convolutions of all blocks need of the weights, as part of a graph."""
    model = cast(DiffuSSM, getattr(network, "module", network))
    parts = (item for item in model.named_parameters() if ".ssm." in item[0])
    whole = {f"model.{name}": _gathered(parameter) for name, parameter in parts}
    length = model.config.seq_len
    return cast(list[Tensor], functional_call(Prepare(model), whole, (length,)))


def _gathered(parameter: Tensor) -> Tensor:
    """The whole of a parameter; its gradients are averaged over all processes."""
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial  # here, for it costs seconds

    mean: Any = [Partial("avg")]
    return cast(Tensor, parameter.full_tensor(grad_placements=mean))


def create_state(
    recipe: Recipe,
    execution: Execution,
    device: torch.device,
    network: Callable[[DiffuSSMConfig], DiffuSSM] = DiffuSSM,
) -> TrainState:
    """A fresh state, on a device, carried out as `execution` says."""
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    batch = micro_batch_of(recipe, execution, world_size())
    asked = execution.convolution
    convolution = convolution_for(asked, recipe.model, batch, device, dtype)

    def prepare(model: DiffuSSM) -> None:
        model.activation_checkpointing = execution.activation_checkpointing
        carry_out(model, execution, convolution, device)
        if world_size() > 1 and execution.strategy == "fsdp":
            _shard(model)

    return TrainState.create(recipe, device, prepare, network)


def speed_up(
    model: DiffuSSM, convolution: Convolution, compiled: bool, device: torch.device
) -> None:
    """Run the blocks with a convolution, and let torch.compile make each faster.

    Raises:
        ValueError: a layer, of ch. "Variants", cannot be run so.
    """
    for layer in model.modules():
        if isinstance(layer, BidirectionalSSM):
            layer.convolution = convolution
            with torch.no_grad():
                layer.prepare(1)  # it refuses a way that it cannot go
    if not compiled:
        return
    if lacking := compiler_lacking(device):
        warn(f"compile: this machine has no {lacking}; the blocks run uncompiled")
        return
    for block in model.blocks:
        block.compile()  # at its first use


def carry_out(
    model: DiffuSSM,
    execution: Execution,
    convolution: Convolution,
    device: torch.device,
) -> None:
    """`speed_up` as asked; layers that cannot go the way of `auto` take the FFT."""
    try:
        speed_up(model, convolution, execution.compile, device)
    except ValueError:
        if chooser(execution.convolution) is None:
            raise
        speed_up(model, way("fft"), execution.compile, device)


def check_way(
    network: Callable[[DiffuSSMConfig], DiffuSSM], recipe: Recipe, execution: Execution
) -> None:
    """Refuse a network that there cannot be, or not run as asked; allocates nothing."""
    meta = torch.device("meta")
    with meta:
        model = network(recipe.model)
    if chooser(execution.convolution) is None:
        speed_up(model, way(execution.convolution), False, meta)


def compiler_lacking(device: torch.device) -> str:
    """What torch.compile needs and does not find on this machine; "" for nothing."""
    gpu = device.type == "cuda"
    if gpu and find_spec("triton") is None:
        return "triton (pip install triton)"
    other = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    asked = os.environ.get("CC" if gpu else "CXX")
    candidates = [asked] if asked else ["gcc", "clang"] if gpu else [other]
    found = any(which(program) for program in candidates)
    return "" if found else f"compiler ({' or '.join(candidates)})"


class _WholeBlocks(DistributedDataParallel):
    """DDP that leaves the graph of a compiled block whole."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What DDP does, but `torch._dynamo` does not cut at its buckets."""
        from torch._dynamo import config as dynamo  # here, for it costs seconds

        with dynamo.patch(optimize_ddp=False):
            return super().forward(*inputs, **options)  # type: ignore[no-untyped-call]


_AUTO = "diffussm.autotuning:autotune_convolution"


def convolution_for(
    asked: str,
    model: DiffuSSMConfig,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    backward: bool = True,
) -> Convolution:
    """The convolution that was asked for, by its name or by what measures it.

    `batch` images go through the network at once, their streams in `dtype`; where one
    only samples, there is no backward pass.
    """
    choose = chooser(asked)
    if choose is None:
        check_gpu(asked, device)
        return way(asked)
    sizes = model.seq_len, model.d_model, batch
    work = {"d_state": model.d_state, "backward": backward}
    choice = on_rank_zero(lambda: choose(*sizes, device, dtype, **work))
    if rank() == 0:
        print(f"convolution: {choice.reason}", file=sys.stderr)
    return cast(Convolution, choice.convolution)


def chooser(convolution: str) -> Callable[..., Any] | None:
    """The function that measures and chooses, or None for a way that has a name.

    Raises:
        ValueError: there is neither such a function nor such a way.
    """
    place = _AUTO if convolution == "auto" else convolution
    module, named, function = place.partition(":")
    with explain(
        f"convolution={convolution!r}, not 'auto' or 'package.module:function'",
        ImportError,
        AttributeError,
        ValueError,
    ):
        choose = getattr(import_module(module), function) if named else way(convolution)
    return cast(Callable[..., Any], choose) if named else None


def check_gpu(convolution: str, device: torch.device) -> None:
    """ValueError for a convolution that is for a GPU on a device that is none."""
    runs = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    told = f"convolution={convolution!r} is for a GPU, not for {device}: take 'auto'"
    refuse("triton" in convolution and not runs, told)
