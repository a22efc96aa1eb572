"""Bounds and linear constraints together, against scipy's SLSQP and exact solutions."""

import numpy as np
import pytest
from mpi4py import MPI
from scipy.optimize import minimize

from pint_fem.optimize import NonFiniteError, minimize_bounded_constrained
from tests.limits import time_limit
from tests.test_bounded import Distributed
from tests.test_trust_region import Smooth, random_spd

N = 12


def posed(seed, nonlinear=False):
    """A convex function with a wide spectrum, weights of the product, and two constraints in coefficients."""
    rng = np.random.default_rng(seed)
    H, b = random_spd(N, rng, 1.0, 1e3), 30 * rng.standard_normal(N)
    c = 1.0 * nonlinear
    problem = Smooth(
        lambda x: float(0.5 * x @ H @ x - b @ x + c * np.sum(np.cosh(x))),
        lambda x: H @ x - b + c * np.sinh(x),
        lambda x: H + c * np.diag(np.cosh(x)),
        n=N,
    )
    normals = np.stack([np.ones(N), np.linspace(-1, 2, N)])
    return problem, np.linspace(0.5, 2, N), normals


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("nonlinear", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
@time_limit(60)
def test_solution_is_that_of_slsqp(seed, nonlinear):
    """Some components on their bounds, two constraints, a product with weights, parts on each process."""
    comm = MPI.COMM_WORLD
    problem, w, normals = posed(seed, nonlinear)
    values = normals @ np.full(N, 0.05)
    expected = minimize(
        problem.f, np.full(N, 0.05), jac=problem.df, method="SLSQP", bounds=[(-0.1, 0.2)] * N,
        constraints=[{"type": "eq", "fun": lambda x: normals @ x - values, "jac": lambda x: normals}],
        options={"ftol": 1e-13, "maxiter": 500},
    )  # fmt: skip
    on_bounds = (expected.x < -0.1 + 1e-9) | (expected.x > 0.2 - 1e-9)
    assert 2 <= on_bounds.sum() <= N - 3
    local = Distributed(problem, w, comm, 5)
    result = minimize_bounded_constrained(
        local, np.zeros(N)[local.part], -0.1, 0.2, [(c / w)[local.part] for c in normals], list(values), gtol_rel=1e-8
    )
    x = local.whole(result.x)
    assert result.converged
    assert ((x >= -0.1) & (x <= 0.2)).all()
    np.testing.assert_allclose(normals @ x, values, atol=1e-7)
    np.testing.assert_allclose(x, expected.x, atol=1e-5)
    assert result.value == pytest.approx(expected.fun, rel=1e-7)
    free, g = (x > -0.1) & (x < 0.2), problem.df(x)
    multipliers = np.linalg.lstsq(normals[:, free].T, g[free], rcond=None)[0]
    rest = g - normals.T @ multipliers  # first-order conditions
    assert np.abs(rest[free]).max() <= 1e-5 * np.abs(g).max()
    assert (rest[x == -0.1] >= 0).all()
    assert (rest[x == 0.2] <= 0).all()
    assert result.iterations <= 60
    assert len(set(comm.allgather(len(result.history)))) == 1


@time_limit(60)
def test_water_filling_is_exact():
    """min |x - t|^2 / 2 with x >= 0 and sum x = 1: the projection on the simplex, max(t - tau, 0)."""
    t = np.array([0.9, 0.6, 0.3, -0.2, -2.0])
    problem = Smooth(lambda x: 0.5 * (x - t) @ (x - t), lambda x: x - t, lambda x: np.eye(5), n=5)
    result = minimize_bounded_constrained(problem, np.zeros(5), 0.0, np.inf, [np.ones(5)], [1.0], gtol_rel=1e-10)
    np.testing.assert_allclose(result.x, np.maximum(t - 0.8 / 3, 0), atol=1e-8)  # 0.9 + 0.6 + 0.3 - 3 tau = 1
    assert result.converged


@time_limit(60)
def test_what_cannot_be_met_is_refused_or_reported():
    """One constraint outside the range of its functional in the box; two that contradict each other only there."""
    problem, _, normals = posed(0)
    for value in (5.0, -3.0):
        with pytest.raises(ValueError, match=r"between -1.2 and 2.4 within the bounds"):
            minimize_bounded_constrained(problem, np.zeros(N), -0.1, 0.2, normals[:1], [value])
    result = minimize_bounded_constrained(problem, np.zeros(N), 0.0, 0.2, [np.ones(N), np.eye(N)[0] - np.eye(N)[1]],
                                          [0.01, 0.1], max_it=400)  # fmt: skip
    assert result.reason == "constraints not met"
    assert not result.converged
    with pytest.raises(ValueError, match="checkpoint"):
        minimize_bounded_constrained(problem, np.zeros(N), 0.0, 0.2, normals, [0.5, 0.5], checkpoint=object())
    problem.f = lambda x: np.nan
    with pytest.raises(NonFiniteError, match="first guess; start where J is finite"):
        minimize_bounded_constrained(problem, np.zeros(N), -1.0, 1.0, normals, [0.5, 0.5])


@time_limit(60)
def test_callback_and_limits_count_all_rounds():
    """Records are numbered through; a true result of the callback ends the run."""
    problem, _, normals = posed(1, nonlinear=True)
    seen, lines = [], []
    arguments = (problem, np.zeros(N), -0.1, 0.2, normals, list(normals @ np.full(N, 0.05)))
    whole = minimize_bounded_constrained(
        *arguments, callback=lambda x, r: seen.append(r.iteration), monitor=lines.append
    )
    assert whole.converged
    assert seen == sorted(set(seen))
    assert sum("constraints missed by" in line for line in lines) >= 2
    stopped = minimize_bounded_constrained(*arguments, callback=lambda x, r: len(lines) > 0)
    assert stopped.reason == "stopped by callback"
    assert stopped.iterations == 1
    assert minimize_bounded_constrained(*arguments, max_it=2).reason == "maximum iterations"
