"""The package's optimisers on time-parallel functionals: the same minimum by all of them, and what each costs."""

import numpy as np
import pytest
from firedrake import (
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    UnitSquareMesh,
    assemble,
    dx,
    grad,
    inner,
)
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from pint_fem.mgrit import SolverFailure
from problems.heat_source import heat_source
from tests.test_controls import functional as several
from tests.test_reduced_functional import functional


@pytest.fixture(scope="module")
def best():
    """Minimum of the quadratic problem, and where it is."""
    rf = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), levels=1, n=4)
    result = rf.minimize_trust_region(gtol_rel=1e-10)
    assert result.converged
    return result.value, rf.function(result.x).dat.data_ro.copy()


@pytest.mark.parallel(3)
@pytest.mark.parametrize("method", ["trust-krylov", "trust-ncg", "L-BFGS-B", "Newton-CG"])
def test_scipy(method, best):
    rf = functional(pf.SpaceTime(), rtol=1e-12, n=4)
    options = {"ftol": 1e-15, "gtol": 1e-9} if method == "L-BFGS-B" else {}
    result = rf.minimize_scipy(method=method, tol=1e-9 if not options else None, options=options)
    assert abs(rf(rf.function(result.x)) - best[0]) < 1e-9 * best[0]


@pytest.mark.parallel([1, 3])
def test_inexact_finds_the_same_minimum_with_fewer_cycles(best):
    exact = functional(pf.SpaceTime(), rtol=1e-11, n=4)
    exact.minimize_trust_region(gtol_rel=1e-6)
    cycles = exact.problem.sweeps.counts["cycles"]
    rf = functional(pf.SpaceTime(), rtol=1e-11, n=4)
    result = rf.minimize_trust_region(gtol_rel=1e-6, inexact=True)
    assert result.converged
    used = rf.problem.sweeps.counts["cycles"]
    assert abs(rf.problem.value(result.x) - best[0]) < 1e-6 * best[0]
    assert used < 0.7 * cycles  # products are solved to a tolerance: 22 steps have no transposed cycles
    for record in result.history[1:]:  # what was asked for was got
        assert record.gradient_error <= record.gradient_tolerance
    assert len(rf.problem.evaluations) == 1


@pytest.mark.grid
@pytest.mark.parallel(3)
def test_a_third_of_the_cycles_on_the_plate():
    """The heat source inversion: the minimum of exact sweeps by at least three times fewer cycles, as the demo does
    it; twice fewer with the same conjugate gradients.
    """
    learned = {"inexact": True, "preconditioner": "limited-memory", "preconditioner_memory": 40}
    found = {}
    for name, options in (("exact", {}), ("inexact", {"inexact": True}), ("learned", learned)):
        rf = heat_source(pf.SpaceTime(), steps=32, solver_parameters={"mgrit": {"rtol": 1e-9}}).rf
        result = rf.minimize_trust_region(gtol_rel=1e-7, **options)
        assert result.converged
        cycles = rf.problem.sweeps.counts["cycles"]
        found[name] = cycles, rf.problem.value(result.x)
    cycles, J = found["exact"]
    for name, factor in (("inexact", 2), ("learned", 3)):
        assert factor * found[name][0] <= cycles
        assert abs(found[name][1] - J) < 1e-6 * J


def test_error_estimates():
    """Of value and gradient, against the exact ones, over eight orders of magnitude."""
    from pint_fem.adjoint.minimisation.inexact_objective import InexactObjective

    st = pf.SpaceTime("1x1", comm=MPI.COMM_SELF)
    rf = functional(st, rtol=1e-12, steps=64)
    exact = functional(st, levels=1, steps=64)
    objective = InexactObjective(rf.problem, rf.inner)
    z = rf.array(rf.controls[0].control) + np.sin(np.arange(rf.layout.size))
    J, g = exact.problem.value(z), exact.inner.primal(exact.problem.derivative(z))
    norm = lambda v: np.sqrt(rf.inner.inner(v, v))
    for tolerance in (1e-1, 1e-3, 1e-5, 1e-7):
        value, error = objective.value_within(z, tolerance * J)
        assert abs(value - J) <= 2 * error
        assert error <= tolerance * J
        gradient, error = objective.gradient_within(z, tolerance * norm(g))
        assert error <= tolerance * norm(g)
        assert norm(gradient - g) <= 10 * error
        v = np.cos(np.arange(rf.layout.size))
        h = exact.inner.primal(exact.problem.hessian_action(z, v))
        assert norm(objective.hessian_action_within(z, v, tolerance) - h) <= 10 * tolerance * norm(h)


@pytest.mark.parallel(3)
def test_one_shot(best):
    """The optimum, with fewer cycles than the trust region, and as many as on one rank in time."""
    results, cycles = [], []
    for st in (pf.SpaceTime(), pf.SpaceTime("1x1", comm=MPI.COMM_SELF)):
        rf = functional(st, rtol=1e-11, n=4)
        results.append(rf.minimize_one_shot(gtol_rel=1e-6, max_it=500, memory=30, preconditioner="regularisation"))
        cycles.append(rf.problem.sweeps.counts["cycles"])
    assert results[0].converged
    assert abs(results[0].value - best[0]) < 1e-6 * best[0]
    assert cycles[0] == cycles[1]
    assert np.allclose(results[0].x, results[1].x, rtol=0, atol=1e-8)
    assert [r.update for r in results[0].history] == [r.update for r in results[1].history]
    rf = functional(pf.SpaceTime(), rtol=1e-11, n=4)
    rf.minimize_trust_region(gtol_rel=1e-6)
    assert cycles[0] < 0.7 * rf.problem.sweeps.counts["cycles"]


@pytest.mark.parallel(3)
def test_one_shot_not_linear():
    """The trust region's optimum of a nonlinear evolution."""
    make = lambda: functional(pf.SpaceTime(), linear=False, n=2, steps=8, rtol=1e-9)
    exact = make().minimize_trust_region(gtol_rel=1e-5)
    result = make().minimize_one_shot(gtol_rel=1e-5, max_it=200, memory=20)
    assert result.converged
    assert abs(result.value - exact.value) < 1e-6 * exact.value


def test_a_failing_sweep_shortens_the_step(monkeypatch):
    """J is infinite there, and the sweeps start anew at the next design."""
    rf = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), rtol=1e-11, n=3, steps=16)
    advance, seen = rf.problem.advance, []

    def failing(z):
        seen.append(z)
        if len(seen) in (4, 9):
            raise SolverFailure("made up")
        return advance(z)

    monkeypatch.setattr(rf.problem, "advance", failing)
    result = rf.minimize_one_shot(gtol_rel=1e-4, max_it=300)
    assert result.converged
    assert sum(np.isnan(r.value) for r in result.history) >= 1


@pytest.mark.parallel([1, 3])
def test_bounds(best):
    """First-order conditions: no slope where free, the right sign where bound."""
    upper = float(np.median(best[1]))
    rf = functional(pf.SpaceTime(), rtol=1e-12, n=4)
    result = rf.minimize_trust_region(bounds=(-np.inf, upper), gtol_rel=1e-9)
    assert result.converged
    g, bound = rf.problem.derivative(result.x), result.x >= upper
    assert bound.any()
    scale = np.abs(g).max()
    assert np.abs(g[~bound]).max() < 1e-6 * scale
    assert g[bound].max() <= 1e-6 * scale
    assert result.x.max() <= upper
    with pytest.raises(pf.InputError, match="exact solves"):
        rf.minimize_trust_region(bounds=(0, 1), inexact=True)


@pytest.mark.parallel(3)
def test_integral_constraint():
    """The integral is kept, and the gradient is a multiple of the constraint's."""
    for kind in ("trust region", "one-shot"):
        rf = functional(pf.SpaceTime(), rtol=1e-12, n=4)
        q = rf.evolution.control
        constraints = [(q * dx, 0.3)]
        if kind == "one-shot":
            result = rf.minimize_one_shot(constraints=constraints, gtol_rel=1e-6, max_it=500)
        else:
            result = rf.minimize_trust_region(constraints=constraints, gtol_rel=1e-9)
        assert result.converged
        assert abs(assemble(rf.function(result.x) * dx) - 0.3) < 1e-10
        g = rf.inner.primal(rf.problem.derivative(result.x))  # a constant
        assert np.ptp(g) < 1e-4 * np.abs(g).max()
    with pytest.raises(pf.InputError, match="not linear"):
        rf.minimize_trust_region(constraints=[(q**2 * dx, 1.0)])
    with pytest.raises(pf.InputError, match="functional of the controls"):
        rf.minimize_trust_region(constraints=[(rf.evolution.u * dx, 1.0)])


@pytest.mark.parallel(3)
def test_constraint_on_controls_with_a_value_a_step():
    rf = several(pf.SpaceTime(), ("strength", "source"), n=2, steps=6)
    strength, source = rf.evolution.controls
    dt, st = rf.evolution.dt, rf.spacetime
    constraints = [(strength * dx, 0.2), (source * dx, 0.5)]
    result = rf.minimize_trust_region(constraints=constraints, gtol_rel=1e-6, max_it=200)
    assert result.converged
    steps, field = rf.function(result.x)
    total = st.sum_over_time(np.array([sum(dt * assemble(f * dx) for f in steps.subfunctions)]))
    assert np.allclose([total[0], assemble(field * dx)], [0.2, 0.5], atol=1e-10)


def test_preconditioners(best):
    """The regularisation's inverse and learned pairs: the same minimum; in L2 the inverse makes CG shorter."""
    counts = {}
    for name in (None, "regularisation", "limited-memory"):
        rf = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), levels=1, n=4)
        result = rf.minimize_trust_region(gtol_rel=1e-9, preconditioner=name, cg_max_it=400)
        assert abs(result.value - best[0]) < 1e-9 * best[0]
        counts[name] = sum(r.cg_iterations for r in result.history)
    assert counts["regularisation"] < counts[None]
    with pytest.raises(pf.InputError, match="preconditioner"):
        rf.minimize_trust_region(preconditioner="jacobi")
    other = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), linear=False, steps=8, n=2)
    with pytest.raises(pf.InputError, match="not quadratic"):
        other.minimize_trust_region(preconditioner="regularisation")


def test_work_of_an_iteration():
    """An accepted iteration is one state and one adjoint solve and two sweeps a CG step."""
    rf = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), n=4)
    result = rf.minimize_trust_region(gtol_rel=1e-6)
    cg, counts = sum(r.cg_iterations for r in result.history), rf.problem.sweeps.counts
    assert all(r.accepted for r in result.history)
    assert counts["state"] == 1 + result.iterations
    assert counts["adjoint"] == 1 + result.iterations + cg
    assert counts["tangent"] == cg


def test_gauss_newton():
    """On a nonlinear evolution: the model has no negative curvature, the minimum is the same."""
    found = []
    for hessian in ("newton", "gauss-newton"):
        rf = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), linear=False, steps=8, n=3, levels=1)
        result = rf.minimize_trust_region(gtol_rel=1e-5, hessian=hessian, max_it=100)
        assert result.converged, result.reason
        found.append(result.value)
        z, v = result.x, np.cos(np.arange(rf.layout.size))
        h = rf.inner.primal(rf.problem.hessian_action(z, v, gauss_newton=True))
        assert rf.inner.inner(h, v) > 0
    assert np.isclose(*found, rtol=1e-7)


@pytest.mark.parallel([1, 3])
def test_cycles_at_an_initial_control_converge_on_several_ranks():
    """The derivative by the initial condition is the adjoint of the first rank; others keep the rows of their own, from
    which their next cycle starts.
    """
    st = pf.SpaceTime()
    mesh = st.mesh(UnitSquareMesh, 3, 3)
    V = FunctionSpace(mesh, "CG", 1)
    u, v, u0, x = Function(V), TestFunction(V), Function(V), SpatialCoordinate(mesh)[0]
    F = (Dt(u) * v + inner(grad(u), grad(v))) * dx
    ev = pf.Evolution(F, u, tableau=pf.BackwardEuler(), dt=0.05, nsteps=8, control=u0, initial=u0)
    options = {"mgrit": {"levels": 2, "coarsening": 2}}
    J = pf.TimeParallelReducedFunctional(
        ev, pf.RunningMisfit((u - x) ** 2 * dx), regularisation=u0**2 * dx, spacetime=st, solver_parameters=options
    )
    z = 1 + np.sin(np.arange(J.layout.size))
    residuals = [J.problem.advance(z)[2] for _ in range(4)]
    assert residuals[-1] <= 1e-14
