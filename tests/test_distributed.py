"""Chapter 11: many processes compute what one does, and nothing that happens to them changes it."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, replace

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image

from diffussm.data import TensorData
from diffussm.diffusion import GaussianDiffusion
from diffussm.distributed import (
    EXIT_PREEMPTED,
    SAMPLE_PRESETS,
    Cluster,
    SampleConfig,
    draw_samples,
    linear_macs,
    peak_flops,
    to_uint8,
)
from diffussm.model import PRESETS, DiffuSSM, DiffuSSMConfig
from diffussm.training import (
    Preempted,
    TrainConfig,
    TrainState,
    World,
    find_checkpoint,
    load_checkpoint,
    snapshot,
    train,
    training_batch,
    write_checkpoint,
)

# Children of a server that has imported everything start in a hundredth of a second.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["diffussm.distributed", "torch.distributed.fsdp", "torch._dynamo"])

# 50 images and batches of 8: the end of an epoch lies in a batch, and in a micro-batch.
TINY = TrainConfig(
    model=DiffuSSMConfig(input_size=8, in_channels=1, num_classes=10, d_model=16, n_blocks=2, d_state=4),
    batch_size=8,
    steps=10,
    lr=1e-3,
    log_every=4,
    save_every=100,
)


def fifty():
    generator = torch.Generator().manual_seed(0)
    return TensorData(torch.rand(50, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(50) % 10)


REPORTS = []


def cluster(**options):
    """A Cluster that says through the pipe of its process why it ends."""
    return Cluster("cpu", report=lambda error: REPORTS[0](error), **options)


def _child(function, arguments, environment, pipe):
    os.environ.update(environment)
    torch.set_num_threads(1)
    REPORTS.append(lambda error: pipe.send((False, f"{type(error).__name__}: {error}")))
    try:
        pipe.send((True, function(*arguments)))
    except BaseException as error:
        pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


def start(size, function, *arguments):
    """Processes as torchrun starts them, with the pipes on which they say how they ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(size):
        ours, theirs = FORKS.Pipe()
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        environment = {key: str(value) for key, value in environment.items()} | {"MASTER_ADDR": "127.0.0.1"}
        process = FORKS.Process(target=_child, args=(function, arguments, environment, theirs))
        process.start()
        theirs.close()
        started.append((process, ours))
    return started


def outcomes(started, timeout=180):
    results = []
    for process, pipe in started:
        assert pipe.poll(timeout), "a process hangs"
        results.append(pipe.recv())
        process.join(timeout)
    return results


def together(size, function, *arguments):
    """What `function` returns in each of `size` processes; raises what one of them raised."""
    results = outcomes(start(size, function, *arguments))
    for fine, result in results:
        assert fine, result
    return [result for _, result in results]


def run_tiny(run, changes=None, kill_at=None):
    """Train TINY with all processes of the environment; optionally be killed while logging a step."""

    def on_log(row):
        if row["step"] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    with cluster() as world:
        train(
            replace(TINY, **(changes or {})), run, progress=False, world=world, dataset=fifty(), on_log=on_log
        )
        return world.rank


def log_of(run):
    times = ("seconds", "images_per_second", "seconds_left")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def digest_of(run):
    """The checksums of parameters, average and optimiser: equal if and only if every bit is."""
    return json.loads((find_checkpoint(run) / "state.json").read_text())


def assert_close(run, other):
    for name in ("model", "ema"):
        ours, theirs = (
            safetensors.torch.load_file(find_checkpoint(folder) / name / "model.safetensors")
            for folder in (run, other)
        )
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], atol=2e-5, rtol=1e-3, msg=f"{name} {key}")
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
    assert find_checkpoint(tmp_path / "killed").name in ("step_00000003", "step_00000006")
    together(size, run_tiny, tmp_path / "killed", changes)
    assert digest_of(tmp_path / "untouched") == digest_of(tmp_path / "killed")
    assert log_of(tmp_path / "untouched") == log_of(tmp_path / "killed")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    train(TINY, run, "cpu", progress=False, dataset=fifty())
    return run


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {}),
        (4, {"micro_batch": 1}),
        (2, {"parallel": "fsdp"}),
        (2, {"parallel": "fsdp", "micro_batch": 2}),
    ],
)
def test_any_number_of_processes_learns_and_logs_the_same(tmp_path, alone, size, changes):
    together(size, run_tiny, tmp_path / "run", changes)
    assert_close(tmp_path / "run", alone)


def test_four_processes_equal_four_parts(tmp_path):
    together(4, run_tiny, tmp_path / "processes", {})
    together(1, run_tiny, tmp_path / "parts", {"micro_batch": 2})
    assert_close(tmp_path / "processes", tmp_path / "parts")


@pytest.mark.parametrize(("first", "then"), [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_a_checkpoint_is_read_by_either_way_and_by_one_process(tmp_path, alone, first, then):
    together(2, run_tiny, tmp_path / "run", {"steps": 5, "parallel": first})
    together(2, run_tiny, tmp_path / "run", {"steps": 7, "parallel": then})
    train(TINY, tmp_path / "run", "cpu", progress=False, dataset=fifty())
    assert_close(tmp_path / "run", alone)
    weights = DiffuSSM.from_pretrained(find_checkpoint(tmp_path / "run") / "ema")
    assert weights.config == TINY.model


def batches_seen(steps):
    with cluster() as world:
        model = DiffuSSM(TINY.model)
        batches = [training_batch(fifty(), model, TINY, step, world.rank, world.size) for step in steps]
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
    together(1, run_tiny, tmp_path / "run", {"recompute": True})
    assert_close(tmp_path / "run", alone)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler (g++)")
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
def test_compiling_changes_nothing(tmp_path, alone):
    together(1, run_tiny, tmp_path / "run", {"compile": True})
    assert_close(tmp_path / "run", alone)


@pytest.mark.parametrize("size", [2, 4])
def test_a_batch_that_cannot_be_shared_is_refused_up_front(tmp_path, size):
    for fine, said in outcomes(start(size, run_tiny, tmp_path / "run", {"batch_size": size * 3 + 1})):
        assert not fine and f"cannot be shared by {size} processes" in said
    for fine, said in outcomes(start(size, run_tiny, tmp_path / "run", {"batch_size": 8, "micro_batch": 3})):
        assert not fine and "does not divide" in said
    assert not (tmp_path / "run").exists()


def poisoned(run):
    """The second process alone gets a loss that is not a number, at the fourth step."""
    honest, calls = GaussianDiffusion.losses, []

    def losses(*arguments):
        calls.append(1)
        terms = honest(*arguments)
        return terms | {"loss": terms["loss"] * (float("nan") if len(calls) == 4 else 1.0)}

    with cluster() as world:
        if world.rank == 1:
            GaussianDiffusion.losses = losses
        train(
            replace(TINY, save_every=2, skip_nonfinite=0), run, progress=False, world=world, dataset=fifty()
        )


def test_what_is_not_finite_on_one_process_stops_all_before_the_weights(tmp_path):
    for fine, said in outcomes(start(2, poisoned, tmp_path / "run")):
        assert not fine and "FloatingPointError: loss or gradient is not finite at step 4" in said
    (dump,) = (tmp_path / "run").glob("dump_*")
    assert json.loads((dump / "dump.json").read_text())["step"] == 3
    assert all(
        bool(value.isfinite().all())
        for value in safetensors.torch.load_file(dump / "model" / "model.safetensors").values()
    )
    assert find_checkpoint(tmp_path / "run").name == "step_00000002"


def until_stopped(run):
    with cluster() as world:
        try:
            train(
                replace(TINY, steps=100_000, save_every=100_000),
                run,
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
        if row["step"] == 4:  # a file where the folder should be; root may write into read-only folders
            (run / "checkpoints").write_text("in the way")

    with cluster() as world:
        config = replace(TINY, save_every=5, steps=1000)
        train(config, run, progress=False, world=world, dataset=fifty(), on_log=block)


def test_a_write_that_fails_in_the_background_stops_all(tmp_path):
    first, second = outcomes(start(2, cannot_save, tmp_path / "run"))
    assert not first[0] and "could not be written" in first[1]
    assert not second[0] and "OSError" in second[1]
    assert log_of(tmp_path / "run")[-1]["step"] <= 12, "training went on without a checkpoint"


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
    state = TrainState.create(TINY, World("cpu"))
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
    assert in_the_middle >= 10, f"only {in_the_middle} of 50 kills fell into a save: the test shows little"
    assert len(list((tmp_path / "checkpoints").glob("step_*"))) <= 4


def signalled(command, run, number):
    """Start a command, send it a signal once it trains; its exit code and what it said."""
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (run / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(number)
    said, _ = job.communicate(timeout=120)
    return job.returncode, said


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_that_is_asked_to_stop_says_so(tmp_path, processes):
    run, config = tmp_path / "run", tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(asdict(replace(TINY, steps=100_000, log_every=1))))
    words = f"-m diffussm train digits --config {config} --out {run} --device cpu --no_grid".split()
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    launcher += ["--signals_to_handle", "SIGTERM,SIGUSR1"]
    if processes == 1:
        code, said = signalled([sys.executable, *words], run, signal.SIGTERM)
        assert code == EXIT_PREEMPTED == 75 and "Traceback" not in said, said
    else:  # torchrun hands the signal on, and replaces the code of its children
        _, said = signalled([sys.executable, *launcher, *words], run, signal.SIGUSR1)
    assert "asked to stop" in (run / "preempted").read_text(), said
    assert find_checkpoint(run) is not None


# ---- sets of samples ----

DIFFUSION = GaussianDiffusion.linear(50)
FEW = SampleConfig(count=10, labels="balanced", steps=3, batch_size=4, method="ddim")


def network():
    torch.manual_seed(0)
    model = DiffuSSM(TINY.model).eval()
    torch.nn.init.normal_(model.head.weight, std=0.2)
    return model


def draw(out, config=FEW, facts=None):
    with cluster() as world:
        draw_samples(network(), DIFFUSION, config, out, world=world, facts=facts or {}, progress=False)


def pictures(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


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
    assert record["complete"] and record["steps"] == 3 and record["labels"] == "balanced"
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
    with np.load(tmp_path / "short.npz") as short, np.load(tmp_path / "long.npz") as long:
        assert np.array_equal(short["arr_0"], long["arr_0"][:6])


@pytest.mark.parametrize("name", ["set", "set.npz"])
def test_an_interrupted_set_is_finished_and_not_begun_again(tmp_path, name, monkeypatch):
    draw(tmp_path / f"whole_{name}")
    calls = []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return honest(*arguments, **options)

    from diffussm import distributed

    honest = distributed.denoise
    monkeypatch.setattr(distributed, "denoise", counted)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / name)
    draw(tmp_path / name)
    assert len(calls) == 2 + 2  # three batches: one before the interruption, two after
    if name == "set":
        assert np.array_equal(pictures(tmp_path / "set"), pictures(tmp_path / "whole_set"))
    else:
        assert (tmp_path / name).read_bytes() == (tmp_path / f"whole_{name}").read_bytes()
    draw(tmp_path / name)
    assert len(calls) == 4, "a complete set was drawn again"


def test_other_samples_are_refused_and_untouched(tmp_path):
    draw(tmp_path / "set")
    before = {path: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    for config, facts, word in ((replace(FEW, seed=1), {}, "seed"), (FEW, {"weights": "raw"}, "weights")):
        with pytest.raises(ValueError, match=f"holds other samples.*{word}"):
            draw(tmp_path / "set", config, facts)
    assert before == {path: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_mother.txt").write_text("dear")
    (tmp_path / "file.npz").write_text("dear")
    for name in ("letters", "file.npz"):
        with pytest.raises(ValueError, match="no set of samples"):
            draw(tmp_path / name)


def test_labels_are_balanced_or_random_by_name():
    balanced = SampleConfig(labels="balanced").label(range(50_000), 1000)
    assert (balanced.bincount(minlength=1000) == 50).all()
    config = SampleConfig(labels="random")
    random = config.label(range(50_000), 1000)
    counts = random.bincount(minlength=1000).double()
    assert 40 < counts.var() < 60  # Poisson: variance = mean = 50
    assert torch.equal(random[100:200], config.label(range(100, 200), 1000))
    assert not torch.equal(random, replace(config, seed=1).label(range(50_000), 1000))


def test_presets_are_the_papers():
    paper = SAMPLE_PRESETS["paper-fid"]
    assert (paper.count, paper.steps, paper.method, paper.cfg_scale) == (50_000, 250, "ddpm", 1.5)
    assert SAMPLE_PRESETS["paper-fid-unguided"] == replace(paper, cfg_scale=1.0)


def test_pixels_are_rounded_and_latents_refused():
    images = torch.tensor([-1.0, 0.0, 1.0, 3.0]).view(4, 1, 1, 1)
    assert to_uint8(images)[:, 0, 0].tolist() == [[0] * 3, [128] * 3, [255] * 3, [255] * 3]
    with pytest.raises(ValueError, match="autoencoder"):
        to_uint8(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="not finite"):
        to_uint8(torch.full((1, 3, 2, 2), float("nan")))


@pytest.mark.parametrize(
    "changes", [{"count": 0}, {"labels": "mine"}, {"method": "euler"}, {"precision": "fp8"}, {"seed": -1}]
)
def test_sample_options_that_cannot_work_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(FEW, **changes)


def test_multiply_adds_follow_the_papers_formula():
    """15 L D^2 / 2 per block at M = 2 (chapter 4), 29 blocks of 1152 at 1024 positions."""
    xl = DiffuSSMConfig(**PRESETS["DiffuSSM-XL"])
    assert linear_macs(xl) == pytest.approx(29 * 7.5 * 1024 * 1152**2)
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and peak_flops("Abacus") is None


def test_the_cluster_gives_the_signals_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with Cluster("cpu") as world:
        assert signal.getsignal(signal.SIGTERM) != before[0] and world.size == 1
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
