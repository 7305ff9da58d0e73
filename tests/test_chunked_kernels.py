"""Ch. "A recurrence for tensor cores": the chunked kernels, in Triton's interpreter."""

import ast
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from interpreter import round_to_nearest
from machine_code import CHIPS, compile_again

pytest.importorskip("triton", reason="Triton is not made for this system")

from benchmarks import common
from diffussm import segments
from diffussm.autotuning import _CHUNKS, _candidates
from diffussm.bidirectional import BidirectionalSSM, way
from diffussm.chunked import modes as modes_of
from diffussm.hourglass import HourglassBlock
from diffussm.segments import chunked_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def some_modes(D, n):
    decay, angle = -0.2 * torch.rand(2, D, n), 3 * torch.rand(2, D, n)
    weights, skip = torch.randn(2, D, 2 * n) / n, torch.randn(2, D, 1)
    return torch.cat([decay, angle, weights, skip], 2)


def kernels_of(modes, length):
    """k_l of both directions by the definition, the skip in lag 0: (2, D, L)."""
    n = modes.shape[2] // 4
    decay, angle, wr, wi = modes[..., :-1].unflatten(2, (4, n)).unbind(2)
    powers = torch.exp(torch.complex(decay, angle)[..., None] * torch.arange(length))
    k = 2 * torch.einsum("wdn,wdnl->wdl", torch.complex(wr, wi), powers).real
    return k + (torch.arange(length) == 0) * modes[..., -1:]


def two_sums(u, modes):
    """As matrices of shifts: O(L^2)."""
    L, k = u.shape[1], kernels_of(modes, u.shape[1])
    i, j = torch.arange(L)[:, None], torch.arange(L)[None, :]
    past = torch.where(i >= j, k[0][:, (i - j).clamp(min=0)], 0)
    future = torch.where(j >= i, k[1][:, (j - i).clamp(min=0)], 0)
    return torch.cat([torch.einsum("dij,bjd->bid", m, u) for m in (past, future)], 2)


def with_gradients(function, u, modes, grad):
    leaves = [x.detach().clone().requires_grad_() for x in (u, modes)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y))]


def error(ours, true):
    """The largest difference, relative to the largest entry."""
    assert ours.shape == true.shape
    ours, true = ours.detach().double().cpu(), true.detach()
    return float((ours - true).abs().max() / true.abs().max())


def errors(B, L, D, n, **options):
    """Of the output, of u's gradient, and of each kind of mode's gradient."""
    u, modes, grad = torch.randn(B, L, D), some_modes(D, n), torch.randn(B, L, 2 * D)
    sides = [x.to(DEVICE) for x in (u, modes, grad)]
    y, grad_u, grad_modes = with_gradients(
        lambda *x: chunked_triton(*x, **options), *sides
    )
    true = with_gradients(two_sums, u.double(), modes.double(), grad.double())
    kinds = [slice(c, c + n) for c in range(0, 4 * n, n)] + [slice(4 * n, None)]
    each = [error(grad_modes[..., kind], true[2][..., kind]) for kind in kinds]
    return [error(y, true[0]), error(grad_u, true[1]), *each]


def agree(found):
    assert len(found) == 7 and found[0] < 1e-5 and max(found[1:]) < 1e-4, found


@pytest.mark.parametrize("length, chunk", [(1, 16), (17, 16), (64, 64)])
def test_equals_the_two_sums_and_every_gradient(length, chunk):
    """In float64 by the definition: output to 1e-5, of u and each kind of mode 1e-4."""
    agree(errors(1, length, 1, 2, precision="ieee", chunk=chunk))


@pytest.mark.slow
@pytest.mark.parametrize(
    "B, length, D, n, chunk",
    [
        (2, 63, 3, 3, 32),
        (3, 65, 2, 17, 64),
        (17, 20, 5, 2, 16),
        (2, 100, 2, 4, 32),
        (1, 1000, 1, 32, 64),
    ],
)
def test_equals_the_two_sums_at_odd_sizes(B, length, D, n, chunk):
    """No multiples of the chunk, of 16 images, of the warps, nor of 16 modes."""
    agree(errors(B, length, D, n, precision="ieee", chunk=chunk, warps=4))


def rounded_to_tf32(x):
    """The nearest float32 with ten bits behind the point."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def rounded_to_bf16(x):
    return x.bfloat16().float()


def twin(x, modes, T, operand):
    """The walk in PyTorch, its factors rounded: x (B, L, D), modes (D, 4n + 1)."""
    (B, L, D), n, t = x.shape, modes.shape[1] // 4, torch.arange(T)
    decay, angle, wr, wi = modes[:, :-1].double().unflatten(1, (4, n)).unbind(1)
    z = torch.exp(torch.complex(decay, angle)[:, None] * torch.arange(T + 1)[:, None])
    readout = 2 * torch.complex(wr, wi)[:, :, None] * z[:, 1:].mT
    k, lag = kernels_of(modes[None].double(), T)[0], t - t[:, None]
    near = operand(torch.where(lag >= 0, k[:, lag.clamp(min=0)], 0).float())
    rr, ri = operand(readout.real.float()), operand(-readout.imag.float())
    intake, last = z[:, :T].flip(1), z[:, T:].to(torch.complex64)
    vr, vi = operand(intake.real.float()), operand(intake.imag.float())
    S, y = torch.zeros(D, B, n, dtype=torch.complex64), []
    for u in torch.nn.functional.pad(x, (0, 0, 0, -L % T)).permute(2, 0, 1).split(T, 2):
        u = operand(u)
        y.append(u @ near + operand(S.real) @ rr + operand(S.imag) @ ri)
        S = S * last + torch.complex(u @ vr, u @ vi)
    return torch.cat(y, 2).permute(1, 2, 0)[:, :L]


def both_twins(u, modes, T, operand):
    back = twin(u.flip(1), modes[1], T, operand).flip(1)
    return torch.cat([twin(u, modes[0], T, operand), back], 2)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU adds in an order of its own")
def test_factors_are_rounded_to_tf32_like_the_twins():
    u, modes = torch.randn(2, 33, 2), some_modes(2, 4)
    ours = chunked_triton(u, modes, precision="tf32")
    assert error(ours, both_twins(u, modes, 16, rounded_to_tf32).double()) < 1e-5
    exact = two_sums(u.double(), modes.double())
    assert 5e-5 < error(ours, exact) < 2e-3  # a rounding that is left out is seen


@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])  # bf16: of the hardware
def test_what_is_not_a_number_is_not_rounded_to_one(precision):
    u = torch.zeros(1, 20, 2)
    u.view(torch.int32)[0, 3, 1] = 0x7FFFFFFF  # the NaN that a GPU computes
    y = chunked_triton(u, some_modes(2, 4), precision=precision)
    assert y[0, 3, [1, 3]].isnan().all() and y[..., 0].isfinite().all()


@pytest.mark.parametrize(
    "operand, bound", [(rounded_to_tf32, 3e-4), (rounded_to_bf16, 2.5e-3)]
)
@pytest.mark.parametrize("length", [1024, 4096])
def test_rounding_stays_inside_its_bound(operand, bound, length):
    """Of the output of a layer as it is at the start, in the mean square: the products
    of the emulated kernel, before the output is rounded too.
    """
    layer = BidirectionalSSM(8, 64)
    u, modes = rounded_to_bf16(torch.randn(2, length, 8)), modes_of(layer).detach()
    exact = BidirectionalSSM.forward(layer.double(), u.double()).detach()
    found = {
        chunk: float((both_twins(u, modes, chunk, operand) - exact).norm())
        for chunk in (16, 64)
    }
    assert bound / 3 < max(found.values()) / exact.norm() < bound, found


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU rounds by itself")
def test_bfloat16_has_the_twins_output_and_gradients_within_its_rounding(monkeypatch):
    round_to_nearest(monkeypatch.setattr)
    u, modes = torch.randn(2, 33, 2).bfloat16(), some_modes(2, 4)
    grad = torch.randn(2, 33, 4).bfloat16()
    ours = with_gradients(chunked_triton, u, modes, grad)
    assert [x.dtype for x in ours] == [u.dtype, u.dtype, modes.dtype]
    rounded = both_twins(u.float(), modes, 16, rounded_to_bf16).bfloat16()
    assert error(ours[0], rounded.double()) < 8e-3  # one unit of the last bit
    true = with_gradients(two_sums, u.double(), modes.double(), grad.double())
    assert all(1e-4 < error(*pair) < 2e-2 for pair in zip(ours, true, strict=True))


def test_a_layer_with_it_is_the_layer_without():
    layer = BidirectionalSSM(2, 4).to(DEVICE)
    u, leaves = torch.randn(1, 20, 2, device=DEVICE), [*layer.parameters()]
    results = []
    for name in ("fft", "chunked_triton"):
        layer.convolution = way(name)
        y = layer(u)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for clear, fast in zip(*results, strict=True):
        assert error(fast, clear.double().cpu()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(monkeypatch, dtype):
    if DEVICE.type == "cpu":
        round_to_nearest(monkeypatch.setattr)
    layer = BidirectionalSSM(2, 4).to(DEVICE)
    layer.convolution = way("chunked_triton")
    u, leaves = torch.randn(1, 20, 2, device=DEVICE, dtype=dtype), [*layer.parameters()]
    results = []
    for enabled in (False, True):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            y = layer(u)
            gradients = torch.autograd.grad(y.float().square().sum(), leaves)
        assert y.dtype == dtype
        results.append([y, *gradients])
    for plain, under in zip(*results, strict=True):
        assert torch.equal(plain, under) and plain.any()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("chosen", [False, True], ids=["by name", "by autotuning"])
def test_a_compiled_block_is_one_graph_with_the_same_values(
    monkeypatch, precision, chosen
):
    if DEVICE.type == "cpu":
        round_to_nearest(monkeypatch.setattr)
    block = HourglassBlock(4, 4).to(DEVICE)
    torch.nn.init.normal_(block.w3.weight)
    block.ssm.convolution = way("chunked_triton")
    if chosen:
        block.ssm.convolution = _candidates(75)["chunks of 16, 8 warps"]
    x, c = torch.randn(2, 75, 4, device=DEVICE), torch.randn(2, 4, device=DEVICE)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for side in (block, compiled):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            y = side(x, c)
        gradients = torch.autograd.grad(y.square().sum(), [*block.parameters()])
        results.append([y, *gradients])
    for clear, fast in zip(*results, strict=True):
        assert error(fast, clear.double().cpu()) < 1e-5
    torch._dynamo.reset()


def test_an_image_sees_no_other_and_memory_order_does_not_matter():
    u, modes = torch.randn(2, 5, 3, device=DEVICE), some_modes(3, 2).to(DEVICE)
    both = chunked_triton(u, modes, precision="ieee")
    turned = u.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(chunked_triton(turned, modes, precision="ieee"), both)
    one = chunked_triton(u[1:], modes, precision="ieee")
    assert torch.allclose(one, both[1:], atol=1e-6)


def test_no_image_and_no_position():
    for shape in ((0, 5, 2), (2, 0, 2)):
        u, modes = torch.zeros(shape, requires_grad=True), some_modes(2, 2)
        y = chunked_triton(u, modes.requires_grad_())
        assert y.shape == (*shape[:2], 4)
        gradients = torch.autograd.grad(y.sum(), (u, modes))
        assert gradients[0].shape == shape and not gradients[1].any()


def test_second_derivative_is_refused_rather_than_wrong():
    u = torch.randn(1, 3, 1, device=DEVICE, requires_grad=True)
    y = chunked_triton(u, some_modes(1, 1).to(DEVICE), precision="ieee")
    (gradient,) = torch.autograd.grad(y.square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_what_does_not_fit_is_refused():
    u, modes = torch.zeros(1, 20, 2), some_modes(2, 2)
    with pytest.raises(ValueError, match="precision='fp8': expected one of bf16, tf32"):
        chunked_triton(u, modes, "fp8")
    with pytest.raises(
        TypeError, match="u is torch.float64, modes .*: expected float32 or b"
    ):
        chunked_triton(u.double(), modes)
    with pytest.raises(TypeError, match="modes torch.float64: expected .*and float32"):
        chunked_triton(u, modes.double())
    with pytest.raises(ValueError, match=r"expected \(2, D=1, M\)"):
        chunked_triton(u[..., :1], modes)
    with pytest.raises(ValueError, match="modes has 8 numbers .*expected 2N"):
        chunked_triton(u, modes[..., :-1])
    with pytest.raises(ValueError, match="chunk=24: expected one of 16, 32, 64"):
        chunked_triton(u, modes, chunk=24)
    with pytest.raises(ValueError, match="warps=3: expected one of 4, 8, 16"):
        chunked_triton(u, modes, warps=3)


# What `benchmarks.compiled` found that a program takes, of each (kernel, precision,
# chunk, warps, PASS) at N = 64: kB of shared memory, and bytes of registers that a
# thread spills on sm_80 and sm_90. A card gives one program 99 kB (sm_86, sm_89), 163
# (sm_80) or 227 (sm_90); what needs more does not start there.
RECORD = json.loads((common.RESULTS / "compiled.json").read_text())["rows"]
CHUNKS = [row for row in RECORD if row["what"].startswith("chunks")]
USED = {
    tuple(row["case"]): (
        row["shared memory, sm_80"] / 1024,
        row["spilt, sm_80"],
        row["spilt, sm_90a"],
    )
    for row in CHUNKS
}


@pytest.fixture
def asked(monkeypatch):
    """(precision, chunk, warps) of each call by default and by the autotuning."""
    found = []

    def note(u, modes, *settings):
        found.append(settings)
        return u

    monkeypatch.setattr(segments._ChunkedTriton, "apply", note)
    modes = some_modes(1, 32)
    for dtype in (torch.float32, torch.bfloat16):
        u = torch.zeros(1, 20, 1, dtype=dtype)
        for call in (chunked_triton, partial(chunked_triton, precision="tf32")):
            call(u, modes)
        for name, candidate in _candidates(20).items():
            assert "chunks" in name and candidate(u, modes) is u
    return set(found)


def test_there_is_a_record_of_every_case_that_is_tried(asked):
    walks = {("walk", *one) for one in asked}
    modes = {("modes", kind, chunk, min(w, 8)) for kind, chunk, w in asked}
    assert {key[:4] for key in USED} == walks | modes


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["walk", "modes"])
@pytest.mark.parametrize("precision", ["bf16", "tf32", "tf32x3"])
def test_kernels_use_no_more_of_two_generations_of_gpus(tmp_path, kernel, precision):
    """Down to machine code: tensor cores, and what is recorded for each case."""
    rows = [row for row in CHUNKS if row["case"][:2] == [kernel, precision]]
    assert rows
    for row in rows:  # a pass to the states has no output to multiply for
        least = 8 if row["case"][4] == "to" else 18
        assert all(row[f"tensor cores, {chip}"] >= least for chip in CHIPS)
    compile_again(rows, "of_chunks", tmp_path)


def test_what_is_taken_by_default_fits_any_card(asked):
    """Nothing spilt but by the gradient of the modes in three products; the fastest
    chunks that were measured, 32 positions and 16 warps, take what a Hopper card has.
    """
    default = [("bf16", 16, 8), ("tf32", 16, 8), ("tf32x3", 16, 4)]
    assert asked.issuperset(default)
    for case, (size, *spilt) in USED.items():
        if case[1:4] in default:
            assert size <= 99 and (not any(spilt) or case[:2] == ("modes", "tf32x3"))
    assert 163 < USED["walk", "bf16", 32, 16, ""][0] < 227


def nested_targets(source):
    """Assignments to a tuple in a tuple, in the functions that Triton translates."""
    functions = (x for x in ast.walk(source) if isinstance(x, ast.FunctionDef))
    for function in functions:
        if any("jit" in ast.unparse(mark) for mark in function.decorator_list):
            for line in (x for x in ast.walk(function) if isinstance(x, ast.Assign)):
                inside = [y for x in line.targets for y in getattr(x, "elts", [])]
                if any(isinstance(x, ast.Tuple) for x in inside):
                    yield ast.unparse(line)


def test_kernels_assign_as_the_oldest_triton_reads():
    """Triton 3.6, which comes with PyTorch 2.11, refuses `(a, b), c = ...`."""
    told = ast.parse("@triton.jit\ndef f(): (a, b), c = g(), 1")
    assert list(nested_targets(told)) == ["(a, b), c = (g(), 1)"]
    package = Path(chunked_triton.__code__.co_filename).parent
    found = {
        file.name: list(nested_targets(ast.parse(file.read_text("utf-8"))))
        for file in package.glob("*.py")
    }
    assert found.pop("segments.py") == found.pop("chunked_kernels.py") == []
    assert not any(found.values()), found


@pytest.mark.gpu
@pytest.mark.parametrize("length", [100, 1024, 4096])
@pytest.mark.parametrize(
    "precision, bound", [("ieee", 1e-5), ("tf32x3", 1e-5), ("tf32", 2e-3)]
)
def test_on_a_gpu_errors_are_those_of_the_precision(length, precision, bound):
    assert max(errors(3, length, 40, 32, precision=precision)) < 10 * bound


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("chunk, warps", _CHUNKS)
@pytest.mark.parametrize("precision, bound", [("tf32", 3e-4), ("bf16", 2.5e-3)])
def test_on_a_gpu_the_output_stays_inside_its_bound(
    length, chunk, warps, precision, bound
):
    """As `test_rounding_stays_inside_its_bound`: of a layer as it is at the start, in
    the mean square; in bfloat16, as in training, with what rounding the output adds.
    """
    layer = BidirectionalSSM(8, 64)
    u, modes = rounded_to_bf16(torch.randn(2, length, 8)), modes_of(layer).detach()
    exact = BidirectionalSSM.forward(layer.double(), u.double()).detach()
    dtypes = [torch.float32] + [torch.bfloat16] * (precision == "bf16")
    for dtype in dtypes:
        given = u.to(DEVICE, dtype), modes.to(DEVICE)
        y = chunked_triton(*given, precision, chunk, warps).double().cpu()
        added = (exact.to(dtype).double() - exact).norm() / exact.norm()
        assert (y - exact).norm() / exact.norm() < math.hypot(bound, added), dtype
