"""What the kernels take of a GPU, compiled for two generations without one.

Command: ``python -m benchmarks.compiled``.

Each kernel that multiplies, with 64 states at XL width, is compiled down to machine
code for compute capability 8.0 (A100) and 9.0 (H100, H200). The compiler then knows how
much memory of the chip a program takes, how many bytes of registers a thread spills,
and how many products are left to tensor cores. Wanted are at most 100 kB and no spills.
Kernels that share precision, chunk and warps are listed one by one.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.common import command, report
from diffussm import chunked_kernels, gpu_kernels

MOST = 100  # kB of the chip's memory for one program
CHIPS = {80: "sm_80", 90: "sm_90a"}  # what the assembler calls them
PRODUCT = r"\b(?:wgmma\.mma_async|mma\.sync)\S*\."  # of a group of warps, or of one
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"

# kernel, precision, chunk, warps, pass: by default, and as the autotuning tries them
CHUNKS = (
    ("walk", "bf16", 16, 8, ""),
    ("walk", "bf16", 16, 8, "from"),
    ("modes", "bf16", 16, 8, ""),
    ("modes", "bf16", 16, 8, "from"),
    ("walk", "bf16", 16, 8, "to"),
    ("modes", "bf16", 16, 8, "to"),
    ("walk", "bf16", 16, 4, ""),
    ("modes", "bf16", 16, 4, ""),
    ("walk", "bf16", 16, 16, ""),
    ("walk", "bf16", 32, 8, ""),
    ("modes", "bf16", 32, 8, ""),
    ("walk", "bf16", 32, 16, ""),
    ("walk", "tf32", 16, 8, ""),
    ("modes", "tf32", 16, 8, ""),
    ("walk", "tf32x3", 16, 4, ""),
    ("modes", "tf32x3", 16, 4, ""),
    ("walk", "tf32x3", 16, 4, "from"),
    ("modes", "tf32x3", 16, 4, "from"),
    ("walk", "tf32x3", 16, 4, "to"),
    ("modes", "tf32x3", 16, 4, "to"),
    ("walk", "tf32x3", 16, 8, ""),
    ("modes", "tf32x3", 16, 8, ""),
    ("modes", "tf32x3", 32, 8, ""),
    ("walk", "tf32x3", 16, 16, ""),
    ("walk", "tf32x3", 32, 8, ""),
    ("walk", "tf32x3", 32, 16, ""),
)
FOUR_STEPS = [
    (kernel, precision, length)
    for precision in ("tf32", "tf32x3")
    for length in gpu_kernels.LENGTHS
    for kernel in ("forward", "grad_u", "grad_h")
]


def compiled(
    kernel: Any, constants: dict[str, Any], wide: str, options: dict[str, int]
) -> dict[str, int]:
    """What one kernel takes on each chip; ``wide`` is the type of its large tensors."""
    kinds = dict.fromkeys(("x", "y", "u", "g", "grad", "grad_u"), wide)
    kinds |= dict.fromkeys(constants, "constexpr")
    kinds |= dict.fromkeys(("B", "L", "D", "X", "SLICES"), "i32")
    signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
    even = {  # as at a call with D = 1152: sizes and addresses that 16 divides
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in ("D", "X")
    }
    product = PRODUCT + constants["PRECISION"].removesuffix("x3")  # of these factors
    source, taken = ASTSource(kernel, signature, constants, even), {}
    for chip, target in CHIPS.items():
        code = triton.compile(source, GPUTarget("cuda", chip, 32), options)
        taken[f"shared memory, {target}"] = code.metadata.shared
        taken[f"spilt, {target}"] = spilt(code.asm["ptx"], target)
        taken[f"tensor cores, {target}"] = len(re.findall(product, code.asm["ptx"]))
    return taken


def spilt(code: str, target: str) -> int:
    """Bytes that a thread stores because it has no register for them."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(code)
        told = [PTXAS, "-v", "--gpu-name", target, "kernel.ptx", "-o", "/dev/null"]
        done = subprocess.run(
            told, cwd=folder, capture_output=True, text=True, check=True
        )
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", done.stderr))


def of_chunks(
    name: str, precision: str, chunk: int, warps: int, which: str
) -> dict[str, int]:
    """A kernel that goes chunk by chunk."""
    constants = {"N": 32, "CHANNELS": warps, "PRECISION": precision, "PASS": which}
    constants |= {
        "walk": {"T": chunk, "ADJOINT": which == "from"},
        "modes": {"T": 16, "LAGS": chunk},
    }[name]
    options = {"num_warps": warps, "num_stages": 4 if precision == "bf16" else 2}
    kernel = getattr(chunked_kernels, f"{name}_kernel")
    wide = "*bf16" if precision == "bf16" else "*fp32"
    return compiled(kernel, constants, wide, options)


def of_four_steps(name: str, precision: str, length: int) -> dict[str, int]:
    """A kernel that transforms in four steps."""
    n1, n2 = gpu_kernels.factors(length)
    constants = {"N1": n1, "N2": n2, "PRECISION": precision}
    kernel = getattr(gpu_kernels, f"_{name}_kernel")
    options = {"num_warps": gpu_kernels.warps(length)}
    return compiled(kernel, constants, "*bf16", options)


def rows() -> Iterator[dict[str, Any]]:
    """A row for each kernel, with what it is and what it takes."""
    for case in CHUNKS:
        kernel, precision, chunk, warps, which = case
        what = f"chunks of {chunk}, {warps} warps: {f'{kernel} {which}'.strip()}"
        yield row_of(what, precision, of_chunks(*case)) | {"case": [*case]}
    for name, precision, length in FOUR_STEPS:
        taken = of_four_steps(name, precision, length)
        what = f"four steps, L = {length}: {name}"
        yield row_of(what, precision, taken) | {"case": [name, precision, length]}


def row_of(what: str, precision: str, taken: dict[str, int]) -> dict[str, Any]:
    """A row of the report, with its verdict."""
    spills = any(n for key, n in taken.items() if key.startswith("spilt"))
    memory = max(n for key, n in taken.items() if key.startswith("shared"))
    reached = memory <= 1024 * MOST and not spills
    limit = f"{MOST} kB, 0 spilt"
    facts = {"what": what, "precision": precision, **taken}
    return {**facts, "limit": limit, "reached": reached}


def main(argv: list[str] | None = None) -> int:
    """Compile all, print them, write benchmarks/results/compiled.json."""
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled", description=description
    )
    parser.parse_args(argv)
    title = f"Kernels compiled by Triton {triton.__version__}, bytes"
    return report("compiled", title, [*rows()], settings={"triton": triton.__version__})


if __name__ == "__main__":
    raise SystemExit(command(main))
