"""Controlled inexactness: the conditions hold, convergence survives the worst errors they admit, work is saved."""

import math

import numpy as np
import pytest

from pint_fem.optimize import CGStop, InexactOptions, StopReason, minimize_trust_region
from pint_fem.optimize.guarded_problem import GuardedProblem
from pint_fem.optimize.oracle import ExactOracle, Gradient, Iterate
from pint_fem.optimize.trust_region.inexact import InexactOracle, _factor
from pint_fem.optimize.trust_region.steihaug import SteihaugPath
from tests.test_trust_region import bowl, norm, pairs, quadratic, random_quadratic, random_spd, rosenbrock


class Adversary:
    """A problem whose errors are as large as asked for and point where the caller says.

    `value_sign` is the sign of the error of J, or "worst": too high at the first sight of a point and too low at the
    next, so that every reduction looks larger than it is. `gradient_way` and `product_way` take the exact vector and
    give the direction of its error. Errors are `excess` times what is claimed, and never below the `floor`.
    """

    def __init__(self, problem, value_sign=1, gradient_way=None, product_way=None, floor=0.0, excess=1.0):
        """Errors along the exact vectors by default."""
        self.problem, self.inner = problem, problem.inner
        self.value_sign, self.floor, self.excess = value_sign, floor, excess
        self.gradient_way = gradient_way or (lambda g, v: g)
        self.product_way = product_way or (lambda h, v: h)
        self.values, self.gradients, self.products = [], [], []  # what was asked for and answered
        self.unit = abs(problem.value(np.zeros_like(problem.M[0]))) + 1.0

    def unit_vector(self, v):
        """In the problem's norm."""
        size = norm(self.problem, v)
        return v / size if size > 0 else v

    def value_within(self, x, tolerance):
        """J, off by what is allowed."""
        error = max(min(tolerance, self.unit), self.floor)
        seen = any(np.array_equal(x, y) for y, *_ in self.values)
        sign = (1 if seen else -1) if self.value_sign == "worst" else self.value_sign
        answer = self.problem.value(x) + sign * self.excess * error
        self.values.append((x.copy(), tolerance, answer, error))
        return answer, error

    def gradient_within(self, x, tolerance):
        """The gradient, off by what is allowed."""
        g = self.problem.gradient(x)
        error = max(min(tolerance, norm(self.problem, g)), self.floor)
        self.gradients.append((x.copy(), tolerance, error))
        return g + self.excess * error * self.unit_vector(self.gradient_way(g, x)), error

    def hessian_action_within(self, x, v, rtol):
        """The product, off by what is allowed."""
        h = self.problem.hessian_action(x, v)
        self.products.append((x.copy(), v.copy(), rtol))
        return h + self.excess * rtol * norm(self.problem, h) * self.unit_vector(self.product_way(h, v))


def ones(a, v):
    """The same direction always."""
    return np.ones_like(a)


def against(a, v):
    """Against the vector itself."""
    return -a


def flatten(h, v):
    """Against the direction of a product: less curvature."""
    return -v


PROBLEMS = {
    "quadratic": (lambda: random_quadratic()[0], np.ones(12)),
    "bowl": (bowl, np.full(6, 3.0)),
    "far bowl": (lambda: bowl(tilt=0.01), np.full(6, 5.0)),
    "rosenbrock": (lambda: rosenbrock(2), np.array([-1.2, 1.0])),
}
WAYS = {"along": (None, None), "against": (against, flatten), "fixed": (ones, ones)}


def run(problem, x0, **options):
    """With controlled inexactness."""
    options = {"gtol_rel": 1e-6, "max_it": 100, "inexact": InexactOptions()} | options
    return minimize_trust_region(problem, x0, **options)


class Modelled:
    """A convex quadratic whose Hessian products come from a symmetric operator near the Hessian."""

    def __init__(self, size=40):
        self.problem, rng = random_quadratic(size)[0], np.random.default_rng(3)
        self.inner, self.value, self.gradient = self.problem.inner, self.problem.value, self.problem.gradient
        self.asked, self.noise, n = [], rng.standard_normal((size, size)), size
        self.H = np.array([self.problem.hessian_action(np.zeros(n), e) for e in np.eye(n)]).T

    def hessian_action(self, x, v):
        return self.H @ v

    def hessian_model(self, x, rtol):
        self.asked.append(rtol)
        # C^T E C / 2 with H = M^-1 C^T C: |(d, (H_model - H) d)| <= rtol (d, H d), self-adjoint as H is
        C = np.linalg.cholesky(self.problem.M @ self.H).T
        E = self.noise + self.noise.T
        H = self.H + np.linalg.solve(self.problem.M, C.T @ (rtol / np.linalg.norm(E, 2) * E) @ C)
        return lambda v: H @ v


@pytest.mark.parametrize("forcing", [0.3, 0.02, 1e-4])
def test_a_symmetric_model_costs_no_more_cg_iterations_than_the_hessian(forcing):
    """Each Newton iteration gains what conjugate gradients were asked for: their end and the model's error add up."""
    problem, x0 = Modelled(), np.ones(40)
    result = run(problem, x0, cg_forcing=forcing, gtol_rel=1e-8, initial_radius=1e9)
    exact = minimize_trust_region(problem, x0, cg_forcing=forcing, gtol_rel=1e-8, initial_radius=1e9)
    assert result.converged
    assert problem.asked
    assert all(rtol == pytest.approx(forcing) for rtol in problem.asked)
    used, needed = (sum(r.cg_iterations for r in found.history) for found in (result, exact))
    assert used <= 1.5 * needed + 2
    assert result.history[1].hessian_rtol == pytest.approx(forcing)


# --- convergence under the worst admissible errors -------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sign", [1, -1, "worst"])
def test_worst_errors_do_not_spoil_convergence(name, way, sign):
    """The true gradient meets the tolerance, and every accepted step truly lowers J: the reduction is certain."""
    make, x0 = PROBLEMS[name]
    problem = make()
    adversary, truth = Adversary(problem, sign, *WAYS[way]), [problem.value(x0)]
    result = run(adversary, x0, callback=lambda x, entry: truth.append(problem.value(x)))
    assert result.reason is StopReason.GRADIENT
    tolerance = 1e-6 * result.history[0].gradient_norm
    assert norm(problem, problem.gradient(result.x)) <= tolerance * (1 + 1e-9)
    assert result.gradient_norm + result.gradient_error <= tolerance
    for (before, after), entry in zip(pairs(truth), result.history[1:], strict=True):
        assert after < before if entry.accepted else after == before


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("eta", [0.02, 0.2])
def test_conditions_on_value_and_gradient_hold(name, eta):
    """|ared - cred| <= eta pred at each step with the worst signs; |g - g_true| <= kappa |g| at each iterate."""
    make, x0 = PROBLEMS[name]
    problem, options = make(), InexactOptions(eta=eta, kappa_grad=0.3)
    adversary, iterates = Adversary(problem, "worst", against), [x0]

    def callback(x, entry):
        if entry.accepted:
            answers = {y.tobytes(): answer for y, _, answer, _ in adversary.values}
            computed = answers[iterates[-1].tobytes()] - answers[x.tobytes()]
            actual, predicted = problem.value(iterates[-1]) - problem.value(x), computed / entry.ratio
            assert abs(actual - computed) <= eta * predicted * (1 + 1e-8) + 1e-15 * abs(entry.value)
            assert actual > 0
        iterates.append(x)

    result = run(adversary, x0, inexact=options, value_rtol=1e-15, callback=callback)
    assert result.converged
    tolerance = 1e-6 * result.history[0].gradient_norm
    for x, entry in zip(iterates, result.history, strict=True):
        true_norm = norm(problem, problem.gradient(x))
        assert entry.gradient_error <= max(0.3 * entry.gradient_norm, 0.1 * tolerance) * (1 + 1e-12)
        assert abs(true_norm - entry.gradient_norm) <= entry.gradient_error * (1 + 1e-8)
        assert entry.gradient_error <= entry.gradient_tolerance * (1 + 1e-12)
        assert entry.value_error <= entry.value_tolerance * (1 + 1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
def test_value_tolerance_is_the_one_of_the_theory(name):
    """Half of max(sigma (eta min(pred/sigma, r_k))^(1/omega), eta pred (epsilon/|g|)^2), at both points."""
    make, x0 = PROBLEMS[name]
    adversary, options = Adversary(make(), 1, ones), InexactOptions(eta=0.2, omega=0.5, forcing=0.6)
    records, sigma, current, bound_by_the_end = [], 0.0, x0, 0

    def callback(x, entry):
        nonlocal sigma, current, bound_by_the_end
        answers = {y.tobytes(): answer for y, _, answer, _ in adversary.values}
        computed = answers[current.tobytes()] - adversary.values[-1][2]  # the trial point is asked for last
        predicted, before = computed / entry.ratio, result_norms[-1]
        sigma = max(sigma, predicted)
        theta = sigma * (0.2 * min(predicted / sigma, 0.6**entry.iteration)) ** 2
        end = 0.2 * predicted * (tolerance / before) ** 2
        asked = adversary.values[-1][1]
        assert asked == pytest.approx(max(0.5 * theta, 0.5 * end, 1e-15 * abs(entry.value)), rel=1e-5)
        bound_by_the_end += end > theta
        records.append(entry)
        result_norms.append(entry.gradient_norm)
        current = x

    first = minimize_trust_region(adversary, x0, inexact=options, max_it=0)
    result_norms, tolerance = [first.gradient_norm], 1e-4 * first.gradient_norm
    result = run(adversary, x0, inexact=options, gtol_rel=1e-4, value_rtol=1e-15, callback=callback)
    assert result.converged
    assert len(records) == result.iterations
    assert bound_by_the_end > 0


def test_the_unit_of_the_objective_does_not_matter():
    """J and 2^20 J are asked for the same relative accuracies and give the same iterates to the last bit."""
    factor = 2.0**20

    class Scaled:
        def __init__(self, problem):
            self.problem, self.inner = problem, problem.inner

        def value_within(self, x, tolerance):
            value, error = self.problem.value_within(x, tolerance / factor)
            return factor * value, factor * error

        def gradient_within(self, x, tolerance):
            g, error = self.problem.gradient_within(x, tolerance / factor)
            return factor * g, factor * error

        def hessian_action_within(self, x, v, rtol):
            return factor * self.problem.hessian_action_within(x, v, rtol)

    make, x0 = PROBLEMS["far bowl"]
    plain = run(Adversary(make(), 1, ones), x0, initial_radius=1e3)
    big = run(Scaled(Adversary(make(), 1, ones)), x0, initial_radius=1e3)
    assert np.array_equal(plain.x, big.x)
    assert [entry.ratio for entry in plain.history[1:]] == [entry.ratio for entry in big.history[1:]]
    assert big.history[-1].gradient_tolerance == factor * plain.history[-1].gradient_tolerance


def test_cg_does_not_go_below_the_error_of_the_gradient():
    """With an error of more than 0.2 |g| it stops before cg_rtol = 0.2 does, whatever cg_rtol says."""
    make, x0 = PROBLEMS["quadratic"]
    entries = []
    for problem, options in ((make(), {"cg_rtol": 0.2}), (make(), {"cg_rtol": 1e-8})):
        adversary = Adversary(problem)
        adversary.hessian_action_within, adversary.hessian_action = None, problem.hessian_action
        result = run(adversary, x0, inexact=InexactOptions(kappa_grad=0.4), max_it=1, **options)
        entries.append(result.history)
    loose, tight = entries
    assert tight[0].gradient_error >= 0.2 * tight[0].gradient_norm
    assert tight[1].cg_iterations <= loose[1].cg_iterations


@pytest.mark.parametrize("gtol", np.geomspace(1e-7, 1e-2, 21))
def test_no_gradient_is_asked_for_below_a_tenth_of_the_tolerance(gtol):
    """Wherever the last iterate happens to land."""
    make, x0 = PROBLEMS["bowl"]
    adversary = Adversary(make(), 1, against)
    result = run(adversary, x0, gtol_rel=gtol, inexact=InexactOptions(kappa_grad=0.02))
    assert result.converged
    final = gtol * result.history[0].gradient_norm
    assert min(tolerance for _, tolerance, _ in adversary.gradients) >= 0.1 * final * (1 - 1e-12)


def test_a_gradient_below_its_error_is_asked_for_in_steps():
    """An answer of zero says that the gradient is no larger than its error, not that it is zero."""
    asked = []

    class Stationary(Adversary):
        def gradient_within(self, x, tolerance):
            asked.append(tolerance)
            return np.zeros(6), min(tolerance, 1.0)

    oracle = InexactOracle(GuardedProblem(Stationary(bowl())), InexactOptions(kappa_grad=0.1, max_tightenings=4), 1e-12)
    answer = oracle.gradient(np.zeros(6), 1, np.zeros(6), guess=1.0)
    assert asked == pytest.approx([0.1 * 0.05**j for j in range(5)])
    assert answer.error == pytest.approx(0.1 * 0.05**4)


def test_asked_accuracy_follows_the_run_and_ends_where_it_is_enough():
    """Gradients are asked for as |g| falls and never below a tenth of the tolerance; J not below the last promise."""
    problem = random_quadratic(n=30)[0]
    adversary = Adversary(problem, 1, ones, ones)
    result = run(adversary, np.zeros(30), gtol_rel=1e-8)
    assert result.converged
    final = 1e-8 * result.history[0].gradient_norm
    asked = [entry.gradient_tolerance for entry in result.history]
    assert asked[0] == pytest.approx(0.1 * result.history[0].gradient_norm, rel=0.6)
    assert asked[-1] <= 1e-6 * asked[0]
    assert min(tolerance for _, tolerance, _ in adversary.gradients) >= 0.1 * final * (1 - 1e-12)
    assert adversary.gradients[0][1] == math.inf  # no scale is known
    assert sum(tolerance == math.inf for _, tolerance, _ in adversary.gradients) == 1
    # The reduction left where |g| is at the tolerance is at most |g|^2 / (2 lowest eigenvalue); half of eta of what
    # the model promises for such a gradient goes to each point.
    highest = np.linalg.eigvals(problem.M_inverse @ problem.d2f(np.zeros(30))).real.max()
    promise = final**2 / (2 * highest)
    assert min(tolerance for _, tolerance, *_ in adversary.values) >= 0.5 * 0.1 * promise * 0.5


def test_value_tolerances_tighten_with_the_forcing_sequence():
    """theta <= sigma (eta r_k)^(1/omega), whatever the promise: each point is asked for half of that."""
    make, x0 = PROBLEMS["rosenbrock"]
    options = InexactOptions(forcing=0.5, omega=0.5, eta=0.2)
    adversary = Adversary(make())
    result = run(adversary, x0, inexact=options, gtol_rel=1e-9)
    assert result.converged
    most = max(abs(entry.value) for entry in result.history) * 2  # no reduction is larger
    for entry in result.history[1:]:
        theta = most * (0.2 * 0.5**entry.iteration) ** 2
        floor = 0.2 * most * 1e-18  # what the final tolerance makes of it is smaller still
        assert entry.value_tolerance <= max(0.5 * theta, 0.5 * floor, 1e-12 * most) * (1 + 1e-9)


def test_a_smaller_radius_asks_for_a_better_gradient_at_the_same_point():
    """After rejected steps the error is within kappa gamma Delta, gamma the first curvature of the run."""
    problem = bowl(tilt=0.01)
    x0, way = np.full(6, 5.0), WAYS["fixed"]
    adversary = Adversary(problem, 1, way[0])
    adversary.hessian_action_within = None
    adversary.hessian_action = problem.hessian_action
    result = run(adversary, x0, initial_radius=1e6)
    g = problem.gradient(x0)
    first = g + result.history[0].gradient_error * adversary.unit_vector(np.ones(6))
    gamma = first @ problem.d2f(x0) @ first / (first @ first)
    assert result.converged
    refined = 0
    for entry, after in pairs(result.history[1:]):
        if not entry.accepted:
            final = 0.1e-6 * result.history[0].gradient_norm
            assert entry.gradient_error <= max(0.1 * gamma * after.radius, final) * (1 + 1e-9)
            refined += entry.gradient_error < result.history[entry.iteration - 1].gradient_error
    assert refined > 0


# --- inexact products ------------------------------------------------------------------------------------------------


def path_of(problem, g, tolerance, oracle=None, **options):
    """The conjugate gradient path from 0 with gradient g."""
    oracle = oracle or ExactOracle(GuardedProblem(problem))
    point = Iterate(np.zeros_like(g), None, Gradient(g, norm(problem, g)))
    return SteihaugPath(oracle, point, tolerance=tolerance, max_it=50, iteration=1, **options)


class LinearProducts(ExactOracle):
    """Products with a fixed matrix that need not be self-adjoint, said to be inexact."""

    def __init__(self, problem, matrix):
        """M^-1 matrix v for H v."""
        super().__init__(GuardedProblem(problem))
        self.problem, self.matrix = problem, matrix

    def curvature(self, x, d, dd, iteration, target):
        """With a relative error of a tenth, it says."""
        h = self.problem.M_inverse @ (self.matrix @ d)
        return h, self.inner(d, h), 0.1


@pytest.mark.parametrize("skew", [0.0, 0.02, 0.3])
def test_prediction_is_that_of_the_products_received(skew):
    """-(g, p) - (p, q)/2 with q the received product with p, to round-off, where the usual formula is off."""
    rng = np.random.default_rng(2)
    problem, H = random_quadratic(seed=2)
    S = rng.standard_normal((12, 12))
    A = H + skew * norm(problem, np.ones(12)) * (S - S.T)
    g = rng.standard_normal(12)
    path = path_of(problem, g, 1e-8 * norm(problem, g), LinearProducts(problem, A))
    for radius in (0.1, 0.5, 2.0, 10.0, 1e3):
        step = path.step(radius)
        honest = -problem.inner(g, step.trial) - 0.5 * step.trial @ A @ step.trial
        assert step.reduction == pytest.approx(honest, rel=1e-9)
        assert step.reduction > 0
    usual = sum(s.length * s.slope - 0.5 * s.length**2 * s.curvature for s in path.segments[:6])
    plain = sum(0.5 * s.length**2 * s.curvature for s in path.segments[:6])
    assert (abs(usual - plain) <= 1e-9 * usual) == (skew == 0)


def test_a_step_promises_at_least_half_of_the_cauchy_step():
    """With products far from symmetric: paths along which the promise would fall below that are left, and say so."""
    rng, stops = np.random.default_rng(3), set()
    problem, H = random_quadratic(seed=3)
    for _ in range(40):
        S = rng.standard_normal((12, 12))
        g = rng.standard_normal(12)
        path = path_of(problem, g, 1e-6 * norm(problem, g), LinearProducts(problem, H + 20 * (S - S.T)))
        for radius in (0.01, 0.1, 1.0, 10.0, 100.0):
            step = path.step(radius)
            tau = min(radius / norm(problem, g), problem.inner(g, g) / (g @ H @ g))
            cauchy = tau * problem.inner(g, g) - 0.5 * tau**2 * (g @ H @ g)
            assert step.reduction >= 0.5 * cauchy * (1 - 1e-12)
            stops.add(step.stop)
    assert CGStop.INEXACT in stops


@pytest.mark.parametrize("way", [None, ones, flatten])
def test_products_get_coarser_as_the_residual_falls(way):
    """rtol_j |r_j| <= kappa tau for all j, and the true residual drifts by no more than that makes possible."""
    problem, _ = random_quadratic(n=20, seed=5)
    adversary = Adversary(problem, product_way=way)
    g = problem.gradient(np.zeros(20))
    target = 1e-4 * norm(problem, g)
    path = path_of(problem, g, target, InexactOracle(GuardedProblem(adversary), InexactOptions(), 1e-12))
    step = path.step(1e9)
    assert step.stop == CGStop.RESIDUAL
    residuals = [math.sqrt(s.rr) for s in path.segments] + [step.model_norm]
    rtols = [s.rtol for s in path.segments]
    assert step.model_norm <= target
    assert step.rtol == min(rtols)
    assert all(rtol <= 0.01 * target / r * (1 + 1e-12) for rtol, r in zip(rtols, residuals, strict=False))
    assert max(rtols) > 100 * min(rtols)
    if way is None:  # an error along the product never hides the curvature: one question each
        assert len(adversary.products) == step.cg_iterations
        assert all(rtol == pytest.approx(0.01 * target / r) for rtol, r in zip(rtols, residuals, strict=False))
    drift = sum(0.01 * target * (1 + after / before) for before, after in pairs(residuals)) / (1 - max(rtols))
    residual = norm(problem, g + problem.hessian_action(g, step.trial))
    assert residual <= target + drift


@pytest.mark.parametrize("way", [ones, flatten])
@pytest.mark.parametrize("kappa", [0.01, 0.5])
def test_errors_of_products_do_not_feign_negative_curvature(way, kappa):
    """In a convex quadratic with condition number 1e4 and products flattened as far as allowed."""
    rng = np.random.default_rng(6)
    problem = quadratic(random_spd(20, rng, 1, 1e4), rng.standard_normal(20), np.eye(20))
    result = run(Adversary(problem, product_way=way), np.zeros(20), inexact=InexactOptions(kappa_hess=kappa))
    assert result.converged == (kappa == 0.01)  # half the residual tolerance an iteration is too much
    assert not any(entry.cg_stop == CGStop.NEGATIVE_CURVATURE for entry in result.history)


# --- problems that cannot, or do not, do what is asked ---------------------------------------------------------------


@pytest.mark.parametrize("floor", [1e-2, 1e-4])
@pytest.mark.parametrize("name", ["quadratic", "bowl", "far bowl"])
def test_an_accuracy_that_cannot_be_reached_ends_the_run(name, floor):
    """With the gradient at the floor, and without asking twice for what was missed."""
    make, x0 = PROBLEMS[name]
    problem = make()
    adversary = Adversary(problem, "worst", ones, floor=floor)
    result = run(adversary, x0, gtol_rel=0, gtol_abs=1e-9)
    assert result.reason in (StopReason.ACCURACY, StopReason.ROUND_OFF)
    assert not result.converged
    assert norm(problem, problem.gradient(result.x)) <= 4 * floor + math.sqrt(20 * floor) * (
        result.reason is StopReason.ROUND_OFF
    )
    for log in (adversary.values, adversary.gradients):
        missed = [entry[0].tobytes() for entry in log if entry[1] < floor]
        assert len(missed) == len(set(missed))


def test_a_missed_accuracy_is_not_asked_for_again_after_a_rejected_step():
    """The first guess is asked for twice: for a scale, and for what it misses. The radius shrinks, the answer stays."""
    problem, x0 = bowl(tilt=0.01), np.full(6, 5.0)
    adversary = Adversary(problem, 1, ones, floor=0.2 * norm(problem, problem.gradient(x0)))
    result = run(adversary, x0, initial_radius=1e6)
    assert not result.history[1].accepted
    assert not result.history[2].accepted
    assert sum(np.array_equal(x, x0) for x, *_ in adversary.gradients) == 2
    assert result.history[1].gradient_error > result.history[1].gradient_tolerance


class Honest:
    """Ignores the tolerance and says so: noise of fixed size in J and gradient."""

    def __init__(self, problem, noise, seed):
        """With its own random numbers."""
        self.problem, self.inner, self.hessian_action = problem, problem.inner, problem.hessian_action
        self.noise, self.rng = noise, np.random.default_rng(seed)

    def value_within(self, x, tolerance):
        """J and noise."""
        return self.problem.value(x) + self.noise * self.rng.uniform(-1, 1), self.noise

    def gradient_within(self, x, tolerance):
        """The gradient and noise a tenth as large."""
        u = self.rng.standard_normal(x.size)
        return self.problem.gradient(x) + 0.1 * self.noise * u / norm(self.problem, u), 0.1 * self.noise


def test_below_the_errors_of_the_objective_the_gradient_has_to_fall():
    """Whatever luck J had: a step accepted with no say of J lowers |g|, or the run ends."""
    unsaid = 0
    for seed in range(12):
        result = run(Honest(rosenbrock(2), 0.3, seed), np.array([-1.2, 1.0]))
        assert result.reason in (StopReason.ROUND_OFF, StopReason.ACCURACY)
        for before, entry in pairs(result.history):
            if entry.accepted and entry.ratio == 1:
                assert entry.gradient_norm < before.gradient_norm
                unsaid += 1
    assert unsaid > 10


class Deaf:
    """Ignores the tolerance: noise of fixed size, said to be what was asked for."""

    def __init__(self, problem, value_noise, gradient_noise):
        """With its own random numbers."""
        self.problem, self.inner, self.hessian_action = problem, problem.inner, problem.hessian_action
        self.value_noise, self.gradient_noise = value_noise, gradient_noise
        self.rng = np.random.default_rng(0)
        self.asked = []

    def value_within(self, x, tolerance):
        """J and noise."""
        self.asked.append(tolerance)
        return self.problem.value(x) + self.value_noise * self.rng.uniform(-1, 1), min(tolerance, 1.0)

    def gradient_within(self, x, tolerance):
        """The gradient and noise."""
        self.asked.append(tolerance)
        u = self.rng.standard_normal(x.size)
        return self.problem.gradient(x) + self.gradient_noise * u / norm(self.problem, u), min(tolerance, 1.0)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("noise", [(1e-3, 0.0), (0.0, 1e-3), (1e-3, 1e-3)])
def test_a_problem_that_ignores_the_tolerance_is_found_out(name, noise):
    """The run ends by itself and says that round-off, the radius or the accuracy ended it, unless it converged."""
    make, x0 = PROBLEMS[name]
    problem = make()
    deaf = Deaf(problem, *noise)
    result = run(deaf, x0, max_it=200, gtol_rel=1e-8)
    assert result.iterations < 120
    assert result.reason in (StopReason.ACCURACY, StopReason.ROUND_OFF, StopReason.RADIUS, StopReason.GRADIENT)
    if noise[1] > 0:
        assert result.reason is not StopReason.GRADIENT
    assert min(deaf.asked) >= 0
    assert len(deaf.asked) < 400


@pytest.mark.parametrize("excess", [3.0, 20.0])
@pytest.mark.parametrize("name", ["quadratic", "bowl", "rosenbrock"])
def test_estimates_wrong_by_a_factor_are_learned(name, excess):
    """Errors 3 and 20 times larger than claimed: the answers contradict each other, and the true tolerance is met."""
    make, x0 = PROBLEMS[name]
    problem = make()
    adversary = Adversary(problem, 1, ones, excess=excess)
    adversary.hessian_action_within, adversary.hessian_action = None, problem.hessian_action
    result = run(adversary, x0)
    assert result.converged
    assert norm(problem, problem.gradient(result.x)) <= 1e-6 * result.history[0].gradient_norm


def test_a_factor_of_estimates_falls_by_half_at_most():
    """Two results that differ by three times their errors raise it at once; those that agree halve it, down to one."""
    assert _factor(1.0, 6.0, 2.0) == 3.0
    assert _factor(8.0, 6.0, 2.0) == 4.0
    assert _factor(8.0, 0.0, 2.0) == 4.0
    assert _factor(1.5, 0.0, 2.0) == 1.0
    assert _factor(8.0, 6.0, math.inf) == 4.0


def test_answers_that_are_none_are_refused():
    """An error that is negative or nan; a J that is not finite is no error at a trial point."""
    for error in (-1.0, math.nan):
        adversary = Adversary(bowl())
        adversary.value_within = lambda x, tolerance, error=error: (1.0, error)
        with pytest.raises(ValueError, match="value_within returned the error"):
            run(adversary, np.full(6, 3.0))
        adversary = Adversary(bowl())
        adversary.gradient_within = lambda x, tolerance, error=error: (np.ones(6), error)
        with pytest.raises(ValueError, match="gradient_within returned the error"):
            run(adversary, np.full(6, 3.0))
    adversary, calls = Adversary(bowl(tilt=0.01)), []
    within = adversary.value_within

    def outside(x, tolerance):
        calls.append(1)
        return (math.nan, math.nan) if len(calls) in (4, 5) else within(x, tolerance)

    adversary.value_within = outside
    result = run(adversary, np.full(6, 5.0))
    assert result.converged


# --- what it saves, and where it stands aside ------------------------------------------------------------------------


class FixedPoint:
    """Control z of a state u = K u + B z by fixed-point sweeps that stop at an estimated error, and count.

    ``J = |u - d|^2 / 2 + sum u^4 / 4 + alpha |z|^2 / 2`` with |K| = q = 1/2: an iterate whose last update has norm s
    is off by at most ``s q / (1 - q) = s``. States and adjoints of the last two controls are kept.
    """

    def __init__(self, n=20, alpha=1e-2):
        """A smooth K and a target."""
        t = np.linspace(0, 1, n)
        K = np.exp(-((t[:, None] - t) ** 2) / 0.1)
        self.K, self.alpha, self.d = 0.5 * K / np.linalg.norm(K, 2), alpha, np.sin(4 * t)
        self.B = np.diag(1 + t)
        self.b_norm, self.sweeps, self.kept = 2.0, 0, {}
        self.inner = np.dot

    def solve(self, f, start, tolerance):
        """y = K y + f up to the tolerance; returns y and the error."""
        y, step = start, math.inf
        while step > tolerance and step > 1e-15:
            self.sweeps += 1
            new = self.K @ y + f
            y, step = new, np.linalg.norm(new - y)
        return y, (step if math.isfinite(step) else tolerance)

    def entry(self, z):
        """What is kept at z; new points start from the last."""
        key = z.tobytes()
        if key not in self.kept:
            last = next(reversed(self.kept.values()), None)
            zero = np.zeros_like(z)
            self.kept[key] = dict(last, eu=math.inf, ep=math.inf) if last else dict(u=zero, p=zero, eu=1e9, ep=1e9)
            self.kept = dict(list(self.kept.items())[-2:])
        return self.kept[key]

    def state(self, z, tolerance):
        """The state and its error."""
        e = self.entry(z)
        if e["eu"] > tolerance:
            e["u"], e["eu"] = self.solve(self.B @ z, e["u"], tolerance)
        return e["u"], e["eu"]

    def value_within(self, z, tolerance):
        """Half the tolerance, to first order, goes to the state."""
        slope = np.linalg.norm(self.state(z, 1e-1)[0] - self.d) + 5.0
        u, error = self.state(z, min(tolerance / (2 * slope), 1e-1))
        value = 0.5 * np.sum((u - self.d) ** 2) + 0.25 * np.sum(u**4) + 0.5 * self.alpha * z @ z
        return value, 2 * slope * error

    def gradient_within(self, z, tolerance):
        """B^T p + alpha z, p = K p + u - d + u^3."""
        tolerance = min(tolerance, 1.0)
        e = self.entry(z)
        stiff = 2 * self.b_norm * (1 + 3 * np.max(self.state(z, 1e-1)[0] ** 2) + 1.0)
        u, error = self.state(z, tolerance / (2 * stiff))
        target = tolerance / (2 * self.b_norm)
        if e["ep"] > target:
            e["p"], e["ep"] = self.solve(u - self.d + u**3, e["p"], target)
        return self.B.T @ e["p"] + self.alpha * z, stiff * error + self.b_norm * e["ep"]

    def hessian_action_within(self, z, v, rtol):
        """Linearised state, then adjoint; the size is that of the first sweep."""
        u = self.entry(z)["u"]
        size = np.linalg.norm(self.B @ v)
        w, _ = self.solve(self.B @ v, np.zeros_like(v), rtol * size / 20)
        y, _ = self.solve((1 + 3 * u**2) * w, np.zeros_like(v), rtol * size / 20)
        return self.B.T @ y + self.alpha * v

    def value(self, z):
        """To round-off."""
        return self.value_within(z, 1e-12)[0]

    def gradient(self, z):
        """To round-off."""
        return self.gradient_within(z, 1e-12)[0]

    def hessian_action(self, z, v):
        """To round-off."""
        return self.hessian_action_within(z, v, 1e-12)


def test_work_is_saved():
    """A problem solved by sweeps takes less than half of them, to the same control within the tolerance."""
    exact, inexact = FixedPoint(), FixedPoint()
    x0 = np.zeros(20)
    a = minimize_trust_region(exact, x0, gtol_rel=1e-6, cg_rtol=0.1)
    b = minimize_trust_region(inexact, x0, gtol_rel=1e-6, cg_rtol=0.1, inexact=InexactOptions())
    assert a.converged
    assert b.converged
    assert np.linalg.norm(FixedPoint().gradient(b.x)) <= 1e-6 * b.history[0].gradient_norm
    assert inexact.sweeps < 0.5 * exact.sweeps
    np.testing.assert_allclose(b.x, a.x, atol=2e-6 * a.history[0].gradient_norm / exact.alpha)


def test_without_the_option_the_methods_are_not_called():
    """And a problem without the methods takes, with the option, the very steps it takes without."""
    problem = rosenbrock(2)
    problem.value_within = problem.gradient_within = problem.hessian_action_within = None.__class__
    x0 = np.array([-1.2, 1.0])
    plain = minimize_trust_region(problem, x0)
    asked = run(rosenbrock(2), x0, max_it=50)
    assert np.array_equal(plain.x, asked.x)
    assert plain.history[1:] == asked.history[1:]
    assert (plain.value_calls, plain.gradient_calls, plain.hessian_calls) == (
        asked.value_calls,
        asked.gradient_calls,
        asked.hessian_calls,
    )
    last = plain.history[-1]
    assert last.value_tolerance == last.value_error == last.hessian_rtol == 0
    assert last.gradient_tolerance == last.gradient_error == 0


def test_monitor_shows_what_was_asked_for_and_got():
    """Five more columns, under their names."""
    lines, make = [], PROBLEMS["far bowl"][0]
    result = run(Adversary(make()), np.full(6, 5.0), initial_radius=1e3, monitor=lines.append)
    head = lines[0]
    assert any(not entry.accepted for entry in result.history)
    for name, column in (
        ("J tol", "value_tolerance"),
        ("J error", "value_error"),
        ("g tol", "gradient_tolerance"),
        ("g error", "gradient_error"),
        ("H rtol", "hessian_rtol"),
    ):
        end = head.index(name) + len(name)
        for line, entry in zip(lines[1:], result.history, strict=True):
            assert float(line[end - 8 : end]) == pytest.approx(getattr(entry, column), rel=0.06, abs=1e-300)


BAD = [
    ("kappa_grad", (0.0, 1.0, math.nan, "small", None)),
    ("eta", (0.0, 0.25, -1.0, math.nan)),
    ("omega", (0.0, 1.0, math.nan)),
    ("forcing", (0.0, 1.0, math.nan)),
    ("kappa_hess", (0.0, 1.0, math.nan)),
    ("max_tightenings", (0, 1.5, None)),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD for value in values])
def test_bad_options_are_refused(name, value):
    """At construction, with the name and what would do."""
    with pytest.raises(ValueError, match=rf"{name} = .* is refused: give "):
        InexactOptions(**{name: value})


def test_the_option_is_a_set_of_options():
    """True is not."""
    with pytest.raises(ValueError, match="inexact = True is refused: give InexactOptions"):
        minimize_trust_region(rosenbrock(2), np.ones(2), inexact=True)
