"""Hessian actions by a fixed number of cycles and their transposes: symmetric, however few there are."""

import numpy as np
import pytest
from mpi4py import MPI

import pint_fem as pf
from pint_fem.adjoint.minimisation.inexact_objective import InexactObjective
from pint_fem.mgrit import SolverFailure
from tests.nonlinear import burgers
from tests.nonlinear import functional as nonlinear_functional
from tests.test_controls import functional as controls
from tests.test_reduced_functional import functional

GRIDS = {1: "1x1", 3: "1x3", 4: "2x2"}


def grid():
    return pf.SpaceTime(GRIDS[MPI.COMM_WORLD.size])


def two_directions(rf):
    """The same on every grid, for static controls on one space rank; copies are the owner's."""
    n = rf.layout.size
    pair = [np.cos(np.arange(n)), np.sin(2.0 + np.arange(n) ** 1.1)]
    for v in pair:
        rf.layout.share(v)
    return pair


def all_kinds(st, **options):
    return controls(st, n=2, steps=18, **options)  # two cycles are not exact yet


def linear(st, **options):
    return functional(st, steps=24, n=3, **options)


def diagonalised(st):
    """ParaDiag with a poor circulant, whose adjoint sweeps are far from transposes of tangent ones."""
    return linear(st, solver={"time_solver": "paradiag", "paradiag": {"alpha": 0.1, "rtol": 1e-12}})


def diagonalised_kinds(st):
    return all_kinds(st, solver={"time_solver": "paradiag", "paradiag": {"alpha": 0.1, "rtol": 1e-12}})


def nonlinear(st):
    posed = burgers(3, 12, tableau="SDIRK2", degree=1, comm=st.space_comm)
    return nonlinear_functional(posed, st, mgrit={"coarsening": (2,), "rtol": 1e-12})


@pytest.mark.parallel([1, 4])
@pytest.mark.parametrize(
    "make",
    [
        all_kinds,
        nonlinear,
        diagonalised_kinds,
        # one kind of control each, which is among all kinds
        pytest.param(linear, marks=pytest.mark.slow_on_ranks),
        pytest.param(diagonalised, marks=pytest.mark.slow_on_ranks),
    ],
)
def test_symmetric_and_near_the_hessian(make):
    """To round-off for one cycle and for two, with every kind of control; the error falls with the residual."""
    rf = make(grid())
    z, (v, w) = rf.array([c.control for c in rf.controls]), two_directions(rf)
    pair = rf.layout.pairing
    rf.problem.derivative(z)
    exact, errors = rf.problem.hessian_action(z, v), []
    for cycles in (1, 2):
        hv, residual = rf.problem.symmetric_action(z, v, cycles)
        hw, _ = rf.problem.symmetric_action(z, w, cycles)
        scale = np.sqrt(abs(pair(hv, v) * pair(hw, w)))
        assert abs(pair(hv, w) - pair(hw, v)) <= 1e-12 * scale
        errors.append(np.sqrt(rf.spacetime.comm.allreduce(np.sum((hv - exact) ** 2))))
        assert errors[-1] <= 10 * residual * np.sqrt(rf.spacetime.comm.allreduce(np.sum(exact**2)))
    assert errors[1] < 0.3 * errors[0]
    assert errors[0] > 1e-9 * scale  # few cycles are not exact: the symmetry is no accident


def test_other_cycles():
    """Weights, more relaxation and F-cycles have exact transposes, too; what has none is not offered."""
    one = lambda **options: linear(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), **options)
    for options in ({"c_weight": 0.8}, {"relax": "FCFCF"}, {"relax": "F"}, {"cycle": "F"}, {"residual": "full"}):
        rf = one(**options)
        z, (v, w) = rf.array(rf.controls[0].control), two_directions(rf)
        hv, hw = (rf.problem.symmetric_action(z, x, 2)[0] for x in (v, w))
        assert abs(hv @ w - hw @ v) <= 1e-12 * np.sqrt(abs((hv @ v) * (hw @ w)))
    none = {"check": "relaxed"}, {"cycle": "F", "f_cycles": 1}, {"start": "nested"}, {"coarse_solver": "relax"}
    for options in none:
        assert one(**options).problem.sweeps.solvers.transposed_adjoint is None


@pytest.mark.parallel(3)
@pytest.mark.parametrize("make", [linear, diagonalised])
def test_same_bits_for_every_number_of_time_ranks(make):
    """Of the adjoints; a static control's derivative is a sum over the ranks."""
    one, many = make(pf.SpaceTime("1x1", comm=MPI.COMM_SELF)), make(grid())
    z, (v, _) = one.array(one.controls[0].control), two_directions(one)
    slab = many.problem.sweeps.slab
    for cycles in (1, 3):
        for rf in (one, many):
            rf.problem.symmetric_action(z, v, cycles)
        a, b = (rf.problem.sweeps.solvers.transposed_adjoint.adjoints for rf in (one, many))
        assert np.array_equal(a[slab.lo : slab.hi + 1], b)
    assert many.memory().kept["model"] >= b.base.nbytes > b.nbytes - 1


@pytest.mark.parallel([1, 3])
def test_failure_behind_the_last_iteration_is_named():
    """The step to the first point, on one rank, is no iteration's: all ranks hear of it."""
    rf = diagonalised(grid())
    z = rf.array(rf.controls[0].control)
    rf.problem.symmetric_action(z, z, 1)
    sweep = rf.problem.sweeps.solvers.transposed_adjoint
    fine = sweep.solver.levels[0]
    sweep.solver.solve(*sweep.arrays(np.ones_like(sweep.adjoints)), start=sweep.start, cycles=1)

    def fail(u, out):
        raise ArithmeticError("no such step")

    fine.propagator._apply = fail
    with pytest.raises(SolverFailure, match="no such step"):
        sweep.collect()


def test_a_model_is_one_operator():
    """Its first product sets the cycles, and later ones take as many."""
    rf = linear(pf.SpaceTime("1x1", comm=MPI.COMM_SELF))
    objective = InexactObjective(rf.problem, rf.inner)
    z, (v, w) = rf.array(rf.controls[0].control), two_directions(rf)
    exact = objective.hessian_action(z, v)
    norm = lambda x: np.sqrt(rf.inner.inner(x, x))
    for rtol in (1e-2, 1e-4, 1e-8):
        model = objective.hessian_model(z, rtol)
        h = model(v)
        assert norm(h - exact) <= 10 * rtol * norm(exact)
        before = rf.problem.sweeps.counts["cycles"]
        model(w)
        assert rf.problem.sweeps.counts["cycles"] - before == 2 * objective.state()["cycles"]
        assert abs(rf.inner.inner(model(w), v) - rf.inner.inner(h, w)) <= 1e-12 * norm(h) * norm(w)
        assert np.array_equal(model(v), h)


def test_where_there_is_none():
    """C-points that are not the same in both directions: products to a tolerance, as before."""
    rf = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), steps=22, n=3)
    assert rf.problem.sweeps.solvers.transposed_adjoint is None
    objective = InexactObjective(rf.problem, rf.inner)
    assert not hasattr(objective, "hessian_model")
    assert rf.minimize_trust_region(gtol_rel=1e-4, inexact=True).converged
