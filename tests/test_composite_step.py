"""Composite steps on small dense problems: against scipy's SLSQP and closed forms, with inexact and failing solves."""

import copy
import itertools
import pickle

import numpy as np
import pytest
from scipy.optimize import minimize

from pint_fem.errors import InputError, SolverFailure
from pint_fem.optimize import minimize_trust_region
from pint_fem.optimize.composite_step.merit import Prediction
from pint_fem.optimize.composite_step.method import minimize_composite_step
from pint_fem.optimize.composite_step.protocol import KKTReport
from pint_fem.optimize.composite_step.records import continued
from pint_fem.optimize.records import StopReason


class Dense:
    """A problem from functions with first and second derivatives, given as arrays, with weighted inner products.

    ``derivatives(x)`` returns J, J', J'', c, c' and the list of the constraints' second derivatives; x has ``m``
    states and the controls.
    """

    def __init__(self, m, derivatives, weight=1.0):
        self.m, self.derivatives, self.weight = m, derivatives, weight

    def at(self, u, z):
        J, g, H, c, D, second = self.derivatives(np.concatenate([u, z]))
        return J, g, H, c, D[:, : self.m], D[:, self.m :], second

    def value(self, u, z):
        return self.at(u, z)[0]

    def gradient(self, u, z):
        g = self.at(u, z)[1]
        return g[: self.m], g[self.m :]

    def constraint(self, u, z):
        return self.at(u, z)[3]

    def solve_linearised(self, u, z, r, rtol):
        return np.linalg.solve(self.at(u, z)[4], r), 0.0

    def tangent(self, u, z, dz, rtol):
        _, _, _, _, A, B, _ = self.at(u, z)
        return np.linalg.solve(A, -B @ dz), 0.0

    def solve_adjoint(self, u, z, r, rtol):
        return np.linalg.solve(self.at(u, z)[4].T, r), 0.0

    def control_adjoint(self, u, z, lam):
        return self.at(u, z)[5].T @ lam

    def lagrangian(self, u, z, lam):
        _, _, H, _, _, _, second = self.at(u, z)
        return H + sum(value * S for value, S in zip(lam, second, strict=True))

    def lagrangian_hessian(self, u, z, lam, du, dz):
        h = self.lagrangian(u, z, lam) @ np.concatenate([du, np.zeros_like(z) if dz is None else dz])
        return h[: self.m], h[self.m :]

    def representative(self, dual):
        return dual / self.weight

    def inner(self, a, b):
        return float(self.weight * (a @ b))

    def inner_states(self, a, b):
        return float(a @ b)

    pairing = inner_states

    def multiplier_norm(self, lam):
        return float(np.linalg.norm(lam))


class WithKKT(Dense):
    """The same with KKT systems that are solved exactly."""

    def kkt_solve(self, u, z, lam, rhs, rtol):
        _, _, _, _, A, B, _ = self.at(u, z)
        D, m = np.hstack([A, B]), self.m
        W = self.lagrangian(u, z, lam)
        K = np.block([[W, D.T], [D, np.zeros((m, m))]])
        parts = [np.zeros(n) if r is None else r for r, n in zip(rhs, (m, len(z), m), strict=True)]
        parts[1] = self.weight * parts[1]
        x = np.linalg.solve(K, np.concatenate(parts))
        return x[:m], x[m : m + len(z)], x[m + len(z) :], KKTReport(True, 1)


def valley(x):
    """J = (1 - z)^2 + (u - 2)^2 / 2 on the curved valley 10 (u - z^2) + u^3 - z = 0."""
    u, z = x
    J, g, H = (1 - z) ** 2 + 0.5 * (u - 2) ** 2, np.array([u - 2, 2 * (z - 1)]), np.diag([1.0, 2.0])
    c, D = np.array([10 * (u - z**2) + u**3 - z]), np.array([[10 + 3 * u**2, -20 * z - 1]])
    return J, g, H, c, D, [np.diag([6 * u, -20.0])]


def semilinear(n=12, alpha=1e-2):
    """Distributed control of -u'' + 30 u^3 = z on a line, tracking a hat."""
    h = 1 / (n + 1)
    K = (2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)) / h**2
    target = 1 - np.abs(2 * h * np.arange(1, n + 1) - 1)

    def derivatives(x):
        u, z = x[:n], x[n:]
        J = 0.5 * h * ((u - target) @ (u - target) + alpha * z @ z)
        g, H = h * np.concatenate([u - target, alpha * z]), h * np.diag([1.0] * n + [alpha] * n)
        c, D = K @ u + 30 * u**3 - z, np.hstack([K + np.diag(90 * u**2), -np.eye(n)])
        second = [np.zeros((2 * n, 2 * n)) for _ in range(n)]
        for i in range(n):
            second[i][i, i] = 180 * u[i]
        return J, g, H, c, D, second

    return n, derivatives, h


def slsqp(derivatives, x0):
    result = minimize(
        lambda x: derivatives(x)[0], x0, jac=lambda x: derivatives(x)[1], method="SLSQP",
        constraints={"type": "eq", "fun": lambda x: derivatives(x)[3], "jac": lambda x: derivatives(x)[4]},
        options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    assert np.abs(derivatives(result.x)[3]).max() < 1e-8  # its last line search may end at round-off
    return result.x


TIGHT = dict(gtol_rel=0, gtol_abs=1e-9, ctol_rel=0, ctol_abs=1e-10)


@pytest.mark.parametrize("kind", [Dense, WithKKT])
@pytest.mark.parametrize("start", [(-1.0, -1.2), (5.0, 3.0), (0.0, 0.0)])
def test_a_curved_valley_from_infeasible_points(kind, start):
    result = minimize_composite_step(kind(1, valley), np.array(start[:1]), np.array(start[1:]), **TIGHT)
    assert result.converged
    assert result.reason is StopReason.GRADIENT
    assert not result.breakdown
    x = np.concatenate([result.state, result.x])
    found = [slsqp(valley, np.array(guess)) for guess in (start, (1.4, 1.2), (0.1, -0.1))]
    assert min(np.abs(x - other).max() for other in found) < 1e-5
    assert abs(valley(x)[3][0]) <= 1e-10
    assert result.constraint_norm <= 1e-10


@pytest.mark.parametrize("kind", [Dense, WithKKT])
def test_a_semilinear_equation(kind):
    n, derivatives, h = semilinear()
    problem, lines = kind(n, derivatives, weight=h), []
    given = dict(gtol_rel=1e-10, ctol_rel=1e-12, monitor=lines.append)
    result = minimize_composite_step(problem, np.zeros(n), np.zeros(n), **given)
    assert result.converged
    assert result.iterations <= 12
    expected = slsqp(derivatives, np.zeros(2 * n))
    assert np.abs(result.x - expected[n:]).max() < 1e-4 * np.abs(expected[n:]).max()  # SLSQP's accuracy
    # the necessary conditions hold
    _, g, _, c, D, _ = derivatives(np.concatenate([result.state, result.x]))
    assert np.abs(c).max() < 1e-10
    assert np.abs(g + D.T @ result.multipliers).max() < 1e-10
    if kind is WithKKT:
        assert all(record.cg_iterations <= 2 for record in result.history)
        assert all(record.kkt_iterations >= 1 for record in result.history[1:])
    assert len(lines) == 1 + len(result.history)
    assert "penalty" in lines[0]
    assert "|c|" in str(result)
    assert len(result.history) == result.iterations + 1
    assert pickle.loads(pickle.dumps(result)).value == copy.copy(result).value == result.value


@pytest.mark.parametrize("kind", [Dense, WithKKT])
def test_negative_curvature_leads_to_a_minimum(kind):
    """J = z^4 / 4 - z^2 / 2 + u^2 / 2 with u = z^2 / 2 has minima at z^2 = 2 / 3 and a maximum at 0."""

    def double_well(x):
        u, z = x
        J = 0.25 * z**4 - 0.5 * z**2 + 0.5 * u**2
        g, H = np.array([u, z**3 - z]), np.diag([1.0, 3 * z**2 - 1])
        return J, g, H, np.array([u - 0.5 * z**2]), np.array([[1.0, -z]]), [np.diag([0.0, -1.0])]

    result = minimize_composite_step(kind(1, double_well), np.zeros(1), np.array([1e-3]), initial_radius=0.5, **TIGHT)
    assert result.converged
    assert any(record.cg_stop == "negative curvature" for record in result.history)
    assert abs(abs(result.x[0]) - np.sqrt(2 / 3)) < 1e-8


def test_an_indefinite_kkt_solve_is_replaced_and_named():
    """At a maximum the KKT solve gives no descent direction: conjugate gradients go on without it."""

    def hill(x):
        u, z = x
        J, g, H = np.cos(z) + 0.5 * u**2, np.array([u, -np.sin(z)]), np.diag([1.0, -np.cos(z)])
        return J, g, H, np.array([u]), np.array([[1.0, 0.0]]), [np.zeros((2, 2))]

    result = minimize_composite_step(WithKKT(1, hill), np.zeros(1), np.array([0.1]), initial_radius=1.0, **TIGHT)
    assert "no descent direction" in result.history[1].note
    assert result.converged
    assert abs(abs(result.x[0]) - np.pi) < 1e-8


class Inexact(Dense):
    """Tangents and quasi-normal steps with errors of the size that is allowed."""

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        self.rtols = []

    def _spoilt(self, u, z, du, r, rtol):
        self.rtols.append(rtol)
        if rtol is None:
            return du, 0.0
        e = rtol * np.linalg.norm(r) * np.cos(np.arange(len(u)) + len(self.rtols)) / np.sqrt(len(u))
        return du + np.linalg.solve(self.at(u, z)[4], e), float(np.linalg.norm(e))

    def solve_linearised(self, u, z, r, rtol):
        return self._spoilt(u, z, super().solve_linearised(u, z, r, rtol)[0], r, rtol)

    def tangent(self, u, z, dz, rtol):
        return self._spoilt(u, z, super().tangent(u, z, dz, rtol)[0], self.at(u, z)[5] @ dz, rtol)


def test_inexact_linear_solves_converge_to_the_same_minimum():
    n, derivatives, h = semilinear()
    given = dict(gtol_rel=1e-9, ctol_rel=1e-11)
    exact, inexact = (
        minimize_composite_step(kind(n, derivatives, weight=h), np.zeros(n), np.zeros(n), **given)
        for kind in (Dense, Inexact)
    )
    assert exact.converged
    assert inexact.converged
    assert np.abs(exact.x - inexact.x).max() < 1e-7 * np.abs(exact.x).max()
    assert inexact.iterations <= 3 * exact.iterations


def test_the_tangential_step_is_solved_for_again_where_its_residual_decides():
    class Rough(Inexact):
        def _spoilt(self, u, z, du, r, rtol):
            du, residual = super()._spoilt(u, z, du, r, rtol)
            return du, residual if rtol is None or rtol < 1e-4 else 1e3 * np.linalg.norm(r)

    n, derivatives, h = semilinear()
    problem = Rough(n, derivatives, weight=h)
    # from a feasible point, so that there is no quasi-normal step
    assert minimize_composite_step(problem, np.zeros(n), np.zeros(n), gtol_rel=1e-3).converged
    given = [rtol for rtol in problem.rtols if rtol is not None]
    assert given[0] == 1e-2
    assert any(b == pytest.approx(0.1 * a) for a, b in itertools.pairwise(given))


def test_penalty_and_accuracy_of_the_prediction():
    """The penalty makes the prediction at least half of the penalty's part; both by hand."""
    prediction = Prediction(-3.0, 1.0, before=2.0, after=1.0)
    assert prediction.squares == 3.0
    assert prediction(2.0) == -4.0 + 6.0
    assert prediction.updated(1.0) == pytest.approx(16 / 3)
    assert prediction.updated(20.0) == 20.0
    assert prediction(prediction.updated(1.0)) >= 0.5 * prediction.updated(1.0) * 3.0
    assert prediction.error(2.0, 0.1, 5.0) == pytest.approx(0.1 * 5.0 + 2.0 * 0.01 + 2 * 2.0 * 0.1 * 1.0)


@pytest.mark.parametrize("initial_radius", [None, 0.3])
def test_a_second_order_correction_prevents_the_rejection_of_good_steps(initial_radius):
    """The classical example of Maratos: J = 2 (u^2 + z^2 - 1) - u on the circle, whose minimum is (1, 0); full steps
    from feasible points increase J and the constraint at once.
    """

    def circle(x):
        u, z = x
        J, g, H = 2 * (u**2 + z**2 - 1) - u, np.array([4 * u - 1, 4 * z]), 4 * np.eye(2)
        return J, g, H, np.array([u**2 + z**2 - 1]), np.array([[2 * u, 2 * z]]), [2 * np.eye(2)]

    start = np.cos(0.6), np.sin(0.6)
    given = dict(initial_radius=initial_radius, **TIGHT)
    result = minimize_composite_step(Dense(1, circle), np.array(start[:1]), np.array(start[1:]), **given)
    assert result.converged
    assert abs(result.x[0]) < 1e-8
    assert abs(result.state[0] - 1) < 1e-9
    assert result.iterations <= 8


# -- breakdowns --------------------------------------------------------------------------------------------------------
class Reduced:
    """The reduced problem of u(z), by Newton's method for the constraint."""

    def __init__(self, dense):
        self.dense = dense

    def state(self, z):
        u = np.zeros(self.dense.m)
        for _ in range(50):
            c = self.dense.constraint(u, z)
            u = u - np.linalg.solve(self.dense.at(u, z)[4], c)
        return u

    def value(self, z):
        return self.dense.value(self.state(z), z)

    def gradient(self, z):
        d, u = self.dense, self.state(z)
        of_state, of_control = d.gradient(u, z)
        return d.representative(of_control + d.control_adjoint(u, z, d.solve_adjoint(u, z, -of_state, None)[0]))

    def hessian_action(self, z, v):
        d, u = self.dense, self.state(z)
        lam = d.solve_adjoint(u, z, -d.gradient(u, z)[0], None)[0]
        hu, hz = d.lagrangian_hessian(u, z, lam, d.tangent(u, z, v, None)[0], v)
        return d.representative(hz + d.control_adjoint(u, z, d.solve_adjoint(u, z, -hu, None)[0]))

    def inner(self, a, b):
        return self.dense.inner(a, b)


@pytest.mark.parametrize("why", ["contraction", "failure"])
def test_a_breakdown_is_named_and_another_method_continues(why):
    n, derivatives, h = semilinear()

    class Broken(WithKKT):
        def kkt_solve(self, *given):
            if why == "failure":
                raise SolverFailure("no factor")
            return None, given[3][1], None, KKTReport(False, 30, 0.7)

    lines = []
    problem = Broken(n, derivatives, weight=h)
    first = minimize_composite_step(problem, np.zeros(n), np.zeros(n), gtol_rel=1e-10, monitor=lines.append)
    assert not first.converged
    assert first.reason is StopReason.BREAKDOWN
    expected = "does not contract (residual 7.0e-01 after 30" if why == "contraction" else "failed: "
    assert expected in first.breakdown
    assert expected in lines[-1]
    assert sum(record.accepted for record in first.history[1:]) == 2
    assert first.breakdown in first.message
    reduced = Reduced(Dense(n, derivatives, weight=h))
    second = minimize_trust_region(reduced, first.x, gtol_rel=0, gtol_abs=1e-10 * first.history[0].gradient_norm)
    both = continued(first, second, "reduced trust region")
    assert both.converged
    assert "handed over to the reduced trust region" in both.message
    assert expected in both.message
    assert [record.iteration for record in both.history] == list(range(both.iterations + 1))
    assert both.iterations == first.iterations + second.iterations
    assert both.composite_steps == first.iterations
    direct = minimize_trust_region(reduced, np.zeros(n), gtol_rel=1e-10)
    assert np.abs(both.x - direct.x).max() < 1e-7 * np.abs(direct.x).max()


def test_a_linear_solve_that_fails_at_an_iterate_ends_the_run_by_name():
    class Broken(Dense):
        def tangent(self, *given):
            raise SolverFailure("zero pivot")

    result = minimize_composite_step(Broken(1, valley), np.zeros(1), np.ones(1))
    assert not result.converged
    assert result.reason == "composite steps broke down"
    assert "zero pivot" in result.message


def test_trial_points_without_a_value_are_rejected():
    """J is defined for z < 1.5 only: steps that are too long are shortened."""

    class Partial(Dense):
        def value(self, u, z):
            return np.inf if z[0] > 1.5 else super().value(u, z)

    given = dict(initial_radius=5.0, **TIGHT)
    result = minimize_composite_step(Partial(1, valley), np.array([0.0]), np.array([0.2]), **given)
    assert result.converged
    assert any("no trial point" in record.note for record in result.history)


def test_a_wrong_derivative_ends_by_a_small_radius():
    class Wrong(Dense):
        def gradient(self, u, z):
            return tuple(-g for g in super().gradient(u, z))

    result = minimize_composite_step(Wrong(1, valley), np.array([0.0]), np.array([0.2]), max_it=200)
    assert not result.converged
    assert result.breakdown
    assert result.reason in (StopReason.RADIUS, StopReason.BREAKDOWN)


def test_options_are_checked_and_callbacks_stop():
    problem = Dense(1, valley)
    for given in (dict(ctol_rel=2), dict(eta=0.5), dict(max_it=-1), dict(monitor=3), dict(cg_max_it=0)):
        with pytest.raises(InputError):
            minimize_composite_step(problem, np.zeros(1), np.zeros(1), **given)
    with pytest.raises(InputError, match="u0"):
        minimize_composite_step(problem, np.zeros(1, dtype=complex), np.zeros(1))
    result = minimize_composite_step(problem, np.zeros(1), np.zeros(1), callback=lambda z, record: True, **TIGHT)
    assert result.reason is StopReason.CALLBACK
    assert result.iterations == 1
    assert minimize_composite_step(problem, np.zeros(1), np.zeros(1), max_it=0).reason is StopReason.MAX_IT
    with pytest.raises(SolverFailure, match="first guess"):
        minimize_composite_step(problem, np.array([np.nan]), np.zeros(1))
