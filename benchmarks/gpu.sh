#!/usr/bin/env bash
# All that one GPU can tell: the tests that need one, then throughput, memory, MFU and sampling of the XL model
# against DiT, in bfloat16 and compiled. Writes benchmarks/results/gpu.json, which the chapter on efficiency reads.
# Options go to `python -m benchmarks.gpu`, for instance --sections training, or --rehearse without a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
make --no-print-directory venv export
if [[ " $* " != *" --rehearse "* ]]; then
    .venv/bin/python -m pytest -m gpu -q tests
fi
exec .venv/bin/python -m benchmarks.gpu "$@"
