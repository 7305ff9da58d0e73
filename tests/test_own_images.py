"""A folder of 300 images to a grid: two commands for pixels, four for latents."""

import shutil

import numpy as np
import pytest
from commands import diffussm
from PIL import Image

from diffussm.latents import LatentStore
from diffussm.run_folder import read_run

TINY = (
    "--steps 2 --model.d_model 16 --model.n_blocks 1 --model.d_state 4 --device cpu "
    "--no_grid"
)
KINDS = ("cats", "dogs", "owls")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures of three kinds as people have them: sizes, modes and formats mixed."""
    folder, rng = tmp_path_factory.mktemp("own") / "photos", np.random.default_rng(0)
    forms = [
        ("RGB", "jpg"),
        ("L", "png"),
        ("RGBA", "png"),
        ("CMYK", "JPG"),
        ("P", "gif"),
    ]
    for i in range(300):
        mode, ending = forms[i % len(forms)]
        place = folder / KINDS[i % len(KINDS)]
        place.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(12, 40, 2)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(place / f"{i}.{ending}")
    (folder / "cats" / "Thumbs.db").write_bytes(b"\x00")
    (folder / "notes.txt").write_text("of last summer")
    return folder


def walk(commands, where, monkeypatch):
    """Type the commands in a clean folder; recipe, grid, and what was said."""
    monkeypatch.chdir(where)
    said = "".join(diffussm(command) for command in commands)
    assert "warning" not in said and "would have" not in said, said
    assert not list(where.rglob("*.y*ml"))
    run = read_run(where / "runs" / "own")
    assert (run.data["images"], tuple(run.data["classes"])) == (300, KINDS)
    assert run.recipe.model.num_classes == 3
    return run.recipe, np.asarray(Image.open(where / "grid.png")), said


@pytest.mark.end_to_end
def test_pixels_take_two_commands(photos, tmp_path, monkeypatch):
    commands = (
        f"train pixels --data {photos} --out runs/own {TINY}",
        "sample --from runs/own --grid grid.png --per_class 2 --steps 2 --device cpu",
    )
    recipe, grid, said = walk(commands, tmp_path, monkeypatch)
    assert (recipe.model.in_channels, recipe.model.input_size) == (3, 32)
    assert grid.shape[0] == 3 * (2 * 32 + 4) and grid.shape[2] == 3  # twice as large
    assert said.count("--model.num_classes 3") == 1


@pytest.mark.end_to_end
def test_latents_take_four_commands(photos, tmp_path, monkeypatch):
    commands = (
        f"vae {photos} coder --size 16 --steps 1",
        f"encode {photos} latents --vae coder --size 16 --device cpu",
        f"train latents --data latents --out runs/own {TINY}",
        "sample --from runs/own --vae coder --grid grid.png --per_class 2 --steps 2 "
        "--device cpu",
    )
    recipe, grid, said = walk(commands, tmp_path, monkeypatch)
    assert (recipe.model.in_channels, recipe.model.input_size) == (4, 4)
    assert recipe.flip and "300 images in 3 classes; 0 skipped" in said
    assert grid.shape[0] == 3 * (3 * 16 + 4) and grid.shape[2] == 3


@pytest.mark.slow
def test_latents_go_on_from_a_zip_of_the_folder_and_emoji_are_drawn(work, tmp_path):
    shutil.copytree(work / "latents", tmp_path / "latents")
    shutil.make_archive(str(tmp_path / "images"), "zip", work, "images")
    size = "--vae {w}/vae --size 16 --device cpu"
    words = f"encode {{t}}/images.zip {{t}}/latents --shard_size 8 {size}"
    assert "12 images in 2 classes" in diffussm(words, w=work, t=tmp_path)
    diffussm("vae openmoji {t}/coder --size 8 --steps 1", t=tmp_path)
    assert (tmp_path / "openmoji-8" / "train" / "faces").is_dir()
    words = f"encode openmoji {{t}}/emoji --no_flip {size.replace('16', '8')}"
    diffussm(words, w=work, t=tmp_path)
    assert LatentStore(tmp_path / "emoji").num_classes == 14
