"""What a study says.

Generated from book/93_study_report.md by `make export`: edit there.
"""

import itertools
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffussm.files import whole_file
from diffussm.guards import explain, refuse
from diffussm.study import Question, Study, as_asked, runs_of, step_seconds
from diffussm.study_runs import Row

__all__ = [
    "bootstrap",
    "verdict",
    "Answer",
    "answers",
    "summary",
    "draw_answer",
    "draw_guidance",
    "write_report",
    "effect_of",
]


def bootstrap(differences: Sequence[float]) -> tuple[float, float]:
    """Ends of the 95% interval of the mean, over all resamples, or 10,000 of them."""
    values = np.asarray(differences, dtype=float)
    n = len(values)
    if n <= 6:
        places = np.array(list(itertools.product(range(n), repeat=n)))
    else:
        places = np.random.default_rng(0).integers(n, size=(10_000, n))
    means = values[places].mean(1)
    low = np.quantile(means, 0.025, method="lower")
    return float(low), float(np.quantile(means, 0.975, method="higher"))


def verdict(differences: Sequence[float], margin: float = 0.0) -> str:
    """What the rule says of a claim, whatever anyone hoped for."""
    if len(differences) < 3:
        return "not yet run"
    low, high = bootstrap(differences)
    if high < margin:
        return "supported at this scale"
    return "not supported" if low > margin else "undecided"


@dataclass(frozen=True)
class Answer:
    """What the rows say to a question: the rows of each run, by seed."""

    question: Question
    rows: dict[str, dict[int, Row]]
    diverged: frozenset[str] = frozenset()  # runs of which a seed did
    seeds: int = 3  # of each run, when all are there

    def measured(self, name: str) -> dict[int, float]:
        """What the question is decided by, of a run by seed; the less the better."""
        rows, measure = self.rows.get(name, {}), _MEASURES[self.question.by][0]
        found = {seed: measure(row) for seed, row in rows.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def best(self, pattern: str) -> str:
        """The best of the runs that a name stands for; "" unless all are there."""
        names = [n for n in self.question.named(pattern) if n not in self.diverged]
        found = {name: self.measured(name).values() for name in names}
        asked = self.seeds if len(names) > 1 else 1  # there is nothing to choose
        there = bool(found) and all(len(f) >= asked for f in found.values())
        return min(names, key=lambda n: statistics.mean(found[n])) if there else ""

    @property
    def guided(self) -> bool:
        """Whether its runs differ in the guidance of what was drawn."""
        return any("guidance" in (own or {}) for own in self.question.runs.values())

    @property
    def differences(self) -> list[float]:
        """The differences of the claim, one for each seed that both sides have."""
        claimed = self.question.first, self.question.second
        first, second = (self.measured(self.best(name)) for name in claimed)
        return [first[seed] - second[seed] for seed in sorted(first.keys() & second)]

    @property
    def verdict(self) -> str:
        """What the rule says of the claim; "diverged" if a side is `lost`."""
        if self.lost:
            return "diverged"
        return verdict(self.differences, self.question.margin)

    @property
    def unit(self) -> str:
        """The unit of the differences; latents have a loss and no bits."""
        every = [row for rows in self.rows.values() for row in rows.values()]
        bits = self.question.by != "bits" or all(row["bits_per_dim"] for row in every)
        return _MEASURES[self.question.by][1] if bits else "in held-out loss"

    @property
    def lost(self) -> list[str]:
        """The sides of the claim of which every run has a seed that diverged."""
        sides = filter(None, (self.question.first, self.question.second))
        named = self.question.named
        return [one for one in sides if self.diverged.issuperset(named(one))]


def _bits(row: Row) -> float:
    """The bound with the longest chain; for latents the loss."""
    found = row["bits_per_dim"]
    if not found:
        return _loss(row)
    return float(found[max(found, key=int)]["bits_per_dim"])


def _loss(row: Row) -> float:
    return float(row["held_out"]["loss"])


def _frechet(row: Row) -> float | None:
    return row["drawn"] and float(row["drawn"]["frechet"]["mean"])


def _disagreement(row: Row) -> float | None:
    return row["drawn"] and 1 - float(row["drawn"]["agreement"])


_MEASURES = {
    "bits": (_bits, "bits/dim"),
    "loss": (_loss, "in held-out loss"),
    "frechet": (_frechet, "in Fréchet distance"),
    "disagreement": (_disagreement, "of the images read as another class"),
}


def answers(study: Study, rows: Iterable[Row]) -> dict[str, Answer]:
    """What those rows say to each question that were measured as the study asks."""
    every = {
        row["digest"]: row
        for row in rows
        if "failed" in row or as_asked(row, study.measure)
    }
    there = {digest: row for digest, row in every.items() if "failed" not in row}
    _check_judges(there.values())
    failed, seconds = every.keys() - there.keys(), step_seconds(study)
    found: dict[str, dict[str, dict[int, Row]]] = {}
    lost: dict[str, set[str]] = {}
    for (question, name), runs in runs_of(study).items():
        known = {run.recipe.seed: there.get(run.digest) for run in runs}
        if failed.intersection(run.digest for run in runs):
            lost.setdefault(question, set()).add(name)
        scale, each = runs[0].guidance, seconds.get(runs[0].step_name)
        timed = {"processor_seconds": each and each * runs[0].recipe.steps}
        kept = {s: _drawn_with(scale, row) | timed for s, row in known.items() if row}
        found.setdefault(question, {})[name] = kept
    return {
        k: Answer(study.questions[k], v, frozenset(lost.get(k, ())), study.seeds)
        for k, v in found.items()
    }


def _check_judges(rows: Iterable[Row]) -> None:
    judges = {row["drawn"]["classifier"] for row in rows if row.get("drawn")}
    told = f"the drawn images were read by {len(judges)} different classifiers: measure"
    refuse(len(judges) > 1, f"{told} all of these runs again on one machine")


def _drawn_with(scale: float, row: Row) -> Row:
    """A row with what was drawn with one scale of guidance, and with real images."""
    drawn = row.get("drawn", {})
    one = drawn.get("guidance", {}).get(f"{scale:g}")
    return row | {"drawn": one, "real": drawn.get("real"), "scale": scale}


def _figures(row: Row) -> dict[str, float | None]:
    """The columns of a table, for one row."""
    quartiles = {f"loss {n}/4": row["held_out"][f"mse_q{n}"] for n in range(1, 5)}
    return {
        "parameters": row["parameters"],
        "multiply-adds / 10^12": row["operations"] / 1e12,
        **_timed(row),
        **({"bits/dim": _bits(row)} if row["bits_per_dim"] else {}),
        **_shorter(row),
        "held-out loss": _loss(row),
        **quartiles,
        "kernel distance": row.get("scores", {}).get("score_kid_pixels"),
        **(_of_images(row["drawn"]) if row["drawn"] else {}),
    }


def _timed(row: Row) -> dict[str, float | None]:
    """Processor seconds of all steps, where those of one were measured."""
    known = row.get("processor_seconds")
    return {} if known is None else {"processor seconds": known}


def _shorter(row: Row) -> dict[str, float | None]:
    """The bound with all chains but the longest."""
    chains = sorted(row["bits_per_dim"], key=int)[:-1]
    bits = {steps: row["bits_per_dim"][steps]["bits_per_dim"] for steps in chains}
    return {f"bits/dim, {steps} steps": value for steps, value in bits.items()}


def _of_images(found: Row) -> dict[str, float | None]:
    """The columns of drawn images, or of real ones."""
    return {
        "Fréchet distance": found["frechet"]["mean"],
        "agreement": found["agreement"],
        "distance to nearest": found["nearest"],
        "nearer than 99%": found["near"],
    }


def summary(answer: Answer) -> list[dict[str, str]]:
    """A line for each run of a question, for a reader."""
    lines = []
    for name, rows in answer.rows.items():
        found = [_figures(row) for row in rows.values()]
        seeds = f"{len(rows)}{', the others diverged' * (name in answer.diverged)}"
        lines.append({"run": name, "seeds": seeds, **_columns(found)})
    real = [row["real"] for rows in answer.rows.values() for row in rows.values()]
    if any(real):
        floor = _columns([_of_images(one) for one in real if one])
        lines.append({"run": "real images", "seeds": "–", **floor})
    return lines


def _columns(found: list[dict[str, float | None]]) -> dict[str, str]:
    """Each column of several rows, for a reader."""
    titles = max(found, key=len, default={})
    return {title: _told([one.get(title) for one in found]) for title in titles}


def _told(values: list[float | None]) -> str:
    """Mean and spread, both to the first digit of the spread."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return "–"
    mean = statistics.mean(known)
    if len(set(known)) == 1:
        return f"{mean:,.0f}" if mean >= 1000 else f"{mean:.4g}"
    spread = float(f"{statistics.stdev(known):.1g}")
    digits = -math.floor(math.log10(spread))
    return f"{round(mean, digits):,.{max(digits, 0)}f} ± {spread:g}"


def draw_answer(axes: Any, answer: Answer, colors: Sequence[str]) -> None:
    """The held-out loss of each run: the mean, and the band from seed to seed."""
    looks = itertools.product(("-", "--", ":"), colors)
    for (name, rows), (line, color) in zip(answer.rows.items(), looks, strict=False):
        curves = [_curve(row) for row in rows.values()]
        if not curves:
            continue
        steps = sorted(set[int]().union(*(curve[0] for curve in curves)))
        values = np.array([np.interp(steps, *curve) for curve in curves])
        axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.25)
        axes.plot(steps, values.mean(0), line, color=color, label=name)
    axes.set(xlabel="step", ylabel="held-out loss", yscale="log")
    axes.yaxis.get_major_locator().set_params(subs=(1, 1.5, 2, 3, 4, 6, 8))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    if axes.lines:
        axes.legend()


def _curve(row: Row) -> tuple[list[int], list[float]]:
    pairs = zip(row["curves"]["step"], row["curves"]["held_out_loss"], strict=True)
    kept = [(step, loss) for step, loss in pairs if loss is not None]
    return [step for step, _ in kept], [loss for _, loss in kept]


def draw_guidance(axes: Sequence[Any], answer: Answer, colors: Sequence[str]) -> None:
    """Three measures of drawn images over the guidance; dashed, of real ones."""
    rows = [r for each in answer.rows.values() for r in each.values() if r["drawn"]]
    titles = ("Fréchet distance", "agreement", "distance to nearest")
    for ax, title in zip(axes, titles, strict=True):
        points: dict[float, list[float]] = {}
        for row in rows:
            value: Any = _of_images(row["drawn"])[title]
            points.setdefault(row["scale"], []).append(value)
        for scale, values in points.items():
            ax.plot([scale] * len(values), values, "o", color=colors[0], ms=4)
        means = [statistics.mean(values) for values in points.values()]
        ax.plot([*points], means, color=colors[0])
        if rows:
            floor: list[Any] = [_of_images(row["real"])[title] for row in rows]
            ax.axhline(statistics.mean(floor), ls="--", color=colors[-1])
        ax.set(xlabel="guidance $w$", ylabel=title)


def write_report(study: Study, rows: Iterable[Row], out: Path) -> Path:
    """Write OUT/report.md, and a figure for each question; returns the report.

    Raises:
        ValueError: matplotlib is not installed.
    """
    with explain("a figure needs matplotlib, the extra 'show'", ImportError):
        from matplotlib.figure import Figure
    text = ["# What the study says\n"]
    if step_seconds(study):
        text.append(f"{_SECONDS} {Path(study.seconds).name}.\n")
    for name, answer in answers(study, rows).items():
        figure = Figure(figsize=(6.0, 3.0), layout="constrained")
        if answer.guided:
            draw_guidance(figure.subplots(1, 3), answer, _COLORS)
        else:
            draw_answer(figure.subplots(), answer, _COLORS)
        picture = out / (re.sub(r"[^-,.\w]+", "-", name) + ".png")
        with whole_file(picture) as draft:
            figure.savefig(draft, format="png", dpi=120)
        text += [f"## {answer.question.asks}\n", *_section(answer, picture.name)]
    with whole_file(out / "report.md") as draft:
        draft.write_text("\n".join(text), encoding="utf-8")
    return out / "report.md"


_SECONDS = "Processor seconds: steps times the seconds of one step alone, from"
_COLORS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"]


def _section(answer: Answer, picture: str) -> list[str]:
    """The lines of a report for one question."""
    lines, asked = summary(answer), answer.question
    titles = max(map(list, lines), key=len)  # without rows there are few
    rows = [[line.get(title, "") for title in titles] for line in lines]
    told = [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)]
    if asked.claim:
        told += ["", f"Claim: {asked.claim}", "", f"**{effect_of(answer)}**"]
    return [*told, "", f"![]({picture})", ""]


def effect_of(answer: Answer) -> str:
    """The verdict on a claim, with the effect and its interval, as a sentence."""
    asked, found = answer.question, answer.differences
    if answer.lost:
        return f"diverged: {' and '.join(answer.lost)}, with a seed of each run"
    if len(found) < 3:
        return f"{answer.verdict}: {len(found)} of at least 3 seeds are there"
    told = [f"{n:+.3f}".replace("-", "−") for n in (np.mean(found), *bootstrap(found))]
    effect = f"{told[0]} {answer.unit}, 95% from {told[1]}\xa0to\xa0{told[2]}"
    sides = " minus ".join(map(answer.best, (asked.first, asked.second)))
    rule = f"{len(found)} seeds, margin {asked.margin:g}"
    return f"{answer.verdict}: {sides} is {effect} ({rule})"
