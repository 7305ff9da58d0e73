"""What is typed to look at something, and what it means."""

from pathlib import Path

import pytest

from diffussm.look_commands import Look, how_many, look_of, with_look
from diffussm.samples import SampleSet
from diffussm.sampling import Sampler

WANTED = SampleSet(sampler=Sampler(10, cfg_scale=1.5))


def typed(cfg_scale=None, seeds=None, interpolate=None):
    words = (each and each.split(" ") for each in (cfg_scale, seeds, interpolate))
    return look_of(Path("x.png"), None, 8, *words, None)


def test_numbers_are_read_and_refused_by_name():
    assert typed() == Look(Path("x.png"))
    assert typed("1,2.5").cfg_scales == (1.0, 2.5)
    assert typed(seeds="0,12 3").seeds == (0, 12, 3) and typed(seeds="4").seeds == (4,)
    assert typed(interpolate="3,7").ends == typed(interpolate="3 7").ends == (3, 7)
    assert typed("1 2,4").cfg_scales == (1.0, 2.0, 4.0)
    for words in ("", "1,", "a", "1.5", "1;2"):
        with pytest.raises(ValueError, match="--seeds .*1,2,4"):
            typed(seeds=words)
    for words in ("-1", "1,nan", "inf"):
        with pytest.raises(ValueError, match="--cfg_scale.*of at least 0"):
            typed(words)
    with pytest.raises(ValueError, match="a set has one"):
        with_look(WANTED, Look(cfg_scales=(1.0, 2.0)), set())


def test_of_several_scales_one_that_guides_stands_for_all():
    for scales, stands in (
        ((), 1.5),
        ((1.0, 4.0, 2.0), 4.0),
        ((1.0,), 1.0),
        ((0.0,), 0),
    ):
        look = Look(Path("x.png"), cfg_scales=scales)
        assert with_look(WANTED, look, set()).sampler.cfg_scale == stands


def test_a_way_is_walked_by_ddim_unless_a_scheduler_is_named():
    look = Look(Path("x.png"), ends=(3, 7))
    assert with_look(WANTED, look, set()).sampler.method == "ddim"
    with pytest.raises(ValueError, match="needs ddim"):
        with_look(WANTED, look, {"method"})
    look = Look(Path("x.png"), ends=(3, 7), scheduler="DDIM")
    assert with_look(WANTED, look, set()) == WANTED
    for ends, columns in (((3,), 8), ((3, 3), 8), ((1, 2, 3), 8), ((3, 7), 1)):
        with pytest.raises(ValueError, match="two seeds|2 or more"):
            with_look(WANTED, Look(None, None, columns, ends=ends), set())


def test_the_work_is_counted_in_passes():
    guided, alone = WANTED.sampler, Sampler(10)
    assert "9 images in 3 batches of 4, 10 steps" in how_many(9, 4, guided)
    assert " 240 passes" in how_many(9, 4, guided) and " 120 p" in how_many(9, 4, alone)
