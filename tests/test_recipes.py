"""Recipes: what a file says, and what lies at a path."""

import contextlib
import io
import json
import random
import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from commands import REFUSED, listing, nonsense
from PIL import Image

from diffussm import openmoji, recipes
from diffussm.data import TensorData
from diffussm.folders import ImageFolder
from diffussm.images import BadImage
from diffussm.latents import read_manifest, verify_store, with_checksum
from diffussm.model import PRESETS, DiffuSSMConfig
from diffussm.options import (
    RECIPES,
    Execution,
    Recipe,
    check_data,
    diffusion_of,
    flat,
    from_flat,
)
from diffussm.run_folder import RunConfig


def test_the_shipped_digits_recipe_is_the_one_of_chapter_9():
    assert recipes.read_recipe("digits") == (
        RECIPES["digits"],
        Execution(save_every=500),
    )


@pytest.mark.parametrize("name", recipes.recipe_files())
def test_every_recipe_is_read_and_its_model_is_a_preset(name):
    config, execution = recipes.read_recipe(name)
    presets = {
        "imagenet256": ("DiffuSSM-XL", 32, 1000),
        "imagenet256-p2": ("DiffuSSM-XL/2", 32, 1000),
        "imagenet256-s": ("DiffuSSM-S", 32, 1000),
        "imagenet256-b": ("DiffuSSM-B", 32, 1000),
        "imagenet256-l": ("DiffuSSM-L", 32, 1000),
        "imagenet512": ("DiffuSSM-XL", 64, 1000),
        "imagenet512-p2": ("DiffuSSM-XL/2", 64, 1000),
        "church256": ("DiffuSSM-XL", 32, 0),
        "bedroom256": ("DiffuSSM-XL", 32, 0),
    }
    if name in presets:
        preset, size, classes = presets[name]
        dropout = 0.1 if classes else 0.0
        assert config.model == DiffuSSMConfig(
            **PRESETS[preset],
            input_size=size,
            num_classes=classes,
            label_dropout=dropout,
        )
    elif name.endswith("-m1"):
        assert config.model == replace(
            recipes.read_recipe(name[:-3])[0].model, downsample=1
        )
    elif name not in ("openmoji", "latents"):
        preset = DiffuSSMConfig(**PRESETS["digits" if name == "digits" else "emoji"])
        classes = config.model.num_classes  # those of pixels are its data's
        assert replace(config.model, num_classes=preset.num_classes) == preset
        assert name == "pixels" or classes == preset.num_classes
    if config.model.d_model == 1152:  # the paper's appendix
        paper = {
            "batch_size": 256,
            "lr": 1e-4,
            "weight_decay": 0.0,
            "ema_decay": 0.9999,
            "timesteps": 1000,
        }
        assert {key: getattr(config, key) for key in paper} == paper
        assert (
            config.warmup == config.cooldown == 0
            and config.flip
            and config.precision == "bf16"
            and execution.compile
            and execution.convolution == "auto"
        )
        assert "paper" in recipes.recipe_files()[name].read_text()


def test_the_lengths_are_those_of_table_1():
    images = {
        name: (r := recipes.read_recipe(name)[0]).steps * r.batch_size
        for name in recipes.recipe_files()
    }
    assert (
        round(images["imagenet256"] / 1e6) == 550
        and round(images["imagenet512"] / 1e6) == 192
    )


@pytest.mark.parametrize("size", "sbl")
def test_the_runs_to_do_first_differ_from_xl_in_size_and_length_alone(size):
    xl, how = recipes.read_recipe("imagenet256")
    recipe, execution = recipes.read_recipe(f"imagenet256-{size}")
    sizes = {"d_model": xl.model.d_model, "n_blocks": xl.model.n_blocks}
    assert replace(recipe, steps=xl.steps, model=replace(recipe.model, **sizes)) == xl
    assert replace(execution, keep=how.keep) == how and recipe.steps == 400_000


EVERYTHING_OPEN = frozenset(
    {
        "model.in_channels",
        "model.input_size",
        "model.num_classes",
        "batch_size",
        "flip",
        "warmup",
        "cooldown",
    }
)


@pytest.mark.parametrize(
    ("name", "fixed"),
    [
        ("pixels", set()),
        ("latents", set()),
        ("imagenet256", EVERYTHING_OPEN - {"warmup", "cooldown"}),
        ("model: {in_channels: 3}\nwarmup: 7", {"model.in_channels", "warmup"}),
        ("model: {num_classes: 2}", {"model.num_classes"}),
    ],
)
def test_what_a_recipe_says_is_not_open_unless_it_is_made_for_any_data(
    tmp_path, name, fixed
):
    if name.startswith("model"):
        (tmp_path / "mine.yaml").write_text(name)
        name = str(tmp_path / "mine.yaml")
    assert recipes.left_open(name) == EVERYTHING_OPEN - fixed


def images(shape, count=12, classes=2, flip=False, levels=256):
    labels = torch.arange(count) % classes if classes else None
    return TensorData(torch.zeros(count, *shape), labels, flip=flip, levels=levels)


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (images((3, 32, 32)), {"model.num_classes": 2, "batch_size": 12}),
        (images((3, 32, 32), 50, 0), {"model.num_classes": 0}),
        (
            images((1, 8, 12), 40, 10),
            {
                "model.in_channels": 1,
                "model.input_size": (8, 12),
                "model.num_classes": 10,
            },
        ),
        (images((3, 32, 32), 1000, 1000, flip=True), {}),
    ],
)
def test_data_decide_exactly_what_is_open_and_does_not_fit(data, options):
    asked, _ = recipes.read_recipe("pixels")
    assert recipes.inferred(asked, data, EVERYTHING_OPEN) == options
    found = recipes.fit(asked, data, EVERYTHING_OPEN)
    check_data(data, found)
    model = {
        key.removeprefix("model."): value
        for key, value in options.items()
        if key.startswith("model.")
    }
    rest = {key: value for key, value in options.items() if "." not in key}
    assert found == replace(asked, model=replace(asked.model, **model), **rest)
    for name in options:
        with pytest.raises(ValueError, match=f"add --{name} "):
            check_data(data, recipes.fit(asked, data, EVERYTHING_OPEN - {name}))
    assert recipes.fit(asked, data, ()) == asked


def test_mirrored_latents_are_asked_for_only_where_they_are_stored():
    asked, _ = recipes.read_recipe("latents")
    plain, both = (
        images((4, 16, 16), 40, 3, flip=flip, levels=None) for flip in (False, True)
    )
    assert asked.flip and recipes.fit(asked, both, {"flip"}).flip
    assert not recipes.fit(asked, plain, {"flip"}).flip
    assert recipes.fit(asked, plain, ()).flip


def test_a_short_run_keeps_the_shape_of_its_recipe_where_it_may():
    digits, free = flat(*recipes.read_recipe("digits")), {"warmup", "cooldown"}
    assert (digits["warmup"], digits["cooldown"], digits["steps"]) == (100, 600, 1500)
    for steps in range(1, 1501):
        found = recipes.shortened(digits | {"steps": steps}, 1500, free)
        if steps >= 700:
            assert found == {}
        else:
            assert found == {"warmup": steps // 15, "cooldown": 600 * steps // 1500}
            assert sum(found.values()) <= steps
    typed = recipes.shortened(digits | {"steps": 150}, 1500, {"cooldown"})
    assert typed == {"cooldown": 60}


def test_emoji_are_drawn_once_by_whoever_is_first(tmp_path, monkeypatch):
    """Two processes at once: the later one finds the name taken, and takes that."""
    recipe, _ = recipes.read_recipe("pixels")
    small = replace(recipe.model, input_size=8, num_classes=14)
    recipe = replace(recipe, model=small, data="openmoji")
    real, calls = openmoji.draw_openmoji, []

    def draw(root, size):
        calls.append(root)
        drawn = real(root, size)
        if len(calls) == 1:  # another process is done first
            real(tmp_path / "openmoji-8", size)
        return drawn

    monkeypatch.setattr(openmoji, "draw_openmoji", draw)
    data = recipes.open_data(recipe, (), tmp_path)
    assert data.num_classes == 14 and data[0][0].shape == (3, 8, 8)
    assert data.root == str(tmp_path / "openmoji-8" / "train")
    assert [entry.name for entry in tmp_path.iterdir()] == ["openmoji-8"]
    before = listing(tmp_path)
    recipes.open_data(recipe, (), tmp_path)
    assert listing(tmp_path) == before
    latents, _ = recipes.read_recipe("latents")
    with pytest.raises(ValueError, match="holds no latents"):
        recipes.open_data(replace(latents, data="openmoji"), (), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_folder_without_classes_is_refused_with_the_option_to_add(zoo):
    recipe, _ = recipes.read_recipe("openmoji-pixels")
    recipe = replace(recipe, data=str(zoo / "a_first"))
    with pytest.raises(ValueError, match=r"14 classes, or --model\.num_classes 0"):
        recipes.open_data(recipe)
    assert recipes.open_data(recipe, {"model.num_classes"}).num_classes == 0


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
@pytest.mark.parametrize(
    "content", ['{"images": 9}', "[]", "no JSON", '{"format": "coco"}']
)
def test_a_manifest_of_something_else_makes_no_latents(zoo, name, content):
    (zoo / name).write_text(content)
    recipe, _ = recipes.read_recipe("pixels")
    data = recipes.open_data(replace(recipe, data=str(zoo)), EVERYTHING_OPEN)
    assert isinstance(data, ImageFolder) and len(data) == 9


@pytest.mark.parametrize("content", ["", "{}", '{"format": "diffussm-latents-9"}'])
def test_a_damaged_store_is_not_taken_for_images(work, tmp_path, content):
    shutil.copytree(work / "latents", tmp_path / "store")
    (tmp_path / "store" / "manifest.json").write_text(content)
    (tmp_path / "store" / "plan.json").unlink()
    recipe, _ = recipes.read_recipe("latents")
    with pytest.raises(ValueError, match="manifest"):
        recipes.open_data(replace(recipe, data=str(tmp_path / "store")))


def test_a_store_that_is_being_written_is_said_to_be_unfinished(work, tmp_path):
    plan = (work / "latents" / "plan.json").read_bytes()
    (tmp_path / "plan.json").write_bytes(plan)
    recipe, _ = recipes.read_recipe("latents")
    with pytest.raises(FileNotFoundError, match="if unfinished"):
        recipes.open_data(replace(recipe, data=str(tmp_path)))


def test_a_run_is_read_as_the_recipe_that_it_was(tmp_path):
    recipe, execution = recipes.read_recipe("digits")
    recipe = replace(recipe, lr=1e-5, seed=3)  # 1e-05 in JSON, a text in YAML
    execution = replace(execution, keep=("10", "4k images"))
    RunConfig(recipe, execution, {}).write(tmp_path)
    name = str(tmp_path / "config.json")
    assert recipes.read_recipe(name) == (recipe, execution)
    assert recipes.left_open(name) == frozenset()
    (tmp_path / "config.json").write_text('{"d_model": 3}')
    with pytest.raises(ValueError, match="not of a training run"):
        recipes.read_recipe(name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {}\nlr: 1e-4", "1.0e-4"),
        ("model: {}\nstepz: 3", "stepz"),
        ("model: {d_mode: 3}", "d_mode"),
        ("steps: 3", "model"),
        ("model: {}\nsteps: 3.5", "expected an integer"),
        ("model: {}\nsteps: yes", "expected an integer"),
        ("model: {}\nflip: 1", "true or false"),
        ("model: {}\ndata: 3", "expected a text"),
        ("a: &a [1]\nb: *a", "alias"),
        ("model: {d_model: 3, d_state: 3}", "d_state"),
        ("- 1", "no recipe: expected lines"),
        ("", "no recipe: expected lines"),
        ("{", "no recipe: while parsing"),
        ("!!python/object/apply:os.system [echo]", "could not determine a constructor"),
        ("model: {}\nlr: .nan", "lr"),
        ("model: 3", "expected names with values"),
        ("model: {}\nkeep: 1.5", "keep"),
        ("model: {}\nkeep: null", "keep"),
        ("model: {}\nkeep: [soon]", "keep"),
        ("1: 2", "no recipe: expected lines"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(tmp_path, text, said):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        recipes.read_recipe(str(file))


def test_500_fuzzed_configs_are_read_or_refused(tmp_path):
    import yaml

    rng = random.Random(0)
    names = [field.name for field in (*fields(Recipe), *fields(Execution))] + ["stepz"]
    inner = [field.name for field in fields(DiffuSSMConfig)] + ["d_mode"]
    file, read = tmp_path / "recipe.yaml", 0
    for turn in range(500):
        values = flat(RECIPES["digits"], Execution())
        for _ in range(rng.randrange(4)):
            if rng.random() < 0.4:
                values["model"][rng.choice(inner)] = nonsense(rng)
            else:
                values[rng.choice(names)] = nonsense(rng)
            if not isinstance(values["model"], dict):
                break
        text = yaml.safe_dump(values, allow_unicode=True).encode()
        if turn % 3 == 0:  # and a slip of the keyboard
            where = rng.randrange(len(text))
            text = (
                text[:where]
                + bytes([rng.randrange(256)])
                + text[where + rng.randrange(3) :]
            )
        file.write_bytes(text)
        try:
            config, execution = recipes.read_recipe(str(file))
        except REFUSED as error:
            assert len(str(error)) < 2000
        else:
            again = json.loads(json.dumps(flat(config, execution)))
            assert from_flat(again) == (config, execution)
            diffusion_of(replace(config, timesteps=min(config.timesteps, 1000)))
            read += 1
        assert file.read_bytes() == text and [file] == list(tmp_path.iterdir())
    assert 50 < read < 450  # the fuzz is neither all noise nor all harmless


def test_250_fuzzed_manifests_are_read_or_refused(work, tmp_path):
    rng = random.Random(1)
    good = read_manifest(work / "latents")
    store = tmp_path / "store"
    store.mkdir()
    for shard in (work / "latents").glob("shard-*"):
        (store / shard.name).write_bytes(shard.read_bytes())
    shards = listing(store)
    config = replace(recipes.read_recipe(str(work / "tiny.yaml"))[0], data=str(store))
    for turn in range(250):
        values = json.loads(json.dumps(good))
        place = rng.choice(
            [values, values, values["vae"], values["shards"][0], values["data"]]
        )
        place[rng.choice(list(place))] = nonsense(rng)
        values = json.loads(json.dumps(values))  # keys become strings
        text = json.dumps(with_checksum(values) if turn % 2 else values).encode()
        if turn % 5 == 0:
            where = rng.randrange(len(text))
            text = (
                text[:where]
                + bytes([rng.randrange(256)]) * rng.randrange(2)
                + text[where + 1 :]
            )
        (store / "manifest.json").write_bytes(text)
        with contextlib.suppress(*REFUSED):
            found = recipes.open_data(config)
            found[0], found.labels
        assert isinstance(verify_store(store), list)
        assert (store / "manifest.json").read_bytes() == text
        (store / "manifest.json").unlink()
        assert listing(store) == shards


def test_250_fuzzed_images_are_read_or_refused(tmp_path):
    rng = random.Random(2)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    originals = []
    for kind, mode in (
        ("png", "RGB"),
        ("png", "P"),
        ("jpeg", "RGB"),
        ("jpeg", "CMYK"),
        ("gif", "P"),
        ("webp", "RGB"),
        ("bmp", "RGB"),
    ):
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(buffer, format=kind)
        originals.append((kind, buffer.getvalue()))
    folder, refused = tmp_path / "images", 0
    folder.mkdir()
    for _ in range(250):
        kind, content = rng.choice(originals)
        damaged = bytearray(content)
        for _ in range(rng.randrange(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        if rng.random() < 0.4:
            del damaged[rng.randrange(len(damaged)) :]
        file = folder / f"image.{kind}"
        file.write_bytes(damaged)
        before = listing(folder)
        try:
            image, label = ImageFolder(folder, 8, conditional=False)[0]
        except BadImage:
            refused += 1
        else:
            assert (
                image.shape == (3, 8, 8) and bool(image.isfinite().all()) and label == 0
            )
        assert listing(folder) == before
        file.unlink()
    assert 25 < refused < 250
