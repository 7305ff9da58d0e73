"""Ch. "A recurrence for tensor cores": the chunked kernels, in Triton's interpreter."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not made for this system")
GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

from diffussm.chunked_kernels import chunked_triton  # noqa: E402

DEVICE = torch.device("cuda" if GPU else "cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def some_modes(D, n):
    decay, angle = -0.2 * torch.rand(2, D, n), 3 * torch.rand(2, D, n)
    weights, skip = torch.randn(2, D, 2 * n) / n, torch.randn(2, D, 1)
    return torch.cat([decay, angle, weights, skip], 2)


def modes_of(layer):
    """As the layer has them, in its order: (2, D, 2N + 1)."""
    rows = []
    for kernel, skip in zip(
        (layer.forward_kernel, layer.backward_kernel), layer.skip.chunk(2), strict=True
    ):
        log_dA, w = kernel.discrete()
        parts = log_dA.real, log_dA.imag, w.real, w.imag, skip[:, None]
        rows.append(torch.cat(parts, 1))
    return torch.stack(rows)


def two_sums(u, modes):
    """As matrices of shifts, by the definition: O(L^2)."""
    L, n = u.shape[1], modes.shape[2] // 4
    decay, angle, wr, wi = modes[..., :-1].unflatten(2, (4, n)).unbind(2)
    log_dA, w = torch.complex(decay, angle), torch.complex(wr, wi)
    powers = torch.exp(log_dA[..., None] * torch.arange(L))
    k = 2 * torch.einsum("wdn,wdnl->wdl", w, powers).real
    i, j = torch.arange(L)[:, None], torch.arange(L)[None, :]
    past = torch.where(i >= j, k[0][:, (i - j).clamp(min=0)], 0)
    future = torch.where(j >= i, k[1][:, (j - i).clamp(min=0)], 0)
    sides = [torch.einsum("dij,bjd->bid", m, u) for m in (past, future)]
    return torch.cat(sides, 2) + torch.cat([u, u], 2) * modes[..., -1].flatten()


def with_gradients(function, u, modes, grad):
    leaves = [x.detach().clone().requires_grad_() for x in (u, modes)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y))]


def error(ours, true):
    """The largest difference, relative to the largest entry."""
    assert ours.shape == true.shape
    return float((ours.double().cpu() - true).abs().max() / true.abs().max())


def errors(B, L, D, n, **options):
    u, modes, grad = torch.randn(B, L, D), some_modes(D, n), torch.randn(B, L, 2 * D)
    sides = [x.to(DEVICE) for x in (u, modes, grad)]
    ours = with_gradients(lambda *x: chunked_triton(*x, **options), *sides)
    true = with_gradients(two_sums, u.double(), modes.double(), grad.double())
    each = [ours[2][..., c : c + n] for c in range(0, 4 * n, n)] + [ours[2][..., -1:]]
    exact = [true[2][..., c : c + n] for c in range(0, 4 * n, n)] + [true[2][..., -1:]]
    pairs = [*zip(ours[:2], true[:2], strict=True), *zip(each, exact, strict=True)]
    return [error(*pair) for pair in pairs]


def agree(found):
    assert found[0] < 1e-5 and max(found[1:]) < 1e-4, found


@pytest.mark.parametrize("length, chunk", [(1, 16), (17, 16), (63, 64), (64, 64)])
def test_equals_the_two_sums_and_every_gradient(length, chunk):
    """In float64 by the definition: output to 1e-5, of u and of each kind of mode
    to 1e-4."""
    agree(errors(1, length, 1, 2, precision="ieee", chunk=chunk))


@pytest.mark.slow
@pytest.mark.parametrize(
    "B, length, D, n, chunk",
    [(2, 65, 3, 3, 32), (3, 100, 2, 17, 64), (17, 20, 5, 2, 16), (1, 1000, 1, 32, 64)],
)
def test_equals_the_two_sums_at_odd_sizes(B, length, D, n, chunk):
    """No multiple of the chunk, of 16 images, of the warps, nor of 16 modes."""
    agree(errors(B, length, D, n, precision="ieee", chunk=chunk, warps=4))


@pytest.mark.slow
def test_three_walks_of_sixteen():
    agree(errors(2, 45, 2, 4, precision="ieee", chunk=16))
