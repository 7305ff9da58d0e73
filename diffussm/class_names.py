"""Classes by name.

Generated from book/60_class_names.md by `make export`: edit there.
"""

import difflib
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

import numpy as np
from torch import Tensor

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
    return [_checked_number(labels, classes)]


def check_names(names: dict[str, Any], classes: int) -> None:
    """Refuse a table of names that is not one of class numbers."""
    for number, name in names.items():
        known = number.isdecimal() and int(number) < classes
        if not known or not isinstance(name, str):
            raise ValueError(
                f"id2label has {number!r}: {name!r}, but the classes are 0 to "
                f"{classes - 1}"
            )


def _numbered(table: dict[str, list[int]], name: str) -> int:
    """The number of the one class that bears a name."""
    if name not in table:
        near = ", ".join(difflib.get_close_matches(name, table, n=3))
        known = f"known are {', '.join([*table][:12])}"
        raise ValueError(
            f"this model has no class {name!r}; "
            f"{f'did you mean {near}?' if near else known}"
        )
    if len(table[name]) > 1:
        raise ValueError(
            f"{name!r} is the name of classes {table[name]}; give the number"
        )
    return table[name][0]


def _checked_number(label: Any, classes: int) -> int:
    if isinstance(label, bool) or not isinstance(label, Integral):
        raise TypeError(f"class label {label!r}: expected a name or an integer")
    if not 0 <= int(label) < classes:
        raise ValueError(
            f"class label {label}: this model has classes 0 to {classes - 1}"
        )
    return int(label)
