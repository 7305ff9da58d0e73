"""Ratios measured side by side, one command each, such as `python -m benchmarks.kernel`."""
