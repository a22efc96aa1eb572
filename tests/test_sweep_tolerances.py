"""Iterative solvers of linear systems stop as early as the tolerance of a sweep permits, by default at round-off."""

import numpy as np
import pytest
from firedrake import (
    Constant,
    DirichletBC,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    UnitSquareMesh,
    dx,
    grad,
    inner,
    sin,
)
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
import pint_fem.kernels.direct
import pint_fem.kernels.space.choice as choice
from pint_fem.kernels.arrays import get
from pint_fem.kernels.factor import Factor
from pint_fem.kernels.space.conjugate_gradients import TOLERANCE, ConjugateGradients

SOLVERS = {"serial": {"time_solver": "serial"}, "mgrit": {"mgrit": {"levels": 2, "coarsening": 4, "rtol": 1e-11}}}
STEPS = 16


@pytest.fixture
def iterations(monkeypatch):
    """Only multigrid is left as a solver; the list of the largest numbers of iterations of all solves."""
    monkeypatch.setattr(pint_fem.kernels.direct, "REDUNDANT", 0)
    monkeypatch.setattr(choice, "LARGEST_FACTOR", 0)
    monkeypatch.setattr(choice, "MOST_DIAGONAL", 5)
    monkeypatch.setattr(Factor, "_triangular", lambda self, like: None)
    solve, counts = ConjugateGradients._iterate, []

    def counted(self, *args):
        solve(self, *args)
        counts.append(self.iterations)

    monkeypatch.setattr(ConjugateGradients, "_iterate", counted)
    solve_rows = ConjugateGradients.solve

    def solved(self, rows):
        self.iterations = 0
        return solve_rows(self, rows)

    monkeypatch.setattr(ConjugateGradients, "solve", solved)
    return counts


def posed(solver, spacetime=None):
    """The reduced problem of a source in a square on a hierarchy of two meshes, a control and a direction."""
    spacetime = spacetime or pf.SpaceTime(space=MPI.COMM_WORLD.size, time=1)
    mesh = spacetime.mesh_hierarchy(1, UnitSquareMesh, 8, 8)[-1]
    x, V = SpatialCoordinate(mesh), FunctionSpace(mesh, "CG", 1)
    u, v, q = Function(V), TestFunction(V), Function(V)
    F = (Dt(u) * v + Constant(0.5) * inner(grad(u), grad(v)) - q * v) * dx
    heat = pf.Evolution(F, u, tableau=pf.SDIRK2(), dt=0.02, nsteps=STEPS, control=q, bcs=DirichletBC(V, 0, (1, 2)))
    given = dict(regularisation=1e-4 * q**2 * dx, spacetime=spacetime, solver_parameters=SOLVERS[solver])
    J = pf.TimeParallelReducedFunctional(heat, pf.RunningMisfit((u - x[0]) ** 2 * dx), **given)
    z, dz = (get(Function(V).interpolate(sin(5 * x[0] + i) * x[1])) for i in range(2))
    return J.problem, z, dz


def size(problem, values):
    """The norm of a dual vector over all ranks in space."""
    return np.sqrt(problem.spacetime.space_comm.allreduce(float(values @ values)))


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("rtol", [1e-2, 1e-5])
def test_hessian_actions_are_within_their_tolerance(solver, rtol, iterations):
    """With fewer iterations than the exact action takes; the next exact one has the same bits as before."""
    problem, z, dz = posed(solver)
    problem.value(z)
    iterations.clear()
    exact = problem.hessian_action(z, dz)
    full = max(iterations)
    iterations.clear()
    rough = problem.hessian_action(z, dz, rtol=rtol)
    few = max(iterations)
    assert few < full, (few, full)
    assert 0 < size(problem, rough - exact) <= rtol * size(problem, exact)
    assert np.array_equal(problem.hessian_action(z, dz), exact)
    batch = problem.hessian_actions(z, [dz, z], rtol=rtol)
    assert size(problem, batch[0] - exact) <= rtol * size(problem, exact)


@pytest.mark.parallel([1, 2])
def test_sequential_states_and_gradients_are_exact(iterations):
    """Whatever the tolerance: no residual tells how accurate they are."""
    problem, z, _ = posed("serial")
    iterations.clear()
    value, gradient = problem.value(z), problem.derivative(z)
    full = max(iterations)
    problem.value(0 * z)
    iterations.clear()
    assert problem.value(z, rtol=1e-2) == value
    assert np.array_equal(problem.derivative(z, rtol=1e-2), gradient)
    assert max(iterations) == full


@pytest.mark.parallel([1, 2])
def test_states_by_cycles_are_within_their_tolerance(iterations):
    """The trajectory at a tolerance of its own, from the same first guess, against one that is exact."""
    problem, z, _ = posed("mgrit")
    iterations.clear()
    exact = problem.value(z)
    trajectory, full = problem.at(z).U.copy(), max(iterations)
    for rtol in (1e-3, 1e-5):
        problem.invalidate()
        iterations.clear()
        assert problem.value(z, rtol=rtol) == pytest.approx(exact, rel=10 * rtol)
        assert max(iterations) < full
        apart = problem.at(z).U - trajectory
        sizes = [problem.spacetime.comm.allreduce(float(np.vdot(a, a))) ** 0.5 for a in (apart, trajectory)]
        assert 0 < sizes[0] <= 10 * rtol * sizes[1]


@pytest.mark.parallel(2)
def test_actions_do_not_depend_on_the_ranks_in_time(iterations):
    """The same sweeps with a tolerance on one rank and on two ranks in time; sums over steps round differently."""
    rows = []
    for time in (1, 2):
        spacetime = pf.SpaceTime(space=1, time=time, comm=MPI.COMM_SELF if time == 1 else MPI.COMM_WORLD)
        problem, z, dz = posed("mgrit", spacetime)
        rows.append(problem.hessian_action(z, dz, rtol=1e-3))
    assert np.allclose(rows[0], rows[1], rtol=0, atol=1e-11 * np.abs(rows[0]).max())


@pytest.mark.parallel([1, 2])
def test_failures_restore_exact_solves(iterations):
    """A sweep that raises within its tolerance leaves none behind; none is smaller than that of exact solves."""
    sweeps = posed("serial")[0].sweeps
    methods = [f.blocks.method for p in sweeps.propagators for f in p.factors.values()]
    tolerances = lambda: {m.tolerance for m in methods}

    def fail():
        with sweeps.solves_within(1e-2):
            assert tolerances() == {1e-3 / STEPS}
            raise ArithmeticError("a step")

    with pytest.raises(ArithmeticError, match="a step"):
        fail()
    assert tolerances() == {TOLERANCE}
    with sweeps.solves_within(1e-15):
        assert tolerances() == {TOLERANCE}
    with sweeps.solves_within(None):
        assert tolerances() == {TOLERANCE}
