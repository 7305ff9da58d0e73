"""Ch. "GPU kernels": the convolution in Triton's interpreter or on a GPU."""

import copy
import functools
import json
import os

import pytest
import torch
from machine_code import CHIPS, compile_again
from operations import Operations

from benchmarks import common

pytest.importorskip("triton", reason="Triton is not made for this system")
GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = (
        "1"  # read when the kernels are defined and when they are called
    )

from diffussm import gpu_kernels  # noqa: E402
from diffussm.autotuning import relative_errors  # noqa: E402
from diffussm.bidirectional import BidirectionalSSM, kernel_spectra  # noqa: E402
from diffussm.fft_convolution import convolve  # noqa: E402
from diffussm.gpu_kernels import LENGTHS, dft_tables, factors, triton_convolve  # noqa: E402
from diffussm.hourglass import HourglassBlock  # noqa: E402

DEVICE = torch.device("cuda" if GPU else "cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def kernels_of(D, L, dtype=torch.float32):
    return torch.randn(2, D, L, dtype=dtype) * torch.exp(-torch.arange(L) / 40)


def two_sums(u, kernels):
    """As matrices of shifts: u (B, L, D), kernels (2, D, L) -> (B, L, 2D)."""
    L = u.shape[1]
    i, j = torch.arange(L)[:, None], torch.arange(L)[None, :]
    past = torch.where(i >= j, kernels[0][:, (i - j).clamp(min=0)], 0)
    future = torch.where(j >= i, kernels[1][:, (j - i).clamp(min=0)], 0)
    return torch.cat(
        [torch.einsum("dij,bjd->bid", matrix, u) for matrix in (past, future)], dim=2
    )


def close(fast, clear, tolerance):
    assert fast.shape == clear.shape
    assert (
        fast.double().cpu() - clear.cpu()
    ).abs().max() <= tolerance * clear.abs().max()


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_two_sums_and_their_gradients(length):
    """By the definition in float64: output to 1e-5, gradients to 1e-4."""
    B, D = (3, 2) if length <= 1024 else (1, 1)
    u, kernels, probe = (
        torch.randn(B, length, D),
        kernels_of(D, length),
        torch.randn(B, length, 2 * D),
    )
    fast = [tensor.to(DEVICE).requires_grad_() for tensor in (u, kernels)]
    y = triton_convolve(fast[0], kernel_spectra(*fast[1]))
    clear = [tensor.double().requires_grad_() for tensor in (u, kernels)]
    expected = two_sums(*clear)
    close(y, expected, 1e-5)
    gradients = torch.autograd.grad(y, fast, probe.to(DEVICE))
    for ours, theirs in zip(
        gradients, torch.autograd.grad(expected, clear, probe.double()), strict=True
    ):
        close(ours, theirs, 1e-4)


@pytest.mark.parametrize(
    "batch", [1, 2, 11]
)  # fewer than SLICES, and no multiple of it
def test_every_image_of_a_batch_is_in_the_sum(batch):
    errors = relative_errors(triton_convolve, 256, 2, batch, DEVICE, torch.float32)
    assert (
        errors["output"] < 1e-5
        and errors["grad_u"] < 1e-4
        and errors["grad_parameters"] < 1e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    u, spectra = (
        torch.randn(2, 256, 2).to(DEVICE, dtype),
        kernel_spectra(*kernels_of(2, 256)).to(DEVICE),
    )
    y = triton_convolve(u, spectra)
    assert y.dtype == dtype
    exact = convolve(u.double(), spectra.to(torch.complex128))
    bits = (
        1 if dtype == torch.bfloat16 and not GPU else 0
    )  # the interpreter cuts bfloat16 off
    allowed = 1.01 * torch.finfo(dtype).eps / 2 * 2**bits * exact.abs()
    assert ((y.double() - exact).abs() <= allowed + 1e-5 * exact.abs().max()).all()


def test_input_in_any_memory_order():
    u, spectra = (
        torch.randn(2, 256, 3, device=DEVICE),
        kernel_spectra(*kernels_of(3, 256)).to(DEVICE),
    )
    turned = u.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(triton_convolve(turned, spectra), triton_convolve(u, spectra))


def test_second_derivative_is_refused_rather_than_wrong():
    u = torch.randn(1, 256, 1, device=DEVICE, requires_grad=True)
    y = triton_convolve(u, kernel_spectra(*kernels_of(1, 256)).to(DEVICE))
    (gradient,) = torch.autograd.grad(y.square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_layer_with_it_is_the_layer_without():
    layer = BidirectionalSSM(2, 4).to(DEVICE)
    other = copy.deepcopy(layer)
    other.convolution = functools.partial(triton_convolve, precision="ieee")
    u = torch.randn(2, 256, 2, device=DEVICE)
    results = []
    for side in (layer, other):
        y = side(u)
        results.append(
            [y, *torch.autograd.grad(y.square().sum(), list(side.parameters()))]
        )
    for clear, fast in zip(*results, strict=True):
        close(fast, clear.double(), 1e-4)


@pytest.mark.slow
def test_compiled_block_with_it_is_one_graph():
    block = HourglassBlock(4, 4).to(DEVICE)
    torch.nn.init.normal_(block.w3.weight)
    block.ssm.convolution = triton_convolve
    x, c = torch.randn(1, 128, 4, device=DEVICE), torch.randn(1, 4, device=DEVICE)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for side in (block, compiled):
        y = side(x, c)
        results.append(
            [y, *torch.autograd.grad(y.square().sum(), list(block.parameters()))]
        )
    for clear, fast in zip(*results, strict=True):
        close(fast, clear.double(), 1e-5)
    torch._dynamo.reset()


def test_tables_are_the_factors_of_a_transform():
    for length in LENGTHS:
        n1, n2 = factors(length)
        assert (
            n1 * n2 == 2 * length and min(n1 // 2, n2) >= 16
        )  # the least that a tensor core multiplies
        first, twiddle, second = (
            torch.complex(*t) for t in dft_tables(length, torch.device("cpu"))
        )
        u = torch.randn(length)
        tile = (first @ u.view(n1 // 2, n2).to(first.dtype) * twiddle) @ second
        expected = torch.fft.fft(u.double(), n=2 * length)
        assert (tile.T.flatten() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_what_does_not_fit_is_refused():
    u, spectra = (
        torch.zeros(1, 256, 2),
        kernel_spectra(torch.zeros(2, 256), torch.zeros(2, 256)),
    )
    with pytest.raises(
        ValueError, match="precision='float32': expected one of tf32, tf32x3, ieee"
    ):
        triton_convolve(u, spectra, "float32")
    with pytest.raises(TypeError, match="u is torch.float64: .*float16.*convolve"):
        triton_convolve(u.double(), spectra)
    with pytest.raises(TypeError, match="spectra is torch.complex128: .*complex64"):
        triton_convolve(u, spectra.to(torch.complex128))
    with pytest.raises(ValueError, match=r"expected \(2, D=1, F=257\)"):
        triton_convolve(u[..., :1], spectra)
    for length in (100, 128, 8192):
        with pytest.raises(
            ValueError, match=f"L={length}: .*256, 512, 1024, 2048, 4096.*convolve"
        ):
            triton_convolve(
                torch.zeros(1, length, 1),
                torch.zeros(2, 1, length + 1, dtype=torch.complex64),
            )


RECORD = json.loads((common.RESULTS / "compiled.json").read_text())["rows"]
SMALL = {"sm_80": 163, "sm_90a": 227}  # kB that a program may use, by the maker


@pytest.mark.slow
@pytest.mark.parametrize(
    "length, precision",
    [(256, "tf32"), (256, "tf32x3"), (1024, "tf32"), (1024, "tf32x3"), (4096, "tf32")],
)
def test_kernels_compile_for_the_gpus_of_two_generations(tmp_path, length, precision):
    """Down to machine code: no more than is recorded."""
    rows = [row for row in RECORD if row["case"][1:] == [precision, length]]
    assert len(rows) == 3
    compile_again(rows, "of_four_steps", tmp_path)


def test_four_steps_are_on_tensor_cores_and_start_where_they_fit():
    """Of every length, but for the longest in three products."""
    rows = [row for row in RECORD if row["what"].startswith("four steps")]
    assert {row["case"][2] for row in rows} == set(LENGTHS)
    for row in rows:
        assert all(row[f"tensor cores, {chip}"] >= 72 for chip in CHIPS)
        if row["case"][1:] != ["tf32x3", 4096]:
            sizes = {chip: row[f"shared memory, {chip}"] / 1024 for chip in CHIPS}
            assert all(sizes[chip] <= most for chip, most in SMALL.items()), sizes


def test_conjugates_inside_the_operators_are_computed_not_marked():
    """Compiled for an H200 by PyTorch 2.11, outputs were off by 65 percent."""
    spectra = torch.randn(2, 3, 257, dtype=torch.complex64)
    with Operations() as seen:
        gpu_kernels._tiles(spectra)
        gpu_kernels._taken_apart(torch.randn(3, 512, dtype=torch.complex64))
    assert "flip.default" in seen.names and "_conj.default" not in seen.names


@pytest.mark.gpu
def test_compiled_on_a_gpu_it_computes_the_same():
    u = torch.randn(2, 256, 32, device="cuda")
    spectra = kernel_spectra(*kernels_of(32, 256).cuda())
    compiled = torch.compile(triton_convolve, dynamic=False)
    torch.testing.assert_close(compiled(u, spectra), triton_convolve(u, spectra))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "tf32x3", "ieee"])
@pytest.mark.parametrize("length", LENGTHS)
def test_on_a_gpu_errors_are_those_of_the_precision(length, precision):
    convolution = functools.partial(triton_convolve, precision=precision)
    errors = relative_errors(
        convolution, length, 64, 4, torch.device("cuda"), torch.float32
    )
    if precision == "tf32":
        assert max(errors.values()) < 5e-3, errors
        return
    assert max(errors["output"], errors["grad_u"]) < 1e-5, errors
    # that of the worst parameter, of which the FFT itself has 1.2e-5 in float32
    assert errors["grad_parameters"] < 1e-4, errors
