"""Ch. "The hourglass block": against a loop over positions and the paper's counts."""

import inspect
import math
import re
from types import SimpleNamespace

import pytest
import torch
from drawings import drawn
from torch.utils.flop_counter import FlopCounterMode

from diffussm.hourglass import HourglassBlock, PositionLinear, linear_macs

DENSE = ("w0", "w1", "w2", "w3", "w_up", "w_down")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def awake(d_model=8, d_state=4, downsample=2):
    """A block in double precision whose zeros are random numbers."""
    block = HourglassBlock(d_model, d_state, downsample).double()
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "kernel" not in name:
                parameter.copy_(0.5 * torch.randn_like(parameter))
    return block


def sigma(z):
    return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))


def ssm_by_sums(ssm, U):
    """Both directions of one image (L, D), as sums over lags; the skip apart."""
    L, D = U.shape
    k_forward, k_backward = ssm.forward_kernel(L), ssm.backward_kernel(L)
    Y = ssm.skip * torch.cat([U, U], dim=1)
    for i in range(L):
        for lag in range(i + 1):
            Y[i, :D] += k_forward[:, lag] * U[i - lag]
        for lag in range(L - i):
            Y[i, D:] += k_backward[:, lag] * U[i + lag]
    return Y


def block_by_subscripts(block, x, c):
    """Section 3.2 of the paper for one image, x (J, D), c (D,): only subscripts."""
    w = dict(block.named_parameters())
    M, (J, D) = block.downsample, x.shape
    L, D_m = J * M, 2 * D // M

    def linear(name, v):
        return w[f"{name}.weight"] @ v + w[f"{name}.bias"]

    shift_scale = linear("modulation", c * torch.sigmoid(c))
    I = []
    for j in range(J):
        centred = x[j] - x[j].sum() / D
        I.append(
            centred / (centred.square().sum() / D + 1e-6).sqrt() * (1 + shift_scale[D:])
            + shift_scale[:D]
        )
    U = []
    for l in range(L):
        j, k = l // M, l % M
        up = w["w_up.weight"][k * D : (k + 1) * D] @ sigma(linear("w0", I[j]))
        U.append(sigma(up + w["w_up.bias"][k * D : (k + 1) * D]))
    Y = ssm_by_sums(block.ssm, torch.stack(U))
    I_prime = torch.zeros(J, 2 * D, dtype=x.dtype)
    for l in range(L):
        j, k = l // M, l % M
        I_prime[j, D_m * k : D_m * (k + 1)] = sigma(
            w["w_down.weight"][k] @ Y[l] + w["w_down.bias"][k]
        )
    return torch.stack(
        [
            x[j]
            + linear("w3", sigma(linear("w2", I_prime[j])) * sigma(linear("w1", I[j])))
            for j in range(J)
        ]
    )


class NoMixing(torch.nn.Module):
    def forward(self, u, prepared=None):
        return torch.cat([u, u], dim=2)


@pytest.mark.slow
@pytest.mark.parametrize("M", [1, 2, 4])
def test_block_equals_the_papers_subscripts(M):
    block = awake(downsample=M)
    x, c = (
        torch.randn(2, 5, 8, dtype=torch.float64),
        torch.randn(2, 8, dtype=torch.float64),
    )
    with torch.no_grad():
        expected = torch.stack(
            [block_by_subscripts(block, x[b], c[b]) for b in range(2)]
        )
        assert (expected - x).abs().max() > 0.1
        torch.testing.assert_close(block(x, c), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("M", [1, 2, 4])
def test_groups_stay_local_without_the_state_space_model(M):
    block = awake(downsample=M)
    c = torch.randn(1, 8, dtype=torch.float64)

    def reach():
        x = torch.randn(1, 6, 8, dtype=torch.float64)
        return (
            torch.autograd.functional.jacobian(lambda x: block(x, c), x)
            .abs()
            .amax(dim=(0, 2, 3, 5))
        )

    assert reach().min() > 0
    block.ssm = NoMixing()
    alone = reach()
    assert alone.diagonal().min() > 0
    assert torch.equal(alone, alone.diagonal().diag())


@pytest.mark.parametrize("M", [1, 2, 4])
def test_new_block_is_the_identity(M):
    x = torch.randn(2, 6, 8)
    assert torch.equal(HourglassBlock(8, 4, M)(x, torch.randn(2, 8)), x)


def test_an_empty_batch_gives_an_empty_result():
    block, x = awake().float(), torch.zeros(0, 6, 8, requires_grad=True)
    y = block(x, torch.zeros(0, 8))
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 6, 8)


def test_new_block_can_learn():
    block = HourglassBlock(8, 4)
    block(torch.randn(2, 6, 8), torch.randn(2, 8)).square().sum().backward()
    assert block.w3.weight.grad.abs().max() > 0


@pytest.mark.parametrize("M", [1, 2, 4])
def test_parameters_and_multiply_adds_of_the_dense_maps(M):
    """(13 + M) D^2 parameters; the paper's 13 (L/M) D^2 + L D^2 multiply-adds."""
    D, J = 24, 10
    with torch.device("meta"):
        block = HourglassBlock(D, 4, M)
    weights = [getattr(block, name).weight for name in DENSE]
    assert sum(weight.numel() for weight in weights) == (9 + M + 4) * D**2
    with FlopCounterMode(display=False, depth=None) as counter:
        block(torch.empty(1, J, D, device="meta"), torch.empty(1, D, device="meta"))
    counts = counter.get_flop_counts()
    multiply_adds = (
        sum(sum(counts[f"HourglassBlock.{name}"].values()) for name in DENSE) / 2
    )
    L = J * M
    assert multiply_adds == 13 * L // M * D**2 + L * D**2


@pytest.mark.parametrize("M", [1, 2, 4])
def test_linear_macs_are_those_that_pytorch_counts(M):
    D, J = 24, 10
    with torch.device("meta"):
        block, x, c = HourglassBlock(D, 4, M), torch.empty(1, J, D), torch.empty(1, D)
    sizes = SimpleNamespace(n_blocks=3, seq_len=J * M, downsample=M, d_model=D)
    with FlopCounterMode(display=False, depth=None) as counter:
        block(x, c)
    counts = counter.get_flop_counts()
    seen = sum(sum(counts[f"HourglassBlock.{name}"].values()) for name in DENSE) / 2
    assert linear_macs(sizes) == 3 * seen and linear_macs(sizes, 2 * J * M) == 6 * seen


def test_interface_of_the_maps():
    block = HourglassBlock(12, 4, 4)
    assert block.w_down.weight.shape == (4, 6, 24) and block.w_down.bias.shape == (4, 6)
    assert all(isinstance(getattr(block, name), torch.nn.Linear) for name in DENSE[:-1])
    assert block.w_up.out_features == 48


def test_position_linear_is_one_linear_map_per_place():
    layer = PositionLinear(3, 5, 4)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 7, 3, 5)
    for k in range(3):
        expected = torch.nn.functional.linear(
            x[:, :, k], layer.weight[k], layer.bias[k]
        )
        torch.testing.assert_close(layer(x)[:, :, k], expected)
    limit = math.sqrt(6 / 9)
    assert (
        0.8 * limit < layer.weight.abs().max() <= limit
    )  # Xavier of one map, not of the whole tensor


def test_condition_acts_on_every_position_of_its_own_sample():
    block = awake()
    x, c = (
        torch.randn(2, 6, 8, dtype=torch.float64),
        torch.randn(2, 8, dtype=torch.float64),
    )
    other = c.clone()
    other[1] += 1
    changed = (block(x, c) - block(x, other)).abs().amax(2)
    assert (
        torch.equal(changed[0], torch.zeros(6, dtype=torch.float64))
        and changed[1].min() > 1e-6
    )


def test_autocast_keeps_the_stream_in_float32():
    block = awake().float()
    x, c = torch.randn(2, 6, 8), torch.randn(2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x, c)
    assert y.dtype == torch.float32
    expected = block(x, c)
    assert (y - expected).abs().max() < 0.05 * expected.abs().max()


def test_state_dict_has_only_real_tensors():
    assert not any(
        tensor.is_complex() for tensor in HourglassBlock(8, 4).state_dict().values()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 4, 3), "downsample=3 does not divide 2"),
        ((8, 4, 0), "downsample=0: expected an integer of at least 1"),
        ((8.0, 4, 2), "d_model=8.0: expected an integer"),
        ((8, 5, 2), "5"),
    ],
)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        HourglassBlock(*arguments)


@pytest.mark.parametrize(
    ("x", "c", "message"),
    [
        ((2, 6, 7), (2, 8), r"x has shape \(2, 6, 7\): expected \(B, J, D=8\)"),
        ((6, 8), (6, 8), r"x has shape \(6, 8\): expected \(B, J, D=8\)"),
        ((2, 6, 8), (3, 8), r"c has shape \(3, 8\): expected \(B=2, D=8\)"),
        ((2, 6, 8), (2, 6, 8), r"c has shape \(2, 6, 8\): expected \(B=2, D=8\)"),
    ],
)
def test_wrong_shapes_are_refused(x, c, message):
    with pytest.raises(ValueError, match=message):
        HourglassBlock(8, 4)(torch.zeros(x), torch.zeros(c))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize(
    "known", [False, True], ids=["kernels inside", "spectra given"]
)
def test_compiled_block_is_one_graph_with_the_same_values(precision, known):
    """Traced and differentiated as by torch.compile; fullgraph forbids breaks."""
    block = awake().float()
    spectra = block.ssm.spectra(20).detach() if known else None
    inputs = [torch.randn(2, 10, 8), torch.randn(2, 8), *block.parameters()]
    inputs = [tensor.detach().requires_grad_() for tensor in inputs[:2]] + inputs[2:]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for side in (block, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            y = side(*inputs[:2], spectra)
        gradients = torch.autograd.grad(y.square().sum(), inputs, allow_unused=known)
        results.append(
            [y, *(gradient for gradient in gradients if gradient is not None)]
        )
    for clear, fast in zip(*results, strict=True):
        tolerance = 1e-5 if precision == "float32" else 2e-2
        assert (clear - fast).abs().max() <= tolerance * clear.abs().max()
    torch._dynamo.reset()


def test_exported_block_holds_the_operator_and_its_values():
    block, x, c = (
        awake(),
        torch.randn(2, 6, 8, dtype=torch.float64),
        torch.randn(2, 8, dtype=torch.float64),
    )
    exported = torch.export.export(block, (x, c))
    assert "torch.ops.diffussm.convolve" in exported.graph_module.code
    torch.testing.assert_close(exported.module()(x, c), block(x, c), rtol=0, atol=0)


def test_drawing_has_every_map_of_the_block_with_its_sizes_and_nothing_else():
    boxes = drawn("block.svg")
    D, M = 24, 4
    block = HourglassBlock(D, 4, M)
    assert set(boxes) == {name.split(".")[0] for name, _ in block.named_parameters()}
    letters = {"modulation": "Wc", "w_up": "W↑k", "w_down": "W↓k", "ssm": "SSM→"}
    for name, box in boxes.items():
        assert box.label == letters.get(name, name.upper())
        if name != "ssm":
            *_, outputs, inputs = getattr(block, name).weight.shape
            assert box.widths(D=D, M=M) == [inputs, outputs], name


def test_drawing_has_a_sigma_where_the_code_has_one():
    source = inspect.getsource(HourglassBlock.forward)
    activated = set(re.findall(r"F\.gelu\(self\.(\w+)\(", source))
    assert len(activated) == source.count("F.gelu(")
    boxes = drawn("block.svg")
    assert {name for name, box in boxes.items() if box.sigma} == activated
