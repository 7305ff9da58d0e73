"""OpenMoji: in the middle, in colour, always the same, never over anything."""

from pathlib import Path

import numpy as np
import pytest
from pictures import opened, write
from PIL import Image

from diffussm.folders import ImageFolder
from diffussm.formats import find_broken_images
from diffussm.openmoji import OPENMOJI_CLASSES, draw_openmoji

# OpenMoji


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    return draw_openmoji(tmp_path_factory.mktemp("emoji") / "made" / "openmoji", 32)


def test_openmoji_reads_as_imagenet(emoji):
    train, val = (ImageFolder(emoji / split, 32) for split in ("train", "val"))
    assert (
        train.classes == val.classes == tuple(sorted(OPENMOJI_CLASSES))
        and train.num_classes == 14
    )
    assert (
        find_broken_images(train) == find_broken_images(val) == []
        and min(train.labels.bincount()) >= 20
        and min(val.labels.bincount()) >= 3
    )
    names = [Path(f.path(i)).stem for f in (train, val) for i in range(len(f))]
    assert (
        len(set(names)) == len(names) > 700
    )  # no picture twice, not in two classes and not in two splits
    assert all(
        opened(f.path(i)).shape == (32, 32, 3)
        for f in (train, val)
        for i in range(0, len(f), 50)
    )


def test_openmoji_pictures_are_in_the_middle_and_in_colour(emoji):
    heart = opened(next(emoji.glob("*/hearts/1F49A.png")))  # the green heart
    assert (
        (heart[0] == 255).all()
        and (heart[:, 0] == 255).all()
        and (heart[-1] == 255).all()
        and (heart[:, -1] == 255).all()
    )
    r, g, b = heart[16, 16]
    assert g > r > b and g - b > 60
    for path in emoji.glob("*/*/*.png"):
        ink = np.argwhere((opened(path) < 250).any(-1))
        assert len(ink) and np.abs((ink.min(0) + ink.max(0)) / 2 - 15.5).max() < 8, path


def test_openmoji_is_deterministic_and_names_its_authors(emoji, tmp_path):
    again = draw_openmoji(tmp_path / "again", 32)
    files = sorted(p.relative_to(emoji) for p in emoji.rglob("*") if p.is_file())
    assert files == sorted(
        p.relative_to(again) for p in again.rglob("*") if p.is_file()
    )
    assert all((emoji / p).read_bytes() == (again / p).read_bytes() for p in files)
    assert "CC BY-SA 4.0" in (emoji / "openmoji.json").read_text()
    assert list(tmp_path.iterdir()) == [again]  # no draft left behind


def test_openmoji_never_overwrites(emoji, tmp_path):
    stamps = {p: p.stat().st_mtime_ns for p in emoji.rglob("*")}
    assert draw_openmoji(emoji, 32) == emoji
    for options in (
        {"size": 64},
        {"size": 32, "background": (0, 0, 0)},
        {"size": 32, "seed": 1},
    ):
        with pytest.raises(FileExistsError, match="not this drawing"):
            draw_openmoji(emoji, **options)
    assert stamps == {p: p.stat().st_mtime_ns for p in emoji.rglob("*")}
    precious = write(tmp_path / "mine" / "thesis.txt", b"years of work")
    with pytest.raises(FileExistsError, match="nothing was written"):
        draw_openmoji(tmp_path / "mine", 32)
    with pytest.raises(FileExistsError, match="nothing was written"):
        draw_openmoji(precious, 32)
    assert precious.read_bytes() == b"years of work" and [
        p.name for p in tmp_path.iterdir()
    ] == ["mine"]


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw_openmoji(tmp_path / "openmoji", 32)
    assert list(tmp_path.iterdir()) == []


def test_openmoji_on_another_background(tmp_path):
    drawn = draw_openmoji(tmp_path / "blue", 16, background=(0, 0, 255))
    assert opened(next(drawn.glob("*/hearts/1F49A.png")))[0, 0].tolist() == [0, 0, 255]
    with pytest.raises(ValueError, match="size=4: expected an integer of at least 8"):
        draw_openmoji(tmp_path / "tiny", 4)
    with pytest.raises(ValueError, match="val_share=0: expected a finite number above"):
        draw_openmoji(tmp_path / "whole", 16, val_share=0)


def test_the_folder_that_a_program_works_in_is_not_replaced(tmp_path, monkeypatch):
    """Renaming over it would leave the program, and a shell, in one that is gone."""
    monkeypatch.chdir(tmp_path)
    for here in (".", tmp_path):
        with pytest.raises(FileExistsError, match="is where this program works"):
            draw_openmoji(here, 16)
    assert not [*tmp_path.iterdir()]
