"""Kernels and convolutions as sums that are written out: slow, and independent."""

import numpy as np
import torch

LENGTHS = [1, 2, 3, 5, 16, 31, 64, 100, 257]


def random_system(d_model=3, half_state=4):
    shape = d_model, half_state
    log_dA = torch.complex(-torch.rand(shape).double(), 3 * torch.randn(shape).double())
    return log_dA, torch.randn(d_model, half_state, dtype=torch.complex128)


def loop_kernel(log_dA, weights, length):
    """Powers by repeated multiplication, in numpy."""
    dA, power, rows = (
        np.exp(log_dA.detach().numpy()),
        weights.detach().numpy().copy(),
        [],
    )
    for _ in range(length):
        rows.append(2 * power.real.sum(1))
        power = power * dA
    return torch.from_numpy(np.stack(rows, axis=1))


def two_sums(u, k_forward, k_backward):
    """The sums of k_l u_{i-l} and of k_l u_{i+l}, as matrices of shifts."""
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
