"""Predictions of readings without sensors and of functionals of controls: sweeps, dense matrices and samples."""

import numpy as np
import pytest
from firedrake import Cofunction, FacetNormal, SpatialCoordinate, TestFunction, assemble, dot, ds, dx, grad
from scipy.stats import norm

import pint_fem as pf
from pint_fem.errors import InputError
from pint_fem.inverse.inference.gaussian_law import GaussianLaw
from pint_fem.inverse.laws.priors import make_prior
from pint_fem.inverse.posterior import GaussianPosterior
from pint_fem.inverse.spectra import ParameterSpace
from pint_fem.kernels.arrays import get
from pint_fem.spacetime import SpaceTime
from tests.inverse_problems import heat
from tests.linear_inverse import dense, mass, problem, simulated

NOISE = 0.02
POINTS = np.array([[0.5, 0.5], [0.9, 0.1]])
TIMES = np.array([0.004, 0.033, 0.08])


def virtual(u):
    """Two points without sensors, a flux and an average, at times of their own."""
    n = FacetNormal(u.function_space().mesh())
    functionals = [-dot(grad(u), n) * ds(2), u * dx]
    return [
        pf.PointSensors(POINTS, TIMES, np.ones((3, 2))),
        pf.LinearObservations(functionals, [0.0425], np.full((1, 2), 7.0)),
    ]


@pytest.fixture(scope="module")
def posterior():
    rf = problem(SpaceTime())
    made = rf.parameter_to_observable(predict=virtual(rf.evolution.u)).posterior(noise=NOISE, alpha=1.3)
    return made.with_data(simulated(made, NOISE))


def swept(rf):
    """Matrix and offset of what is predicted, by one sweep for each unknown."""
    other = pf.TimeParallelReducedFunctional(
        rf.evolution, virtual(rf.evolution.u), spacetime=rf.spacetime, solver_parameters={"time_solver": "serial"}
    )

    def readings(z):
        parts = [m.readings(other.problem.observations(z, m)).ravel() for m in other.problem.misfits]
        return np.concatenate(parts)

    offset = readings(np.zeros(other.problem.layout.size))
    return np.array([readings(z) - offset for z in np.eye(other.problem.layout.size)]).T, offset


@pytest.mark.parallel([1, 3])
def test_readings_without_sensors(posterior):
    """Mean, deviation and bands are those of dense matrices; so they are after some of the readings."""
    case, (P, offset) = dense(posterior), swept(posterior.F.functions)
    for law, C in (
        (posterior, case.covariance(1.3)),
        (now := posterior.until(0.03), case.restricted(now.numbers).covariance(1.3)),
    ):
        found = law.predict()
        deviation = np.sqrt(np.diag(P @ C @ P.T))
        np.testing.assert_allclose(found.mean, offset + P @ law.x, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(found.standard_deviation, deviation, rtol=1e-7)
        low, high = found.band(0.9)
        np.testing.assert_allclose([low, high], norm.interval(0.9, found.mean, deviation), rtol=1e-7, atol=1e-9)
        low, high = found.band(noise=0.3)
        np.testing.assert_allclose(high - low, 2 * norm.ppf(0.975) * np.sqrt(deviation**2 + 0.09), rtol=1e-7)
    points, functionals = found.split(found.mean)
    assert points.shape == (3, 2)
    assert functionals.shape == (1, 2)
    np.testing.assert_array_equal(np.concatenate([points.ravel(), functionals.ravel()]), found.mean)


@pytest.mark.parallel([1, 3])
def test_the_sensors_themselves(posterior):
    case, found = dense(posterior), posterior.predict(posterior.F)
    np.testing.assert_allclose(found.mean, posterior.predicted, rtol=1e-12)
    C = case.F @ case.covariance(1.3) @ case.F.T
    np.testing.assert_allclose(found.standard_deviation, np.sqrt(np.diag(C)), rtol=1e-6)


def test_samples_are_in_the_bands(posterior):
    """Of 2,000 samples as many as the probability says, within five standard errors."""
    found, F = posterior.predict(), posterior.F.predictions
    readings = F.offset + F.product(posterior.sample(2000, seed=4))
    low, high = found.band(0.8)
    inside = ((readings > low) & (readings < high)).mean(axis=0)
    assert (np.abs(inside - 0.8) < 5 * np.sqrt(0.8 * 0.2 / 2000)).all()


@pytest.mark.parallel([1, 3])
def test_functionals_of_the_controls(posterior):
    """An integral with a weight and a constant: a product with the mass matrix; from its cofunction, too."""
    (q,) = posterior.F.layout.evolution.controls
    x = SpatialCoordinate(q.function_space().mesh())
    nodes = posterior.F.functions.array(q.copy(deepcopy=True).interpolate(x[0]))
    g, case, before = mass(posterior) @ nodes, dense(posterior), get(q)
    found = posterior.functional(3 * x[0] * q * dx + 2 * dx(q.function_space().mesh()))
    assert found.mean == pytest.approx(2 + 3 * g @ case.x(1.3), rel=1e-8)
    assert found.standard_deviation == pytest.approx(3 * np.sqrt(g @ case.covariance(1.3) @ g), rel=1e-8)
    assert found.band(0.5) == pytest.approx(norm.interval(0.5, *found))
    cofunction = assemble(x[0] * TestFunction(q.function_space()) * dx)
    assert posterior.functional(cofunction).mean == pytest.approx(g @ case.x(1.3), rel=1e-8)
    np.testing.assert_array_equal(get(q), before)
    product = posterior.covariance(cofunction)
    np.testing.assert_allclose(get(product), case.covariance(1.3) @ g, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(posterior.covariance(g), get(product), rtol=1e-9, atol=1e-12)


@pytest.mark.parallel([1, 3])
def test_what_does_not_fit_is_refused(posterior):
    (q,) = posterior.F.layout.evolution.controls
    other = q.copy(deepcopy=True)
    for form, words in (
        (q**2 * dx, "not affine"),
        (other * dx, "contains no control"),
        (q * TestFunction(q.function_space()) * dx, "UFL functional"),
        (other, "a derivative by 'source' is a cofunction"),
        ([Cofunction(q.function_space().dual())] * 2, "2 cofunctions are given for 1"),
    ):
        with pytest.raises(InputError, match=words):
            posterior.functional(form)
    with pytest.raises(InputError, match=r"\(25,\) or \(k, 25\)"):
        posterior.covariance(np.ones(7))
    found = posterior.predict()
    for arguments, words in (((1.0,), "between 0 and 1"), ((0.5, -1.0), "standard deviation, or")):
        with pytest.raises(InputError, match=words):
            found.band(arguments[0], noise=(*arguments, 0.0)[1])
    rf = posterior.F.functions
    with pytest.raises(InputError, match="of which the values do not matter"):
        rf.parameter_to_observable(predict=[q])
    with pytest.raises(InputError, match="outside the mesh"):
        rf.parameter_to_observable(predict=pf.PointSensors([[2.0, 2.0]], [0.01], [[0.0]]))
    plain = rf.parameter_to_observable()
    with pytest.raises(InputError, match="no rows of predictions"):
        plain.posterior().predict()
    with pytest.raises(InputError, match="other controls"):
        posterior.predict(heat(SpaceTime(), ("initial",)).parameter_to_observable())


class Law(GaussianLaw):
    """A prior by itself."""

    def __init__(self, F, prior):
        self.F, self.prior, self.x = F, prior, prior.mean

    def variance(self):
        return self.prior.variance()

    def sample(self, count, seed=0):
        return self.prior.sample(count, seed)

    def _covariance(self, g):
        return self.prior.covariance(g)


@pytest.mark.parallel([1, 3])
def test_controls_with_one_value_per_step():
    """Predictions from their map's products; functionals from cofunctions of all steps, not from forms."""
    rf = heat(SpaceTime(), ("source", "strength"))
    F = rf.parameter_to_observable()
    layout = F.layout
    law = Law(F, make_prior("riesz_map", layout, inner=rf.inner, mean=np.random.default_rng(0).random(layout.size)))
    e = np.eye(F.shape[0])
    rows = F.transposed_product(e)
    products = F.product(law.prior.covariance(rows))
    found = law.predict(F)
    np.testing.assert_allclose(found.standard_deviation, np.sqrt(np.diag(products)), rtol=1e-8)
    np.testing.assert_allclose(found.mean, F.predict(law.x), rtol=1e-12)
    g = rf.function(rows[3], dual=True)
    assert law.functional(g).standard_deviation == pytest.approx(found.standard_deviation[3], rel=1e-8)
    assert law.functional(g).mean == pytest.approx(found.mean[3] - F.offset[3], rel=1e-9)
    strength = next(c for c in layout.evolution.controls if c in layout.evolution.stepwise)
    with pytest.raises(InputError, match="one value per step"):
        law.functional(strength * dx)
    wrong = [Cofunction(c.function_space().dual()) for c in layout.evolution.controls]
    with pytest.raises(InputError, match="an EnsembleCofunction"):
        law.functional(wrong)


@pytest.mark.parallel([2])
@pytest.mark.parametrize("space", ["readings", "controls"])
def test_ranks_in_space(space):
    """Two ranks in space and two in time have the same predictions, streams, choices of alpha and functionals."""
    found = []
    for grid in ("2x1", "1x2"):
        rf = problem(SpaceTime(grid))
        F = rf.parameter_to_observable(predict=virtual(rf.evolution.u))
        made = F.posterior(noise=NOISE)
        if space == "controls":
            made = GaussianPosterior(F, made.prior, made.noise, ParameterSpace(F, made.prior, made.noise))
        made = made.with_data(simulated(made, NOISE))
        now = made.until(0.035)
        integral = now.functional(rf.evolution.controls[0] * dx)
        numbers = now.log_evidence(), now.misfit(), *integral, made.choose("discrepancy").alpha
        found.append(np.concatenate([now.predict().standard_deviation, now.predict().mean, numbers]))
    np.testing.assert_allclose(*found, rtol=1e-6)
