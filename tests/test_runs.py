"""The loop: nothing that happens to a run changes what it computes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image
from processes import (
    SHARED,
    assert_close,
    changed_shared,
    cluster,
    digest_of,
    fifty,
    outcomes,
    run_shared,
    start,
    together,
)
from tiny import (
    SELDOM,
    TINY,
    assert_same_state,
    changed,
    log_of,
    reseal,
    run_tiny,
    steps_kept,
)

from diffussm import diffusion, forward_process, guards, runs, writers
from diffussm.checkpoints import find_checkpoint
from diffussm.data import TensorData, batch_indices, digits
from diffussm.diffusion import GaussianDiffusion
from diffussm.distributed import (
    EXIT_PREEMPTED,
    Preempted,
    all_reduce,
    on_rank_zero,
    rank,
    request_stop,
)
from diffussm.model import DiffuSSM
from diffussm.optimiser import ema_decay_at
from diffussm.options import flat
from diffussm.runs import replay, train
from diffussm.training import TrainState
from diffussm.writers import BackgroundWriter

SLOW = 600  # seconds that closing the process group takes, and more than any test waits


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_two_halves_equal_one_run_bit_for_bit(tmp_path, precision):
    straight = run_tiny(tmp_path / "straight", precision=precision)
    run_tiny(tmp_path / "halves", steps=5, precision=precision)
    halves = run_tiny(tmp_path / "halves", precision=precision)
    assert_same_state(straight, halves)
    assert log_of(tmp_path / "straight") == log_of(tmp_path / "halves")
    assert len(log_of(tmp_path / "halves")) == 2


def test_lines_logged_after_the_last_checkpoint_are_written_again(tmp_path):
    straight = run_tiny(tmp_path / "straight", save_every=5)
    run_tiny(tmp_path / "killed", save_every=5)
    # as if killed just before the last save, and in the middle of a line of the log
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step_00000010")
    with (tmp_path / "killed" / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "loss"')
    resumed = run_tiny(tmp_path / "killed", save_every=5)
    assert_same_state(straight, resumed)
    assert log_of(tmp_path / "straight") == log_of(tmp_path / "killed")


def test_a_device_without_a_number_is_the_process_s_own(tmp_path, monkeypatch):
    """Threads of the loader need its number: `torch.cuda.set_device` refuses "cuda"."""
    asked, (recipe, execution) = [], changed({"steps": 1})

    def own(device):
        asked.append(device)
        return torch.device("cpu")

    monkeypatch.setattr(runs, "own_device", own)
    train(recipe, tmp_path / "run", execution, "cuda", progress=False)
    assert asked == ["cuda"]


@pytest.mark.gpu
def test_a_gpu_without_a_number_trains(tmp_path):
    recipe, execution = changed({"steps": 2})
    state = train(recipe, tmp_path / "run", execution, "cuda", progress=False)
    assert next(state.model.parameters()).is_cuda


def test_a_diverged_run_stops_and_leaves_what_led_to_it(tmp_path):
    run_tiny(tmp_path / "run", steps=4, save_every=4)
    checkpoint = find_checkpoint(tmp_path / "run")
    weights = safetensors.torch.load_file(checkpoint / "model" / "model.safetensors")
    weights["embed_y.weight"][3] = float(
        "nan"
    )  # only images of a three, label kept, are affected
    safetensors.torch.save_file(weights, checkpoint / "model" / "model.safetensors")
    reseal(checkpoint)
    with pytest.raises(FloatingPointError, match=r"step \d+ .*lower lr"):
        run_tiny(tmp_path / "run", steps=30)
    assert find_checkpoint(tmp_path / "run") == checkpoint
    (dump,) = (tmp_path / "run").glob("dump_*")
    again = replay(dump)
    batch = safetensors.torch.load_file(dump / "batch.safetensors")
    assert (
        torch.equal(again["loss"].isnan(), batch["y"] == 3) and (batch["y"] == 3).any()
    )


def test_a_batch_in_four_parts_is_the_batch(tmp_path):
    whole = run_tiny(tmp_path / "whole", clip=0.5)
    parts = run_tiny(tmp_path / "parts", clip=0.5, micro_batch=2)
    for (name, p), q in zip(
        whole.model.named_parameters(), parts.model.parameters(), strict=True
    ):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4, msg=name)
    for a, b in zip(
        log_of(tmp_path / "whole"), log_of(tmp_path / "parts"), strict=True
    ):
        assert a == pytest.approx(b, rel=1e-4)
    with pytest.raises(ValueError, match="micro_batch=3 does not divide 8 images"):
        run_tiny(tmp_path / "other", micro_batch=3)


def test_clipping_bounds_what_the_optimiser_sees(tmp_path):
    free, clipped = (
        run_tiny(tmp_path / str(clip), steps=1, clip=clip) for clip in (0.0, 1e-3)
    )
    norm = log_norm = 0.0
    for p in clipped.model.parameters():
        norm += float(
            (clipped.optimizer.state[p]["exp_avg"] / 0.1).square().sum()
        )  # after one step
    for p in free.model.parameters():
        log_norm += float((free.optimizer.state[p]["exp_avg"] / 0.1).square().sum())
    assert norm**0.5 == pytest.approx(1e-3, rel=1e-3) and log_norm**0.5 > 1e-2


@pytest.mark.slow
def test_training_that_cannot_save_stops_loudly(tmp_path):
    """A limit on the size of a file stands for a full disk: the write breaks off."""
    code = (
        "import resource, signal, sys; from tiny import run_tiny; "
        "from pathlib import Path; "
        "run_tiny(Path(sys.argv[1]), steps=4, save_every=2); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "run_tiny(Path(sys.argv[1]), steps=8, save_every=2)"
    )
    command = [sys.executable, "-c", code, tmp_path / "run"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert (
        done.returncode == 1
        and "OSError: the checkpoint of step 6 could not be written" in done.stderr
    )
    assert "make room" in done.stderr
    assert find_checkpoint(tmp_path / "run").name == "step_00000004"
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    assert_same_state(
        run_tiny(tmp_path / "run", steps=8), run_tiny(tmp_path / "straight", steps=8)
    )


def test_a_folder_that_cannot_be_written_stops_the_run(tmp_path):
    run_tiny(tmp_path / "run", steps=2)
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints)
    checkpoints.write_text(
        "a file where the folder should be"
    )  # root may write into read-only folders
    with pytest.raises(OSError, match="could not be written"):
        run_tiny(tmp_path / "run", steps=4)


def test_data_and_model_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path,
):
    for model, message in (
        (replace(TINY.model, num_classes=7), "add --model.num_classes 10"),
        (replace(TINY.model, input_size=16), "model.input_size"),
    ):
        with pytest.raises(ValueError, match=message):
            run_tiny(tmp_path / "run", model=model)
    with pytest.raises(ValueError, match="open these images and pass dataset="):
        train(replace(TINY, data=str(tmp_path)), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_unconditional_training_needs_no_labels(tmp_path):
    state = run_tiny(
        tmp_path / "run", model=replace(TINY.model, num_classes=0), steps=2
    )
    assert state.model.null_label is None


def test_a_kept_step_that_was_passed_is_told(tmp_path, capsys):
    run_tiny(tmp_path / "run", steps=4)
    run_tiny(tmp_path / "run", steps=6, keep=("2", "4", "9"))
    assert "too late to keep what keep names: 2\n" in capsys.readouterr().err


class Poisoned(TensorData):
    """The digits; the batches of some steps hold an image whose loss overflows."""

    def __init__(self, *steps):
        super().__init__(*digits("train"))
        self.bad = {
            int(batch_indices(len(self), TINY.batch_size, step - 1, TINY.seed)[0])
            for step in steps
        }

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return (image + 1e30 if index in self.bad else image), label


def run_poisoned(folder, *steps, **changes):
    recipe, execution = changed(changes)
    data = Poisoned(*steps)
    return train(recipe, folder, execution, "cpu", progress=False, dataset=data)


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(tmp_path):
    before = run_poisoned(tmp_path / "before", 5, steps=4, log_every=5)
    after = run_poisoned(tmp_path / "after", 5, steps=5, log_every=5)
    assert after.step == 5 and after.skipped == [5] and before.skipped == []
    before.step = 5
    assert_same_state(before, after)
    (line,) = log_of(tmp_path / "after")
    assert line["skipped"] == [5] and line["images"] == 40 and line["grad_norm"] > 0
    good = log_of_four_steps(tmp_path)
    assert {
        key: line[key] for key in good
    } == good  # the means are those of the four good steps


def test_the_time_of_a_step_begins_with_it_after_one_that_was_left_out(
    tmp_path, monkeypatch
):
    called = []

    class Noted(runs.WorkTimes):
        def begin(self):
            called.append("begin")
            super().begin()

        def end(self):
            called.append("end")
            super().end()

    monkeypatch.setattr(runs, "WorkTimes", Noted)
    run_poisoned(tmp_path / "run", 2, steps=4, log_every=2)
    ends = [place for place, what in enumerate(called) if what == "end"]
    assert len(ends) == 4 and {called[place - 1] for place in ends} == {"begin"}


class _Reads:
    """Counts how often the thread that trains waits for a number of a tensor."""

    names = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")

    def __init__(self, monkeypatch):
        self.count, self.thread = 0, threading.get_ident()
        for name in self.names:
            read = getattr(torch.Tensor, name)
            monkeypatch.setattr(torch.Tensor, name, self.counted(read))

    def counted(self, read):
        def reads(tensor, *args):
            if tensor.shape != (2,):  # what the hosts tell each other is on no device
                self.count += threading.get_ident() == self.thread
            return read(tensor, *args)

        return reads


@pytest.mark.parametrize("lines", [1, 2])
def test_a_device_is_read_once_for_a_line_of_the_log(tmp_path, monkeypatch, lines):
    """Each step has four micro-batches, and clips."""
    for place in (diffusion, forward_process, guards):  # as on a GPU
        monkeypatch.setattr(place, "readable", lambda x: False)
    reads, counts = _Reads(monkeypatch), []

    def said(*_):
        counts.append(reads.count - counts[0] if counts else reads.count)

    batches = runs.training_batches
    monkeypatch.setattr(runs, "training_batches", lambda *x: said() or batches(*x))
    monkeypatch.setattr(BackgroundWriter, "save", said)
    after = {"on_log": said, "progress": False}
    parts = {"micro_batch": 2, "clip": 0.1, "log_every": 10 // lines}
    recipe, execution = changed({"steps": 10, **parts})
    data = TensorData(*digits("train"))
    train(recipe, tmp_path / "run", execution, "cpu", dataset=data, **after)
    assert counts[1:] == [*range(1, lines + 1), lines]


def log_of_four_steps(tmp_path):
    run_poisoned(tmp_path / "four", steps=4, log_every=4)
    (line,) = log_of(tmp_path / "four")
    return {key: value for key, value in line.items() if key not in ("step", "images")}


def test_a_line_of_skipped_steps_alone_says_so(tmp_path):
    run_poisoned(tmp_path / "run", 2, steps=3, log_every=1)
    lines = log_of(tmp_path / "run")
    assert "skipped" not in lines[0]
    assert (
        lines[1]["loss"] is None and lines[1]["skipped"] == [2] and lines[2]["loss"] > 0
    )


@pytest.mark.parametrize("stop", [2, 6])
def test_a_resumed_run_repeats_what_it_skipped(tmp_path, stop, capsys):
    straight = run_poisoned(tmp_path / "straight", 5, save_every=stop)
    assert "step 5" in (told := capsys.readouterr().err) and "2 more may be" in told
    run_poisoned(tmp_path / "killed", 5, save_every=stop, keep_every=stop)
    for folder in (tmp_path / "killed" / "checkpoints").iterdir():
        if int(folder.name[5:]) > stop:
            shutil.rmtree(folder)
    assert (find_checkpoint(tmp_path / "killed").name, stop) == (
        f"step_{stop:08d}",
        stop,
    )
    resumed = run_poisoned(tmp_path / "killed", 5, save_every=stop)
    assert resumed.skipped == straight.skipped == [5]
    assert_same_state(straight, resumed)
    assert log_of(tmp_path / "straight") == log_of(tmp_path / "killed")


def test_only_so_many_steps_are_skipped_however_often_it_is_started(tmp_path):
    bad = (2, 3, 6, 8)
    for last in (
        0,
        2,
    ):  # the second start begins at the checkpoint, and counts what was skipped before
        with pytest.raises(
            FloatingPointError,
            match=r"step 6 .*left out before: 2, 3\. .*dump_00000002",
        ):
            run_poisoned(tmp_path / "run", *bad, skip_nonfinite=2, save_every=4)
        assert steps_kept(tmp_path / "run") == [4], last
    assert [path.name for path in (tmp_path / "run").glob("dump_*")] == [
        "dump_00000002"
    ]
    replayed = replay(tmp_path / "run" / "dump_00000002")
    assert (~replayed["loss"].isfinite()).sum() == 1
    # an accident may be passed on resume: that is no other run
    assert run_poisoned(tmp_path / "run", *bad, skip_nonfinite=4).skipped == [
        2,
        3,
        6,
        8,
    ]


def test_without_leave_the_first_bad_step_stops_the_run(tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"not finite at step 3 .*left out before: none"
    ):
        run_poisoned(tmp_path / "run", 3, skip_nonfinite=0)


def test_exif_is_no_question_of_digits(tmp_path):
    with pytest.raises(ValueError, match="exif_rotate applies to files"):
        run_tiny(tmp_path / "run", exif_rotate=True)
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_asked_to_stop_says_from_where_it_goes_on(tmp_path, monkeypatch):
    asked = iter((False, False, True))  # while it makes its third step
    monkeypatch.setattr(runs, "stopping", lambda: next(asked))
    with pytest.raises(
        Preempted, match="saved step 3 of 10; the same command goes on from there"
    ):
        train(TINY, tmp_path / "run", SELDOM, "cpu", progress=False)
    monkeypatch.undo()
    assert steps_kept(tmp_path / "run") == [3]
    assert_same_state(run_tiny(tmp_path / "run"), run_tiny(tmp_path / "straight"))


def test_a_constant_decay_is_the_papers(tmp_path):
    assert [ema_decay_at(step, 0.9999, warmup=False) for step in (0, 10**6)] == [
        0.9999,
        0.9999,
    ]
    start = TrainState.create(TINY)
    constant = run_tiny(tmp_path / "constant", steps=1, ema_warmup=False)
    growing = run_tiny(tmp_path / "growing", steps=1)
    (first, *_), (moved, *_), (grown, *_), (model, *_) = (
        list(module.parameters())
        for module in (start.ema, constant.ema, growing.ema, growing.model)
    )
    torch.testing.assert_close(moved, 0.9999 * first + 0.0001 * model)
    torch.testing.assert_close(grown, 0.1 * first + 0.9 * model)
    with pytest.raises(ValueError, match="ema_warmup"):
        run_tiny(tmp_path / "growing", ema_warmup=False)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("size", [1, 2])
def test_killed_and_resumed_equals_untouched_bit_for_bit(tmp_path, size, precision):
    """All die at step 8; an epoch ends in step 7, and steps 3 and 6 are saved."""
    changes = {"precision": precision, "micro_batch": 2, "save_every": 3}
    together(size, run_shared, tmp_path / "untouched", changes)
    started = start(size, run_shared, tmp_path / "killed", changes, 8)
    started[0][0].join(120)
    assert started[0][0].exitcode == -signal.SIGKILL
    for process, _ in started:
        process.kill()
        process.join()
    # the thread that writes the checkpoint of step 6 may have been killed as well
    assert find_checkpoint(tmp_path / "killed").name in (
        "step_00000003",
        "step_00000006",
    )
    together(size, run_shared, tmp_path / "killed", changes)
    assert digest_of(tmp_path / "untouched") == digest_of(tmp_path / "killed")
    assert log_of(tmp_path / "untouched") == log_of(tmp_path / "killed")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    train(SHARED, run, SELDOM, "cpu", progress=False, dataset=fifty())
    return run


@pytest.mark.parametrize(("first", "then"), [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_a_checkpoint_is_read_by_either_way_and_by_one_process(
    tmp_path, alone, first, then
):
    together(2, run_shared, tmp_path / "run", {"steps": 5, "strategy": first})
    together(2, run_shared, tmp_path / "run", {"steps": 7, "strategy": then})
    train(SHARED, tmp_path / "run", SELDOM, "cpu", progress=False, dataset=fifty())
    assert_close(tmp_path / "run", alone)
    weights = DiffuSSM.from_pretrained(find_checkpoint(tmp_path / "run") / "ema")
    assert weights.config == SHARED.model


def poisoned(run, leave=0):
    """The second process alone gets a loss that is not a number, at the fourth step."""
    honest, calls = GaussianDiffusion.losses, []

    def losses(*arguments):
        calls.append(1)
        terms = honest(*arguments)
        return terms | {
            "loss": terms["loss"] * (float("nan") if len(calls) == 4 else 1.0)
        }

    with cluster() as device:
        if rank() == 1:
            GaussianDiffusion.losses = losses
        often = replace(SELDOM, save_every=2, skip_nonfinite=leave)
        state = train(
            SHARED, run, often, progress=False, device=device, dataset=fifty()
        )
        return state.skipped, [p.tolist() for p in state.ema.parameters()]


def test_what_is_not_finite_on_one_process_is_left_out_by_all(tmp_path):
    (skipped, ours), (also, theirs) = together(2, poisoned, tmp_path / "run", 1)
    assert skipped == also == [4] and ours == theirs
    assert (
        digest_of(tmp_path / "run")["skipped"]
        == log_of(tmp_path / "run")[-1]["skipped"]
        == [4]
    )


def test_what_is_not_finite_on_one_process_stops_all_before_the_weights(tmp_path):
    for fine, said in outcomes(start(2, poisoned, tmp_path / "run", 0)):
        assert (
            not fine
            and "FloatingPointError: loss or gradient is not finite at step 4" in said
        )
    (dump,) = (tmp_path / "run").glob("dump_*")
    assert json.loads((dump / "dump.json").read_text())["step"] == 3
    assert all(
        bool(value.isfinite().all())
        for value in safetensors.torch.load_file(
            dump / "model" / "model.safetensors"
        ).values()
    )
    assert find_checkpoint(tmp_path / "run").name == "step_00000002"


def until_stopped(run):
    with cluster() as device:
        try:
            train(
                replace(SHARED, steps=100_000),
                run,
                replace(SELDOM, save_every=100_000),
                progress=False,
                device=device,
                dataset=fifty(),
            )
        except Preempted as stop:
            return str(stop)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("parallel", [1, 2])
def test_a_signal_to_one_process_saves_and_stops_all(tmp_path, number, parallel):
    started = start(parallel, until_stopped, tmp_path / "run")
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(started[-1][0].pid, number)
    said = {result for _, result in outcomes(started)}
    assert len(said) == 1  # all stopped at the same step
    checkpoint = find_checkpoint(tmp_path / "run")
    assert f"saved step {int(checkpoint.name[5:])} of 100000" in said.pop()


def cannot_save(run):
    def block(row):
        if (
            row["step"] == 4
        ):  # a file where the folder should be; root may write into read-only folders
            (run / "checkpoints").write_text("in the way")

    with cluster() as device:
        config, execution = changed_shared({"save_every": 5, "steps": 1000})
        train(
            config,
            run,
            execution,
            progress=False,
            device=device,
            dataset=fifty(),
            on_log=block,
        )


def test_a_write_that_fails_in_the_background_stops_all(tmp_path):
    first, second = outcomes(start(2, cannot_save, tmp_path / "run"))
    assert not first[0] and "could not be written" in first[1]
    assert not second[0] and "OSError" in second[1]
    assert log_of(tmp_path / "run")[-1]["step"] <= 12, (
        "training went on without a checkpoint"
    )


def signalled(command, run, number):
    """Send a command a signal once it trains; its exit code and what it said."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # as from a terminal: what a shell starts in the background is deaf to Ctrl-C
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, **options) as job:
        deadline = time.monotonic() + 120
        while not (run / "log.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        job.send_signal(number)
        try:
            said, _ = job.communicate(timeout=400)
        except subprocess.TimeoutExpired:
            job.kill()
            raise
    return job.returncode, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "number"),
    [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGUSR1), (2, signal.SIGINT)],
)
def test_the_command_that_is_asked_to_stop_says_so(tmp_path, processes, number):
    run, config = tmp_path / "run", tmp_path / "tiny.yaml"
    config.write_text(
        yaml.safe_dump(flat(*changed_shared({"steps": 100_000, "log_every": 1})))
    )
    words = f"-m diffussm train digits --config {config} --out {run}".split()
    words += ["--device", "cpu", "--no_grid"]
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    launcher += ["--signals_to_handle", "SIGTERM,SIGUSR1"]
    if processes == 1:
        code, said = signalled([sys.executable, *words], run, number)
        assert code == EXIT_PREEMPTED == 75 and "Traceback" not in said, said
    else:  # torchrun hands the signal on, and replaces the code of its children
        _, said = signalled([sys.executable, *launcher, *words], run, number)
    assert "asked to stop" in (run / "preempted").read_text(), said
    assert find_checkpoint(run) is not None


def fails_while_writing(run):
    writers.write_checkpoint = lambda *_: time.sleep(SLOW)
    with cluster(), BackgroundWriter(run, SHARED, SELDOM) as writer:
        writer.save(TrainState.create(SHARED))
        if rank() == 0:
            raise KeyError("a fault of the program")
        all_reduce(torch.zeros(1))


def test_a_process_that_fails_alone_does_not_wait_for_its_writer(tmp_path):
    first, second = outcomes(start(2, fails_while_writing, tmp_path), timeout=400)
    assert first == (False, "KeyError: 'a fault of the program'")
    assert not second[0] and "process 0 failed: KeyError" in second[1]


def asked_to_stop(run):
    with cluster() as device:
        if rank() == 1:
            request_stop()
        train(SHARED, run, SELDOM, progress=False, device=device, dataset=fifty())


def how_it_ends(function, *arguments):
    """What a function raised, and how often the process group was closed by then."""
    honest, closed = torch.distributed.destroy_process_group, []
    torch.distributed.destroy_process_group = lambda *_: closed.append(honest())
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}", len(closed)


def refused(_):
    with cluster():
        on_rank_zero(lambda: int("x"))


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (refused, "ValueError: invalid literal"),
        (asked_to_stop, "Preempted: asked to stop: saved step 1 of 10"),
        (poisoned, "FloatingPointError: loss or gradient is not finite"),
        (cannot_save, "OSError: "),
    ],
)
def test_what_all_raise_together_closes_the_group(tmp_path, function, what):
    for said, closed in together(2, how_it_ends, function, tmp_path / "run"):
        assert said.startswith(what) and closed == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "encode", "sample"])
def test_a_command_ends_when_one_process_fails(tmp_path, alone, command):
    """Under torchrun; closing the group would take ten minutes, see the program."""
    images, config = tmp_path / "images", tmp_path / "tiny.yaml"
    images.mkdir()
    Image.new("RGB", (8, 8)).save(images / "one.png")
    config.write_text(yaml.safe_dump(flat(SHARED, SELDOM)))
    words = {
        "train": f"digits --config {config} --out {tmp_path / 'run'} --no_grid",
        "encode": f"{images} {tmp_path / 'latents'} --vae none --size 8",
        "sample": f"--from {alone} --out {tmp_path / 'set'} --count 10 --batch_size 2 "
        "--steps 4",
    }[command]
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    launcher += ["--shutdown_timeout", "600"]
    program = Path(__file__).with_name("one_rank_fails.py")
    job = [
        sys.executable,
        *launcher,
        str(program),
        command,
        *words.split(),
        "--device",
        "cpu",
    ]
    done = subprocess.run(job, capture_output=True, text=True, timeout=240, check=False)
    why = "the disk of this machine is full"
    assert done.returncode == 1
    assert f"diffussm {command} [process 1]: {why}" in done.stderr
    if (
        command != "encode"
    ):  # there torchrun's SIGTERM, which follows, may end the other process before
        assert (
            f"diffussm {command}: stopped, because process 1 failed: OSError: {why}"
            in done.stderr
        )
