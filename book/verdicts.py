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
from diffussm.study_report import Answer, answers, bootstrap, summary
from diffussm.study_runs import Row, read_rows

__all__ = [
    "answered",
    "by_chain",
    "by_loss",
    "effect",
    "filled",
    "lines_of",
    "rows_of",
    "runs_once",
    "verdict_of",
    "with_rows",
]

Answers = dict[str, Answer]


def rows_of(studies: Path, name: str) -> list[Row]:
    """The committed rows of a study."""
    return read_rows(studies / "results" / f"{name}.jsonl")


def answered(studies: Path, name: str) -> Answers:
    """What the rows say to each question of a study."""
    return answers(read_study(studies / f"{name}.yaml"), rows_of(studies, name))


def with_rows(answer: Answer, change: Callable[[Row], Row]) -> Answer:
    """The same question, to rows that are changed."""
    every = answer.rows.items()
    rows = {run: {seed: change(row) for seed, row in of.items()} for run, of in every}
    return replace(answer, rows=rows)


def by_chain(answer: Answer, steps: str) -> Answer:
    """The same rows, compared by the bound of a chain of so many steps."""

    def alone(row: Row) -> Row:
        return row | {"bits_per_dim": {steps: row["bits_per_dim"][steps]}}

    return with_rows(answer, alone)


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


def runs_once(found: Answers) -> Iterator[tuple[str, dict[str, str], list[Row]]]:
    """The line of each run with its rows, once; the question stands at its first."""
    told = set()
    for name, answer in found.items():
        title = f"**{name}**"
        for line in summary(answer):
            rows = list(answer.rows.get(line["run"], {}).values())  # none: real images
            run = frozenset((row["digest"], row["scale"]) for row in rows)
            if run and run not in told:
                told.add(run)
                yield title, line, rows
                title = ""


def filled(
    columns: Sequence[str], given: Iterable[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """A table's columns and lines, without the columns that hold only dashes."""
    lines = list(given)
    kept = [k for k, cells in enumerate(zip(*lines, strict=True)) if {*cells} != {"–"}]
    return [columns[k] for k in kept], [[line[k] for k in kept] for line in lines]
