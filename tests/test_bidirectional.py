"""Ch. "Both directions": the layer, its meaning, and the ways to run it."""

import copy
import pickle

import pytest
import torch
from clear_sums import random_inputs, two_sums

from diffussm.bidirectional import (
    REFERENCE,
    WAYS,
    BidirectionalSSM,
    Convolution,
    convolve_reference,
    kernel_spectra,
    way,
)
from diffussm.convolution import fft_conv
from diffussm.fft_convolution import FFT


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fft", "reference"])
@pytest.mark.parametrize("length", [1, 2, 7, 64])
def test_every_way_is_the_two_sums_with_their_gradients(name, length):
    inputs = random_inputs(3, 2, length)
    y = way(name)(inputs[0], kernel_spectra(*inputs[1:]))
    slow = two_sums(*inputs)
    torch.testing.assert_close(y, slow, rtol=0, atol=1e-11)
    probe = torch.randn_like(slow)
    gradients = [torch.autograd.grad(side, inputs, probe) for side in (y, slow)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


def test_reference_is_two_causal_convolutions_with_a_flip():
    u, k_forward, k_backward = random_inputs(2, 3, 50)
    x = u.transpose(1, 2)
    flipped = fft_conv(x.flip(-1), k_backward).flip(-1)
    expected = torch.cat([fft_conv(x, k_forward), flipped], dim=1).transpose(1, 2)
    y = convolve_reference(u, kernel_spectra(k_forward, k_backward))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


def test_everybody_gets_the_fast_way_and_unknown_ones_are_refused():
    assert next(iter(WAYS)) == "fft"
    assert BidirectionalSSM(3, 4).convolution is way("fft") is FFT
    assert way("reference") is REFERENCE
    with pytest.raises(ValueError, match="convolution='ftt': did you mean 'fft'"):
        way("ftt")


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


def test_what_is_prepared_gives_the_same_output():
    layer = BidirectionalSSM(3, 4)
    u = torch.randn(2, 20, 3)
    spectra = layer.prepare(20)
    assert torch.equal(spectra, layer.spectra(20))
    assert spectra.shape == (2, 3, 21) and spectra.dtype == torch.complex64
    assert torch.equal(layer(u, spectra), layer(u))


def test_the_convolution_can_be_replaced_by_a_way_or_a_plain_function():
    layer = BidirectionalSSM(3, 4)
    u = torch.randn(2, 20, 3)
    expected = 2 * convolve_reference(u, layer.spectra(20))
    layer.convolution = lambda u, spectra: 2 * convolve_reference(u, spectra)
    assert torch.equal(layer(u), expected)
    layer.convolution = Convolution(
        convolve_reference, lambda layer, length: 2 * layer.spectra(length)
    )
    torch.testing.assert_close(layer(u), expected)
    assert torch.equal(layer.prepare(20), 2 * layer.spectra(20))


def test_a_copy_and_a_pickle_are_run_in_the_same_way():
    layer = BidirectionalSSM(3, 4)
    layer.convolution = REFERENCE
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert same.convolution == REFERENCE != FFT


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


def test_state_dict_has_only_real_tensors():
    assert not any(
        tensor.is_complex() for tensor in BidirectionalSSM(3, 4).state_dict().values()
    )


@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 3), (2, 0, 4), (1, 2, 8, 4)])
def test_wrong_shape_is_refused(shape):
    message = "length=0" if 0 in shape else r"expected \(B, L, D=4\)"
    with pytest.raises(ValueError, match=message):
        BidirectionalSSM(4, 4)(torch.zeros(shape))


def test_kernels_of_another_length_and_integers_are_refused():
    for kernels, message in {
        ((2, 8), (2, 7)): r"k_backward has shape \(2, 7\): expected \(D=2, L=8\)",
        ((2, 0), (2, 0)): "L=0: expected an integer of at least 1",
        ((8,), (8,)): r"k_forward has shape \(8,\): expected \(D, L\)",
    }.items():
        with pytest.raises(ValueError, match=message):
            kernel_spectra(*map(torch.zeros, kernels))
    with pytest.raises(TypeError, match="k_backward is torch.int64"):
        kernel_spectra(torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="=3: .*positive even integer"):
        BidirectionalSSM(4, 3)
