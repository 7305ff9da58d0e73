"""What a run writes: training does not wait for it."""

from dataclasses import replace
from types import SimpleNamespace

from tiny import TINY

from diffussm import writers
from diffussm.writers import Clock, rewind_log


def test_damaged_lines_of_the_log_do_not_stop_a_run_that_is_resumed(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    good = [f'{{"step": {step}, "loss": 0.1}}\n'.encode() for step in (4, 8, 12)]
    log.write_bytes(good[0] + b"\n\x00\xff\n" + good[1] + good[2] + b'{"step"')
    rewind_log(log, 8)
    assert log.read_bytes() == good[0] + good[1]
    assert f"damaged lines of {log} are dropped: 2" in capsys.readouterr().err


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
        "data_wait": 0.0,
        "seconds_left": 45.0,
    }


def test_waiting_for_a_batch_is_told_apart_from_training(monkeypatch):
    now = 0.0
    monkeypatch.setattr(writers, "time", SimpleNamespace(perf_counter=lambda: now))

    def batches():
        nonlocal now
        for _ in range(3):
            now += 3.0
            yield "a batch"

    clock = Clock(0, TINY)
    for _ in clock.awaited(batches()):
        now += 1.0
    assert clock.read(3)["data_wait"] == 0.75
    now += 1.0
    assert clock.read(4)["data_wait"] == 0.0
