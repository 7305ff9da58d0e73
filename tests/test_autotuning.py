"""Ch. "Chosen, not assumed": a convolution is chosen where it agreed and won."""

import os
import sys

import pytest
import torch
from interpreter import round_to_nearest

pytest.importorskip("triton", reason="Triton is not made for this system")
GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = (
        "1"  # read when the kernels are defined and when they are called
    )

from diffussm import autotuning, gpu_kernels, segments  # noqa: E402
from diffussm.autotuning import Measured, autotune_convolution  # noqa: E402
from diffussm.bidirectional import Convolution  # noqa: E402
from diffussm.fft_convolution import FFT  # noqa: E402

DEVICE = torch.device("cuda" if GPU else "cpu")


def close(fast, clear, tolerance):
    assert fast.shape == clear.shape
    error = (fast.double().cpu() - clear.cpu()).abs().max()
    assert error <= tolerance * clear.abs().max()


def tf32(x):
    """The nearest float32 with ten bits behind the point, as a tensor core reads it."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def to_nearest(monkeypatch):
    round_to_nearest(monkeypatch.setattr)


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="a GPU rounds by itself")
@pytest.mark.usefixtures("to_nearest")
def test_single_tf32_products_are_right_under_bf16_and_wrong_in_float32(monkeypatch):
    """The interpreter multiplies in float32; here products round as hardware does."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    exact = InterpreterBuilder.create_dot

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
    monkeypatch.setattr(
        autotuning,
        "_median_seconds",
        lambda sides, problem: {n: -len(n) for n in sides},
    )
    case = autotuning._Case(1024, 4, 2, DEVICE, torch.float32)
    single = autotuning._try_all(case)
    assert "tf32: errors" in single.reason and single.convolution.apply.keywords == {
        "precision": "tf32x3"
    }
    assert 1e-5 < single.errors["on the chip, tf32"]["output"] < 2e-3
    mixed = autotuning._try_all(case._replace(dtype=torch.bfloat16))
    assert (
        1e-5
        < mixed.errors["on the chip, tf32"]["grad_parameters"]
        < mixed.errors["FFT"]["output"]
    )
    single_wins = {"FFT": 3, "on the chip, tf32": 1, "on the chip, tf32x3": 2}
    monkeypatch.setattr(
        autotuning,
        "_median_seconds",
        lambda sides, problem: {n: single_wins[n] for n in sides},
    )
    assert autotuning._try_all(
        case._replace(dtype=torch.bfloat16)
    ).convolution.apply.keywords == {"precision": "tf32"}


@pytest.fixture(autouse=True)
def the_four_steps_alone(monkeypatch):
    """The interpreter takes seconds for each; a test of the chunks names its own."""
    monkeypatch.setattr(autotuning, "_CHUNKS", ())


def choose(**options):
    case = autotuning._Case(256, 2, 2, DEVICE, torch.float32)
    return autotuning._try_all(case._replace(**options))


def test_a_cpu_stays_with_the_fft():
    choice = autotune_convolution(1024, 8, 2, "cpu")
    assert choice == Measured(
        FFT, "FFT: the kernels on the chip are for a GPU, and this is a cpu"
    )


@pytest.mark.slow
def test_the_fastest_of_those_that_are_right_is_chosen(monkeypatch):
    times = {"FFT": 0.3, "on the chip, tf32": 0.2, "on the chip, tf32x3": 0.1}
    monkeypatch.setattr(
        autotuning,
        "_median_seconds",
        lambda sides, problem: {n: times[n] for n in sides},
    )
    choice = choose()
    assert (
        choice.convolution.apply.keywords == {"precision": "tf32x3"}
        and choice.seconds["FFT"] == 0.3
    )
    assert choice.reason.startswith("on the chip, tf32x3: FFT 300.00 ms")
    case = autotuning._Case(256, 2, 1, DEVICE, torch.float32)
    layer, u, _ = autotuning._problem(case)
    close(choice.convolution(u, layer.prepare(256)), layer(u).double(), 1e-5)
    times["FFT"] = 0.05
    assert choose().convolution is FFT


@pytest.mark.slow
@pytest.mark.usefixtures("to_nearest")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_is_wrong_is_never_chosen(monkeypatch, dtype):
    monkeypatch.setattr(
        autotuning,
        "_median_seconds",
        lambda sides, problem: {n: -len(n) for n in sides},
    )
    right = gpu_kernels.triton_convolve
    assert choose(dtype=dtype).convolution is not FFT
    for wrong in (
        lambda u, s, precision: 1.1 * right(u, s, precision),  # by a factor
        lambda u, s, precision: right(
            u, s.detach(), precision
        ),  # no gradient of the spectra
        lambda u, s, precision: right(u, s, precision) * torch.nan,
    ):
        monkeypatch.setattr(gpu_kernels, "triton_convolve", wrong)
        choice = choose(dtype=dtype)
        assert choice.convolution is FFT and choice.reason.startswith("FFT")


@pytest.mark.parametrize(
    "fault",
    [RuntimeError("out of resource: shared memory"), AssertionError(), OSError()],
)
def test_a_kernel_that_fails_stops_nothing(monkeypatch, fault):
    def fails(*_, **__):
        raise fault

    monkeypatch.setattr(gpu_kernels, "triton_convolve", fails)
    choice = choose()
    assert (
        choice.convolution is FFT and f"tf32x3: {type(fault).__name__}" in choice.reason
    )
    monkeypatch.setattr(
        autotuning, "_median_seconds", fails
    )  # as for lack of memory at full size
    assert choose().reason.startswith("FFT: trying the others failed")


@pytest.mark.slow
def test_chunks_are_chosen_at_any_length_where_they_agreed_and_won(monkeypatch):
    monkeypatch.setattr(autotuning, "_CHUNKS", ((16, 4),))
    monkeypatch.setattr(
        autotuning,
        "_median_seconds",
        lambda sides, problem: {n: -len(n) for n in sides},
    )
    choice = choose(length=20)
    assert choice.convolution.apply.keywords == {"chunk": 16, "warps": 4}
    assert choice.reason.startswith("chunks of 16, 4 warps: FFT")
    assert max(choice.errors["chunks of 16, 4 warps"].values()) < 1e-4
    right = segments.chunked_triton
    monkeypatch.setattr(
        segments, "chunked_triton", lambda u, m, **sizes: 1.1 * right(u, m)
    )
    choice = choose(length=20)
    assert choice.convolution is FFT and ", allowed " in choice.reason


@pytest.mark.slow
def test_the_layer_that_is_tried_is_that_of_the_model(monkeypatch):
    tried = []
    plain = autotuning._problem
    monkeypatch.setattr(autotuning, "_candidates", lambda length: {})

    def problem(*case, **how):
        tried.append(plain(*case, **how))
        return tried[-1]

    monkeypatch.setattr(autotuning, "_problem", problem)
    assert choose(d_state=16).convolution is FFT
    assert {layer.forward_kernel.C.shape[1] for layer, *_ in tried} == {8}


def test_a_sampler_asks_for_no_backward_pass(monkeypatch):
    def forward(u, prepared):
        assert not u.requires_grad and not prepared.requires_grad
        return FFT(u, prepared)

    case = autotuning._Case(64, 2, 2, torch.device("cpu"), torch.float32)
    problem = autotuning._problem(case, backward=False)
    assert autotuning._seconds(Convolution(forward, FFT.prepare), problem) > 0
    assert problem[2] is None


def test_without_triton_the_fft_stays(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffussm.gpu_kernels", None)
    choice = choose()
    assert choice.convolution is FFT and not choice.seconds
    assert "trying the others failed (ModuleNotFoundError" in choice.reason
