"""One batch, many GPUs: many processes compute what one does."""

import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from interpreter import round_to_nearest
from processes import (
    SHARED,
    assert_close,
    changed_shared,
    cluster,
    fifty,
    outcomes,
    run_shared,
    start,
    together,
)
from tiny import SELDOM
from torch.distributed.tensor import distribute_tensor

from diffussm import autotuning, parallel
from diffussm.batches import training_batch
from diffussm.bidirectional import way
from diffussm.checkpoints import full_tensor
from diffussm.convolution import S4DKernel
from diffussm.diffusion import GaussianDiffusion
from diffussm.distributed import rank, world_size
from diffussm.fft_convolution import convolve
from diffussm.model import PRESETS, DiffuSSM, DiffuSSMConfig
from diffussm.options import Execution, Recipe, diffusion_of
from diffussm.parallel import accumulate_gradients, compiler_lacking, create_state, wrap
from diffussm.runs import train
from diffussm.training import backward
from diffussm.two_level import multiplying_in

pytestmark = pytest.mark.slow  # many processes


DIFFUSION = GaussianDiffusion.linear(50)
CPU = torch.device("cpu")


def doubled(u, spectra):
    return convolve(u, 2 * spectra)


def test_another_convolution_is_asked_for_and_used(tmp_path, monkeypatch, capsys):
    asked = []

    def choose(*question, **work):
        asked.append((*question, work))
        return SimpleNamespace(convolution=doubled, reason="twice is better")

    monkeypatch.setitem(sys.modules, "elsewhere", SimpleNamespace(choose=choose))
    config = Recipe(model=DiffuSSMConfig(**PRESETS["digits"]), batch_size=8)
    execution = Execution(micro_batch=4, convolution="elsewhere:choose")
    state = create_state(config, execution, CPU)
    work = {"d_state": PRESETS["digits"]["d_state"], "backward": True}
    assert asked == [(64, 96, 4, torch.device("cpu"), torch.float32, work)]
    assert "convolution: twice is better" in capsys.readouterr().err
    for model in (state.model, state.ema):
        assert all(block.ssm.convolution is doubled for block in model.blocks)
    plain = create_state(config, Execution(), CPU)
    assert all(block.ssm.convolution == way("fft") for block in plain.model.blocks)


def test_a_cpu_that_asks_for_the_chip_is_told_why_not(capsys):
    pytest.importorskip("triton")
    config = Recipe(model=DiffuSSMConfig(**PRESETS["digits"]), batch_size=8)
    execution = Execution(convolution="diffussm.autotuning:autotune_convolution")
    state = create_state(config, execution, CPU)
    assert "FFT: the kernels on the chip are for a GPU" in capsys.readouterr().err
    assert state.model.blocks[0].ssm.convolution == way("fft")


@pytest.mark.parametrize(
    "name", ["fast", "no.such.module:choose", "diffussm.model:choose", ":", "math:"]
)
def test_a_convolution_that_does_not_exist_is_refused(name):
    config = Recipe(model=DiffuSSMConfig(**PRESETS["digits"]), batch_size=8)
    with pytest.raises(ValueError, match="'package.module:function'"):
        create_state(config, Execution(convolution=name), CPU)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    train(SHARED, run, SELDOM, "cpu", progress=False, dataset=fifty())
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
    together(size, run_shared, tmp_path / "run", changes)
    assert_close(tmp_path / "run", alone)


def test_four_processes_equal_four_parts(tmp_path):
    together(4, run_shared, tmp_path / "processes", {})
    together(1, run_shared, tmp_path / "parts", {"micro_batch": 2})
    assert_close(tmp_path / "processes", tmp_path / "parts")


@torch.no_grad()
def disturb(model, seed):
    """Add the same random numbers to the parameters in all processes."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        numbers = 0.1 * torch.randn(tuple(parameter.shape))
        if hasattr(parameter, "placements"):
            how = parameter.device_mesh, parameter.placements
            numbers = distribute_tensor(numbers, *how, src_data_rank=None)
        parameter.add_(numbers)


def gradients(dtype, changes, plain=False):
    """Those of the second step, by name; `plain` without sharing any spectra."""
    torch.set_default_dtype(dtype)  # of this process, which ends here
    recipe, execution = changed_shared(changes)
    with cluster() as device:
        state = create_state(recipe, execution, device)
        network = wrap(state.model, execution)
        for step in range(2):
            disturb(state.model, step)  # a new model lets nothing through
            state.optimizer.zero_grad()
            share = rank(), world_size()
            batch = training_batch(fifty(), state.model, recipe, step, *share)
            options = diffusion_of(recipe), batch, recipe
            if plain:
                backward(network, *options)
            else:
                accumulate_gradients(network, *options, execution, device)
        parameters = state.model.named_parameters()
        return {name: full_tensor(p.grad).numpy() for name, p in parameters}


@pytest.fixture(scope="module")
def plain_gradients():
    (found,) = together(1, gradients, torch.float64, {}, True)
    return found


def worst(found, wanted):
    """The largest error of a gradient, relative to its largest entry."""
    assert found.keys() == wanted.keys()
    assert all(gradient.any() for gradient in wanted.values())
    return max(
        np.abs(found[name] - gradient).max() / np.abs(gradient).max()
        for name, gradient in wanted.items()
    )


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (1, {}),
        (1, {"micro_batch": 4}),
        (1, {"micro_batch": 2, "activation_checkpointing": "all"}),
        (2, {"micro_batch": 2}),
        (2, {"strategy": "fsdp"}),
        (2, {"strategy": "fsdp", "micro_batch": 1, "activation_checkpointing": "all"}),
        (1, {"convolution": "chunked", "micro_batch": 4}),
        (2, {"convolution": "chunked", "micro_batch": 2}),
        (2, {"convolution": "chunked", "strategy": "fsdp", "micro_batch": 1}),
    ],
)
def test_kernels_prepared_once_get_the_gradients_of_each_micro_batch(
    plain_gradients, size, changes
):
    for found in together(size, gradients, torch.float64, changes):
        assert worst(found, plain_gradients) < 1e-11


def chunks_win(length, *sizes, **work):
    """In the place of `autotune_convolution`: one process measures, and is followed."""
    assert rank() == 0
    name = "chunks of 16, 8 warps"
    return autotuning.Measured(autotuning._candidates(length)[name], f"{name}: it won")


@pytest.fixture(scope="module")
def single_gradients():
    """With the FFT in one process: in float32, and under autocast."""
    asked = {name: {"precision": name} for name in ("float32", "bf16")}
    plain = {
        k: together(1, gradients, torch.float32, v, True) for k, v in asked.items()
    }
    return {precision: found for precision, (found,) in plain.items()}


def gradients_with_triton(changes):
    """In its interpreter."""
    autotuning.autotune_convolution = chunks_win  # in this process, which ends here
    round_to_nearest()
    return gradients(torch.float32, changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"convolution": "chunked_triton"},
        {"convolution": "chunked_triton", "strategy": "fsdp"},
        {"convolution": "auto", "activation_checkpointing": "all"},
        {"convolution": "chunked_triton", "precision": "bf16"},
        {"convolution": "auto", "strategy": "fsdp", "precision": "bf16"},
    ],
)
def test_the_kernels_of_a_gpu_get_them_too_in_two_processes(single_gradients, changes):
    """Under autocast within three times the FFT's own error, as autotuning allows."""
    pytest.importorskip("triton")
    wanted, allowed = single_gradients["float32"], 1e-4
    if changes.get("precision") == "bf16":
        allowed = 3 * worst(single_gradients["bf16"], wanted)
        assert allowed < 0.3
    for found in together(2, gradients_with_triton, changes):
        assert worst(found, wanted) < allowed


@pytest.mark.parametrize("recompute", ["none", "elementwise", "all"])
def test_a_kernel_is_built_once_in_a_step(monkeypatch, recompute):
    """Four micro-batches of two blocks with two kernels each."""
    execution = Execution(micro_batch=2, activation_checkpointing=recompute)
    model = create_state(SHARED, execution, CPU).model
    batch = training_batch(fifty(), model, SHARED, 0)
    built, clear = [], S4DKernel.forward
    monkeypatch.setattr(
        S4DKernel, "forward", lambda *inputs: built.append(1) or clear(*inputs)
    )
    options = diffusion_of(SHARED), batch, SHARED
    accumulate_gradients(model, *options, execution, CPU)
    assert len(built) == 2 * 2


def test_one_micro_batch_is_the_plain_step_bit_for_bit():
    gradients = []
    for plain in (True, False):
        state = create_state(SHARED, SELDOM, CPU)
        torch.nn.init.normal_(
            state.model.head.weight, generator=torch.Generator().manual_seed(0)
        )
        batch = training_batch(fifty(), state.model, SHARED, 0)
        options = diffusion_of(SHARED), batch, SHARED
        if plain:
            backward(state.model, *options)
        else:
            accumulate_gradients(state.model, *options, SELDOM, CPU)
        gradients.append(state.gradients())
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def batches_seen(steps):
    with cluster():
        model = DiffuSSM(SHARED.model)
        batches = [
            training_batch(fifty(), model, SHARED, step, rank(), world_size())
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


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (1, {"activation_checkpointing": "all"}),
        (2, {"activation_checkpointing": "elementwise"}),
        (2, {"activation_checkpointing": "elementwise", "strategy": "fsdp"}),
    ],
)
def test_recomputing_changes_nothing(tmp_path, alone, size, changes):
    together(size, run_shared, tmp_path / "run", changes)
    assert_close(tmp_path / "run", alone)


@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler (g++)"
)
@pytest.mark.filterwarnings(
    "ignore:Torchinductor does not support code generation for complex"
)
@pytest.mark.parametrize("convolution", ["fft", "chunked_triton"])
def test_compiling_changes_nothing(tmp_path, alone, convolution):
    if "triton" in convolution:
        pytest.importorskip("triton")
    changes = {"compile": True, "convolution": convolution}
    together(1, run_shared, tmp_path / "run", changes)
    assert_close(tmp_path / "run", alone)


def graphs_of_a_block():
    """Of how many graphs a block is that fills more than one of DDP's buckets."""
    graphs, honest = [], torch.nn.Module.compile

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.nn.Module.compile = lambda module: honest(module, backend=count)
    model = replace(SHARED.model, d_model=640, n_blocks=1)
    config = replace(SHARED, model=model, timesteps=50)
    execution = replace(SELDOM, compile=True)
    with cluster() as device:
        state = create_state(config, execution, device)
        network, (block,) = wrap(state.model, execution), state.model.blocks
        batch = training_batch(fifty(), state.model, config, 0, rank(), world_size())
        DIFFUSION.losses(network, *batch)["loss"].sum().backward()
        size = sum(p.numel() * p.element_size() for p in block.parameters())
        return len(graphs), size, torch._dynamo.config.optimize_ddp


def test_ddp_does_not_cut_the_graph_of_a_compiled_block():
    for graphs, size, cutting in together(2, graphs_of_a_block):
        assert graphs == 1 and size > 25 * 2**20
        assert cutting  # elsewhere, for others who compile


def test_a_machine_without_a_compiler_trains_uncompiled_and_says_so(
    monkeypatch, capsys
):
    monkeypatch.setenv("CXX", "no-such-compiler")
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(parallel, "find_spec", lambda name: None)
    assert compiler_lacking(gpu) == "triton (pip install triton)"
    monkeypatch.setattr(parallel, "find_spec", lambda name: name)
    monkeypatch.setenv("CC", "neither-this")
    assert compiler_lacking(gpu) == "compiler (neither-this)"
    state = create_state(SHARED, replace(SELDOM, compile=True), CPU)
    assert "no compiler (no-such-compiler); the blocks" in capsys.readouterr().err
    assert all(block._compiled_call_impl is None for block in state.model.blocks)


@pytest.mark.parametrize("size", [2, 4])
def test_a_batch_that_cannot_be_shared_is_refused_up_front(tmp_path, size):
    for fine, said in outcomes(
        start(size, run_shared, tmp_path / "run", {"batch_size": size * 3 + 1})
    ):
        assert not fine and f"cannot be shared by {size} processes" in said
    for fine, said in outcomes(
        start(size, run_shared, tmp_path / "run", {"batch_size": 8, "micro_batch": 3})
    ):
        assert not fine and "does not divide" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_no_training_step_multiplies_in_tf32(precision):
    """Whatever the process allows elsewhere, which is set again afterwards."""
    settings, seen = (torch.backends.cuda.matmul, torch.backends.cudnn.conv), []
    recipe = replace(SHARED, precision=precision, timesteps=50)
    state = create_state(recipe, SELDOM, CPU)

    def look(*_):
        seen.extend(setting.fp32_precision for setting in settings)

    state.model.head.register_forward_hook(look)
    state.model.head.register_full_backward_hook(look)
    batch, options = training_batch(fifty(), state.model, recipe, 0), (SELDOM, CPU)
    with multiplying_in("tf32"):
        accumulate_gradients(state.model, DIFFUSION, batch, recipe, *options)
        assert [setting.fp32_precision for setting in settings] == ["tf32", "tf32"]
    assert seen == ["ieee"] * 4
