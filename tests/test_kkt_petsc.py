"""The KKT system as a matrix of PETSc: Krylov methods against dense algebra, options, and what is refused."""

import numpy as np
import pytest
from firedrake.petsc import PETSc
from mpi4py import MPI

import pint_fem as pf
from pint_fem.all_at_once.stopping import DivergedError
from pint_fem.errors import InputError, SolverFailure
from pint_fem.kkt.petsc import kkt_matrix, solve_kkt
from tests.kkt_problems import circulant, convection, operator_of
from tests.limits import time_limit

COMM = MPI.COMM_WORLD
SMALL = {"n": 2, "steps": 4}


def alone(**given):
    return convection(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), **SMALL, **given).problem


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
    problem = convection(pf.SpaceTime((1, COMM.size)), **SMALL, static=static).problem
    u, z, lam = own_parts(problem, whole, exact)
    own = own_parts(problem, whole, (a, c, b))
    given = own[0], own[2], own[1]
    operator, kkt = operator_of(problem), None if static else circulant(problem)
    methods = [({}, None)] if static else [({}, None), ({}, kkt), ({"ksp_type": "minres"}, kkt)]
    iterations = []
    for parameters, system in methods:
        parameters |= {"ksp_rtol": 1e-10, "ksp_gmres_restart": 200}
        found = solve_kkt(operator, system, *given, solver_parameters=parameters)
        iterations.append(found.iterations)
        for got, expected, every in zip(found[:3], (u, z, lam), exact, strict=True):
            assert np.abs(got - expected).max() <= 1e-8 * np.abs(every).max()
        assert found.reason == "CONVERGED_RTOL"
        assert found.residuals[-1] <= 1e-10 * found.residuals[0]
    if not static:
        # the circulant system differs from the KKT system in a matrix of rank 2 n
        assert iterations[1] <= 2 * problem.sweeps.evolution.state_size + 1 < iterations[0]
        assert iterations[2] < iterations[0] / 2


@pytest.mark.parallel(4)
@time_limit(200)
def test_a_newton_step_on_a_grid_of_space_and_time():
    """The derivative by sequential sweeps vanishes after the step."""
    problem = convection(pf.SpaceTime("2x2")).problem
    g = problem.derivative(np.zeros(problem.layout.size))
    step = solve_kkt(operator_of(problem), circulant(problem), c=-g, solver_parameters={"ksp_rtol": 1e-12})
    after = problem.derivative(step.z)
    size = lambda x: np.sqrt(COMM.allreduce(float(np.sum(x**2))))
    assert size(after) <= 1e-8 * size(g)


class AtSomeSteps(pf.RunningMisfit):
    """A running misfit at every second step, with three times the weight at the fourth."""

    def weights(self):
        points = np.arange(self.slab.lo, self.slab.hi + 1)
        return super().weights() * (points % 2 == 0) * (1 + 2 * (points == 4))


def test_misfits_at_some_steps_are_preconditioned_by_the_circulant_system_of_their_mean():
    problem = alone(misfit=AtSomeSteps)
    operator, kkt = operator_of(problem), circulant(problem)
    assert not kkt.model.is_invariant
    a, b, c = right_hand_sides(problem)
    exact = dense(problem, a, b, c)
    parameters = {"ksp_rtol": 1e-10}
    found = solve_kkt(operator, kkt, a, b, c, solver_parameters=parameters)
    for got, expected in zip(found[:3], exact, strict=True):
        assert np.abs(np.ravel(got) - expected).max() <= 1e-8 * np.abs(expected).max()
    plain = solve_kkt(operator, None, a, b, c, solver_parameters=parameters)
    assert found.iterations < plain.iterations / 2


def test_the_matrix_is_symmetric():
    operator = operator_of(alone())
    matrix = kkt_matrix(operator)
    x, y = matrix.createVecs()
    images = []
    for seed in (1, 2):
        x.array[:] = np.random.default_rng(seed).standard_normal(x.getLocalSize())
        matrix.mult(x, y)
        images.append((x.array_r.copy(), y.array_r.copy()))
    (x1, y1), (x2, y2) = images
    assert x1 @ y2 == pytest.approx(x2 @ y1, rel=1e-11)
    assert np.abs(y1).max() > 0


def test_minres_requires_a_misfit_at_all_steps():
    problem = alone(tracked=0.0)
    with pytest.raises(InputError, match=r"minres requires a positive definite .* no misfit acts at all steps"):
        solve_kkt(operator_of(problem), circulant(problem), solver_parameters={"ksp_type": "minres"})


class Database:
    """Options in PETSc's database, removed afterwards."""

    def __init__(self, **options):
        self._options = options

    def __enter__(self):
        for name, value in self._options.items():
            PETSc.Options().setValue(name, value)

    def __exit__(self, *_):
        for name in self._options:
            PETSc.Options().delValue(name)


def test_options_of_the_database_precede_parameters_and_monitors_print(capfd):
    problem = alone()
    operator, kkt = operator_of(problem), circulant(problem)
    a, b, c = right_hand_sides(problem)
    parameters = {"ksp_type": "gmres", "ksp_rtol": 1e-3}
    loose = solve_kkt(operator, kkt, a, b, c, solver_parameters=parameters)
    assert loose.residuals[-1] > 1e-8 * loose.residuals[0]
    with Database(kkt_ksp_rtol="1e-10", kkt_ksp_type="fgmres", kkt_ksp_monitor=""):
        tight = solve_kkt(operator, kkt, a, b, c, solver_parameters=parameters)
    assert tight.residuals[-1] <= 1e-10 * tight.residuals[0]
    printed = capfd.readouterr().out
    assert printed.count("KSP Residual norm") == tight.iterations + 1
    with Database(heat_kkt_ksp_rtol="1e-10"):
        other = solve_kkt(operator, kkt, a, b, c, solver_parameters=parameters, options_prefix="heat_")
    assert other.residuals[-1] <= 1e-10 * other.residuals[0]
    with (
        Database(kkt_pc_type="none", kkt_ksp_max_it="3"),
        pytest.raises(DivergedError, match=r"3 iter.*DIVERGED_MAX_IT"),
    ):
        solve_kkt(operator, kkt, a, b, c)


def test_residuals_of_gmres_are_those_of_the_system():
    """The preconditioner is applied on the right."""
    problem = alone()
    operator = operator_of(problem)
    a, b, c = right_hand_sides(problem)
    found = solve_kkt(operator, circulant(problem), a, b, c, solver_parameters={"ksp_type": "gmres", "ksp_rtol": 1e-6})
    products = operator(found.u, found.z, found.lam)
    rest = [np.ravel(given - product) for given, product in zip((a, b, c), products, strict=True)]
    assert np.linalg.norm(np.concatenate(rest)) == pytest.approx(found.residuals[-1], rel=1e-3)
    start = np.concatenate([np.ravel(x) for x in (a, b, c)])
    assert np.linalg.norm(start) == pytest.approx(found.residuals[0], rel=1e-10)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"ksp_type": "cg"}, "indefinite: give 'fgmres'"),
        ({"pc_type": "jacobi"}, "no entries: give 'python' or 'none'"),
        ({"ksp_typ": "gmres"}, "ksp_type"),
        ({"ksp_type": "fgmrs"}, "fgmres"),
    ],
)
def test_methods_and_names_that_do_not_fit_are_refused(parameters, message):
    problem = alone()
    with pytest.raises(InputError, match=message):
        solve_kkt(operator_of(problem), circulant(problem), solver_parameters=parameters)


def test_a_preconditioner_and_right_hand_sides_that_are_missing_or_wrong_are_refused():
    problem = alone()
    operator = operator_of(problem)
    with pytest.raises(InputError, match="no circulant system"):
        solve_kkt(operator, solver_parameters={"pc_type": "python"})
    a, _, c = right_hand_sides(problem)
    with pytest.raises(InputError, match=r"right-hand side b of shape \(2, 3\)"):
        solve_kkt(operator, None, a, np.zeros((2, 3)), c)
    a[0, 0] = np.nan
    with pytest.raises(InputError, match="right-hand side a has entries"):
        solve_kkt(operator, None, a, None, c)


@pytest.mark.parallel([1, 2])
def test_failures_of_steps_and_systems_reach_all_ranks(monkeypatch):
    """On the last rank in time only, in the matrix or in the preconditioner."""
    problem = convection(pf.SpaceTime((1, COMM.size)), **SMALL).problem
    operator, kkt = operator_of(problem), circulant(problem)
    g = problem.derivative(np.zeros(problem.layout.size))

    def failing(*args, **kwargs):
        raise SolverFailure("a zero pivot")

    if COMM.rank == COMM.size - 1:
        monkeypatch.setattr(kkt.systems, "solve_all", failing)
    with pytest.raises(SolverFailure, match="a zero pivot"):
        solve_kkt(operator, kkt, c=-g)
    if COMM.rank == COMM.size - 1:
        monkeypatch.setattr(problem.sweeps.propagators[0], "tangent", failing)
    with pytest.raises(SolverFailure, match="a zero pivot"):
        solve_kkt(operator, None, c=-g)
