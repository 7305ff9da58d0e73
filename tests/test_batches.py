"""Batches as functions of the step."""

import threading
from dataclasses import replace
from functools import partial
from threading import get_ident

import pytest
import torch
from tiny import TINY, write_images

from diffussm.batches import _mixed, noise_at, training_batch, training_batches
from diffussm.data import TensorData, batch_indices, digits, generator
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
    with pytest.raises(ValueError, match="batch_size=8: expected a multiple of 3"):
        training_batch(data, model, TINY, 3, rank=0, size=3)
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


def test_a_few_batches_are_made_ahead_and_no_more():
    made, enough = [], threading.Event()

    class Counting(TensorData):
        def batch(self, *given, **options):
            made.append(len(made))
            if len(made) == 4:
                enough.set()
            return super().batch(*given, **options)

    data = Counting(torch.zeros(50, 1, 8, 8), torch.arange(50) % 10)
    model = DiffuSSM(TINY.model)
    batches = training_batches(data, model, TINY)
    next(batches)
    assert enough.wait(60)
    batches.close()
    assert 4 <= len(made) <= 5  # of ten
    for step in range(6, 11):
        assert len(list(training_batches(data, model, TINY, step))) == 10 - step


def test_each_draw_of_a_step_has_a_purpose_of_its_own():
    # so that no draw depends on which others are made, or in which order
    data = TensorData(torch.zeros(50, 1, 8, 8), torch.arange(50) % 10)
    model = DiffuSSM(TINY.model)
    batch = training_batch(data, model, TINY, 3)
    shape, count = batch.noise.shape, (TINY.batch_size,)
    draw = partial(generator, TINY.seed, number=3)
    places = range(3 * len(batch.t), 4 * len(batch.t))
    assert torch.equal(batch.noise, noise_at(places, shape[1:], TINY.seed, "noise"))
    t = torch.randint(TINY.timesteps, count, generator=draw("timesteps"))
    assert torch.equal(batch.t, t)
    labels = data.labels[batch_indices(50, *count, 3, TINY.seed)]
    dropped = model.drop_labels(labels, draw("label dropout"))
    assert torch.equal(batch.y, dropped)


def test_noise_belongs_to_a_place_and_not_to_who_draws_it():
    """Any number of processes, micro-batches and even other batches see the same."""
    data, model = TensorData(*digits("train")), DiffuSSM(TINY.model)
    whole = training_batch(data, model, TINY, step=6)
    for size in (2, 4, 8):
        parts = [training_batch(data, model, TINY, 6, r, size) for r in range(size)]
        assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
    halves = [whole.part(slice(a, a + 4), torch.device("cpu")).noise for a in (0, 4)]
    assert torch.equal(torch.cat(halves), whole.noise)
    shorter = replace(TINY, batch_size=4)
    again = [training_batch(data, model, shorter, step).noise for step in (12, 13)]
    assert torch.equal(torch.cat(again), whole.noise)


def test_a_process_draws_the_noise_of_its_share_alone(monkeypatch):
    data, model, drawn = TensorData(*digits("train")), DiffuSSM(TINY.model), []
    randn = torch.randn

    def counted(shape, **options):
        drawn.append(shape)
        return randn(shape, **options)

    monkeypatch.setattr(torch, "randn", counted)
    training_batch(data, model, TINY, step=0, rank=1, size=4)
    assert drawn == [(1, 8, 8)] * 2


def test_noise_is_noise():
    rows = noise_at(range(5000, 9000), (1, 8, 8), seed=3).flatten(1).double()
    n = rows.numel()
    moments = [rows.pow(k).mean().item() for k in (1, 2, 3, 4)]
    for got, (wanted, variance) in zip(
        moments, ((0, 1), (1, 2), (0, 15), (3, 96)), strict=True
    ):
        assert abs(got - wanted) < 4 * (variance / n) ** 0.5
    for shift in (1, 2, 64):  # neighbours in the row, and within an image
        ahead = (rows[shift:] * rows[:-shift]).mean().item()
        assert abs(ahead) < 4 / (n - 64 * shift) ** 0.5
    beside = (rows[:, 1:] * rows[:, :-1]).mean().item()
    assert abs(beside) < 4 / (n * 63 / 64) ** 0.5
    for other in ({"seed": 4}, {"seed": 3, "purpose": "posterior"}):
        theirs = noise_at(range(5000, 9000), (1, 8, 8), **other).flatten(1)
        assert abs((rows * theirs).mean().item()) < 4 / n**0.5


def test_no_two_places_have_the_same_stream():
    """A permutation of 32 bits; here each step of it is undone."""
    modulus, numbers = 2**32, [0, 1, 2, 77, 2**16, 2**31, 2**32 - 1]
    for number in numbers:
        z = _mixed(number)
        z ^= z >> 16
        z = z * pow(0xC2B2AE35, -1, modulus) % modulus
        z ^= z >> 13 ^ z >> 26
        z = z * pow(0x85EBCA6B, -1, modulus) % modulus
        assert z ^ z >> 16 == number


def test_batches_for_a_gpu_are_pinned_and_copied_without_waiting(monkeypatch):
    """By the thread that makes them, on its own GPU; there is no GPU here."""
    data, pinned, used, copied = TensorData(*digits("train")), set(), [], []

    def pin(tensor):
        pinned.add(tensor.data_ptr())
        assert threading.current_thread() is not threading.main_thread()
        return tensor

    def to(tensor, device, non_blocking=False):
        assert tensor.untyped_storage().data_ptr() in pinned
        copied.append((device, non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: caller[get_ident()])
    two, gpu = replace(TINY, steps=2), torch.device("cuda", 1)
    batches = partial(training_batches, data, DiffuSSM(TINY.model), two)
    plain = list(batches())
    assert not pinned and not used
    made = list(batches(device=gpu))
    assert used == [gpu]
    caller = {get_ident(): 1}  # which GPU each thread uses
    assert len(list(batches(device=torch.device("cuda")))) == 2
    assert used == [gpu, gpu]
    for a, b in zip(plain, made, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    monkeypatch.setattr(torch.Tensor, "to", to)
    made[0].part(slice(2, 6), gpu)
    assert copied == [(gpu, True)] * 4
