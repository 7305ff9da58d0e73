"""Batches as functions of the step."""

import threading
from dataclasses import replace
from functools import partial

import torch
from tiny import TINY, write_images

from diffussm.batches import training_batch, training_batches
from diffussm.data import TensorData, batch_indices, generator
from diffussm.folders import ImageFolder
from diffussm.model import DiffuSSM


def test_a_batch_is_a_pure_function_of_seed_and_step():
    data = TensorData(torch.rand(50, 1, 8, 8) * 2 - 1, torch.arange(50) % 10)
    model = DiffuSSM(TINY.model)
    torch.manual_seed(1)
    a = training_batch(data, model, TINY, 3)
    torch.manual_seed(2)
    b = training_batch(data, model, TINY, 3)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for config, step in ((TINY, 4), (replace(TINY, seed=1), 3)):
        other = training_batch(data, model, config, step)
        assert not torch.equal(a.noise, other.noise) and not torch.equal(a.t, other.t)


def test_drawing_a_batch_leaves_the_global_generator_alone():
    data = TensorData(torch.zeros(50, 1, 8, 8), torch.arange(50) % 10)
    model = DiffuSSM(TINY.model)
    before = torch.get_rng_state()
    training_batch(data, model, TINY, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_parts_of_processes_make_the_batch():
    data = TensorData(torch.rand(50, 1, 8, 8) * 2 - 1, torch.arange(50) % 10)
    model = DiffuSSM(TINY.model)
    whole = training_batch(data, model, TINY, 3)
    for size in (2, 4, 8):
        parts = [
            training_batch(data, model, TINY, 3, rank, size) for rank in range(size)
        ]
        assert all(
            torch.equal(torch.cat(a), b)
            for a, b in zip(zip(*parts, strict=True), whole, strict=True)
        )
    ahead = list(training_batches(data, model, TINY, 7))
    assert len(ahead) == 3 and torch.equal(
        ahead[1].x0, training_batch(data, model, TINY, 8).x0
    )


def test_a_data_set_that_draws_gets_noise_of_its_own():
    class Blurred(TensorData):
        def batch(self, indices, flips, noise, fetch):
            return self.images[indices] + noise, self.labels[indices]

    data = Blurred(torch.zeros(50, 1, 8, 8), torch.arange(50) % 10, levels=None)
    model = DiffuSSM(TINY.model)
    whole = training_batch(data, model, TINY, 3)
    assert (
        not torch.equal(whole.x0, whole.noise) and abs(float(whole.x0.std()) - 1) < 0.1
    )
    parts = [training_batch(data, model, TINY, 3, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([part.x0 for part in parts]), whole.x0)


def test_threads_decode_at_the_same_time_and_change_nothing(tmp_path):
    data = write_images(tmp_path / "images", 1, count=32)
    model = replace(TINY.model, num_classes=2, in_channels=3)
    config = replace(TINY, model=model, data=data, steps=3)
    meeting = threading.Barrier(4, timeout=60)

    class Meeting(ImageFolder):
        """Its images come only when four of them are asked for at once."""

        def __getitem__(self, index):
            meeting.wait()
            return super().__getitem__(index)

    folder, model = ImageFolder(data, 8, flip=False), DiffuSSM(config.model)
    meet = Meeting(data, 8, flip=False)
    together = list(training_batches(meet, model, config, 0, workers=4))
    one_by_one = list(training_batches(folder, model, config, 0, workers=1))
    for a, b in zip(together, one_by_one, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_each_draw_of_a_step_has_a_purpose_of_its_own():
    # so that no draw depends on which others are made, or in which order
    data = TensorData(torch.zeros(50, 1, 8, 8), torch.arange(50) % 10)
    model = DiffuSSM(TINY.model)
    batch = training_batch(data, model, TINY, 3)
    shape, count = batch.noise.shape, (TINY.batch_size,)
    draw = partial(generator, TINY.seed, number=3)
    assert torch.equal(batch.noise, torch.randn(shape, generator=draw("noise")))
    t = torch.randint(TINY.timesteps, count, generator=draw("timesteps"))
    assert torch.equal(batch.t, t)
    labels = data.labels[batch_indices(50, *count, 3, TINY.seed)]
    dropped = model.drop_labels(labels, draw("label dropout"))
    assert torch.equal(batch.y, dropped)
