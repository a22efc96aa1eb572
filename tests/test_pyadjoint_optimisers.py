"""pyadjoint's and scipy's optimisers on the time-parallel functional, on three ranks in time."""

import numpy as np
import pytest
from firedrake import assemble, dx
from firedrake.adjoint import (
    MinimizationProblem,
    TAOSolver,
    UFLEqualityConstraint,
    minimize,
)
from mpi4py import MPI
from pyadjoint import maximize

import pint_fem as pf
from tests.limits import time_limit
from tests.test_controls import functional as several
from tests.test_reduced_functional import functional

TIGHT = {"tao_gatol": 1e-9, "tao_grtol": 0.0, "tao_gttol": 0.0, "tao_max_it": 200}


@pytest.fixture(scope="module")
def best():
    """The minimum by the trust region, on one rank."""
    rf = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), levels=1, n=4)
    result = rf.minimize_trust_region(gtol_rel=1e-10)
    assert result.converged
    return result.value, rf.function(result.x).dat.data_ro.copy()


@pytest.mark.slow_on_ranks
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(
    "kind", ["lmvm", "bntr", *(pytest.param(kind, marks=pytest.mark.grid) for kind in ("blmvm", "ntr"))]
)
def test_tao(kind, best):
    st = pf.SpaceTime()
    rf = functional(st, rtol=1e-11, n=4)
    options = {"tao_type": kind, **TIGHT}
    if kind in ("ntr", "bntr"):
        options |= {"tao_ntr_ksp_type": "stcg", "tao_bnk_ksp_type": "stcg", "tao_gatol": 1e-7}
    solution = TAOSolver(MinimizationProblem(rf), options, comm=st.space_comm).solve()
    assert abs(rf(solution) - best[0]) < 1e-8 * best[0]


@pytest.mark.parallel(3)
@pytest.mark.parametrize("method", ["L-BFGS-B", pytest.param("SLSQP", marks=pytest.mark.grid)])
def test_minimize(method, best):
    """pyadjoint's minimize takes the functional as one of its own."""
    rf = functional(pf.SpaceTime(), rtol=1e-11, n=4, riesz_map="l2")
    options = {"ftol": 1e-14, "maxiter": 500} | ({"gtol": 1e-9} if method == "L-BFGS-B" else {"iprint": 0})
    solution = minimize(rf, method=method, options=options)
    assert abs(rf(solution) - best[0]) < 1e-7 * best[0]


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_the_unit_of_the_objective_does_not_matter(best):
    """A functional of 1e-12: scipy's absolute tolerances would end every run at the start. J, its derivative and the
    tangent are in the user's unit before and after; `maximize` of -J is `minimize` of J.
    """
    small = lambda sign: sign * 1e-12 * functional(pf.SpaceTime(), rtol=1e-11, n=4, riesz_map="l2")
    rf = small(1)
    start = rf.controls[0].control.copy(deepcopy=True)
    at_start = rf(start)
    by_scipy = rf.function(rf.minimize_scipy(start, "L-BFGS-B", gtol_rel=1e-6).x)
    assert rf(by_scipy) == pytest.approx(1e-12 * best[0], rel=1e-8)
    for optimise, functional_of in ((minimize, rf), (maximize, small(-1))):
        sign = 1 if optimise is minimize else -1
        start = functional_of.controls[0].control.copy(deepcopy=True)
        start.assign(0.1)
        at_start = abs(functional_of(start))
        solution = optimise(functional_of, options={"ftol": 1e-12, "gtol": 1e-8})
        slope = functional_of.derivative()
        value = functional_of(solution)
        assert sign * value == pytest.approx(1e-12 * best[0], rel=1e-7)
        assert at_start > 1.05 * sign * value
        assert np.abs(slope.dat.data_ro).max(initial=0) < 1e-15  # in scipy's unit 1e-5 is small
        ahead, behind = (start.copy(deepcopy=True).assign(c) for c in (0.101, 0.099))
        difference = (functional_of(ahead) - functional_of(behind)) / 0.02
        assert functional_of(start) == pytest.approx(sign * at_start, rel=1e-8)
        assert functional_of.tlm(start) == pytest.approx(difference, rel=1e-6)
        assert functional_of.derivative()._ad_dot(start) == pytest.approx(difference, rel=1e-6)


@pytest.mark.parallel([1, 3])
def test_minimize_with_bounds(best):
    st = pf.SpaceTime()
    upper = float(np.sort(best[1])[len(best[1]) // 2])
    rf = functional(st, rtol=1e-11, n=4, riesz_map="l2")
    solution = minimize(rf, bounds=(-10.0, upper), options={"ftol": 1e-14, "gtol": 1e-9, "maxiter": 500})
    values = solution.dat.data_ro
    assert values.max() <= upper + 1e-12
    assert (values > upper - 1e-6).sum() >= 2
    gradient = rf.derivative().dat.data_ro
    free = values < upper - 1e-9
    assert np.abs(gradient[free]).max() < 1e-7
    assert gradient[~free].max() < 1e-7


@pytest.mark.parallel(3)
def test_minimize_with_an_integral_constraint():
    """SLSQP, with the integral of the control given."""
    rf = functional(pf.SpaceTime(), rtol=1e-11, n=4, riesz_map="l2")
    q = rf.controls[0].control
    constraint = UFLEqualityConstraint((q - 0.3) * dx, rf.controls[0])
    options = {"ftol": 1e-14, "maxiter": 500, "iprint": 0}
    solution = minimize(rf, method="SLSQP", constraints=constraint, options=options)
    assert abs(assemble(solution * dx) - 0.3) < 1e-9


@pytest.mark.slow_on_ranks
@pytest.mark.parallel([1, 3])
def test_several_controls():
    """Static controls of all kinds at once through TAO and scipy."""
    values, lmvm = [], {"tao_type": "lmvm", **TIGHT, "tao_gatol": 1e-3, "tao_max_it": 1000}
    for solve in (
        lambda rf, st: rf(rf.function(rf.minimize_trust_region(gtol_rel=1e-6, max_it=200).x)),
        lambda rf, st: rf(TAOSolver(MinimizationProblem(rf), lmvm, comm=st.space_comm).solve()),
        lambda rf, st: rf(minimize(rf, options={"ftol": 1e-9, "gtol": 1e-5, "maxiter": 500})),
    ):
        st = pf.SpaceTime()
        rf = several(st, ("source", "wind", "initial", "level"), n=2, steps=6, riesz_map="l2")
        values.append(solve(rf, st))
    assert np.allclose(values, values[0], rtol=1e-4)
