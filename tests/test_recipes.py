"""Recipes: what a file says, and what lies at a path."""

import contextlib
import io
import json
import random
from dataclasses import fields, replace

import numpy as np
import pytest
from commands import REFUSED, listing, nonsense
from PIL import Image

from diffussm import recipes
from diffussm.folders import ImageFolder
from diffussm.images import BadImage
from diffussm.latents import read_manifest, verify_store, with_checksum
from diffussm.model import PRESETS, DiffuSSMConfig
from diffussm.options import RECIPES, Execution, Recipe, diffusion_of, flat, from_flat


def test_the_shipped_digits_recipe_is_the_one_of_chapter_9():
    assert recipes.read_recipe("digits") == (
        RECIPES["digits"],
        Execution(save_every=500),
    )


@pytest.mark.parametrize("name", recipes.recipe_files())
def test_every_recipe_is_read_and_its_model_is_a_preset(name):
    config, _ = recipes.read_recipe(name)
    presets = {
        "imagenet256": ("DiffuSSM-XL", 32, 1000),
        "imagenet256-p2": ("DiffuSSM-XL/2", 32, 1000),
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
    elif name != "openmoji":
        assert config.model == DiffuSSMConfig(
            **PRESETS["digits" if name == "digits" else "emoji"]
        )
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
