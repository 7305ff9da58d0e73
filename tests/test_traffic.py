"""Ch. "Where the bytes go": counts against sizes known by hand; the model of time."""

import inspect
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
    length, batch = traffic.CASES[0]
    with traffic.pieces_of_a_gpu():
        now = work_of(lambda: traffic.block_job("DiffuSSM", batch, length, 1152))
    row = recorded("DiffuSSM", "as written", length)
    assert traffic.packed(now) == {k: row[k] for k in traffic.packed([])}, (
        "run `python -m benchmarks.traffic`"
    )


def recorded(block, how, length):
    """A row of what `benchmarks.traffic` wrote."""
    rows = json.loads((common.RESULTS / "traffic.json").read_text())["rows"]
    wanted = block, how, length
    return next(r for r in rows if (r["block"], r["how"], r["length"]) == wanted)


def totals(lines):
    """Operations and bytes of recorded kernels."""
    return [sum(float(line.split("; ")[place]) for line in lines) for place in (2, 3)]


def test_what_a_compiled_block_carries_does_not_grow():
    """At L = 1024 and B = 32; see the page for what is wanted."""
    row = recorded(traffic.CHUNKS, "compiled", 1024)
    rest = [line for line in row["kernels"] if not line.startswith(traffic.OURS)]
    assert row["batch"] == 32
    assert totals(rest)[0] == pytest.approx(6 * 32 * 7.5 * 1024 * 1152**2, rel=0.01)
    assert len(row["kernels"]) + row["small"] <= 72
    assert totals(row["kernels"])[1] < 6.86e9


def test_what_stands_around_the_fft_does_not_grow():
    """The compiled block but for its convolution, at L = 1024 and B = 32."""
    row = recorded("DiffuSSM", "compiled", 1024)
    rest = [line for line in row["kernels"] if not line.startswith("convolve")]
    assert row["batch"] == 32
    assert totals(rest)[0] == pytest.approx(6 * 32 * 7.5 * 1024 * 1152**2, rel=0.01)
    assert totals(rest)[1] < 6.0e9
    assert len(rest) + row["small"] <= 71


def test_a_chunked_kernel_has_its_operations_and_a_pass_its_bytes():
    """Against multiply-adds written out: two directions, T near, N in and N out."""
    B, L, D, T, N = 2, 64, 3, traffic.CHUNK, traffic.STATES
    both = 2 * 2 * B * L * D  # operations of one multiply-add for every number
    costs = {"walk_kernel": T + 2 * N, "walk_kernel to": N, "modes_kernel to": 2 * N}
    costs |= {"walk_kernel from": T + 2 * N, "modes_kernel": T + 4 * N, "sum": 0}
    for name, cost in costs.items():
        found = traffic.as_run(Work("chunked", name, 0.0, 1e6), B, L, D)
        spared = 2 * 2 * B * L * D if name.endswith(" to") else 0  # bfloat16
        assert (found.flops, found.bytes) == (both * cost, 1e6 - spared)


@pytest.mark.slow
@pytest.mark.parametrize("block", [*traffic.BLOCKS, traffic.FORWARD])
def test_a_compiled_block_is_what_the_pages_say(block):
    """Counted again, its plan by the compiler and its own kernels."""
    segments = pytest.importorskip("diffussm.segments")
    default = inspect.signature(segments.chunked_triton).parameters["chunk"].default
    assert default == traffic.CHUNK
    backward = block != traffic.FORWARD
    length, batch = (traffic.CASES if backward else traffic.SAMPLED)[0]
    kind = block if backward else traffic.CHUNKS
    with traffic.pieces_of_a_gpu():
        _, now = traffic.both_ways(kind, batch, length, 1152, backward)
    row = recorded(block, "compiled", length)
    assert traffic.packed(now) == {k: row[k] for k in traffic.packed([])}, (
        "run `python -m benchmarks.traffic`"
    )


def test_bad_options_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        traffic.main(["--width", "20"])
    assert "multiple of 16" in capsys.readouterr().err
