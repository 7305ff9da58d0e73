"""Chapter 3: two directions, one transform, an adjoint by hand."""

import os
import subprocess
import sys

import pytest
import torch

from diffussm import bidirectional
from diffussm.bidirectional import (
    BidirectionalSSM,
    bidirectional_conv,
    convolve,
    kernel_spectra,
)
from diffussm.convolution import fft_conv


def two_sums(u, k_forward, k_backward):
    """The definition: y_i = sum_l k_l u_{i-l}, and y_i = sum_l k_l u_{i+l}, as matrices of shifts."""
    L = u.shape[1]
    i, j = torch.arange(L)[:, None], torch.arange(L)[None, :]
    past = torch.where(i >= j, k_forward[:, (i - j).clamp(min=0)], 0)
    future = torch.where(j >= i, k_backward[:, (j - i).clamp(min=0)], 0)
    return torch.cat(
        [torch.einsum("dij,bjd->bid", matrix, u) for matrix in (past, future)], dim=2
    )


def random_inputs(B, D, L, dtype=torch.float64):
    return [
        torch.randn(shape, dtype=dtype, requires_grad=True)
        for shape in ((B, L, D), (D, L), (D, L))
    ]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("length", [1, 2, 7, 64, 101])
def test_equals_the_two_sums_and_their_gradients(length):
    inputs = random_inputs(3, 2, length)
    fast, slow = bidirectional_conv(*inputs), two_sums(*inputs)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-11)
    probe = torch.randn_like(slow)
    for a, b in zip(
        torch.autograd.grad(fast, inputs, probe),
        torch.autograd.grad(slow, inputs, probe),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_equals_two_causal_convolutions_with_a_flip():
    u, k_forward, k_backward = random_inputs(2, 3, 50)
    x = u.transpose(1, 2)
    flipped = fft_conv(x.flip(-1), k_backward).flip(-1)
    expected = torch.cat([fft_conv(x, k_forward), flipped], dim=1).transpose(1, 2)
    torch.testing.assert_close(
        bidirectional_conv(u, k_forward, k_backward), expected, rtol=0, atol=1e-12
    )


def test_pieces_of_channels_give_what_one_piece_gives(monkeypatch):
    inputs = random_inputs(2, 37, 20)  # 37 channels: two pieces of 16 and one of 5
    whole = bidirectional_conv(*inputs)
    probe = torch.randn_like(whole)
    expected = [whole, *torch.autograd.grad(whole, inputs, probe)]
    monkeypatch.setattr(bidirectional, "PIECE", 1)
    assert [(c.start, c.stop) for c in bidirectional._pieces(inputs[0])] == [
        (0, 16),
        (16, 32),
        (32, 48),
    ]
    parts = bidirectional_conv(*inputs)
    for a, b in zip(
        [parts, *torch.autograd.grad(parts, inputs, probe)], expected, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_input_in_any_memory_order():
    u, k_forward, k_backward = random_inputs(2, 3, 20)
    turned = (
        u.detach().transpose(1, 2).contiguous().transpose(1, 2)
    )  # (B, L, D), positions last in memory
    assert not turned.is_contiguous()
    assert torch.equal(
        bidirectional_conv(turned, k_forward, k_backward),
        bidirectional_conv(u, k_forward, k_backward),
    )


def test_gradient_agrees_with_finite_differences():
    assert torch.autograd.gradcheck(bidirectional_conv, random_inputs(2, 2, 9))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_arguments_do_not_need_the_others(needed):
    inputs = random_inputs(2, 2, 8)
    everything = torch.autograd.grad(bidirectional_conv(*inputs).square().sum(), inputs)
    some = [
        tensor.detach().requires_grad_(i in needed) for i, tensor in enumerate(inputs)
    ]
    grads = torch.autograd.grad(
        bidirectional_conv(*some).square().sum(), [some[i] for i in needed]
    )
    for i, gradient in zip(needed, grads, strict=True):
        torch.testing.assert_close(gradient, everything[i])


def test_second_derivative_is_refused_rather_than_wrong():
    inputs = random_inputs(1, 2, 8)
    (gradient,) = torch.autograd.grad(
        bidirectional_conv(*inputs).square().sum(), inputs[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_future_reaches_the_past_and_past_the_future():
    D, L = 4, 40
    layer = BidirectionalSSM(D, 8).double()
    u = torch.randn(1, L, D, dtype=torch.float64, requires_grad=True)
    y = layer(u)
    for i in (0, 13, L - 1):
        for half, seen in ((y[0, i, :D], slice(0, i + 1)), (y[0, i, D:], slice(i, L))):
            (gradient,) = torch.autograd.grad(half.sum(), u, retain_graph=True)
            reach = gradient[0].abs().amax(1)
            mask = torch.zeros(L, dtype=torch.bool)
            mask[seen] = True
            assert (
                reach[mask].min() > 1e-8
            )  # position i itself is among them: lag 0 is in both directions
            assert mask.all() or reach[~mask].max() < 1e-12


def test_flipping_the_input_and_swapping_the_models_flips_the_output():
    D = 4
    layer, swapped = (BidirectionalSSM(D, 8).double() for _ in range(2))
    swapped.forward_kernel.load_state_dict(layer.backward_kernel.state_dict())
    swapped.backward_kernel.load_state_dict(layer.forward_kernel.state_dict())
    swapped.skip.data = layer.skip.data.roll(D)
    u = torch.randn(2, 33, D, dtype=torch.float64)
    torch.testing.assert_close(
        swapped(u.flip(1)).flip(1).roll(D, dims=2), layer(u), rtol=0, atol=1e-12
    )


def test_skip_adds_the_input_times_a_number_per_channel():
    layer = BidirectionalSSM(3, 4).double()
    u = torch.randn(2, 20, 3, dtype=torch.float64)
    with_skip = layer(u)
    skip = layer.skip.detach().clone()
    with torch.no_grad():
        layer.skip.zero_()
    torch.testing.assert_close(
        with_skip, layer(u) + skip * torch.cat([u, u], dim=2), rtol=0, atol=1e-11
    )


def test_known_spectra_give_the_same_output_and_the_convolution_can_be_replaced():
    layer = BidirectionalSSM(3, 4)
    u = torch.randn(2, 20, 3)
    spectra = layer.spectra(20)
    assert spectra.shape == (2, 3, 21) and spectra.dtype == torch.complex64
    assert torch.equal(layer(u, spectra), layer(u))
    layer.convolution = lambda u, spectra: 2 * convolve(u, spectra)
    assert torch.equal(layer(u, spectra), 2 * convolve(u, spectra))


def test_directions_have_parameters_of_their_own():
    layer = BidirectionalSSM(3, 4)
    names = {name for name, _ in layer.named_parameters()}
    kernels = {"log_dt", "log_A_real", "A_imag", "C"}
    assert names == {"skip"} | {
        f"{d}_kernel.{k}" for d in ("forward", "backward") for k in kernels
    }
    assert not torch.equal(layer.forward_kernel.C, layer.backward_kernel.C)
    assert layer.skip.shape == (6,)


def test_float32_agrees_with_float64_at_full_length():
    layer = BidirectionalSSM(8, 64)
    u = torch.randn(1, 4096, 8)
    single = layer(u)
    double = layer.double()(u.double())
    assert (single - double).abs().max() < 1e-5 * double.abs().max()


def test_autocast_changes_nothing_inside():
    layer = BidirectionalSSM(4, 8)
    u = torch.randn(2, 30, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = layer(u)
        under.float().sum().backward()
    assert under.dtype == torch.bfloat16
    torch.testing.assert_close(under, layer(u.float()).bfloat16(), rtol=0, atol=0)
    assert all(
        torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32
        for p in layer.parameters()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_in_half_precision_is_within_one_percent_of_float32(dtype):
    layer = BidirectionalSSM(32, 64)
    u = torch.randn(2, 1024, 32)
    with torch.no_grad():
        full, half = layer(u), layer.to(dtype)(u.to(dtype))
    assert half.dtype == dtype
    assert (half - full).norm() < 0.01 * full.norm()


def test_an_empty_batch_gives_an_empty_result_and_no_gradient():
    layer = BidirectionalSSM(4, 8)
    u = torch.zeros(0, 10, 4, requires_grad=True)
    y = layer(u)
    y.sum().backward()
    assert y.shape == (0, 10, 8) and u.grad.shape == u.shape
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters())


COPIES = """
import importlib, importlib.util, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")  # those of other libraries, which -X dev would show
import torch
from diffusers import DiffusionPipeline
from diffussm import DiffuSSM, bidirectional, gpu_kernels
from diffussm.pipeline import DiffuSSMPipeline, ancestral_scheduler, self_contained_code

names = ["convolve", "convolve_backward", "on_chip", "on_chip_backward"]
ours = [getattr(gpu_kernels if "chip" in name else bidirectional, f"_{name}") for name in names]
handles = [operator._opoverload for operator in ours]

def same(module, u, spectra):
    results = []
    for convolve in (first, module.convolve):
        inputs = [tensor.detach().requires_grad_() for tensor in (u, spectra)]
        y = convolve(*inputs)
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    live = [getattr(torch.ops.diffussm, name).default for name in names]
    assert all(a is b for a, b in zip(live, handles, strict=True))

first = bidirectional.convolve
u, spectra = torch.randn(2, 16, 4), bidirectional.kernel_spectra(*torch.randn(2, 4, 16))

folder = Path(sys.argv[1], "saved")
model = DiffuSSM.from_preset("digits", d_model=16, n_blocks=1, d_state=4).eval()
DiffuSSMPipeline(model, ancestral_scheduler()).save_pretrained(folder)
for _ in range(2):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    same(sys.modules[type(pipe.denoiser).__module__], u, spectra)
x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 7]), torch.tensor([1, 2])
for version in (pipe.denoiser, torch.compile(pipe.denoiser, fullgraph=True, backend="aot_eager")):
    torch.testing.assert_close(version(x, t, y), model(x, t, y))

file = Path(sys.argv[1], "copied.py")
for module, name in (("bidirectional", "convolve"), ("gpu_kernels", "on_chip_convolve")):
    file.write_text(self_contained_code(module, name))
    for number in range(10):
        spec = importlib.util.spec_from_file_location(f"{module}_{number}", file)
        copied = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copied)
        same(copied if module == "bidirectional" else bidirectional, u, spectra)

for module in (bidirectional, gpu_kernels):
    importlib.reload(module)
    same(bidirectional, u, spectra)
print("alive")
"""


def test_copies_of_the_code_leave_the_operators_of_the_others_alone(tmp_path):
    """A saved pipeline with trust_remote_code, ten copies, a reload: no registered operator is replaced."""
    command = [sys.executable, "-X", "dev", "-c", COPIES, tmp_path]
    environment = os.environ | {"HF_HOME": str(tmp_path), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0 and done.stdout == "alive\n", done.stderr


def test_state_dict_has_only_real_tensors():
    assert not any(
        tensor.is_complex() for tensor in BidirectionalSSM(3, 4).state_dict().values()
    )


@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 3), (2, 0, 4), (1, 2, 8, 4)])
def test_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(B, L, 4\)"):
        BidirectionalSSM(4, 4)(torch.zeros(shape))


def test_kernels_of_another_length_and_integers_are_refused():
    for kernels in ((2, 8), (2, 7)), ((2, 0), (2, 0)), ((8,), (8,)):
        with pytest.raises(ValueError, match=r"expected \(D, L\) for both"):
            kernel_spectra(*map(torch.zeros, kernels))
    with pytest.raises(TypeError, match="k_backward has dtype torch.int64"):
        bidirectional_conv(
            torch.zeros(1, 8, 2),
            torch.zeros(2, 8),
            torch.zeros(2, 8, dtype=torch.int64),
        )
    spectra = kernel_spectra(torch.zeros(2, 8), torch.zeros(2, 8))
    for shape in (1, 9, 2), (1, 8, 3), (8, 2):
        with pytest.raises(
            ValueError, match=r"expected \(B, L, D\) and \(2, D, L \+ 1\)"
        ):
            convolve(torch.zeros(shape), spectra)
    with pytest.raises(TypeError, match="u has dtype torch.int64"):
        convolve(torch.zeros(1, 8, 2, dtype=torch.int64), spectra)
    with pytest.raises(TypeError, match="spectra torch.float32"):
        convolve(torch.zeros(1, 8, 2), spectra.real)
    with pytest.raises(ValueError, match="=3: .*positive even integer"):
        BidirectionalSSM(4, 3)


def test_half_precision_arguments_are_transformed_in_float32():
    u, *kernels = (tensor.detach().bfloat16() for tensor in random_inputs(2, 3, 30))
    y = bidirectional_conv(u, *kernels)
    assert y.dtype == torch.bfloat16
    assert torch.equal(
        y, bidirectional_conv(u.float(), *(k.float() for k in kernels)).bfloat16()
    )
