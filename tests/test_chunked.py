"""Ch. "The fourth way: chunks": the layer's sums, for all lengths and chunks."""

import random

import pytest
import torch
from clear_sums import two_sums

from diffussm.bidirectional import BidirectionalSSM, way
from diffussm.chunked import CHUNKED, chunked, modes, prepare_layers
from diffussm.hourglass import HourglassBlock
from diffussm.traffic import Traffic


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def direct_kernels(layer, length):
    """Both kernels with their skips in lag 0, by powers that are written out."""
    kernels = []
    for kernel, skip in zip(
        (layer.forward_kernel, layer.backward_kernel), layer.skip.chunk(2), strict=True
    ):
        dA_log, weights = kernel.discrete()
        lags = torch.arange(length, dtype=torch.float64)
        k = 2 * (weights[..., None] * torch.exp(dA_log[..., None] * lags)).sum(1).real
        kernels.append(k + skip[:, None] * (lags == 0))
    return kernels


def with_gradients(layer, u, probe, side):
    y = side(u)
    return [y, *torch.autograd.grad(y, [u, *layer.parameters()], probe)]


def close(ours, theirs, tolerances):
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error = (a.double() - b).abs().max()
        assert error <= tolerances[min(number, 1)] * b.abs().max()


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 100, 127])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_is_the_two_sums_with_the_gradients_of_all_parameters(length, dtype):
    B, D = 3, 5
    layer = BidirectionalSSM(D, 6)
    layer.convolution = CHUNKED
    u, probe = torch.randn(B, length, D), torch.randn(B, length, 2 * D)
    layer, u, probe = layer.to(dtype), u.to(dtype).requires_grad_(), probe.to(dtype)
    ours = with_gradients(layer, u, probe, layer)
    layer, u = layer.double(), u.detach().double().requires_grad_()
    kernels = direct_kernels(layer, length)
    theirs = with_gradients(layer, u, probe.double(), lambda u: two_sums(u, *kernels))
    close(ours, theirs, (1e-5, 1e-4) if dtype == torch.float32 else (1e-11, 1e-11))


def test_single_precision_holds_at_a_thousand_positions_and_full_width_of_states():
    layer = BidirectionalSSM(3, 64)
    layer.convolution = CHUNKED
    u, probe = torch.randn(1, 1000, 3), torch.randn(1, 1000, 6)
    ours = with_gradients(layer, u.requires_grad_(), probe, layer)
    layer, u = layer.double(), u.detach().double().requires_grad_()
    layer.convolution = way("reference")
    theirs = with_gradients(layer, u, probe.double(), layer)
    close(ours, theirs, (1e-5, 1e-4))


def test_any_chunk_gives_the_same_for_sizes_drawn_at_random():
    draw = random.Random(19)
    for _ in range(25):
        B, L, D, n, T = (draw.randint(1, most) for most in (3, 70, 4, 4, 80))
        layer = BidirectionalSSM(D, 2 * n).double()
        u = torch.randn(B, L, D, dtype=torch.float64)
        y = chunked(u, modes(layer), chunk=T)
        torch.testing.assert_close(y, layer(u), rtol=0, atol=1e-10)


def test_second_derivatives_are_right():
    layer = BidirectionalSSM(2, 4).double()
    inputs = torch.randn(1, 5, 2, dtype=torch.float64), modes(layer).detach()
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda u, m: chunked(u, m, 2), inputs)
    assert torch.autograd.gradgradcheck(lambda u, m: chunked(u, m, 2), inputs)


def test_modes_do_not_depend_on_the_length_and_follow_the_weights():
    layer = BidirectionalSSM(3, 8)
    layer.convolution = CHUNKED
    u = torch.randn(2, 20, 3)
    prepared = layer.prepare(20)
    assert prepared.shape == (2, 3, 17) and prepared.dtype == torch.float32
    assert torch.equal(prepared, layer.prepare(7))
    assert torch.equal(layer(u, prepared), layer(u))
    before = layer(u)
    for parameter in layer.parameters():
        with torch.no_grad():
            parameter.add_(0.1)
        after = layer(u)
        assert not torch.equal(after, before)
        before = after
    layer.convolution = way("reference")
    torch.testing.assert_close(before, layer(u), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_and_autocast_changes_nothing(dtype):
    layer = BidirectionalSSM(4, 8)
    layer.convolution = CHUNKED
    u = torch.randn(2, 90, 4).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = layer(u)
        gradients = torch.autograd.grad(under.float().sum(), list(layer.parameters()))
    assert under.dtype == dtype
    torch.testing.assert_close(under, layer(u.float()).to(dtype), rtol=0, atol=0)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    half = layer.to(dtype)(u)  # the modes stay in single precision, the skip does not
    assert half.dtype == dtype and (half - under).norm() < 0.01 * under.norm()


def test_an_empty_batch_gives_an_empty_result():
    layer = BidirectionalSSM(4, 8)
    layer.convolution = CHUNKED
    u = torch.zeros(0, 10, 4, requires_grad=True)
    y = layer(u)
    y.sum().backward()
    assert y.shape == (0, 10, 8) and u.grad.shape == u.shape


def test_operands_that_do_not_fit_are_refused():
    prepared = modes(BidirectionalSSM(2, 4))
    for u, message in {
        (1, 9, 3): r"modes has shape \(2, 2, 9\): expected \(2, D=3, K\)",
        (8, 2): r"u has shape \(8, 2\): expected \(B, L, D\)",
        (1, 0, 2): "L=0: expected an integer of at least 1",
    }.items():
        with pytest.raises(ValueError, match=message):
            chunked(torch.zeros(u), prepared)
    with pytest.raises(ValueError, match="chunk=0"):
        chunked(torch.zeros(1, 4, 2), prepared, chunk=0)
    with pytest.raises(TypeError, match="u is torch.int64"):
        chunked(torch.zeros(1, 4, 2, dtype=torch.int64), prepared)
    with pytest.raises(TypeError, match="modes is torch.complex64: expected a real"):
        chunked(torch.zeros(1, 4, 2), prepared.to(torch.complex64))


@pytest.mark.slow
def test_a_compiled_block_is_one_graph_with_the_same_values():
    block = HourglassBlock(4, 4)
    torch.nn.init.normal_(block.w3.weight)
    block.ssm.convolution = CHUNKED
    x, c = torch.randn(2, 75, 4), torch.randn(2, 4)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for side in (block, compiled):
        y = side(x, c)
        gradients = torch.autograd.grad(y.square().sum(), list(block.parameters()))
        results.append([y, *gradients])
    for clear, fast in zip(*results, strict=True):
        assert (clear - fast).abs().max() <= 1e-5 * clear.abs().max()


def operations(layers):
    with Traffic() as seen:
        prepare_layers(layers, 20)
    return [one.name for one in seen.work]


def test_layers_are_prepared_together_and_each_gets_its_own():
    layers = [BidirectionalSSM(3, 8) for _ in range(5)]
    for layer in layers:
        layer.convolution = CHUNKED
    together, probe = prepare_layers(layers, 20), torch.randn(2, 3, 17)
    for layer, ours in zip(layers, together, strict=True):
        alone, leaves = layer.prepare(20), list(layer.parameters())
        torch.testing.assert_close(ours, alone)
        gradients = (
            torch.autograd.grad((x * probe).sum(), leaves, retain_graph=True)
            for x in (ours, alone)
        )
        for pair in zip(*gradients, strict=True):
            torch.testing.assert_close(*pair)
    assert len(operations(layers)) == len(operations(layers[:2])) > 10


def test_layers_that_are_not_alike_are_prepared_one_by_one():
    layers = [BidirectionalSSM(3, 8) for _ in range(3)]
    layers[1].convolution = CHUNKED
    ours = prepare_layers(layers, 20)
    for layer, one in zip(layers, ours, strict=True):
        torch.testing.assert_close(one, layer.prepare(20))
    assert [one.is_complex() for one in ours] == [True, False, True]


def test_layers_of_other_settings_are_not_prepared_as_the_first():
    torch.manual_seed(0)
    first, other, larger = (BidirectionalSSM(3, n) for n in (4, 4, 8))
    other.backward_kernel.discretization = "bilinear"
    for layer in (first, other, larger):
        layer.convolution = CHUNKED
    for second in (other, larger):
        for layers in ([first, second], [second, first]):
            for found, layer in zip(prepare_layers(layers, 9), layers, strict=True):
                torch.testing.assert_close(found, layer.prepare(9))
