"""Ratios measured side by side, one command each."""
