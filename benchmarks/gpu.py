"""All that a GPU can tell about the efficiency of the model, as one JSON.

Run ``benchmarks/gpu.sh``. bfloat16 by autocast, blocks compiled, for both kinds of
model. Every section checks its two sides before it compares them; one that cannot be
measured (too little memory, noise, a wrong result) is recorded with its reason, and the
others go on. ``--rehearse`` walks the same way with tiny sizes, on any machine, and
writes nothing: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.bidirectional import make_job as layer_job
from benchmarks.bidirectional import two_convolutions
from benchmarks.common import (
    RESULTS,
    environment,
    quiet_runs,
    require_agreement,
    share_outside,
)
from benchmarks.references import awake, require_right, require_rounding
from benchmarks.sampling import Uncached
from benchmarks.sampling import make_job as sampling_job
from benchmarks.train_step import make_model, make_step
from diffussm.autotuning import autotune_convolution
from diffussm.bidirectional import WAYS, BidirectionalSSM, way
from diffussm.chunked import prepare_layers
from diffussm.convolution import S4DKernel, vandermonde
from diffussm.efficiency import DiTBlock, diffussm_macs, dit_macs, explicit_attention
from diffussm.hourglass import HourglassBlock
from diffussm.model import PRESETS, DiffuSSM, DiffuSSMConfig
from diffussm.parallel import speed_up
from diffussm.profiling import time_by_kind
from diffussm.recomputation import RecomputingBlock
from diffussm.resources import peak_flops
from diffussm.sampling_at_scale import replay
from diffussm.two_level import vandermonde_two_level

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are the real thing."""

    width: int = 1152
    blocks: dict[str, int] | None = None  # depth by kind; None: that of XL
    lengths: tuple[int, ...] = (1024, 4096)
    block_cases: tuple[tuple[int, int], ...] = (
        (1024, 32),
        (4096, 16),
        (16384, 2),
    )  # L, B
    curve: tuple[int, ...] = (1024, 4096, 16384)
    sizes: tuple[int, ...] = (32, 64)  # sides of the latent
    places: tuple[int, ...] = (
        2**15,
        2**16,
        2**17,
    )  # positions in a training batch: 32, 64 and 128 images of L = 1024
    batches: tuple[int, ...] = (8, 64)  # of guided images
    steps: int = 20
    steps_computed: int = 3  # of the sampler that computes its kernels at every step
    passes: int = 8  # of a block in a row
    runs: int = 5
    compile: bool = True
    convolution: str = "auto"
    product: int = 8192  # rows and columns of the plain product beside each section


REHEARSAL = Sizes(
    32,
    {"DiffuSSM": 1, "DiT": 1},
    (64,),
    ((64, 2),),
    (16, 64),
    (8,),
    (128, 256),
    (2, 4),
    3,
    2,
    2,
    2,
    False,
    product=64,
)


def autocast(job: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The job under bfloat16."""

    def under() -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return job()

    return under


def ratio(
    what: str, sides: dict[str, Callable[[], object]], runs: int, **facts: Any
) -> Row:
    """Medians of two sides and how many times faster the second is."""
    seconds, spread = quiet_runs(what, sides, runs=runs, warmup=2)
    slow, fast = (statistics.median(values) for values in seconds.values())
    return {
        "what": what,
        "ratio": round(slow / fast, 4),
        "spread": round(spread, 3),
        "seconds": seconds,
        **facts,
    }


def product_speed(sizes: Sizes, device: torch.device) -> dict[str, float]:
    """Tflop/s of a plain bfloat16 product on this machine now, by which to judge the
    sides of a section; nothing where it cannot be measured.
    """
    n = sizes.product
    try:
        options = {"device": device, "dtype": torch.bfloat16}
        a, b = torch.randn(n, n, **options), torch.randn(n, n, **options)
        sides = {"product": lambda: a @ b}
        seconds, _ = quiet_runs("plain product", sides, runs=sizes.runs, warmup=2)
    except Exception as error:
        print(f"plain product: {type(error).__name__}: {error}"[:400], flush=True)
        return {}
    speed = 2 * n**3 / statistics.median(seconds["product"]) / 1e12
    return {"product_tflops": float(f"{speed:.4g}")}


def peak_bytes(job: Callable[[], object], device: torch.device) -> int | None:
    """The peak of memory on a GPU while a job runs, less what was there before; None
    elsewhere.
    """
    if device.type != "cuda":
        job()
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kernel_job(
    side: Callable[..., torch.Tensor], system: list[torch.Tensor], length: int
) -> Callable[[], list[torch.Tensor]]:
    """The kernel and its gradients."""
    probe = torch.randn(
        len(system[0]), length, generator=torch.Generator().manual_seed(1)
    )
    probe = probe.to(system[0].device)

    def job() -> list[torch.Tensor]:
        k = side(*system, length)
        return [k.detach(), *torch.autograd.grad(k, system, probe)]

    return job


def kernel(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The two-level kernel against the direct one, time and memory."""
    for length in sizes.lengths:
        torch.manual_seed(0)
        system = [
            x.detach().requires_grad_()
            for x in S4DKernel(sizes.width).to(device).discrete()
        ]
        sides = {
            "direct": kernel_job(vandermonde, system, length),
            "two-level": kernel_job(vandermonde_two_level, system, length),
        }
        what = f"kernel, forward + backward, L = {length}"
        require_agreement(what, *(side() for side in sides.values()), 1e-4)
        peaks = {name: peak_bytes(side, device) for name, side in sides.items()}
        yield ratio(what, sides, sizes.runs, length=length, peak_bytes=peaks)


def bidirectional(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The bidirectional layer against two S4D layers and a flip, with direct kernels as
    S4D has them.
    """
    length = sizes.lengths[-1]
    torch.manual_seed(0)
    layer = BidirectionalSSM(sizes.width).to(device)
    u = torch.randn(4, length, sizes.width, device=device, requires_grad=True)
    inputs, probe = (
        [u, *layer.parameters()],
        torch.randn(4, length, 2 * sizes.width, device=device),
    )
    theirs = layer_job(lambda u: two_convolutions(layer, u, vandermonde), inputs, probe)
    ours = layer_job(layer, inputs, probe)
    what = f"bidirectional layer, L = {length}"
    require_agreement(what, theirs(), ours(), 1e-3)
    yield ratio(
        what, {"two convolutions": theirs, "one": ours}, sizes.runs, length=length
    )


def convolutions(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Which convolution is chosen, with times and errors of all that were tried."""
    for length, batch in sizes.block_cases:
        choice = autotune_convolution(
            length, sizes.width, batch, device, torch.bfloat16
        )
        row = {
            "what": f"convolution, L = {length}, B = {batch}",
            "reason": choice.reason,
        }
        yield row | {
            "seconds": choice.seconds,
            "errors": choice.errors,
            "length": length,
        }


def chosen(
    sizes: Sizes, length: int, batch: int, device: torch.device
) -> tuple[Any, str]:
    """The convolution that the trainer would choose here, or was told, and its name."""
    if sizes.convolution != "auto":
        return way(sizes.convolution), sizes.convolution
    choice = autotune_convolution(length, sizes.width, batch, device, torch.bfloat16)
    return choice.convolution, choice.reason.partition(":")[0]


def block_job(
    block: nn.Module,
    batch: int,
    length: int,
    passes: int,
    device: torch.device,
    half: bool = True,
) -> Callable[[], list[Tensor]]:
    """Forward and backward of a block under bfloat16; output and gradients of the last.

    Some in a row, as those of a network: the host launches while the GPU computes. As
    in an optimiser step with one micro-batch the kernels of all are prepared first,
    and their gradients go back to the weights together at the end.
    """
    layers = [block.ssm] * passes if isinstance(block, HourglassBlock) else []
    places = length // block.downsample if layers else length
    # called as a network calls it, so that both share what was compiled
    more = ["none"] if isinstance(block, RecomputingBlock) else []
    d_model = block.modulation.in_features
    draws = torch.Generator(device).manual_seed(0)
    x, c, probe = (
        torch.randn(shape, device=device, generator=draws)
        for shape in (
            (batch, places, d_model),
            (batch, d_model),
            (batch, places, d_model),
        )
    )
    named = block.named_parameters()
    weights = [p for name, p in named if not name.startswith("ssm.")]
    inputs = [x.requires_grad_(), c.requires_grad_(), *weights]

    def job() -> list[Tensor]:
        prepared = prepare_layers(layers, length) if layers else []
        handed = [[one.detach().requires_grad_()] for one in prepared] or [[]] * passes
        back = []
        for leaf in handed:
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                y = block(x, c, *leaf, *more)
            found = torch.autograd.grad(y, [*inputs, *leaf], probe)
            back += found[len(inputs) :]
        result = [y.detach(), *found[: len(inputs)]]
        if prepared:
            result += torch.autograd.grad(prepared, [*block.ssm.parameters()], back)
        return result

    return job


def plain_twin(block: nn.Module) -> nn.Module:
    """A copy that is not compiled, with the reference convolution, or the attention of
    PyTorch.
    """
    twin = copy.deepcopy(block)
    if isinstance(twin, HourglassBlock):
        twin.ssm.convolution = way("reference")
    else:
        twin.attention = F.scaled_dot_product_attention
    return twin


def require_right_as_timed(
    what: str, block: nn.Module, batch: int, length: int, device: torch.device
) -> None:
    """Compare a block, compiled and with its convolution, at the sizes that are timed,
    with its plain twin; or raise Disagreement.
    """
    twin = plain_twin(block)
    sides = (twin, False), (twin, True), (block, True)
    require_rounding(
        what, *(block_job(b, batch, length, 1, device, half)() for b, half in sides)
    )


def two_blocks(
    what: str,
    sides: dict[str, nn.Module],
    case: tuple[int, int],
    sizes: Sizes,
    device: torch.device,
    **facts: Any,
) -> Row:
    """The row of two blocks that are right at a length and batch."""
    length, batch = case
    for name, block in sides.items():
        require_right_as_timed(f"{what}, {name}", block, batch, length, device)
    jobs = {
        name: block_job(block, batch, length, sizes.passes, device)
        for name, block in sides.items()
    }
    row = ratio(what, jobs, sizes.runs, length=length, batch=batch, **facts)
    config = DiffuSSMConfig(8, d_model=sizes.width, n_blocks=1)
    for name, times in row["seconds"].items():
        work = sizes.passes * batch * dense_operations(name, config, length)
        row[f"{name}, Tflop/s"] = work / statistics.median(times) / 1e12
    return row


def dense_operations(kind: str, config: DiffuSSMConfig, length: int) -> float:
    """Of forward and backward pass on one image, whichever way the layer is run: a
    multiply-add is two operations, the backward pass twice the forward pass.
    """
    macs = {"DiffuSSM": diffussm_macs, "DiT": dit_macs}[kind](config, length)
    rest = ("convolution", "kernels")
    return 6 * sum(n for name, n in macs.items() if name not in rest)


def curve_of(what: str, block: nn.Module, sizes: Sizes, device: torch.device) -> Row:
    """The row of the exponent with which the cost of a block grows with the length."""
    for n in sizes.curve:
        require_right_as_timed(f"{what}, L = {n}", block, 2, n, device)
    jobs = {str(n): block_job(block, 2, n, sizes.passes, device) for n in sizes.curve}
    seconds, spread = quiet_runs(what, jobs, runs=sizes.runs, warmup=2)
    medians = [statistics.median(seconds[str(n)]) for n in sizes.curve]
    exponent = float(np.polyfit(np.log(sizes.curve), np.log(medians), 1)[0])
    return {
        "exponent": round(exponent, 3),
        "spread": round(spread, 3),
        "seconds": seconds,
    }


def blocks(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """A block against a DiT block, with attention fused and as it is defined; the
    exponent of the cost.
    """
    torch.manual_seed(0)
    ours, theirs = (
        awake(kind(sizes.width).to(device)) for kind in (HourglassBlock, DiTBlock)
    )
    for name, block in (("DiffuSSM", ours), ("DiT", theirs)):
        require_right(name, block, sizes.width, 128)
    unfused = copy.deepcopy(theirs)
    unfused.attention = explicit_attention
    if sizes.compile:
        for block in (ours, theirs, unfused):
            block.compile(dynamic=False)  # each length and batch has a graph of its own
    for length, batch in sizes.block_cases:
        ours.ssm.convolution, convolution = chosen(sizes, length, batch, device)
        facts = {"convolution": convolution, "passes": sizes.passes}
        for name, block in (
            ("fused attention", theirs),
            ("unfused attention", unfused),
        ):
            what = f"block against DiT's with {name}, L = {length}, B = {batch}"
            sides, facts["attention"] = {"DiT": block, "DiffuSSM": ours}, name
            case = length, batch
            yield attempt(what, two_blocks, what, sides, case, sizes, device, **facts)
    what = "exponent of the cost of a block"
    row = attempt(what, curve_of, what, ours, sizes, device)
    yield row | {"convolution": convolution}


def attempt(
    what: str, measure: Callable[..., Row], *arguments: Any, **facts: Any
) -> Row:
    """A row, or the reason why there is none."""
    try:
        return {"what": what} | measure(*arguments, **facts)
    except Exception as error:
        return {"what": what, "error": f"{type(error).__name__}: {error}"}


def training(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Training of XL: images/s and memory against batch, for DiT at equal length and
    with patches; MFU.
    """
    for size in sizes.sizes:
        for kind, patch in (("DiffuSSM", 1), ("DiT", 1), ("DiT", 2)):
            depth = (sizes.blocks or {"DiffuSSM": 29, "DiT": 28})[kind]
            config = DiffuSSMConfig(
                **PRESETS["DiffuSSM-XL"]
                | {
                    "input_size": size,
                    "patch_size": patch,
                    "n_blocks": depth,
                    "d_model": sizes.width,
                }
            )
            name = f"training {kind}-XL{'/2' if patch == 2 else ''}, {size} x {size}"
            facts = {
                "kind": kind,
                "patch": patch,
                "size": size,
                "length": config.seq_len,
            }
            batches = [
                max(1, round(places / config.seq_len)) for places in sizes.places
            ]
            try:
                model, convolution = fast_model(kind, config, batches[0], sizes, device)
            except Exception as error:
                yield facts | {
                    "what": name,
                    "error": f"{type(error).__name__}: {error}",
                }
                continue
            for batch in batches:
                what = f"{name}, B = {batch}"
                row = attempt(what, one_training, model, batch, sizes, device)
                yield row | facts | {"batch": batch, "convolution": convolution}
                if "OutOfMemory" in row.get("error", ""):
                    break
            del model


def fast_model(
    kind: str, config: DiffuSSMConfig, batch: int, sizes: Sizes, device: torch.device
) -> tuple[nn.Module, str]:
    """A network as the trainer would run it, compiled if `sizes` says so, and the name
    of its convolution.
    """
    free_memory(device)
    model = make_model(kind, config, str(device))
    name = "FFT"
    if kind == "DiffuSSM":
        convolution, name = chosen(sizes, config.seq_len, batch, device)
        for block in model.blocks:
            block.ssm.convolution = convolution
    if sizes.compile:
        for block in model.blocks:
            block.compile(dynamic=False)
    return model, name


def free_memory(device: torch.device) -> None:
    """Give back what is no longer used, and forget the peak of memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def one_training(
    model: nn.Module, batch: int, sizes: Sizes, device: torch.device
) -> Row:
    """Images/s, memory, MFU and the share outside matrix products of one model at one
    batch, whose first block is compared with its plain twin.

    The peak of memory is that of warmed-up steps: what compiling and checking took is
    forgotten.
    `held_bytes` is what lies in memory between two steps: weights, their average, the
    optimiser's moments.
    """
    length = model.config.seq_len
    require_right_as_timed("a block", model.blocks[0], batch, length, device)
    free_memory(device)
    step = make_step(model, batch, "bf16")
    step(), step()
    free_memory(device)
    facts: Row = {}
    if device.type == "cuda":
        facts["held_bytes"] = torch.cuda.memory_allocated()
    seconds, _ = quiet_runs("training", {"step": step}, runs=sizes.runs, warmup=1)
    median = statistics.median(seconds["step"])
    facts |= {"images_per_second": batch / median, "seconds": seconds["step"]}
    if device.type == "cuda":
        facts["peak_bytes"] = torch.cuda.max_memory_allocated()
        peak = peak_flops(torch.cuda.get_device_name())
        kind = "DiffuSSM" if isinstance(model, DiffuSSM) else "DiT"
        work = batch * dense_operations(kind, model.config, length)
        if peak is not None:
            facts["mfu"] = round(work / median / peak, 4)
    kinds = time_by_kind(step)
    facts["profile"] = kinds
    facts["share_outside"] = share_outside(kinds)
    return facts


def sampling(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """One image with kept kernels against computing them at every step; images/s of
    guided batches, compiled and replayed.
    """
    depth = (sizes.blocks or {"DiffuSSM": 29})["DiffuSSM"]
    for size in sizes.sizes:
        config = DiffuSSMConfig(
            **PRESETS["DiffuSSM-XL"]
            | {"input_size": size, "n_blocks": depth, "d_model": sizes.width}
        )
        model = make_model("DiffuSSM", config, str(device)).eval()
        sides = {
            name: autocast(sampling_job(side, sizes.steps_computed), device)
            for name, side in (
                ("computed at every step", Uncached(model)),
                ("kept", model),
            )
        }
        what = f"sampling, {size} x {size}, batch 1, {sizes.steps_computed} steps"
        require_agreement(what, *(side() for side in sides.values()), 0.0)
        yield attempt(what, ratio, what, sides, sizes.runs, size=size)
        plain = {batch: plain_images(model, batch, sizes) for batch in sizes.batches}
        for batch in sizes.batches:
            convolution, name = chosen(sizes, config.seq_len, 2 * batch, device)
            speed_up(model, convolution, False, device)
            if sizes.compile and batch == sizes.batches[0]:
                for block in model.blocks:
                    block.compile(dynamic=False)
                replay(model)
            what = (
                f"sampling, {size} x {size}, batch {batch}, guided, kernels and graph "
                "kept, as of 250 steps"
            )
            row = attempt(what, one_sampling, what, model, plain[batch], sizes, device)
            yield row | {"batch": batch, "size": size, "convolution": name}


def guided_job(model: DiffuSSM, batch: int, steps: int) -> Callable[[], Tensor]:
    """A function that draws guided images."""
    return sampling_job(model, steps, batch, 1.5)


def plain_images(model: DiffuSSM, batch: int, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Images of few steps of a model as it is, in float32 and under bfloat16."""
    job = guided_job(model, batch, sizes.steps_computed)
    return job(), autocast(job, next(model.parameters()).device)()


def one_sampling(
    what: str,
    model: DiffuSSM,
    plain: tuple[Tensor, Tensor],
    sizes: Sizes,
    device: torch.device,
) -> Row:
    """Images/s of guided batches, if all 250 steps take what a few of them take.

    As in a set of many batches: kernels are computed, and a step is recorded as a CUDA
    graph, before the clock starts. Images of few steps are compared with `plain` first.
    """
    exact, rounded = plain
    few, many = (
        autocast(guided_job(model, len(exact), steps), device)
        for steps in (sizes.steps_computed, sizes.steps)
    )
    with model.cached_kernels():  # of all runs
        require_rounding(what, [exact], [rounded], [few()])
        seconds, spread = quiet_runs(what, {"guided": many}, runs=2)
    median = statistics.median(seconds["guided"])
    return {
        "images_per_second": len(exact) / median * sizes.steps / 250,
        "spread": round(spread, 3),
        "seconds": seconds["guided"],
        "steps": sizes.steps,
    }


SECTIONS = {
    "kernel": kernel,
    "bidirectional": bidirectional,
    "convolutions": convolutions,
    "blocks": blocks,
    "training": training,
    "sampling": sampling,
}


def measured(name: str, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The rows of a section, and a last one that says why there are no more if
    something went wrong.
    """
    try:
        yield from SECTIONS[name](sizes, device)
    except Exception as error:
        traceback.print_exc()
        yield {"what": name, "error": f"{type(error).__name__}: {error}"}


def commit() -> str:
    """Of the code that runs, with "-dirty" if it has been changed since."""
    told = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(told, cwd=RESULTS, capture_output=True, text=True)
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() or "unknown"


def kept_rows(record: dict[str, Any], machine: dict[str, str]) -> dict[str, list[Row]]:
    """The rows of a record, by section, each with its date; none if they are of another
    GPU or another PyTorch, for a record names one of each.
    """
    if not record:
        return {}
    before = record["environment"]
    named = ("gpu", "torch")
    if any(before.get(name) != machine.get(name) for name in named):
        told = ", ".join(str(before.get(name)) for name in named)
        print(f"the rows of {told} are not kept: this is another GPU or PyTorch")
        return {}
    sections = {name: record[name] for name in SECTIONS if name in record}
    return {
        name: [{"date": before["date"], **row} for row in rows]
        for name, rows in sections.items()
    }


def summary(row: Row) -> str:
    """The figures of a row, without the single runs."""
    return ", ".join(
        f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float)
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="tiny sizes on any machine; writes nothing",
    )
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        help="default: all",
    )
    told = "a way to run the convolution (default: auto, which tries all)"
    parser.add_argument(
        "--convolution", choices=["auto", *WAYS], default="auto", help=told
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=int,
        default=[32, 64],
        help="sides of the latents; rows of others are kept",
    )
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.rehearse:
        print(
            "error: PyTorch sees no GPU here; --rehearse walks the same way with "
            "tiny sizes",
            file=sys.stderr,
        )
        return 2
    sizes = REHEARSAL if arguments.rehearse else Sizes(sizes=tuple(arguments.sizes))
    sizes = replace(sizes, convolution=arguments.convolution)
    file = RESULTS / "gpu.json"
    machine, stored = environment(), file.exists() and not arguments.rehearse
    before = kept_rows(json.loads(file.read_text()) if stored else {}, machine)
    marks = {"commit": commit(), "date": machine["date"]}
    precision = "bf16 autocast, blocks compiled"
    record: dict[str, Any] = {"environment": machine, "precision": precision} | before
    failed = 0
    for name in arguments.sections:
        rows = [
            row
            for row in record.get(name, [])
            if "size" in row and row["size"] not in sizes.sizes
        ]
        plain = product_speed(sizes, device)
        for row in measured(name, sizes, device):
            rows.append(row | plain | marks)
            fault = row.get("error", "")
            failed += bool(fault) and not fault.startswith("Noise")
            print(f"{name}: {row['what']}: {fault or summary(row)}"[:400], flush=True)
            record[name] = rows
            if (
                not arguments.rehearse
            ):  # after each row: what was measured stays, whatever comes
                RESULTS.mkdir(exist_ok=True)
                file.write_text(json.dumps(record, indent=2) + "\n")
    print(
        f"written to {file}"
        if not arguments.rehearse
        else "a rehearsal: nothing was written"
    )
    return 1 if arguments.rehearse and failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
