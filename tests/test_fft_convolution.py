"""Ch. "The fast convolution": the clear one's values and gradients, piece by piece."""

import os
import subprocess
import sys

import pytest
import torch
from clear_sums import random_inputs, two_sums
from operations import Operations

from diffussm import fft_convolution
from diffussm.bidirectional import convolve_reference, kernel_spectra
from diffussm.convolution import fft_conv
from diffussm.fft_convolution import bidirectional_conv, convolve


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.slow
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
    monkeypatch.setattr(fft_convolution, "_PIECE", 1)
    assert [(c.start, c.stop) for c in fft_convolution._pieces(inputs[0])] == [
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


def test_half_precision_arguments_are_transformed_in_float32():
    u, *kernels = (tensor.detach().bfloat16() for tensor in random_inputs(2, 3, 30))
    y = bidirectional_conv(u, *kernels)
    assert y.dtype == torch.bfloat16
    assert torch.equal(
        y, bidirectional_conv(u.float(), *(k.float() for k in kernels)).bfloat16()
    )


COPIES = """
import importlib, importlib.util, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")  # those of other libraries, which -X dev would show
import torch
from diffusers import DiffusionPipeline
from diffussm import DiffuSSM, bidirectional, fft_convolution, gpu_kernels
from diffussm.one_file import self_contained_code
from diffussm.pipeline import DiffuSSMPipeline
from diffussm.schedulers import ancestral_scheduler

names = ["convolve", "convolve_backward", "triton_convolve", "triton_convolve_backward"]
ours = [fft_convolution._CONVOLVE, fft_convolution._CONVOLVE_BACKWARD]
ours += [gpu_kernels._triton_convolve, gpu_kernels._triton_convolve_backward]
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

first = fft_convolution.convolve
u, spectra = torch.randn(2, 16, 4), bidirectional.kernel_spectra(*torch.randn(2, 4, 16))

folder = Path(sys.argv[1], "saved")
model = DiffuSSM.from_preset("digits", d_model=16, n_blocks=1, d_state=4).eval()
DiffuSSMPipeline(model, ancestral_scheduler()).save_pretrained(folder)
for _ in range(2):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    same(sys.modules[type(pipe.denoiser).__module__], u, spectra)
x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 7]), torch.tensor([1, 2])
compiled = torch.compile(pipe.denoiser, fullgraph=True, backend="aot_eager")
for version in (pipe.denoiser, compiled):
    torch.testing.assert_close(version(x, t, y), model(x, t, y))

file = Path(sys.argv[1], "copied.py")
functions = {"fft_convolution": "convolve", "gpu_kernels": "triton_convolve"}
for module, name in functions.items():
    file.write_text(self_contained_code(module, name))
    for number in range(10):
        spec = importlib.util.spec_from_file_location(f"{module}_{number}", file)
        copied = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copied)
        same(copied if module == "fft_convolution" else fft_convolution, u, spectra)

for module in (fft_convolution, gpu_kernels):
    importlib.reload(module)
    same(fft_convolution, u, spectra)
print("alive")
"""


@pytest.mark.slow
def test_copies_of_the_code_leave_the_operators_of_the_others_alone(tmp_path):
    """A saved pipeline, ten copies, a reload: no registered operator is replaced."""
    command = [sys.executable, "-X", "dev", "-c", COPIES, tmp_path]
    environment = os.environ | {"HF_HOME": str(tmp_path), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0 and done.stdout == "alive\n", done.stderr


def test_is_the_clear_convolution_with_its_gradients():
    inputs = [torch.randn(2, 33, 5, dtype=torch.float64, requires_grad=True)]
    kernels = torch.randn(2, 5, 33, dtype=torch.float64)
    inputs.append(kernel_spectra(*kernels).requires_grad_())
    fast, clear = convolve(*inputs), convolve_reference(*inputs)
    torch.testing.assert_close(fast, clear, rtol=0, atol=1e-12)
    probe = torch.randn_like(clear)
    gradients = [torch.autograd.grad(y, inputs, probe) for y in (fast, clear)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-11)


def test_conjugates_inside_the_operators_are_computed_not_marked():
    """A GPU's compiled code lost the marks of PyTorch 2.11."""
    u, spectra = torch.randn(2, 8, 3), torch.randn(2, 3, 9, dtype=torch.complex64)
    with Operations() as seen:
        fft_convolution._convolve(u, spectra)
        fft_convolution._convolve_backward(torch.randn(2, 8, 6), u, spectra)
    assert "_fft_r2c.default" in seen.names and "_conj.default" not in seen.names


def test_operands_that_do_not_fit_are_refused():
    spectra = kernel_spectra(torch.zeros(2, 8), torch.zeros(2, 8))
    for shape, message in {
        (1, 9, 2): r"spectra has shape \(2, 2, 9\): expected \(2, D=2, F=10\)",
        (1, 8, 3): r"spectra has shape \(2, 2, 9\): expected \(2, D=3, F=9\)",
        (8, 2): r"u has shape \(8, 2\): expected \(B, L, D\)",
    }.items():
        with pytest.raises(ValueError, match=message):
            convolve(torch.zeros(shape), spectra)
    with pytest.raises(TypeError, match="u is torch.int64: expected a real"):
        convolve(torch.zeros(1, 8, 2, dtype=torch.int64), spectra)
    with pytest.raises(TypeError, match="spectra is torch.float32: expected a complex"):
        convolve(torch.zeros(1, 8, 2), spectra.real)
    with pytest.raises(TypeError, match="k_backward is torch.int64"):
        kernels = torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.int64)
        bidirectional_conv(torch.zeros(1, 8, 2), *kernels)
