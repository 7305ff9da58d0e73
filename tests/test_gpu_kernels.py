"""Chapter 16: the convolution on the chip, in Triton's interpreter or on a GPU, and the choice of it."""

import copy
import functools
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not made for this system")
GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = (
        "1"  # read when the kernels are defined and when they are called
    )

from diffussm import gpu_kernels  # noqa: E402
from diffussm.bidirectional import BidirectionalSSM, kernel_spectra  # noqa: E402
from diffussm.fft_convolution import convolve  # noqa: E402
from diffussm.gpu_kernels import (  # noqa: E402
    LENGTHS,
    Choice,
    choose_convolution,
    dft_tables,
    factors,
    on_chip_convolve,
    relative_errors,
)
from diffussm.hourglass import HourglassBlock  # noqa: E402

DEVICE = torch.device("cuda" if GPU else "cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def kernels_of(D, L, dtype=torch.float32):
    return torch.randn(2, D, L, dtype=dtype) * torch.exp(-torch.arange(L) / 40)


def two_sums(u, kernels):
    """The definition, as matrices of shifts: u (B, L, D), kernels (2, D, L) -> (B, L, 2D)."""
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
    """In float64 by the definition: output to 1e-5, gradients of input and kernels to 1e-4."""
    B, D = (3, 2) if length <= 1024 else (1, 1)
    u, kernels, probe = (
        torch.randn(B, length, D),
        kernels_of(D, length),
        torch.randn(B, length, 2 * D),
    )
    fast = [tensor.to(DEVICE).requires_grad_() for tensor in (u, kernels)]
    y = on_chip_convolve(fast[0], kernel_spectra(*fast[1]))
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
    errors = relative_errors(on_chip_convolve, 256, 2, batch, DEVICE, torch.float32)
    assert (
        errors["output"] < 1e-5
        and errors["grad_u"] < 1e-4
        and errors["grad_spectra"] < 1e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    u, spectra = (
        torch.randn(2, 256, 2).to(DEVICE, dtype),
        kernel_spectra(*kernels_of(2, 256)).to(DEVICE),
    )
    y = on_chip_convolve(u, spectra)
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
    assert torch.equal(on_chip_convolve(turned, spectra), on_chip_convolve(u, spectra))


def test_second_derivative_is_refused_rather_than_wrong():
    u = torch.randn(1, 256, 1, device=DEVICE, requires_grad=True)
    y = on_chip_convolve(u, kernel_spectra(*kernels_of(1, 256)).to(DEVICE))
    (gradient,) = torch.autograd.grad(y.square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_layer_with_it_is_the_layer_without():
    layer = BidirectionalSSM(2, 4).to(DEVICE)
    other = copy.deepcopy(layer)
    other.convolution = functools.partial(on_chip_convolve, precision="ieee")
    u = torch.randn(2, 256, 2, device=DEVICE)
    results = []
    for side in (layer, other):
        y = side(u)
        results.append(
            [y, *torch.autograd.grad(y.square().sum(), list(side.parameters()))]
        )
    for clear, fast in zip(*results, strict=True):
        close(fast, clear.double(), 1e-4)


def test_compiled_block_with_it_is_one_graph():
    block = HourglassBlock(4, 4).to(DEVICE)
    torch.nn.init.normal_(block.w3.weight)
    block.ssm.convolution = on_chip_convolve
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
        ValueError, match="precision='float32': expected 'tf32', 'tf32x3' or 'ieee'"
    ):
        on_chip_convolve(u, spectra, "float32")
    with pytest.raises(TypeError, match="u has dtype torch.float64"):
        on_chip_convolve(u.double(), spectra)
    with pytest.raises(TypeError, match="spectra torch.complex128"):
        on_chip_convolve(u, spectra.to(torch.complex128))
    with pytest.raises(ValueError, match=r"expected \(B, L, D\) and \(2, D, L \+ 1\)"):
        on_chip_convolve(u[..., :1], spectra)
    for length in (100, 128, 8192):
        with pytest.raises(
            ValueError, match=f"L={length}: .*256, 512, 1024, 2048, 4096.*convolve"
        ):
            on_chip_convolve(
                torch.zeros(1, length, 1),
                torch.zeros(2, 1, length + 1, dtype=torch.complex64),
            )


COMPILE = """
import json, re, subprocess, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from diffussm import gpu_kernels

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may use, by the maker's tables
CASES = (90, 256, "tf32"), (90, 1024, "tf32x3"), (90, 4096, "tf32"), (80, 1024, "tf32")
for capability, length, precision in CASES:
    n1, n2 = gpu_kernels.factors(length)
    for kernel in (gpu_kernels._forward_kernel, gpu_kernels._grad_u_kernel, gpu_kernels._grad_h_kernel):
        constants = {"N1": n1, "N2": n2, "PRECISION": precision}
        kinds = dict.fromkeys(("u", "y", "grad", "grad_u"), "*bf16") | dict.fromkeys(constants, "constexpr")
        kinds |= dict.fromkeys(("B", "D", "SLICES"), "i32")
        signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        options = {"num_warps": gpu_kernels.warps(length)}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert compiled.metadata.shared <= SHARED[capability], (length, compiled.metadata.shared)
        assert re.search(r"mma.*tf32", compiled.asm["ptx"]), "no product on tensor cores"
        assert len(compiled.asm["cubin"]) > 1000
print("compiled")
"""


def test_kernels_compile_for_the_gpus_of_two_generations(tmp_path):
    """Down to machine code, which needs no GPU; into tensor-core products, within the memory of a program."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout.strip() == "compiled", done.stderr[
        -2000:
    ]


def tf32(x):
    """The nearest float32 with ten bits behind the point, as a tensor core reads it."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@pytest.mark.skipif(GPU, reason="a GPU rounds by itself")
def test_single_tf32_products_are_right_under_bf16_and_wrong_in_float32(monkeypatch):
    """The interpreter multiplies in float32 whatever it is told; here its products round as hardware does."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    exact, convert = InterpreterBuilder.create_dot, interpreter._convert_float

    def to_nearest(x, source, target, rounding_mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, rounding_mode)
        nearest = torch.from_numpy(
            x.astype("float32")
        ).bfloat16()  # the interpreter cuts it off
        return nearest.view(torch.int16).numpy().astype("uint16")

    def rounding(builder, a, b, d, input_precision, max_num_imprecise_acc):
        if "X3" not in str(input_precision).upper():
            a, b = (
                TensorHandle(
                    tf32(torch.from_numpy(x.data.astype("float32"))).numpy(), x.dtype
                )
                for x in (a, b)
            )
        return exact(builder, a, b, d, input_precision, max_num_imprecise_acc)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", rounding)
    monkeypatch.setattr(interpreter, "_convert_float", to_nearest)
    monkeypatch.setattr(
        gpu_kernels,
        "_median_seconds",
        lambda sides, problem: {n: -len(n) for n in sides},
    )
    single = gpu_kernels._try_all(1024, 4, 2, DEVICE, torch.float32)
    assert "tf32: errors" in single.reason and single.convolution.keywords == {
        "precision": "tf32x3"
    }
    assert 1e-5 < single.errors["on the chip, tf32"]["output"] < 2e-3
    mixed = gpu_kernels._try_all(1024, 4, 2, DEVICE, torch.bfloat16)
    assert (
        1e-5
        < mixed.errors["on the chip, tf32"]["grad_spectra"]
        < mixed.errors["FFT"]["output"]
    )
    single_wins = {"FFT": 3, "on the chip, tf32": 1, "on the chip, tf32x3": 2}
    monkeypatch.setattr(
        gpu_kernels,
        "_median_seconds",
        lambda sides, problem: {n: single_wins[n] for n in sides},
    )
    assert gpu_kernels._try_all(
        1024, 4, 2, DEVICE, torch.bfloat16
    ).convolution.keywords == {"precision": "tf32"}


def choose(**options):
    return gpu_kernels._try_all(
        **{
            "length": 256,
            "d_model": 2,
            "batch": 2,
            "device": DEVICE,
            "dtype": torch.float32,
        }
        | options
    )


def test_a_cpu_stays_with_the_fft():
    choice = choose_convolution(1024, 8, 2, "cpu")
    assert choice == Choice(
        convolve, "FFT: the kernels on the chip are for a GPU, and this is a cpu"
    )


def test_the_fastest_of_those_that_are_right_is_chosen(monkeypatch):
    times = {"FFT": 0.3, "on the chip, tf32": 0.2, "on the chip, tf32x3": 0.1}
    monkeypatch.setattr(
        gpu_kernels,
        "_median_seconds",
        lambda sides, problem: {n: times[n] for n in sides},
    )
    choice = choose()
    assert (
        choice.convolution.keywords == {"precision": "tf32x3"}
        and choice.seconds["FFT"] == 0.3
    )
    assert choice.reason.startswith("on the chip, tf32x3: FFT 300.00 ms")
    close(
        choice.convolution(*gpu_kernels._problem(256, 2, 1, DEVICE, torch.float32)[:2]),
        convolve(*gpu_kernels._problem(256, 2, 1, DEVICE, torch.float32)[:2]).double(),
        1e-5,
    )
    times["FFT"] = 0.05
    assert choose().convolution is convolve


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_is_wrong_is_never_chosen(monkeypatch, dtype):
    monkeypatch.setattr(
        gpu_kernels,
        "_median_seconds",
        lambda sides, problem: {n: -len(n) for n in sides},
    )
    right = gpu_kernels.on_chip_convolve
    assert choose(dtype=dtype).convolution is not convolve
    for wrong in (
        lambda u, s, precision: 1.1 * right(u, s, precision),  # by a factor
        lambda u, s, precision: right(
            u, s.detach(), precision
        ),  # no gradient of the spectra
        lambda u, s, precision: right(u, s, precision) * torch.nan,
    ):
        monkeypatch.setattr(gpu_kernels, "on_chip_convolve", wrong)
        choice = choose(dtype=dtype)
        assert choice.convolution is convolve and choice.reason.startswith("FFT")


@pytest.mark.parametrize(
    "fault",
    [RuntimeError("out of resource: shared memory"), AssertionError(), OSError()],
)
def test_a_kernel_that_fails_stops_nothing(monkeypatch, fault):
    def fails(*_, **__):
        raise fault

    monkeypatch.setattr(gpu_kernels, "on_chip_convolve", fails)
    choice = choose()
    assert (
        choice.convolution is convolve
        and f"tf32x3: {type(fault).__name__}" in choice.reason
    )
    monkeypatch.setattr(
        gpu_kernels, "_median_seconds", fails
    )  # as for lack of memory at full size
    assert choose().reason.startswith("FFT: trying the others failed")


def test_other_lengths_stay_with_the_fft():
    assert (
        choose(length=100).reason
        == "FFT: L = 100 is none of 256, 512, 1024, 2048, 4096"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "tf32x3", "ieee"])
@pytest.mark.parametrize("length", LENGTHS)
def test_on_a_gpu_errors_are_those_of_the_precision(length, precision):
    convolution = functools.partial(on_chip_convolve, precision=precision)
    errors = relative_errors(
        convolution, length, 64, 4, torch.device("cuda"), torch.float32
    )
    assert max(errors.values()) < (5e-3 if precision == "tf32" else 1e-5)
