"""Ch. "Efficiency": counts against PyTorch's counter, the transformer, benchmarks."""

import copy
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import checkpoint, common, references, roofline
from diffussm.efficiency import (
    DiT,
    DiTBlock,
    convolution_macs,
    diffussm_macs,
    dit_macs,
    explicit_attention,
)
from diffussm.hourglass import HourglassBlock
from diffussm.model import PRESETS, DiffuSSM, DiffuSSMConfig

ROOT = Path(__file__).parents[1]
XL = PRESETS["DiffuSSM-XL"]
SMALL = {
    "input_size": 8,
    "in_channels": 3,
    "num_classes": 10,
    "d_model": 32,
    "n_blocks": 2,
    "d_state": 4,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("side", [16, 32, 64, 128])
@pytest.mark.parametrize(
    ("kind", "M"), [(DiT, 1), (DiffuSSM, 1), (DiffuSSM, 2), (DiffuSSM, 4)]
)
def test_multiply_adds_are_those_that_pytorch_counts(kind, M, side, patch):
    options = {
        "input_size": patch * side,
        "patch_size": patch,
        "downsample": M,
        "n_blocks": 2,
    }
    config = DiffuSSMConfig(**XL | options)
    with torch.device("meta"):
        model, x = kind(config), torch.empty(1, 4, patch * side, patch * side)
        t, y = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t, y)
    macs = (diffussm_macs if kind is DiffuSSM else dit_macs)(config)
    seen = sum(
        value for name, value in macs.items() if name != "convolution"
    )  # it counts no FFT
    assert counter.get_total_flops() / 2 == pytest.approx(seen, rel=1e-9)


def test_the_papers_formula_is_the_linear_part():
    config = DiffuSSMConfig(**XL)
    assert diffussm_macs(config)["linear maps"] == 29 * 7.5 * 1024 * 1152**2
    assert (
        diffussm_macs(config, 4096)["linear maps"]
        == 4 * diffussm_macs(config)["linear maps"]
    )
    assert dit_macs(config, 2048)["attention"] == 4 * dit_macs(config)["attention"]
    assert sum(
        dit_macs(DiffuSSMConfig(**XL | {"n_blocks": 28, "patch_size": 2})).values()
    ) == pytest.approx(118.64e9, rel=1e-3)  # DiT's own figure for XL/2


def test_convolution_is_three_real_transforms_and_two_products():
    L = 512
    transform = (
        2.5 * (2 * L) * 10 / 2
    )  # 2.5 n log2 n operations, two for a multiply-add; 2^10 = 2L
    assert convolution_macs(L, 3) == 3 * (3 * transform + 2 * 4 * (L + 1))


def test_dit_xl_has_the_parameters_of_dit_xl():
    with torch.device("meta"):
        model = DiT(DiffuSSMConfig(**XL | {"n_blocks": 28, "patch_size": 2}))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(675e6, rel=1e-3)


def awake(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def test_dit_block_is_attention_and_mlp_head_by_head():
    """By the definition: every position and head by itself, in float64."""
    block = awake(DiTBlock(8, n_heads=2)).double()
    x, c = (
        torch.randn(2, 5, 8, dtype=torch.float64),
        torch.randn(2, 8, dtype=torch.float64),
    )
    w = dict(block.named_parameters())
    expected = torch.empty_like(x)
    for b in range(2):
        m = w["modulation.weight"] @ (c[b] * torch.sigmoid(c[b])) + w["modulation.bias"]
        shift1, scale1, gate1, shift2, scale2, gate2 = m.view(6, 8)

        def normed(v, shift, scale):
            return (v - v.mean()) / (v.var(unbiased=False) + 1e-6).sqrt() * (
                1 + scale
            ) + shift

        qkv = [
            w["qkv.weight"] @ normed(v, shift1, scale1) + w["qkv.bias"] for v in x[b]
        ]  # 24 numbers: q of head 0, q of head 1, k of head 0, ...
        for i in range(5):
            heads = []
            for h in range(2):
                q = qkv[i][4 * h : 4 * h + 4]
                scores = torch.stack(
                    [q @ other[8 + 4 * h : 12 + 4 * h] / 2 for other in qkv]
                )
                weights = scores.exp() / scores.exp().sum()
                heads.append(
                    sum(
                        a * other[16 + 4 * h : 20 + 4 * h]
                        for a, other in zip(weights, qkv, strict=True)
                    )
                )
            v = x[b, i] + gate1 * (w["proj.weight"] @ torch.cat(heads) + w["proj.bias"])
            hidden = w["mlp_in.weight"] @ normed(v, shift2, scale2) + w["mlp_in.bias"]
            hidden = (
                0.5
                * hidden
                * (
                    1
                    + torch.tanh(
                        math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
                    )
                )
            )
            expected[b, i] = v + gate2 * (
                w["mlp_out.weight"] @ hidden + w["mlp_out.bias"]
            )
    torch.testing.assert_close(block(x, c), expected, rtol=0, atol=1e-10)
    block.attention = explicit_attention
    torch.testing.assert_close(block(x, c), expected, rtol=0, atol=1e-10)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="n_heads=3: expected a divisor of d_model=8"):
        DiTBlock(8, 3)


@pytest.mark.parametrize("patch", [1, 2])
def test_dit_has_the_interface_of_a_diffussm(patch):
    model = DiT(DiffuSSMConfig(**SMALL | {"patch_size": patch}), n_heads=4)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 10])
    assert torch.equal(model(x, t, y), torch.zeros(2, 6, 8, 8))
    awake(model)
    output = model(x, t, y)
    alone = torch.cat(
        [model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(2)]
    )
    torch.testing.assert_close(output, alone, rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(output.square().sum(), list(model.parameters()))
    model.activation_checkpointing = True
    again = torch.autograd.grad(model(x, t, y).square().sum(), list(model.parameters()))
    for one, other in zip(gradients, again, strict=True):
        torch.testing.assert_close(one, other)
    moved = x.clone()
    moved[0, :, 5, 6] += 1.0
    assert (model(moved, t, y) - output).abs().amax((1, 2, 3))[
        1
    ] == 0  # no image sees another


def test_a_noisy_run_is_refused():
    assert (
        common.require_quiet(
            "x", {"a": [1.0, 1.05, 1.1], "b": [2.0, 2.0, 9.0, 2.0, 2.0]}
        )
        < 0.1
    )
    with pytest.raises(
        common.Noise, match="runs of b took 1, 2, 3 s; .* nothing is reported"
    ):
        common.require_quiet("x", {"a": [1.0, 1.0, 1.0], "b": [1.0, 2.0, 3.0]})
    with pytest.raises(common.Noise):
        common.require_quiet("x", {"a": [1.0, math.nan, 1.0]})


def test_one_run_has_no_spread():
    with pytest.raises(ValueError, match="x: a ran once, and one run has no spread"):
        common.require_quiet("x", {"a": [1.0]})


SPREADS = (
    "bidirectional",
    "block",
    "checkpoint",
    "kernel",
    "length",
    "loader",
    "page_model",
    "readers",
    "roofline",
    "sampling",
    "train_step",
    "ways",
)


@pytest.mark.parametrize("name", SPREADS)
def test_a_benchmark_that_reports_a_spread_refuses_one_run(name, capsys):
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(f"benchmarks.{name}").main(["--runs", "1"])
    assert "--runs: 1: one run has no spread" in capsys.readouterr().err


def test_a_noisy_checkpoint_is_not_reported(monkeypatch):
    ends = itertools.chain.from_iterable((0.0, s) for s in (9.0, 1.0, 9.0, 3.0))
    clock = SimpleNamespace(perf_counter=ends.__next__)
    monkeypatch.setattr(checkpoint, "time", clock)
    with pytest.raises(common.Noise, match="the runs of training waits took 1, 3 s"):
        checkpoint.main(["--preset", "digits", "--runs", "2"])


class Operands(TorchDispatchMode):
    """Notes each tensor that is read or written, once."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for x in tree_leaves((args, out)):
            if isinstance(x, torch.Tensor):
                self.seen[x.data_ptr()] = x.nbytes
        return out


def test_a_part_of_the_roofline_moves_the_bytes_that_are_counted():
    for name, (_, moved, job) in roofline.parts_of_a_block(64, 160).items():
        with Operands() as operands:
            result = job()  # lives until all are counted: no address comes twice
        assert sum(operands.seen.values()) == pytest.approx(moved, rel=0.05), name
        del result


def test_disagreement_and_noise_end_a_benchmark_without_a_traceback(capsys):
    def wrong():
        common.require_agreement(
            "fast", torch.ones(3), torch.tensor([1.0, 1.0, math.nan]), 1e-3
        )
        return 0

    assert common.command(wrong) == 2
    assert capsys.readouterr().err.startswith(
        "error: fast: the two sides differ by nan"
    )
    assert common.command(lambda: 1) == 1


@pytest.mark.parametrize(
    "block", [HourglassBlock(8, 4, 2), DiTBlock(8, 2)], ids=["DiffuSSM", "DiT"]
)
def test_a_wrong_block_is_not_compared(block):
    references.awake(block)
    assert references.require_right("block", block, 8, 32) < 1e-4
    wrong = copy.deepcopy(block)
    if isinstance(wrong, HourglassBlock):
        right = wrong.ssm.convolution
        wrong.ssm.convolution = lambda u, spectra: 1.01 * right(u, spectra)
    else:
        wrong.attention = lambda q, k, v: F.scaled_dot_product_attention(q, k, 1.01 * v)
    wrong_twin = references.clear_twin(block)
    original = references.clear_twin
    try:
        references.clear_twin = lambda _: wrong_twin
        with pytest.raises(
            common.Disagreement, match="block, output: .*nothing is reported"
        ):
            references.require_right("block", wrong, 8, 32)
    finally:
        references.clear_twin = original


def test_report_writes_what_was_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    rounds = [
        {"slow": [9.0, 1.0, 1.0], "fast": [1.0, 2.0, 3.0]},
        {"slow": [6.0, 6.3, 6.1], "fast": [2.0] * 3},
    ]
    monkeypatch.setattr(common, "alternate", lambda sides, runs, warmup: rounds.pop(0))
    row = common.speed_row("sum", ("slow", print), ("fast", print), at_least=2)
    assert (
        row["reached"] and row["ratio"] == 3.05 and not rounds
    )  # the first round was too noisy
    assert common.report("x", "A title", [row, row | {"reached": False}]) == 1
    stored = json.loads((tmp_path / "x.json").read_text())
    assert (
        stored["rows"][0] == row and stored["environment"]["torch"] == torch.__version__
    )
    assert (
        "| **no** |" in (tmp_path / "x.md").read_text()
        and "A title" in capsys.readouterr().out
    )


def test_alternate_takes_the_sides_in_turns():
    order = []
    seconds = common.alternate(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        runs=3,
        warmup=1,
    )
    assert order == ["a", "b"] * 4 and [len(seconds[name]) for name in "ab"] == [3, 3]


def test_rounding_does_not_reach_a_limit():
    assert common.rounded(1.9973, 2) == 1.997 and common.rounded(0.1503, 0.15) == 0.1503
    assert common.rounded(2.0, 2) == 2 and common.rounded(1.234) == 1.23
    row = common.memory_row("x", ("a", 1999), ("b", 1000), at_least=2)
    assert row["ratio"] == 1.999 and not row["reached"]


def test_what_is_no_product_is_outside():
    seconds = {"matrix products": 3.0, "kernels, matrix products": 1.0}
    seconds |= {"attention": 2.0, "convolution": 1.0, "kernels, the rest": 1.0}
    assert common.share_outside(seconds) == 0.25
    assert common.share_outside({"other": 1.0}) == 1


NAMES = (
    "kernel",
    "bidirectional",
    "block",
    "block_beside",
    "block_bf16",
    "train_step",
    "sampling",
    "loader",
    "readers",
    "length",
    "checkpoint",
    "guidance",
    "solvers",
    "ways",
)


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_has_recorded_its_machine_and_refuses_bad_options(name, capsys):
    record = json.loads((common.RESULTS / f"{name}.json").read_text())
    assert {"processor", "cores", "threads", "torch", "python", "date"} <= set(
        record["environment"]
    )
    assert record["rows"] and all("what" in row for row in record["rows"])
    with pytest.raises(SystemExit, match="2"):
        command = importlib.import_module(f"benchmarks.{name.partition('_b')[0]}")
        command.main(["--runs", "0"])
    assert "error:" in capsys.readouterr().err


@pytest.mark.slow
def test_the_measurements_of_a_gpu_are_rehearsed_without_one():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(
        [*command, "--rehearse"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for section in (
        "kernel",
        "bidirectional",
        "convolutions",
        "blocks",
        "training",
        "sampling",
    ):
        assert f"\n{section}: " in "\n" + done.stdout
    assert done.stdout.endswith("a rehearsal: nothing was written\n")
    if not torch.cuda.is_available():
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert (done.returncode, done.stdout) == (
            2,
            "",
        ) and "sees no GPU" in done.stderr
