"""What decides a run: what is refused, and batches as functions of the step."""

import threading
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from tiny import SELDOM, TINY, changed, write_images

from diffussm.data import TensorData, batch_indices, generator
from diffussm.folders import ImageFolder
from diffussm.model import DiffuSSM, DiffuSSMConfig
from diffussm.options import (
    RECIPES,
    Execution,
    as_flags,
    check_data,
    flat,
    from_flat,
    misfits,
    training_batch,
    training_batches,
    warn,
)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    data = TensorData(torch.rand(50, 1, 8, 8) * 2 - 1, torch.arange(50) % 10)
    model = DiffuSSM(TINY.model)
    torch.manual_seed(1)
    a = training_batch(data, model, TINY, 3)
    torch.manual_seed(2)
    b = training_batch(data, model, TINY, 3)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for config, step in ((TINY, 4), (replace(TINY, seed=1), 3)):
        other = training_batch(data, model, config, step)
        assert not torch.equal(a.noise, other.noise) and not torch.equal(a.t, other.t)


def test_drawing_a_batch_leaves_the_global_generator_alone():
    data = TensorData(torch.zeros(50, 1, 8, 8), torch.arange(50) % 10)
    model = DiffuSSM(TINY.model)
    before = torch.get_rng_state()
    training_batch(data, model, TINY, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_parts_of_processes_make_the_batch():
    data = TensorData(torch.rand(50, 1, 8, 8) * 2 - 1, torch.arange(50) % 10)
    model = DiffuSSM(TINY.model)
    whole = training_batch(data, model, TINY, 3)
    for size in (2, 4, 8):
        parts = [
            training_batch(data, model, TINY, 3, rank, size) for rank in range(size)
        ]
        assert all(
            torch.equal(torch.cat(a), b)
            for a, b in zip(zip(*parts, strict=True), whole, strict=True)
        )
    ahead = list(training_batches(data, model, TINY, 7))
    assert len(ahead) == 3 and torch.equal(
        ahead[1].x0, training_batch(data, model, TINY, 8).x0
    )


def test_a_data_set_that_draws_gets_noise_of_its_own():
    class Blurred(TensorData):
        def batch(self, indices, flips, noise, fetch):
            return self.images[indices] + noise, self.labels[indices]

    data = Blurred(torch.zeros(50, 1, 8, 8), torch.arange(50) % 10, levels=None)
    model = DiffuSSM(TINY.model)
    whole = training_batch(data, model, TINY, 3)
    assert (
        not torch.equal(whole.x0, whole.noise) and abs(float(whole.x0.std()) - 1) < 0.1
    )
    parts = [training_batch(data, model, TINY, 3, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([part.x0 for part in parts]), whole.x0)


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


def test_threads_decode_at_the_same_time_and_change_nothing(tmp_path):
    data = write_images(tmp_path / "images", 1, count=32)
    model = replace(TINY.model, num_classes=2, in_channels=3)
    config = replace(TINY, model=model, data=data, steps=3)
    meeting = threading.Barrier(4, timeout=60)

    class Meeting(ImageFolder):
        """Its images come only when four of them are asked for at once."""

        def __getitem__(self, index):
            meeting.wait()
            return super().__getitem__(index)

    folder, model = ImageFolder(data, 8, flip=False), DiffuSSM(config.model)
    meet = Meeting(data, 8, flip=False)
    together = list(training_batches(meet, model, config, 0, workers=4))
    one_by_one = list(training_batches(folder, model, config, 0, workers=1))
    for a, b in zip(together, one_by_one, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


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


def test_each_draw_of_a_step_has_a_purpose_of_its_own():
    # so that no draw depends on which others are made, or in which order
    data = TensorData(torch.zeros(50, 1, 8, 8), torch.arange(50) % 10)
    model = DiffuSSM(TINY.model)
    batch = training_batch(data, model, TINY, 3)
    shape, count = batch.noise.shape, (TINY.batch_size,)
    draw = partial(generator, TINY.seed, number=3)
    assert torch.equal(batch.noise, torch.randn(shape, generator=draw("noise")))
    t = torch.randint(TINY.timesteps, count, generator=draw("timesteps"))
    assert torch.equal(batch.t, t)
    labels = data.labels[batch_indices(50, *count, 3, TINY.seed)]
    dropped = model.drop_labels(labels, draw("label dropout"))
    assert torch.equal(batch.y, dropped)


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
