"""Folded cells say what they are."""

from __future__ import annotations

import sys

import pytest

from tools.book import ROOT

sys.path.insert(0, str(ROOT / "book" / "_ext"))
import folds  # type: ignore[import-not-found]


@pytest.mark.parametrize(
    ("code", "title"),
    [
        ("import math\nfrom torch import nn\n", "Imports of the module"),
        ("from typing import TypeVar\nT = TypeVar('T')\n", "Imports of the module"),
        ("_MOST = 3\n", "Constants"),
        ('if __name__ == "__main__":\n    f()\n', "When it is run"),
        ("def _check_it(x):\n    pass\n", "Guards: _check_it"),
        ("def __post_init__(self):\n    pass\n", "Guards"),
        ("def check_a(): ...\ndef shown(): ...\n", "Details: check_a, shown"),
        (
            "class A: ...\nclass B: ...\nclass C: ...\nclass D: ...\n",
            "Details: A, B, C, …",
        ),
    ],
)
def test_plumbing_of_the_package_is_named_after_what_it_has(
    code: str, title: str
) -> None:
    assert folds.title_of_plumbing(code) == title


def test_preparations_that_only_import_say_so() -> None:
    assert folds.title_of_preparations("import math\n") == "Imports for this page"
    assert folds.title_of_preparations("import math\nx = 1\n") == "Preparations"
