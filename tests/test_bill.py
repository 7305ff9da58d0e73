"""The bill: checkpoints on the disk, and what others publish."""

from dataclasses import replace

import pytest

from diffussm import bill, recipes
from diffussm.hourglass import linear_macs
from diffussm.options import Execution
from diffussm.sample_options import Sampler, SampleSet


def test_an_image_is_decoded_in_float32_whatever_it_is_drawn_in():
    model = recipes.read_recipe("imagenet256")[0].model
    for precision in ("tf32", "bf16"):
        guided = SampleSet(count=10, precision=precision)
        counted = bill._sampling_operations(model, guided, decode=7.0)
        network = 10 * 250 * 2 * 2 * linear_macs(model)
        assert counted == {precision: network, "float32": 70.0}
    plain = replace(guided, precision="float32", sampler=Sampler())
    counted = bill._sampling_operations(model, plain, decode=7.0)
    assert counted == {"float32": network / 2 + 70.0}


def test_the_disk_must_hold_the_checkpoints_that_are_kept():
    config = replace(recipes.read_recipe("digits")[0], steps=800)
    execution = Execution(keep_every=200, keep_last=2)
    assert bill.checkpoints_kept(config, execution) == 4 + 2 + 1
    assert (
        bill.checkpoints_kept(config, replace(execution, keep=("30", "400", "900")))
        == 4 + 2 + 1 + 1
    )


def test_a_file_with_the_name_of_a_published_one_must_be_that_one(
    tmp_path, monkeypatch
):
    file = tmp_path / "VIRTUAL_imagenet256_labeled.npz"
    file.write_bytes(b"abc")
    with pytest.raises(ValueError, match="is not the published"):
        bill.published(file)
    known = bill.Download(
        file.name,
        "",
        "",
        3,
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    )
    monkeypatch.setattr(bill, "DOWNLOADS", (known,))
    assert bill.published(file) == known
    other = tmp_path / "other.npz"
    other.write_bytes(b"x")
    assert bill.published(other) is None


def test_published_checksums_agree_with_the_name_and_the_evaluator():
    from diffussm import features

    weights = next(one for one in bill.DOWNLOADS if one.name == features.WEIGHTS)
    assert weights.sha256[:8] in weights.name
    assert all(one.sha256 is None or len(one.sha256) == 64 for one in bill.DOWNLOADS)
