"""Ch. "What is kept": the same gradients, and what is left to them."""

from typing import get_args

import pytest
import torch
from operations import Operations

from diffussm.hourglass import HourglassBlock
from diffussm.model_config import PRESETS, DiffuSSMConfig
from diffussm.recomputation import Recompute, RecomputingBlock, kept_by

SMALL = DiffuSSMConfig(
    input_size=8, in_channels=1, num_classes=2, d_model=32, n_blocks=1, d_state=8
)


def awake_block():
    torch.manual_seed(0)
    block = RecomputingBlock(16, d_state=4)
    torch.nn.init.normal_(block.w3.weight, std=0.1)
    return block


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("recompute", get_args(Recompute))
def test_gradients_are_those_of_the_plain_block_bit_for_bit(recompute, bf16):
    block, results = awake_block(), []
    x, c = torch.randn(2, 8, 16, requires_grad=True), torch.randn(2, 16)
    plain = HourglassBlock.forward
    for forward in (plain, lambda *inputs: block(*inputs[1:], recompute=recompute)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = forward(block, x, c)
        inputs = [x, *block.parameters()]
        results.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) and one.any()


def test_only_products_and_convolutions_are_kept_or_computed_once():
    """A hand count of what one block runs: seven maps, two kernels, one convolution."""
    counts = {}
    for recompute in get_args(Recompute):
        block, x = awake_block(), torch.randn(2, 8, 16, requires_grad=True)
        with Operations() as first:
            y = block(x, torch.randn(2, 16), recompute=recompute)
        with Operations() as second:
            y.sum().backward()
        forward, seen = first.names, second.names
        convolutions = forward.count("convolve.default"), seen.count("convolve.default")
        # addmm: six linear maps; none of them is in a backward pass
        counts[recompute] = (
            forward.count("addmm.default"),
            seen.count("addmm.default"),
            *convolutions,
            seen.count("gelu.default"),
        )
    assert counts["none"] == (6, 0, 1, 0, 0)
    assert counts["elementwise"] == (6, 0, 1, 0, 5)
    assert counts["all"] == (6, 5, 1, 1, 5)  # the last map is not needed again


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_what_is_kept_shrinks_and_the_input_stays(precision):
    kept = {how: kept_by(SMALL, precision, 4, how) for how in get_args(Recompute)}
    stream = 4 * (64 // 2) * 32 * 4  # images, positions, width, bytes
    assert kept["all"] == {"input": stream}
    assert stream < kept["elementwise"].total() < kept["none"].total()
    assert not any("gelu" in maker for maker in kept["elementwise"])
    results = {"convolve.default", "addmm.default", "bmm.default", "input"}
    assert set(kept["elementwise"]) == results


@pytest.mark.slow
def test_half_of_what_a_block_of_xl_keeps_is_what_products_and_convolution_gave():
    xl = DiffuSSMConfig(**PRESETS["DiffuSSM-XL"], input_size=32)
    L, D, B = 1024, 1152, 8
    kept = kept_by(xl, "bf16", B, "elementwise")
    # of a place w0 and w3 give D numbers, w1, w2 and w_up 2D; then scale and shift
    stream = L // 2
    addmm = 2 * B * stream * D * (1 + 1 + 2 + 2 + 2) + 2 * B * 2 * D
    assert kept["addmm.default"] == addmm
    assert kept["bmm.default"] == 2 * B * L * D  # w_down
    assert kept["convolve.default"] == 2 * B * L * 2 * D
