#!/usr/bin/env bash
# All that GPUs can tell: twenty steps in every way of training, killed and resumed, against a CPU's losses; the tests
# that need a GPU; then, on one, throughput, memory, MFU and sampling of the XL model against DiT, in bfloat16 and
# compiled. Writes benchmarks/results/matrix.json and gpu.json; the chapter on profiling reads the second.
# Options go to `python -m benchmarks.gpu`, for instance --sections training, or --rehearse without a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
make --no-print-directory venv export
if [[ " $* " == *" --rehearse "* ]]; then
    .venv/bin/python -m benchmarks.matrix --rehearse
else
    .venv/bin/python -m benchmarks.matrix  # ends the script if one way learns something else
    .venv/bin/python -m pytest -m gpu -q tests
fi
exec .venv/bin/python -m benchmarks.gpu "$@"
