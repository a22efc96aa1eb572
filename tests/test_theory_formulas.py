"""Formulas of the site's pages on theory, by dense matrices: a test names the page and the numbers of its formulas."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg as sl

from pint_fem.mgrit import MGRIT
from pint_fem.paradiag import ParaDiag
from pint_fem.theory import two_level_bound
from pint_fem.theory.costs import TwoLevel, mgrit_seconds

PAGES = Path(__file__).resolve().parent.parent / "docs" / "theory"
BENCHMARKS = PAGES.parent / "benchmarks"


def rng(seed=0):
    return np.random.default_rng(seed)


def spd(n, seed):
    A = rng(seed).standard_normal((n, n))
    return A @ A.T + n * np.eye(n)


class Scale:
    """A step that multiplies each entry of the state by a number."""

    def __init__(self, factor):
        self.factor = factor

    def step(self, steps, u, out):
        out[...] = u * self.factor

    def advance(self, first, m, u, out, G):
        for j in range(out.shape[1]):
            out[:, j] = (u if j == 0 else out[:, j - 1]) * self.factor
            if G is not None:
                out[:, j] += G[:, j]


def shift(n):
    return np.eye(n, k=-1)


# -- convergence -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("nu", [0, 1, 2])
def test_error_of_a_cycle(nu):
    """Convergence (1), (2): the solver's cycle is the matrix, whose norms are those of the formulas."""
    lam, mu, m, Nc = 0.9, 0.55, 4, 6
    power, L = lam**m, shift(Nc)
    E = (power - mu) * L @ np.linalg.inv(np.eye(Nc) - mu * L) @ np.linalg.matrix_power(power * L, nu)
    options = {"coarsening": m, "relax": nu, "residual": "none", "max_it": 1, "start": "guess"}
    U = np.zeros((m * Nc + 1, 1))
    U[1:, 0] = before = rng().standard_normal(m * Nc)
    MGRIT([Scale(lam), Scale(mu)], m * Nc, options=options).solve(U)
    np.testing.assert_allclose(U[m::m, 0], E @ before[m - 1 :: m], atol=1e-12)
    bound = lambda count: power**nu * abs(power - mu) * (1 - mu ** (count - nu)) / (1 - mu)
    assert np.isclose(np.abs(E).sum(axis=1).max(), bound(Nc - 1))  # the initial value has no error
    assert np.isclose(two_level_bound(lam, mu, m, Nc, relax="F" + "CF" * nu), bound(Nc))


def test_error_of_weighted_relaxation():
    """Convergence (2): the coefficients of the symbol are those of the product of matrices."""
    lam, mu, m, Nc, nu, weight = 0.8, 0.3, 2, 9, 2, 1.3
    a, b, L = 1 - weight, weight * lam**m, shift(Nc)
    E = (lam**m - mu) * L @ np.linalg.inv(np.eye(Nc) - mu * L) @ np.linalg.matrix_power(a * np.eye(Nc) + b * L, nu)
    c = [0.0]
    for j in range(Nc - 1):
        c.append(mu * c[-1] + math.comb(nu, j) * a ** (nu - j) * b**j)
    np.testing.assert_allclose(E[:, 0], (lam**m - mu) * np.array(c), atol=1e-14)
    zeta = np.exp(2j * np.pi * np.arange(512) / 512)
    symbol = np.abs((lam**m - mu) * zeta * (a + b * zeta) ** nu / (1 - mu * zeta)).max()
    assert np.linalg.norm(E, 2) <= symbol <= two_level_bound(lam, mu, m, relax="FCFCF", weight=weight) * (1 + 1e-12)


def test_residuals_of_a_mode():
    """Convergence (6): those that the solver observes after nested iteration and each cycle."""
    lam, mu, m, Nc, nu = 0.95, 0.7, 4, 8, 1
    G = rng(1).standard_normal((m * Nc, 1))
    options = {"coarsening": m, "relax": "FCF", "rtol": 0, "atol": 0, "max_it": 3, "start": "nested", "check": "cycle"}
    result = MGRIT([Scale(lam), Scale(mu)], m * Nc, options=options, linear=True).solve(np.zeros((m * Nc + 1, 1)), G)
    g = G.reshape(Nc, m) @ lam ** np.arange(m - 1, -1, -1)
    L = shift(Nc)
    T = (lam**m - mu) * L @ np.linalg.inv(np.eye(Nc) - mu * L)
    for k, found in enumerate(result.residuals):
        r = np.linalg.matrix_power(T, k + 1) @ np.linalg.matrix_power(lam**m * L, nu * k) @ g
        assert np.isclose(found, np.linalg.norm(r), rtol=1e-8), k


def test_damped_waves():
    """Convergence (3) to (5): eigenvalues of a pair, the stability function, the bound of norms."""
    s, omega, dt, m, Nc = 1.7, 2.3, 0.1, 2, 8
    kappa = np.linalg.eigvals([[s, -omega], [omega, 0]])
    np.testing.assert_allclose(kappa**2 - s * kappa + omega**2, 0, atol=1e-12)
    K, I = np.array([[s, -omega], [omega, 0]]), np.eye(2)
    Phi, M = np.linalg.inv(I + dt * K), np.linalg.inv(I + m * dt * K)
    np.testing.assert_allclose(sorted(np.linalg.eigvals(Phi), key=np.imag), sorted(1 / (1 + dt * kappa), key=np.imag))
    difference = np.linalg.matrix_power(Phi, m) - M
    E = np.kron(shift(Nc), difference) @ np.linalg.inv(np.eye(2 * Nc) - np.kron(shift(Nc), M))
    bound = sum(np.linalg.norm(difference @ np.linalg.matrix_power(M, j), 2) for j in range(Nc))
    assert np.linalg.norm(E, 2) <= bound


def test_predicted_times():
    """Convergence (7)."""
    B, N, m, s, ranks, cycles = {1: 1.0, 8: 2.0}, 512, 16, 2, 2, 3
    k = math.ceil(N // m / ranks)
    block = 2.0 * math.ceil(k / 8)
    F, C = (m - 1) * block, N // m * s * B[1]
    for relax, nu in (("F", 0), ("FCF", 1)):
        expected = 2 * F + 2 * block + C + cycles * ((1 + nu) * (F + block) + s * block + C)
        assert np.isclose(mgrit_seconds(B, N, ranks, TwoLevel(m, s, relax), cycles), expected)


# -- ParaDiag ----------------------------------------------------------------------------------------------------------
def test_contraction_of_paradiag():
    """ParaDiag (1), (2), (4): the factor of an iteration, and that the solver does this iteration."""
    lam, alpha, N = 0.97, 0.1, 12
    A = np.eye(N) - lam * shift(N)
    P = A.copy()
    P[0, -1] -= alpha * lam
    E = np.eye(N) - np.linalg.solve(P, A)
    rate = alpha * lam**N / (1 - alpha * lam**N)
    assert np.isclose(np.abs(np.linalg.eigvals(E)).max(), rate)
    assert rate <= alpha / (1 - alpha)
    first = E @ np.ones(N)
    np.testing.assert_allclose(first[1:] / first[:-1], lam)  # the shape lam^i
    np.testing.assert_allclose(E @ first, -rate * first, atol=1e-12)
    U, b = np.zeros((N + 1, 1)), rng().standard_normal((N, 1))
    options = {"alpha": alpha, "max_it": 2, "rtol": 0, "atol": 0, "precision": "double"}
    ParaDiag(Scale(lam), N, lambda k, mu, r: r / (1 - mu * lam), options=options).solve(U, b)
    x = np.linalg.solve(P, b)
    np.testing.assert_allclose(U[1:], x + np.linalg.solve(P, b - A @ x), atol=1e-12)
    k, gamma = np.arange(N), alpha ** (np.arange(N) / N)
    mu = alpha ** (1 / N) * np.exp(-2j * np.pi * k / N)
    hat = np.fft.fft(gamma * b[:, 0]) / (1 - mu * lam)
    np.testing.assert_allclose((np.fft.ifft(hat) / gamma).real, x[:, 0], atol=1e-12)


def test_frequency_of_a_step_with_two_stages():
    """ParaDiag (3) for SDIRK2."""
    g, n, dt = 1 - 1 / math.sqrt(2), 5, 0.3
    A, b = np.array([[g, 0], [1 - g, g]]), np.array([1 - g, g])
    M, K, mu = spd(n, 1), spd(n, 2), 0.9 * np.exp(0.7j)
    Z, one = dt * np.linalg.solve(M, K), np.ones(2)
    stages = np.eye(2 * n) + np.kron(A, Z)
    Phi = np.eye(n) - np.kron(b, Z) @ np.linalg.solve(stages, np.kron(one[:, None], np.eye(n)))
    Q = np.poly1d([g * g, 2 * g, 1])
    C = A - np.outer(one, b)
    P = np.poly1d([np.linalg.det(C), np.trace(C), 1])
    inverse = np.eye(n) / (1 - mu * P.coeffs[0] / Q.coeffs[0]) if P.order == 2 else np.eye(n)
    for z in (Q - mu * P).roots:
        S, y = M + g * dt * K, 1 + g * z
        inverse = inverse @ np.linalg.solve(S - y * M, S)
    np.testing.assert_allclose(inverse, np.linalg.inv(np.eye(n) - mu * Phi), atol=1e-10)


# -- adjoints ----------------------------------------------------------------------------------------------------------
class Nonlinear:
    """The steps ``u + h (sin u + z u^2 + B z)`` of two numbers, and the misfit ``sum |u|^4 / 4`` at the points."""

    h, N, B = 0.1, 6, np.array([0.7, -0.4])

    def states(self, z, u0):
        U = [np.asarray(u0, dtype=type(z + 0.0))]
        for _ in range(self.N):
            u = U[-1]
            U.append(u + self.h * (np.sin(u[::-1]) + z * u**2 + self.B * z))
        return U

    def value(self, z, u0):
        return sum((u**4).sum() / 4 for u in self.states(z, u0))

    def u(self, u, z):
        return np.eye(2) + self.h * (np.diag(np.cos(u[::-1])) @ np.eye(2)[::-1] + np.diag(2 * z * u))

    def z(self, u):
        return self.h * (u**2 + self.B)

    def adjoints(self, U, z):
        lam = [U[-1] ** 3]
        for u in U[-2::-1]:
            lam.append(self.u(u, z).T @ lam[-1] + u**3)
        return lam[::-1]

    def gradient(self, z, u0):
        U = self.states(z, u0)
        lam = self.adjoints(U, z)
        return sum(self.z(u) @ lam_next for u, lam_next in zip(U, lam[1:], strict=False)), lam[0]


def test_gradient_and_hessian_action():
    """Adjoints (1) to (3), against derivatives by complex steps."""
    p, z, u0, dz, tiny = Nonlinear(), 0.3, np.array([0.5, -0.8]), 1.3, 1e-30
    gradient, initial = p.gradient(z, u0)
    assert np.isclose(gradient, p.value(z + 1j * tiny, u0 + 0j).imag / tiny)
    step = [p.value(z + 0j, u0 + 1j * tiny * e).imag / tiny for e in np.eye(2)]
    np.testing.assert_allclose(initial, step)
    U = p.states(z, u0)
    lam, delta = p.adjoints(U, z), [np.zeros(2)]
    for u in U[:-1]:
        delta.append(p.u(u, z) @ delta[-1] + p.z(u) * dz)
    mu, action = 3 * U[-1] ** 2 * delta[-1], 0.0
    for u, du, nxt in zip(U[-2::-1], delta[-2::-1], lam[:0:-1], strict=True):
        D_u = p.h * (np.eye(2)[::-1].T @ (-np.sin(u[::-1]) * du[::-1] * nxt) + (2 * dz * u + 2 * z * du) * nxt)
        action += p.z(u) @ mu + 2 * p.h * (u * du) @ nxt
        mu = p.u(u, z).T @ mu + 3 * u**2 * du + D_u
    assert np.isclose(action, dz * p.gradient(z + 1j * tiny, u0 + 0j)[0].imag / tiny)


def test_stages_of_a_step():
    """Adjoints (4), (5): stage values are a Runge-Kutta method, and an eliminated field is that of the whole system."""
    g, n, dt = 1 - 1 / math.sqrt(2), 4, 0.2
    A, b = np.array([[g, 0], [1 - g, g]]), np.array([1 - g, g])
    M, K, f, u0 = spd(n, 3), spd(n, 4), rng(5).standard_normal((2, n)), rng(6).standard_normal(n)
    k = np.linalg.solve(
        np.kron(np.eye(2), M) + dt * np.kron(A, K), np.concatenate([f[0] - K @ u0, f[1] - K @ u0])
    ).reshape(2, n)
    d, alpha, beta = [], A / np.diag(A), b / np.diag(A)
    for i in range(2):
        W = u0 + sum(alpha[i, j] * d[j] for j in range(i))
        h = A[i, i] * dt
        d.append(np.linalg.solve(M + h * K, M @ W + h * f[i]) - W)
    np.testing.assert_allclose(u0 + beta @ d, u0 + dt * b @ k)
    np.testing.assert_allclose(W + d[-1], u0 + dt * b @ k)  # stiffly accurate
    Ma, Mb, Ka = spd(n, 7), spd(3, 8), spd(n, 9)
    G, D = (rng(i).standard_normal(s) for i, s in ((10, (n, 3)), (11, (3, n))))
    Wa, Wb, fa, fb, h = u0, *(rng(i).standard_normal(s) for i, s in ((12, 3), (13, n), (14, 3))), 0.3
    X, ra, rb = np.linalg.solve(Mb, D), Ma @ Wa + h * fa, Wb + np.linalg.solve(Mb, h * fb)
    a = np.linalg.solve(Ma + h * Ka - h**2 * G @ X, ra - h * G @ rb)
    whole = np.linalg.solve(np.block([[Ma + h * Ka, h * G], [h * D, Mb]]), np.concatenate([ra, Mb @ Wb + h * fb]))
    np.testing.assert_allclose(np.concatenate([a, rb - h * X @ a]), whole, atol=1e-10)


def test_primal_dual_operator():
    """Adjoints (9): the second derivative of total variation where the dual field is exact, semidefinite elsewhere."""
    m, eps = np.array([0.4, -0.3]), 1e-2
    N = math.sqrt(m @ m + eps)
    p = m / N
    operator = lambda w: (np.eye(2) - (np.outer(w, p) + np.outer(p, w)) / 2) / N
    tiny = 1e-6
    value = lambda x: np.sqrt(x @ x + eps)
    second = [[(value(m + tiny * (a + b)) - value(m + tiny * (a - b)) - value(m - tiny * (a - b))
                + value(m - tiny * (a + b))) / (4 * tiny**2) for a in np.eye(2)] for b in np.eye(2)]  # fmt: skip
    np.testing.assert_allclose(operator(p), second, rtol=1e-3)
    w = rng().standard_normal((100, 2))
    w /= np.maximum(1, np.linalg.norm(w, axis=1, keepdims=True))
    assert min(np.linalg.eigvalsh(operator(x)).min() for x in w) >= 0


# -- inexactness and preconditioners -----------------------------------------------------------------------------------
def test_symmetric_model():
    """Inexactness (7), (8): symmetric for any number of iterations, exact in the limit."""
    n, m = 6, 3
    A = np.eye(n) - np.kron(shift(3), 0.9 * np.eye(2))
    P = A + 0.1 * rng(1).standard_normal((n, n))
    B, C, R = rng(2).standard_normal((n, m)), spd(n, 3), spd(m, 4)
    E, Et = np.eye(n) - np.linalg.solve(P, A), np.eye(n) - np.linalg.solve(P.T, A.T)
    exact = B.T @ np.linalg.solve(A.T, C @ np.linalg.solve(A, B)) + R
    errors = []
    for K in (1, 2, 4):
        MK = sum(np.linalg.matrix_power(E, j) for j in range(K)) @ np.linalg.inv(P)
        MKt = sum(np.linalg.matrix_power(Et, j) for j in range(K)) @ np.linalg.inv(P.T)
        np.testing.assert_allclose(MKt, MK.T, atol=1e-12)
        H = B.T @ MK.T @ C @ MK @ B + R
        np.testing.assert_allclose(H, H.T, atol=1e-11)
        assert np.linalg.eigvalsh(H).min() > 0
        errors.append(np.linalg.norm(H - exact))
    assert errors[2] < errors[1] < errors[0]


def test_low_rank_preconditioner():
    """Optimisers (2)."""
    n, r, m, c = 8, 3, 2.0, 0.5
    R, Y = spd(n, 1), rng(2).standard_normal((n, r))
    A = Y @ Y.T + 1e-3 * spd(n, 4)
    Q = np.linalg.qr(rng(3).standard_normal((n, r)))[0]
    A_hat = A @ Q @ np.linalg.pinv(Q.T @ A @ Q) @ Q.T @ A
    theta, V = sl.eigh(A_hat, R)
    theta, V = theta[-r:], V[:, -r:]
    np.testing.assert_allclose(A_hat, R @ V @ np.diag(theta) @ V.T @ R, atol=1e-8)
    P = (np.linalg.inv(R) - V @ np.diag(m * theta / (c + m * theta)) @ V.T) / c
    np.testing.assert_allclose(P, np.linalg.inv(m * A_hat + c * R), atol=1e-8)
    spectrum = np.linalg.eigvals(P @ (m * A + c * R)).real
    assert 1 - 1e-8 <= spectrum.min()
    assert spectrum.max() <= 1 + m / c * sl.eigh(A - A_hat, R, eigvals_only=True).max() + 1e-8


# -- linear inverse problems -------------------------------------------------------------------------------------------
def inverse_problem(n=4, m=7):
    r = rng(20)
    F, Gamma, N = r.standard_normal((m, n)), np.linalg.inv(spd(n, 21)), np.diag(r.uniform(0.5, 2, m))
    return F, Gamma, N, r.standard_normal(n), r.standard_normal(m)


def direct(F, Gamma, N, m0, r, alpha):
    precision = F.T @ np.linalg.solve(N, F) + alpha * np.linalg.inv(Gamma)
    return m0 + np.linalg.solve(precision, F.T @ np.linalg.solve(N, r)), np.linalg.inv(precision)


def test_responses():
    """Linear inverse problems (1), (3): lags of one adjoint sweep, by FFT."""
    n, N = 3, 6
    Phi, G, h = 0.5 * rng(1).standard_normal((n, n)), rng(2).standard_normal((n, 2)), rng(3).standard_normal(n)
    z, u = rng(4).standard_normal((N, 2)), np.zeros(n)
    lam, read = [h], []
    for i in range(N):
        lam.append(Phi.T @ lam[-1])
        u = Phi @ u + G @ z[i]
        read.append(h @ u)
    p = np.array([G.T @ x for x in lam[:N]])
    np.testing.assert_allclose(read, [sum(p[k - 1 - i] @ z[i] for i in range(k)) for k in range(1, N + 1)])
    T = 2 * N
    y = np.fft.irfft((np.fft.rfft(p, T, axis=0) * np.fft.rfft(z, T, axis=0)).sum(axis=1), T)[:N]
    np.testing.assert_allclose(y, read, atol=1e-12)


@pytest.mark.parametrize("space", ["data", "parameters"])
def test_posterior(space):
    """Linear inverse problems (5), in both spaces, with reduced rows."""
    F, Gamma, N, m0, r = inverse_problem()
    alpha, A = 0.7, np.linalg.inv(Gamma)
    if space == "data":
        Q, C = np.linalg.qr(F)
        T = np.linalg.cholesky(Q.T @ np.linalg.solve(N, Q))
        theta, U = np.linalg.eigh(T.T @ C @ Gamma @ C.T @ T)
        W, S = U.T @ T.T @ C @ Gamma, np.ones(len(theta))
        beta = U.T @ np.linalg.solve(T, Q.T @ np.linalg.solve(N, r))
    else:
        theta, V = sl.eigh(F.T @ np.linalg.solve(N, F), A)
        W, S, beta = V.T, theta, V.T @ F.T @ np.linalg.solve(N, r)
    mean, covariance = direct(F, Gamma, N, m0, r, alpha)
    np.testing.assert_allclose(m0 + W.T @ (beta / (alpha + theta)), mean)
    np.testing.assert_allclose((Gamma - W.T @ np.diag(S / (alpha + theta)) @ W) / alpha, covariance)


def test_sums_over_the_spectrum():
    """Linear inverse problems (6)."""
    F, Gamma, N, m0, r = inverse_problem()
    alpha, m = 0.4, len(r)
    half, e = np.linalg.cholesky(Gamma), r / np.sqrt(np.diag(N))
    left, singular, _ = np.linalg.svd(F @ half / np.sqrt(np.diag(N))[:, None], full_matrices=False)
    c, lam = left.T @ e, singular**2
    f = alpha / (alpha + lam)
    mean, _ = direct(F, Gamma, N, m0, r, alpha)
    misfit = (r - F @ (mean - m0)) / np.sqrt(np.diag(N))
    assert np.isclose(misfit @ misfit, e @ e - c @ c + (f**2 * c**2).sum())
    assert np.isclose((mean - m0) @ np.linalg.solve(Gamma, mean - m0), (lam * c**2 / (alpha + lam) ** 2).sum())
    K = F @ Gamma @ F.T / alpha + N
    evidence = r @ np.linalg.solve(K, r) + np.linalg.slogdet(K)[1] + m * np.log(2 * np.pi)
    formula = e @ e - c @ c + (f * c**2).sum() - np.log(f).sum() + np.log(np.diag(N)).sum() + m * np.log(2 * np.pi)
    assert np.isclose(evidence, formula)


@pytest.mark.parametrize("p", [2, 5])
def test_readings_as_they_come_in(p):
    """Linear inverse problems (7)."""
    F, Gamma, N, m0, r = inverse_problem()
    alpha = 0.6
    L = np.linalg.cholesky(F @ Gamma @ F.T / alpha + N)
    V, y = np.linalg.solve(L, F @ Gamma / alpha)[:p], np.linalg.solve(L, r)[:p]
    mean, covariance = direct(F[:p], Gamma, N[:p, :p], m0, r[:p], alpha)
    np.testing.assert_allclose(m0 + V.T @ y, mean)
    np.testing.assert_allclose(Gamma / alpha - V.T @ V, covariance)


def test_gains_of_sensors():
    """Linear inverse problems (8)."""
    F, Gamma, N, *_ = inverse_problem()
    M = spd(len(Gamma), 5)
    B = F / np.sqrt(np.diag(N))[:, None]
    G, H = B @ Gamma @ B.T, B @ Gamma @ M @ Gamma @ B.T
    _, covariance = direct(F, Gamma, N, 0, np.zeros(len(F)), 1.0)
    gain = (np.linalg.slogdet(Gamma)[1] - np.linalg.slogdet(covariance)[1]) / 2
    assert np.isclose(gain, np.linalg.slogdet(np.eye(len(G)) + G)[1] / 2)
    assert np.isclose(np.trace(M @ (Gamma - covariance)), np.trace(np.linalg.solve(np.eye(len(G)) + G, H)))


# -- KKT systems -------------------------------------------------------------------------------------------------------
def kkt(Phi, Psi, Q, R, N, sign=0):
    """The matrix of (1) for all steps, or with the skew-circulant ends (``sign=1``)."""
    wrap = np.zeros((N, N))
    wrap[0, -1] = -sign
    A = np.eye(N * len(Phi)) - np.kron(shift(N) + wrap, Phi)
    At = np.eye(N * len(Phi)) - np.kron((shift(N) + wrap).T, Phi.T)
    I, Z = np.eye(N), lambda a, b: np.zeros((N * a, N * b))
    n, m = Psi.shape
    return np.block([
        [A, -np.kron(I, Psi), Z(n, n)],
        [-np.kron(I, Q), Z(n, m), At],
        [Z(m, n), np.kron(I, R), np.kron(I, Psi.T)],
    ])  # fmt: skip


def test_kkt_systems():
    """KKT systems (1) to (4): the transform, the frequencies, the ends of time."""
    n, m, N = 3, 2, 4
    Phi, Psi, Q, R = 0.4 * rng(1).standard_normal((n, n)), rng(2).standard_normal((n, m)), spd(n, 3), spd(m, 4)
    K, P = (kkt(Phi, Psi, Q, R, N, sign) for sign in (0, 1))
    rhs = rng(5).standard_normal(len(K))
    x, parts = np.linalg.solve(P, rhs), (N * n, N * (n + m))
    u, z, lam = (v.reshape(N, -1) for v in np.split(x, parts))
    a, b, c = (v.reshape(N, -1) for v in np.split(rhs, (N * n, 2 * N * n)))
    for k in range(N):
        w = np.exp(-1j * np.pi * (2 * k + 1) * np.arange(1, N + 1) / N)
        hat = lambda v, w=w: w @ v
        mu = np.exp(-1j * np.pi * (2 * k + 1) / N)
        Ak = np.eye(n) - mu * Phi
        np.testing.assert_allclose(Ak @ hat(u) - Psi @ hat(z), hat(a), atol=1e-10)
        np.testing.assert_allclose(Ak.conj().T @ hat(lam) - Q @ hat(u), hat(b), atol=1e-10)
        np.testing.assert_allclose(R @ hat(z) + Psi.T @ hat(lam), hat(c), atol=1e-10)
        G, u0 = np.linalg.solve(Ak, Psi), np.linalg.solve(Ak, hat(a))
        few = np.linalg.solve(R + G.conj().T @ Q @ G, hat(c) - G.conj().T @ (hat(b) + Q @ u0))
        np.testing.assert_allclose(few, hat(z), atol=1e-10)
    # y of a solution, and E that writes it to the first equation of the state and the last one of the adjoint
    Y, E = np.zeros((2 * n, len(K))), np.zeros((len(K), 2 * n))
    Y[:n, (N - 1) * n : N * n], Y[n:, N * (n + m) : N * (n + m) + n] = Phi, Phi.T
    E[:n, :n], E[2 * N * n - n : 2 * N * n, n:] = np.eye(n), np.eye(n)
    G = Y @ np.linalg.solve(P, E)
    y = np.linalg.solve(np.eye(2 * n) - G, Y @ x)
    np.testing.assert_allclose(np.linalg.solve(P, rhs + E @ y), np.linalg.solve(K, rhs), atol=1e-9)


# -- lanes -------------------------------------------------------------------------------------------------------------
def test_bytes_of_lanes():
    """Lanes (1): the bytes in the table of measurements follow from those of one and of eight lanes."""
    text = (BENCHMARKS / "lanes.md").read_text()
    for section in text.split("\n### ")[1:]:
        rows = re.findall(r"^\| triangular solves \| (\d+) \| \S+ \| (\S+) \| (\S+) \|", section, re.MULTILINE)
        if not rows:
            continue
        width, _, size = (np.array([float(row[i]) for row in rows]) for i in range(3))
        shared, own = np.linalg.solve([[1 / width[0], 1], [1 / width[1], 1]], size[:2])
        np.testing.assert_allclose(shared / width + own, size, rtol=1e-2)


# -- networks ----------------------------------------------------------------------------------------------------------
def test_adjoint_of_layers():
    """Networks (3)."""
    h, N, w, tiny = 0.3, 4, 3, 1e-30
    L, b = rng(1).standard_normal((N, w, w)), rng(2).standard_normal((N, w))

    def states(L, b):
        u = [np.ones(w) * (1 + 0j)]
        for n in range(N):
            u.append(u[-1] + h * np.tanh(L[n] @ u[-1] + b[n]))
        return u

    u = states(L, b)
    lam = u[-1].copy()  # of the loss |u_N|^2 / 2
    for n in reversed(range(N)):
        slope = (1 - np.tanh(L[n] @ u[n] + b[n]) ** 2) * lam
        for place in ((0, 0), (2, 1)):
            moved = L.astype(complex)
            moved[(n, *place)] += 1j * tiny
            end = states(moved, b)[-1]
            assert np.isclose((h * slope[place[0]] * u[n][place[1]]).real, (end @ end / 2).imag / tiny)
        lam = lam + h * L[n].T @ slope
