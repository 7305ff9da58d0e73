"""What is typed to look at something, and what it means."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from commands import diffussm
from pipelines import NAMES, draw, network, piped, seeded

from diffussm.look_commands import Look, draw_one, how_many, look_of, page_of, with_look
from diffussm.sample_options import Sampler, SampleSet

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


def test_the_page_draws_what_the_pipeline_draws_and_enlarges_it():
    pipe = piped(network(in_channels=1))
    image = draw_one(pipe, 2, 7.0, 3.0, 5.0)
    how = {"guidance_scale": 3.0, "clip_denoised": True, "output_type": "pil"}
    small = draw(pipe, 2, generator=seeded(7), **how)[0]
    assert small.size == (4, 4) and image.size == (256, 256)
    assert np.array_equal(np.asarray(image)[::64, ::64], np.asarray(small))
    other = draw_one(pipe, 2, 8, 3.0, 5)
    assert not np.array_equal(np.asarray(image), np.asarray(other))
    free = piped(network(in_channels=1, num_classes=0))
    assert draw_one(free, None, 0, 3.0, 2).size == (256, 256)  # nothing to guide


class Gradio(SimpleNamespace):
    """Takes note of what a page is made of."""

    def __getattr__(self, kind):
        return lambda *given, **named: SimpleNamespace(
            kind=kind, given=given, named=named, launch=self.launched.append
        )


def test_the_page_asks_for_a_class_only_where_there_are_some():
    for classes, kinds in ((3, "Dropdown Number Slider Slider"), (0, "Number Slider")):
        pipe = piped(network(in_channels=1, num_classes=classes))
        page = page_of(Gradio(launched=[]), pipe)
        draws, asked, image = page.given
        assert [one.kind for one in asked][: len(kinds.split())] == kinds.split()
        assert image.kind == "Image" and asked[-1].given[:3] == (1, 1000, 50)
        values = [1, 0, 1.0, 2] if classes else [0, 1.0, 2]
        assert draws(*values).size == (256, 256)
        if classes:
            names = [(NAMES[str(i)], i) for i in range(3)]
            assert asked[0].given == (names,)


def test_without_gradio_the_demo_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    said = diffussm(f"demo {tmp_path}", 1)
    assert "pip install 'diffussm[demo]'" in said and said.count("\n") == 1
