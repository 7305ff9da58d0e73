"""What the rows of a study say: intervals, verdicts, tables, figures."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from diffussm.files import write_json
from diffussm.study import Measure, Question, Study, as_json, runs_of
from diffussm.study_report import (
    answers,
    bootstrap,
    draw_answer,
    draw_guidance,
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
        "measure": as_json(STUDY.measure),
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
    assert "a minus b is −0.600" in effect_of(found) and "3 seeds" in effect_of(found)
    found = answers(STUDY, rows[1:])["the question"]
    assert found.differences == pytest.approx([-0.6, -0.7])
    assert effect_of(found) == "not yet run: 2 of at least 3 seeds are there"
    assert answers(STUDY, [])["the question"].verdict == "not yet run"


def test_rows_that_were_measured_in_another_way_do_not_answer():
    longer = as_json(replace(STUDY.measure, bits_steps=(250,)))
    rows = made((1.0, 2.0, 3.0), (1.5, 2.6, 3.7))
    other = [one | {"measure": longer} for one in rows[:3]] + rows[3:]
    assert answers(STUDY, rows)["the question"].verdict == "supported at this scale"
    assert answers(STUDY, other)["the question"].verdict == "not yet run"


def test_latents_are_compared_by_their_loss():
    rows = made((1.0, 2.0, 3.0), (1.5, 2.6, 3.7), bits_per_dim={})
    found = answers(STUDY, rows)["the question"]
    assert found.differences == pytest.approx([-0.5, -0.6, -0.7])
    assert "−0.600 in held-out loss" in effect_of(found)
    first, _ = summary(found)
    assert first["held-out loss"] == "2 ± 1" and "bits/dim" not in first


def test_a_question_may_be_decided_by_the_held_out_loss():
    rows = made((1.0, 2.0, 3.0), (1.5, 2.6, 3.7))
    for one, loss in zip(rows, (0.3, 0.2, 0.1, 0.2, 0.1, 0.05), strict=True):
        one["held_out"]["loss"] = loss
    by_bits = answers(STUDY, rows)["the question"]
    found = replace(by_bits, question=replace(by_bits.question, by="loss"))
    assert found.differences == pytest.approx([0.1, 0.1, 0.05])
    assert found.verdict == "not supported" and by_bits.verdict.startswith("supported")
    assert "+0.083 in held-out loss" in effect_of(found)
    first, _ = summary(found)
    assert first["held-out loss"] == "0.2 ± 0.1" and first["bits/dim"] == "2 ± 1"


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ((7.0, 12.57, 17.0), "12 ± 5"),
        ((1.0, 1.04, 1.02), "1.02 ± 0.02"),
        ((1000.0, 1240.0, 1100.0), "1,100 ± 100"),
    ],
)
def test_a_mean_has_the_digits_of_its_spread(losses, told):
    rows = made(losses, (1.0, 2.0, 3.0), bits_per_dim={})
    first, _ = summary(answers(STUDY, rows)["the question"])
    assert first["held-out loss"] == told


def failed(row):
    return {"digest": row["digest"], "failed": "the loss is nan"}


def test_a_side_of_which_every_run_diverged_is_no_missing_one():
    first, *rows = made((1.0, 2.0, 3.0), (1.5, 2.6, 3.7))
    found = answers(STUDY, [failed(first), *rows])["the question"]
    assert found.verdict == "diverged" and found.differences == []
    assert effect_of(found) == "diverged: a, with a seed of each run"
    assert summary(found)[0]["seeds"] == "2, the others diverged"
    assert summary(found)[1]["seeds"] == "3"


def test_a_rate_that_diverged_is_not_the_best_of_several():
    runs = {"a 1": {"lr": 1e-3}, "a 2": {"lr": 2e-3}, "b": {"lr": 3e-3}}
    asked = replace(ASKED, runs=runs, first="a *")
    study = Study("digits", {"the question": asked})
    kept, lucky, other = [
        [row(run, bits) for run, bits in zip(each, values, strict=True)]
        for each, values in zip(
            runs_of(study).values(), ([2, 2, 2], [1, 1, 1], [3, 3, 4]), strict=True
        )
    ]
    found = answers(study, kept + lucky + other)["the question"]
    assert found.best("a *") == "a 2"
    found = answers(study, kept + lucky[:1] + other)["the question"]
    assert (
        found.best("a *") == "" and found.verdict == "not yet run"
    )  # a search goes on
    lucky[1:] = map(failed, lucky[1:])
    found = answers(study, kept + lucky + other)["the question"]
    assert found.best("a *") == "a 1" and found.differences == [-1, -1, -2]
    assert found.verdict == "supported at this scale"
    kept[0] = failed(kept[0])
    assert answers(study, kept + lucky + other)["the question"].verdict == "diverged"
    assert answers(study, lucky + other)["the question"].verdict == "not yet run"


def test_images_that_two_judges_read_are_not_compared():
    rows = [*judged_rows((3.0, 4.0, 5.0), (1.0, 1.5, 2.0))]
    rows[1]["drawn"]["classifier"] = "another"
    with pytest.raises(ValueError, match="2 different classifiers: measure all"):
        answers(JUDGED, rows)


def test_seeds_with_other_looks_and_many_runs_are_drawn():
    from matplotlib.figure import Figure

    runs = {f"run {k}": {"lr": 1e-3 * (k + 1)} for k in range(8)}
    study = Study("digits", {"q": Question("?", runs)})
    rows = [row(run, 1.0) for each in runs_of(study).values() for run in each]
    rows[0]["curves"] = {"step": [15, 30], "held_out_loss": [0.4, 0.2]}
    ax = Figure().subplots()
    draw_answer(ax, answers(study, rows)["q"], [f"C{k}" for k in range(7)])
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 8
    assert list(ax.lines[0].get_xdata()) == [15, 20, 30]
    assert ax.lines[0].get_ydata()[0] == pytest.approx((0.4 + 0.5 + 0.5) / 3)


def test_a_table_has_means_and_spreads():
    first, second = summary(answers(STUDY, made((1, 2, 3), (4, 4, 4)))["the question"])
    assert first["run"] == "a" and first["bits/dim"] == "2 ± 1"
    assert second["bits/dim"] == "4" and second["parameters"] == "1,234"
    assert first["loss 3/4"] == "0.3" and first["kernel distance"] == "–"
    assert not any("seconds" in title for title in first)


def test_seconds_of_a_table_are_those_of_the_file_not_of_the_row(tmp_path):
    rows = made((1, 2, 3), (4, 4, 4))
    run = runs_of(STUDY)["the question", "a"][0]
    file = tmp_path / "seconds.json"
    write_json(file, {"steps": {run.step_name: {"seconds": 0.5}}})
    study = replace(STUDY, seconds=str(file))
    first, second = summary(answers(study, rows)["the question"])
    assert first["processor seconds"] == f"{run.recipe.steps / 2:.4g}"
    assert second.get("processor seconds", "–") == "–"
    text = write_report(study, rows, tmp_path).read_text()
    assert "steps times the seconds of one step alone, from seconds.json." in text
    assert "Processor seconds" not in write_report(STUDY, rows, tmp_path).read_text()


def images(frechet, agreement):
    return {
        "frechet": {"mean": frechet, "std": 0.1},
        "agreement": agreement,
        "nearest": 0.2,
        "near": 0.0,
    }


GUIDED = Question(
    asks="What does guidance do?",
    runs={"w = 1": {}, "w = 2": {"guidance": 2}},
    claim="It helps.",
    first="w = 2",
    second="w = 1",
    by="frechet",
)
JUDGED = Study(
    "digits", {"w": GUIDED}, measure=Measure(judged_images=9, guidance=(1.0, 2.0))
)


def judged_rows(plain, guided):
    runs = runs_of(JUDGED)["w", "w = 1"]
    for run, a, b in zip(runs, plain, guided, strict=True):
        scales = {"1": a and images(a, 0.5), "2": images(b, 0.75)}
        real = images(0.25, 0.97)
        drawn = {"classifier": "one", "guidance": scales, "real": real}
        yield row(run, 4.0, drawn=drawn, measure=as_json(JUDGED.measure))


def test_a_run_of_a_question_takes_its_own_guidance():
    rows = [*judged_rows((3.0, 4.0, 5.0), (1.0, 1.5, 2.0))]
    found = answers(JUDGED, rows)["w"]
    assert found.differences == pytest.approx([-2.0, -2.5, -3.0])
    assert "w = 2 minus w = 1 is −2.500 in Fréchet distance" in effect_of(found)
    plain, guided, real = summary(found)
    assert plain["Fréchet distance"] == "4 ± 1" and plain["agreement"] == "0.5"
    assert guided["Fréchet distance"] == "1.5 ± 0.5" and guided["bits/dim"] == "4"
    assert real["run"] == "real images" and real["Fréchet distance"] == "0.25"
    assert "bits/dim" not in real
    by = replace(GUIDED, by="disagreement")
    found = answers(replace(JUDGED, questions={"w": by}), rows)["w"]
    assert found.differences == pytest.approx([-0.25] * 3)
    assert "−0.250 of the images read as another class" in effect_of(found)


def test_images_that_were_not_drawn_are_not_compared():
    rows = [*judged_rows((3.0, None, 5.0), (1.0, 1.5, 2.0))]
    found = answers(JUDGED, rows)["w"]
    assert found.verdict == "not yet run" and len(found.differences) == 2
    assert summary(found)[0]["Fréchet distance"] == "4 ± 1"
    never = [{k: v for k, v in one.items() if k != "drawn"} for one in rows]
    found = answers(JUDGED, never)["w"]
    assert found.verdict == "not yet run" and not found.differences
    assert [line["run"] for line in summary(found)] == ["w = 1", "w = 2"]


def test_a_table_has_the_bound_of_every_chain():
    first, _ = summary(answers(STUDY, made((1, 2, 3), (4, 4, 4)))["the question"])
    assert first["bits/dim, 5 steps"] == "99" and first["bits/dim"] == "2 ± 1"
    assert "bits/dim, 25 steps" not in first


@pytest.mark.slow
def test_the_figure_of_guidance_has_a_point_for_each_seed(tmp_path):
    from matplotlib.figure import Figure

    rows = [*judged_rows((3.0, 4.0, 5.0), (1.0, 1.5, 2.0))]
    axes = Figure().subplots(1, 3)
    draw_guidance(axes, answers(JUDGED, rows)["w"], ["blue", "black"])
    one, two, means, floor = axes[0].lines
    assert list(one.get_ydata()) == [3, 4, 5] and list(two.get_xdata()) == [2] * 3
    assert list(means.get_xdata()) == [1, 2] and list(means.get_ydata()) == [4, 1.5]
    assert list(floor.get_ydata()) == [0.25, 0.25]
    text = write_report(JUDGED, rows, tmp_path).read_text()
    assert "| real images |" in text and (tmp_path / "w.png").stat().st_size > 1000
    assert "not yet run" in write_report(JUDGED, [], tmp_path).read_text()


@pytest.mark.slow
def test_a_report_is_written_with_and_without_rows(tmp_path):
    file = write_report(STUDY, made((1, 2, 3), (4, 4, 4)), tmp_path)
    text = file.read_text()
    assert "## Is a better?" in text and "| a | 3 | 1,234 |" in text
    assert "**supported at this scale: a minus b" in text
    assert "![](the-question.png)" in text
    assert (tmp_path / "the-question.png").read_bytes().startswith(b"\x89PNG")
    named = replace(STUDY, questions={"both/at once": ASKED})
    assert "![](both-at-once.png)" in write_report(named, [], tmp_path).read_text()
    text = write_report(STUDY, [], tmp_path).read_text()
    assert "| a | 0 |" in text and "not yet run: 0 of at least 3" in text
