"""The weight of the prior: sums over the spectrum against one dense solve per weight, and the four choices by scipy."""

import time

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from pint_fem.errors import InputError
from pint_fem.inverse.inference.regularisation_choice import RegularisedFit, choose_alpha
from pint_fem.spacetime import SpaceTime
from tests.linear_inverse import dense, problem, simulated

NOISE = 1e-3
ALPHAS = np.geomspace(0.1, 1e5, 9)


@pytest.fixture(scope="module")
def posterior():
    """With readings that have the noise assumed."""
    made = problem(SpaceTime()).parameter_to_observable().posterior(noise=NOISE)
    return made.with_data(simulated(made, NOISE))


@pytest.mark.parallel([1, 3])
def test_sums_are_those_of_one_solve_for_each_weight(posterior):
    case, m = dense(posterior), len(posterior.data)
    curve = posterior.curve(ALPHAS)
    misfit, size, dof = (np.array([f(a) for a in ALPHAS]) for f in (case.misfit, case.size, case.dof))
    np.testing.assert_allclose(curve.misfit, misfit, rtol=1e-7)
    np.testing.assert_allclose(curve.size, size, rtol=1e-7)
    np.testing.assert_allclose(curve.degrees_of_freedom, dof, rtol=1e-7)
    np.testing.assert_allclose(curve.log_evidence, [case.log_evidence(a) for a in ALPHAS], rtol=1e-9)
    np.testing.assert_allclose(curve.gcv, m * misfit / (m - dof) ** 2, rtol=1e-7)
    np.testing.assert_allclose(curve.upre, misfit + 2 * dof - m, rtol=1e-7, atol=1e-7)
    assert posterior.misfit() == pytest.approx(case.misfit(), rel=1e-9)
    assert posterior.size(2.0) == pytest.approx(case.size(2.0), rel=1e-9)


def l_curve_curvature(case, t, h=1e-3):
    """Curvature of (log residual, log size) at alpha = exp(t), by central differences of dense solves."""
    x, y = (np.array([0.5 * np.log(f(np.exp(t + k * h))) for k in (-1, 0, 1)]) for f in (case.misfit, case.size))
    (x1, y1), (x2, y2) = ((a[2] - a[0]) / (2 * h) for a in (x, y)), ((a[2] - 2 * a[1] + a[0]) / h**2 for a in (x, y))
    return (x1 * y2 - x2 * y1) / (x1**2 + y1**2) ** 1.5


def test_curvature_of_the_l_curve(posterior):
    case, alphas = dense(posterior), np.geomspace(1e-2, 1e3, 6)
    expected = [l_curve_curvature(case, t) for t in np.log(alphas)]
    np.testing.assert_allclose(posterior.curve(alphas).curvature, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parallel([1, 3])
def test_the_discrepancy_principle(posterior):
    case, m = dense(posterior), len(posterior.data)
    chosen = posterior.choose("discrepancy")
    assert case.misfit(chosen.alpha) == pytest.approx(m, rel=1e-8)
    np.testing.assert_allclose(chosen.x, case.x(chosen.alpha), rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(chosen.variance(), np.diag(case.covariance(chosen.alpha)), rtol=1e-6)
    assert case.misfit(posterior.choose("discrepancy", target=m + 7.5).alpha) == pytest.approx(m + 7.5, rel=1e-8)
    assert posterior.alpha == 1  # the posterior itself stays


@pytest.mark.parametrize("method", ["l-curve", "gcv", "evidence", "upre"])
def test_extreme_values_are_those_that_scipy_finds(posterior, method):
    case, m = dense(posterior), len(posterior.data)
    criterion = {
        "l-curve": lambda t: -l_curve_curvature(case, t),
        "gcv": lambda t: case.misfit(np.exp(t)) / (m - case.dof(np.exp(t))) ** 2,
        "evidence": lambda t: -case.log_evidence(np.exp(t)),
        "upre": lambda t: case.misfit(np.exp(t)) + 2 * case.dof(np.exp(t)),
    }[method]
    chosen = np.log(posterior.choose(method).alpha)
    found = minimize_scalar(criterion, bounds=(chosen - 2, chosen + 2), method="bounded", options={"xatol": 1e-8})
    assert chosen == pytest.approx(found.x, abs=2e-3 if method == "l-curve" else 1e-4)
    everywhere = [criterion(t) for t in np.linspace(np.log(1e-2), np.log(1e5), 60)]
    assert criterion(chosen) <= min(everywhere) + 1e-3 * abs(criterion(chosen))


def test_cross_validation_does_not_depend_on_the_scale_of_the_noise(posterior):
    """It is the ratio of the prior's to the noise's scale that it determines."""
    other = posterior.F.posterior(noise=10 * NOISE).with_data(posterior.data)
    assert other.choose("gcv").alpha == pytest.approx(posterior.choose("gcv").alpha / 100, rel=1e-5)


def test_a_problem_in_parameter_space_has_the_same_sums():
    """The same numbers from both spectral forms: F = U S V', A = I."""
    rng = np.random.default_rng(1)
    F, e = rng.standard_normal((8, 5)), rng.standard_normal(8)
    U, s, _ = np.linalg.svd(F, full_matrices=False)
    c = U.T @ e
    parameter = RegularisedFit(s**2, s**2, s * c, e @ e, 8, 0.0)
    data = RegularisedFit(s**2, np.ones(5), c, e @ e, 8, 0.0)
    for a in (0.1, 3.0):
        z = np.linalg.solve(F.T @ F + a * np.eye(5), F.T @ e)
        for fit in (parameter, data):
            assert fit.misfit(a) == pytest.approx(np.sum((e - F @ z) ** 2))
            assert fit.size(a) == pytest.approx(z @ z)


def diagonal(c, lam=(100.0, 1.0, 0.01), outside=2.0, count=5):
    lam, c = np.array(lam), np.array(c)
    return RegularisedFit(lam, np.ones(len(lam)), c, c @ c + outside, count, 0.0)


def test_what_no_weight_fulfils_is_refused_with_the_reason():
    for method, fit, words in (
        ("discrepancy", diagonal([1.0, 0.5, 0.1]), "explained without the controls"),
        ("discrepancy", diagonal([9.0, 5.0, 1.0], outside=6.0), "larger noise"),
        ("gcv", diagonal([0.0, 0.0, 0.0]), "fits the readings exactly"),
        ("evidence", diagonal([0.1, 0.1, 0.1]), "larger the weight"),
        ("gcv", diagonal([50.0, 50.0, 50.0], outside=0.0), "smaller the weight"),
        ("l-curve", diagonal([0.0, 3.0, 0.0], outside=0.0), "no corner"),
        ("evidence", diagonal([1.0], lam=[0.0]), "do not depend on the controls"),
        ("best", diagonal([1.0, 1.0, 1.0]), "'discrepancy', 'l-curve'"),
    ):
        with pytest.raises(InputError, match=words):
            choose_alpha(fit, method)
    with pytest.raises(InputError, match="a positive number"):
        choose_alpha(diagonal([9.0, 5.0, 1.0]), "discrepancy", -1.0)
    with pytest.raises(InputError, match="a target is"):
        choose_alpha(diagonal([9.0, 5.0, 1.0]), "gcv", 4.0)


def test_exact_readings_have_misfits_that_are_not_negative():
    """Of one eigenvalue: the residual is c alpha / (alpha + lam), at weights far below round-off of the readings."""
    fit = diagonal([3.0], lam=[4.0], outside=0.0)
    alphas = np.array([1e-14, 1e-9, 1.0])
    np.testing.assert_allclose(fit.misfit(alphas), 9 * (alphas / (alphas + 4)) ** 2, rtol=1e-12)
    # a target that only a very small weight reaches
    assert choose_alpha(fit, "discrepancy", 9e-20) == pytest.approx(4e-10, rel=1e-6)


@pytest.mark.parallel([1, 3])
def test_wrong_input_is_refused_on_every_rank(posterior):
    with pytest.raises(InputError, match="positive weights"):
        posterior.curve([1.0, -1.0])
    with pytest.raises(InputError, match="give one of"):
        posterior.choose("best")


def test_a_thousand_weights_take_less_than_a_second():
    rng = np.random.default_rng(0)
    lam = np.geomspace(1e-12, 1e3, 1500)
    fit = RegularisedFit(lam, np.ones(1500), rng.standard_normal(1500), 2e3, 2000, 0.0)
    start = time.perf_counter()
    assert len(fit.curve(np.geomspace(1e-9, 1e9, 1000)).curvature) == 1000
    assert time.perf_counter() - start < 1
