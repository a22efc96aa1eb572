"""Simultaneous optimisation with slowly converging solvers, and the L-BFGS operator it uses."""

import math

import numpy as np
import pytest
from mpi4py import MPI

from pint_fem.optimize import NonFiniteError
from pint_fem.optimize.lbfgs import InverseLBFGS
from pint_fem.optimize.one_shot.method import minimize_one_shot
from tests.test_bounded import Distributed
from tests.test_trust_region import Smooth, bowl, norm, pairs, quadratic, random_quadratic, random_spd, rosenbrock


class FixedPoint:
    """min |u - d|^2/2 + alpha |x|^2/2 with the state u = G(u, x), by fixed-point iterations of state and adjoint.

    G(u, x) = N u + (I - N) S x + c sin(u), the adjoint is l = G_u^T l + u - d and the gradient alpha x + G_x^T l. N has
    spectral radius rho and eigenvalues of both signs; a call is a step of the state and one of the adjoint.
    """

    def __init__(self, rho, *, seed=0, n=8, m=20, alpha=0.01, condition=10.0, c=0.0):
        """Start both solvers at zero."""
        rng = np.random.default_rng(seed)
        Q = np.linalg.qr(rng.standard_normal((m, m)))[0]
        self.N = Q @ np.diag(rho * np.linspace(0.1, 1, m) * np.sign(rng.standard_normal(m))) @ Q.T
        self.Gx = (
            (np.eye(m) - self.N)
            @ np.linalg.qr(rng.standard_normal((m, n)))[0]
            @ np.diag(np.geomspace(1, 1 / condition, n))
        )
        self.d, self.alpha, self.c = rng.standard_normal(m), alpha, c
        self.u, self.l, self.solves = np.zeros(m), np.zeros(m), 0

    def G(self, u, x):
        """The state iteration."""
        return self.N @ u + self.Gx @ x + self.c * np.sin(u)

    def G_adjoint(self, l, u):
        """The adjoint iteration."""
        return self.N.T @ l + self.c * np.cos(u) * l + u - self.d

    def step(self, x):
        """One iteration of both; the relative residual before it."""
        self.solves += 1
        u = self.G(self.u, x)
        l = self.G_adjoint(self.l, u)
        change = [np.linalg.norm(a - b) / (1 + np.linalg.norm(a)) for a, b in ((u, self.u), (l, self.l))]
        self.u, self.l = u, l
        return max(change)

    def read(self, x):
        """J and g at the iterates."""
        misfit = self.u - self.d
        return 0.5 * misfit @ misfit + 0.5 * self.alpha * x @ x, self.alpha * x + self.Gx.T @ self.l

    def advance(self, x):
        """One iteration, and the residual that is left."""
        self.step(x)
        left = [self.G(self.u, x) - self.u, self.G_adjoint(self.l, self.u) - self.l]
        residual = max(np.linalg.norm(r) / (1 + np.linalg.norm(a)) for r, a in zip(left, (self.u, self.l), strict=True))
        return *self.read(x), residual

    def solved(self, x):
        """All iterations it takes."""
        while self.step(x) > 1e-11:
            pass
        return self.read(x)

    def value(self, x):
        """Accurate."""
        return self.solved(x)[0]

    def gradient(self, x):
        """Accurate."""
        return self.solved(x)[1]

    def inner(self, a, b):
        """Euclidean."""
        return float(a @ b)


class Solved(FixedPoint):
    """The same with the solvers run to the end at every design."""

    advance = None


def optimum(problem):
    """Of the linear problem (c = 0)."""
    m = problem.N.shape[0]
    S = np.linalg.solve(np.eye(m) - problem.N, problem.Gx)
    return np.linalg.solve(S.T @ S + problem.alpha * np.eye(S.shape[1]), S.T @ problem.d)


# --- the method ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.1, 0.3, 0.6, 0.8])
@pytest.mark.parametrize("seed", [0, 1])
def test_optimum_of_a_linear_problem(rho, seed):
    """g is alpha-monotone: the distance to the exact optimum is at most |g| / alpha."""
    problem = FixedPoint(rho, seed=seed)
    result = minimize_one_shot(problem, np.zeros(8), gtol_rel=1e-6, max_it=2000)
    assert result.converged
    assert norm(problem, result.x - optimum(problem)) <= result.gradient_norm / problem.alpha * (1 + 1e-6)
    assert result.residual <= 1e-6
    assert result.gradient_norm == pytest.approx(norm(problem, Solved.gradient(problem, result.x)), rel=1e-4)


@pytest.mark.parametrize(("rho", "c"), [(0.1, 0.0), (0.3, 0.2), (0.6, 0.1), (0.8, 0.0), (0.8, 0.05)])
def test_far_fewer_solver_iterations_than_solving_at_every_design(rho, c):
    """The accurate run takes few designs, with about log(1e-11)/log(rho) solver iterations each."""
    simultaneous, accurate = FixedPoint(rho, c=c, condition=30.0), Solved(rho, c=c, condition=30.0)
    x0 = np.zeros(8)
    one = minimize_one_shot(simultaneous, x0, max_it=3000)
    two = minimize_one_shot(accurate, x0, max_it=300)
    assert one.converged
    assert two.converged
    np.testing.assert_allclose(one.x, two.x, atol=1e-2)
    assert simultaneous.solves < accurate.solves / 2
    assert one.value_calls == 1 or one.value_calls == one.gradient_calls


def test_good_solvers_move_the_design_in_most_iterations():
    """With a contraction of 1/100 hardly any iteration is spent on the same design."""
    result = minimize_one_shot(FixedPoint(0.01), np.zeros(8), gtol_rel=1e-5)
    assert result.converged
    moved = sum(r.update == "accepted" for r in result.history)
    assert moved >= 0.6 * result.iterations


def test_every_error_estimate_covers_the_error_when_a_step_is_taken():
    """At accepted designs |g - true g| is within the estimate, up to a factor; the solvers contract by 0.5."""
    problem, reference = FixedPoint(0.5), Solved(0.5)
    seen = []
    advance = problem.advance
    problem.advance = lambda x: seen.append((x.copy(), *advance(x))) or seen[-1][1:]
    result = minimize_one_shot(problem, np.zeros(8), max_it=500)
    assert result.converged
    accepted = [(r, s) for r, s in zip(result.history, seen, strict=True) if r.update == "accepted"]
    assert len(accepted) > 5
    for record, (x, _, g, _) in accepted:
        error = np.linalg.norm(g - reference.gradient(x))
        assert error <= 5 * record.gradient_error + 1e-9
        assert error < 0.9 * record.gradient_norm


def test_an_end_the_accurate_gradient_contradicts_is_no_end():
    """`advance` is off by 0.05 and calls it 1e-9 until the accurate gradient is asked for: gone on from there."""
    problem = bowl()
    gradient, asked = problem.gradient, []
    problem.advance = lambda x: (problem.value(x), gradient(x) - (0.0 if asked else 0.05), 1e-9)
    problem.gradient = lambda x: asked.append(x.copy()) or gradient(x)
    x0 = np.full(6, 3.0)
    result = minimize_one_shot(problem, x0, gtol_rel=1e-4, max_it=300)
    assert result.gradient_calls == len(asked) >= 2
    assert np.linalg.norm(gradient(asked[0])) > 0.1  # 0.05 sqrt(6)
    assert result.converged
    assert np.linalg.norm(gradient(result.x)) <= 1.1e-4 * np.linalg.norm(gradient(x0))


def test_exact_advance_ends_where_accurate_functions_do():
    """Residual 0: nothing is held, every record is a new design but the first."""
    problem = bowl()
    problem.advance = lambda x: (problem.value(x), problem.gradient(x), 0.0)
    result = minimize_one_shot(problem, np.full(6, 3.0), gtol_rel=1e-9)
    without = minimize_one_shot(bowl(), np.full(6, 3.0), gtol_rel=1e-9)
    assert result.converged
    assert not any(r.update == "held" for r in result.history)
    assert [str(r) for r in result.history] == [str(r) for r in without.history]
    assert (result.advance_calls, result.value_calls) == (len(result.history), 1)
    assert (without.advance_calls, without.value_calls) == (0, len(without.history))


# --- without advance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "x0"), [(2, [-1.2, 1.0]), (10, np.zeros(10))])
def test_rosenbrock(n, x0):
    """To the minimum, J falling at each accepted design."""
    result = minimize_one_shot(rosenbrock(n), np.array(x0), gtol_rel=0, gtol_abs=1e-9, max_it=300)
    assert result.converged
    np.testing.assert_allclose(result.x, np.ones(n), atol=1e-9)
    values = [r.value for r in result.history if r.update != "rejected"]
    assert all(after <= before * (1 + 1e-12) + 1e-25 for before, after in pairs(values))


def test_quadratic_in_a_mass_matrix_product():
    """Convex, graded mesh: the solution of the linear system."""
    problem, H = random_quadratic()
    result = minimize_one_shot(problem, np.ones(12), gtol_rel=1e-10, memory=12)
    assert result.converged
    np.testing.assert_allclose(result.x, np.linalg.solve(H, -problem.df(np.zeros(12))), atol=1e-7)


@pytest.mark.parametrize("distinct", [2, 4, 7])
def test_as_many_designs_as_distinct_eigenvalues(distinct):
    """Without a line search: each design is the minimiser over the directions seen so far, and a gradient step."""
    rng = np.random.default_rng(distinct)
    Q = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    eigenvalues = np.geomspace(1, 100, distinct)[np.arange(12) % distinct]
    problem = quadratic(Q @ np.diag(eigenvalues) @ Q.T, rng.standard_normal(12), np.eye(12))
    result = minimize_one_shot(problem, np.zeros(12), gtol_rel=1e-9, memory=12, initial_step=1e-3)
    assert result.converged
    assert result.iterations <= distinct + 1


def test_the_unit_of_the_objective_does_not_matter():
    """J and 1e6 J: the same designs."""
    one, many = bowl(), bowl()
    f, df = many.f, many.df
    many.f, many.df = lambda x: 2.0**20 * f(x), lambda x: 2.0**20 * df(x)
    a = minimize_one_shot(one, np.full(6, 2.0))
    b = minimize_one_shot(many, np.full(6, 2.0))
    np.testing.assert_array_equal(a.x, b.x)


# --- ends ------------------------------------------------------------------------------------------------------------


def test_iteration_limit_and_callback():
    """The result is accurate at the last accepted design."""
    problem = FixedPoint(0.5)
    result = minimize_one_shot(problem, np.zeros(8), max_it=9)
    assert (result.reason, result.iterations, result.converged) == ("maximum iterations", 9, False)
    assert result.value == pytest.approx(Solved(0.5).value(result.x), rel=1e-9)
    seen = []
    stopped = minimize_one_shot(FixedPoint(0.5), np.zeros(8), callback=lambda x, r: seen.append(x) or r.iteration == 9)
    assert stopped.reason == "stopped by callback"
    np.testing.assert_array_equal(stopped.x, result.x)
    np.testing.assert_array_equal(seen[-1], result.x)
    assert minimize_one_shot(problem, np.zeros(8), max_it=0).iterations == 0


def test_monitor_gets_a_header_and_a_line_a_record():
    """As the trust region's does."""
    lines = []
    result = minimize_one_shot(FixedPoint(0.3), np.zeros(8), monitor=lines.append)
    assert lines[1:] == [str(r) for r in result.history]
    assert lines[0].split()[:3] == ["it", "J", "|g|"]


def test_solvers_that_break_down_at_a_design_shorten_the_step():
    """J of inf beyond |x| = 0.4, short of the first step; the optimum is within."""
    problem = FixedPoint(0.3)
    problem.d *= 0.1 / np.linalg.norm(optimum(problem))
    assert np.linalg.norm(optimum(problem)) < 0.2
    advance = problem.advance
    problem.advance = lambda x: advance(x) if np.linalg.norm(x) < 0.4 else (math.inf, x, 1.0)
    result = minimize_one_shot(problem, np.zeros(8), initial_step=5.0)
    assert math.isnan(next(r for r in result.history if r.update == "rejected").value)
    assert result.converged


@pytest.mark.parametrize("broken", ["value at the start", "gradient at the start", "gradient later", "residual"])
def test_not_finite_is_refused(broken):
    """With the last good design; a residual that is none is a ValueError."""
    problem = FixedPoint(0.3)
    advance = problem.advance

    def spoiled(x):
        value, g, residual = advance(x)
        if broken == "value at the start":
            value = math.nan
        elif broken == "gradient at the start" or (broken == "gradient later" and x.any()):
            g = g * math.nan
        elif broken == "residual":
            residual = -1.0
        return value, g, residual

    problem.advance = spoiled
    if broken == "residual":
        with pytest.raises(ValueError, match=r"residual -1\.0"):
            minimize_one_shot(problem, np.zeros(8))
        return
    words = "J.* not finite" if "value" in broken else "gradient.* not finite"
    with pytest.raises(NonFiniteError, match=words) as caught:
        minimize_one_shot(problem, np.zeros(8))
    np.testing.assert_array_equal(caught.value.x, np.zeros(8))


def test_solvers_that_stall_end_the_run():
    """The residual does not fall below the size that would make the gradient known."""
    problem = bowl()
    wobble = iter(np.cos(np.arange(1000.0)))
    problem.advance = lambda x: (problem.value(x), problem.gradient(x) + next(wobble), 0.5)
    result = minimize_one_shot(problem, np.full(6, 0.1), hold_max_it=10)
    assert result.reason == "accuracy not reached"
    assert len(result.history) == 10


def test_a_residual_above_its_tolerance_is_waited_for():
    """The gradient is small at once, the state is not solved: the design is held until it is."""
    problem = FixedPoint(0.5)
    x = optimum(problem)
    result = minimize_one_shot(problem, x, gtol_abs=10.0, residual_tol=1e-8)
    assert result.converged
    assert {str(r.update.value) for r in result.history} == {"first guess", "held"}
    assert result.residual <= 1e-8 < result.history[-2].residual


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_round_off_neither_stalls_nor_loops(offset):
    """Without a tolerance the run ends, at a minimiser to the accuracy of J."""
    problem = bowl(offset=offset)
    result = minimize_one_shot(problem, np.full(6, 2.0), gtol_rel=0.0, max_it=2000)
    assert result.reason in ("round-off", "radius too small", "gradient tolerance")
    assert result.gradient_norm <= 1e-4  # |g|^2 / 2 is about 1e-12 J at most


def test_wrong_gradient_ends_the_run():
    """Ascent: the step is shortened until nothing can be told any more."""
    problem = bowl()
    df = problem.df
    problem.df = lambda x: -df(x)
    result = minimize_one_shot(problem, np.ones(6))
    assert result.reason in ("radius too small", "round-off")
    np.testing.assert_allclose(result.x, 1, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gtol_rel", 1.0),
        ("gtol_abs", math.inf),
        ("residual_tol", -1.0),
        ("max_it", -1),
        ("accuracy", 0.5),
        ("hold_max_it", 1),
        ("initial_step", 0.0),
        ("memory", 1.5),
        ("value_rtol", -0.1),
        ("monitor", "stdout"),
        ("callback", 1),
    ],
)
def test_bad_options_are_refused(name, value):
    """Before J is asked for."""
    with pytest.raises(ValueError, match=name):
        minimize_one_shot(Smooth(None, None, None, n=6), np.zeros(6), **{name: value})


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parallel([1, 3])
def test_processes_take_the_same_path():
    """A distributed design, replicated solvers: the records agree, and the optimum is that of one process."""
    comm = MPI.COMM_WORLD
    serial = FixedPoint(0.4)
    w = np.linspace(1, 3, 8)
    local = Distributed(Smooth(serial.value, serial.gradient, None, n=8), w, comm, 3)

    def advance(x):
        value, g, residual = serial.advance(local.whole(x))
        return value, (g / w)[local.part], residual

    local.advance = advance
    result = minimize_one_shot(local, np.zeros(8)[local.part], max_it=500)
    assert result.converged
    np.testing.assert_allclose(local.whole(result.x), optimum(serial), atol=1e-3)
    lines = comm.allgather([str(r) for r in result.history])
    assert all(other == lines[0] for other in lines)


# --- the operator ----------------------------------------------------------------------------------------------------


def weighted(n, rng):
    """A non-Euclidean inner product."""
    M = random_spd(n, rng, 0.1, 10)
    return M, lambda a, b: float(a @ M @ b)


def test_operator_obeys_the_secant_equation_and_is_self_adjoint():
    """B y = s for the newest pair, (B a, b) = (a, B b), (a, B a) > 0; all in a product that is not Euclidean."""
    rng = np.random.default_rng(0)
    n = 10
    M, inner = weighted(n, rng)
    H = np.linalg.solve(M, random_spd(n, rng))  # self-adjoint in the product
    B = InverseLBFGS(inner, memory=4)
    for _ in range(7):
        s = rng.standard_normal(n)
        assert B.update(s, H @ s)
    assert len(B) == 4
    np.testing.assert_allclose(B.apply(H @ s), s, rtol=1e-10)
    a, b = rng.standard_normal((2, n))
    assert inner(B.apply(a), b) == pytest.approx(inner(a, B.apply(b)))
    assert inner(a, B.apply(a)) > 0


def test_operator_is_the_inverse_after_conjugate_pairs():
    """n pairs conjugate in H determine H^-1."""
    rng = np.random.default_rng(1)
    n = 6
    M, inner = weighted(n, rng)
    A = random_spd(n, rng)
    H = np.linalg.solve(M, A)
    B = InverseLBFGS(inner, memory=n)
    for s in np.linalg.inv(np.linalg.cholesky(A)):  # rows: s_i A s_j = 0 for i != j
        B.update(s, H @ s)
    v = rng.standard_normal(n)
    np.testing.assert_allclose(B.apply(H @ v), v, atol=1e-9)


def test_pairs_without_certain_curvature_are_dropped():
    """Negative, none, not finite, or within what noise can make of it; a kept pair's is known up to one half."""
    rng = np.random.default_rng(2)
    inner = lambda a, b: float(a @ b)
    B = InverseLBFGS(inner, memory=3)
    s, v = np.array([1.0, 0, 0]), rng.standard_normal(3)
    assert not B.update(s, -s)
    assert not B.update(s, np.array([0.0, 1, 0]))
    assert not B.update(s, np.array([math.nan, 0, 0]))
    assert not B.update(0 * s, s)
    assert not B.update(s, 0.5 * s, noise=0.26)
    np.testing.assert_array_equal(B.apply(v), v)
    assert B.update(s, 0.5 * s, noise=0.25)
    assert B.gamma == pytest.approx(2.0)
    B.clear()
    assert len(B) == 0
    nothing = InverseLBFGS(inner, memory=0)
    assert not nothing.update(s, s)
    np.testing.assert_array_equal(nothing.apply(v), v)


@pytest.mark.parametrize("options", [{"memory": -1}, {"memory": 2.0}])
def test_bad_operators_are_refused(options):
    """With what was given."""
    with pytest.raises(ValueError, match="refused"):
        InverseLBFGS(lambda a, b: float(a @ b), **options)


def test_conjugate_operator_obeys_all_secant_equations():
    """B y = s for all pairs of one Hessian, in any directions; self-adjoint and positive."""
    rng = np.random.default_rng(3)
    n = 10
    M, inner = weighted(n, rng)
    H = np.linalg.solve(M, random_spd(n, rng))
    B = InverseLBFGS(inner, memory=7, conjugate=True)
    S = rng.standard_normal((7, n))
    for s in S:
        assert B.update(s, H @ s)
    for s in S:
        np.testing.assert_allclose(B.apply(H @ s), s, atol=1e-8)
    a, b = rng.standard_normal((2, n))
    assert inner(B.apply(a), b) == pytest.approx(inner(a, B.apply(b)))
    assert inner(a, B.apply(a)) > 0


def test_a_hessian_that_has_changed_is_learned_anew():
    """Pairs of another Hessian are not made conjugate to: the newest equation holds to the last digits."""
    rng = np.random.default_rng(4)
    inner = lambda a, b: float(a @ b)
    B = InverseLBFGS(inner, memory=8, conjugate=True)
    for H in (random_spd(8, rng), random_spd(8, rng)):
        for s in rng.standard_normal((4, 8)):
            assert B.update(s, H @ s)
            np.testing.assert_allclose(B.apply(H @ s), s, rtol=1e-6, atol=1e-6)


def test_a_pair_lost_in_noise_still_bounds_the_curvature():
    """gamma grows to the inverse of the largest curvature the pair admits, and no further."""
    inner = lambda a, b: float(a @ b)
    B = InverseLBFGS(inner, memory=3, conjugate=True)
    e, f = np.eye(3)[:2]
    assert B.update(e, 100 * e)
    assert B.gamma == pytest.approx(0.01)
    assert not B.update(f, 2 * f, noise=3.0)
    assert B.gamma == pytest.approx(1 / 5)
    assert not B.update(f, 2 * f, noise=9.0)
    assert B.gamma == pytest.approx(1 / 5)


def test_preconditioner_is_the_operator_before_there_are_pairs_and_off_their_span():
    """gamma P, and B y = s all the same."""
    inner = lambda a, b: float(a @ b)
    D = np.array([1.0, 2, 4, 8])
    B = InverseLBFGS(inner, memory=3, conjugate=True, preconditioner=lambda r: r / D)
    v = np.ones(4)
    np.testing.assert_array_equal(B.apply(v), v / D)
    assert B.update(v, 3 * D * v)  # the Hessian is 3 D
    assert B.gamma == pytest.approx(1 / 3)
    np.testing.assert_allclose(B.apply(np.array([1.0, -1, 1, -1])), np.array([1.0, -1, 1, -1]) / (3 * D))


def test_operator_does_not_modify_or_keep_its_arguments():
    """Pairs are copied, vectors are not overwritten."""
    B = InverseLBFGS(lambda a, b: float(a @ b))
    s, y, v = np.ones(3), np.array([1.0, 2, 3]), np.array([3.0, 1, 2])
    B.update(s, y)
    before = B.apply(v)
    s[:], y[:] = 7, -7
    np.testing.assert_array_equal(B.apply(v), before)
    np.testing.assert_array_equal(v, [3, 1, 2])
