"""Ch. "Where the bytes go": counts against sizes known by hand; the model of time."""

import json

import pytest
import torch
from torch.nn import functional as F

from benchmarks import common, traffic
from diffussm.fft_convolution import convolve, operator
from diffussm.traffic import CARDS, Card, Traffic, Work, seconds, work_of


def test_a_product_counts_operands_and_operations_once():
    def prepare():
        a, b = torch.zeros(7, 5), torch.zeros(5, 3, dtype=torch.float32)
        return lambda: a @ b

    (work,) = work_of(prepare)
    assert work == Work("linear maps", "mm", 2.0 * 7 * 5 * 3, 4.0 * (35 + 15 + 21))


def test_counting_changes_no_result():
    u, spectra = torch.randn(2, 8, 4), torch.randn(2, 4, 9, dtype=torch.complex64)
    with Traffic() as seen:
        y = convolve(u, spectra)
    assert torch.equal(y, convolve(u, spectra)) and len(seen.work) > 2


def test_counting_spoils_no_table_that_is_kept():
    kernels = pytest.importorskip("diffussm.gpu_kernels")
    kernels.dft_tables.cache_clear()

    def prepare():
        u, spectra = torch.zeros(1, 256, 2), torch.zeros(2, 2, 257, dtype=torch.cfloat)
        return lambda: kernels.triton_convolve(u, spectra)

    work_of(prepare)
    tables = kernels.dft_tables(256, torch.device("cpu"))
    assert all(type(table) is torch.Tensor for table in tables)


def test_views_move_nothing_and_copies_do():
    def prepare():
        x = torch.zeros(4, 6)

        def job():
            x.t()[1:].unsqueeze(0).expand(9, -1, -1).view(9, 5, 4)
            torch.empty(100), x.to(torch.float32)
            x.t().contiguous()
            x.to(torch.bfloat16)
            x[:2].copy_(torch.empty(2, 6))
            x.expand(3, 4, 6) + 1

        return job

    moved = sorted(work.bytes for work in work_of(prepare))
    assert moved == [4.0 * 24, 6.0 * 24, 4.0 * 48, 4.0 * (24 + 72)]


def test_an_operation_in_place_reads_and_writes():
    def prepare():
        x = torch.zeros(10)
        return lambda: x.mul_(2)

    (work,) = work_of(prepare)
    assert work.bytes == 80


def test_attention_has_its_operations():
    def prepare():
        q = torch.zeros(2, 3, 8, 4, requires_grad=True)
        return lambda: F.scaled_dot_product_attention(q, q, q).sum().backward()

    flops = [work.flops for work in work_of(prepare) if work.flops]
    once = 2.0 * 2 * 3 * 8 * 8 * 4  # one product of L x L by heads
    assert flops == [2 * once, 5 * once]


def test_the_convolution_is_counted_inside_forwards_and_backwards():
    def prepare():
        u = torch.zeros(2, 32, 16, requires_grad=True)
        spectra = torch.zeros(2, 16, 33, dtype=torch.complex64, requires_grad=True)
        return lambda: convolve(u, spectra).sum().backward()

    parts = {}
    for work in work_of(prepare):
        parts.setdefault(work.part, []).append(work.name)
    assert sum("rfft" in name for name in parts["convolve"]) >= 2
    assert len(parts["convolve_backward"]) > len(parts["convolve"])


def test_a_launch_of_triton_inside_an_operator_is_noted():
    triton = pytest.importorskip("triton")

    def unused(x):
        pass

    unused.__module__ = __name__
    kernel = triton.JITFunction(unused)

    def shape(x):
        return torch.empty_like(x)

    @operator("traffic_test", shape)
    def launching(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        kernel[(1,)](x, y, 3)
        return y

    def prepare():
        x = torch.zeros(1000)
        return lambda: launching(x)

    launch = triton.runtime.jit.KernelInterface.__getitem__
    (work,) = work_of(prepare)
    assert work.name == "unused" and work.bytes == 8000
    assert work.part.startswith("traffic_test")
    assert triton.runtime.jit.KernelInterface.__getitem__ is launch


def test_seconds_are_the_largest_of_three_for_each_kernel():
    card = Card(flops=10.0, bandwidth=100.0, launch=1.0)
    work = [Work("", "", 50, 1), Work("", "", 0, 700), Work("", "", 1, 1)]
    assert seconds(work, card) == 5 + 7 + 1
    assert set(CARDS) == {"A100", "H100"}


@pytest.mark.slow
def test_the_record_is_of_this_code():
    """A block as it is written has the kernels that were recorded."""
    rows = json.loads((common.RESULTS / "traffic.json").read_text())["rows"]
    length, batch = traffic.CASES[0]
    with traffic.pieces_of_a_gpu():
        now = work_of(lambda: traffic.block_job("DiffuSSM", batch, length, 1152, None))
    recorded = next(
        r
        for r in rows
        if (r["block"], r["how"], r["length"]) == ("DiffuSSM", "as written", length)
    )
    assert traffic.packed(now) == {k: recorded[k] for k in ("small", "kernels")}, (
        "run `python -m benchmarks.traffic`"
    )


def test_what_a_compiled_block_carries_does_not_grow():
    """The compiled block but for its convolution, at L = 1024 and B = 32; see the page
    for what is wanted.
    """
    rows = json.loads((common.RESULTS / "traffic.json").read_text())["rows"]
    row = next(r for r in rows if r["block"] == "DiffuSSM" and r["how"] == "compiled")
    lines = [line.split("; ") for line in row["kernels"]]
    rest = [line for line in lines if not line[0].startswith("convolve")]
    products = sum(float(flops) for _, _, flops, _ in rest)
    assert (row["length"], row["batch"]) == (1024, 32)
    assert products == pytest.approx(6 * 32 * 7.5 * 1024 * 1152**2, rel=0.01)
    assert sum(float(moved) for *_, moved in rest) < 6.0e9
    assert len(rest) + row["small"] <= 71


@pytest.mark.slow
def test_a_compiled_block_with_chunks_is_what_the_page_says():
    """Counted again, its plan by the compiler and its kernels: no more launches and
    bytes than the page gives for L = 1024 and B = 32, forward and backward.
    """
    segments = pytest.importorskip("diffussm.segments")
    length, batch = traffic.CASES[0]
    rows = json.loads((common.RESULTS / "traffic.json").read_text())["rows"]
    row = next(r for r in rows if r["block"] == "DiffuSSM" and r["how"] == "compiled")
    rest = traffic.planned("DiffuSSM", batch, length, 1152)
    outside = [line for line in row["kernels"] if not line.startswith("convolve")]
    assert traffic.packed(rest)["kernels"] == outside, (
        "run `python -m benchmarks.traffic`"
    )

    def prepare():
        u = torch.zeros(batch, length, 1152, dtype=torch.bfloat16, requires_grad=True)
        modes = torch.zeros(2, 1152, 2 * 64 + 1, requires_grad=True)
        return lambda: segments.chunked_triton(u, modes).sum().backward()

    inside = [work for work in work_of(prepare) if work.part.startswith("chunked")]
    assert len(rest) + len(inside) <= 73
    assert sum(work.bytes for work in rest + inside) < 6.935e9


def test_bad_options_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        traffic.main(["--width", "20"])
    assert "multiple of 16" in capsys.readouterr().err
