"""Scores on the way: the same numbers whoever computes them, and nobody's business."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from processes import fifty, together
from tiny import TINY, assert_same_state, changed, log_of

from diffussm import variants
from diffussm.checkpoints import whole_ema
from diffussm.data import Dataset, TensorData
from diffussm.distributed import processes as cluster
from diffussm.model import DiffuSSM
from diffussm.parallel import create_state
from diffussm.recipes import open_held_out, read_recipe
from diffussm.runs import train
from diffussm.sample_options import Sampler
from diffussm.training import TrainState
from diffussm.watching import Watch, draw_finite, watched_loss


def held_out(n=40):
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(n, 1, 8, 8, generator=draw) * 2 - 1
    return TensorData(x, torch.arange(n) % 10)


def watch(recipe, images=34):
    return Watch(replace(recipe, timesteps=30), fifty(), held_out(), images)


def run_watched(folder, hook=watch, **changes):
    options = {"log_every": 2, "score_every": 4, "steps": 8} | changes
    recipe, execution = changed(options)
    how = {"progress": False, "dataset": fifty()}
    scores = hook(recipe) if hook else None
    return train(recipe, folder, execution, "cpu", on_scores=scores, **how)


def columns(row):
    return {k: v for k, v in row.items() if k.startswith(("held_out", "score_"))}


def test_training_is_the_same_to_the_last_bit_with_and_without_scores(tmp_path):
    with_scores = run_watched(tmp_path / "a")
    assert_same_state(with_scores, run_watched(tmp_path / "b", hook=None))
    rows = log_of(tmp_path / "a")
    assert [bool(columns(row)) for row in rows] == [False, True, False, True]
    bare = [{k: row[k] for k in row.keys() - columns(row).keys()} for row in rows]
    assert bare == log_of(tmp_path / "b")
    assert set(columns(rows[1])) == {
        "held_out_loss",
        "held_out_mse",
        "held_out_train_loss",
        "score_kid_pixels",
        "score_kid_pixels_real",
        "score_kid_random",
        "score_kid_random_real",
    }


def test_a_resumed_run_logs_the_same_scores(tmp_path):
    run_watched(tmp_path / "straight")
    run_watched(tmp_path / "stopped", steps=5, save_every=5)
    run_watched(tmp_path / "stopped", save_every=5)
    assert log_of(tmp_path / "straight") == log_of(tmp_path / "stopped")


def scores_of_a_process(strategy):
    with cluster("cpu"):
        recipe, execution = changed({"strategy": strategy})
        state = create_state(recipe, execution, torch.device("cpu"))
        return watch(recipe)(whole_ema(state))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_give_the_numbers_of_one(strategy):
    alone = watch(TINY)(whole_ema(create_state(*changed({}), torch.device("cpu"))))
    assert together(2, scores_of_a_process, strategy) == [alone, alone]


def average_of_a_variant(variant):
    with cluster("cpu"):
        build = partial(variants.network, variant)
        recipe, execution = changed({"strategy": "fsdp"})
        state = create_state(recipe, execution, torch.device("cpu"), build)
        alone = TrainState.create(recipe, network=build).ema.state_dict()
        ema = whole_ema(state)
        same = [torch.equal(p, alone[name]) for name, p in ema.state_dict().items()]
        inputs = torch.zeros(1, 1, 8, 8), torch.zeros(1).long(), torch.zeros(1).long()
        return len(same) == len(alone), all(same), ema(*inputs).shape[1]


def test_the_average_of_a_variant_is_gathered_as_that_variant():
    assert together(2, average_of_a_variant, "gate:sum") == [(True, True, 2)] * 2


def model():
    torch.manual_seed(0)
    return DiffuSSM(TINY.model).eval()


def test_the_same_model_scores_the_same_and_draws_nothing_at_random():
    scores, before = watch(TINY), torch.get_rng_state()
    network = model()
    torch.set_rng_state(before)
    assert scores(network) == scores(network) == watch(TINY)(network)
    assert torch.equal(torch.get_rng_state(), before)


def test_images_that_were_learnt_have_the_lower_loss():
    recipe, _ = changed({"steps": 150, "lr": 0.01, "batch_size": 8})
    few = TensorData(fifty().images[:8], fifty().labels[:8])
    state = create_state(*changed({}), torch.device("cpu"))
    from diffussm.batches import training_batches
    from diffussm.options import diffusion_of
    from diffussm.training import training_step

    for batch in training_batches(few, state.model, recipe):
        training_step(state, diffusion_of(recipe), batch, recipe)
    told = Watch(recipe, few, held_out(8), images=0)(state.model.eval())
    assert told["held_out_train_loss"] < told["held_out_loss"]
    assert set(told) == {"held_out_loss", "held_out_mse", "held_out_train_loss"}


def test_what_is_not_finite_is_none_and_stops_nothing():
    network = model()
    with torch.no_grad():
        next(iter(network.parameters())).fill_(float("nan"))
    told = watch(TINY)(network)
    assert told["held_out_loss"] is None and told["score_kid_pixels"] is None
    assert told["score_kid_pixels_real"] is not None
    json.dumps(told, allow_nan=False)


def test_a_mistake_is_not_taken_for_images_that_are_not_finite():
    given, noise = (Sampler(2, "ddim"), model(), TINY), torch.randn(2, 1, 8, 8)
    assert draw_finite(*given, torch.tensor([0, 1]), noise).isfinite().all()
    with pytest.raises(ValueError, match="expected"):
        draw_finite(*given, torch.tensor([0, 1, 2]), noise)


class Latents(Dataset):
    """Latents: drawn from what is stored, with noise that is handed over."""

    classes, num_classes, flip, levels = (), 0, False, None

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.full((4, 8, 8), index / 12), 0

    def batch(self, indices, flips=None, noise=None, fetch=map):
        x, y = super().batch(indices, flips)
        return x + 0.1 * noise, y


def test_latents_are_seen_as_they_are():
    small = replace(TINY.model, in_channels=4, num_classes=0)
    recipe = replace(TINY, model=small, timesteps=30)
    told = Watch(recipe, Latents(), Latents(), 12)(DiffuSSM(small).eval())
    names = {name for name in told if name.startswith("score")}
    assert names == {"score_kid_latents", "score_kid_latents_real"}
    assert None not in told.values()


def test_held_out_images_of_another_kind_are_refused():
    def of(encoder, scale=0.18):
        latents = Latents()
        latents.vae = {"name": encoder, "encoder_sha256": encoder}
        latents.vae["scaling_factor"] = scale
        return latents

    Watch(TINY, of("ours"), of("ours"), 0)
    with pytest.raises(ValueError, match="the run's encoder_sha256 .*--held_out"):
        Watch(TINY, of("ours"), of("theirs"), 0)
    with pytest.raises(ValueError, match="the run's scaling_factor"):
        Watch(TINY, of("ours"), of("ours", 1.0), 0)
    larger = TensorData(torch.zeros(2, 1, 16, 16), torch.arange(2))
    with pytest.raises(ValueError, match=r"the run's shape .*8, 8.*16, 16"):
        Watch(TINY, fifty(), larger, 0)


@pytest.mark.parametrize("count", [1, 31, 32, 33])
def test_each_image_counts_once(count):
    network = model()
    one = watched_loss(network, TINY, held_out(), count)
    assert one["mse"] > 0 and one["loss"] > one["mse"]
    if count == 1:
        assert watched_loss(network, TINY, held_out(1), 1)["mse"] > 0


def test_scores_need_a_line_of_the_log():
    with pytest.raises(ValueError, match="multiple of log_every=4"):
        changed({"score_every": 6})


def test_held_out_digits_are_those_that_training_does_not_see():
    recipe, _ = read_recipe("digits")
    from diffussm.batches import load_dataset

    seen = load_dataset(recipe)
    unseen = open_held_out("", recipe, seen.classes)
    assert len(seen) + len(unseen) == 1797 and unseen.classes == seen.classes


def test_without_held_out_images_the_option_is_named(tmp_path):
    recipe, _ = changed({"data": str(tmp_path)})
    with pytest.raises(ValueError, match="--held_out"):
        open_held_out("", recipe, fifty().classes)
    with pytest.raises(ValueError, match="others than --data"):
        open_held_out(str(tmp_path), recipe, fifty().classes)
    again = tmp_path / ".." / tmp_path.name  # the same, in other words
    with pytest.raises(ValueError, match="others than --data"):
        open_held_out(str(again), recipe, fifty().classes)
    with pytest.raises(ValueError, match="--held_out .*nowhere"):
        open_held_out(str(tmp_path / "nowhere"), recipe, fifty().classes)
