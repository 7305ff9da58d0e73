"""A whole training step, and where its time goes: ``python -m benchmarks.train_step``.

Loss with both its terms, gradients, AdamW and the moving average, of a network with
blocks of XL width. Only few blocks, so that it fits into main memory; every block costs
the same. Rows: the share of the step that is no matrix product; the step of a DiT of
the same width, depth and length; what the fused optimiser and the average in one call
bring; what is gained if the kernels are built once for four micro-batches, and not for
each; what one product for the two maps of the block's input would bring; and what it
costs in time, and brings in memory, to compute activations again.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import (
    command,
    keep_freed_memory,
    memory_row,
    peak_memory,
    plain_product,
    quiet_runs,
    report,
    require_agreement,
    rounded,
    share_outside,
    speed_row,
    two_or_more,
)
from benchmarks.references import awake, require_right
from diffussm.batches import Batch, noise_at
from diffussm.bidirectional import BidirectionalSSM
from diffussm.diffusion import GaussianDiffusion
from diffussm.efficiency import DiT, diffussm_macs, dit_macs
from diffussm.hourglass import HourglassBlock
from diffussm.model import PRESETS, DiffuSSM, DiffuSSMConfig
from diffussm.optimiser import parameter_groups, update_ema
from diffussm.options import Execution, Recipe, diffusion_of
from diffussm.parallel import accumulate_gradients
from diffussm.profiling import time_by_kind
from diffussm.training import backward

SHARE_LIMIT = 0.15
SPEED_LIMIT = 1.3
KINDS = {"DiffuSSM": DiffuSSM, "DiT": DiT}
Job = Callable[[], torch.Tensor]


def make_model(kind: str, config: DiffuSSMConfig, device: str = "cpu") -> nn.Module:
    """A network of either kind with random numbers where a new one has zeros, the same
    for every call.
    """
    torch.manual_seed(0)
    return awake(KINDS[kind](config)).to(device)


def make_loss(model: nn.Module, batch: int, precision: str = "float32") -> Job:
    """A function that computes the model's loss on one and the same batch."""
    config, device = model.config, next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    shape = (batch, config.in_channels, config.height, config.width)
    x0, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    t = torch.randint(1000, (batch,), generator=generator).to(device)
    y = torch.randint(config.num_classes, (batch,), generator=generator).to(device)
    diffusion = GaussianDiffusion.linear()

    def loss() -> torch.Tensor:
        network = model
        if isinstance(model, DiffuSSM):  # once in a step, as in training
            network = partial(model, prepared=model.prepare(config.seq_len))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return diffusion.losses(network, x0, t, y, noise)["loss"].mean()

    return loss


def make_step(
    model: nn.Module, batch: int, precision: str = "float32", fused: bool = True
) -> Job:
    """A function that trains the model on one and the same batch; returns the loss."""
    loss_of = make_loss(model, batch, precision)
    ema = copy.deepcopy(model).requires_grad_(False)
    groups = parameter_groups(model, 1e-4, 1e-3)
    optimizer = torch.optim.AdamW(groups, eps=1e-8, fused=fused)

    def step() -> torch.Tensor:
        loss = loss_of()
        loss.backward()
        nn.utils.get_total_norm(
            [p.grad for p in model.parameters() if p.grad is not None]
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, 0.9999)
        return loss.detach()

    return step


def make_memory_job(config: DiffuSSMConfig, batch: int, recompute: bool) -> Job:
    """For `peak_memory`: a step with or without recomputation."""
    model = make_model("DiffuSSM", config)
    model.activation_checkpointing = "all" if recompute else "none"
    step = make_step(model, batch)
    step()  # the state of the optimiser counts as already there
    return step


def kernel_job(layers: Iterable[BidirectionalSSM], length: int) -> Callable[[], object]:
    """The spectra of all kernels and their gradients: the part of a step that no image
    is needed for.
    """

    def job() -> None:
        for layer in layers:
            spectra = layer.spectra(length)
            torch.autograd.grad(
                spectra, list(layer.parameters()), torch.ones_like(spectra)
            )

    return job


def operations(
    kind: str, config: DiffuSSMConfig, batch: int, length: int | None = None
) -> float:
    """Of forward and backward pass of a network's blocks: six for each multiply-add."""
    macs = {"DiffuSSM": diffussm_macs, "DiT": dit_macs}[kind](config, length)
    inside = ("linear maps", "convolution", "attention", "kernels")
    return 6 * sum(
        macs.get(name, 0.0) * (1 if name == "kernels" else batch) for name in inside
    )


def where_time_goes(
    job: Callable[[], object], kernels: Callable[[], object], runs: int
) -> dict[str, float]:
    """Medians of the seconds of a job by kind, with all that belongs to the kernels of
    the S4D apart. Both have run before.
    """
    samples: list[dict[str, float]] = []
    for _ in range(runs):
        kinds, inside = time_by_kind(job), time_by_kind(kernels)
        apart = {kind: kinds[kind] - inside[kind] for kind in kinds}
        apart["kernels, matrix products"] = inside["matrix products"]
        apart["kernels, the rest"] = inside["convolution"] + inside["other"]
        samples.append(apart)
    return {
        kind: statistics.median(sample[kind] for sample in samples)
        for kind in samples[0]
    }


def optimizer_pair(model: nn.Module) -> tuple[Callable, Callable, float]:
    """A step of AdamW for all parameters, as default and fused, and how much the
    results differ.
    """
    optimizers = []
    for fused in (False, True):
        twin = copy.deepcopy(model)
        for parameter in twin.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizers.append(
            torch.optim.AdamW(parameter_groups(twin, 1e-4, 1e-3), eps=1e-8, fused=fused)
        )
        optimizers[-1].step()
    results = [
        [p for group in o.param_groups for p in group["params"]] for o in optimizers
    ]
    return (
        optimizers[0].step,
        optimizers[1].step,
        require_agreement("fused AdamW", *results, 1e-4),
    )


def average_pair(model: nn.Module) -> tuple[Callable, Callable, float]:
    """A step of the moving average, in a loop and in one call, and how much the results
    differ.
    """
    slow, fast = (copy.deepcopy(model).requires_grad_(False) for _ in range(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)

    def one_by_one() -> None:
        for average, parameter in zip(
            slow.parameters(), model.parameters(), strict=True
        ):
            average.mul_(0.9999).add_(parameter.detach(), alpha=1 - 0.9999)

    def at_once() -> None:
        update_ema(fast, model, 0.9999)

    one_by_one()
    at_once()
    return (
        one_by_one,
        at_once,
        require_agreement("average", slow.parameters(), fast.parameters(), 1e-6),
    )


def micro_batch_pair(
    model: DiffuSSM, batch: int, recompute: str = "none"
) -> tuple[Job, Job, float]:
    """The gradients of four micro-batches, with kernels for each and once for all, and
    how much they differ.
    """
    model.activation_checkpointing = recompute
    config, micro = model.config, batch // 4
    recipe = Recipe(model=config, batch_size=4 * micro)
    data = torch.Generator().manual_seed(0)
    shape = (4 * micro, config.in_channels, config.height, config.width)
    x0, noise = (torch.randn(shape, generator=data) for _ in range(2))
    t = torch.randint(1000, (4 * micro,), generator=data)
    whole, diffusion = Batch(x0, t, t % config.num_classes, noise), diffusion_of(recipe)
    execution, cpu = Execution(micro_batch=micro), torch.device("cpu")

    def gradient() -> torch.Tensor:
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad(set_to_none=True)
        return found

    def for_each() -> torch.Tensor:
        for first in range(0, 4 * micro, micro):
            part = whole.part(slice(first, first + micro), cpu)
            backward(model, diffusion, part, recipe)
        return gradient()

    def once() -> torch.Tensor:
        accumulate_gradients(model, diffusion, whole, recipe, execution, cpu)
        return gradient()

    return for_each, once, require_agreement("once", for_each(), once(), 1e-5)


def first_maps_pair(
    block: HourglassBlock, batch: int, positions: int
) -> tuple[Callable, Callable, float]:
    """The two maps that read one input, with their GELU, forward and backward: as the
    block has them, and as one product; and how much the gradients differ.
    """
    maps = block.w0, block.w1
    parameters = [p for linear in maps for p in (linear.weight, linear.bias)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, positions, block.w0.in_features, generator=generator)
    x.requires_grad_()

    def gradients(*outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(outputs, (x, *parameters), outputs)

    def apart() -> tuple[torch.Tensor, ...]:
        return gradients(*(F.gelu(linear(x)) for linear in maps))

    def together() -> tuple[torch.Tensor, ...]:
        weight = torch.cat([linear.weight for linear in maps])
        bias = torch.cat([linear.bias for linear in maps])
        both = F.gelu(F.linear(x, weight, bias))
        return gradients(*both.split([linear.out_features for linear in maps], 2))

    return (
        apart,
        together,
        require_agreement("one product", apart(), together(), 1e-5),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--size",
        type=int,
        default=32,
        help="side of the latent (default: 32, L = 1024)",
    )
    parser.add_argument("--batch", type=int, default=8, help="B (default: 8)")
    parser.add_argument(
        "--blocks", type=int, default=3, help="blocks (default: 3; XL has 29)"
    )
    parser.add_argument(
        "--width", type=int, default=1152, help="D, a multiple of 16 (default: 1152)"
    )
    parser.add_argument(
        "--runs",
        type=two_or_more,
        default=3,
        help="timed runs of each side (default: 3)",
    )
    arguments = parser.parse_args(argv)
    B, D = arguments.batch, arguments.width
    if min(arguments.size, B, arguments.blocks, D) < 1 or D % 16 or arguments.size % 2:
        parser.error(
            "all options must be positive, --width a multiple of 16 and --size even"
        )

    keep_freed_memory()
    config = DiffuSSMConfig(
        **PRESETS["DiffuSSM-XL"]
        | {"input_size": arguments.size, "n_blocks": arguments.blocks, "d_model": D}
    )
    L, runs = config.seq_len, arguments.runs
    models = {kind: make_model(kind, config) for kind in KINDS}
    errors = [
        require_right(kind, copy.deepcopy(model.blocks[0]), D, 128)
        for kind, model in models.items()
    ]

    layers = [block.ssm for block in models["DiffuSSM"].blocks]
    step, kernels = make_step(models["DiffuSSM"], B), kernel_job(layers, L)
    step(), kernels()
    seconds = where_time_goes(step, kernels, runs)
    del step
    share = share_outside(seconds)
    rows: list[dict[str, Any]] = [
        {
            "what": "share of the step outside matrix products",
            "reference": f"{1e3 * sum(seconds.values()):,.0f} ms in all",
            "candidate": f"{1e3 * (1 - share) * sum(seconds.values()):,.0f} ms "
            "matrix products",
            "ratio": rounded(share, SHARE_LIMIT, 3),
            "limit": f"at most {SHARE_LIMIT:g}",
            "reached": share <= SHARE_LIMIT,
            "spread": "",
            "profile": seconds,
        }
    ]

    def compare(
        what: str, reference: Any, candidate: Any, at_least: float, runs: int = runs
    ) -> None:
        sides = ("reference", reference), ("candidate", candidate)
        rows.append(speed_row(what, *sides, at_least=at_least, runs=runs))

    steps = {kind: make_step(model, B) for kind, model in models.items()}
    compare(
        "a step of DiT against one of DiffuSSM",
        steps["DiT"],
        steps["DiffuSSM"],
        SPEED_LIMIT,
    )
    del models["DiT"], steps
    taken, (product, work) = rows[-1]["seconds"], plain_product(2048)
    sides = {
        "DiT": (operations("DiT", config, B), taken["reference"]),
        "DiffuSSM": (operations("DiffuSSM", config, B), taken["candidate"]),
        "matrix product": (
            work,
            quiet_runs("matrix product", {"": product}, runs=10 * runs)[0][""],
        ),
    }
    rows[-1]["gflops"] = {
        name: work / statistics.median(times) / 1e9
        for name, (work, times) in sides.items()
    }

    ours = models["DiffuSSM"]
    for recompute, told in (("none", ""), ("all", ", activations computed again")):
        each, once, error = micro_batch_pair(copy.deepcopy(ours), max(B, 4), recompute)
        errors.append(error)
        what = "kernels for each of four micro-batches against once for all"
        compare(what + told, each, once, 1.0)
        del each, once
    apart, together, error = first_maps_pair(ours.blocks[0], B, L // config.downsample)
    errors.append(error)
    compare("W0 and W1 apart against as one product", apart, together, 1.0, 5 * runs)
    del apart, together
    for what, make_pair in (
        ("AdamW, operation by operation, against fused", optimizer_pair),
        ("average, parameter by parameter, against foreach", average_pair),
    ):
        slow, fast, error = make_pair(ours)
        errors.append(error)
        compare(what, slow, fast, 1.0, 10 * runs)
        del slow, fast

    shape, batch = (4, 32, 32), 256  # latents of images of 256 pixels
    compare(
        f"noise of a batch of {batch} against that of the share of one of 8 processes",
        lambda: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)),
        lambda: noise_at(range(batch // 8), shape, seed=0),
        1.0,
        10 * runs,
    )
    again = copy.deepcopy(ours)
    again.activation_checkpointing = "all"
    plain, recomputing = make_step(ours, B), make_step(again, B)
    errors.append(require_agreement("recomputing", plain(), recomputing(), 1e-5))
    compare("recomputing activations against keeping them", recomputing, plain, 1.0)
    deep = replace(
        config, n_blocks=4 * arguments.blocks, d_model=D // 3 // 16 * 16 or D
    )
    peaks = [
        peak_memory("benchmarks.train_step:make_memory_job", deep, B, recompute)
        for recompute in (False, True)
    ]
    rows.append(
        memory_row(
            f"memory with kept against recomputed activations, {deep.n_blocks} "
            f"blocks, D = {deep.d_model}",
            ("reference", peaks[0]),
            ("candidate", peaks[1]),
            at_least=1.0,
        )
    )
    for row in rows:
        row["difference"] = f"{max(errors):.0e}"
    title = (
        f"A training step of XL width with {config.n_blocks} blocks: B = {B}, L "
        f"= {L}, D = {D}, float32"
    )
    return report("train_step", title, rows, settings=vars(arguments))


if __name__ == "__main__":
    raise SystemExit(command(main))
