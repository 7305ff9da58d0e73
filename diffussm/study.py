"""A study.

Generated from book/92_study.md by `make export`: edit there.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from yaml import YAMLError

from diffussm.data import Dataset
from diffussm.files import read_json
from diffussm.guards import (
    bounded,
    check_fields,
    expect_int,
    expect_one_of,
    expect_there,
    explain,
    from_dict,
    refuse,
)
from diffussm.model_config import DiffuSSMConfig
from diffussm.options import Execution, Recipe, check_data, flat, from_flat
from diffussm.parallel import check_way, micro_batch_of
from diffussm.recipes import open_data, open_held_out, read_recipe, read_yaml
from diffussm.sample_options import Sampler
from diffussm.variants import count_parameters, image_macs, matched, network

__all__ = [
    "Question",
    "Measure",
    "as_asked",
    "as_json",
    "Study",
    "read_study",
    "Run",
    "step_seconds",
    "runs_of",
    "images_of",
]


@dataclass(frozen=True)
class Question:
    """What is asked, and the runs that answer it, each with its options.

    Args:
        asks: The question, in words.
        runs: By name, the options in which a run differs, as `model.downsample: 1`.
        equal: What all its runs have as the first has it: "parameters", by the width,
            or "operations" or "seconds", by the number of steps; "" leaves both.
        claim: What is claimed, in words, and by whom.
        first, second: The claim is that the first of these is not worse ... A name such
            as `DiT *` is the best of all that begin so.
        margin: ... than the second by more than this, in the unit of `by`.
        by: What is compared, the less the better: "bits" per dimension, held-out
            "loss", "frechet" distance of drawn images, or their "disagreement": the
            share in which the classifier reads another class.
    """

    asks: str
    runs: dict[str, Any]
    equal: Literal[
        "",
        "parameters",
        "operations",
        "seconds",
        "parameters and operations",
        "parameters and seconds",
    ] = ""
    claim: str = ""
    first: str = ""
    second: str = ""
    margin: float = bounded(0.0, least=0)
    by: Literal["bits", "loss", "frechet", "disagreement"] = "bits"

    def named(self, pattern: str) -> list[str]:
        """The runs that a name with or without `*` stands for."""
        return [name for name in self.runs if fnmatchcase(name, pattern)]

    def __post_init__(self) -> None:
        check_fields(self)
        refuse(not self.runs, f"{self.asks!r} has no runs to compare")
        for name, own in self.runs.items():
            told = f"run {name!r}: expected a name in quotes and options as name: value"
            refuse(not isinstance(name, str) or not isinstance(own, dict | None), told)
        for name in filter(None, (self.first, self.second)):
            if not self.named(name):
                expect_one_of("a claim is about its runs; run", name, self.runs)
        told = f"{self.asks!r}: a claim has words, and two runs, a first and a second"
        given = self.claim, self.first, self.second
        refuse(any(given) and (not all(given) or self.first == self.second), told)


@dataclass(frozen=True)
class Measure:
    """What is measured of a finished run, on images that it has not seen.

    Args:
        bits_steps: Lengths of the chains for which the bound is computed.
        bits_images: Images whose bound is computed.
        score_images: Images drawn for the kernel distances; 0 draws none.
        judged_images: Images drawn for ch. "A judge of drawn images"; 0 draws none.
        guidance: With each of these scales so many are drawn; 1 is none.
    """

    bits_steps: tuple[int, ...] = (25,)
    bits_images: int = bounded(64, least=2)
    score_images: int = bounded(128, least=0)
    judged_images: int = bounded(0, least=0)
    guidance: tuple[float, ...] = (1.0,)


def as_asked(row: dict[str, Any], measure: Measure) -> bool:
    """Whether a row was measured in this way."""
    found = row.get("measure")
    return found is not None and as_json(Measure()) | found == as_json(measure)


def as_json(measure: Measure) -> dict[str, Any]:
    """The measures of a row, as a file has them."""
    return dict(json.loads(json.dumps(asdict(measure))))


@dataclass(frozen=True)
class Study:
    """Questions about one recipe.

    Args:
        recipe: What all runs start from: a recipe's name, or a YAML file.
        questions: By name.
        options: Changes to the recipe, for all runs.
        seeds: Every run is trained so many times, with the seeds 0, 1, ...
        looks: So often a run's held-out loss is computed on the way.
        measure: How finished runs are measured.
        seconds: A file that says how long a step takes; see eq-study-seconds.
    """

    recipe: str
    questions: dict[str, Question]
    options: dict[str, Any] = field(default_factory=dict)
    seeds: int = bounded(3, least=1)
    looks: int = bounded(10, least=1)
    measure: Measure = Measure()
    seconds: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        check_fields(self.measure)
        refuse(not self.questions, "a study needs questions")
        refuse("seed" in self.options, "options: seeds says how many seeds there are")
        drawn = {one.by for one in self.questions.values()} - {"bits", "loss"}
        told = f"by {' and '.join(sorted(drawn))}: measure has no judged_images"
        refuse(drawn and not self.measure.judged_images, told)
        timed = any("seconds" in one.equal for one in self.questions.values())
        told = "equal: seconds needs a file of them, as 'seconds: seconds.json'"
        refuse(timed and not self.seconds, told)


def read_study(file: str | Path) -> Study:
    """The study that a YAML file describes.

    Raises:
        ValueError: it is none; the message names the question.
        FileNotFoundError: there is no such file.
    """
    file = expect_there(Path(file), "the YAML file of a study")
    with explain(f"{file} is no study", ValueError, YAMLError):
        values = read_yaml(file)
        asked: Any = values.get("questions")
        refuse(not isinstance(asked, dict), "expected a section 'questions:'")
        questions = {
            str(name): from_dict(Question, one, f"the question {name!r}")
            for name, one in asked.items()
        }
        study = from_dict(Study, {**values, "questions": questions}, "a study")
        beside = study.seconds and str(file.parent / study.seconds)
        return replace(study, seconds=beside)


@dataclass(frozen=True)
class Run:
    """One training run: what it learns, how it is carried out, and with which network.

    The empty variant is a `DiffuSSM`; see ch. "Variants" for others. `guidance` is of
    the images that are drawn afterwards: which of those measured is meant.
    """

    recipe: Recipe
    execution: Execution
    variant: str = ""
    guidance: float = 1.0

    @property
    def digest(self) -> str:
        """The name of what is learned: the same for the same recipe."""
        return _digest(asdict(self.recipe) | {"variant": self.variant})

    @property
    def step(self) -> dict[str, Any]:
        """All that decides how long a training step takes, on one machine."""
        kept = ("model", "batch_size", "precision")
        values = asdict(self.recipe)
        return {"variant": self.variant} | {name: values[name] for name in kept}

    @property
    def step_name(self) -> str:
        """The name of its step: the same for all seeds and learning rates."""
        return _digest(self.step)


def _digest(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _run_of(base: dict[str, Any], options: dict[str, Any]) -> Run:
    """The run with the options of a recipe and changes to them."""
    values = {**base, "model": dict(base["model"])}
    for name, value in options.items():
        section = values["model"] if name.startswith("model.") else values
        section[name.removeprefix("model.")] = value
    variant = str(values.pop("variant", ""))
    guidance = float(values.pop("guidance", 1.0))
    return Run(*from_flat(values), variant, guidance)


def step_seconds(study: Study) -> dict[str, float]:
    """Processor seconds of a training step, by its name; empty without a file."""
    file = Path(study.seconds)
    if not study.seconds or not file.exists():
        return {}
    found, kinds = read_json(file), (ValueError, LookupError, TypeError, AttributeError)
    with explain(f"{file} has no seconds of steps", *kinds):
        return {name: float(step["seconds"]) for name, step in found["steps"].items()}


def _cost(run: Run, what: str, seconds: dict[str, float]) -> float:
    """What a step of a run costs: operations, or seconds."""
    if what == "operations":
        return run.recipe.batch_size * image_macs(run.variant, run.recipe.model)
    told = "no seconds of its step are known: --time measures them"
    refuse(not seconds.get(run.step_name, 0) > 0, told)
    return seconds[run.step_name]


def _equal(run: Run, first: Run, what: str, seconds: dict[str, float]) -> Run:
    """The run with as much of something as the first of its question."""
    if what == "parameters":
        wanted = count_parameters(first.variant, first.recipe.model)
        variant, model = matched(run.variant, run.recipe.model, wanted)
        return replace(run, variant=variant, recipe=replace(run.recipe, model=model))
    if what:
        share = _cost(first, what, seconds) / _cost(run, what, seconds)
        phases = ("steps", "warmup", "cooldown")
        longer: Any = {k: round(share * getattr(first.recipe, k)) for k in phases}
        return replace(run, recipe=replace(run.recipe, **longer))
    return run


def _seeded(run: Run, study: Study) -> list[Run]:
    """The run with each seed, and how it is logged and saved."""
    look = max(run.recipe.steps // study.looks, 1)
    line = max(look // 3, 1)
    often: dict[str, Any] = {"log_every": line, "score_every": look // line * line}
    saved: dict[str, Any] = {"save_every": -(-run.recipe.steps // 5), "keep_last": 1}
    how = replace(run.execution, **often, **saved, sample_every=0)
    recipes = (replace(run.recipe, seed=seed) for seed in range(study.seeds))
    return [replace(run, recipe=recipe, execution=how) for recipe in recipes]


def runs_of(
    study: Study, beside: Path | None = None
) -> dict[tuple[str, str], list[Run]]:
    """The runs of each question and name, one for each seed; all of them can work.

    Args:
        beside: Where images are drawn, if they are not there; None looks at none.

    Raises:
        ValueError: some cannot; the message names each of them.
    """
    base, found, wrong = flat(*read_recipe(study.recipe)), {}, []
    seconds = step_seconds(study)
    for question, asked in study.questions.items():
        first: Run | None = None
        for name, own in asked.runs.items():
            try:
                run = _run_of(base, {**study.options, **(own or {})})
                first = first or run
                for what in asked.equal.split(" and "):
                    run = _equal(run, first, what, seconds)
                _check_run(run, study.measure, beside)
                found[question, name] = _seeded(run, study)
            except (ValueError, OSError) as error:
                wrong.append(f"{question}, {name}: {error}")
    refuse(wrong, "no run was started: " + "; ".join(wrong))
    return found


def _check_run(run: Run, measure: Measure, beside: Path | None) -> None:
    """Refuse what train, or a measurement, would refuse."""
    micro_batch_of(run.recipe, run.execution)
    check_way(partial(network, run.variant), run.recipe, run.execution)
    for steps in measure.bits_steps:
        expect_int("bits_steps", steps, least=1, most=run.recipe.timesteps)
    _check_guidance(run, measure)
    if beside is not None:
        data, held_out = images_of(run, beside)
        check_data(data, run.recipe)
        check_data(held_out, replace(run.recipe, batch_size=1))
        told = "judged_images: latents are not judged, images are"
        refuse(measure.judged_images and data.levels is None, told)


def _check_guidance(run: Run, measure: Measure) -> None:
    for scale in measure.guidance:
        Sampler(cfg_scale=scale)
    told = f"guidance={run.guidance:g}: "
    if not measure.judged_images:
        refuse(run.guidance != 1, f"{told}nothing is drawn, measure no judged_images")
        return
    expect_int("judged_images", measure.judged_images, least=2)
    known = ", ".join(f"{scale:g}" for scale in measure.guidance)
    lacks = run.guidance not in measure.guidance
    refuse(lacks, f"{told}measure has guidance [{known}] only")
    refuse(not run.recipe.model.num_classes, "judged_images: the model has no classes")


def images_of(run: Run, beside: Path) -> tuple[Dataset, Dataset]:
    """The images that a run is trained on, and those that it does not see."""
    recipe, sizes = run.recipe, run.recipe.model
    kinds = ("input_size", "in_channels", "num_classes")
    plain: Any = {kind: getattr(sizes, kind) for kind in kinds}
    model = DiffuSSMConfig(**plain, downsample=1, patch_size=1)
    how: Any = {kind: getattr(recipe, kind) for kind in ("data", "flip", "exif_rotate")}
    return _opened(Recipe(model=model, **how), run.execution.held_out, beside)


@lru_cache(maxsize=8)
def _opened(recipe: Recipe, named: str, beside: Path) -> tuple[Dataset, Dataset]:
    """The images of all runs that have these in common."""
    data = open_data(recipe, (), beside)
    return data, open_held_out(named, recipe, data.classes, beside)
