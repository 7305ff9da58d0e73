"""A run that begins with the weights of another: what is taken, new and refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from commands import diffussm
from tiny import SELDOM, TINY, log_of, run_tiny

from diffussm.data import TensorData, digits
from diffussm.model import DiffuSSM
from diffussm.run_folder import load_run
from diffussm.runs import train
from diffussm.training import TrainState
from diffussm.warm_start import inherit, warm_start

DATA = TensorData(*digits("train"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A run of three steps on all ten digits."""
    run = tmp_path_factory.mktemp("other") / "run"
    run_tiny(run, steps=3)
    return run


def begin(run, recipe, other):
    return warm_start(run, recipe, SELDOM, DATA, other)


def test_the_averaged_weights_are_both_networks_and_the_step_is_0(other, tmp_path):
    origin = begin(tmp_path / "run", replace(TINY, seed=7), other)
    theirs, model = load_run(other)[0].state_dict(), load_run(other, "model")[0]
    assert any(not torch.equal(p, theirs[k]) for k, p in model.state_dict().items())
    for name in ("ema", "model"):
        ours = load_run(tmp_path / "run", name)[0].state_dict()
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
        assert ours.keys() == theirs.keys() == set(origin["taken"])
    assert origin["new"] == [] and origin["run"] == str(other)
    assert (tmp_path / "run" / "checkpoints" / "step_00000000").is_dir()
    assert json.loads((tmp_path / "run" / "init.json").read_text()) == origin


@pytest.mark.parametrize(
    ("sizes", "new"),
    [
        ({"num_classes": 3}, ["embed_y.weight"]),
        ({"num_classes": 0}, []),
        ({"input_size": 16}, []),
        ({}, []),
    ],
)
def test_only_what_depends_on_the_classes_is_new(other, sizes, new):
    recipe = replace(TINY, seed=7, model=replace(TINY.model, **sizes))
    state, origin = inherit(recipe, other)
    fresh = TrainState.create(recipe).model.state_dict()
    theirs = load_run(other)[0].state_dict()
    assert origin["new"] == new and sorted([*origin["taken"], *new]) == sorted(fresh)
    for network in (state.model, state.ema):
        for name, tensor in network.state_dict().items():
            source = fresh if name in new else theirs
            assert torch.equal(tensor, source[name]), name


@pytest.mark.parametrize(
    ("sizes", "flag"),
    [
        ({"d_model": 24}, "--model.d_model 16"),
        ({"n_blocks": 2}, "--model.n_blocks 1"),
        ({"d_state": 8, "patch_size": 2}, "--model.d_state 4 --model.patch_size 1"),
    ],
)
def test_another_width_or_depth_is_refused_before_there_is_a_folder(
    other, tmp_path, sizes, flag
):
    recipe = replace(TINY, model=replace(TINY.model, **sizes))
    with pytest.raises(ValueError, match=f"which differs in .*Add {flag},"):
        begin(tmp_path / "run", recipe, other)
    assert not list(tmp_path.iterdir())


def test_a_killed_run_goes_on_exactly_though_the_other_is_gone(other, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(other, source)
    for run in ("straight", "killed"):
        begin(tmp_path / run, TINY, source)
    shutil.rmtree(source)
    straight = train(TINY, tmp_path / "straight", SELDOM, "cpu", False, dataset=DATA)
    half = replace(TINY, steps=5)
    train(half, tmp_path / "killed", SELDOM, "cpu", False, dataset=DATA)
    begin(tmp_path / "killed", TINY, source)  # nothing is read of it
    killed = train(TINY, tmp_path / "killed", SELDOM, "cpu", False, dataset=DATA)
    for name, tensor in straight.ema.state_dict().items():
        assert torch.equal(tensor, killed.ema.state_dict()[name])
    assert log_of(tmp_path / "straight") == log_of(tmp_path / "killed")
    cold = run_tiny(tmp_path / "cold")
    assert any(
        not torch.equal(tensor, cold.ema.state_dict()[name])
        for name, tensor in straight.ema.state_dict().items()
    )


def test_a_run_that_began_otherwise_is_refused(other, tmp_path):
    run_tiny(tmp_path / "run", steps=2)
    with pytest.raises(ValueError, match=r"other weights.*there None.*--init_from"):
        begin(tmp_path / "run", replace(TINY, steps=2), other)
    assert not (tmp_path / "run" / "init.json").exists()
    begin(tmp_path / "warm", TINY, other)
    shutil.copytree(other, tmp_path / "another")
    with pytest.raises(ValueError, match="other weights"):
        begin(tmp_path / "warm", TINY, tmp_path / "another")


def test_a_claim_that_was_killed_before_the_first_checkpoint_is_repeated(
    other, tmp_path
):
    begin(tmp_path / "run", TINY, other)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    begin(tmp_path / "run", TINY, other)
    assert (tmp_path / "run" / "checkpoints" / "step_00000000").is_dir()


def test_the_command_says_what_is_taken_and_what_is_new(other, tmp_path):
    words = (
        f"train {other}/config.json --out {tmp_path}/run --init_from {other} --steps 4 "
        "--device cpu --no_grid"
    )
    said = diffussm(words)
    count = len(DiffuSSM(TINY.model).state_dict())
    assert f"{count} tensors of {other}; new: nothing" in said
    assert "4 steps done" in said and "4 steps done" in diffussm(words)
    wrong = words.replace("--init_from " + str(other), f"--init_from {tmp_path}/no")
    assert "other weights" in diffussm(wrong, 1)
    assert "not a training run" in diffussm(wrong.replace("/run ", "/run2 "), 1)
    assert not (tmp_path / "run2").exists()
