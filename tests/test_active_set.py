"""Primal-dual active sets against the dense textbook iteration, TAO's bounded Newton method and coordinate descent."""

import json
import math

import numpy as np
import pytest
from mpi4py import MPI

from pint_fem.errors import InputError
from pint_fem.optimize import minimize_bounded
from pint_fem.optimize.active_set.method import minimize_active_set
from tests.test_bounded import Distributed, box_problem, projected_gradient
from tests.test_trust_region import norm, pairs, quadratic, rosenbrock


# --- independent solutions -------------------------------------------------------------------------------------------
def textbook(H, b, w, lower, upper, l1, z, c):
    """Sequential primal-dual active sets with dense solves for 1/2 z.Hz - b.z + sum w l1 |z|: the minimiser and the
    number of linear systems, until the sets are the same twice in a row.
    """
    last, n = None, len(b)
    for count in range(100):
        multiplier = -(H @ z - b) / w
        y = z + c * multiplier
        p = np.where(y > c * l1, y - c * l1, np.where(y < -c * l1, y + c * l1, 0.0))
        at_upper, at_lower = p > upper, p < lower
        at_zero = (p == 0) & (l1 > 0) & ~at_upper & ~at_lower
        sign = np.where(y > 0, 1.0, -1.0)
        sets = at_upper * 4 + at_lower * 3 + at_zero * 2 + (sign * (l1 > 0) * ~(at_upper | at_lower | at_zero))
        if last is not None and (sets == last).all():
            return z, count
        last = sets
        # one saddle-point-free dense system: rows of held components are z = target
        A, rhs = H.copy(), b - w * l1 * sign
        for mask, target in ((at_upper, upper), (at_lower, lower), (at_zero, np.zeros(n))):
            A[mask] = np.eye(n)[mask]
            rhs = np.where(mask, target, rhs)
        z = np.linalg.solve(A, rhs)
    raise AssertionError("the textbook iteration cycles")


def coordinate_descent(H, b, w, lower, upper, l1, sweeps=5000):
    """The minimiser by exact minimisation in one component after another."""
    z = np.clip(np.zeros(len(b)), lower, upper)
    for _ in range(sweeps):
        before = z.copy()
        for i in range(len(b)):
            r = b[i] - H[i] @ z + H[i, i] * z[i]
            z[i] = np.clip(np.sign(r) * max(abs(r) - w[i] * l1[i], 0.0) / H[i, i], lower[i], upper[i])
        if np.abs(z - before).max() < 1e-15:
            return z
    raise AssertionError("coordinate descent has not converged")


def control_problem(n=40, alpha=1e-3):
    """A discrete control problem: H = W (alpha + S^T S), S a smoothing kernel, with a target that meets bounds."""
    t = np.linspace(0, 1, n)
    S = np.exp(-30 * (t[:, None] - t[None]) ** 2) / n * 5
    w = np.full(n, 1 / n) * (1 + 0.5 * np.sin(5 * t))
    H = S.T @ (w[:, None] * S) + alpha * np.diag(w)
    b = S.T @ (w * np.sin(9 * t))
    return H, b, w


def forms_of_bounds(n):
    """Bounds of all kinds: two-sided, one-sided, none, varying."""
    t = np.linspace(0, 1, n)
    return {
        "two-sided": (np.full(n, -1.0), np.full(n, 0.7)),
        "one-sided": (np.full(n, -math.inf), np.full(n, 0.5)),
        "varying": (-1 - t, 0.5 + 0.3 * np.cos(7 * t)),
        "none": (np.full(n, -math.inf), np.full(n, math.inf)),
    }


BOUNDS = ("two-sided", "one-sided", "varying", "none")


# --- quadratic functions ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("l1", [0.0, 1e-3])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_as_many_steps_as_the_textbook(bounds, l1):
    H, b, w = control_problem(alpha=0.02)
    lower, upper = forms_of_bounds(len(b))[bounds]
    x, systems = textbook(H, b, w, lower, upper, np.full(len(b), l1), np.zeros(len(b)), 1.0)
    result = minimize_active_set(
        quadratic(H, b, np.diag(w)), np.zeros(len(b)), lower, upper, l1, quadratic=True, prox_step=1.0, gtol_rel=1e-10,
        cg_rtol=1e-12, cg_max_it=400,
    )  # fmt: skip
    assert result.converged
    assert result.iterations == systems
    assert result.history[-1].changed == 0
    np.testing.assert_allclose(result.x, x, atol=1e-8)
    assert systems > 1 or (bounds == "none" and not l1)


@pytest.mark.parametrize("seed", range(6))
def test_known_solution(seed):
    """The KKT point by construction, with default options: its active bounds exactly."""
    problem, lower, upper, x = box_problem(seed)
    result = minimize_active_set(problem, np.zeros(30), lower, upper, quadratic=True, gtol_rel=1e-10)
    assert result.converged
    np.testing.assert_allclose(result.x, x, atol=1e-8)
    np.testing.assert_array_equal(result.x == lower, x == lower)
    np.testing.assert_array_equal(result.x == upper, x == upper)
    assert result.gradient_norm == pytest.approx(norm(problem, projected_gradient(problem, result.x, lower, upper)))
    last = result.history[-1]
    assert (last.at_lower, last.at_upper, last.at_zero) == ((x == lower).sum(), (x == upper).sum(), 0)


def tao_bntr(H, b, lower, upper):
    """The minimiser by TAO's bounded Newton trust region with dense matrices."""
    from petsc4py import PETSc

    n, comm = len(b), PETSc.COMM_SELF
    vector = lambda values: PETSc.Vec().createWithArray(np.array(values, dtype=float), comm=comm)
    matrix = PETSc.Mat().createDense((n, n), array=np.asfortranarray(H), comm=comm)
    matrix.assemble()

    def objective_gradient(_, x, g):
        g.array[:] = H @ x.array_r - b
        return 0.5 * x.array_r @ H @ x.array_r - b @ x.array_r

    x, tao = vector(np.zeros(n)), PETSc.TAO().create(comm)
    tao.setType("bntr")
    tao.setObjectiveGradient(objective_gradient, vector(np.zeros(n)))
    tao.setHessian(lambda *_: None, matrix)
    bound = lambda values: vector(np.clip(values, -1e20, 1e20))
    tao.setVariableBounds(bound(lower), bound(upper))
    tao.setTolerances(gatol=1e-13, grtol=0, gttol=0)
    tao.setMaximumIterations(500)
    ksp = tao.getKSP()
    ksp.setTolerances(rtol=1e-13)
    tao.solve(x)
    return x.array_r.copy()


@pytest.mark.parametrize("bounds", BOUNDS)
def test_against_tao(bounds):
    H, b, w = control_problem(alpha=1e-2)
    lower, upper = forms_of_bounds(len(b))[bounds]
    result = minimize_active_set(
        quadratic(H, b, np.diag(w)), np.zeros(len(b)), lower, upper, quadratic=True, gtol_rel=1e-11, cg_max_it=400
    )
    assert result.converged
    np.testing.assert_allclose(result.x, tao_bntr(H, b, lower, upper), atol=1e-7)


@pytest.mark.parametrize("start", ["zero", "random"])
@pytest.mark.parametrize("is_quadratic", [True, False])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_sparse_minimisers(bounds, is_quadratic, start):
    """With the absolute value and bounds, by the pure method and in a trust region: exact zeros."""
    H, b, w = control_problem(n=24, alpha=0.1)
    lower, upper = forms_of_bounds(24)[bounds]
    l1 = np.where(np.arange(24) % 6 == 5, 0.0, 0.1)
    x0 = np.zeros(24) if start == "zero" else np.clip(np.random.default_rng(3).standard_normal(24), lower, upper)
    x = coordinate_descent(H, b, w, lower, upper, l1)
    assert (x == 0).sum() > 3
    values = []
    result = minimize_active_set(
        quadratic(H, b, np.diag(w)), x0, lower, upper, l1, quadratic=is_quadratic, gtol_rel=1e-10, cg_max_it=400,
        callback=lambda _, record: values.append(record.value) and False,
    )  # fmt: skip
    assert result.converged
    np.testing.assert_allclose(result.x, x, atol=1e-7)
    np.testing.assert_array_equal(result.x == 0, x == 0)
    f = lambda z: 0.5 * z @ H @ z - b @ z + w * l1 @ np.abs(z)
    assert result.value == pytest.approx(f(x), rel=1e-10)
    if not is_quadratic:
        assert all(after <= before + 1e-12 * abs(before) for before, after in pairs(values))
        assert all(record.globalised for record in result.history[1:])


@pytest.mark.parametrize(("bounds", "alpha", "l1"), [("two-sided", 1e-3, 0.0), ("varying", 1e-4, 2e-3)])
def test_a_cycle_is_left(bounds, alpha, l1):
    """Smoothing with a small weight of the control, for which the sets of the textbook iteration do not settle."""
    H, b, w = control_problem(alpha=alpha)
    lower, upper = forms_of_bounds(len(b))[bounds]
    with pytest.raises(AssertionError, match="the textbook iteration cycles"):
        textbook(H, b, w, lower, upper, np.full(len(b), l1), np.zeros(len(b)), 1.0)
    lines = []
    result = minimize_active_set(
        quadratic(H, b, np.diag(w)), np.zeros(len(b)), lower, upper, l1, quadratic=True, prox_step=1.0, cg_rtol=1e-12,
        gtol_rel=1e-10, max_it=100, cg_max_it=400, monitor=lines.append,
    )  # fmt: skip
    assert any("from here on steps of a trust region" in line for line in lines)
    assert result.converged
    assert result.history[-1].globalised
    assert not any(record.globalised for record in result.history[:4])
    g = (H @ result.x - b) / w
    moved = result.x - g
    shrunk = np.sign(moved) * np.maximum(np.abs(moved) - l1, 0)
    np.testing.assert_allclose(result.x, np.clip(shrunk, lower, upper), atol=1e-9)  # the first-order conditions


def test_sets_that_recur_are_noticed():
    """A cycle of length two in two variables: sets {1}, {2}, {1}, ... of a matrix with a large coupling."""
    H = np.array([[1.0, 0.9], [0.9, 1.0]])
    # among right-hand sides one is found for which the textbook iteration recurs
    for angle in np.linspace(0, 2 * np.pi, 721):
        b, lower, upper = 3 * np.array([np.cos(angle), np.sin(angle)]), np.full(2, -1.0), np.full(2, 1.0)
        try:
            textbook(H, b, np.ones(2), lower, upper, np.zeros(2), np.zeros(2), 10.0)
        except AssertionError:
            break
    else:
        raise AssertionError("no example")
    lines = []
    result = minimize_active_set(
        quadratic(H, b, np.eye(2)), np.zeros(2), lower, upper, quadratic=True, prox_step=10.0, cg_rtol=1e-14,
        gtol_rel=1e-12, monitor=lines.append,
    )  # fmt: skip
    assert any("the active sets recur: from here on" in line for line in lines)
    assert result.converged
    np.testing.assert_allclose(result.x, np.clip(result.x - (H @ result.x - b), lower, upper), atol=1e-11)


# --- degenerate cases ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("is_quadratic", [True, False])
@pytest.mark.parametrize(
    "case", ["all active", "none active", "fixed", "some fixed", "minimiser given", "zero is best"]
)
def test_degenerate_cases(case, is_quadratic):
    H, b, w = control_problem(n=20, alpha=0.1)
    free, l1 = np.linalg.solve(H, b), np.zeros(20)
    lower, upper = np.full(20, -math.inf), np.full(20, math.inf)
    x0 = np.zeros(20)
    if case == "all active":  # a diagonal problem far from its bounds
        H, b = np.diag(w), w * np.where(np.arange(20) % 2, 5.0, -5.0)
        lower, upper = np.full(20, -1.0), np.full(20, 2.0)
    elif case == "none active":
        lower, upper = free - 10, free + 10
    elif case == "fixed":
        lower = upper = np.linspace(-1, 1, 20)
    elif case == "some fixed":
        lower = np.where(np.arange(20) % 3 == 0, 0.1, -math.inf)
        upper = np.where(np.arange(20) % 3 == 0, 0.1, math.inf)
    elif case == "minimiser given":
        x0 = free
    else:
        l1 = np.abs(b / w) + 1.0
    x = coordinate_descent(H, b, w, lower, upper, l1, sweeps=20000)
    problem = quadratic(H, b, np.diag(w))
    result = minimize_active_set(
        problem, x0, lower, upper, l1, quadratic=is_quadratic, gtol_rel=1e-9, gtol_abs=1e-12, cg_max_it=400
    )
    assert result.converged
    np.testing.assert_allclose(result.x, x, atol=1e-7)
    last = result.history[-1]
    assert last.at_lower + last.at_upper + last.at_zero + last.free == 20
    if case == "all active":
        assert (last.at_lower, last.at_upper) == (10, 10)
        assert result.iterations == (1 if is_quadratic else result.iterations)
    elif case in ("fixed", "minimiser given", "zero is best"):
        assert result.iterations == 0
        assert last.free == (20 if case == "minimiser given" else 0)


@pytest.mark.parametrize("is_quadratic", [True, False])
def test_start_out_of_bounds(is_quadratic):
    problem, lower, upper, x = box_problem(3)
    lines = []
    result = minimize_active_set(
        problem, np.full(30, 50.0), lower, upper, quadratic=is_quadratic, gtol_rel=1e-10, monitor=lines.append
    )
    assert "the first guess is out of bounds" in lines[0]
    assert result.converged
    np.testing.assert_allclose(result.x, x, atol=1e-7)
    inside = minimize_active_set(problem, np.clip(50.0, lower, upper), lower, upper, quadratic=is_quadratic)
    assert inside.history[0].gradient_norm == result.history[0].gradient_norm


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_a_run_that_ends_early_is_within_the_bounds(limit):
    """Iterates of the primal-dual method may be out of them, its results are not."""
    problem, lower, upper, _ = box_problem(2)
    seen = []
    result = minimize_active_set(
        problem, np.zeros(30), lower, upper, quadratic=True, max_it=limit,
        callback=lambda x, _: seen.append(x) and False,
    )  # fmt: skip
    assert result.reason == "maximum iterations"
    assert ((lower <= result.x) & (result.x <= upper)).all()
    assert result.value == problem.value(result.x) == result.history[-1].value
    assert result.gradient_norm == pytest.approx(norm(problem, projected_gradient(problem, result.x, lower, upper)))
    if limit:
        assert ((seen[0] < lower) | (seen[0] > upper)).any()
        stopped = minimize_active_set(problem, np.zeros(30), lower, upper, quadratic=True, callback=lambda *_: True)
        assert stopped.reason == "stopped by callback"
        assert ((lower <= stopped.x) & (stopped.x <= upper)).all()


# --- other functions -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("upper", [0.5, 0.9, 2.0])
def test_rosenbrock(upper):
    """A function that is not convex: the minimiser of the bounded trust region, J falling from iterate to iterate."""
    problem, x0 = rosenbrock(10), np.zeros(10)
    points = []
    options = dict(max_it=100, gtol_rel=0, gtol_abs=1e-9)
    keep = lambda x, _: points.append(x) and False
    result = minimize_active_set(problem, x0, -0.5, upper, callback=keep, **options)
    assert result.converged
    np.testing.assert_allclose(result.x, minimize_bounded(problem, x0, -0.5, upper, **options).x, atol=1e-7)
    assert all(((x >= -0.5) & (x <= upper)).all() for x in points)
    assert all(after.value <= before.value + 1e-12 for before, after in pairs(result.history))


def test_without_an_absolute_value_the_trust_region_is_that_of_bounds():
    """The same steps, for any inner product that is diagonal."""
    problem, lower, upper, _ = box_problem(5)
    mine, other = (
        m(problem, np.zeros(30), lower, upper, gtol_rel=1e-9) for m in (minimize_active_set, minimize_bounded)
    )
    np.testing.assert_array_equal(mine.x, other.x)
    assert [(r.value, r.radius, r.cg_iterations) for r in mine.history[1:]] == [
        (r.value, r.radius, r.cg_iterations) for r in other.history[1:]
    ]
    assert mine.hessian_calls == other.hessian_calls + 1  # the factor of the gradient in the definition of the sets


def test_a_function_without_curvature_is_handed_over():
    """Declared quadratic and convex although it is concave in one direction: the corner of the box with the least J."""
    H = np.diag([1.0, -1.0, 2.0])
    problem, lines = quadratic(H, np.array([0.3, 0.2, -8.0]), np.eye(3)), []
    result = minimize_active_set(problem, np.zeros(3), -1.0, 1.0, quadratic=True, monitor=lines.append, gtol_rel=1e-9)
    assert any("without curvature: from here on" in line for line in lines)
    assert result.converged
    np.testing.assert_allclose(result.x, [0.3, 1.0, -1.0], atol=1e-8)


def test_preconditioner():
    """The inverse of the Hessian without bounds: fewer products, the same minimiser; an indefinite one is refused."""
    problem, lower, upper, x = box_problem(4)
    inverse, w = np.linalg.inv(problem.d2f(x)), np.diag(problem.M)
    found = [
        minimize_active_set(
            problem, np.zeros(30), lower, upper, quadratic=True, gtol_rel=1e-9, preconditioner=P, cg_rtol=1e-6
        )
        for P in (None, lambda r: inverse @ (w * r), "limited-memory")
    ]  # fmt: skip
    for result in found:
        assert result.converged
        np.testing.assert_allclose(result.x, x, atol=1e-7)
    assert found[1].hessian_calls < 0.7 * found[0].hessian_calls
    with pytest.raises(ValueError, match="positive definite"):
        minimize_active_set(problem, np.zeros(30), lower, upper, quadratic=True, preconditioner=lambda r: -r)


class Memory:
    """A checkpoint in JSON and arrays, which fails after a number of saves."""

    def __init__(self, most=math.inf):
        self.most, self.count, self.state = most, 0, None

    def save(self, scalars, vectors):
        if self.count >= self.most:
            raise KeyboardInterrupt
        self.count += 1
        self.state = json.dumps(scalars), {name: v.copy() for name, v in vectors.items()}

    def load(self):
        return None if self.state is None else (json.loads(self.state[0]), self.state[1])


@pytest.mark.parametrize("saves", [1, 3, 6])
@pytest.mark.parametrize(("alpha", "is_quadratic"), [(2e-2, True), (1e-4, True), (1e-2, False)])
def test_a_run_continues_from_a_checkpoint(alpha, is_quadratic, saves):
    """Bitwise as if it had not stopped: the primal-dual method, the change to the trust region (1e-4), and this."""
    H, b, w = control_problem(alpha=alpha)
    args = quadratic(H, b, np.diag(w)), np.zeros(len(b)), *forms_of_bounds(len(b))["varying"], 2e-3
    options = dict(quadratic=is_quadratic, gtol_rel=1e-8, cg_max_it=400)
    whole = minimize_active_set(*args, **options)
    assert whole.converged
    assert not is_quadratic or alpha > 1e-2 or 0 < sum(r.globalised for r in whole.history) < whole.iterations
    memory = Memory(saves)
    if saves < whole.iterations + 1:
        with pytest.raises(KeyboardInterrupt):
            minimize_active_set(*args, checkpoint=memory, **options)
    memory.most = math.inf
    again = minimize_active_set(*args, checkpoint=memory, **options)
    np.testing.assert_array_equal(again.x, whole.x)
    assert [str(r) for r in again.history] == [str(r) for r in whole.history]


# --- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lower": math.nan}, "no value"),
        ({"lower": 1.0, "upper": 0.0}, "no value"),
        ({"lower": "0"}, "lower"),
        ({"upper": np.zeros(3)}, "shape"),
        ({"l1": -1.0}, "l1 is negative"),
        ({"l1": math.nan}, "l1 is negative or not finite"),
        ({"l1": math.inf}, "l1 is negative or not finite"),
        ({"l1": np.zeros(3)}, "l1 of shape"),
        ({"l1": "much"}, "l1 = 'much'"),
        ({"quadratic": 1}, "quadratic = 1"),
        ({"prox_step": 0.0}, "prox_step"),
        ({"cg_rtol": 2.0}, "cg_rtol"),
    ],
)
def test_bad_arguments(arguments, message):
    problem = quadratic(np.eye(5), np.ones(5), np.eye(5))
    with pytest.raises(ValueError, match=message):
        minimize_active_set(problem, np.zeros(5), **arguments)


def test_a_product_that_is_not_diagonal_is_refused():
    M = np.eye(5) + 0.1
    with pytest.raises(ValueError, match="diagonal"):
        minimize_active_set(quadratic(np.eye(5), np.ones(5), M), np.zeros(5), 0.0)


# --- several processes -----------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("is_quadratic", [True, False])
def test_processes_take_the_path_of_one(is_quadratic):
    """The records agree on all, with those of a serial run; the middle process has no component."""
    comm = MPI.COMM_WORLD
    H, b, w = control_problem(n=24, alpha=0.1)
    lower, upper = forms_of_bounds(24)["varying"]
    l1 = np.where(np.arange(24) % 6 == 5, 0.0, 0.02)
    problem = quadratic(H, b, np.diag(w))
    local = Distributed(problem, w, comm, 4)
    part, options = local.part, dict(quadratic=is_quadratic, gtol_rel=1e-9)
    result = minimize_active_set(local, np.zeros(24)[part], lower[part], upper[part], l1[part], **options)
    serial = minimize_active_set(problem, np.zeros(24), lower, upper, l1, **options)
    assert result.converged
    np.testing.assert_allclose(local.whole(result.x), serial.x, atol=1e-8)
    names = ("at_lower", "at_upper", "at_zero", "free", "changed", "globalised", "cg_iterations")
    for a, c in zip(result.history[:4], serial.history[:4], strict=True):
        assert [getattr(a, name) for name in names] == [getattr(c, name) for name in names]
    lines = comm.allgather([str(r) for r in result.history])
    assert all(other == lines[0] for other in lines)


@pytest.mark.parallel(3)
def test_a_fault_on_one_process_is_refused_on_all():
    comm = MPI.COMM_WORLD
    problem, *_ = box_problem(0)
    local = Distributed(problem, np.diag(problem.M).copy(), comm, 4)
    n, last = local.weights.size, comm.rank == comm.size - 1
    for arguments in ({"lower": math.nan if last else 0.0}, {"l1": -1.0 if last else 0.0}, {"l1": np.ones(n + last)}):
        with pytest.raises(ValueError, match=r"no value|l1"):
            minimize_active_set(local, np.zeros(n), **arguments)
    with pytest.raises(InputError):
        minimize_active_set(local, np.zeros(n), l1="x" if last else 0.0)
