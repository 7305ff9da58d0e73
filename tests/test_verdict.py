"""Verdicts: what a trial has measured, and advice that is true."""

from dataclasses import replace

import torch
from tiny import TINY, write_images

from diffussm import verdict
from diffussm.doctor import Plan
from diffussm.options import Execution
from diffussm.recipes import read_recipe
from diffussm.trial import Trial

# Eight GPUs of 80 GB, which hold 20, take 0.8 s for a step and do nothing wrong
RECIPE, EXECUTION = read_recipe("imagenet256")
BEST = replace(EXECUTION, compile=True, activation_checkpointing="none")
EIGHT = Plan(RECIPE, BEST, torch.device("cuda", 0), processes=8, trial=200)


def imagined(pause=1.0, written=1.0, card=80e9, recipe=RECIPE, how=BEST, **figures):
    """The trial of a run whose log says this."""
    rows = []
    for step in range(20, 220, 20):
        row = {"images_per_second": 320.0, "memory_gb": 20.0, "data_wait": 0.0}
        row |= {"step": step, "images": 256 * step, "loss": 1.0}
        row["seconds"] = 0.8 * step + pause * (step > 100)
        rows.append(row | {key: value(step) for key, value in figures.items()})
    ours = replace(EIGHT, recipe=recipe, execution=how)
    return Trial(ours, rows, rows[5:], 1e10, written, card=card)


def told(**changes):
    """The report of a trial: what is said of each thing."""
    found = verdict.findings(imagined(**changes))
    return {one.what: f"{one.verdict} {one.told}" for one in found}


def hints(**changes):
    found = told(**changes).items()
    return {what: words for what, words in found if words.startswith("hint")}


def test_nothing_is_advised_where_nothing_is_to_be_gained():
    assert hints() == {}


def test_compiling_is_advised_to_whoever_does_not_compile_on_a_gpu():
    assert "--compile true" in hints(how=replace(BEST, compile=False))["compile"]
    slow = replace(imagined().plan, device=torch.device("cpu"))
    there = replace(imagined(), plan=replace(slow, execution=Execution()))
    assert verdict.CHANGES["compile"](there) is None


def test_memory_that_is_free_is_put_to_use_if_what_it_buys_fits():
    again = replace(BEST, activation_checkpointing="all")
    assert '--activation_checkpointing "none"' in hints(how=again)["memory"]
    few = replace(BEST, micro_batch=8)
    assert "--micro_batch 32" in hints(how=few)["memory"]
    assert "--micro_batch 16" in hints(how=few, card=40e9)["memory"]
    assert hints(how=few, card=24e9) == hints(how=again, card=24e9) == {}
    # the run has held twice of what was computed for it
    held = verdict.memory_needed(RECIPE, few, processes=8)["total"] / 1e9
    twice = hints(how=few, memory_gb=lambda step: 2 * held)["memory"]
    assert "--micro_batch 16" in twice
    assert "nearly full" in hints(memory_gb=lambda step: 78.0)["memory"]


def test_checkpoints_are_made_seldom_if_they_cost_much():
    often = replace(BEST, save_every=100)  # 80 s
    assert hints(how=often, pause=1.5, written=70.0) == {}
    assert "--save_every to 125" in hints(how=often, written=100.0)["save_every"]
    assert "--save_every to 250" in hints(how=often, pause=4.0)["save_every"]


def test_a_speed_that_changes_is_reported():
    once = {"images_per_second": lambda step: 100.0 if step == 160 else 320.0}
    assert "fell to 31%" in hints(**once, pause=0.0)["steadiness"]
    # what happens while blocks are compiled does not count
    first = {"images_per_second": lambda step: 10.0 if step <= 40 else 320.0}
    assert "steadiness" not in hints(**first)
    assert told(**first)["speed"].startswith("pass 320.0 images/s")


def test_who_waits_for_data_is_told_what_helps(monkeypatch, tmp_path):
    late = {"data_wait": lambda step: 0.4}
    folder = write_images(tmp_path / "images", 0)
    pictures = replace(TINY, data=folder, model=replace(TINY.model, num_classes=2))

    def cure(cores, recipe):
        monkeypatch.setattr(verdict.os, "cpu_count", lambda: cores)
        return verdict.CHANGES["data"](imagined(recipe=recipe, **late))

    assert "raise --workers, now 4 for 16 cores" in cure(128, pictures)
    assert "local disk" in cure(16, pictures)
    assert "more cores" in cure(128, TINY)


def test_the_hours_hold_the_pauses_for_checkpoints():
    steps = 0.8 * RECIPE.steps / 86400
    for every, pause in ((RECIPE.steps, 0.0), (100, 40.0)):
        how = replace(BEST, save_every=every)
        said = told(how=how, pause=pause)
        days = steps + pause * (RECIPE.steps // every) / 86400
        assert (
            f"{days:.1f} days on 8 GPUs, without pictures and scores"
            in said["whole run"]
        )
        assert f"training stood still for {pause:.1f} s" in said["checkpoint"]
