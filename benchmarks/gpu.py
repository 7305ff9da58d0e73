"""All that a GPU can tell about the efficiency of the model, as one JSON: run ``benchmarks/gpu.sh``.

bfloat16 by autocast, blocks compiled, for both kinds of model. Every section checks its two sides before it
compares them; one that cannot be measured (too little memory, noise, a wrong result) is recorded with its
reason, and the others go on. ``--rehearse`` walks the same way with tiny sizes, on any machine, and writes
nothing: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.bidirectional import make_job as layer_job
from benchmarks.bidirectional import two_convolutions
from benchmarks.common import RESULTS, alternate, environment, quiet_runs, require_agreement
from benchmarks.references import awake, require_right
from benchmarks.sampling import Uncached
from benchmarks.sampling import make_job as sampling_job
from benchmarks.train_step import make_model, make_step
from diffussm.bidirectional import BidirectionalSSM, convolve
from diffussm.convolution import S4DKernel, vandermonde, vandermonde_two_level
from diffussm.distributed import peak_flops
from diffussm.efficiency import DiTBlock, diffussm_macs, dit_macs, explicit_attention, time_by_kind
from diffussm.hourglass import HourglassBlock
from diffussm.model import PRESETS, DiffuSSMConfig

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are the real thing."""

    width: int = 1152
    blocks: dict[str, int] | None = None  # depth by kind; None: that of XL
    lengths: tuple[int, ...] = (1024, 4096)
    block_cases: tuple[tuple[int, int], ...] = ((1024, 32), (4096, 16), (16384, 2))  # L, B
    curve: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    sizes: tuple[int, ...] = (32, 64)  # sides of the latent
    batches: tuple[int, ...] = (8, 16, 32, 64, 96, 128)
    steps: int = 50
    runs: int = 5
    compile: bool = True


REHEARSAL = Sizes(32, {"DiffuSSM": 1, "DiT": 1}, (64,), ((64, 2),), (16, 64), (8,), (2, 4), 3, 2, False)


def autocast(job: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The job under bfloat16."""

    def under() -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return job()

    return under


def ratio(what: str, sides: dict[str, Callable[[], object]], runs: int, **facts: Any) -> Row:
    """Medians of two sides and how many times faster the second is."""
    seconds, spread = quiet_runs(what, sides, runs=runs, warmup=2)
    slow, fast = (statistics.median(values) for values in seconds.values())
    return {
        "what": what,
        "ratio": round(slow / fast, 2),
        "spread": round(spread, 3),
        "seconds": seconds,
        **facts,
    }


def peak_bytes(job: Callable[[], object], device: torch.device) -> int | None:
    """The peak of memory on a GPU while a job runs, less what was there before; None elsewhere."""
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
    probe = torch.randn(len(system[0]), length, generator=torch.Generator().manual_seed(1))
    probe = probe.to(system[0].device)

    def job() -> list[torch.Tensor]:
        k = side(*system, length)
        return [k.detach(), *torch.autograd.grad(k, system, probe)]

    return job


def kernel(sizes: Sizes, device: torch.device) -> list[Row]:
    """The two-level kernel against the direct one, time and memory."""
    rows = []
    for length in sizes.lengths:
        torch.manual_seed(0)
        system = [x.detach().requires_grad_() for x in S4DKernel(sizes.width).to(device).discrete()]
        sides = {
            "direct": kernel_job(vandermonde, system, length),
            "two-level": kernel_job(vandermonde_two_level, system, length),
        }
        what = f"kernel, forward + backward, L = {length}"
        require_agreement(what, *(side() for side in sides.values()), 1e-4)
        peaks = {name: peak_bytes(side, device) for name, side in sides.items()}
        rows.append(ratio(what, sides, sizes.runs, length=length, peak_bytes=peaks))
    return rows


def bidirectional(sizes: Sizes, device: torch.device) -> list[Row]:
    """The bidirectional layer against two S4D layers and a flip, with direct kernels as S4D has them."""
    length = sizes.lengths[-1]
    torch.manual_seed(0)
    layer = BidirectionalSSM(sizes.width).to(device)
    u = torch.randn(4, length, sizes.width, device=device, requires_grad=True)
    inputs, probe = [u, *layer.parameters()], torch.randn(4, length, 2 * sizes.width, device=device)
    theirs = layer_job(lambda u: two_convolutions(layer, u, vandermonde), inputs, probe)
    ours = layer_job(layer, inputs, probe)
    what = f"bidirectional layer, L = {length}"
    require_agreement(what, theirs(), ours(), 1e-3)
    return [ratio(what, {"two convolutions": theirs, "one": ours}, sizes.runs, length=length)]


def convolutions(sizes: Sizes, device: torch.device) -> list[Row]:
    """Which long convolution is chosen, with the times and errors of all that were tried."""
    try:
        from diffussm.on_chip import choose_convolution
    except ImportError as error:
        return [{"what": "convolution", "reason": f"FFT: {error}"}]
    rows = []
    for length, batch in sizes.block_cases:
        choice = choose_convolution(length, sizes.width, batch, device, torch.bfloat16)
        row = {"what": f"convolution, L = {length}, B = {batch}", "reason": choice.reason}
        rows.append(row | {"seconds": choice.seconds, "errors": choice.errors, "length": length})
    return rows


def chosen(sizes: Sizes, length: int, batch: int, device: torch.device) -> Any:
    """The convolution that the trainer would choose here."""
    try:
        from diffussm.on_chip import choose_convolution
    except ImportError:
        return convolve
    return choose_convolution(length, sizes.width, batch, device, torch.bfloat16).convolution


def block_job(block: nn.Module, batch: int, places: int, device: torch.device) -> Callable[[], object]:
    """Forward and backward of a block under bfloat16."""
    d_model = block.modulation.in_features
    x = torch.randn(batch, places, d_model, device=device, requires_grad=True)
    c = torch.randn(batch, d_model, device=device, requires_grad=True)
    inputs, probe = [x, c, *block.parameters()], torch.randn(x.shape, device=device)
    forward = autocast(lambda: block(x, c), device)
    return lambda: torch.autograd.grad(forward(), inputs, probe)


def blocks(sizes: Sizes, device: torch.device) -> list[Row]:
    """A block against a DiT block, with attention fused and as it is defined; the exponent of the cost."""
    torch.manual_seed(0)
    ours, theirs = (awake(kind(sizes.width).to(device)) for kind in (HourglassBlock, DiTBlock))
    for name, block in (("DiffuSSM", ours), ("DiT", theirs)):
        require_right(name, block, sizes.width, 128)
    unfused = copy.deepcopy(theirs)
    unfused.attention = explicit_attention
    if sizes.compile:
        for block in (ours, theirs, unfused):
            block.compile()
    rows = []
    for length, batch in sizes.block_cases:
        ours.ssm.convolution = chosen(sizes, length, batch, device)
        job = block_job(ours, batch, length // 2, device)
        for name, block in (("fused attention", theirs), ("unfused attention", unfused)):
            what = f"block against DiT's with {name}, L = {length}, B = {batch}"
            sides = {"DiT": block_job(block, batch, length, device), "DiffuSSM": job}
            rows.append(attempt(what, ratio, what, sides, sizes.runs, length=length, attention=name))
    ours.ssm.convolution = convolve
    seconds = alternate(
        {str(n): block_job(ours, 2, n // 2, device) for n in sizes.curve}, runs=sizes.runs, warmup=2
    )
    medians = [statistics.median(seconds[str(n)]) for n in sizes.curve]
    exponent = float(np.polyfit(np.log(sizes.curve), np.log(medians), 1)[0])
    rows.append(
        {"what": "exponent of the cost of a block", "exponent": round(exponent, 3), "seconds": seconds}
    )
    return rows


def attempt(what: str, measure: Callable[..., Row], *arguments: Any, **facts: Any) -> Row:
    """A row, or the reason why there is none."""
    try:
        return {"what": what} | measure(*arguments, **facts)
    except Exception as error:
        return {"what": what, "error": f"{type(error).__name__}: {error}"}


def training(sizes: Sizes, device: torch.device) -> list[Row]:
    """Training of XL: images/s and memory against batch, for DiT at equal length and with patches; MFU."""
    rows = []
    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    for size in sizes.sizes:
        for kind, patch in (("DiffuSSM", 1), ("DiT", 1), ("DiT", 2)):
            depth = (sizes.blocks or {"DiffuSSM": 29, "DiT": 28})[kind]
            config = DiffuSSMConfig(
                **PRESETS["DiffuSSM-XL"]
                | {"input_size": size, "patch_size": patch, "n_blocks": depth, "d_model": sizes.width}
            )
            macs = (diffussm_macs if kind == "DiffuSSM" else dit_macs)(config)
            products = sum(value for name, value in macs.items() if name not in ("convolution", "kernels"))
            for batch in sizes.batches:
                row: Row = {
                    "what": f"training {kind}-XL{'/2' if patch == 2 else ''}, {size} x {size}, B = {batch}",
                    "kind": kind, "patch": patch, "size": size, "length": config.seq_len, "batch": batch,
                }  # fmt: skip
                row |= attempt(row["what"], one_training, kind, config, batch, products, peak, sizes, device)
                rows.append(row)
                print(json.dumps(row)[:300], flush=True)
                if "OutOfMemory" in row.get("error", ""):
                    break
    return rows


def one_training(
    kind: str,
    config: DiffuSSMConfig,
    batch: int,
    macs: float,
    peak: float | None,
    sizes: Sizes,
    device: torch.device,
) -> Row:
    """Images/s, peak of memory, MFU and the share outside matrix products of one model at one batch."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = make_model(kind, config, str(device))
    facts: Row = {}
    if kind == "DiffuSSM":
        convolution = chosen(sizes, config.seq_len, batch, device)
        facts["convolution"] = "FFT" if convolution is convolve else str(convolution)
        for block in model.blocks:
            block.ssm.convolution = convolution
    plain = make_step(model, batch, "bf16")
    step = plain
    if sizes.compile:
        first = float(plain())
        compiled = make_model(kind, config, str(device))
        for ours, theirs in zip(compiled.blocks, model.blocks, strict=True):
            if kind == "DiffuSSM":
                ours.ssm.convolution = theirs.ssm.convolution
            ours.compile()
        del model, plain
        step = make_step(compiled, batch, "bf16")
        loss = float(step())
        if not abs(loss / first - 1) < 1e-2:
            raise RuntimeError(f"the compiled loss is {loss}, the other {first}")
    seconds, _ = quiet_runs(kind, {kind: step}, runs=sizes.runs, warmup=3)
    median = statistics.median(seconds[kind])
    facts |= {"images_per_second": batch / median, "seconds": seconds[kind]}
    if device.type == "cuda":
        facts["peak_bytes"] = torch.cuda.max_memory_allocated()
    if peak is not None:
        facts["mfu"] = round(
            6 * macs * batch / median / peak, 4
        )  # a multiply-add is two, backward twice forward
    kinds = time_by_kind(step)
    facts["profile"] = kinds
    facts["share_outside"] = 1 - (kinds["matrix products"] + kinds["attention"]) / sum(kinds.values())
    return facts


def sampling(sizes: Sizes, device: torch.device) -> list[Row]:
    """One image with kept kernels against computing them at every step; images/s of guided batches."""
    rows = []
    depth = (sizes.blocks or {"DiffuSSM": 29})["DiffuSSM"]
    for size in sizes.sizes:
        config = DiffuSSMConfig(
            **PRESETS["DiffuSSM-XL"] | {"input_size": size, "n_blocks": depth, "d_model": sizes.width}
        )
        model = make_model("DiffuSSM", config, str(device)).eval()
        sides = {
            name: autocast(sampling_job(side, sizes.steps), device)
            for name, side in (("computed at every step", Uncached(model)), ("kept", model))
        }
        what = f"sampling, {size} x {size}, batch 1, {sizes.steps} steps"
        require_agreement(what, *(side() for side in sides.values()), 0.0)
        rows.append(attempt(what, ratio, what, sides, sizes.runs, size=size))
        for batch in sizes.batches[:3]:
            job = autocast(sampling_job(model, sizes.steps, batch, 1.5), device)
            seconds = alternate({"guided": job}, runs=2)["guided"]
            per_second = batch / statistics.median(seconds) * sizes.steps / 250
            rows.append(
                {
                    "what": f"sampling, {size} x {size}, batch {batch}, guided, as of 250 steps",
                    "images_per_second": per_second,
                    "seconds": seconds,
                    "batch": batch,
                    "size": size,
                }
            )
    return rows


SECTIONS = {
    "kernel": kernel,
    "bidirectional": bidirectional,
    "convolutions": convolutions,
    "blocks": blocks,
    "training": training,
    "sampling": sampling,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on any machine; writes nothing")
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all"
    )
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.rehearse:
        print(
            "error: PyTorch sees no GPU here; --rehearse walks the same way with tiny sizes", file=sys.stderr
        )
        return 2
    sizes = REHEARSAL if arguments.rehearse else Sizes()
    file = RESULTS / "gpu.json"
    record = json.loads(file.read_text()) if file.exists() and not arguments.rehearse else {}
    record |= {"environment": environment(), "precision": "bf16 autocast, blocks compiled"}
    failed = 0
    for name in arguments.sections:
        start = time.perf_counter()
        try:
            record[name] = SECTIONS[name](sizes, device)
        except Exception as error:
            traceback.print_exc()
            record[name] = [{"what": name, "error": f"{type(error).__name__}: {error}"}]
        faults = [row for row in record[name] if "error" in row]
        failed += sum(not row["error"].startswith("Noise") for row in faults)
        print(
            f"{name}: {len(record[name])} rows, {len(faults)} failed, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        for row in faults:
            print(f"  {row.get('what', '')}: {row['error'][:300]}")
        if not arguments.rehearse:  # after each section: what was measured stays, whatever comes
            RESULTS.mkdir(exist_ok=True)
            file.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {file}" if not arguments.rehearse else "a rehearsal: nothing was written")
    return 1 if arguments.rehearse and failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
