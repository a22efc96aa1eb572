"""Preconditioned conjugate gradients in the trust region against the algebra of CG and of BFGS updates."""

import math

import numpy as np
import pytest

from pint_fem.optimize import CGStop, InexactOptions, LimitedMemoryPreconditioner, minimize_trust_region
from pint_fem.optimize.guarded_problem import GuardedProblem
from pint_fem.optimize.oracle import ExactOracle, Gradient, Iterate
from pint_fem.optimize.preconditioners import merged_pairs
from pint_fem.optimize.trust_region.steihaug import SteihaugPath
from tests.test_inexact_trust_region import Adversary, ones
from tests.test_trust_region import Smooth, mass_matrix, norm, quadratic, random_quadratic, random_spd, rosenbrock


def path_at_zero(problem, g, rtol, preconditioner=None):
    """The CG path of a problem at 0 with gradient g, products kept."""
    point = Iterate(np.zeros_like(g), None, Gradient(g, norm(problem, g)))
    return SteihaugPath(
        ExactOracle(GuardedProblem(problem)), point, tolerance=rtol * norm(problem, g), max_it=100, iteration=1,
        preconditioner=preconditioner, keep_products=True,
    )  # fmt: skip


def operator(problem, H):
    """The Hessian as an operator on the space: M^-1 H."""
    return problem.M_inverse @ H


def matrix_of(P, n):
    """The matrix of a linear callable."""
    return np.array([P(e) for e in np.eye(n)]).T


# --- conjugate gradients with a preconditioner -----------------------------------------------------------------------


def test_the_inverse_hessian_ends_cg_in_one_iteration():
    """One direction, one product, one step: for any inner product."""
    problem, H = random_quadratic()
    inverse = np.linalg.inv(operator(problem, H))
    result = minimize_trust_region(
        problem, np.ones(12), preconditioner=lambda r: inverse @ r, initial_radius=1e3, cg_rtol=1e-10, gtol_rel=1e-9
    )
    assert [entry.cg_iterations for entry in result.history] == [0, 1]
    assert result.hessian_calls == 1
    assert result.converged
    np.testing.assert_allclose(problem.df(result.x), 0, atol=1e-9)


@pytest.mark.parametrize("clusters", [2, 3])
def test_cg_ends_after_as_many_iterations_as_distinct_eigenvalues_of_the_product(clusters):
    """P = B^-1 with H = B + rank(clusters - 1): P H has that many distinct eigenvalues."""
    rng, n = np.random.default_rng(clusters), 12
    M = mass_matrix(np.linspace(0, 1, n) ** 2 * n)
    B = random_spd(n, rng, 1, 1e3)
    V = rng.standard_normal((n, clusters - 1))
    problem = quadratic(B + 50 * V @ V.T, rng.standard_normal(n), M)
    P = np.linalg.inv(B) @ M
    result = minimize_trust_region(
        problem, np.zeros(n), preconditioner=lambda r: P @ r, initial_radius=1e6, cg_rtol=1e-8, gtol_rel=1e-7
    )
    assert [entry.cg_iterations for entry in result.history] == [0, clusters]


@pytest.mark.parametrize("shift", [0.0, 20.0])
def test_the_radius_is_a_length_of_the_problem(shift):
    """The path ends where it first crosses the sphere of the M norm; a smaller radius cuts the same path earlier."""
    rng = np.random.default_rng(7)
    problem, H = random_quadratic(seed=7, shift=shift)
    g = problem.gradient(np.zeros(12))
    P = operator(problem, random_spd(12, rng, 1e-2, 1e2))  # (a, P b) = a S b
    path = path_at_zero(problem, g, 1e-10, lambda r: P @ r)
    radii = np.geomspace(1e-4, 1e2, 25)
    for radius in radii[::-1]:
        step, fresh = path.step(radius), path_at_zero(problem, g, 1e-10, lambda r: P @ r).step(radius)
        assert np.array_equal(step.trial, fresh.trial)
        assert norm(problem, step.trial) == pytest.approx(step.norm, rel=1e-9)
        assert step.norm <= radius
        model = problem.inner(g, step.trial) + 0.5 * step.trial @ H @ step.trial
        assert step.reduction == pytest.approx(-model, rel=1e-8)
        if step.stop == CGStop.BOUNDARY:  # every node before lies within the ball
            nodes = [s.pp for s in path.segments[: step.cg_iterations]]
            assert max(nodes) <= radius**2 * (1 + 1e-12)


def test_the_path_may_come_back_and_is_left_all_the_same():
    """With a bad preconditioner |p_j| is not monotone: a radius between is met at the first crossing."""
    rng, found = np.random.default_rng(1), 0
    for _ in range(80):
        H = np.diag(np.geomspace(1, 1e3, 6))
        problem = quadratic(H, rng.standard_normal(6), np.eye(6))
        P = random_spd(6, rng, 1e-3, 1e3)
        g = problem.gradient(np.zeros(6))
        path = path_at_zero(problem, g, 1e-9, lambda r, P=P: P @ r)
        end = path.step(1e9)
        sizes = [math.sqrt(s.pp) for s in path.segments] + [end.norm]
        j = int(np.argmax(sizes))
        if j < len(sizes) - 1 and sizes[j] > 1.01 * end.norm:
            found += 1
            radius = 0.5 * (sizes[j] + end.norm)
            step = path.step(radius)
            assert step.stop == CGStop.BOUNDARY
            assert step.cg_iterations <= j
            assert np.linalg.norm(step.trial) == pytest.approx(radius, rel=1e-9)
    assert found > 3


def test_first_radius_is_ten_preconditioned_cauchy_steps():
    """Whatever the unit of J, with the preconditioner scaled along."""
    problem, H = random_quadratic(seed=4)
    P = np.linalg.inv(operator(problem, H + np.eye(12)))
    g = problem.gradient(np.zeros(12))
    z = P @ g
    length = problem.inner(g, z) / (z @ H @ z) * norm(problem, z)
    result = minimize_trust_region(problem, np.zeros(12), preconditioner=lambda r: P @ r, max_it=1)
    assert result.history[1].radius == pytest.approx(10 * length, rel=1e-10)


# --- the limited-memory preconditioner -------------------------------------------------------------------------------


def learned(seed=0, rtol=1e-10):
    """A problem, its Hessian and the pairs of a CG run on it."""
    problem, H = random_quadratic(seed=seed)
    path = path_at_zero(problem, problem.gradient(np.zeros(12)), rtol)
    step = path.step(1e9)
    return problem, H, path.pairs(step.cg_iterations)


def test_pairs_are_directions_and_their_products():
    """H d to round-off, and d conjugate."""
    problem, H, pairs = learned()
    for d, h in pairs:
        np.testing.assert_allclose(h, operator(problem, H) @ d, rtol=1e-10, atol=1e-12)
    d, e = pairs[0][0], pairs[1][0]
    assert abs(d @ H @ e) <= 1e-10 * math.sqrt((d @ H @ d) * (e @ H @ e))


def test_directions_of_negative_curvature_are_no_pairs():
    """They are followed to the boundary, and not learned from."""
    problem, _ = random_quadratic(seed=4, shift=20.0)
    path = path_at_zero(problem, problem.gradient(np.zeros(12)), 1e-10)
    step = path.step(1e6)
    assert step.stop == CGStop.NEGATIVE_CURVATURE
    assert len(path.pairs(step.cg_iterations)) == step.cg_iterations - 1
    assert all(problem.inner(d, h) > 0 for d, h in path.pairs(step.cg_iterations))


@pytest.mark.parametrize("count", [1, 4, 8])
def test_limited_memory_inverts_the_hessian_on_what_it_has_seen(count):
    """P H d = d for the pairs kept, which are conjugate; P is self-adjoint and positive definite in the M product."""
    problem, _, pairs = learned()
    P = LimitedMemoryPreconditioner(problem.inner)
    P.update(pairs[:count])
    for d, h in pairs[:count]:
        np.testing.assert_allclose(P(h), d, atol=1e-6 * np.abs(d).max())
    matrix = problem.M @ matrix_of(P, 12)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-9 * np.abs(matrix).max())
    assert np.linalg.eigvalsh(0.5 * (matrix + matrix.T)).min() > 0


def test_cg_after_seeing_all_directions_takes_one_iteration():
    """On the same quadratic; each direction left out costs about one more."""
    problem, _, pairs = learned(rtol=1e-12)
    g = problem.gradient(np.ones(12))
    P = LimitedMemoryPreconditioner(problem.inner)
    P.update(pairs)
    assert path_at_zero(problem, g, 1e-4, P).step(1e9).cg_iterations == 1
    P.update(pairs[4:])
    assert path_at_zero(problem, g, 1e-4, P).step(1e9).cg_iterations <= 1 + 4


def test_before_it_learned_and_after_useless_pairs_it_is_the_identity():
    """Negative curvature, or none that stands out of round-off, is no pair."""
    problem, _ = random_quadratic()
    P, r = LimitedMemoryPreconditioner(problem.inner), np.arange(12.0)
    assert np.array_equal(P(r), r)
    d = np.ones(12)
    P.update([(d, -d), (d, 0 * d)])
    assert np.array_equal(P(r), r)


def test_the_residual_is_not_modified():
    """The preconditioner works on a copy."""
    problem, _, pairs = learned()
    P = LimitedMemoryPreconditioner(problem.inner)
    P.update(pairs)
    r = np.ones(12)
    P(r)
    assert np.array_equal(r, np.ones(12))


def test_merged_pairs():
    """New pairs are sampled uniformly, first and last included; the latest old ones fill the memory before them."""
    old, new = [("o", i) for i in range(5)], [("n", i) for i in range(9)]
    assert merged_pairs(old, new, 3) == [("n", 0), ("n", 4), ("n", 8)]
    assert merged_pairs(old, new, 1) == [("n", 8)]
    assert merged_pairs(old, new[:2], 4) == [("o", 3), ("o", 4), ("n", 0), ("n", 1)]
    assert merged_pairs(old, new[:2], 20) == old + new[:2]
    assert merged_pairs(old, new[:4], 4) == new[:4]


def slowly_varying(n=60, cond=1e4, seed=0):
    """A quadratic and a little x^4: the Hessians of successive iterates are similar."""
    rng = np.random.default_rng(seed)
    H, c = random_spd(n, rng, 1, cond), 0.05 * rng.uniform(0.5, 1, n)
    return Smooth(
        lambda x: 0.5 * x @ H @ x + c @ x**4 - 3 * x.sum(),
        lambda x: H @ x + 4 * c * x**3 - 3,
        lambda x: H + np.diag(12 * c * x**2),
        n=n,
    )


@pytest.mark.parametrize("forcing", ["superlinear", "eisenstat-walker-1", 1e-2])
def test_similar_hessians_need_fewer_products_with_memory(forcing):
    """And fewer with more memory; the minimiser is the same."""
    options = {"gtol_rel": 1e-9, "cg_max_it": 300, "cg_forcing": forcing}
    x0 = np.full(60, 2.0)
    plain = minimize_trust_region(slowly_varying(), x0, **options)
    runs = [
        minimize_trust_region(
            slowly_varying(), x0, preconditioner="limited-memory", preconditioner_memory=memory, **options
        )
        for memory in (8, 30)
    ]
    assert all(run.converged for run in (plain, *runs))
    products = [run.hessian_calls for run in (plain, *runs)]
    assert products[0] > products[1] > products[2]
    assert products[2] < 0.8 * products[0]
    for run in runs:
        # The Hessian is at least the identity.
        assert np.linalg.norm(run.x - plain.x) <= run.gradient_norm + plain.gradient_norm


def test_rosenbrock_in_half_the_products():
    """Down the valley the Hessian turns slowly."""
    x0 = np.linspace(0, 2, 20)
    plain = minimize_trust_region(rosenbrock(20), x0, max_it=100)
    learning = minimize_trust_region(rosenbrock(20), x0, max_it=100, preconditioner="limited-memory")
    assert plain.converged
    assert learning.converged
    np.testing.assert_allclose(learning.x, 1, atol=1e-4)
    assert learning.hessian_calls < 0.7 * plain.hessian_calls


def test_with_inexact_products():
    """Pairs whose products are off by a hundredth still make a preconditioner."""
    problem = random_quadratic(n=30)[0]
    adversary = Adversary(problem, "worst", ones, ones)
    result = minimize_trust_region(adversary, np.zeros(30), inexact=InexactOptions(), preconditioner="limited-memory")
    assert result.converged
    assert norm(problem, problem.gradient(result.x)) <= 1e-6 * result.history[0].gradient_norm


# --- the protocol ----------------------------------------------------------------------------------------------------


class Student:
    """The identity, writing down what it is taught."""

    def __init__(self):
        """Nothing yet."""
        self.lessons = []

    def __call__(self, r):
        """Change nothing."""
        return r

    def update(self, pairs):
        """Write it down."""
        self.lessons.append(pairs)


def test_update_is_called_after_accepted_steps():
    """With the directions of the step, up to the memory; the identity changes nothing."""
    student, problem, x0 = Student(), rosenbrock(4), np.array([-1.2, 1, -1, 1])
    result = minimize_trust_region(problem, x0, preconditioner=student, preconditioner_memory=3)
    plain = minimize_trust_region(problem, x0)
    assert [entry.cg_iterations for entry in result.history] == [entry.cg_iterations for entry in plain.history]
    np.testing.assert_allclose(result.x, plain.x, atol=1e-6)
    assert len(student.lessons) <= sum(entry.accepted for entry in result.history[1:])
    assert len(student.lessons) > 5
    assert all(1 <= len(pairs) <= 3 for pairs in student.lessons)


def test_bad_preconditioners_are_refused():
    """Not positive definite, of another shape, of an unknown name."""
    problem, _ = random_quadratic()
    with pytest.raises(ValueError, match="the preconditioner must be positive definite"):
        minimize_trust_region(problem, np.zeros(12), preconditioner=lambda r: -r)
    with pytest.raises(ValueError, match="the preconditioner must be positive definite"):
        minimize_trust_region(problem, np.zeros(12), preconditioner=lambda r: np.nan * r)
    with pytest.raises(ValueError, match=r"preconditioner returned an array of shape \(3,\)"):
        minimize_trust_region(problem, np.zeros(12), preconditioner=lambda r: r[:3])
    for bad in ("lbfgs", 3):
        with pytest.raises(ValueError, match=r"preconditioner = .* is refused: give"):
            minimize_trust_region(problem, np.zeros(12), preconditioner=bad)
    for bad in (0, 1.5, None):
        with pytest.raises(ValueError, match=r"preconditioner_memory = .* is refused: give"):
            minimize_trust_region(problem, np.zeros(12), preconditioner_memory=bad)
