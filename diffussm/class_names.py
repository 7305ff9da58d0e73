"""Classes by name.

Generated from book/60_class_names.md by `make export`: edit there.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from diffussm.guards import expect_int

__all__ = ["label_table", "class_numbers", "check_names"]


def label_table(id2label: Mapping[str, str]) -> dict[str, list[int]]:
    """Every name and synonym, with the numbers of the classes that bear it."""
    table: dict[str, list[int]] = {}
    for number, names in id2label.items():
        synonyms = [names, *(part.strip() for part in names.split(","))]
        for name in dict.fromkeys(synonyms):
            table.setdefault(name, []).append(int(number))
    return table


def class_numbers(labels: Any, table: dict[str, list[int]], classes: int) -> list[int]:
    """Class numbers of labels given by name or number: one, or an array, tensor or
    (nested) list of them.

    Raises:
        ValueError: an unknown name (with the nearest known), an ambiguous one, a number
            out of range.
        TypeError: neither name nor number.
    """
    if isinstance(labels, Tensor | np.ndarray | np.generic):
        labels = labels.tolist()
    if isinstance(labels, str):
        return [_numbered(table, labels)]
    if isinstance(labels, Iterable):
        return [n for label in labels for n in class_numbers(label, table, classes)]
    return [expect_int("class label", labels, least=0, most=classes - 1)]


def check_names(names: dict[str, Any], classes: int) -> None:
    """Refuse a table of names that is not one of class numbers."""
    for number, name in names.items():
        known = number.isdecimal() and int(number) < classes
        if not (known and isinstance(name, str)):
            raise ValueError(
                f"id2label has {number!r}: {name!r}, but classes are 0 to {classes - 1}"
            )


def _numbered(table: dict[str, list[int]], name: str) -> int:
    """The number of the one class that bears a name."""
    if name not in table:
        near = difflib.get_close_matches(name, table, n=3) or [*table][:12]
        told = ", ".join(map(repr, near))
        raise ValueError(f"no class {name!r}; did you mean {told}?")
    number, *others = table[name]
    if others:
        raise ValueError(f"{name!r} names the classes {table[name]}; give the number")
    return number
