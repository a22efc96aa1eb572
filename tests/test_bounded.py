"""The bounded minimiser against KKT conditions, finite identification of the active bounds and other codes."""

import json
import math

import numpy as np
import pytest
from mpi4py import MPI
from scipy.optimize import Bounds, minimize

from pint_fem.optimize import NonFiniteError, minimize_trust_region
from pint_fem.optimize.trust_region.bounded import minimize_bounded
from tests.test_trust_region import Smooth, bowl, mass_matrix, norm, pairs, quadratic, random_spd, rosenbrock


class Distributed:
    """A serial problem on R^n with product sum w_i a_i b_i, its vectors split over processes.

    Process 0 has the entries before `first`, the last one those from there on, processes between them none.
    """

    def __init__(self, problem, weights, comm, first):
        """One process alone has all entries."""
        self.problem, self.comm = problem, comm
        last = comm.rank == comm.size - 1
        self.part = slice(0 if comm.rank == 0 else first, weights.size if last else first)
        self.weights = weights[self.part]

    def whole(self, x):
        """All entries."""
        return np.concatenate(self.comm.allgather(x))

    def value(self, x):
        """J, the same on all processes."""
        return self.problem.f(self.whole(x))

    def gradient(self, x):
        """Own part of J'/w."""
        return self.problem.df(self.whole(x))[self.part] / self.weights

    def hessian_action(self, x, v):
        """Own part of J'' v / w."""
        return (self.problem.d2f(self.whole(x)) @ self.whole(v))[self.part] / self.weights

    def inner(self, a, b):
        """The weighted product, summed in rank order."""
        return sum(self.comm.allgather(float((self.weights * a) @ b)))


def box_problem(seed, n=30, active=0.4):
    """A quadratic in a diagonal product, a box and the minimiser there, by construction with strict complementarity.

    Choose x* and which bounds are active, then the derivative at x* with the signs of the KKT conditions.
    """
    rng = np.random.default_rng(seed)
    H, w, x = random_spd(n, rng, 1, 100), rng.uniform(0.1, 10, n), rng.standard_normal(n)
    at_lower, at_upper = rng.random(n) < active / 2, rng.random(n) < active / 2
    at_upper &= ~at_lower
    lower = np.where(at_lower, x, x - rng.uniform(0.1, 1, n))
    upper = np.where(at_upper, x, x + rng.uniform(0.1, 1, n))
    multiplier = rng.uniform(0.5, 5, n) * (at_lower.astype(float) - at_upper)
    return quadratic(H, H @ x - multiplier, np.diag(w)), lower, upper, x


def projected_gradient(problem, x, lower, upper):
    """The gradient without the components that point out of the box."""
    g = problem.gradient(x)
    return np.where(((x <= lower) & (g > 0)) | ((x >= upper) & (g < 0)) | (lower == upper), 0.0, g)


# --- solutions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_quadratic_with_known_solution(seed):
    """The KKT point, its active bounds exactly; every iterate in the box, J falling."""
    problem, lower, upper, x = box_problem(seed)
    iterates = []
    result = minimize_bounded(
        problem, np.zeros(30), lower, upper, gtol_rel=1e-10, callback=lambda x, _: iterates.append(x) and False
    )
    assert result.converged
    np.testing.assert_allclose(result.x, x, atol=1e-8)
    np.testing.assert_array_equal(result.x == lower, x == lower)
    np.testing.assert_array_equal(result.x == upper, x == upper)
    assert all((lower <= y).all() and (y <= upper).all() for y in iterates)
    scale = 1e-12 * abs(result.value)  # the accuracy of J
    assert all(after.value <= before.value + scale for before, after in pairs(result.history))
    assert result.gradient_norm == pytest.approx(norm(problem, projected_gradient(problem, result.x, lower, upper)))


@pytest.mark.parametrize("seed", range(4))
def test_active_bounds_are_found_in_finitely_many_iterations(seed):
    """Once found they stay, and the steps after that are Newton's on the free components: here one or two."""
    problem, lower, upper, x = box_problem(seed)
    iterates = []
    result = minimize_bounded(
        problem,
        np.zeros(30),
        lower,
        upper,
        gtol_rel=1e-12,
        cg_rtol=1e-13,
        callback=lambda x, _: iterates.append(x) and False,
    )
    found = [bool(((y == lower) == (x == lower)).all() and ((y == upper) == (x == upper)).all()) for y in iterates]
    first = found.index(True)
    assert all(found[first:])
    assert result.converged
    assert result.iterations <= first + 3


@pytest.mark.parametrize("upper", [0.5, 0.9, 2.0])
def test_rosenbrock_agrees_with_lbfgsb(upper):
    """With active bounds (0.5, 0.9) and without (2.0)."""
    problem, x0 = rosenbrock(10), np.zeros(10)
    result = minimize_bounded(problem, x0, -0.5, upper, max_it=100, gtol_rel=0, gtol_abs=1e-9)
    other = minimize(
        problem.f, x0, jac=problem.df, bounds=Bounds(-0.5, upper), method="L-BFGS-B",
        options={"ftol": 1e-16, "gtol": 1e-9, "maxiter": 1000},
    )  # fmt: skip
    assert result.converged
    np.testing.assert_allclose(result.x, other.x, atol=1e-7)
    assert (result.x == upper).any() == (upper < 1)


def test_last_iterates_converge_quadratically():
    """With the active bounds found and CG to the end it is Newton's method: |pg+| <= L/2 |s|^2, L = 0.86 max w."""
    lower = np.array([-math.inf, 0.2, -math.inf, 0.5, -math.inf, -math.inf])
    result = minimize_bounded(bowl(), np.full(6, 3.0), lower, math.inf, cg_rtol=1e-14, gtol_rel=1e-13, max_it=60)
    assert result.converged
    assert (result.x[[1, 3]] == lower[[1, 3]]).all()
    full = [r for r in result.history[-4:] if r.cg_stop == "residual" and r.accepted]
    assert len(full) >= 3
    for r in full:
        assert r.gradient_norm <= 0.5 * 0.86 * r.step_norm**2 + 1e-14
    a, b, c = [r.gradient_norm for r in result.history if r.gradient_norm > 1e-13][-3:]
    assert math.log(c / b) / math.log(b / a) > 1.7


def test_degenerate_solution():
    """A bound is active at the minimiser with multiplier zero: found all the same, as the Hessian is definite."""
    rng = np.random.default_rng(5)
    n = 12
    H, x = random_spd(n, rng), rng.standard_normal(n)
    problem = quadratic(H, H @ x, np.eye(n))
    lower = np.where(np.arange(n) % 2 == 0, x, -math.inf)
    result = minimize_bounded(problem, x + 1, lower, math.inf, gtol_rel=1e-9)
    assert result.converged
    np.testing.assert_allclose(result.x, x, atol=1e-7)


def test_negative_curvature_ends_on_a_bound():
    """A concave function has its minimum in a corner of the box."""
    n = 5
    problem = quadratic(-np.eye(n), np.linspace(-0.2, 0.2, n), np.eye(n))
    result = minimize_bounded(problem, np.full(n, 0.05), -1, 1, gtol_abs=1e-12)
    assert result.converged
    assert result.gradient_norm == 0
    assert (np.abs(result.x) == 1).all()


# --- without bounds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"cg_max_it": 3}, {"cg_rtol": 1e-8}, {"initial_radius": 0.01}])
def test_without_bounds_it_is_the_unbounded_minimiser(options):
    """The Cauchy step is the first CG iteration: same iterates, same work."""
    problem, x0 = rosenbrock(10), np.zeros(10)
    free = minimize_trust_region(problem, x0, max_it=25, **options)
    result = minimize_bounded(problem, x0, max_it=25, **options)
    for a, b in zip(free.history, result.history, strict=True):
        assert (a.accepted, a.cg_iterations, a.cg_stop) == (b.accepted, b.cg_iterations, b.cg_stop)
        assert b.value == pytest.approx(a.value, rel=1e-7, abs=1e-12)
    assert result.hessian_calls == free.hessian_calls
    assert result.gradient_calls == free.gradient_calls


def test_weights_scale_the_variables():
    """x with product w is y = sqrt(w) x with the Euclidean one: same J along the way, same work."""
    rng = np.random.default_rng(2)
    n = 15
    H, b, w = random_spd(n, rng), rng.standard_normal(n), rng.uniform(0.01, 100, n)
    root = np.sqrt(w)
    scaled = quadratic(H * np.outer(root, root), root * b, np.diag(w))
    weighted = minimize_bounded(scaled, np.zeros(n), -0.1 / root, 0.1 / root)
    plain = minimize_bounded(quadratic(H, b, np.eye(n)), np.zeros(n), -0.1, 0.1)
    np.testing.assert_allclose(weighted.x * root, plain.x, atol=1e-10)
    assert [r.cg_iterations for r in weighted.history] == [r.cg_iterations for r in plain.history]


# --- work ------------------------------------------------------------------------------------------------------------


def test_retries_ask_for_no_hessian_action_again():
    """The radius is far too large and shrinks by rejections: the directions are the first ones, cut shorter."""
    problem = rosenbrock(6)
    calls = []
    action = problem.hessian_action
    problem.hessian_action = lambda x, v: calls.append((x.tobytes(), v.tobytes())) or action(x, v)
    result = minimize_bounded(problem, np.full(6, -1.0), -math.inf, 3.0, initial_radius=50.0, max_it=60)
    assert result.converged
    assert sum(not r.accepted for r in result.history) >= 2
    assert len(set(calls)) == len(calls) == result.hessian_calls


def test_preconditioned_newton_steps_need_one_cg_iteration():
    """P = H^-1 and no bounds: after the Cauchy step one iteration; E P E is exact if H is block diagonal."""
    n = 20
    rng = np.random.default_rng(3)
    H = np.diag(np.geomspace(1, 1e4, n))
    b, w = rng.standard_normal(n) * np.diag(H), rng.uniform(0.5, 2, n)
    problem = quadratic(H, b, np.diag(w))
    inverse = lambda r: w * r / np.diag(H)  # of the Riesz Hessian W^-1 H
    lower = np.where(rng.random(n) < 0.3, np.linalg.solve(H, b) + 0.5, -math.inf)
    plain = minimize_bounded(problem, np.ones(n) * 3, lower, gtol_rel=1e-10, cg_rtol=1e-11)
    result = minimize_bounded(problem, np.ones(n) * 3, lower, gtol_rel=1e-10, cg_rtol=1e-11, preconditioner=inverse)
    assert result.converged
    np.testing.assert_allclose(result.x, np.maximum(np.linalg.solve(H, b), lower), atol=1e-9)
    assert result.hessian_calls < 0.5 * plain.hessian_calls


def test_learned_preconditioner_keeps_the_solution():
    """ "limited-memory" changes the work, not the minimiser."""
    options = {"max_it": 100, "gtol_rel": 1e-9}
    result = minimize_bounded(rosenbrock(10), np.zeros(10), -0.5, 0.9, preconditioner="limited-memory", **options)
    other = minimize_bounded(rosenbrock(10), np.zeros(10), -0.5, 0.9, **options)
    assert result.converged
    np.testing.assert_allclose(result.x, other.x, atol=1e-8)


def test_gauss_newton_on_a_residual_that_vanishes():
    """J = |r|^2 / 2 with r = 0 at a point of the box: Gauss-Newton converges there, and takes its own action only."""
    r = lambda x: np.array([x[0] ** 2 + x[1] - 3, x[0] + x[1] ** 2 - 5])
    jac = lambda x: np.array([[2 * x[0], 1.0], [1.0, 2 * x[1]]])
    problem = Smooth(lambda x: 0.5 * r(x) @ r(x), lambda x: jac(x).T @ r(x), None, n=2)
    problem.gauss_newton_action = lambda x, v: jac(x).T @ (jac(x) @ v)
    result = minimize_bounded(problem, np.array([0.5, 0.5]), 0, 2, gtol_rel=1e-12, hessian="gauss-newton")
    assert result.converged
    np.testing.assert_allclose(result.x, [1, 2], atol=1e-9)


# --- feasibility -----------------------------------------------------------------------------------------------------


def test_first_guess_out_of_bounds_is_projected_with_a_note():
    """The monitor says by how much; without a violation it does not."""
    lines = []
    problem = bowl()
    result = minimize_bounded(problem, np.array([3.0, 0, 0, 0, 0, -4.0]), -1, 1, monitor=lines.append)
    assert "out of bounds by 3.606" in lines[0]  # sqrt(2^2 + 3^2)
    assert result.history[0].value == problem.f(np.array([1.0, 0, 0, 0, 0, -1.0]))
    quiet = []
    minimize_bounded(problem, np.zeros(6), -1, 1, monitor=quiet.append)
    assert len(quiet) == 1 + len(minimize_bounded(problem, np.zeros(6), -1, 1).history)
    assert not any("out of bounds" in line for line in quiet)


def test_fixed_components_stay():
    """lower == upper removes a component: the problem is that of the others."""
    problem = rosenbrock(4)
    lower, upper = np.full(4, -math.inf), np.full(4, math.inf)
    lower[1] = upper[1] = 0.25
    result = minimize_bounded(problem, np.zeros(4), lower, upper, gtol_abs=1e-10, max_it=100)
    assert result.converged
    assert result.x[1] == 0.25
    g = problem.df(result.x)
    np.testing.assert_allclose(g[[0, 2, 3]], 0, atol=1e-8)
    everything = minimize_bounded(problem, np.zeros(4), 0.5, 0.5)
    assert everything.converged
    assert everything.iterations == 0
    assert (everything.x == 0.5).all()


def test_every_point_asked_for_is_in_the_box():
    """J, gradient and Hessian need not exist outside: here log(x) at x <= 0 would be nan."""
    target = np.array([2.0, 0.5, 1e-3, 3.0])
    problem = Smooth(
        lambda x: np.sum(x - target * np.log(x)), lambda x: 1 - target / x, lambda x: np.diag(target / x**2), n=4
    )
    with np.errstate(all="raise"):
        result = minimize_bounded(problem, np.full(4, 1.0), 1e-2, 2.5, max_it=100, gtol_rel=1e-10)
    assert result.converged
    np.testing.assert_allclose(result.x, np.clip(target, 1e-2, 2.5), atol=1e-8)


# --- ends ------------------------------------------------------------------------------------------------------------


def test_value_not_finite_at_a_trial_point_is_a_rejected_step():
    """The radius shrinks until J is finite."""
    inner = bowl()
    problem = Smooth(lambda x: inner.f(x) if x.max() < 2.5 else math.inf, inner.df, lambda x: 1e-3 * inner.d2f(x), n=6)
    result = minimize_bounded(problem, np.full(6, -2.0), -3, 3, max_it=200)
    assert any(math.isnan(r.ratio) for r in result.history[1:])
    assert result.converged


@pytest.mark.parametrize("what", ["value", "gradient", "hessian"])
def test_not_finite_is_refused(what):
    """With the last good iterate."""
    problem = bowl()
    if what == "value":
        problem.f = lambda x: math.nan
    elif what == "gradient":
        df = problem.df
        problem.df = lambda x: df(x) if (x == 0).all() else np.full(6, math.nan)
    else:
        problem.d2f = lambda x: np.diag(np.full(6, math.nan))
    words = {"value": "J = nan at the first guess", "gradient": "gradient", "hessian": "Hessian action"}
    with pytest.raises(NonFiniteError, match=f"{words[what]}.* (is|where J is|are) .*finite") as caught:
        minimize_bounded(problem, np.zeros(6), -1, 1)
    np.testing.assert_array_equal(caught.value.x, np.zeros(6))


def test_callback_and_iteration_limit_stop():
    """And the result is the iterate of that moment."""
    problem, lower, upper, _ = box_problem(0)
    result = minimize_bounded(problem, np.zeros(30), lower, upper, callback=lambda x, r: r.iteration == 2)
    assert (result.reason, result.iterations, result.converged) == ("stopped by callback", 2, False)
    limited = minimize_bounded(problem, np.zeros(30), lower, upper, max_it=2)
    assert (limited.reason, limited.iterations) == ("maximum iterations", 2)
    np.testing.assert_array_equal(limited.x, result.x)


def test_wrong_gradient_ends_with_a_small_radius():
    """An ascent direction never lowers J: the radius falls until a step says nothing any more."""
    problem = bowl()
    df = problem.df
    problem.df = lambda x: -df(x)
    result = minimize_bounded(problem, np.ones(6), -5, 5, max_it=200)
    assert result.reason in ("radius too small", "round-off")
    assert not result.converged
    assert result.value == pytest.approx(problem.f(np.ones(6)))


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Memory:
    """A checkpoint that goes through JSON text, and may kill the run while it saves."""

    def __init__(self, saves=None):
        self.saves, self.text, self.vectors = saves, None, {}

    def save(self, scalars, vectors):
        """Keep a copy."""
        if self.saves is not None:
            if self.saves == 0:
                raise KeyboardInterrupt
            self.saves -= 1
        self.text, self.vectors = json.dumps(scalars), {name: v.copy() for name, v in vectors.items()}

    def load(self):
        """Give it back."""
        return None if self.text is None else (json.loads(self.text), self.vectors)


@pytest.mark.parametrize("saves", [1, 3, 8, 10])
@pytest.mark.parametrize("preconditioner", [None, "limited-memory"])
def test_a_killed_run_continues_with_the_same_trajectory(saves, preconditioner):
    """All records and the result are those of the run that was not killed, to the last bit."""
    options = {"max_it": 60, "preconditioner": preconditioner, "initial_radius": 5.0}
    bounds = (-0.5, np.linspace(0.5, 1.2, 8))
    whole = minimize_bounded(rosenbrock(8), np.full(8, -0.4), *bounds, **options)
    assert any(not r.accepted for r in whole.history)
    memory = Memory(saves)
    with pytest.raises(KeyboardInterrupt):
        minimize_bounded(rosenbrock(8), np.full(8, -0.4), *bounds, checkpoint=memory, **options)
    memory.saves = None
    rest = minimize_bounded(rosenbrock(8), np.zeros(8), *bounds, checkpoint=memory, **options)
    assert [str(r) for r in rest.history] == [str(r) for r in whole.history]
    np.testing.assert_array_equal(rest.x, whole.x)
    with pytest.raises(ValueError, match="out of bounds"):
        minimize_bounded(rosenbrock(8), np.zeros(8), 5.0, 6.0, checkpoint=memory, **options)


# --- input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lower", "upper", "says"),
    [
        (1.0, 0.0, "no value for 6 components.*first 1.0 and 0.0"),
        (math.nan, 1.0, "no value"),
        (math.inf, math.inf, "no value"),
        (-math.inf, -math.inf, "no value"),
        (np.zeros(5), 1.0, r"shapes \(5,\)"),
        (np.zeros((6, 1)), 1.0, "shapes"),
    ],
)
def test_bad_bounds_are_refused_before_any_work(lower, upper, says):
    """J is not even asked for."""
    problem = bowl()
    problem.f = None
    with pytest.raises(ValueError, match=says):
        minimize_bounded(problem, np.zeros(6), lower, upper)


def test_inner_product_that_is_not_diagonal_is_refused():
    """A consistent mass matrix couples neighbours: the pointwise projection is not the orthogonal one."""
    t = np.linspace(0, 1, 9)
    problem = quadratic(np.eye(9), np.ones(9), mass_matrix(t))
    with pytest.raises(ValueError, match="lumped mass"):
        minimize_bounded(problem, np.zeros(9), 0, 1)
    problem.M = np.diag(mass_matrix(t).sum(axis=1))
    problem.M_inverse = np.linalg.inv(problem.M)
    assert minimize_bounded(problem, np.zeros(9), 0, 0.5).converged


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gtol_rel", 1.0),
        ("gtol_abs", -1.0),
        ("max_it", 2.5),
        ("initial_radius", 0.0),
        ("max_radius", 0.0),
        ("min_radius", -1.0),
        ("eta", 0.25),
        ("hessian", "exact"),
        ("cg_max_it", 0),
        ("cg_rtol", 1.0),
        ("preconditioner", "ilu"),
        ("preconditioner", 3),
        ("preconditioner_memory", 0),
        ("value_rtol", 1.0),
        ("checkpoint", "file"),
        ("monitor", "stdout"),
        ("callback", 1),
    ],
)
def test_bad_options_are_refused(name, value):
    """With what was given."""
    with pytest.raises(ValueError, match=name):
        minimize_bounded(bowl(), np.zeros(6), -1, 1, **{name: value})


def test_indefinite_preconditioner_is_refused():
    """Its (r, P r) would be negative."""
    problem, lower, upper, _ = box_problem(1)
    with pytest.raises(ValueError, match="positive definite"):
        minimize_bounded(problem, np.zeros(30), lower, upper, preconditioner=lambda r: -r)


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_processes_take_the_path_of_one(seed):
    """Bounds that are active on one process only included: the records agree on all, with those of a serial run."""
    comm = MPI.COMM_WORLD
    problem, lower, upper, _ = box_problem(seed)
    lower[:4], upper[:4] = -math.inf, math.inf
    local = Distributed(problem, np.diag(problem.M).copy(), comm, 4)
    part = local.part
    result = minimize_bounded(local, np.full(30, 2.0)[part], lower[part], upper[part], gtol_rel=1e-9)
    serial = minimize_bounded(problem, np.full(30, 2.0), lower, upper, gtol_rel=1e-9)
    assert result.converged
    np.testing.assert_allclose(local.whole(result.x), serial.x, atol=1e-8)
    for a, b in zip(result.history[:5], serial.history[:5], strict=True):  # later, round-off may add a CG iteration
        assert (a.accepted, a.cg_iterations, a.cg_stop) == (b.accepted, b.cg_iterations, b.cg_stop)
        assert a.value == pytest.approx(b.value, rel=1e-10)
    lines = comm.allgather([str(r) for r in result.history])
    assert all(other == lines[0] for other in lines)


@pytest.mark.parallel(3)
def test_a_fault_on_one_process_is_refused_on_all():
    """lower above upper, a wrong shape: nobody waits for the others."""
    comm = MPI.COMM_WORLD
    problem, lower, _, _ = box_problem(0)
    local = Distributed(problem, np.diag(problem.M).copy(), comm, 4)
    n = lower[local.part].size
    crossed = np.full(n, 1.0 if comm.rank == comm.size - 1 else -1.0)
    with pytest.raises(ValueError, match="no value"):
        minimize_bounded(local, np.zeros(n), crossed, 0.0)
    misshapen = np.zeros(n + comm.rank)
    with pytest.raises(ValueError, match="shape"):
        minimize_bounded(local, np.zeros(n), misshapen, 1.0)
