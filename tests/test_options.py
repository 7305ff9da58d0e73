"""What decides a run: what is refused, and old names."""

from dataclasses import asdict, replace

import pytest
import torch
from tiny import SELDOM, TINY, changed

from diffussm.data import TensorData
from diffussm.model import DiffuSSMConfig
from diffussm.options import (
    RECIPES,
    Execution,
    as_flags,
    check_data,
    flat,
    from_flat,
    misfits,
    warn,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"lr": 1.5}, "learning rate"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"precision": "fp8"}, "float32"),
        ({"warmup": 9, "cooldown": 9}, "fit into steps=10"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_options_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        changed(changes)


def test_unknown_options_are_refused_by_name():
    assert from_flat(flat(TINY, SELDOM)) == (TINY, SELDOM)
    with pytest.raises(ValueError, match="learning_rat"):
        from_flat({**asdict(TINY), "learning_rat": 1e-4})
    with pytest.raises(ValueError, match="'model' section"):
        from_flat({})


def test_old_names_are_read_with_a_warning_that_says_the_new(capsys):
    warn.cache_clear()
    old = {**asdict(TINY), "parallel": "fsdp", "recompute": True}
    old["convolution"] = "diffussm.gpu_kernels:choose_convolution"
    _, execution = from_flat(old)
    assert execution.strategy == "fsdp" and execution.activation_checkpointing == "all"
    assert Execution(activation_checkpointing=False).activation_checkpointing == "none"
    assert execution.convolution == "auto"
    said = capsys.readouterr().err
    assert "parallel is called strategy" in said
    assert "recompute is called activation_checkpointing" in said


def test_an_option_under_both_names_with_two_values_is_refused():
    both = {"strategy": "ddp", "parallel": "fsdp"}
    for order in (list(both), list(reversed(both))):
        values = {**asdict(TINY), **{name: both[name] for name in order}}
        with pytest.raises(
            ValueError, match="parallel='fsdp' and strategy='ddp' are one"
        ):
            from_flat(values)
    _, execution = from_flat({**asdict(TINY), "strategy": "fsdp", "parallel": "fsdp"})
    assert execution.strategy == "fsdp"


def test_the_recipes_are_the_presets():
    from diffussm.model import PRESETS

    for name, recipe in RECIPES.items():
        assert recipe.model == DiffuSSMConfig(**PRESETS[name])


def test_images_are_counted_exactly():
    keep = ("338M images", "338_000_000 images", "400k", "7")
    assert Execution(keep=keep).keep_steps(256) == {1_320_313, 400_000, 7}
    assert 256 * 1_320_312 < 338_000_000 <= 256 * 1_320_313
    assert Execution(keep=("0.5M images",)).keep_steps(8) == {62_500}
    assert Execution(keep=[3, "5"]).keep == ("3", "5")
    assert Execution(keep="3, 338M images").keep == ("3", "338M images")


@pytest.mark.parametrize(
    "entry", ["", "0", "-3", "1.5", "338M image", "0 images", "ten", "1e6", "5 steps"]
)
def test_what_keep_cannot_mean_is_refused(entry):
    with pytest.raises(ValueError, match="'338M images'"):
        Execution(keep=("5", entry))


def test_recipes_at_full_scale_clip_and_keep_the_papers_other_row():
    from diffussm import recipes

    for name in recipes.recipe_files():
        config, _ = recipes.read_recipe(name)
        if config.model.d_model == 1152:
            assert config.clip == 1.0 and not config.ema_warmup, name
    config, execution = recipes.read_recipe("imagenet256")
    (step,) = execution.keep_steps(config.batch_size)
    assert (
        (step - 1) * config.batch_size < 338_000_000 <= step * config.batch_size
        and step < config.steps
    )


def test_the_defaults_that_are_ours_are_the_papers_at_full_scale():
    from diffussm import recipes

    def three(config):
        return config.ema_warmup, config.flip, config.precision

    assert three(TINY) == (True, False, "float32")
    for name in recipes.recipe_files():
        if name.startswith("imagenet"):
            assert three(recipes.read_recipe(name)[0]) == (False, True, "bf16"), name


def test_misfits_are_named_as_one_would_type_them():
    data = TensorData(torch.zeros(5, 3, 8, 12), torch.arange(5) % 2)
    wrong = misfits(data, TINY)
    assert wrong == {
        "model.in_channels": 3,
        "model.input_size": (8, 12),
        "model.num_classes": 2,
        "batch_size": 5,
    }
    flags = (
        "--model.in_channels 3 --model.input_size [8,12] --model.num_classes 2 "
        "--batch_size 5"
    )
    assert as_flags(wrong) == flags and as_flags({"flip": False}) == "--flip false"
    with pytest.raises(ValueError) as refused:
        check_data(data, TINY)
    assert str(refused.value).endswith(f"add {flags}")
    square = replace(TINY, model=replace(TINY.model, input_size=(8, 8)))
    ten = TensorData(torch.zeros(10, 1, 8, 8), torch.arange(10))
    assert not misfits(ten, square)
