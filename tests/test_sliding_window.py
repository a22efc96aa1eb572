"""The sliding window for controls with one value per step."""

import numpy as np
import pytest
from mpi4py import MPI

import pint_fem as pf
from pint_fem.errors import InputError
from pint_fem.inverse.per_step import window as window_module
from tests.step_controls import functional

COMM = MPI.COMM_WORLD
STEPWISE = "strength", "wall"


def alone(wanted=STEPWISE, **options):
    """The functional on one rank."""
    return functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), wanted, **options)


def by_dense_algebra(posterior, length, now, data):
    """Estimates and variances by the definition: for each window the posterior of its steps for fixed earlier ones."""
    F, prior, layout = posterior.F, posterior.prior, posterior.F.layout
    columns, nsteps = F.steps.columns, layout.slab.nsteps
    matrix = F.product(np.eye(F.shape[1])).T
    A, N = posterior.alpha * prior.precision(np.eye(F.shape[1])), posterior.noise.covariance(np.eye(F.shape[0]))
    step = np.full((1, layout.size), -1.0)
    columns.put_steps(step, np.repeat(np.arange(nsteps, dtype=float)[:, None], columns.size, axis=1)[None])
    step, z, variance = step[0], np.array(prior.mean), prior.variance() / posterior.alpha
    for n in range(1, now + 1):
        first = max(0, n - length)
        inside, used = (step >= first) & (step < n), (F.table.point > first) & (F.table.point <= n)
        z[inside] = prior.mean[inside]
        r = (data - F.offset - matrix @ z)[used]
        Fw, Aw, Nw = matrix[np.ix_(used, inside)], A[np.ix_(inside, inside)], N[np.ix_(used, used)]
        covariance = np.linalg.inv(Aw + Fw.T @ np.linalg.solve(Nw, Fw))
        z[inside] += covariance @ Fw.T @ np.linalg.solve(Nw, r)
        variance[step < first], variance[inside] = 0.0, covariance.diagonal()
    return z, variance


@pytest.mark.parametrize("wanted", [STEPWISE, ("strength", "amplitude", "initial", "source")])
def test_a_window_over_all_steps_is_the_posterior(wanted):
    """Where there is no static control; and for any division of the way."""
    J = alone(wanted, terms=True)
    posterior = J.parameter_to_observable().posterior(alpha=0.7)
    window = posterior.window(50).advance(3).advance(8)
    if wanted == STEPWISE:
        np.testing.assert_allclose(window.x, posterior.x, rtol=0, atol=1e-9 * np.abs(posterior.x).max())
        np.testing.assert_allclose(window.variance(), posterior.variance(), rtol=1e-8)
    z, variance = by_dense_algebra(posterior, 50, 8, posterior.data)
    np.testing.assert_allclose(window.x, z, rtol=0, atol=1e-9 * np.abs(z).max())
    np.testing.assert_allclose(window.variance(), variance, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(posterior.window(8).advance(8).x, window.x, rtol=0, atol=1e-12 * np.abs(z).max())


@pytest.mark.parametrize("wanted", [("strength",), ("amplitude", "wall")])
def test_windows_are_those_of_dense_algebra(wanted):
    """With the same matrix wherever the window is, and with loads that depend on time; correlated noise."""
    F = alone(wanted, n=2, steps=12).parameter_to_observable()
    m = F.shape[0]
    noise = 0.02 * (np.eye(m) + 0.3 * np.eye(m, k=1) + 0.3 * np.eye(m, k=-1))
    for given in (None, noise):
        posterior = F.posterior(noise=given)
        window = posterior.window(4)
        np.testing.assert_allclose(window.x, posterior.prior.mean, rtol=0, atol=0)
        for now in (1, 4, 5, 9, 12):
            window.advance(now)
            z, variance = by_dense_algebra(posterior, 4, now, posterior.data)
            np.testing.assert_allclose(window.x, z, rtol=0, atol=1e-9 * np.abs(z).max())
            np.testing.assert_allclose(window.variance(), variance, rtol=1e-8, atol=1e-12)


def test_one_factor_serves_all_shifts(monkeypatch):
    """On a longer run with sensors that read in each step; and the estimate follows a source that moves."""
    J = alone(("strength",), n=3, steps=40, weight=1e6)
    F = J.parameter_to_observable()
    x = np.cos(np.linspace(0, 5, 40))[:, None] * np.ones(F.steps.columns.size)
    data = F.predict(x.ravel())
    factors = []
    factor = window_module.cho_factor
    monkeypatch.setattr(window_module, "cho_factor", lambda *given: factors.append(1) or factor(*given))
    posterior = F.posterior().with_data(data)
    window = posterior.window(10).advance(36)
    # while the window grows; two with the reading that is missing at point 3; then two phases, as one sensor reads in
    # every second step
    assert len(factors) == 10 + 2 + 2
    batch = posterior.x.reshape(40, -1)[12:24]
    found = window.x.reshape(40, -1)[12:24]
    far = np.abs(batch - x[12:24]).max()
    assert np.abs(found - batch).max() < 0.3 * far


@pytest.mark.parallel([2, 3])
def test_ranks_share_the_window():
    one = alone(n=3).parameter_to_observable().posterior().window(3).advance(6)
    st = pf.SpaceTime((1, COMM.size))
    J = functional(st, STEPWISE, n=3)
    window = J.parameter_to_observable().posterior().window(3).advance(6)
    slab = J.layout.slab
    for a, b in zip(J.evolution.controls, one._posterior.F.layout.evolution.controls, strict=True):
        for found, expected in ((window.x, one.x), (window.variance(), one.variance())):
            values = one._posterior.F.layout.part(expected, b)[slab.lo : slab.hi]
            np.testing.assert_allclose(J.layout.part(found, a), values, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(window.predicted, one.predicted, rtol=0, atol=1e-10)
    assert isinstance(window.mean, list) and len(window.mean) == 2  # noqa: PT018
    assert len(window.standard_deviation()) == 2


def test_readings_as_they_come():
    """Later readings are not read, earlier ones stay; each reading counts as it was when its step was reached."""
    posterior = alone(n=3).parameter_to_observable().posterior()
    data, point = 2 * posterior.data + 0.1, posterior.F.table.point
    window = posterior.window(3)
    window.advance(2, np.where(point <= 2, data, np.nan)).advance(8, np.where(point > 2, data, np.nan))
    expected = posterior.with_data(data).window(3).advance(8)
    np.testing.assert_allclose(window.x, expected.x, rtol=0, atol=1e-11 * np.abs(expected.x).max())
    assert not np.allclose(posterior.window(3).advance(8).x, expected.x)


def test_what_does_not_fit_is_refused():
    posterior = alone(n=2, steps=4).parameter_to_observable().posterior()
    for steps in (0, -1, 1.5, True):
        with pytest.raises(InputError, match=r"steps = .*: give a whole number of at least 1"):
            posterior.window(steps)
    window = posterior.window(2).advance(2)
    for point in (2, 5, 2.5):
        with pytest.raises(InputError, match=r"give a whole number from 3 to 4, as the window is at 2"):
            window.advance(point)
    for data in (posterior.data[1:], np.full(len(posterior.data), np.nan)):
        with pytest.raises(InputError, match="numbers, finite up to point 3"):
            window.advance(3, data)
    static = alone(("source",), n=2, steps=4).parameter_to_observable().posterior()
    with pytest.raises(InputError, match="no control has a value per step"):
        static.window(2)
