"""Ratios measured side by side, one command each: ``python -m benchmarks.kernel`` and its siblings."""
