"""One-shot on the inversion of a rod's heat source with MGRIT, no finite elements: precise sensors make the Hessian
stiff, so that an error of the gradient that is small against it hides the curvature of a step.
"""

import numpy as np
import pytest

from pint_fem.mgrit import MGRIT
from pint_fem.optimize import minimize_one_shot

STEPS, COARSENING = 32, (4, 2)
GAMMA = 1 - 1 / np.sqrt(2)  # of the L-stable SDIRK2


class Affine:
    """``Phi(u) = A u``; right-hand sides hold the rest."""

    def __init__(self, A):
        self.A = A

    def step(self, steps, u, out):
        out[...] = u @ self.A.T


class Rod:
    """``u' = u'' / 5 + q`` in (0, 1), zero at the ends and at first; 7 sensors at all steps; q static.

    J is the misfit over the variance of the noise and ``(q, q) / 2``, the product being that of H1 times `alpha`.
    """

    def __init__(self, alpha, n=31):
        self.n, h = n, 1 / (n + 1)
        L = (2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)) / h**2
        w, Q = np.linalg.eigh(L)
        self.A, self.F = [], []
        for stride in (1, 4, 8):
            z = -stride / STEPS * 0.2 * w
            R = (1 + (1 - 2 * GAMMA) * z) / (1 - GAMMA * z) ** 2
            self.A.append(Q * R @ Q.T)
            self.F.append(Q * (stride / STEPS * (R - 1) / z) @ Q.T)
        options = {"coarsening": COARSENING, "levels": 3, "rtol": 1e-10, "check": "cycle"}
        self.forward = MGRIT([Affine(A) for A in self.A], STEPS, options=options, linear=True)
        self.backward = MGRIT([Affine(A.T) for A in self.A], STEPS, options=options, linear=True)
        self.U, self.lam, self.cycles = np.zeros((STEPS + 1, n)), np.zeros((STEPS + 1, n)), 0
        self.sensors = np.arange(3, n, 4)
        self.P = alpha * h * (L + np.eye(n))
        x = h * np.arange(1, n + 1)
        clean = self.march(10 * np.exp(-50 * (x - 0.3) ** 2) - 5 * np.exp(-80 * (x - 0.7) ** 2))[:, self.sensors]
        self.sigma = 0.01 * np.abs(clean).max()
        self.data = clean + self.sigma * np.random.default_rng(0).standard_normal(clean.shape)
        self.weight = 1 / (self.sigma**2 * clean[1:].size)

    def march(self, q):
        """The state, one step after another."""
        U = np.zeros((STEPS + 1, self.n))
        for i in range(STEPS):
            U[i + 1] = self.A[0] @ U[i] + self.F[0] @ q
        return U

    def inner(self, a, b):
        """The regularisation's."""
        return float(a @ self.P @ b)

    def sweeps(self, q, **accuracy):
        """State and adjoint; J, g and the larger relative residual."""
        state = self.forward.solve(self.U, np.tile(self.F[0] @ q, (STEPS, 1)), **accuracy)
        g = np.zeros_like(self.U)
        g[1:, self.sensors] = self.weight * (self.U[:, self.sensors] - self.data)[1:]
        self.lam[-1] = g[-1]
        adjoint = self.backward.solve(self.lam[::-1], g[:-1][::-1], **accuracy)
        self.cycles += state.cycles + adjoint.cycles
        misfit = 0.5 / self.weight * (g**2).sum()
        residual = max(r.residuals[-1] / r.scale if r.scale else 0.0 for r in (state, adjoint))
        gradient = q + np.linalg.solve(self.P, self.F[0].T @ self.lam[1:].sum(axis=0))
        return misfit + 0.5 * self.inner(q, q), gradient, residual

    def advance(self, q):
        """One cycle of each."""
        return self.sweeps(q, cycles=1)

    def value(self, q):
        """To the tolerance."""
        return self.sweeps(q)[0]

    def gradient(self, q):
        """To the tolerance."""
        return self.sweeps(q)[1]

    def hessian(self):
        """Of J in the inner product, by marching all unit sources."""
        S = np.array([self.march(e)[1:, self.sensors].ravel() for e in np.eye(self.n)]).T
        return np.eye(self.n) + np.linalg.solve(self.P, self.weight * S.T @ S), S


class Accurate(Rod):
    """Solved to the end at every design."""

    advance = None


@pytest.mark.parametrize(("alpha", "condition"), [(1e-2, 1e3), (1e-4, 1e5), (1e-6, 1e7)])
def test_the_optimum_of_a_stiff_problem(alpha, condition):
    """That of dense linear algebra: H >= 1, so that J is above it by at most |g|^2 / 2. A few cycles for each direction
    of conjugate gradients, whatever the condition; fewer than solving at every design, though four are exact here.
    """
    rod, accurate = Rod(alpha), Accurate(alpha)
    H, S = rod.hessian()
    assert np.linalg.eigvals(H).real.max() > condition
    best = rod.value(np.linalg.solve(H, np.linalg.solve(rod.P, rod.weight * S.T @ rod.data[1:].ravel())))
    rod.U[:], rod.lam[:], rod.cycles = 0, 0, 0
    options = {"gtol_rel": 1e-7, "memory": 30, "max_it": 400, "value_rtol": 1e-9}
    one, two = (minimize_one_shot(problem, np.zeros(rod.n), **options) for problem in (rod, accurate))
    for result in (one, two):
        assert result.converged
        assert -1e-8 < result.value - best < 0.5 * result.gradient_norm**2 + 1e-8
    assert rod.cycles < 100
    if condition < 1e7:  # where the errors of one cycle do not hide most curvatures
        assert rod.cycles < 0.9 * accurate.cycles


def test_a_cycle_contracts_whatever_the_step():
    """The gradient's error after a cycle at a new design is proportional to the step, and the next one takes at least
    a factor 100 off it, the adjoint's lag included.
    """
    rod = Rod(1e-4)
    start, direction = np.ones(rod.n), np.sin(np.arange(rod.n))
    ratios = []
    for length in (1e-3, 1e-1, 10.0):
        rod.sweeps(start)
        z = start + length * direction
        errors = [rod.advance(z)[1] for _ in range(2)]
        exact = Rod(1e-4).gradient(z)
        errors = [np.sqrt(rod.inner(e, e)) / length for e in (g - exact for g in errors)]
        assert errors[1] < errors[0] / 100
        ratios.append(errors[0])
    assert max(ratios) < 1.001 * min(ratios)
