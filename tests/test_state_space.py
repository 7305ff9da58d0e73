"""Ch. "State spaces": two discretisations, three initialisations, the recurrence."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.special
import torch

from diffussm.state_space import (
    discretize_bilinear,
    discretize_zoh,
    hippo_legs,
    s4d_inv,
    s4d_legs,
    s4d_lin,
    scan,
)

RULES = [discretize_zoh, discretize_bilinear]
INITS = [s4d_lin, s4d_inv, s4d_legs]
A3 = torch.tensor([-0.5 + 1j, -0.3 + 4j, -0.9 + 7j], dtype=torch.complex128)
C3 = torch.tensor([0.4 - 1j, 0.8 + 0.1j, -0.6j], dtype=torch.complex128)


def solve(u, t_end, pieces=1):
    """y(t_end) by an adaptive Runge-Kutta method; the input is u(t, piece)."""
    x, width = np.zeros(3, complex), t_end / pieces
    for p in range(pieces):
        x = scipy.integrate.solve_ivp(
            lambda t, x, p=p: A3.numpy() * x + u(t, p),
            (p * width, (p + 1) * width), x, method="DOP853", rtol=1e-12, atol=1e-13,
        ).y[:, -1]  # fmt: skip
    return 2 * (C3.numpy() * x).sum().real


def test_zero_order_hold_is_exact_for_an_input_that_holds():
    held = np.random.default_rng(0).standard_normal(6)
    truth = solve(lambda t, p: held[p], 3.0, pieces=6)
    for per_piece in (1, 5, 40):
        u = torch.from_numpy(np.repeat(held, per_piece))
        y = scan(*discretize_zoh(A3, 1.0, 0.5 / per_piece), C3, u)
        assert abs(float(y[-1]) - truth) < 1e-10


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("sample", "order"), [("end", 1), ("mean", 2)])
def test_order_of_convergence_for_a_smooth_input(rule, sample, order):
    def u(t):
        return np.sin(2 * t) + np.cos(3 * t)

    truth = solve(lambda t, p: u(t), 2.0)
    steps, errors = 2.0 ** -np.arange(6, 10), []
    for dt in steps:
        t = dt * np.arange(1, round(2 / dt) + 1)
        inputs = u(t) if sample == "end" else (u(t) + u(t - dt)) / 2
        errors.append(
            abs(
                float(scan(*rule(A3, 1.0, float(dt)), C3, torch.from_numpy(inputs))[-1])
                - truth
            )
        )
    assert np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(
        order, abs=0.1
    )


def test_zero_order_hold_is_the_matrix_exponential_of_the_augmented_system():
    A, B, dt = -0.7 + 3j, 0.2 - 1.1j, 0.13
    whole = scipy.linalg.expm(dt * np.array([[A, B], [0, 0]]))
    dA, dB = discretize_zoh(*torch.tensor([[A], [B]], dtype=torch.complex128), dt)
    assert complex(dA[0]) == pytest.approx(whole[0, 0], abs=1e-12)
    assert complex(dB[0]) == pytest.approx(whole[0, 1], abs=1e-12)


def test_zero_order_hold_keeps_its_digits_in_float32_and_at_zero():
    A = torch.complex(
        -torch.rand(500, dtype=torch.float64), torch.rand(500, dtype=torch.float64)
    )
    exact = discretize_zoh(A, 1.0, 1e-4)[1]
    single = discretize_zoh(A.to(torch.complex64), 1.0, 1e-4)[1]
    assert ((single - exact).abs() / exact.abs()).max() < 5e-7
    A = torch.zeros(1, dtype=torch.complex128, requires_grad=True)
    dA, dB = discretize_zoh(A, 2.0, 0.3)
    assert dA.item() == 1 and dB.item() == pytest.approx(0.6)
    (slope,) = torch.autograd.grad(
        dB.real.sum(), A
    )  # d/dA of dt B (1 + dt A / 2 + ...)
    assert slope.item() == pytest.approx(0.3**2)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_the_discretisations_match_finite_differences(rule):
    A = A3.clone().requires_grad_()
    dt = torch.tensor([0.1, 0.2, 0.05], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda A, dt: rule(A, 1.0, dt), (A, dt))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("rule", RULES)
def test_every_eigenvalue_is_stable_for_any_step(init, rule):
    for n_state in (2, 16, 64, 128):
        A = init(n_state)
        assert A.shape == (n_state // 2,) and A.dtype == torch.complex128
        assert (A.real == -0.5).all() and (A.imag >= 0).all()
        for dt in np.geomspace(1e-4, 10, 21):
            assert rule(A, 1.0, float(dt))[0].abs().max() < 1


@pytest.mark.parametrize("n_state", [2, 6, 64])
def test_s4d_legs_is_the_spectrum_of_the_normal_part_of_hippo(n_state):
    n = np.arange(n_state)
    dense = np.zeros((n_state, n_state))  # the definition of Gu et al., entry by entry
    for row in n:
        dense[row, row] = -(row + 1)
        for column in range(row):
            dense[row, column] = -math.sqrt((2 * row + 1) * (2 * column + 1))
    np.testing.assert_allclose(hippo_legs(n_state).numpy(), dense, rtol=1e-14)
    p = np.sqrt(n + 0.5)
    normal = dense + np.outer(p, p)
    np.testing.assert_allclose(
        normal @ normal.T, normal.T @ normal, atol=1e-8 * n_state**2
    )
    values = np.linalg.eigvals(normal)
    values = values[values.imag > 0]
    np.testing.assert_allclose(
        s4d_legs(n_state).numpy(), values[np.argsort(values.imag)], rtol=1e-9, atol=1e-9
    )


def test_hippo_kernels_are_warped_legendre_polynomials():
    n = np.arange(10)
    for tau in (0.0, 0.3, 2.0):
        by_matrix = scipy.linalg.expm(tau * hippo_legs(10).numpy()) @ np.sqrt(2 * n + 1)
        s = math.exp(-tau)
        expected = s * np.sqrt(2 * n + 1) * scipy.special.eval_legendre(n, 2 * s - 1)
        np.testing.assert_allclose(by_matrix, expected, atol=1e-10)


def test_s4d_lin_and_inv_follow_their_formulas():
    np.testing.assert_allclose(
        s4d_lin(6).numpy(), [-0.5, -0.5 + 1j * np.pi, -0.5 + 2j * np.pi]
    )
    np.testing.assert_allclose(
        s4d_inv(4).numpy(), [-0.5 + 12j / np.pi, -0.5 + 4j / np.pi / 3]
    )


def test_half_of_the_pairs_and_twice_the_real_part_is_the_whole_real_system():
    rng = np.random.default_rng(1)
    blocks = [np.array([[a.real, -a.imag], [a.imag, a.real]]) for a in A3.numpy()]
    A, dt = scipy.linalg.block_diag(*blocks), 0.1
    B = np.tile([1.0, 0.0], 3)
    C = np.stack([2 * C3.real.numpy(), -2 * C3.imag.numpy()], axis=1).ravel()
    dA = scipy.linalg.expm(dt * A)
    dB = np.linalg.solve(A, (dA - np.eye(6)) @ B)
    u, x, expected = rng.standard_normal(50), np.zeros(6), []
    for value in u:
        x = dA @ x + dB * value
        expected.append(C @ x)
    y = scan(*discretize_zoh(A3, 1.0, dt), C3, torch.from_numpy(u))
    np.testing.assert_allclose(y.numpy(), expected, atol=1e-12)


def test_scan_broadcasts_over_batch_and_channels():
    dA, dB = discretize_zoh(A3.repeat(4, 1), 1.0, 0.1)
    u = torch.randn(2, 4, 20, dtype=torch.float64)
    y = scan(dA, dB, C3.expand(4, 3), u)
    assert y.shape == (2, 4, 20)
    torch.testing.assert_close(y[1, 2], scan(dA[2], dB[2], C3, u[1, 2]))


def test_scan_of_nothing_is_nothing():
    dA, dB = discretize_zoh(A3.repeat(4, 1), 1.0, 0.1)
    y = scan(dA, dB, C3.expand(4, 3), torch.randn(2, 4, 0, dtype=torch.float64))
    assert y.shape == (2, 4, 0) and y.dtype == torch.float64
    assert scan(dA[0], dB[0], C3.expand(4, 3), torch.empty(0)).shape == (4, 0)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("n_state", [0, -2, 3, 64.0, True, "64"])
def test_odd_or_empty_states_are_refused(init, n_state):
    with pytest.raises(
        (TypeError, ValueError), match=rf"n_state={n_state!r}: .*integer"
    ):
        init(n_state)


def test_bad_arguments_are_refused_with_advice():
    with pytest.raises(
        ValueError, match="n_state=0: expected an integer of at least 1"
    ):
        hippo_legs(0)
    for rule in RULES:
        with pytest.raises(TypeError, match="A is torch.float32: expected the complex"):
            rule(torch.ones(3), 1.0, 0.1)
        with pytest.raises(
            ValueError, match="dt=-0.1: expected a finite number above 0"
        ):
            rule(A3, 1.0, -0.1)
    with pytest.raises(ValueError, match=r"\(3,\), \(3,\), \(2,\).*same N/2"):
        scan(A3, A3, C3[:2], torch.ones(5))
    with pytest.raises(ValueError, match="complex64.*real input"):
        scan(A3, A3, C3, torch.ones(5, dtype=torch.complex64))
