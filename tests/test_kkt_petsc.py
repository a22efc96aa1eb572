"""The KKT system as a matrix of PETSc: Krylov methods against dense algebra, options, and what is refused."""

import numpy as np
import pytest
from mpi4py import MPI

import pint_fem as pf
from pint_fem.kkt.petsc import solve_kkt
from tests.kkt_problems import circulant, convection, operator_of
from tests.limits import time_limit

COMM = MPI.COMM_WORLD
ALONE = "1x1"


def alone(**given):
    return convection(pf.SpaceTime(ALONE, comm=MPI.COMM_SELF), n=3, steps=6, **given).problem


def dense(problem, a, b, c):
    """The solution by numpy: steps of unit vectors, and the matrices of misfits and regularisation."""
    sweeps, layout = problem.sweeps, problem.layout
    propagator, n, N = sweeps.propagators[0], sweeps.evolution.state_size, sweeps.evolution.nsteps
    Phi, data = np.empty((n, n)), sweeps.data(layout.steps(np.zeros(layout.size)))
    propagator.apply(np.eye(n), Phi)
    Phi = Phi.T
    operator = operator_of(problem)
    nz = layout.size
    Psi, R = np.empty((N * n, nz)), np.empty((nz, nz))
    for j, unit in enumerate(np.eye(nz)):
        Psi[:, j] = np.ravel(propagator.control_forcing(data, layout.steps(unit)))
        R[:, j] = operator._control_hessian(unit)
    A = np.eye(N * n) - np.kron(np.diag(np.ones(N - 1), -1), Phi)
    Q = np.zeros((N * n, N * n))
    for misfit in problem.misfits:
        matrix, weights = misfit.second_derivative()
        Q += np.kron(np.diag(weights[1:]), matrix[:, :])
    O = np.zeros
    K = np.block([[A, -Psi, O((N * n, N * n))], [-Q, O((N * n, nz)), A.T], [O((nz, N * n)), R, Psi.T]])
    x = np.linalg.solve(K, np.concatenate([a.ravel(), b.ravel(), c]))
    return np.split(x, [N * n, N * n + nz])


def right_hand_sides(problem, seed=0):
    """Of all steps, with controls one after another."""
    rng = np.random.default_rng(seed)
    N, n = problem.sweeps.evolution.nsteps, problem.sweeps.evolution.state_size
    return rng.standard_normal((N, n)), rng.standard_normal((N, n)), rng.standard_normal(problem.layout.size)


def own_parts(problem, whole, x):
    """The parts of states and flat controls of the whole of time on this rank."""
    lo, hi = problem.sweeps.slab.lo, problem.sweeps.slab.hi
    N = problem.sweeps.evolution.nsteps
    states = [np.reshape(v, (N, -1))[lo:hi] for v in x[::2]]
    z = np.empty(problem.layout.size)
    for control, other in zip(problem.layout.evolution.controls, whole.layout.evolution.controls, strict=True):
        values = whole.layout.part(x[1], other)
        problem.layout.part(z, control)[...] = values[lo:hi] if control in problem.layout.evolution.stepwise else values
    return states[0], z, states[1]


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("static", [False, True])
@time_limit(200)
def test_solutions_are_those_of_numpy(static):
    """Without and with a preconditioner; static controls are unknowns of the first rank in time."""
    whole = alone(static=static)
    a, b, c = right_hand_sides(whole)
    exact = dense(whole, a, b, c)
    problem = convection(pf.SpaceTime((1, COMM.size)), n=3, steps=6, static=static).problem
    u, z, lam = own_parts(problem, whole, exact)
    own = own_parts(problem, whole, (a, c, b))
    given = own[0], own[2], own[1]
    operator, kkt = operator_of(problem), None if static else circulant(problem)
    methods = [({}, None), ({"ksp_type": "minres"}, None)]
    methods += [] if static else [({}, kkt), ({"ksp_type": "gmres"}, kkt), ({"ksp_type": "minres"}, kkt)]
    iterations = []
    for parameters, system in methods:
        parameters |= {"ksp_rtol": 1e-12, "ksp_max_it": 3000, "ksp_gmres_restart": 600}
        found = solve_kkt(operator, system, *given, solver_parameters=parameters)
        iterations.append(found.iterations)
        for got, expected, every in zip(found[:3], (u, z, lam), exact, strict=True):
            assert np.abs(got - expected).max() <= 1e-7 * np.abs(every).max()
        assert found.reason == "CONVERGED_RTOL"
        assert found.residuals[-1] <= 1e-12 * found.residuals[0]
    if not static:
        # K - P has the rank 2 n, and the scale of states at one end
        assert max(iterations[2:4]) <= 40 < iterations[0] / 4
        assert iterations[4] <= 80 < iterations[1]
