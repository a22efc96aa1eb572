"""Linear constraints on the control against the KKT system."""

import math

import numpy as np
import pytest
from mpi4py import MPI

from pint_fem.errors import InputError
from pint_fem.optimize import minimize_trust_region
from pint_fem.optimize.constraints import AffineConstraints
from pint_fem.optimize.guarded_problem import GuardedProblem
from pint_fem.optimize.one_shot.method import minimize_one_shot
from tests.test_bounded import Distributed
from tests.test_trust_region import bowl, mass_matrix, norm, quadratic, random_spd, rosenbrock


def constrained_quadratic(seed=0, n=12, k=3):
    """A quadratic in a mass-matrix product, k normals and values, and the KKT solution with its multipliers."""
    rng = np.random.default_rng(seed)
    H, b, M = random_spd(n, rng), rng.standard_normal(n), mass_matrix(np.linspace(0, 1, n) ** 2 * n)
    C, values = rng.standard_normal((k, n)), rng.standard_normal(k)
    # H x - b = M C^T lambda and C M x = values
    system = np.block([[H, -M @ C.T], [C @ M, np.zeros((k, k))]])
    solution = np.linalg.solve(system, np.concatenate([b, values]))
    return quadratic(H, b, M), list(C), values, solution[:n], solution[n:]


@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_kkt_solution_and_multipliers(k):
    """One Newton step on the null space; with as many constraints as unknowns there is nothing to do."""
    problem, normals, values, x, multipliers = constrained_quadratic(k=k)
    constrained = AffineConstraints(problem, normals, values)
    start = constrained.feasible(np.ones(12))
    result = minimize_trust_region(constrained, start, cg_rtol=1e-13, gtol_rel=1e-9, gtol_abs=1e-9, initial_radius=1e3)
    assert result.converged
    assert result.iterations == (0 if k == 12 else 1)
    np.testing.assert_allclose(result.x, x, atol=1e-8)
    np.testing.assert_allclose(constrained.multipliers(result.x), multipliers, atol=1e-7)
    np.testing.assert_allclose(constrained.violation(result.x), 0, atol=1e-11)


def test_multiplier_is_the_price_of_the_constraint():
    """d J_min / d b_i by central differences."""
    problem, normals, values, x, multipliers = constrained_quadratic()
    for i in range(3):
        least = []
        for shift in (-1e-3, 1e-3):
            shifted = values.copy()
            shifted[i] += shift
            constrained = AffineConstraints(problem, normals, shifted)
            least.append(minimize_trust_region(constrained, constrained.feasible(x), gtol_rel=1e-12).value)
        assert (least[1] - least[0]) / 2e-3 == pytest.approx(multipliers[i], rel=1e-5)


def test_projection_is_orthogonal_in_the_problems_product():
    """P P = P, (P a, b) = (a, P b), P c = 0; the step to the nearest feasible point is a combination of the normals."""
    problem, normals, values, _, _ = constrained_quadratic()
    constrained = AffineConstraints(problem, normals, values)
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 12))
    np.testing.assert_allclose(constrained.project(constrained.project(a)), constrained.project(a), atol=1e-13)
    assert problem.inner(constrained.project(a), b) == pytest.approx(problem.inner(a, constrained.project(b)))
    for c in normals:
        assert norm(problem, constrained.project(c)) < 1e-12
    step = constrained.feasible(a) - a
    assert norm(problem, constrained.project(step)) < 1e-12
    np.testing.assert_allclose([problem.inner(c, constrained.feasible(1e6 * a)) for c in normals], values, atol=1e-8)
    np.testing.assert_array_equal(a, rng.__class__(np.random.PCG64(1)).standard_normal((2, 12))[0])


def test_derivatives_are_those_on_the_null_space():
    """Difference quotients of J and of the gradient along feasible directions."""
    problem = rosenbrock(6)
    constrained = AffineConstraints(problem, [np.ones(6), np.arange(6.0)], [1.0, 2.0])
    rng = np.random.default_rng(2)
    x, v = constrained.feasible(rng.standard_normal(6)), constrained.project(rng.standard_normal(6))
    eps = 1e-6
    slope = (constrained.value(x + eps * v) - constrained.value(x - eps * v)) / (2 * eps)
    assert problem.inner(constrained.gradient(x), v) == pytest.approx(slope, rel=1e-6)
    change = (constrained.gradient(x + eps * v) - constrained.gradient(x - eps * v)) / (2 * eps)
    np.testing.assert_allclose(constrained.hessian_action(x, v), change, rtol=1e-6, atol=1e-6)
    outside = rng.standard_normal(6)
    np.testing.assert_allclose(
        constrained.project(constrained.hessian_action(x, outside)),
        constrained.hessian_action(x, constrained.project(outside)),
        atol=1e-10,
    )


def test_conjugate_gradients_stay_on_the_constraints_to_round_off():
    """However long they run: eigenvalues 1 to 1e6, a residual that round-off keeps from falling any further."""
    n, rng = 40, np.random.default_rng(7)
    H = random_spd(n, rng, 1, 1e6)
    constrained = AffineConstraints(quadratic(H, H @ rng.standard_normal(n), np.eye(n)), [np.ones(n)], [1.0])
    x = constrained.feasible(np.zeros(n))
    result = minimize_trust_region(constrained, x, gtol_rel=1e-15, cg_rtol=1e-15, cg_max_it=1000, max_it=10)
    assert any(r.cg_iterations > 2 * n for r in result.history)
    assert abs(constrained.violation(result.x)[0]) < 1e-9


def test_nonlinear_problem_keeps_its_constraints():
    """All iterates are feasible to round-off, and g is a combination of the normals at the end."""
    problem = bowl()
    constrained = AffineConstraints(problem, [np.ones(6)], [2.0])
    seen = []
    result = minimize_trust_region(
        constrained, constrained.feasible(np.zeros(6)), gtol_rel=1e-10, callback=lambda x, _: seen.append(x) and False
    )
    assert result.converged
    np.testing.assert_allclose([x.sum() for x in seen], 2.0, atol=1e-13)
    np.testing.assert_allclose(problem.df(result.x), constrained.multipliers(result.x)[0], atol=1e-9)


def test_one_shot_keeps_the_constraints():
    """`advance` is passed on with its gradient projected."""
    problem, normals, values, x, _ = constrained_quadratic()
    problem.advance = lambda y: (problem.value(y), problem.gradient(y), 0.0)
    constrained = AffineConstraints(problem, normals, values)
    result = minimize_one_shot(constrained, constrained.feasible(np.zeros(12)), gtol_rel=1e-10)
    assert result.converged
    assert result.advance_calls == len(result.history)
    np.testing.assert_allclose(result.x, x, atol=1e-7)
    np.testing.assert_allclose(constrained.violation(result.x), 0, atol=1e-10)


def test_optional_methods_are_those_of_the_problem():
    """Absent where the problem lacks them; projected, with what they say about errors unchanged."""
    problem = bowl()
    constrained = AffineConstraints(problem, [np.ones(6)], [0.0])
    names = ("advance", "gauss_newton_action", "gradient_within", "hessian_action_within", "value_within")
    assert not any(hasattr(constrained, name) for name in names)
    assert not hasattr(constrained, "weights")
    asked = []
    problem.value_within = lambda x, tolerance: (asked.append(tolerance) or problem.value(x), 0.25)
    problem.gradient_within = lambda x, tolerance: (asked.append(tolerance) or problem.gradient(x), 0.5)
    problem.hessian_action_within = lambda x, v, rtol: asked.append(rtol) or problem.hessian_action(x, v)
    problem.gauss_newton_action = lambda x, v: 2 * v
    x, v = constrained.project(np.arange(6.0)), np.linspace(0, 1, 6) ** 2
    assert constrained.value_within(x, 1.0) == (problem.value(x), 0.25)
    g, error = constrained.gradient_within(x, 2.0)
    assert error == 0.5
    np.testing.assert_array_equal(g, constrained.gradient(x))
    np.testing.assert_array_equal(constrained.hessian_action_within(x, v, 3.0), constrained.hessian_action(x, v))
    np.testing.assert_allclose(constrained.gauss_newton_action(x, v), 2 * v, atol=1e-14)  # v - P v times 2 as well
    assert asked == [1.0, 2.0, 3.0]


def test_several_directions_at_once():
    """One call for the curvatures of all normals; on the null space as single actions; guarded like these."""
    problem, normals, values, x, _ = constrained_quadratic()
    expected = AffineConstraints(problem, normals, values).curvatures(x)
    calls, single = [], problem.hessian_action
    problem.hessian_actions = lambda x, vs: calls.append(len(vs)) or [single(x, v) for v in vs]
    problem.hessian_action = None
    constrained = AffineConstraints(problem, normals, values)
    np.testing.assert_allclose(constrained.curvatures(x), expected, rtol=1e-13)
    assert calls == [3]
    problem.hessian_action = single
    rng = np.random.default_rng(3)
    some = [constrained.feasible(rng.standard_normal(12)) for _ in range(2)]
    guarded = GuardedProblem(constrained)
    for found, v in zip(guarded.hessian_actions(x, some), some, strict=True):
        np.testing.assert_allclose(found, constrained.hessian_action(x, v), rtol=1e-13)
    assert guarded.hessian_calls == 2
    overwrites = lambda x, vs: [np.multiply(v, 2, out=v) for v in vs]
    problem.hessian_actions = overwrites
    before = [v.copy() for v in some]
    GuardedProblem(problem).hessian_actions(x, some)
    np.testing.assert_array_equal(some, before)
    for wrong, text in ((lambda x, vs: vs[:1], "a list of 2"), (lambda x, vs: [v[1:] for v in vs], "shape")):
        problem.hessian_actions = wrong
        with pytest.raises(InputError, match=text):
            GuardedProblem(problem).hessian_actions(x, some)


def test_nearly_dependent_normals_are_projected_out_to_round_off():
    """Gram-Schmidt twice: no loss of orthogonality with normals that differ in the seventh digit."""
    c = np.linspace(1, 2, 20)
    other = c + 1e-7 * np.sin(np.arange(20))
    problem = quadratic(np.eye(20), np.zeros(20), np.eye(20))
    constrained = AffineConstraints(problem, [c, other], [1.0, 1.0])
    v = constrained.project(np.cos(np.arange(20.0)))
    direction = (other - c) / np.linalg.norm(other - c)
    assert abs(v @ direction) < 1e-8
    assert abs(v @ c) < 1e-14 * np.linalg.norm(c) * 20


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("normals", "values", "says"),
    [
        ([], [], "empty"),
        ([np.zeros(6)], [0.0], "normal 0 has norm 0"),
        ([np.full(6, math.nan)], [0.0], "normal 0 has norm nan"),
        ([np.ones(6), np.ones((6, 1))], [0.0, 0.0], "normal 1 has shape"),
        ([np.ones(6), np.arange(6.0), 2 + 3 * np.arange(6.0)], [0.0] * 3, "normal 2 is a combination"),
        ([np.ones(6)], [0.0, 1.0], "values"),
        ([np.ones(6)], [math.inf], "values"),
    ],
)
def test_bad_constraints_are_refused(normals, values, says):
    """When the problem is wrapped."""
    with pytest.raises(ValueError, match=says):
        AffineConstraints(bowl(), normals, values)


@pytest.mark.parametrize("minimize", [minimize_trust_region, minimize_one_shot])
def test_infeasible_start_is_refused(minimize):
    """It would keep the wrong integral; `feasible` is named."""
    constrained = AffineConstraints(bowl(), [np.ones(6)], [1.0])
    with pytest.raises(ValueError, match="start from feasible"):
        minimize(constrained, np.zeros(6))


@pytest.mark.parallel([1, 3])
def test_distributed_vectors():
    """The same minimiser and multipliers on all processes."""
    comm = MPI.COMM_WORLD
    serial, w = rosenbrock(8), np.geomspace(1, 4, 8)
    serial.M, serial.M_inverse = np.diag(w), np.diag(1 / w)
    local = Distributed(serial, w, comm, 3)
    normals, values = [np.ones(8), np.sin(np.arange(8.0))], [4.0, 0.5]
    whole = AffineConstraints(serial, normals, values)
    part = AffineConstraints(local, [c[local.part] for c in normals], values)
    expected = minimize_trust_region(whole, whole.feasible(np.zeros(8)), gtol_rel=1e-10, max_it=100)
    result = minimize_trust_region(part, part.feasible(np.zeros(8)[local.part]), gtol_rel=1e-10, max_it=100)
    assert result.converged
    np.testing.assert_allclose(local.whole(result.x), expected.x, atol=1e-8)
    multipliers = part.multipliers(result.x)
    np.testing.assert_allclose(multipliers, whole.multipliers(expected.x), atol=1e-6)
    assert all((m == multipliers).all() for m in comm.allgather(multipliers))
