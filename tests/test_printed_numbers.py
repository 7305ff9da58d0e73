"""Computed numbers stand in a sentence as written ones do."""

from __future__ import annotations

import sys

import pytest

from tools.book import ROOT

sys.path.insert(0, str(ROOT / "book" / "_ext"))
from printed_numbers import printed  # type: ignore[import-not-found]


@pytest.mark.parametrize(
    ("computed", "on_the_page"),
    [
        ("-5.0", "−5.0"),
        ("-0.1 %", "−0.1 %"),
        ("+3", "+3"),
        ("6e-06", "6\xa0·\xa010⁻⁶"),
        ("-1.7e+12", "−1.7\xa0·\xa010¹²"),
        ("1500", "1,500"),
        ("2909.05", "2,909.05"),
        ("19,532.1", "19,532.1"),
        ("0001", "0001"),
        ("2026-11-23", "2026‑11‑23"),
        ("2 cores, 2026-11-23", "2 cores, 2026‑11‑23"),
        ("12026-11-23", "12026-11-23"),
        ("-x", "-x"),
        ("1-2", "1-2"),
        ("", ""),
    ],
)
def test_numbers_are_printed_as_the_text_writes_them(
    computed: str, on_the_page: str
) -> None:
    assert printed(computed) == on_the_page
