"""What the committed rows of the studies say, as lines of a page's tables.

A study is a YAML file in the folder `studies`; its rows are a file of that name in
`results`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from diffussm.study import read_study
from diffussm.study_report import Answer, answers, bootstrap
from diffussm.study_runs import Row, read_rows

__all__ = [
    "answered",
    "by_loss",
    "effect",
    "filled",
    "lines_of",
    "rows_of",
    "verdict_of",
]

Answers = dict[str, Answer]


def rows_of(studies: Path, name: str) -> list[Row]:
    """The committed rows of a study."""
    return read_rows(studies / "results" / f"{name}.jsonl")


def answered(studies: Path, name: str, chain: str | None = None) -> Answers:
    """What the rows say to each question; `chain`: by the bound of so many steps."""
    rows = rows_of(studies, name)
    if chain:
        known = [{chain: row["bits_per_dim"][chain]} for row in rows]
        rows = [row | {"bits_per_dim": k} for row, k in zip(rows, known, strict=True)]
    return answers(read_study(studies / f"{name}.yaml"), rows)


def by_loss(answer: Answer) -> Answer:
    """The same rows, compared by the loss of held-out images."""
    return replace(answer, question=replace(answer.question, by="loss", margin=0))


def effect(differences: Sequence[float], digits: int = 3) -> str:
    """The mean of the differences and the interval of it, for a reader."""
    ends = (np.mean(differences), *bootstrap(differences))
    mean, low, high = (f"{round(v, digits) + 0.0:+.{digits}f}" for v in ends)
    return f"{mean} ({low}\xa0to\xa0{high})".replace("-", "−")


def verdict_of(answer: Answer) -> str:
    """The verdict and the effect, if three seeds are there."""
    if len(answer.differences) < 3:
        return "diverged" if answer.lost else "–"
    word = answer.verdict.removesuffix(" at this scale")
    return f"{word}: {effect(answer.differences)}"


def claim_of(name: str, found: Iterable[Answer]) -> str:
    """What is claimed, and what is compared: as the study says that has the rows."""
    asked = max(found, key=lambda answer: len(answer.differences)).question
    margin = f", margin {asked.margin:g}" * (asked.margin > 0)
    told = f"{asked.claim} ({asked.first} minus {asked.second}{margin})"
    return f"**{name}**: {told.replace('*', chr(92) + '*')}"  # a star is no markup


def lines_of(
    told: Callable[[Answer], str],
    *studies: Answers,
    heading: Callable[[str, Iterable[Answer]], str] = claim_of,
) -> Iterator[tuple[str, ...]]:
    """A line for each question: its heading, and what is told of it by each study."""
    for name in {name: 0 for found in studies for name in found}:
        head = heading(name, [found[name] for found in studies if name in found])
        yield head, *(told(found[name]) if name in found else "–" for found in studies)


def filled(
    columns: Sequence[str], lines: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """A table's columns and lines, without the columns that hold only dashes."""
    kept = [k for k, cells in enumerate(zip(*lines, strict=True)) if {*cells} != {"–"}]
    return [columns[k] for k in kept], [[line[k] for k in kept] for line in lines]
