"""Launches and bytes of a block, as it is written and as torch.compile fuses it.

Command: ``python -m benchmarks.traffic``. It needs no GPU.

Blocks of XL width in bfloat16 run forward and backward on tensors without content.
`as written` counts every operation of PyTorch, `compiled` every kernel that the
compiler plans: its plan is made, no code is made of it, and nothing runs. It is the
plan for a CPU, since without a GPU there is no other. With the chunks the forward pass
is counted by itself, too, for the batches of a sampler. An operator of ours counts by
what it does inside. Of small kernels (less than a megabyte) only the number is kept.
The chapter on traffic draws from what this command wrote.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.common import RESULTS, command, environment
from diffussm import fft_convolution
from diffussm.bidirectional import way
from diffussm.efficiency import DiTBlock
from diffussm.hourglass import HourglassBlock
from diffussm.traffic import Work, work_of

CASES = ((1024, 32), (4096, 16), (16384, 2))  # L, B, as in benchmarks.gpu
SAMPLED = ((1024, 128), (4096, 128))  # forward pass only: 64 guided images
CHUNKS = "DiffuSSM, chunks"
FORWARD = f"{CHUNKS}, forward pass"
BLOCKS: dict[str, type[nn.Module]] = {
    "DiffuSSM": HourglassBlock,
    CHUNKS: HourglassBlock,
    "DiT": DiTBlock,
}
STATES, CHUNK = 64, 16  # N of a block, and the positions of a chunk
OURS = "convolve", "chunked"  # how the names of our own operators begin
VIEWS = {"view", "unsqueeze", "permute", "squeeze"}
LEAST = 1e6  # bytes
Job = Callable[[], object]


def block_job(
    kind: str,
    batch: int,
    length: int,
    width: int,
    compiled: Any = None,
    backward: bool = True,
) -> Job:
    """Forward pass of a block, its spectra or modes given, and its backward pass."""
    block = BLOCKS[kind](width)
    x = torch.zeros(batch, length, width)
    inputs = [x, torch.zeros(batch, width)]
    if isinstance(block, HourglassBlock):
        inputs[0] = x[:, : length // block.downsample]
        if kind == CHUNKS:
            block.ssm.convolution = way("chunked_triton")
        inputs.append(block.ssm.prepare(length).detach())
    inputs = [tensor.contiguous().requires_grad_(backward) for tensor in inputs]
    run = torch.compile(block, backend=compiled, fullgraph=True) if compiled else block

    def job() -> None:
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(backward):
            y = run(*inputs)
        if backward:
            y.backward(torch.empty_like(y))

    return job


def spectra_job(length: int, width: int) -> Job:
    """The spectra of a block and their gradients: what needs no image."""
    layer = HourglassBlock(width).ssm

    def job() -> None:
        spectra = layer.spectra(length)
        spectra.backward(torch.empty_like(spectra))

    return job


def plan(graph_module: torch.fx.GraphModule) -> list[Any]:
    """The kernels that the compiler would generate or call, in their order."""
    from torch._inductor import compile_fx  # takes seconds to import
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    inputs = [n.meta["val"] for n in graph_module.graph.nodes if n.op == "placeholder"]
    fake = next(x.fake_mode for x in inputs if isinstance(x, torch.Tensor))
    with V.set_fake_mode(fake):
        compile_fx._recursive_post_grad_passes(graph_module, False)
        compile_fx._recursive_record_original_output_strides(graph_module)
        graph = GraphLowering(graph_module, compile_fx.shape_env_from_inputs(inputs))
        with V.set_graph_handler(graph), V.set_real_inputs(inputs), DebugContext():
            graph.run(*inputs)
            graph._update_scheduler()
            return [_work(node) for node in graph.scheduler.nodes if _runs(node)]


def _runs(node: Any) -> bool:
    """Whether it is a kernel: not a view, not one of several outputs, not ours."""
    if type(node).__name__ == "NopKernelSchedulerNode":
        return False
    inner = node.get_nodes()[0].node
    ours = getattr(inner, "op_overload", None) in fft_convolution.BODIES
    return not ours and type(inner).__name__ != "MultiOutput"


def _work(node: Any) -> Work:
    inner = node.get_nodes()[0].node
    called = getattr(inner, "python_kernel_name", None)
    flops = float(node.estimate_flops() or 0)
    if called and "attention" in called:
        flops = _attention_flops(inner, backward="backward" in called)
    part = "linear maps" if flops else "element-wise"
    moved = float(node.get_read_write_buffers_sizes())
    return Work(part, called or f"loop: {_steps(node)}", flops, moved)


def _steps(node: Any) -> str:
    """What a fused loop computes: the operations it was made of, in their order."""
    origins = {one for inner in node.get_nodes() for one in inner.node.get_origins()}
    graph = next((one.graph.nodes for one in origins), ())
    steps = (one for one in graph if one in origins and one.op == "call_function")
    names = (getattr(one.target, "__name__", "").partition(".")[0] for one in steps)
    return ", ".join(dict.fromkeys(names))


def _attention_flops(inner: Any, backward: bool) -> float:
    """Two products forwards and five backwards, of L x L by heads and d each."""
    batch, heads, length, d = map(int, inner.inputs[0].get_size())
    return (5 if backward else 2) * 2.0 * batch * heads * length**2 * d


@contextmanager
def pieces_of_a_gpu() -> Iterator[None]:
    """The FFT takes the channels in the pieces that a GPU would be given."""
    of_a_gpu = fft_convolution._PIECE_ON_GPU
    with mock.patch.object(fft_convolution, "_PIECE", of_a_gpu):
        yield


def planned(
    kind: str, batch: int, length: int, width: int, backward: bool = True
) -> list[Work]:
    """The kernels of the compiled block, but for those inside our own operators."""
    from torch._inductor import compile_fx

    kernels: list[Work] = []

    def inner_compile(graph: torch.fx.GraphModule, *_: Any, **__: Any) -> Any:
        with _disable_current_modes():
            kernels.extend(plan(graph))
        return compile_fx.make_boxed_func(graph.forward)

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return compile_fx.compile_fx(graph, inputs, inner_compile=inner_compile)

    torch._dynamo.reset()
    with FakeTensorMode():
        block_job(kind, batch, length, width, backend, backward)()
    return kernels


def as_run(work: Work, batch: int, length: int, width: int) -> Work:
    """A kernel of the chunks with its operations, of which PyTorch knows nothing.

    Each number of both directions meets T positions that are near, intake and readout
    (N each); for the gradient of the modes two intakes and two readouts. A pass "to"
    the states takes in only, and leaves alone the output, or the gradient, that it is
    handed.
    """
    kernel, _, only = work.name.partition("_kernel")
    if kernel not in ("walk", "modes"):
        return work
    numbers, states = 2.0 * batch * length * width, {"walk": 1, "modes": 2}[kernel]
    if only == " to":
        flops, moved = 2 * numbers * states * STATES, work.bytes - 2 * numbers
    else:
        flops, moved = 2 * numbers * (CHUNK + 2 * states * STATES), work.bytes
    return replace(work, flops=flops, bytes=moved)


def both_ways(
    kind: str, batch: int, length: int, width: int, backward: bool = True
) -> tuple[list[Work], list[Work]]:
    """The kernels of a block as it is written, and as it is compiled."""
    job = partial(block_job, kind, batch, length, width, backward=backward)
    written = work_of(job)
    if kind == CHUNKS:
        written = [as_run(one, batch, length, width) for one in written]
    inside = [one for one in written if one.part.startswith(OURS)]
    return written, planned(kind, batch, length, width, backward) + inside


def cases(width: int) -> Iterator[dict[str, Any]]:
    """What is counted."""
    for length, batch in SAMPLED:
        sizes = {"length": length, "batch": batch}
        _, fused = both_ways(CHUNKS, batch, length, width, backward=False)
        yield {"block": FORWARD, "how": "compiled", **sizes, **packed(fused)}
    for length, batch in CASES:
        sizes = {"length": length, "batch": batch}
        with pieces_of_a_gpu():
            for kind in BLOCKS:
                written, fused = both_ways(kind, batch, length, width)
                for how, kernels in (("as written", written), ("compiled", fused)):
                    yield {"block": kind, "how": how, **sizes, **packed(kernels)}
            spectra = work_of(partial(spectra_job, length, width))
            yield {"block": "spectra", "how": "as written", **sizes, **packed(spectra)}


def packed(kernels: list[Work]) -> dict[str, Any]:
    """As text, one line a kernel; of small ones only how many there are, and of all how
    many do nothing but convert a precision.
    """
    large = [work for work in kernels if work.bytes >= LEAST]
    lines = [f"{w.part}; {w.name}; {w.flops:.6g}; {w.bytes:.6g}" for w in large]
    casts = sum(_converts(work.name) for work in kernels)
    return {"small": len(kernels) - len(large), "casts": casts, "kernels": lines}


def _converts(name: str) -> bool:
    """Whether a kernel only converts a precision, and perhaps lays out anew."""
    steps = set(name.removeprefix("loop: ").split(", "))
    return steps - VIEWS <= {"convert_element_type", "_to_copy"}


def main(argv: list[str] | None = None) -> int:
    """Count, print the sums, write benchmarks/results/traffic.json."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.traffic", description=(__doc__ or "").splitlines()[0]
    )
    text = "D, a multiple of 16; only 1152 is written"
    parser.add_argument("--width", type=int, default=1152, help=text)
    width: int = parser.parse_args(argv).width
    if width < 16 or width % 16:
        parser.error("--width must be a positive multiple of 16")
    rows, lines = [], ["| block | kernels | GB |", "|---|---|---|"]
    for row in cases(width):
        moved = sum(float(line.split("; ")[3]) for line in row["kernels"]) / 1e9
        launches = row["small"] + len(row["kernels"])
        what = f"{row['block']} {row['how']}, L = {row['length']}, B = {row['batch']}"
        print(f"{what}: {launches} kernels, {moved:.2f} GB", flush=True)
        rows.append({"what": what, **row})
        lines.append(f"| {what} | {launches} | {moved:.2f} |")
    if width == 1152:
        title = f"Kernels of a block, forward + backward, D = {width}, bfloat16"
        record = {"title": title, "environment": environment(), "rows": rows}
        text = json.dumps(record, indent=1)
        (RESULTS / "traffic.json").write_text(text + "\n")
        machine = ", ".join(f"{key} {value}" for key, value in environment().items())
        foot = ["", f"{machine}; `python -m benchmarks.traffic`", ""]
        table = "\n".join([f"## {title}", "", *lines, *foot])
        (RESULTS / "traffic.md").write_text(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(command(main))
