"""The trust-region minimiser against what the theory of Newton, conjugate gradients and trust regions says."""

import math

import numpy as np
import pytest

from pint_fem.optimize import CGStop, NonFiniteError, StopReason, minimize_trust_region
from pint_fem.optimize.trust_region.forcing import next_forcing_term


class Smooth:
    """J on R^n from its plain derivatives, with inner product ``a @ M @ b`` (Euclidean without M)."""

    def __init__(self, f, df, d2f, M=None, n=None):
        """Take J, its gradient vector and its Hessian matrix, and M or the dimension n."""
        self.f, self.df, self.d2f = f, df, d2f
        self.M = np.eye(n) if M is None else M
        self.M_inverse = np.linalg.inv(self.M)

    def value(self, x):
        """J."""
        return self.f(x)

    def gradient(self, x):
        """Solve M g = J'."""
        return self.M_inverse @ self.df(x)

    def hessian_action(self, x, v):
        """Solve M h = J'' v."""
        return self.M_inverse @ (self.d2f(x) @ v)

    def inner(self, a, b):
        """The M inner product."""
        return a @ self.M @ b


def norm(problem, v):
    """The problem's norm."""
    return math.sqrt(problem.inner(v, v))


def pairs(items):
    """Neighbours in a list."""
    return [(items[i], items[i + 1]) for i in range(len(items) - 1)]


def random_spd(n, rng, low=1.0, high=50.0):
    """A symmetric matrix with eigenvalues spread over [low, high]."""
    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return Q @ np.diag(np.geomspace(low, high, n)) @ Q.T


def mass_matrix(t):
    """P1 mass matrix on the nodes t."""
    h, n = np.diff(t), t.size
    M = np.zeros((n, n))
    for i in range(n - 1):
        M[i : i + 2, i : i + 2] += h[i] / 6 * np.array([[2, 1], [1, 2]])
    return M


def quadratic(H, b, M):
    """``x H x / 2 - b x``."""
    return Smooth(lambda x: 0.5 * x @ H @ x - b @ x, lambda x: H @ x - b, lambda x: H, M)


def random_quadratic(n=12, seed=0, shift=0.0):
    """A quadratic on a graded mesh; with a shift its Hessian is indefinite."""
    rng = np.random.default_rng(seed)
    H = random_spd(n, rng) - shift * np.eye(n)
    return quadratic(H, rng.standard_normal(n), mass_matrix(np.linspace(0, 1, n) ** 2 * n)), H


def rosenbrock(n):
    """The chained Rosenbrock function, minimum 0 at (1, ..., 1)."""

    def f(x):
        return np.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)

    def df(x):
        g, r = np.zeros(n), x[1:] - x[:-1] ** 2
        g[:-1] = -400 * x[:-1] * r - 2 * (1 - x[:-1])
        g[1:] += 200 * r
        return g

    def d2f(x):
        d = np.zeros(n)
        d[:-1] = 1200 * x[:-1] ** 2 - 400 * x[1:] + 2
        d[1:] += 200
        return np.diag(d) - np.diag(400 * x[:-1], 1) - np.diag(400 * x[:-1], -1)

    return Smooth(f, df, d2f, n=n)


def bowl(n=6, seed=1, tilt=0.3, offset=0.0):
    """``sum w sqrt(1 + x^2) + tilt |x|^2 / 2 + offset``: convex, its Hessian has Lipschitz constant 0.86 max(w)."""
    w = np.random.default_rng(seed).uniform(0.5, 1, n)
    target = np.linspace(-1, 1, n)
    return Smooth(
        lambda x: np.sum(w * np.sqrt(1 + (x - target) ** 2)) + 0.5 * tilt * x @ x + offset,
        lambda x: w * (x - target) / np.sqrt(1 + (x - target) ** 2) + tilt * x,
        lambda x: np.diag(w * (1 + (x - target) ** 2) ** -1.5 + tilt),
        n=n,
    )


def exact_reduction(problem, H, g, radius):
    """Largest reduction of the model in the ball, from the eigenvalues of M^-1 H and the secular equation."""
    L = np.linalg.cholesky(problem.M)
    lam, Q = np.linalg.eigh(np.linalg.solve(L, np.linalg.solve(L, H).T))
    c = Q.T @ L.T @ g

    def size(mu):
        return np.linalg.norm(c / (lam + mu))

    low, high = max(0.0, -lam[0]), max(0.0, -lam[0]) + np.linalg.norm(c) / radius + 1
    mu = 0.0
    if lam[0] <= 0 or size(0.0) > radius:
        for _ in range(200):
            mu = 0.5 * (low + high)
            low, high = (mu, high) if size(mu) > radius else (low, mu)
    s = -c / (lam + mu)
    return -(c @ s + 0.5 * s @ (lam * s))


# --- the conjugate gradient step -------------------------------------------------------------------------------------


def test_strictly_convex_quadratic_is_one_newton_step():
    """With CG run to the end the first step is Newton's, exact for a quadratic."""
    problem, H = random_quadratic()
    b = -problem.df(np.zeros(12))
    result = minimize_trust_region(problem, np.ones(12), cg_rtol=1e-13, gtol_rel=1e-9, initial_radius=1e3)
    assert result.iterations == 1
    assert result.converged
    assert result.reason == "gradient tolerance"
    np.testing.assert_allclose(result.x, np.linalg.solve(H, b), rtol=0, atol=1e-10)
    assert result.history[1].ratio == pytest.approx(1, abs=1e-8)
    assert result.history[1].cg_stop == CGStop.RESIDUAL


@pytest.mark.parametrize("eigenvalues", [[3.0], [1.0, 7.0], [0.5, 2.0, 30.0]])
def test_cg_ends_after_as_many_iterations_as_distinct_eigenvalues(eigenvalues):
    """The eigenvalues that count are those of M^-1 H."""
    n, rng = 15, np.random.default_rng(3)
    M = random_spd(n, rng, 0.1, 10)
    L = np.linalg.cholesky(M)
    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    H = L @ Q @ np.diag(np.resize(eigenvalues, n)) @ Q.T @ L.T
    result = minimize_trust_region(
        quadratic(H, rng.standard_normal(n), M), np.zeros(n), cg_rtol=1e-9, gtol_rel=1e-8, initial_radius=1e4
    )
    assert [r.cg_iterations for r in result.history] == [0, len(eigenvalues)]
    assert result.hessian_calls == len(eigenvalues)


@pytest.mark.parametrize("radius", [1e-3, 0.1, 0.5, 2.0, 10.0])
@pytest.mark.parametrize("shift", [0.0, 5.0, 60.0])
def test_steihaug_step(radius, shift):
    """Inside the ball, on its boundary in the M norm, better than Cauchy, and half of optimal if convex (Yuan 2000)."""
    problem, H = random_quadratic(seed=4, shift=shift)
    x0 = np.zeros(12)
    g = problem.gradient(x0)
    result = minimize_trust_region(problem, x0, initial_radius=radius, max_it=1, cg_rtol=1e-12)
    step, entry = result.x - x0, result.history[1]
    assert entry.accepted
    assert entry.step_norm == pytest.approx(norm(problem, step), rel=1e-10)
    newton = np.linalg.solve(H, -problem.df(x0))
    if entry.cg_stop == CGStop.RESIDUAL:
        np.testing.assert_allclose(step, newton, atol=1e-9)
        assert entry.step_norm < radius
    else:
        assert norm(problem, step) == pytest.approx(radius, rel=1e-12)
        assert shift > 0 or norm(problem, newton) >= radius * (1 - 1e-10)
    g_norm, curvature = norm(problem, g), g @ H @ g
    tau = radius / g_norm if curvature <= 0 else min(radius / g_norm, g_norm**2 / curvature)
    cauchy = tau * g_norm**2 - 0.5 * tau**2 * curvature
    reduction, best = -result.value, exact_reduction(problem, H, g, radius)
    assert cauchy * (1 - 1e-10) <= reduction <= best * (1 + 1e-8)
    if shift == 0:
        assert reduction >= 0.5 * best
    assert entry.ratio == pytest.approx(1, abs=1e-9)  # the recurrence predicts a quadratic exactly


def test_the_stops_of_cg_are_all_reached():
    """Residual, boundary, negative curvature and the iteration limit are told apart."""
    convex, _ = random_quadratic()
    concave, _ = random_quadratic(shift=60.0)

    def stop(problem, **options):
        return minimize_trust_region(problem, np.zeros(12), max_it=1, cg_rtol=1e-10, **options).history[1].cg_stop

    assert stop(convex, initial_radius=1e4) == "residual"
    assert stop(convex, initial_radius=1e-3) == "boundary"
    assert stop(concave, initial_radius=1e4) == "negative curvature"
    assert stop(convex, initial_radius=1e4, cg_max_it=2) == "maximum iterations"


def test_default_forcing_bounds_the_residual():
    """A full step s leaves |g + Hs| <= min(1/2, sqrt(|g|/|g0|)) |g|; on a quadratic that is the next gradient."""
    problem, _ = random_quadratic(n=30)
    norms = [
        r.gradient_norm
        for r in minimize_trust_region(problem, np.zeros(30), initial_radius=1e4, gtol_rel=1e-10).history
    ]
    assert len(norms) > 4
    for before, after in pairs(norms):
        assert after <= min(0.5, math.sqrt(before / norms[0])) * before * (1 + 1e-8)


def forcing_problem(n=40):
    """``x H x / 2 + sum w sqrt(1 + (x - t)^2)``: eigenvalues from 1 to 50, Lipschitz constant of the Hessian 0.86."""
    rng = np.random.default_rng(2)
    H, w, t = random_spd(n, rng), rng.uniform(0.5, 1, n), np.linspace(-1, 1, n)
    root = lambda x: np.sqrt(1 + (x - t) ** 2)
    return Smooth(
        lambda x: 0.5 * x @ H @ x + w @ root(x),
        lambda x: H @ x + w * (x - t) / root(x),
        lambda x: H + np.diag(w / root(x) ** 3),
        n=n,
    )


def full_steps(**options):
    """Norms of gradients and steps of a run of full steps only."""
    result = minimize_trust_region(forcing_problem(), np.full(40, 2.0), initial_radius=1e3, max_it=60, **options)
    assert result.converged
    assert all(r.accepted and r.cg_stop == "residual" for r in result.history[1:])
    return [r.gradient_norm for r in result.history], [r.step_norm for r in result.history]


def test_eisenstat_walker_2_forcing_bounds_the_next_gradient():
    """|g_k+1| <= eta_k |g_k| + L/2 |s|^2 with eta_k = max(0.9 (|g_k| / |g_k-1|)^2, safeguard), and superlinearly."""
    norms, steps = full_steps(cg_forcing="eisenstat-walker-2", gtol_rel=1e-12)
    eta = 0.5
    for k in range(len(norms) - 1):
        assert norms[k + 1] <= eta * norms[k] + 0.43 * steps[k + 1] ** 2 + 1e-13
        safeguard = 0.9 * eta**2
        eta = max(0.9 * (norms[k + 1] / norms[k]) ** 2, safeguard if safeguard > 0.1 else 0, 1e-6)
        eta = min(0.5, max(eta, 0.5e-12 * norms[0] / norms[k + 1]))
    rates = [after / before for before, after in pairs(norms)]
    # The last step is not taken further than the end of the run needs.
    assert all(after < 0.6 * before for before, after in pairs(rates[:-1]))
    assert rates[-2] < 1e-3


def test_eisenstat_walker_1_converges_superlinearly():
    """|g_k+1| <= C |g_k| |g_k-1| near the end, so the rate goes to zero; with a number for eta it does not."""
    norms, _ = full_steps(cg_forcing="eisenstat-walker-1", gtol_rel=1e-11)
    rates = [after / before for before, after in pairs(norms)]
    assert rates[-1] < 1e-3
    assert len(rates) <= 12
    linear, _ = full_steps(cg_forcing=0.3, gtol_rel=1e-11)
    for before, after in pairs(linear[3:]):
        assert 1e-3 < after / before < 0.4
    assert len(linear) > len(norms)


def test_eisenstat_walker_1_takes_the_models_word():
    """For a quadratic the model foretells the gradient exactly: only safeguards and the end keep eta from zero.

    Cut short by the trust region as well, the norm of the model's gradient is that of the gradient.
    """
    problem, _ = random_quadratic(n=30, seed=3)
    result = minimize_trust_region(
        problem, np.zeros(30), cg_forcing="eisenstat-walker-1", initial_radius=1e-2, gtol_rel=1e-5, max_it=60
    )
    assert result.converged
    boundary = [r.iteration for r in result.history if r.cg_stop == "boundary"]
    assert boundary
    # 0.5 -> 0.5^1.62 = 0.33 -> 0.16 -> 0.05 < 0.1: from the fourth gradient on eta is half of what ends the run.
    full = [r for r in result.history[5:] if r.cg_stop == "residual"]
    assert len(full) == 1
    assert full[0].gradient_norm <= 0.5001 * 1e-5 * result.history[0].gradient_norm


def test_forcing_terms():
    """The formulas of Eisenstat and Walker, their safeguards, and no more than the end of the run needs."""

    def term(choice, **numbers):
        given = {"last": 0.1, "norm": 1.0, "norm_before": 10.0, "model_norm": 0.7, "first_norm": 100.0}
        return next_forcing_term(choice, **(given | {"final_norm": 1e-9} | numbers))

    golden = (1 + math.sqrt(5)) / 2
    assert term("eisenstat-walker-1") == pytest.approx(0.03)
    assert term("eisenstat-walker-1", model_norm=1.3) == pytest.approx(0.03)
    assert term("eisenstat-walker-1", last=0.4) == pytest.approx(0.4**golden)
    assert term("eisenstat-walker-1", last=0.2) == pytest.approx(0.03)  # 0.2^1.6 < 0.1
    assert term("eisenstat-walker-1", model_norm=1.0, final_norm=0.02) == pytest.approx(0.01)
    assert term("eisenstat-walker-1", model_norm=1.0) == pytest.approx(1e-6)
    assert term("eisenstat-walker-1", norm=100.0) == 0.5
    assert term("eisenstat-walker-2") == pytest.approx(0.009)
    assert term("eisenstat-walker-2", last=0.4) == pytest.approx(0.9 * 0.16)
    assert term("eisenstat-walker-2", last=0.3) == pytest.approx(0.009)  # 0.9 * 0.09 < 0.1
    assert term("superlinear") == pytest.approx(0.1)
    assert term(0.2) == 0.2
    assert term("eisenstat-walker-1", norm=0.0) <= 0.5  # a zero gradient ends the run, whatever is said


def test_forcing_options():
    """A number is what cg_rtol is; two of them, or an unknown name, are refused."""
    x0 = np.array([-1.2, 1.0])
    a, b = (minimize_trust_region(rosenbrock(2), x0, **{name: 0.1}) for name in ("cg_rtol", "cg_forcing"))
    assert np.array_equal(a.x, b.x)
    for options in (
        {"cg_rtol": 0.1, "cg_forcing": 0.1},
        {"cg_forcing": "tight"},
        {"cg_forcing": 0.0},
        {"cg_forcing": 1.0},
        {"cg_forcing": None},
        {"cg_rtol": 0.1, "cg_forcing": "eisenstat-walker-1"},
    ):
        with pytest.raises(ValueError, match=r"cg_forcing = .* (is|are) refused: give"):
            minimize_trust_region(rosenbrock(2), x0, **options)


# --- Gauss-Newton ----------------------------------------------------------------------------------------------------


class LeastSquares(Smooth):
    """``|r(x)|^2 / 2`` for the fit of ``a exp(-b t)`` to data, in a weighted inner product."""

    def __init__(self, noise=0.0):
        """Data of a = 2, b = 1 and noise."""
        t = np.linspace(0, 3, 12)
        data = 2 * np.exp(-t) + noise * np.cos(7 * t)
        r = lambda x: x[0] * np.exp(-x[1] * t) - data
        self.jacobian = lambda x: np.array([np.exp(-x[1] * t), -x[0] * t * np.exp(-x[1] * t)]).T
        J, e = self.jacobian, lambda x: np.exp(-x[1] * t)

        def second(x):
            cross = r(x) @ (-t * e(x))
            return J(x).T @ J(x) + np.array([[0, cross], [cross, r(x) @ (x[0] * t**2 * e(x))]])

        super().__init__(lambda x: 0.5 * r(x) @ r(x), lambda x: J(x).T @ r(x), second, np.array([[2.0, 0.5], [0.5, 1]]))
        self.actions = 0

    def gauss_newton_action(self, x, v):
        """Solve M h = J^T J v."""
        self.actions += 1
        return self.M_inverse @ (self.jacobian(x).T @ (self.jacobian(x) @ v))


@pytest.mark.parametrize("hessian", ["newton", "gauss-newton"])
def test_exact_data_is_fitted(hessian):
    """With a residual of zero Gauss-Newton converges quadratically like Newton, and never finds negative curvature."""
    problem = LeastSquares()
    result = minimize_trust_region(problem, np.array([0.5, 3.0]), hessian=hessian, cg_rtol=1e-12, gtol_rel=1e-13)
    assert result.converged
    np.testing.assert_allclose(result.x, [2, 1], atol=1e-10)
    assert (problem.actions > 0) == (hessian == "gauss-newton")
    assert result.hessian_calls >= problem.actions
    a, b, c = [r.gradient_norm for r in result.history if r.gradient_norm > 1e-14][-3:]
    assert math.log(c / b) / math.log(b / a) > 1.6
    if hessian == "gauss-newton":
        assert problem.actions == result.hessian_calls
        assert not any(r.cg_stop == "negative curvature" for r in result.history)


def test_gauss_newton_converges_linearly_where_the_residual_is_not_zero():
    """At the rate of the eigenvalues of (J^T J)^-1 sum r_i r_i'', to the minimiser of Newton's method."""
    problem = LeastSquares(noise=0.3)
    newton = minimize_trust_region(problem, np.array([1.0, 1.0]), gtol_rel=1e-12)
    result = minimize_trust_region(problem, np.array([1.0, 1.0]), hessian="gauss-newton", cg_rtol=1e-12, gtol_rel=1e-10)
    assert result.converged
    np.testing.assert_allclose(result.x, newton.x, atol=1e-8)
    B = problem.jacobian(newton.x).T @ problem.jacobian(newton.x)
    rate = np.abs(np.linalg.eigvals(np.linalg.solve(B, problem.d2f(newton.x) - B))).max()
    last = [after / before for before, after in pairs([r.gradient_norm for r in result.history])][-3:]
    assert last[-1] == pytest.approx(rate, rel=0.1)


def test_gauss_newton_needs_the_action():
    """A problem without it is refused before anything is evaluated; so is another name."""
    problem = Counting(rosenbrock(2))
    with pytest.raises(ValueError, match=r"hessian = 'gauss-newton' is refused: Counting has no gauss_newton_action"):
        minimize_trust_region(problem, np.ones(2), hessian="gauss-newton")
    with pytest.raises(ValueError, match=r"hessian = 'bfgs' is refused: give 'newton' or 'gauss-newton'"):
        minimize_trust_region(problem, np.ones(2), hessian="bfgs")
    assert not any(problem.calls.values())


# --- convergence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "x0"), [(2, [-1.2, 1.0]), (10, np.zeros(10)), (10, np.linspace(2, 3, 10))])
def test_rosenbrock(n, x0):
    """Down the valley to the minimum, J falling all the way."""
    result = minimize_trust_region(rosenbrock(n), np.array(x0), gtol_rel=0, gtol_abs=1e-11, max_it=100)
    assert result.converged
    np.testing.assert_allclose(result.x, np.ones(n), atol=1e-10)
    values = [r.value for r in result.history]
    assert all(after <= before for before, after in pairs(values))


def test_negative_curvature_leaves_the_saddle():
    """From beside the saddle of x^4/4 - x^2/2 + y^2 to the minimum at (1, 0)."""
    problem = Smooth(
        lambda z: z[0] ** 4 / 4 - z[0] ** 2 / 2 + z[1] ** 2,
        lambda z: np.array([z[0] ** 3 - z[0], 2 * z[1]]),
        lambda z: np.diag([3 * z[0] ** 2 - 1, 2.0]),
        n=2,
    )
    result = minimize_trust_region(problem, np.array([1e-3, 1e-4]), gtol_rel=0, gtol_abs=1e-12)
    assert any(r.cg_stop == "negative curvature" for r in result.history)
    assert result.converged
    np.testing.assert_allclose(result.x, [1, 0], atol=1e-10)
    assert result.value == pytest.approx(-0.25)


def test_last_iterates_converge_quadratically():
    """A full Newton step has |g_next| <= L/2 |s|^2, L the Lipschitz constant of the Hessian; observed order two."""
    result = minimize_trust_region(bowl(), np.full(6, 3.0), cg_rtol=1e-14, gtol_rel=1e-13, max_it=60)
    assert result.converged
    full = [r for r in result.history if r.cg_stop == "residual" and r.accepted]
    assert len(full) >= 3
    for r in full:
        assert r.gradient_norm <= 0.5 * 0.86 * r.step_norm**2 + 1e-14
    a, b, c = [r.gradient_norm for r in result.history if r.gradient_norm > 1e-13][-3:]
    assert math.log(c / b) / math.log(b / a) > 1.7


def graded_control_problem(n, euclidean):
    """``|Ku - d|^2/2 + |u|^2/200 + integral (Ku)^4`` and a first guess; K = (A/20 + M)^-1 M, graded mesh.

    K smooths, so J is smooth on L2 and its Hessian a bounded operator there.
    """
    t = np.linspace(0, 1, n + 1) ** 3
    h = np.diff(t)
    M, A = mass_matrix(t), np.zeros((n + 1, n + 1))
    for i in range(n):
        A[i : i + 2, i : i + 2] += np.array([[1, -1], [-1, 1]]) / h[i]
    K = np.linalg.solve(0.05 * A + M, M)
    w, d = M.sum(axis=1), np.sin(5 * t) + t
    KMK = K.T @ M @ K + 0.01 * M
    return Smooth(
        lambda u: 0.5 * (K @ u - d) @ M @ (K @ u - d) + 0.005 * u @ M @ u + w @ (K @ u) ** 4,
        lambda u: KMK @ u - K.T @ M @ d + 4 * K.T @ (w * (K @ u) ** 3),
        lambda u: KMK + 12 * K.T @ ((w * (K @ u) ** 2)[:, None] * K),
        np.eye(n + 1) if euclidean else M,
    ), np.cos(3 * t)


def test_iteration_counts_do_not_depend_on_the_mesh():
    """In the L2 inner product; in the Euclidean one they grow with the refinement."""

    def costs(euclidean, *sizes):
        runs = [minimize_trust_region(*graded_control_problem(n, euclidean), gtol_rel=1e-8, max_it=100) for n in sizes]
        assert all(run.converged for run in runs)
        return zip(*[(run.iterations, run.hessian_calls) for run in runs], strict=True)

    iterations, hessians = costs(False, 20, 80, 320)
    assert max(iterations) - min(iterations) <= 1
    assert max(hessians) - min(hessians) <= 4
    _, euclidean_hessians = costs(True, 20, 80)
    assert euclidean_hessians[0] > 1.5 * hessians[0]
    assert euclidean_hessians[1] > 5 * euclidean_hessians[0]


def test_the_unit_of_the_objective_does_not_matter():
    """J and 2^20 J give the same iterates to the last bit: no hidden absolute tolerance, the first radius scales."""
    plain, big = rosenbrock(4), rosenbrock(4)
    factor = 2.0**20
    big.f, big.df, big.d2f = (lambda x, f=f: factor * f(x) for f in (plain.f, plain.df, plain.d2f))
    a, b = (minimize_trust_region(p, np.array([-1.2, 1, -1, 1])) for p in (plain, big))
    assert a.iterations == b.iterations
    assert np.array_equal(a.x, b.x)


def test_every_reduction_is_the_problems():
    """With each entry stored twice and counted once by the problem, as ghost entries are, nothing changes."""
    plain = rosenbrock(4)

    class Twice:
        def value(self, x):
            return plain.value(x[:4])

        def gradient(self, x):
            return np.tile(plain.gradient(x[:4]), 2)

        def hessian_action(self, x, v):
            return np.tile(plain.hessian_action(x[:4], v[:4]), 2)

        def inner(self, a, b):
            return plain.inner(a[:4], b[:4])

    x0 = np.array([-1.2, 1, -1, 1])
    a, b = minimize_trust_region(plain, x0), minimize_trust_region(Twice(), np.tile(x0, 2))
    assert a.history[1:] == b.history[1:]
    assert np.array_equal(np.tile(a.x, 2), b.x)


# --- cost and records ------------------------------------------------------------------------------------------------


class Counting:
    """A problem that notes its calls, and refuses modified or aliased arguments by reusing its own memory."""

    def __init__(self, problem):
        """Count from zero."""
        self.problem, self.calls = problem, {"value": 0, "gradient": 0, "hessian": 0}
        self.memory = None

    def _reuse(self, v):
        self.memory = np.empty_like(v) if self.memory is None else self.memory
        self.memory[:] = v
        return self.memory

    def value(self, x):
        """J, counted."""
        self.calls["value"] += 1
        return self.problem.value(x)

    def gradient(self, x):
        """Gradient, counted, in reused memory."""
        self.calls["gradient"] += 1
        return self._reuse(self.problem.gradient(x))

    def hessian_action(self, x, v):
        """Hessian action, counted, in reused memory."""
        self.calls["hessian"] += 1
        return self._reuse(self.problem.hessian_action(x, v))

    def inner(self, a, b):
        """The problem's."""
        return self.problem.inner(a, b)


def test_costs_are_as_documented():
    """One value a step, one gradient an accepted step, no Hessian action after a rejected step."""
    problem, seen = Counting(bowl(tilt=0.01)), []
    result = minimize_trust_region(
        problem, np.full(6, 5.0), initial_radius=1e3, callback=lambda x, entry: seen.append(dict(problem.calls))
    )
    history = result.history
    assert [r.iteration for r in history] == list(range(result.iterations + 1))
    rejected = [r for r in history if not r.accepted]
    assert rejected  # Newton's step for sqrt(1 + x^2) is -x - x^3: it overshoots from far away
    assert (result.value_calls, result.gradient_calls, result.hessian_calls) == tuple(problem.calls.values())
    assert result.value_calls == 1 + result.iterations
    assert result.gradient_calls == 1 + result.iterations - len(rejected)
    assert result.hessian_calls == sum(now.cg_iterations for before, now in pairs(history) if before.accepted)
    for k in range(1, result.iterations):
        if not history[k].accepted:
            assert seen[k]["hessian"] == seen[k - 1]["hessian"]
            assert history[k + 1].radius == 0.25 * history[k].step_norm
    assert np.array_equal(result.x, minimize_trust_region(bowl(tilt=0.01), np.full(6, 5.0), initial_radius=1e3).x)


def test_a_retried_step_is_the_step_of_the_smaller_radius():
    """Cutting the kept path gives, bit for bit, what a start with the smaller radius gives."""
    result = minimize_trust_region(bowl(tilt=0.01), np.full(6, 5.0), initial_radius=1e3)
    first = next(r for r in result.history[1:] if r.accepted)
    assert first.iteration > 1
    again = minimize_trust_region(bowl(tilt=0.01), np.full(6, 5.0), initial_radius=first.radius)
    assert np.array_equal(again.x, result.x)
    assert again.iterations == result.iterations - first.iteration + 1


def test_radius_rules():
    """A quarter of the step after a poor one, doubled after a good one on the boundary, never above the maximum."""
    on_boundary, inside = (CGStop.BOUNDARY, CGStop.NEGATIVE_CURVATURE), []
    for initial, largest in ((0.01, 0.25), (1e3, 1e3)):
        start = np.array([-1.2, 1.0])
        result = minimize_trust_region(rosenbrock(2), start, initial_radius=initial, max_radius=largest)
        for now, after in zip(result.history[1:], result.history[2:], strict=False):
            if now.ratio < 0.25:
                expected = 0.25 * now.step_norm
                inside.append(now.step_norm < now.radius)
            elif now.ratio > 0.75 and now.cg_stop in on_boundary:
                expected = min(2 * now.radius, largest)
            else:
                expected = now.radius
            assert after.radius == expected
        assert initial == largest or max(r.step_norm for r in result.history) == largest
    assert set(inside) == {False, True}  # poor steps that end on the boundary, and inside


def test_monitor_gets_a_header_and_a_line_a_record():
    """And says nothing by default."""
    lines = []
    result = minimize_trust_region(bowl(tilt=0.01), np.full(6, 5.0), initial_radius=1e3, monitor=lines.append)
    assert len(lines) == 1 + len(result.history)
    assert lines[0].split()[:3] == ["it", "J", "|g|"]
    for line, entry in zip(lines[1:], result.history, strict=True):
        assert int(line.split()[0]) == entry.iteration
        assert float(line.split()[1]) == pytest.approx(entry.value, rel=1e-8)
        assert ("rejected" in line) == (not entry.accepted)


def test_silent_by_default(capsys):
    """Nothing is printed unless asked for."""
    minimize_trust_region(bowl(), np.ones(6))
    assert capsys.readouterr().out == ""


# --- ends ------------------------------------------------------------------------------------------------------------


def test_stationary_start_is_converged():
    """A zero gradient ends the run before any step, with relative tolerance 0 as well."""
    result = minimize_trust_region(rosenbrock(2), np.ones(2), gtol_rel=0)
    assert result.converged
    assert (result.iterations, result.value_calls, result.gradient_calls, result.hessian_calls) == (0, 1, 1, 0)


@pytest.mark.parametrize("max_it", [0, 3])
def test_iteration_limit_returns_the_best_iterate(max_it):
    """Its value and gradient are those of the returned x, and no evaluated point was better."""
    problem, values = rosenbrock(2), []
    f = problem.f
    problem.f = lambda x: values.append(f(x)) or values[-1]
    result = minimize_trust_region(problem, np.array([-1.2, 1.0]), max_it=max_it)
    assert not result.converged
    assert result.reason is StopReason.MAX_IT
    assert result.iterations == max_it
    assert result.value == min(values) == f(result.x)
    assert result.gradient_norm == pytest.approx(norm(problem, problem.gradient(result.x)))


def test_callback_stops_and_cannot_spoil_the_iterate():
    """A true result ends the run; what it does to its copy has no effect."""

    def callback(x, entry):
        x[:] = np.nan
        return entry.iteration == 2

    result = minimize_trust_region(rosenbrock(2), np.array([-1.2, 1.0]), callback=callback)
    assert result.reason == "stopped by callback"
    assert result.iterations == 2
    assert np.isfinite(result.x).all()


def test_wrong_gradient_ends_with_a_small_radius():
    """No step against the descent direction is ever good: the radius shrinks, x stays."""
    problem = Smooth(lambda x: -x.sum(), lambda x: np.ones(3), lambda x: np.eye(3), n=3)
    result = minimize_trust_region(problem, np.ones(3), max_it=200, value_rtol=0)
    assert result.reason == "radius too small"
    assert np.array_equal(result.x, np.ones(3))
    assert not any(r.accepted for r in result.history[1:])
    early = minimize_trust_region(problem, np.ones(3), max_it=200, min_radius=1e-3, initial_radius=1.0)
    assert early.reason == "radius too small"
    assert early.iterations == 5  # 4^-5 is the first at or below 1e-3


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_round_off_neither_stalls_nor_loops(offset):
    """An offset hides the last reductions of J in round-off; the gradient still falls to its own round-off."""
    result = minimize_trust_region(bowl(offset=offset), np.full(6, 3.0), gtol_rel=0, cg_rtol=1e-10)
    assert result.reason in ("round-off", "gradient tolerance")
    assert result.iterations < 30
    assert result.gradient_norm < 1e-14
    accepted = sum(r.accepted for r in result.history)
    assert result.gradient_calls == accepted + (result.reason == "round-off")


def test_relative_tolerance_is_reached_with_a_noisy_objective():
    """Noise of relative size 1e-7 in J, as an iterative solver leaves, does not stop a run that knows of it."""
    problem, rng = bowl(), np.random.default_rng(5)
    f = problem.f
    problem.f = lambda x: f(x) * (1 + 1e-7 * rng.uniform(-1, 1))
    result = minimize_trust_region(problem, np.full(6, 3.0), gtol_rel=1e-10, value_rtol=1e-6)
    assert result.converged


# --- what is not finite, what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [np.nan, np.inf, -np.inf])
def test_objective_not_finite_at_a_trial_point_is_a_rejected_step(outside):
    """J = x - log x beyond its domain: the radius shrinks and the minimum at 1 is found."""
    problem = Smooth(
        lambda x: x[0] - math.log(x[0]) if x[0] > 0 else outside, lambda x: 1 - 1 / x, lambda x: np.diag(x**-2), n=1
    )
    result = minimize_trust_region(problem, np.array([10.0]), initial_radius=1e3, gtol_rel=0, gtol_abs=1e-12)
    assert not result.history[1].accepted
    assert math.isnan(result.history[1].ratio)
    assert result.history[2].radius == 0.25 * result.history[1].step_norm
    assert result.x[0] == pytest.approx(1, abs=1e-10)


def test_not_finite_at_the_start():
    """J, gradient and Hessian action that are not finite are refused, with the iteration in the message."""
    x0 = np.array([-1.2, 1.0])
    for name, message in (
        ("f", "iteration 0: J = nan"),
        ("df", "iteration 0: the gradient"),
        ("d2f", "iteration 1: the Hessian"),
    ):
        problem = rosenbrock(2)
        good = getattr(problem, name)
        setattr(problem, name, lambda x, good=good: good(x) * np.nan)
        with pytest.raises(NonFiniteError, match=message) as caught:
            minimize_trust_region(problem, x0)
        assert isinstance(caught.value, FloatingPointError)
        assert np.array_equal(caught.value.x, x0)


def test_the_last_good_iterate_survives_a_broken_gradient():
    """The error carries the iterate before the gradient that broke."""
    problem, seen = rosenbrock(2), []
    df = problem.df

    def broken(x):
        return df(x) * (np.nan if len(seen) == 3 else 1)

    problem.df = broken
    with pytest.raises(FloatingPointError, match="iteration 4") as caught:
        minimize_trust_region(
            problem, np.array([-1.2, 1.0]), initial_radius=0.01, callback=lambda x, entry: seen.append(x)
        )
    assert np.array_equal(caught.value.x, seen[-1])


BAD = [
    ("gtol_rel", (-1e-3, 1.0, np.nan, "1e-6", None, True)),
    ("gtol_abs", (-1.0, np.inf, np.nan, 1j)),
    ("max_it", (-1, 2.5, "many", None, True)),
    ("initial_radius", (0.0, -1.0, np.inf, np.nan, "big")),
    ("max_radius", (0.0, -1.0, np.nan, None)),
    ("min_radius", (-1.0, np.inf, np.nan, None)),
    ("eta", (-0.1, 0.25, np.nan, None)),
    ("cg_max_it", (0, -3, 1.5, None)),
    ("cg_rtol", (0.0, 1.0, -1.0, np.nan, "tight")),
    ("value_rtol", (-1e-12, 1.0, np.nan, None)),
    ("monitor", (1, "print")),
    ("callback", (1,)),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD for value in values])
def test_bad_options_are_refused(name, value):
    """Before anything is evaluated, with the name and what would do."""
    problem = Counting(rosenbrock(2))
    with pytest.raises(ValueError, match=rf"{name} = .* is refused: give "):
        minimize_trust_region(problem, np.ones(2), **{name: value})
    assert not any(problem.calls.values())


def test_radii_that_contradict_each_other_are_refused():
    """The initial radius lies between the smallest and the largest."""
    for options in (
        {"initial_radius": 2.0, "max_radius": 1.0},
        {"initial_radius": 1.0, "min_radius": 1.0},
        {"min_radius": 1.0, "max_radius": 1.0},
    ):
        with pytest.raises(ValueError, match=r"_radius = .* is refused"):
            minimize_trust_region(rosenbrock(2), np.ones(2), **options)


def test_options_are_keyword_only_and_numpy_numbers_are_numbers():
    """A forgotten keyword is no option; options read from arrays are."""
    with pytest.raises(TypeError, match="positional argument"):
        minimize_trust_region(rosenbrock(2), np.ones(2), 1e-6)
    minimize_trust_region(rosenbrock(2), np.ones(2), max_it=np.int64(3), gtol_rel=np.float32(1e-3))


@pytest.mark.parametrize("x0", [np.ones((2, 1)), np.ones(2) + 1j, 1.0])
def test_bad_first_guess_is_refused(x0):
    """Only 1-D real arrays are vectors."""
    with pytest.raises(ValueError, match="x0 of shape"):
        minimize_trust_region(rosenbrock(2), x0)


def test_first_guess_is_not_modified():
    """Nor shared with the result; integers become float64."""
    start = np.ones(2)
    assert not np.shares_memory(minimize_trust_region(rosenbrock(2), start).x, start)
    x0 = np.array([-1, 1])
    result = minimize_trust_region(rosenbrock(2), x0)
    assert np.array_equal(x0, [-1, 1])
    assert result.x.dtype == np.float64


def test_wrong_shapes_and_inner_products_are_refused():
    """A derivative of another shape, an inner product that is none."""
    problem = rosenbrock(2)
    problem.gradient = lambda x: np.ones(3)
    with pytest.raises(ValueError, match=r"gradient returned an array of shape \(3,\)"):
        minimize_trust_region(problem, np.zeros(2))
    problem = rosenbrock(2)
    problem.hessian_action = lambda x, v: np.ones((2, 2))
    with pytest.raises(ValueError, match=r"hessian_action returned an array of shape \(2, 2\)"):
        minimize_trust_region(problem, np.zeros(2))
    problem = rosenbrock(2)
    problem.M = -np.eye(2)
    with pytest.raises(ValueError, match="positive definite"):
        minimize_trust_region(problem, np.zeros(2))
