"""What `benchmarks.gpu` measures and checks, rehearsed on a CPU with tiny sizes."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import common, gpu
from benchmarks.references import awake, require_rounding
from benchmarks.train_step import make_model
from diffussm.bidirectional import BidirectionalSSM, Convolution, way
from diffussm.efficiency import DiTBlock
from diffussm.hourglass import HourglassBlock
from diffussm.model import PRESETS, DiffuSSM, DiffuSSMConfig

CPU = torch.device("cpu")
TINY = replace(gpu.REHEARSAL, places=(128,), batches=(2,), curve=(16, 64))

SECTIONS = ["blocks", pytest.param("training", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def quick(monkeypatch):
    """Timing that takes no time and is never noisy."""

    def once(sides, runs, warmup):
        for side in sides.values():
            side()
        return {name: [1.0] * runs for name in sides}

    monkeypatch.setattr(common, "alternate", once)


def spoiled(factor):
    """The right convolution but for a factor, and its name."""
    right = way("fft")
    wrong = Convolution(lambda u, s: factor * right(u, s), BidirectionalSSM.spectra)
    return lambda *case: (wrong, "spoiled")


def faults(section, sizes=TINY):
    """What is wrong with each row of a section."""
    rows = gpu.measured(section, sizes, CPU)
    return {row["what"]: row.get("error", "") for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("section", ["blocks", "training", "sampling"])
def test_a_right_layer_is_measured(section, quick):
    assert not any(faults(section).values())


@pytest.mark.parametrize("section", SECTIONS)
def test_a_layer_that_is_wrong_by_a_twentieth_is_refused(section, quick, monkeypatch):
    monkeypatch.setattr(gpu, "chosen", spoiled(1.05))
    found = faults(section)
    ours = {what: fault for what, fault in found.items() if "training DiT" not in what}
    assert all(fault.startswith("Disagreement: ") for fault in ours.values())
    assert not any(found[what] for what in found.keys() - ours.keys())


def test_images_of_a_wrong_layer_are_refused(quick, monkeypatch):
    monkeypatch.setattr(gpu, "chosen", spoiled(2.0))
    one, guided = faults("sampling").values()  # the first takes the FFT
    assert not one and guided.startswith("Disagreement: sampling, 8 x 8, batch 2, ")


@pytest.mark.parametrize("section", SECTIONS)
def test_a_compiler_that_is_wrong_is_noticed(section, quick, monkeypatch):
    def wrongly(block, dynamic):
        right = block._call_impl
        block._compiled_call_impl = lambda x, *more: x + 1.05 * (right(x, *more) - x)

    monkeypatch.setattr(nn.Module, "compile", wrongly)
    found = faults(section, replace(TINY, compile=True))
    assert all(fault.startswith("Disagreement: ") for fault in found.values())


def test_rounding_may_cost_three_times_what_it_costs_the_plain_way():
    exact = [torch.ones(100), torch.ones(100), torch.ones(100)]
    rounded = [1.001 * exact[0], 1.01 * exact[1], exact[2]]
    right = [1.0029 * exact[0], exact[1], 1.029 * exact[2]]
    assert 0.9 < require_rounding("x", exact, rounded, right) < 1
    for index, factor in ((0, 1.0031), (1, 1.031), (2, float("nan"))):
        wrong = [*right[:index], factor * exact[index], *right[index + 1 :]]
        with pytest.raises(common.Disagreement, match=f"x: tensor {index} is "):
            require_rounding("x", exact, rounded, wrong)


@pytest.mark.parametrize("name", ["fft", "chunked"])
def test_a_timed_block_is_whole(name):
    """Its passes prepare their kernels, and gradients reach every weight."""
    block = awake(HourglassBlock(8, 4, 2))
    block.ssm.convolution = way(name)
    draws = torch.Generator().manual_seed(0)
    x, c, probe = (
        torch.randn(shape, generator=draws)
        for shape in ((2, 16, 8), (2, 8), (2, 16, 8))
    )
    named = dict(block.named_parameters())
    last = [p for key, p in named.items() if key.startswith("ssm.")]
    first = [p for key, p in named.items() if not key.startswith("ssm.")]
    inputs = [x.requires_grad_(), c.requires_grad_(), *first, *last]
    y = block(x, c)
    expected = [y.detach(), *torch.autograd.grad(y, inputs, probe)]
    for passes in (1, 3):
        found = gpu.block_job(block, 2, 32, passes, CPU, half=False)()
        assert len(found) == len(expected)
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            times = passes if index > len(inputs) - len(last) else 1
            torch.testing.assert_close(one, times * other, rtol=1e-4, atol=1e-5)


def test_the_plain_twin_is_not_what_is_timed():
    block = DiTBlock(8, 2)
    block.attention = lambda q, k, v: 2 * v
    x, c = torch.randn(2, 4, 8), torch.randn(2, 8)
    awake(block)
    assert torch.equal(
        gpu.plain_twin(block)(x, c), gpu.plain_twin(gpu.plain_twin(block))(x, c)
    )
    assert not torch.allclose(gpu.plain_twin(block)(x, c), block(x, c))


def test_kernels_are_computed_before_the_clock_of_a_sampler_starts(monkeypatch):
    config = DiffuSSMConfig(
        **PRESETS["DiffuSSM-XL"] | {"input_size": 8, "n_blocks": 1, "d_model": 32}
    )
    model = make_model("DiffuSSM", config).eval()
    plain = gpu.plain_images(model, 2, TINY)
    events, prepare = [], DiffuSSM.prepare

    def noted(self, length):
        events.append("kernels")
        return prepare(self, length)

    monkeypatch.setattr(DiffuSSM, "prepare", noted)

    def clock(what, sides, runs):
        events.append("clock")
        for side in sides.values():
            side(), side()
        return {"guided": [2.0] * runs}, 0.0

    monkeypatch.setattr(gpu, "quiet_runs", clock)
    row = gpu.one_sampling("guided", model, plain, TINY, CPU)
    assert events == ["kernels", "clock"]
    assert row["images_per_second"] == pytest.approx(2 / 2.0 * TINY.steps / 250)


def test_noisy_curves_and_samplers_are_not_reported(monkeypatch):
    def uneven(sides, runs, warmup):
        return {name: [1.0, 9.0] for name in sides}

    monkeypatch.setattr(common, "alternate", uneven)
    for section in ("blocks", "sampling"):
        found = faults(section)
        assert all(fault.startswith("Noise: ") for fault in found.values()), found


MACHINE = {"gpu": "H100", "torch": "2.11", "date": "2030-01-02"}
BEFORE = {
    "environment": {"gpu": "H100", "torch": "2.11", "date": "2030-01-01"},
    "kernel": [{"what": "old", "commit": "aaaaaaa"}],
    "training": [
        {"what": "small", "size": 32, "commit": "aaaaaaa"},
        {"what": "large", "size": 64, "commit": "bbbbbbb", "date": "2029-12-31"},
    ],
}


@pytest.mark.parametrize("machine", ["H100", "H200", "PyTorch"])
def test_a_row_of_another_gpu_or_pytorch_is_not_relabelled(
    machine, monkeypatch, tmp_path, capsys
):
    changed = {"H200": {"gpu": "H200"}, "PyTorch": {"torch": "2.12"}}.get(machine, {})
    here = MACHINE | changed
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "environment", lambda: here)
    monkeypatch.setattr(gpu, "commit", lambda: "ccccccc")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    new = {"what": "new", "size": 32}
    monkeypatch.setitem(gpu.SECTIONS, "training", lambda *case: iter([new]))
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(BEFORE))
    assert gpu.main(["--sections", "training", "--sizes", "32"]) == 0
    record, said = json.loads(file.read_text()), capsys.readouterr().out
    assert record["environment"] == here
    row = new | {"commit": "ccccccc", "date": "2030-01-02"}
    if machine == "H100":
        kept = copy.deepcopy(BEFORE["kernel"][0]) | {"date": "2030-01-01"}
        assert record["kernel"] == [kept]
        assert record["training"] == [BEFORE["training"][1], row]
        assert "not kept" not in said
    else:
        assert "kernel" not in record and record["training"] == [row]
        assert "the rows of H100, 2.11 are not kept" in said


def test_a_commit_is_named_or_unknown(monkeypatch, tmp_path):
    assert gpu.commit()
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert gpu.commit() == "unknown"


def test_every_row_of_the_record_names_its_commit():
    record = json.loads((common.RESULTS / "gpu.json").read_text())
    rows = [row for name in gpu.SECTIONS for row in record.get(name, [])]
    assert rows and all(row["commit"] for row in rows)
