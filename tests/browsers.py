"""What a test does where something that it needs is missing."""

from __future__ import annotations

import os

import pytest


def absent(reason: str, variable: str) -> None:
    """Skip, or fail where the environment says that this must be there."""
    if os.environ.get(variable):
        pytest.fail(f"{reason} ({variable} is set)", pytrace=False)
    pytest.skip(reason)
