"""Chapter 11: many processes compute what one does, and nothing that happens to them changes it."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image
from processes import FORKS, cluster, outcomes, start, together

from diffussm.data import TensorData
from diffussm.diffusion import GaussianDiffusion
from diffussm.distributed import EXIT_PREEMPTED, Cluster, peak_flops
from diffussm.hourglass import linear_macs
from diffussm.model import PRESETS, DiffuSSM, DiffuSSMConfig
from diffussm.training import (
    Execution,
    Preempted,
    Recipe,
    TrainState,
    World,
    find_checkpoint,
    flat,
    load_checkpoint,
    snapshot,
    train,
    training_batch,
    write_checkpoint,
)

# 50 images and batches of 8: the end of an epoch lies in a batch, and in a micro-batch.
TINY = Recipe(
    model=DiffuSSMConfig(
        input_size=8, in_channels=1, num_classes=10, d_model=16, n_blocks=2, d_state=4
    ),
    batch_size=8,
    steps=10,
    lr=1e-3,
)
SELDOM = Execution(log_every=4, save_every=100)


def changed(changes):
    """TINY and SELDOM with these options, whichever of the two they belong to."""
    names = {field.name for field in fields(Execution)}
    recipe = {key: value for key, value in changes.items() if key not in names}
    execution = {key: value for key, value in changes.items() if key in names}
    return replace(TINY, **recipe), replace(SELDOM, **execution)


DIFFUSION = GaussianDiffusion.linear(50)


def fifty():
    generator = torch.Generator().manual_seed(0)
    return TensorData(
        torch.rand(50, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(50) % 10
    )


def run_tiny(run, changes=None, kill_at=None):
    """Train TINY with all processes of the environment; optionally be killed while logging a step."""

    def on_log(row):
        if row["step"] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    with cluster() as world:
        recipe, execution = changed(changes or {})
        train(
            recipe,
            run,
            execution,
            progress=False,
            world=world,
            dataset=fifty(),
            on_log=on_log,
        )
        return world.rank


def log_of(run):
    times = ("seconds", "images_per_second", "seconds_left")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in times}
        for line in lines
    ]


def digest_of(run):
    """The checksums of parameters, average and optimiser: equal if and only if every bit is."""
    return json.loads((find_checkpoint(run) / "state.json").read_text())


def assert_close(run, other):
    for name in ("model", "ema"):
        ours, theirs = (
            safetensors.torch.load_file(
                find_checkpoint(folder) / name / "model.safetensors"
            )
            for folder in (run, other)
        )
        for key in ours:
            torch.testing.assert_close(
                ours[key], theirs[key], atol=2e-5, rtol=1e-3, msg=f"{name} {key}"
            )
    for a, b in zip(log_of(run), log_of(other), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("size", [1, 2])
def test_killed_and_resumed_equals_untouched_bit_for_bit(tmp_path, size, precision):
    """All processes die at step 8, after the end of the epoch in step 7; saved are steps 3 and 6."""
    changes = {"precision": precision, "micro_batch": 2, "save_every": 3}
    together(size, run_tiny, tmp_path / "untouched", changes)
    started = start(size, run_tiny, tmp_path / "killed", changes, 8)
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
    together(size, run_tiny, tmp_path / "killed", changes)
    assert digest_of(tmp_path / "untouched") == digest_of(tmp_path / "killed")
    assert log_of(tmp_path / "untouched") == log_of(tmp_path / "killed")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    train(TINY, run, SELDOM, "cpu", progress=False, dataset=fifty())
    return run


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {}),
        (4, {"micro_batch": 1}),
        (2, {"strategy": "fsdp"}),
        (2, {"strategy": "fsdp", "micro_batch": 2}),
    ],
)
def test_any_number_of_processes_learns_and_logs_the_same(
    tmp_path, alone, size, changes
):
    together(size, run_tiny, tmp_path / "run", changes)
    assert_close(tmp_path / "run", alone)


def test_four_processes_equal_four_parts(tmp_path):
    together(4, run_tiny, tmp_path / "processes", {})
    together(1, run_tiny, tmp_path / "parts", {"micro_batch": 2})
    assert_close(tmp_path / "processes", tmp_path / "parts")


@pytest.mark.parametrize(("first", "then"), [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_a_checkpoint_is_read_by_either_way_and_by_one_process(
    tmp_path, alone, first, then
):
    together(2, run_tiny, tmp_path / "run", {"steps": 5, "strategy": first})
    together(2, run_tiny, tmp_path / "run", {"steps": 7, "strategy": then})
    train(TINY, tmp_path / "run", SELDOM, "cpu", progress=False, dataset=fifty())
    assert_close(tmp_path / "run", alone)
    weights = DiffuSSM.from_pretrained(find_checkpoint(tmp_path / "run") / "ema")
    assert weights.config == TINY.model


def batches_seen(steps):
    with cluster() as world:
        model = DiffuSSM(TINY.model)
        batches = [
            training_batch(fifty(), model, TINY, step, world.rank, world.size)
            for step in steps
        ]
        return [[tensor.numpy() for tensor in batch] for batch in batches]


def test_two_processes_then_one_see_the_same_samples_in_the_same_order():
    whole = batches_seen(range(10))
    parts = together(2, batches_seen, range(6))
    for step, batch in enumerate(whole[:6]):
        for one, *mine in zip(batch, *(part[step] for part in parts), strict=True):
            assert np.array_equal(one, np.concatenate(mine))
    seen = np.concatenate([batch[0] for batch in whole])[:50].reshape(50, -1)
    assert len(np.unique(seen, axis=0)) == 50  # an epoch shows each image once


def test_recomputing_changes_nothing(tmp_path, alone):
    together(1, run_tiny, tmp_path / "run", {"activation_checkpointing": True})
    assert_close(tmp_path / "run", alone)


@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler (g++)"
)
@pytest.mark.filterwarnings(
    "ignore:Torchinductor does not support code generation for complex"
)
def test_compiling_changes_nothing(tmp_path, alone):
    together(1, run_tiny, tmp_path / "run", {"compile": True})
    assert_close(tmp_path / "run", alone)


def graphs_of_a_block():
    """How many graphs the compiler gets for one block, which is larger than DDP's first bucket of 1 MiB."""
    graphs, honest = [], torch.nn.Module.compile

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.nn.Module.compile = lambda module: honest(module, backend=count)
    config = replace(
        TINY, model=replace(TINY.model, d_model=256, n_blocks=1), timesteps=50
    )
    execution = replace(SELDOM, compile=True)
    with cluster() as world:
        state = TrainState.create(config, execution, world)
        network = world.wrap(state.model, execution)
        batch = training_batch(fifty(), state.model, config, 0, world.rank, world.size)
        DIFFUSION.losses(network, *batch)["loss"].sum().backward()
        (block,) = state.model.blocks
        return len(graphs), sum(
            p.numel() * p.element_size() for p in block.parameters()
        )


def test_ddp_does_not_cut_the_graph_of_a_compiled_block():
    for graphs, size in together(2, graphs_of_a_block):
        assert graphs == 1 and size > 2**20


@pytest.mark.parametrize("size", [2, 4])
def test_a_batch_that_cannot_be_shared_is_refused_up_front(tmp_path, size):
    for fine, said in outcomes(
        start(size, run_tiny, tmp_path / "run", {"batch_size": size * 3 + 1})
    ):
        assert not fine and f"cannot be shared by {size} processes" in said
    for fine, said in outcomes(
        start(size, run_tiny, tmp_path / "run", {"batch_size": 8, "micro_batch": 3})
    ):
        assert not fine and "does not divide" in said
    assert not (tmp_path / "run").exists()


def poisoned(run, leave=0):
    """The second process alone gets a loss that is not a number, at the fourth step."""
    honest, calls = GaussianDiffusion.losses, []

    def losses(*arguments):
        calls.append(1)
        terms = honest(*arguments)
        return terms | {
            "loss": terms["loss"] * (float("nan") if len(calls) == 4 else 1.0)
        }

    with cluster() as world:
        if world.rank == 1:
            GaussianDiffusion.losses = losses
        often = replace(SELDOM, save_every=2, skip_nonfinite=leave)
        state = train(TINY, run, often, progress=False, world=world, dataset=fifty())
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
    with cluster() as world:
        try:
            train(
                replace(TINY, steps=100_000),
                run,
                replace(SELDOM, save_every=100_000),
                progress=False,
                world=world,
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

    with cluster() as world:
        config, execution = changed({"save_every": 5, "steps": 1000})
        train(
            config,
            run,
            execution,
            progress=False,
            world=world,
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


def once_in_a_while():
    with cluster() as world:
        calls = []
        said = world.once(lambda: calls.append(world.rank) or f"rank {world.rank}")
        total = world.sum(torch.tensor([1.0, float(world.rank)]))
        try:
            world.once(lambda: int("x"))
        except ValueError as error:
            return said, calls, total.tolist(), str(error)


def test_once_is_once_and_its_error_is_everyones():
    results = together(3, once_in_a_while)
    assert [calls for _, calls, _, _ in results] == [[0], [], []]
    assert all(result[0] == "rank 0" and result[2] == [3.0, 3.0] for result in results)
    assert all("invalid literal" in result[3] for result in results)


def save_for_ever(run, shared):
    state = TrainState.create(TINY, SELDOM, World("cpu"))
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    if (checkpoint := find_checkpoint(run)) is not None:
        load_checkpoint(checkpoint, state, World("cpu"))
    while True:
        state.step += 1
        write_checkpoint(run, snapshot(state, World("cpu")))
        shared.value = state.step


def test_fifty_kills_in_the_middle_of_saves_lose_at_most_the_save_under_way(tmp_path):
    generator = torch.Generator().manual_seed(0)
    finished = FORKS.Value("q", 0)
    in_the_middle = 0
    for _ in range(50):
        before = finished.value
        process = FORKS.Process(target=save_for_ever, args=(tmp_path, finished))
        process.start()
        deadline = time.monotonic() + 60
        while finished.value == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(float(torch.rand(1, generator=generator)) * 0.05)
        process.kill()
        process.join()
        in_the_middle += any((tmp_path / "checkpoints").glob(".*.tmp"))
        assert finished.value > before, "no save finished in a minute"
        assert int(find_checkpoint(tmp_path).name[5:]) >= finished.value
    assert in_the_middle >= 10, (
        f"only {in_the_middle} of 50 kills fell into a save: the test shows little"
    )
    assert len(list((tmp_path / "checkpoints").glob("step_*"))) <= 4


def signalled(command, run, number):
    """Start a command, send it a signal once it trains; its exit code and what it said."""
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not (run / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(number)
    said, _ = job.communicate(timeout=400)
    return job.returncode, said


@pytest.mark.parametrize(
    ("processes", "number"),
    [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGUSR1), (2, signal.SIGINT)],
)
def test_the_command_that_is_asked_to_stop_says_so(tmp_path, processes, number):
    run, config = tmp_path / "run", tmp_path / "tiny.yaml"
    config.write_text(
        yaml.safe_dump(flat(*changed({"steps": 100_000, "log_every": 1})))
    )
    words = f"-m diffussm train digits --config {config} --out {run} --device cpu --no_grid".split()
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    launcher += ["--signals_to_handle", "SIGTERM,SIGUSR1"]
    if processes == 1:
        code, said = signalled([sys.executable, *words], run, number)
        assert code == EXIT_PREEMPTED == 75 and "Traceback" not in said, said
    else:  # torchrun hands the signal on, and replaces the code of its children
        _, said = signalled([sys.executable, *launcher, *words], run, number)
    assert "asked to stop" in (run / "preempted").read_text(), said
    assert find_checkpoint(run) is not None


# ---- a process that fails ----

SLOW = 600  # seconds that closing the process group takes, and more than any test waits


def fails_alone(failing, wait):
    """Process `failing` raises where the other does not, which waits for it in one way or another."""
    torch.distributed.destroy_process_group = lambda *_: time.sleep(SLOW)
    with cluster() as world:
        world.sum(torch.zeros(1))
        if world.rank == failing:
            raise OSError("the disk is full")
        if wait == "barrier":
            world.barrier()
        elif wait == "all-reduce":
            world.sum(torch.zeros(1))
        else:  # as in NCCL, which never learns that nobody comes
            time.sleep(SLOW)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("wait", ["barrier", "all-reduce", "NCCL"])
def test_a_process_that_fails_alone_ends_all_without_waiting(failing, wait):
    started = start(2, fails_alone, failing, wait)
    told = outcomes(started, timeout=400)
    assert told[failing] == (False, "OSError: the disk is full")
    why = f"process {failing} failed: OSError: the disk is full"
    assert told[1 - failing] == (False, f"PeerFailed: stopped, because {why}")
    assert [process.exitcode for process, _ in started] == [1, 1]


def fails_while_writing(run):
    from diffussm import distributed

    distributed.write_checkpoint = lambda *_: time.sleep(SLOW)
    with cluster() as world:
        world.save(run, None, TINY, SELDOM)
        if world.rank == 0:
            raise KeyError("a fault of the program")
        world.sum(torch.zeros(1))


def test_a_process_that_fails_alone_does_not_wait_for_its_writer(tmp_path):
    first, second = outcomes(start(2, fails_while_writing, tmp_path), timeout=400)
    assert first == (False, "KeyError: 'a fault of the program'")
    assert not second[0] and "process 0 failed: KeyError" in second[1]


def how_it_ends(function, *arguments):
    """What a function raised, and how often the process group was closed by then."""
    honest, closed = torch.distributed.destroy_process_group, []
    torch.distributed.destroy_process_group = lambda *_: closed.append(honest())
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}", len(closed)


def refused(_):
    with cluster() as world:
        world.once(lambda: int("x"))


def asked_to_stop(run):
    with cluster() as world:
        world.stopping = world.rank == 1
        train(TINY, run, SELDOM, progress=False, world=world, dataset=fifty())


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


class TwoArguments(Exception):
    """Pickles, and cannot be read back."""

    def __init__(self, what, why):
        super().__init__(f"{what}: {why}")


def once_what_cannot_be_sent():
    def needs_two():
        raise TwoArguments("no image", "torn")

    def holds_a_lock():
        error = ValueError("locked")
        error.lock = threading.Lock()
        raise error

    said = []
    with cluster() as world:
        for function in (needs_two, holds_a_lock, threading.Lock):
            try:
                world.once(function)
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
        return said, world.sum(torch.ones(1)).item()  # and they are still in step


def test_what_cannot_be_pickled_leaves_nobody_waiting():
    first, second = (
        said for said, total in together(2, once_what_cannot_be_sent) if total == 2
    )
    assert (
        first[0] == "TwoArguments: no image: torn" and first[1] == "ValueError: locked"
    )
    assert (
        second[0] == f"RuntimeError: {first[0]}"
        and second[1] == f"RuntimeError: {first[1]}"
    )
    assert "cannot pickle" in first[2] and "cannot pickle" in second[2]


@pytest.mark.parametrize("command", ["train", "encode", "sample"])
def test_a_command_ends_when_one_process_fails(tmp_path, alone, command):
    """Under torchrun; closing the process group would take ten minutes (`one_rank_fails.py`)."""
    images, config = tmp_path / "images", tmp_path / "tiny.yaml"
    images.mkdir()
    Image.new("RGB", (8, 8)).save(images / "one.png")
    config.write_text(yaml.safe_dump(flat(TINY, SELDOM)))
    words = {
        "train": f"digits --config {config} --out {tmp_path / 'run'} --no_grid",
        "encode": f"{images} {tmp_path / 'latents'} --vae none --size 8",
        "sample": f"--from {alone} --out {tmp_path / 'set'} --count 10 --batch_size 2 --steps 4",
    }[command]
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2 --shutdown_timeout 600".split()
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


# ---- signals ----


def test_a_second_ctrl_c_stops_at_once(monkeypatch):
    from diffussm import distributed

    with Cluster("cpu") as world:
        os.kill(os.getpid(), signal.SIGINT)
        assert world.stopping
        os.kill(
            os.getpid(), signal.SIGINT
        )  # torchrun hands on what the terminal has sent already
        monkeypatch.setattr(distributed, "REPEAT", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with Cluster("cpu") as world:  # SIGTERM says no more the second time than the first
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert world.stopping


def test_what_cannot_stop_leaves_the_signals_alone():
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with Cluster("cpu", stoppable=False):
        assert before == [signal.getsignal(number) for number in numbers]


def test_a_system_without_sigusr1_can_stop_as_well(monkeypatch):
    """As on Windows: the module is executed once more, under another name."""
    from diffussm import distributed

    monkeypatch.delattr(signal, "SIGUSR1")
    spec = importlib.util.spec_from_file_location("elsewhere", distributed.__file__)
    elsewhere = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(
        sys.modules, "elsewhere", elsewhere
    )  # its dataclasses look there
    spec.loader.exec_module(elsewhere)
    with elsewhere.Cluster("cpu") as world:
        os.kill(os.getpid(), signal.SIGTERM)
        assert world.stopping


def test_multiply_adds_follow_the_papers_formula():
    """15 L D^2 / 2 per block at M = 2 (chapter 4), 29 blocks of 1152 at 1024 positions."""
    xl = DiffuSSMConfig(**PRESETS["DiffuSSM-XL"])
    assert linear_macs(xl) == pytest.approx(29 * 7.5 * 1024 * 1152**2)
    assert (
        peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and peak_flops("Abacus") is None
    )


@pytest.mark.parametrize(
    ("name", "teraflops"),  # names as torch.cuda.get_device_name gives them
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H800", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H20", 148),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L40", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H1000", None),
    ],
)
def test_the_peak_is_that_of_the_very_card(name, teraflops):
    assert peak_flops(name) == (None if teraflops is None else teraflops * 1e12)


def test_one_gpu_for_many_processes_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_WORLD_SIZE", "8"),
        ("LOCAL_RANK", "7"),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match="cuda:1 is one GPU, and 8 processes.*pass --device cuda"
    ):
        Cluster("cuda:1")
    with pytest.raises(
        ValueError, match="process 7 of this machine has no GPU.*--nproc_per_node 2"
    ):
        Cluster("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with Cluster("cuda") as world:
        assert world.device == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with Cluster("cuda:0") as world:
        assert world.device == torch.device("cuda", 0)


def test_the_peak_of_memory_is_that_of_one_line_of_the_log(monkeypatch):
    peak = [3e9]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 1e9)
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIe")
    with Cluster("cpu") as world:
        world.device = torch.device("cuda", 0)
        first, second = world.vitals(TINY, 100.0), world.vitals(TINY, 100.0)
    assert (first["memory_gb"], second["memory_gb"]) == (3.0, 1.0) and first[
        "mfu"
    ] == second["mfu"]


def test_float32_is_float32_on_a_gpu(monkeypatch):
    gpu, before = torch.device("cuda", 0), torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    try:
        with Cluster("cpu") as world:
            world.device = gpu
            for precision, products in (("float32", "highest"), ("bf16", "high")):
                world.shard(
                    torch.nn.Linear(1, 1), replace(TINY, precision=precision), SELDOM
                )
                assert torch.get_float32_matmul_precision() == products
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_cluster_gives_the_signals_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with Cluster("cpu") as world:
        assert signal.getsignal(signal.SIGTERM) != before[0] and world.size == 1
    assert before == [
        signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)
    ]
