"""What a study says, and the runs that it makes of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from diffussm.files import write_json
from diffussm.options import Execution
from diffussm.study import (
    Measure,
    Question,
    Study,
    as_asked,
    as_json,
    images_of,
    read_study,
    runs_of,
    step_seconds,
)
from diffussm.study_runs import steps_of
from diffussm.variants import count_parameters, image_macs

DIGESTS = ["23664ddb8ec7", "d33e450777ea"]  # rows of 2026-11 have such names
TWO = {"wide": {"model.d_model": 32}, "narrow": {"model.d_model": 16}}
STUDY = Study(
    recipe="digits",
    questions={"width": Question("Is wide better?", TWO)},
    options={"steps": 8, "warmup": 2, "cooldown": 4, "batch_size": 8},
    seeds=2,
)


def asked(runs):
    return replace(STUDY, questions={"q": Question("?", runs)})


def test_every_seed_of_every_run_is_a_run():
    runs = runs_of(STUDY)
    assert [run.recipe.seed for run in runs["width", "wide"]] == [0, 1]
    assert {run.recipe.model.d_model for run in runs["width", "narrow"]} == {16}
    assert {run.recipe.steps for each in runs.values() for run in each} == {8}
    assert len({run.digest for each in runs.values() for run in each}) == 4


def test_same_configurations_have_one_name_however_they_are_written():
    same = {
        "default": {},
        "none": None,
        "said": {"model.downsample": 2},
        "logged": {"log_every": 7, "score_every": 0, "keep_last": 3},
    }
    runs = runs_of(asked(same))
    assert len({tuple(run.digest for run in each) for each in runs.values()}) == 1
    other = runs_of(asked({"other": {"lr": 1e-3}}))["q", "other"]
    assert other[0].digest != runs["q", "default"][0].digest


def test_a_digest_is_of_what_is_learned():
    run = runs_of(STUDY)["width", "wide"][0]
    assert replace(run, execution=Execution()).digest == run.digest
    for changes in ({"seed": 5}, {"steps": 9}, {"ema_decay": 0.5}):
        recipe = replace(run.recipe, **changes)
        assert replace(run, recipe=recipe).digest != run.digest


@pytest.mark.parametrize("steps", [1, 2, 7, 30, 100, 1500])
@pytest.mark.parametrize("looks", [1, 3, 10])
def test_runs_are_looked_at_about_so_often(steps, looks):
    options = {"steps": steps, "warmup": 0, "cooldown": 0}
    run = runs_of(replace(STUDY, options=options, looks=looks))["width", "wide"][0]
    found = steps // run.execution.score_every
    assert min(looks, steps) <= found <= 2 * looks + 1
    assert run.execution.score_every % run.execution.log_every == 0


def test_all_that_cannot_work_is_named_before_the_first_run(tmp_path):
    wrong = {
        "odd": {"model.d_state": 3},
        "good": {},
        "unknown": {"model.downsampel": 1},
        "images": {"model.in_channels": 3},
        "long": {"warmup": 9},
        "chunks": {"variant": "taps:5", "convolution": "chunked"},
    }
    with pytest.raises(ValueError, match="no run was started") as refused:
        runs_of(asked(wrong), tmp_path)
    named = ("odd: d_state=3", "unknown: ", "images: ", "long: warmup", "chunks: Taps")
    for told in named:
        assert f"q, {told}" in str(refused.value)
    assert "q, good" not in str(refused.value) and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="bits_steps=2000"):
        measure = replace(STUDY.measure, bits_steps=(25, 2000))
        runs_of(replace(STUDY, measure=measure), tmp_path)


def test_a_file_is_read_or_refused_by_name(tmp_path):
    file = tmp_path / "study.yaml"

    def read(text):
        file.write_text(text)
        return read_study(file)

    good = "recipe: digits\nquestions: {a: {asks: Why, runs: {x: {}, y: {lr: 0.1}}}}\n"
    study = read(good + "measure: {bits_steps: [5, 10]}\nseeds: 4\n")
    assert study.measure.bits_steps == (5, 10) and study.seeds == 4
    assert study.questions["a"] == Question("Why", {"x": {}, "y": {"lr": 0.1}})
    for text, told in (
        ("recipe: digits\n", "questions"),
        ("questions: [a]\nrecipe: digits\n", "questions"),
        ("questions: {}\nrecipe: digits\n", "needs questions"),
        (good + "seed: 3\n", "unknown key 'seed'"),
        (good + "seeds: 0\n", "seeds=0"),
        (good + "options: {seed: 3}\n", "seeds says how many"),
        (good.replace("asks", "ask"), "'ask' in the question 'a'"),
        (good.replace("runs: {x: {}, y: {lr: 0.1}}", "runs: {}"), "no runs"),
        ("a: [1\n", "is no study"),
    ):
        with pytest.raises(ValueError, match=r"study\.yaml is no study") as refused:
            read(text)
        assert told in str(refused.value)
    with pytest.raises(FileNotFoundError, match="YAML file of a study"):
        read_study(tmp_path / "nothing.yaml")


def test_a_claim_is_about_two_runs_of_its_question():
    for claim in ({"first": "wide"}, {"first": "wide", "second": "narrow"}):
        with pytest.raises(ValueError, match="a first and a second"):
            Question("?", TWO, **claim)
    with pytest.raises(ValueError, match="narrow"):
        Question("?", TWO, claim="so", first="wide", second="narow")
    for half in ({"first": "wide"}, {"second": "wide"}, {}):
        with pytest.raises(ValueError, match="a first and a second"):
            Question("?", TWO, claim="so", **half)
    Question("?", TWO, claim="so", first="wide", second="narrow")


def test_guidance_is_of_what_is_drawn_and_changes_no_digest():
    judging = Measure(judged_images=8, guidance=(1.0, 1.5))
    asked = {"w = 1": {}, "w = 1.5": {"guidance": 1.5}}
    study = replace(STUDY, measure=judging, questions={"w": Question("?", asked)})
    plain, guided = runs_of(study).values()
    assert [run.digest for run in plain] == [run.digest for run in guided]
    assert {run.guidance for run in plain} == {1.0}
    assert {run.guidance for run in guided} == {1.5}


@pytest.mark.parametrize("runs", [{"a": "lr 0.001"}, {"b": 5}, {0.001: {"lr": 1e-3}}])
def test_runs_have_names_and_options(runs):
    (name,) = runs
    with pytest.raises(ValueError, match=f"run {name!r}: expected a name in"):
        Question("?", runs)


def test_equal_operations_are_of_steps_with_all_their_images():
    runs = {"a": {}, "b": {"batch_size": 16}}
    study = replace(STUDY, questions={"q": Question("?", runs, equal="operations")})
    first, second = (each[0].recipe for each in runs_of(study).values())
    assert (first.steps, first.batch_size) == (8, 8)
    assert (second.steps, second.batch_size) == (4, 16)


def test_digests_stay_what_they_were():
    digests = [run.digest for run in runs_of(STUDY)["width", "wide"]]
    assert digests == DIGESTS


@pytest.mark.parametrize(
    ("measure", "own", "told"),
    [
        ({}, {"guidance": 2}, "guidance=2: nothing is drawn"),
        ({"judged_images": 8}, {"guidance": 2}, r"guidance \[1\] only"),
        ({"judged_images": 8, "guidance": (2,)}, {}, "guidance=1: measure has"),
        ({"judged_images": 8, "guidance": (1, -1)}, {}, "cfg_scale=-1"),
        ({"judged_images": 1}, {}, "judged_images=1"),
        ({"judged_images": 8}, {"model.num_classes": 0}, "no classes"),
    ],
)
def test_what_cannot_be_judged_is_refused(measure, own, told):
    study = replace(asked({"run": own}), measure=Measure(**measure))
    with pytest.raises(ValueError, match=told):
        runs_of(study)


def test_a_question_by_images_needs_images():
    by = Question("?", TWO, by="frechet")
    with pytest.raises(ValueError, match="by frechet: measure has no judged_images"):
        replace(STUDY, questions={"q": by})
    with pytest.raises(ValueError, match="by="):
        Question("?", TWO, by="fid")


def test_a_row_from_before_a_measure_was_invented_counts():
    plain = Measure((25,), 64, 0)
    old = {"measure": {"bits_steps": [25], "bits_images": 64, "score_images": 0}}
    assert as_asked(old, plain) and as_asked({"measure": as_json(plain)}, plain)
    assert not as_asked(old, replace(plain, judged_images=8))
    assert not as_asked(old, replace(plain, bits_steps=(10, 25)))
    assert not as_asked({}, Measure())


def test_runs_of_the_same_images_share_them(tmp_path):
    one, two = (runs[0] for runs in runs_of(STUDY).values())
    assert images_of(one, tmp_path)[0] is images_of(two, tmp_path)[0]
    other = replace(one, recipe=replace(one.recipe, flip=True))
    assert images_of(other, tmp_path)[0] is not images_of(one, tmp_path)[0]


def timed(tmp_path, equal="seconds", **seconds):
    """A study of equal seconds, and its file: by name, what a step takes."""
    file = tmp_path / "seconds.json"
    plain = runs_of(asked(TWO))
    steps = {
        plain["q", name][0].step_name: {"seconds": each}
        for name, each in seconds.items()
    }
    write_json(file, {"steps": steps})
    questions = {"q": Question("?", TWO, equal=equal)}
    return replace(STUDY, questions=questions, seconds=str(file))


def test_equal_seconds_are_steps_from_the_file(tmp_path):
    study = timed(tmp_path, wide=0.3, narrow=0.1)
    wide, narrow = (runs[0] for runs in runs_of(study).values())
    assert wide.digest == runs_of(STUDY)["width", "wide"][0].digest
    recipe = narrow.recipe
    assert (recipe.steps, recipe.warmup, recipe.cooldown) == (24, 6, 12)
    elsewhere = runs_of(timed(tmp_path, wide=0.6, narrow=0.2))  # a slower machine
    assert elsewhere["q", "narrow"][0].digest == narrow.digest
    other = runs_of(timed(tmp_path, wide=0.3, narrow=0.2))["q", "narrow"][0]
    assert other.digest != narrow.digest and other.recipe.steps == 12


def test_a_step_is_the_same_for_all_seeds_and_rates(tmp_path):
    run = runs_of(STUDY)["width", "wide"][0]
    for same in ({"seed": 5}, {"lr": 0.1}, {"steps": 90}):
        assert replace(run, recipe=replace(run.recipe, **same)).step_name == (
            run.step_name
        )
    for other in ({"batch_size": 4}, {"precision": "bf16"}):
        changed = replace(run, recipe=replace(run.recipe, **other))
        assert changed.step_name != run.step_name
    assert replace(run, variant="taps:9").step_name != run.step_name


def test_equal_parameters_and_seconds_hold_both(tmp_path):
    study = timed(tmp_path, "parameters and seconds", wide=0.3)
    wide, narrow = runs_of(study).values()  # the same width is the same network
    assert wide == narrow and narrow[0].recipe.model.d_model == 32


def test_equal_parameters_and_operations_hold_both():
    runs = {"wide": {}, "attention": {"variant": "attention:1"}}
    question = Question("?", runs, equal="parameters and operations")
    found = runs_of(replace(STUDY, questions={"q": question})).values()
    ours, other = (seeds[0] for seeds in found)
    sizes = [count_parameters(run.variant, run.recipe.model) for run in (ours, other)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)
    work = [
        run.recipe.steps * image_macs(run.variant, run.recipe.model)
        for run in (ours, other)
    ]
    assert work[1] == pytest.approx(work[0], rel=0.5 / other.recipe.steps)
    assert other.recipe.steps != ours.recipe.steps


def test_seconds_that_are_not_known_are_refused(tmp_path):
    study = timed(tmp_path, wide=0.3)
    with pytest.raises(
        ValueError, match="q, narrow: no seconds of its step"
    ) as refused:
        runs_of(study)
    assert "--time" in str(refused.value) and "q, wide" not in str(refused.value)
    with pytest.raises(ValueError, match="q, narrow: no seconds"):
        runs_of(timed(tmp_path, wide=0.3, narrow=0.0))
    (tmp_path / "seconds.json").unlink()
    assert step_seconds(study) == {}
    with pytest.raises(ValueError, match="q, wide: no seconds"):
        runs_of(study)
    for damaged in ("[]", "{}", '{"steps": {"a": {}}}', '{"steps": 3}', "{"):
        (tmp_path / "seconds.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"seconds\.json"):
            runs_of(study)
    with pytest.raises(ValueError, match="needs a file of them"):
        replace(study, seconds="")


def test_the_file_of_seconds_lies_beside_the_study(tmp_path):
    text = "recipe: digits\nquestions: {a: {asks: Why, runs: {x: {}}}}\n"
    (tmp_path / "study.yaml").write_text(text + "seconds: kept/s.json\n")
    study = read_study(tmp_path / "study.yaml")
    assert study.seconds == str(tmp_path / "kept" / "s.json")


STUDIES = sorted((Path(__file__).parents[1] / "studies").glob("*.yaml"))


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_committed_seconds_are_of_all_steps_of_their_study(file):
    study = read_study(str(file))
    seconds = step_seconds(study)
    if not study.seconds:
        return
    assert seconds.keys() == steps_of(study).keys()
    found = runs_of(study)
    for (question, _), (run, *_) in found.items():
        asked = study.questions[question]
        if "seconds" in asked.equal:
            first = found[question, next(iter(asked.runs))][0]
            both = [seconds[r.step_name] * r.recipe.steps for r in (run, first)]
            assert both[0] == pytest.approx(both[1], rel=0.01)
