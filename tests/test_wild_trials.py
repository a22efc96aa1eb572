"""Trial points that are far too far away: J or its gradient is huge there, and that shortens the step and no more."""

import math

import numpy as np
import pytest
from mpi4py import MPI

from pint_fem.optimize import InexactOptions, minimize_bounded, minimize_trust_region
from pint_fem.optimize.one_shot.method import minimize_one_shot
from tests.limits import time_limit
from tests.test_bounded import Distributed
from tests.test_trust_region import Smooth

STEEP = np.linspace(0.5, 2.0, 6)


def exponential():
    """J = sum exp(a x) - a x, which has its minimum at 0 and is huge a few lengths away."""
    return Smooth(
        lambda x: float(np.sum(np.exp(STEEP * x) - STEEP * x)),
        lambda x: STEEP * (np.exp(STEEP * x) - 1),
        lambda x: np.diag(STEEP**2 * np.exp(STEEP * x)),
        n=6,
    )


class Approaching:
    """`advance` halves its residual at a design; J and g are off by the residual times their size."""

    def __init__(self, problem):
        """Take a problem."""
        self.problem, self.x, self.residual = problem, None, 1.0
        self.value, self.gradient, self.inner = problem.value, problem.gradient, problem.inner

    def advance(self, x):
        """J and g with the residual that is left."""
        self.residual = 0.5 * self.residual if self.x is not None and np.array_equal(x, self.x) else 0.25
        self.x = x.copy()
        off = 1 + 0.5 * self.residual
        return off * self.problem.value(x), off * self.problem.gradient(x), self.residual


# --- one-shot --------------------------------------------------------------------------------------------------------


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("first", [20.0, 60.0, 200.0, 320.0, 900.0])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@time_limit(60)
def test_one_shot_shortens_a_step_to_a_huge_objective(first):
    """The first step ends where J is 1e7 to 1e278, where (g, g) overflows (from 320 on), or where J does (900). The
    minimum is at 0 and the number of designs hardly depends on how far the step went.
    """
    comm = MPI.COMM_WORLD
    problem = Distributed(exponential(), np.ones(6), comm, 2)
    result = minimize_one_shot(problem, np.full(6, -1.0)[problem.part], initial_step=first, max_it=100)
    assert result.converged
    np.testing.assert_allclose(problem.whole(result.x), 0, atol=1e-5)
    assert result.iterations <= 30
    assert sum(r.update == "rejected" for r in result.history) <= 6


@pytest.mark.parametrize("first", [60.0, 320.0])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@time_limit(60)
def test_one_shot_forgets_what_solvers_under_way_showed_there(first):
    """Errors that were measured at the far design are no estimate of those near x: the run goes on as fast."""
    near = minimize_one_shot(Approaching(exponential()), np.full(6, -1.0), initial_step=1.0, max_it=400)
    far = minimize_one_shot(Approaching(exponential()), np.full(6, -1.0), initial_step=first, max_it=400)
    assert near.converged
    assert far.converged
    assert far.iterations <= 2 * near.iterations
    np.testing.assert_allclose(far.x, 0, atol=1e-4)


# --- trust regions ---------------------------------------------------------------------------------------------------


def overshooting(**methods):
    """J = |x|^2 / 2 with a model too flat, so that steps overshoot to where J is smaller and (g, g) overflows."""
    steep = lambda x: 1e160 if x.min() < -1 else 1.0
    problem = Smooth(lambda x: 0.5 * x @ x, lambda x: steep(x) * x, lambda x: 0.6 * np.eye(3), n=3)
    for name, method in methods.items():
        setattr(problem, name, method)
    return problem


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@time_limit(60)
def test_a_gradient_that_overflows_at_a_trial_point_is_a_rejected_step():
    """In the ball and in the box; at the start it is an error."""
    for minimise in (minimize_trust_region, lambda *args, **options: minimize_bounded(*args, -5.0, 5.0, **options)):
        result = minimise(overshooting(), np.full(3, 3.0), initial_radius=50.0, gtol_rel=1e-8)
        assert result.converged
        assert math.isnan(result.history[1].ratio)
        assert not result.history[1].accepted
        np.testing.assert_allclose(result.x, 0, atol=1e-6)
        with pytest.raises(FloatingPointError, match="gradient is not finite"):
            minimise(overshooting(), np.full(3, -3.0))


@time_limit(60)
def test_an_unlimited_first_radius_is_none_after_a_rejected_step():
    """Negative curvature at the start leads to 1e99; J is finite in |x| < 4 only: x^4/4 - x^2/2, minimum at 1."""
    problem = Smooth(
        lambda x: float(x[0] ** 4 / 4 - x[0] ** 2 / 2) if abs(x[0]) < 4 else math.inf,
        lambda x: x**3 - x,
        lambda x: np.array([[3 * x[0] ** 2 - 1]]),
        n=1,
    )
    result = minimize_trust_region(problem, np.array([0.1]), initial_radius=1e99, gtol_rel=1e-8)
    assert result.converged
    assert result.x[0] == pytest.approx(1, abs=1e-7)
    assert result.iterations <= 20


@time_limit(60)
def test_a_huge_error_at_a_trial_point_hides_no_rise_of_the_objective():
    """J within 1e-3 of itself at best: beyond |x| = 1.5 it is 1e20, and off by more than that of x. Such a step is
    rejected, not taken for one below the accuracy of J, and teaches nothing of the errors.
    """
    problem = exponential()
    seen = []

    def value_within(x, tolerance):
        far = np.abs(x).max() > 1.5
        value = problem.f(x) * (1e20 if far else 1.0)
        seen.append(far)
        error = max(abs(value) * (10.0 if far else 1e-9), 0.0)
        return value * (1 + (0.3 * len(seen) if far else 0.0)), error

    problem.value_within = value_within
    result = minimize_trust_region(
        problem, np.full(6, -1.0), initial_radius=50.0, inexact=InexactOptions(), gtol_rel=1e-6
    )
    assert any(seen)
    assert not any(r.accepted and r.value > result.history[0].value for r in result.history)
    assert result.converged
    np.testing.assert_allclose(result.x, 0, atol=1e-5)
