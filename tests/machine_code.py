"""What tests of Triton's kernels share: a program that compiles without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


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
