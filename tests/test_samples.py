"""Sets of samples: the same from any number of processes, after any interruption."""

import json
import time
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch
from PIL import Image
from processes import cluster, together

from diffussm import samples
from diffussm.diffusion import GaussianDiffusion
from diffussm.distributed import Preempted, all_reduce, rank, request_stop, world_size
from diffussm.model import DiffuSSM, DiffuSSMConfig
from diffussm.sample_options import Sampler, SampleSet
from diffussm.samples import draw_samples, labels_of

MODEL = DiffuSSMConfig(
    input_size=8, in_channels=1, num_classes=10, d_model=16, n_blocks=2, d_state=4
)
DIFFUSION = GaussianDiffusion.linear(50)
QUICK = Sampler(3, "ddim", cfg_scale=1.5, guidance_channels=3)
FEW = SampleSet(count=10, labels="balanced", batch_size=4, sampler=QUICK)


def network():
    torch.manual_seed(0)
    model = DiffuSSM(MODEL).eval()
    torch.nn.init.normal_(model.head.weight, std=0.2)
    return model


def draw(out, config=FEW, facts=None):
    with cluster() as device:
        draw_samples(
            network(),
            DIFFUSION,
            config,
            out,
            device=device,
            facts=facts or {},
            progress=False,
        )


def pictures(folder):
    return np.stack(
        [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    )


def test_a_set_does_not_depend_on_the_number_of_processes(tmp_path):
    draw(tmp_path / "one.npz")
    together(3, draw, tmp_path / "three.npz")
    draw(tmp_path / "folder")
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "three.npz") as three:
        assert one["arr_0"].shape == (10, 8, 8, 3) and one["arr_0"].dtype == np.uint8
        assert np.array_equal(one["arr_0"], three["arr_0"]) and one["arr_0"].std() > 10
        assert np.array_equal(one["arr_0"], pictures(tmp_path / "folder"))
        assert one["arr_1"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    record = json.loads((tmp_path / "one.json").read_text())
    assert (
        record["complete"] and record["steps"] == 3 and record["labels"] == "balanced"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "folder",
        "one.json",
        "one.npz",
        "three.json",
        "three.npz",
    ]


def test_a_longer_set_begins_with_the_shorter(tmp_path):
    draw(tmp_path / "short.npz", replace(FEW, count=6))
    draw(tmp_path / "long.npz")
    with (
        np.load(tmp_path / "short.npz") as short,
        np.load(tmp_path / "long.npz") as long,
    ):
        assert np.array_equal(short["arr_0"], long["arr_0"][:6])


@pytest.mark.parametrize("name", ["set", "set.npz"])
def test_an_image_is_the_same_in_any_batch_also_of_a_set_that_is_gone_on_with(
    tmp_path, name, monkeypatch
):
    draw(tmp_path / "whole", replace(FEW, batch_size=10))
    shapes, honest = [], samples.walk

    def counted(sampler, model, diffusion, y, **start):
        shapes.append(len(y))
        if len(shapes) == 3:
            raise KeyboardInterrupt
        return honest(sampler, model, diffusion, y, **start)

    monkeypatch.setattr(samples, "walk", counted)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / name, replace(FEW, batch_size=3))
    draw(tmp_path / name, replace(FEW, batch_size=4))
    draw(tmp_path / "other", replace(FEW, batch_size=7))
    # two batches of 3 are done, a third is lost; every batch is whole, also the last
    assert shapes == [3, 3, 3, 4, 7, 7]
    drawn = np.load(tmp_path / name)["arr_0"] if name == "set.npz" else None
    drawn = pictures(tmp_path / name) if drawn is None else drawn
    for same in (drawn, pictures(tmp_path / "other")):
        difference = same.astype(int) - pictures(tmp_path / "whole")
        assert np.abs(difference).max() <= 1  # other batches round in another way
    assert drawn.std() > 10


def test_what_lies_between_the_batches_that_are_done_is_missing(tmp_path):
    files = samples._SampleFiles(tmp_path / "set.npz", {})
    files.parts.mkdir()
    for done in (range(4, 8), range(12, 13)):
        files.part(done).touch()
    (files.parts / ".000000-000004.npy.1.tmp").touch()  # of a process that was killed
    kept, missing = files.missing(replace(FEW, count=20, batch_size=5))
    assert kept == [range(4, 8), range(12, 13)]
    wanted = [(0, 4), (8, 12), (13, 18), (18, 20)]
    assert missing == [range(*ends) for ends in wanted]


def test_batches_of_two_starts_that_overlap_are_no_set(tmp_path):
    files = samples._SampleFiles(tmp_path / "set.npz", {})
    files.parts.mkdir()
    for done in (range(4), range(5)):
        files.part(done).touch()
    with pytest.raises(ValueError, match="set.parts holds images twice; remove it"):
        files.missing(FEW)


@pytest.mark.parametrize("name", ["set", "set.npz"])
def test_a_second_start_waits_for_the_first(tmp_path, name, monkeypatch):
    honest = samples.draw_batch

    def draw_batch(*given, **options):
        monkeypatch.setattr(samples, "draw_batch", honest)
        with pytest.raises(ValueError, match="another process holds .*parts: wait"):
            draw(tmp_path / name, replace(FEW, batch_size=5))
        return honest(*given, **options)

    monkeypatch.setattr(samples, "draw_batch", draw_batch)
    draw(tmp_path / name)
    assert not list(tmp_path.rglob("*parts"))


@pytest.mark.parametrize("name", ["set", "set.npz"])
def test_a_set_is_complete_only_if_all_its_files_are_there(tmp_path, name, monkeypatch):
    honest, record = samples._draw_missing, tmp_path / "set.json"
    record = record if name == "set.npz" else tmp_path / name / "samples.json"

    def lose_one(draw, files, *others):
        batches = honest(draw, files, *others)
        lost = files.part(batches[1]) if files.packed else files.out / "000005.png"
        lost.unlink()
        return batches

    monkeypatch.setattr(samples, "_draw_missing", lose_one)
    with pytest.raises(FileNotFoundError, match="00000[45].*that was drawn"):
        draw(tmp_path / name)
    assert not json.loads(record.read_text())["complete"]
    assert len(list(tmp_path.rglob("*.npy"))) == (2 if name == "set.npz" else 3)


@pytest.mark.parametrize("name", ["set", "set.npz"])
def test_an_interrupted_set_is_finished_and_not_begun_again(
    tmp_path, name, monkeypatch
):
    draw(tmp_path / f"whole_{name}")
    calls = []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return honest(*arguments, **options)

    honest = samples.walk
    monkeypatch.setattr(samples, "walk", counted)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / name)
    draw(tmp_path / name)
    assert len(calls) == 2 + 2  # three batches: one before the interruption, two after
    if name == "set":
        assert np.array_equal(
            pictures(tmp_path / "set"), pictures(tmp_path / "whole_set")
        )
    else:
        assert (tmp_path / name).read_bytes() == (
            tmp_path / f"whole_{name}"
        ).read_bytes()
    draw(tmp_path / name)
    assert len(calls) == 4, "a complete set was drawn again"


def test_other_samples_are_refused_and_untouched(tmp_path):
    draw(tmp_path / "set")
    before = {path: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    for config, facts, word in (
        (replace(FEW, seed=1), {}, "seed"),
        (FEW, {"weights": "raw"}, "weights"),
    ):
        with pytest.raises(ValueError, match=f"holds other samples.*{word}"):
            draw(tmp_path / "set", config, facts)
    assert before == {path: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_mother.txt").write_text("dear")
    (tmp_path / "file.npz").write_text("dear")
    for name in ("letters", "file.npz"):
        with pytest.raises(ValueError, match="no set of samples"):
            draw(tmp_path / name)


def draw_unevenly(out):
    """The second process is in its batch until all others are done, and longer."""
    honest, mine = samples.draw_batch, []

    def draw_batch(*arguments, **options):
        mine.append(arguments[3].start)
        if len(mine) == 1 and rank() == 1:
            deadline = time.monotonic() + 120
            while (
                len(list(out.with_suffix(".parts").glob("*.npy"))) < 9
                and time.monotonic() < deadline
            ):
                time.sleep(0.05)
            time.sleep(8)
        return honest(*arguments, **options)

    samples.draw_batch = draw_batch
    with cluster() as device:
        all_reduce(torch.zeros(1))
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=4), None)
        config = replace(FEW, batch_size=1)
        draw_samples(
            network(), DIFFUSION, config, out, device=device, facts={}, progress=False
        )
    return mine


def test_batches_go_to_whoever_is_free_and_the_last_is_waited_for(tmp_path):
    first, second = together(2, draw_unevenly, tmp_path / "set.npz")
    assert len(second) == 1 and sorted(first + second) == list(range(10))
    draw(tmp_path / "alone.npz", replace(FEW, batch_size=1))
    assert (tmp_path / "set.npz").read_bytes() == (tmp_path / "alone.npz").read_bytes()


def draw_until_stopped(out):
    """The last process is asked to stop in the middle of its second batch."""
    honest, begun = samples.walk, []

    def walk(*arguments, **options):
        begun.append(1)
        if rank() < world_size() - 1:
            time.sleep(0.2)  # or nothing may be left for the others
        for step in honest(*arguments, **options):
            if len(begun) == 2 and rank() == world_size() - 1:
                request_stop()
            yield step

    samples.walk = walk
    try:
        with cluster() as device:
            config = replace(FEW, count=40, batch_size=1)
            draw_samples(
                network(),
                DIFFUSION,
                config,
                out,
                device=device,
                facts={},
                progress=False,
            )
    except Preempted as stop:
        return str(stop), len(begun)


@pytest.mark.parametrize("size", [1, 2])
def test_a_set_that_is_asked_to_stop_says_how_far_it_is_and_goes_on(tmp_path, size):
    out = tmp_path / "set.npz"
    stopped = together(size, draw_until_stopped, out)
    done = len(list((tmp_path / "set.parts").glob("*.npy")))
    for said, _ in stopped:
        assert said == f"asked to stop: {done} of 40 batches are kept"
    assert done == sum(begun for _, begun in stopped) - 1 < 40
    draw(out, replace(FEW, count=40, batch_size=1))
    draw(tmp_path / "whole.npz", replace(FEW, count=40, batch_size=1))
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_a_killed_start_and_a_killed_end_are_gone_on_from(tmp_path):
    (tmp_path / "set" / ".parts").mkdir(
        parents=True
    )  # killed before the record was written
    (tmp_path / "set" / ".samples.json.tmp").write_text("{")
    draw(tmp_path / "set")
    assert not list((tmp_path / "set").glob(".*.tmp"))
    (tmp_path / "set" / ".parts").mkdir()  # killed before all was tidy
    draw(tmp_path / "set")
    assert not (tmp_path / "set" / ".parts").exists()
    draw(tmp_path / "set.npz")
    (tmp_path / "set.npz").unlink()
    (tmp_path / "set.json").unlink()
    (tmp_path / "set.parts").mkdir()
    (tmp_path / "set.parts" / "000000.npy").write_bytes(b"of other samples")
    with pytest.raises(ValueError, match="is of a set without a record"):
        draw(tmp_path / "set.npz")


def test_a_set_begun_with_earlier_random_streams_is_not_gone_on_with(tmp_path):
    draw(tmp_path / "set")
    file = tmp_path / "set" / "samples.json"
    record = json.loads(file.read_text())
    assert record["random"] == 2
    del record["random"]
    file.write_text(json.dumps(record))
    draw(tmp_path / "set")  # it is complete: nothing is drawn
    assert "random" not in json.loads(file.read_text())
    file.write_text(json.dumps(record | {"complete": False}))
    with pytest.raises(ValueError, match="differ in random .there 1, asked 2"):
        draw(tmp_path / "set")


def test_a_folder_says_of_each_image_which_class_it_is(tmp_path):
    draw(tmp_path / "set", replace(FEW, classes=(7, 3)))
    labels = json.loads((tmp_path / "set" / "labels.json").read_text())
    assert labels == {
        path.name: (7, 3)[i % 2]
        for i, path in enumerate(sorted((tmp_path / "set").glob("*.png")))
    }
    assert json.loads((tmp_path / "set" / "samples.json").read_text())["classes"] == [
        7,
        3,
    ]
    draw(tmp_path / "set.npz", replace(FEW, classes=(7, 3)))
    with np.load(tmp_path / "set.npz") as packed:
        assert packed["arr_1"].tolist() == list(labels.values())
        assert np.array_equal(packed["arr_0"], pictures(tmp_path / "set"))


def test_a_set_is_of_the_same_weights(tmp_path):
    draw(tmp_path / "old")  # from before they were recorded
    draw(tmp_path / "old", facts={"weights_sha256": "a"})
    draw(tmp_path / "set", facts={"weights_sha256": "a"})
    with pytest.raises(ValueError, match="differ in weights_sha256"):
        draw(tmp_path / "set", facts={"weights_sha256": "b"})


def test_an_autoencoder_may_have_moved_but_must_be_the_same(tmp_path):
    vae = {"name": "here", "encoder_sha256": "e", "decoder_sha256": "d"}
    draw(tmp_path / "set", facts={"vae": vae})
    draw(tmp_path / "set", facts={"vae": vae | {"name": "there"}})
    assert json.loads((tmp_path / "set" / "samples.json").read_text())["vae"] == vae
    with pytest.raises(ValueError, match="differ in vae"):
        draw(tmp_path / "set", facts={"vae": vae | {"decoder_sha256": "another"}})


def test_labels_are_balanced_or_random_by_name():
    balanced = labels_of(SampleSet(labels="balanced"), range(50_000), 1000)
    assert (balanced.bincount(minlength=1000) == 50).all()
    config = SampleSet(labels="random")
    random = labels_of(config, range(50_000), 1000)
    counts = random.bincount(minlength=1000).double()
    assert 40 < counts.var() < 60  # Poisson: variance = mean = 50
    assert torch.equal(random[100:200], labels_of(config, range(100, 200), 1000))
    other = labels_of(replace(config, seed=1), range(50_000), 1000)
    assert not torch.equal(random, other)
    among = labels_of(replace(config, classes=(5, 900)), range(1000), 1000)
    assert set(among.tolist()) == {5, 900} and 400 < (among == 5).sum() < 600
