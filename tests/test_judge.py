"""A judge reads what is real, finds copies and wrong classes, and has a floor."""

from dataclasses import replace

import pytest
import torch

from diffussm.data import TensorData, digits
from diffussm.judge import Jury, agreement, judged, jury_of, train_judge
from diffussm.model import PRESETS, DiffuSSM, DiffuSSMConfig
from diffussm.options import RECIPES
from diffussm.plain_scores import as_images

SIZES = PRESETS["digits"] | {"d_model": 16, "n_blocks": 1, "d_state": 4}
RECIPE = replace(RECIPES["digits"], model=DiffuSSMConfig(**SIZES))


@pytest.fixture(scope="module")
def sets():
    return [TensorData(*digits(split), levels=17) for split in ("train", "test")]


@pytest.fixture(scope="module")
def jury(sets):
    return jury_of(*sets, 100)


def test_it_reads_digits_that_it_has_not_seen_and_is_always_the_same(sets, jury):
    train, test = sets
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    again = train_judge(jury.known, _labels(train), 10)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert agreement(again, as_images(test.images), test.labels) > 0.95
    assert agreement(again, as_images(test.images), (test.labels + 1) % 10) < 0.1
    assert again.checksum == jury.judge.checksum
    other = train_judge(jury.known, (_labels(train) + 1) % 10, 10)
    assert other.checksum != again.checksum


def _labels(data):
    from diffussm.judge import _some

    return _some(data, len(data))[1]


def test_labels_that_are_no_classes_are_refused(jury):
    with pytest.raises(ValueError, match="labels reaches from 0 to 9"):
        train_judge(jury.known[:20], torch.arange(20) % 10, 9)
    unconditional = TensorData(torch.zeros(9, 1, 8, 8))
    with pytest.raises(ValueError, match="number of classes=0"):
        jury_of(unconditional, unconditional, 4)


def test_each_measure_finds_what_it_is_for(jury):
    copies, wrong = jury.known[:100], jury.unseen.flip(0)
    dark = (jury.unseen.float() / 4).byte()
    copied, mixed, darker, floor = jury.compare([copies, wrong, dark])
    assert copied["nearest"] == 0 and copied["near"] == 1
    assert 0 < floor["near"] < 0.05 and floor["nearest"] > 0.1
    assert mixed["agreement"] < 0.3 < 0.9 < floor["agreement"]
    assert mixed["frechet"]["mean"] == pytest.approx(floor["frechet"]["mean"])
    assert darker["frechet"]["mean"] > 2 * floor["frechet"]["mean"] > 0
    assert {one["images"] for one in (copied, mixed, darker, floor)} == {100}


def test_the_floor_is_higher_for_fewer_images(sets, jury):
    (few,) = Jury(*sets, 40).compare([])
    (many,) = jury.compare([])
    assert few["images"] == 40 and few["frechet"]["mean"] > many["frechet"]["mean"]


def test_a_model_is_judged_for_each_scale_from_the_same_noise(sets):
    torch.manual_seed(0)
    model = DiffuSSM(RECIPE.model).eval()  # new: its answer is zero, whatever w
    few = jury_of(*sets, 6)
    told = judged(model, RECIPE, few, (0, 1.0, 2.5))
    assert list(told["guidance"]) == ["0", "1", "2.5"]
    assert told["guidance"]["0"] == told["guidance"]["2.5"]
    assert told["guidance"]["1"]["agreement"] < 0.7 < told["real"]["agreement"]
    other = judged(model, replace(RECIPE, seed=1), few, (1.0,))
    assert other["guidance"]["1"] != told["guidance"]["1"]
    assert other["real"] == told["real"]


def test_images_that_are_not_finite_are_no_images(sets):
    model = DiffuSSM(RECIPE.model)
    with torch.no_grad():
        model.head.bias.fill_(torch.nan)
    told = judged(model, RECIPE, jury_of(*sets, 6), (1.0, 2.0))
    assert told["guidance"] == {"1": None, "2": None} and told["real"]["images"] == 6
