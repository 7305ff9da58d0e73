"""What tests of Triton's kernels share: a program that compiles without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CHIPS = "sm_80", "sm_90a"
PROGRAM = """
import json, sys
from benchmarks import compiled
for row in json.loads(sys.argv[2]):
    found = getattr(compiled, sys.argv[1])(*row["case"])
    for name, size in found.items():
        kept = size >= row[name] if name.startswith("tensor") else size <= row[name]
        assert kept, f"{row['what']}: {name}: {size}, recorded were {row[name]}"
print("compiled")
"""


def compile_again(rows: list[dict[str, Any]], how: str, folder: Path) -> None:
    """Rows of `benchmarks.compiled`: a kernel takes no more than was recorded."""
    compile_elsewhere(PROGRAM, folder, how, json.dumps(rows))


def compile_elsewhere(program: str, folder: Path, *arguments: str) -> None:
    """Run a program that ends with "compiled" in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout.strip() == "compiled", done.stderr[
        -2000:
    ]
