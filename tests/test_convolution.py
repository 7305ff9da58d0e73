"""Ch. "The convolution": the kernel and the FFT convolution, against loops."""

import copy
import math

import pytest
import torch
from clear_sums import LENGTHS, loop_kernel, random_system

from diffussm.convolution import S4DKernel, fft_conv, vandermonde
from diffussm.state_space import discretize_bilinear, discretize_zoh, scan

CHOICES = [
    (init, rule) for init in ("lin", "inv", "legs") for rule in ("zoh", "bilinear")
]


def by_recurrence(kernel, u):
    A = torch.complex(-torch.exp(kernel.log_A_real), kernel.A_imag)
    rule = {"zoh": discretize_zoh, "bilinear": discretize_bilinear}[
        kernel.discretization
    ]
    dA, dB = rule(A, 1.0, torch.exp(kernel.log_dt)[:, None])
    return scan(dA, dB, torch.view_as_complex(kernel.C), u)


@pytest.mark.parametrize(("init", "rule"), CHOICES)
def test_convolution_equals_recurrence(init, rule):
    kernel = S4DKernel(4, 16, init=init, discretization=rule).double()
    u = torch.randn(2, 4, 200, dtype=torch.float64)
    convolution, recurrence = fft_conv(u, kernel(200)), by_recurrence(kernel, u)
    torch.testing.assert_close(convolution, recurrence, rtol=0, atol=1e-10)
    probe = torch.randn_like(u)
    gradients = [
        torch.autograd.grad((y * probe).sum(), list(kernel.parameters()))
        for y in (convolution, recurrence)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("length", LENGTHS)
def test_kernels_equal_powers_by_repeated_multiplication(length):
    log_dA, weights = random_system()
    torch.testing.assert_close(
        vandermonde(log_dA, weights, length),
        loop_kernel(log_dA, weights, length),
        rtol=1e-11,
        atol=1e-11,
    )


def test_fft_convolution_equals_the_direct_sum():
    for length in (1, 2, 7, 64, 101):
        u, k = (
            torch.randn(2, 3, length, dtype=torch.float64),
            torch.randn(3, length, dtype=torch.float64),
        )
        expected = torch.zeros_like(u)
        for i in range(length):
            for lag in range(i + 1):
                expected[..., i] += k[:, lag] * u[..., i - lag]
        torch.testing.assert_close(fft_conv(u, k), expected, rtol=0, atol=1e-10)


def test_nothing_wraps_around():
    u, k = (
        torch.zeros(1, 32, dtype=torch.float64),
        torch.ones(1, 32, dtype=torch.float64),
    )
    u[0, -1] = 1
    y = fft_conv(u, k)
    assert y[0, :-1].abs().max() < 1e-14 and float(y[0, -1]) == pytest.approx(1)


def test_float32_kernel_is_within_5e_6_of_float64_at_4096():
    torch.manual_seed(0)
    kernel = S4DKernel(256, 64)
    exact = copy.deepcopy(kernel).double()(4096)
    result = kernel(4096)
    assert result.dtype == torch.float32 and exact.dtype == torch.float64
    assert (result - exact).abs().max() < 5e-6 * exact.abs().max()


def test_bilinear_logarithm_keeps_its_digits_in_float32():
    kernel = S4DKernel(64, 32, discretization="bilinear", dt_min=1e-3, dt_max=1e-3)
    single = kernel.discrete()[0].detach()
    exact = copy.deepcopy(kernel).double().discrete()[0].detach()
    # log(dA) would lose four digits
    assert ((single.real - exact.real).abs() / exact.real.abs()).max() < 1e-6
    A = torch.tensor([-0.5 + 3j, -40 + 1j, -40 + 0j], dtype=torch.complex128)
    dA = discretize_bilinear(A, 1.0, 0.1)[0]
    wide = S4DKernel(1, 6, discretization="bilinear", dt_min=0.1, dt_max=0.1).double()
    with torch.no_grad():
        wide.log_dt.fill_(math.log(0.1))
        wide.log_A_real.copy_(torch.tensor([[0.5, 40.0, 40.0]]).double().log())
        wide.A_imag.copy_(torch.tensor([[3.0, 1.0, 0.0]]))
    torch.testing.assert_close(
        torch.exp(wide.discrete()[0][0]), dA, rtol=1e-12, atol=1e-12
    )


def test_a_state_that_the_bilinear_rule_forgets_at_once_gives_no_nan():
    kernel = S4DKernel(1, 2, discretization="bilinear")
    with torch.no_grad():
        kernel.log_dt.fill_(0.0)
        kernel.log_A_real.fill_(math.log(2.0))  # dt A = -2: dA = 0
        kernel.A_imag.zero_()
    k = kernel(8)
    k.sum().backward()
    assert torch.isfinite(k).all() and all(
        torch.isfinite(p.grad).all() for p in kernel.parameters()
    )
    assert k[0, 1:].abs().max() < 1e-3 * k[0, 0].abs()


def test_autocast_changes_neither_kernel_nor_gradients():
    torch.manual_seed(0)
    kernel = S4DKernel(8, 16)
    u = torch.randn(2, 8, 512)

    def run():
        kernel.zero_grad()
        k = kernel(512)
        y = fft_conv(u, k)
        y.square().sum().backward()  # inside autocast too, as careless code does it
        return k.detach(), y.detach(), [p.grad.clone() for p in kernel.parameters()]

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run()
    assert cast[0].dtype == torch.float32
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64]
)
def test_output_has_the_dtype_of_the_input_and_float32_inside(dtype):
    u = torch.randn(2, 3, 300).to(dtype)
    k = torch.randn(3, 300)
    y = fft_conv(u, k)
    assert y.dtype == dtype
    exact = fft_conv(u.double(), k.double())
    torch.testing.assert_close(
        y, exact.to(dtype), rtol=torch.finfo(dtype).eps * 2, atol=5e-5
    )


def test_half_precision_module_still_computes_in_float32():
    kernel = S4DKernel(4, 8).bfloat16()
    assert kernel(64).dtype == torch.float32 and torch.isfinite(kernel(64)).all()


def swapped(kernel):
    """Converted torch's other way: parameters exchanged instead of their data."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return kernel.bfloat16()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


CONVERSIONS = {
    "half": lambda kernel: kernel.half(),
    "bfloat16": lambda kernel: kernel.bfloat16(),
    "to dtype": lambda kernel: kernel.to(torch.bfloat16),
    "to device and dtype": lambda kernel: kernel.to("cpu", torch.float16),
    "within a model": lambda kernel: torch.nn.Sequential(
        torch.nn.ModuleList([kernel])
    ).half()[0][0],
    "parameters exchanged": swapped,
    "to float8 and back": lambda kernel: kernel.to(torch.float8_e4m3fn).float(),
}


@pytest.mark.parametrize("conversion", CONVERSIONS.values(), ids=CONVERSIONS)
def test_half_precision_leaves_the_parameters_in_float32(conversion):
    kernel = S4DKernel(4, 8)
    kernel(10).sum().backward()
    before = {name: p.detach().clone() for name, p in kernel.named_parameters()}
    converted = conversion(kernel)
    assert converted is kernel and all(
        isinstance(p, torch.nn.Parameter) for p in kernel.parameters()
    )
    for name, parameter in kernel.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(
            parameter, before[name]
        ), name
        assert parameter.grad is None or parameter.grad.dtype == torch.float32


def test_conversions_that_lose_nothing_are_done():
    kernel = S4DKernel(4, 8)
    assert {p.dtype for p in kernel.double().parameters()} == {torch.float64}
    assert {p.dtype for p in copy.deepcopy(kernel).float().parameters()} == {
        torch.float32
    }
    assert {p.dtype for p in copy.deepcopy(kernel).half().parameters()} == {
        torch.float32
    }
    assert {p.device.type for p in kernel.to("meta", torch.bfloat16).parameters()} == {
        "meta"
    }
    assert {p.dtype for p in kernel.to_empty(device="cpu").parameters()} == {
        torch.float32
    }


def test_a_kernel_made_where_half_precision_is_the_default_is_kept_in_float32():
    torch.set_default_dtype(torch.bfloat16)
    try:
        kernel = S4DKernel(4, 8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in kernel.parameters()} == {torch.float32}


def test_an_empty_batch_gives_an_empty_result():
    u, k = (
        torch.zeros(0, 3, 8, requires_grad=True),
        torch.ones(3, 8, requires_grad=True),
    )
    y = fft_conv(u, k)
    y.sum().backward()
    assert y.shape == u.grad.shape == (0, 3, 8) and y.dtype == torch.float32
    assert torch.equal(k.grad, torch.zeros(3, 8))
    assert fft_conv(u.bfloat16(), k).dtype == torch.bfloat16


def test_state_dict_holds_four_real_tensors_of_the_stated_shapes():
    kernel = S4DKernel(6, 8)
    shapes = {name: tuple(tensor.shape) for name, tensor in kernel.state_dict().items()}
    assert shapes == {
        "log_dt": (6,),
        "log_A_real": (6, 4),
        "A_imag": (6, 4),
        "C": (6, 4, 2),
    }
    assert all(tensor.dtype == torch.float32 for tensor in kernel.state_dict().values())
    other = S4DKernel(6, 8)
    other.load_state_dict(kernel.state_dict())
    torch.testing.assert_close(other(50), kernel(50), rtol=0, atol=0)


def test_steps_start_log_uniform_and_every_channel_is_stable_whatever_is_learned():
    torch.manual_seed(0)
    kernel = S4DKernel(4000, 2, dt_min=1e-3, dt_max=1e-1)
    exponent = (kernel.log_dt.detach() - math.log(1e-3)) / math.log(100)
    assert exponent.min() >= 0 and exponent.max() <= 1
    for q in (0.25, 0.5, 0.75):
        assert exponent.quantile(q) == pytest.approx(q, abs=0.03)
    assert float(kernel.C.detach().var()) == pytest.approx(
        0.5, abs=0.03
    )  # complex variance 1
    with torch.no_grad():
        kernel.log_A_real.normal_(std=5)
    assert (kernel.discrete()[0].real < 0).all()


def test_every_parameter_is_reached():
    kernel = S4DKernel(3, 8)
    kernel(100).square().sum().backward()
    for name, parameter in kernel.named_parameters():
        assert (
            (parameter.grad != 0).flatten(1 if parameter.ndim > 1 else 0).any(-1).all()
        ), name


def test_kernel_on_the_meta_device_has_the_right_shape():
    with torch.device("meta"):
        kernel = S4DKernel(5, 64)
    assert kernel(1024).shape == (5, 1024) and kernel(1024).device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 0}, "d_model=0: expected an integer of at least 1"),
        ({"d_model": 4, "d_state": 7}, "n_state=7.*even"),
        (
            {"d_model": 4, "init": "hippo"},
            r"init='hippo': expected one of lin, inv, legs",
        ),
        (
            {"d_model": 4, "discretization": "euler"},
            r"discretization='euler': expected one of zoh, bilinear",
        ),
        ({"d_model": 4, "dt_min": 0.0}, "dt_min=0.0: expected a finite number above 0"),
        (
            {"d_model": 4, "dt_min": 0.2, "dt_max": 0.1},
            "dt_max=0.1: expected a finite number of at least 0.2",
        ),
        (
            {"d_model": 4, "dt_max": float("nan")},
            "dt_max=nan: expected a finite number",
        ),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        S4DKernel(**arguments)


def test_impossible_shapes_are_refused():
    kernel = S4DKernel(4, 8)
    for length in (0, -1, 2.0, True):
        refused = pytest.raises((TypeError, ValueError), match=f"length={length!r}: ")
        with refused:
            kernel(length)
    with pytest.raises(
        ValueError, match=r"\(4, 10\).*\(4, 12\).*kernel\(u.shape\[-1\]\)"
    ):
        fft_conv(torch.ones(4, 10), torch.ones(4, 12))
    with pytest.raises(
        ValueError, match=r"\(2, 10, 4\)"
    ):  # (B, L, D) instead of (B, D, L)
        fft_conv(torch.ones(2, 10, 4), torch.ones(4, 10))
    with pytest.raises(TypeError, match="u is torch.int64"):
        fft_conv(torch.ones(4, 10, dtype=torch.int64), torch.ones(4, 10))
    with pytest.raises(TypeError, match="k is torch.complex64"):
        fft_conv(torch.ones(4, 10), torch.ones(4, 10, dtype=torch.complex64))
    with pytest.raises(
        ValueError, match=r"weights has shape \(3, 5\): expected \(D=3, N=4\)"
    ):
        vandermonde(
            torch.ones(3, 4, dtype=torch.cfloat),
            torch.ones(3, 5, dtype=torch.cfloat),
            8,
        )
