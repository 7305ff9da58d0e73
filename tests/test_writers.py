"""What a run writes: training does not wait for it."""

from dataclasses import replace
from types import SimpleNamespace

from tiny import TINY

from diffussm import writers
from diffussm.writers import Clock


def test_drawing_samples_does_not_count_as_training(monkeypatch):
    now = 100.0
    monkeypatch.setattr(writers, "time", SimpleNamespace(perf_counter=lambda: now))
    clock = Clock(0, replace(TINY, steps=100))
    now += 5.0  # ten steps
    with clock.paused():
        now += 60.0
    assert clock.read(10) == {
        "seconds": 65.0,
        "images_per_second": 16.0,
        "seconds_left": 45.0,
    }
