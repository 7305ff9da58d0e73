"""The quick mode of the pages that take long: ``QUICK=1`` in the environment.

Smaller counts take the place of those of the book, and training begins with the weights
that the package carries. A claim that needs the whole run is then not checked, and the
page says so (`unchecked`).
"""

from __future__ import annotations

import os

__all__ = ["QUICK", "unchecked"]

QUICK = os.environ.get("QUICK", "") not in ("", "0")


def unchecked(claim: str) -> None:
    """Print that a claim of the page is not checked in quick mode."""
    print(f"QUICK=1: too short to check that {claim}")
