"""The KKT systems of the frequencies of finite element problems: solutions satisfy the equations of the propagator."""

import numpy as np
import pytest
from firedrake import COMM_WORLD, TestFunction, TrialFunction, assemble, dx, inner
from mpi4py import MPI

from pint_fem.evolution.tableaux import DIRK
from pint_fem.kkt.coupled.systems import CoupledSystems
from pint_fem.propagators.linear import LinearPropagator
from tests.heat import heat
from tests.limits import time_limit
from tests.maxwell import cavity
from tests.meshes import square

N = 8


def linear_problem(name):
    """An evolution, and its step."""
    if name == "maxwell":
        evolution, _ = cavity(2, 4, steps=N, eliminate=None, dt=0.1)
    else:
        evolution = heat(square(6, COMM_WORLD), tableau=name, steps=N, dt=0.05, per_step=True)
    return evolution, LinearPropagator(evolution.private())


def by_parts(f, x, *args):
    """A real map of blocks applied to a complex block."""
    return f(np.ascontiguousarray(x.real), *args) + 1j * f(np.ascontiguousarray(x.imag), *args)


class Steps:
    """Phi and Psi on blocks of states, by the propagator's own sweeps, with loads h_i F z."""

    def __init__(self, propagator, F):
        self.p, self.F, (self.z, self.load) = propagator, F, F.createVecs()

    def phi(self, u):
        self.p.apply(u, out := np.empty_like(u))
        return out

    def phi_transposed(self, lam):
        self.p.apply_transposed(lam, out := np.empty_like(lam))
        return out

    def psi(self, z, n):
        loads = np.empty((len(z), n))
        for row, load in zip(z, loads, strict=True):
            self.z.array[:] = row
            self.F.mult(self.z, self.load)
            load[:] = self.load.array_r
        loads[:, self.p.bc_rows] = 0
        h = self.p.steps_of_stage
        self.p.apply(np.zeros_like(loads), out := np.empty_like(loads), lambda rows, i: h[i] * loads[rows])
        return out

    def psi_transposed(self, lam):
        stages = np.zeros((self.p.dirk.stages, *lam.shape))
        self.p.apply_transposed(lam, np.empty_like(lam), stages)
        sums = np.tensordot(self.p.steps_of_stage, stages, 1)
        sums[:, self.p.bc_rows] = 0
        out = np.empty((len(lam), self.z.getLocalSize()))
        for row, total in zip(out, sums, strict=True):
            self.load.array[:] = total
            self.F.multTranspose(self.load, self.z)
            row[:] = self.z.array_r
        return out


def product(X, x):
    source, target = X.createVecs()

    def real(rows):
        out = np.empty((len(rows), target.getLocalSize()))
        for row, result in zip(rows, out, strict=True):
            source.array[:] = row
            X.mult(source, target)
            result[:] = target.array_r
        return out

    return by_parts(real, x)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("name", ["BE", "midpoint", "SDIRK2", "maxwell"])
@time_limit(200)
def test_solutions_satisfy_the_equations_of_the_propagator(name):
    """Dirichlet conditions on a side, mixed states, and any number of ranks in space; Q of gradients is H1 in space."""
    evolution, propagator = linear_problem(name)
    V, dt = evolution.V, propagator.dt
    u, v = TrialFunction(V), TestFunction(V)
    matrix = lambda form: assemble(form, mat_type="aij").petscmat
    M, K = map(matrix, evolution.linear_operators())
    mass = matrix(inner(u, v) * dx)
    Q = mass.copy()
    if name != "maxwell":
        Q.axpy(0.1, K)
    Q.scale(dt)
    R, R_time, F = mass.copy(), mass.copy(), mass.copy()
    R.scale(1e-4 * dt)
    R_time.scale(1e-6 * dt)
    free = np.ones(evolution.state_size, bool)
    free[propagator.bc_rows] = False
    systems = CoupledSystems(DIRK(propagator.tableau), N, M, K, F, Q, R, dt=dt, R_time=R_time, free=free)
    k = np.arange(N // 2)
    mu = np.exp(-1j * np.pi * (2 * k + 1) / N)
    rng = np.random.default_rng(COMM_WORLD.rank)
    shape = len(k), len(free)
    a, b, c = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape) for _ in range(3))
    u, z, lam = systems.solve_all(range(len(k)), mu, a, b, c)
    steps, mu = Steps(propagator, F), mu[:, None]
    regularisation = product(R, z) + np.abs(1 - mu) ** 2 / dt**2 * product(R_time, z)
    residuals = [
        u - mu * by_parts(steps.phi, u) - by_parts(steps.psi, z, len(free)) - a,
        lam - mu.conj() * by_parts(steps.phi_transposed, lam) - product(Q, u) - b,
        regularisation + by_parts(steps.psi_transposed, lam) - c,
    ]
    for residual, scale in zip(residuals, (u, lam, c), strict=True):
        assert np.abs(residual).max(initial=0) <= 1e-9 * COMM_WORLD.allreduce(np.abs(scale).max(initial=0), op=MPI.MAX)
    assert systems.factorisations == len(k)
    systems.release()
