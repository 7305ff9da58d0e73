"""What the rows of a study say: intervals, verdicts, tables, figures."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from diffussm.study import Question, Study, runs_of
from diffussm.study_report import (
    answers,
    bootstrap,
    effect_of,
    summary,
    verdict,
    write_report,
)

ASKED = Question(
    asks="Is a better?",
    runs={"a": {"model.downsample": 1}, "b": {}},
    claim="It is.",
    first="a",
    second="b",
)
STUDY = Study("digits", {"the question": ASKED})


def row(run, bits, **changes):
    curves = {"step": [10, 20, 30], "held_out_loss": [None, 0.5, 0.2]}
    made = {
        "digest": run.digest,
        "parameters": 1234,
        "operations": 2e12,
        "seconds": 3.0,
        "held_out": {"loss": bits} | {f"mse_q{i}": 0.1 * i for i in range(1, 5)},
        "bits_per_dim": {"5": {"bits_per_dim": 99.0}, "25": {"bits_per_dim": bits}},
        "curves": curves,
    }
    return made | changes


def made(a, b, **changes):
    runs = runs_of(replace(STUDY, seeds=max(len(a), len(b)))).values()
    return [
        row(run, bits, **changes)
        for each, values in zip(runs, (a, b), strict=True)
        for run, bits in zip(each, values, strict=False)
    ]


def test_bootstrap_lists_all_resamples():
    values = (0.3, -0.2, 1.1, 0.4)
    means = sorted(sum(draw) / 4 for draw in itertools.product(values, repeat=4))
    low, high = bootstrap(values)
    assert low == pytest.approx(means[6]) and high == pytest.approx(means[-7])
    assert bootstrap([0.5]) == (0.5, 0.5)
    assert bootstrap([3, 1, 2]) == (1, 3)
    many = np.random.default_rng(0).normal(size=50)
    assert bootstrap(many) == bootstrap(many)  # the same every time


@pytest.mark.parametrize(
    ("differences", "margin", "said"),
    [
        ([-1, -2, -3], 0, "supported at this scale"),
        ([-1, -2, 0.1], 0, "undecided"),
        ([1, 2, 3], 0, "not supported"),
        ([1, 2, 3], 3.5, "supported at this scale"),
        ([1, 2, 3], 2, "undecided"),
        ([1, 2, 3], 0.5, "not supported"),
        ([0, 0, 0], 0, "undecided"),
        ([-1, -2], 0, "not yet run"),
        ([], 0, "not yet run"),
    ],
)
def test_verdict_follows_the_interval(differences, margin, said):
    assert verdict(differences, margin) == said


def test_seeds_are_paired_and_missing_rows_are_left_out():
    rows = made((1.0, 2.0, 3.0), (1.5, 2.6, 3.7))
    found = answers(STUDY, rows)["the question"]
    assert found.differences == pytest.approx([-0.5, -0.6, -0.7])
    assert found.verdict == "supported at this scale"
    assert "a minus b is -0.600" in effect_of(found) and "3 seeds" in effect_of(found)
    found = answers(STUDY, rows[1:])["the question"]
    assert found.differences == pytest.approx([-0.6, -0.7])
    assert effect_of(found) == "not yet run: 2 of at least 3 seeds are there"
    rows[0] = {"digest": rows[0]["digest"], "failed": "diverged"}
    assert len(answers(STUDY, rows)["the question"].differences) == 2
    assert answers(STUDY, [])["the question"].verdict == "not yet run"


def test_latents_are_compared_by_their_loss():
    rows = made((1.0, 2.0, 3.0), (1.5, 2.6, 3.7), bits_per_dim={})
    found = answers(STUDY, rows)["the question"]
    assert found.differences == pytest.approx([-0.5, -0.6, -0.7])


def test_a_table_has_means_and_spreads():
    first, second = summary(answers(STUDY, made((1, 2, 3), (4, 4, 4)))["the question"])
    assert first["run"] == "a" and first["bits/dim"] == "2 ± 1"
    assert second["bits/dim"] == "4" and second["parameters"] == "1,234"
    assert first["loss 3/4"] == "0.3" and first["kernel distance"] == "–"


@pytest.mark.slow
def test_a_report_is_written_with_and_without_rows(tmp_path):
    file = write_report(STUDY, made((1, 2, 3), (4, 4, 4)), tmp_path)
    text = file.read_text()
    assert "## Is a better?" in text and "| a | 3 | 1,234 |" in text
    assert "**supported at this scale: a minus b" in text
    assert "![](the-question.png)" in text
    assert (tmp_path / "the-question.png").read_bytes().startswith(b"\x89PNG")
    text = write_report(STUDY, [], tmp_path).read_text()
    assert "| a | 0 |" in text and "not yet run: 0 of at least 3" in text
