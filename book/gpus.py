"""What ``benchmarks/gpu.sh`` recorded, for the pages that read it.

A record is of one GPU, whichever it was, and may lack any section, row or figure: one
section was run, memory did not suffice, runs were noisy. So a page takes what is there
and writes a sentence where it has the figures.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from IPython.display import Markdown, display

__all__ = ["Gpu", "gpus", "listed", "paragraphs", "way_of"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Gpu:
    """A GPU and what was measured on it.

    Attributes:
        name: "H100"; with the file where another record is of such a GPU too.
        file: Where its record is stored.
        record: What the file holds.
    """

    name: str
    file: str
    record: dict[str, Any]

    @property
    def where(self) -> str:
        """The GPU as it calls itself, the version of PyTorch and the date."""
        said = self.record["environment"]
        version = said["torch"].partition("+")[0]
        return f"{said['gpu']}, PyTorch {version}, {said['date']}"

    def rows(self, section: str, *needed: str, **wanted: Any) -> list[Row]:
        """The rows of a section with what is needed, and as they are wanted."""
        return [
            row
            for row in self.record.get(section, [])
            if all(row.get(key) is not None for key in needed)
            and all(row.get(key) == value for key, value in wanted.items())
        ]

    def row(self, section: str, *needed: str, **wanted: Any) -> Row:
        """The first of these rows, or nothing."""
        return next(iter(self.rows(section, *needed, **wanted)), {})


def gpus(records: dict[str, Any]) -> list[Gpu]:
    """The GPUs of these records, by the names of their files."""
    found = {file: record for file, record in records.items() if record}
    names = {file: _short(one["environment"]["gpu"]) for file, one in found.items()}
    many = Counter(names.values())
    for file, name in names.items():
        names[file] = name if many[name] == 1 else f"{name} of {file}.json"
    return [Gpu(names[file], f"{file}.json", record) for file, record in found.items()]


def _short(name: str) -> str:
    """ "H100" of "NVIDIA H100 80GB HBM3": the first word with a digit."""
    words = re.split(r"[\s-]+", name)
    return next((word for word in words if re.search(r"\d", word)), name)


def way_of(row: Row) -> str:
    """How the layer of a row was run: "FFT", "chunks" or "four steps"."""
    told = row.get("convolution", "FFT")  # where nothing is said there was no choice
    if "chunk" in told:
        return "chunks"
    return "four steps" if told == "triton" or "on the chip" in told else "FFT"


def listed(values: Iterable[object], form: str = "{}") -> str:
    """Such as "0.62, 0.89 and 1.36"."""
    *first, last = (form.format(value) for value in values)
    return f"{', '.join(first)} and {last}" if first else last


def paragraphs(texts: Iterable[str]) -> None:
    """Show texts that a record has made as those of the page."""
    display(Markdown("\n\n".join(texts)))
