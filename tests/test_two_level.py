"""Ch. "The kernel in two levels": the direct kernel's values and gradients."""

import pytest
import torch
from clear_sums import LENGTHS, loop_kernel, random_system

from diffussm.convolution import S4DKernel, vandermonde
from diffussm.two_level import multiplying_in, vandermonde_two_level


@pytest.mark.parametrize("length", LENGTHS)
def test_kernels_equal_powers_by_repeated_multiplication(length):
    log_dA, weights = random_system()
    torch.testing.assert_close(
        vandermonde_two_level(log_dA, weights, length),
        loop_kernel(log_dA, weights, length),
        rtol=1e-11,
        atol=1e-11,
    )


def precisions():
    """All that PyTorch says of products in float32, in its newer and older words."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    newer = [part.fp32_precision for part in (cuda, cudnn.conv, cudnn.rnn)]
    return *newer, torch.get_float32_matmul_precision(), cudnn.allow_tf32


def test_old_and_new_words_for_the_precision_agree_and_are_set_again():
    before = precisions()
    with multiplying_in("tf32"):
        assert precisions() == ("tf32", "tf32", "tf32", "high", True)
        with multiplying_in("ieee"):
            assert precisions() == ("ieee", "ieee", "ieee", "highest", False)
            assert not torch.backends.cuda.matmul.allow_tf32
        assert precisions() == ("tf32", "tf32", "tf32", "high", True)
    assert precisions() == before


@pytest.mark.parametrize("length", LENGTHS)
def test_gradients_of_the_two_levels_are_those_of_the_direct_kernel(length):
    log_dA, weights = (t.requires_grad_() for t in random_system())
    probe = torch.randn(3, length, dtype=torch.float64)
    direct, two_level = (
        torch.autograd.grad(
            (f(log_dA, weights, length) * probe).sum(), (log_dA, weights)
        )
        for f in (vandermonde, vandermonde_two_level)
    )
    torch.testing.assert_close(two_level, direct, rtol=1e-9, atol=1e-9)


def test_two_level_gradients_match_finite_differences():
    system = [t.requires_grad_() for t in random_system(2, 2)]
    assert torch.autograd.gradcheck(
        lambda z, w: vandermonde_two_level(z, w, 11), system
    )


def test_zero_weights_have_finite_gradients():
    log_dA, weights = random_system()
    weights = torch.zeros_like(weights).requires_grad_()
    (gradient,) = torch.autograd.grad(
        vandermonde_two_level(log_dA, weights, 50).sum(), weights
    )
    assert (
        torch.isfinite(torch.view_as_real(gradient)).all() and gradient.abs().max() > 0
    )


def test_layers_use_it_and_can_be_told_otherwise():
    kernel = S4DKernel(3, 8).double()
    assert kernel.vandermonde is vandermonde_two_level
    fast = kernel(100)
    kernel.vandermonde = vandermonde
    torch.testing.assert_close(kernel(100), fast, rtol=1e-11, atol=1e-11)


def test_kernels_that_are_none_are_refused():
    log_dA, weights = random_system()
    with pytest.raises(ValueError, match=r"weights has shape \(3, 3\): expected"):
        vandermonde_two_level(log_dA, weights[:, :3], 8)
    with pytest.raises(ValueError, match="length=0: expected an integer of at least"):
        vandermonde_two_level(log_dA, weights, 0)


def test_autocast_does_not_round_the_product():
    log_dA, weights = (t.to(torch.complex64) for t in random_system())
    plain = vandermonde_two_level(log_dA, weights, 100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = vandermonde_two_level(log_dA, weights, 100)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=0, atol=0)
