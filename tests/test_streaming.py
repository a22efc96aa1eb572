"""Posteriors of the readings up to each time: against dense matrices, and functionals that have only these readings."""

import numpy as np
import pytest

from pint_fem.errors import InputError
from pint_fem.inverse.inference.innovations import ParameterInnovations, ReadingInnovations
from pint_fem.inverse.posterior import GaussianPosterior
from pint_fem.inverse.spectra import ParameterSpace
from pint_fem.spacetime import SpaceTime
from tests.inverse_problems import heat
from tests.linear_inverse import OTHER_TIMES, TIMES, dense, problem, simulated

NOISE = 0.02
ALL_TIMES = np.union1d(TIMES, OTHER_TIMES)


@pytest.fixture(scope="module", params=["readings", "controls"])
def posterior(request):
    """By the spectrum in either space."""
    F = problem(SpaceTime()).parameter_to_observable()
    made = F.posterior(noise=NOISE, alpha=1.7)
    if request.param == "controls":
        spectrum = ParameterSpace(F, made.prior, made.noise)
        made = GaussianPosterior(F, made.prior, made.noise, spectrum, alpha=1.7)
    return made.with_data(simulated(made, NOISE))


def assert_same(found, case, alpha=1.7):
    """Mean, variance, evidence, misfit, predictions and products of a posterior are those of dense matrices."""
    C = case.covariance(alpha)
    np.testing.assert_allclose(found.x, case.x(alpha), rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(found.variance(), np.diag(C), rtol=1e-8)
    assert found.log_evidence() == pytest.approx(case.log_evidence(alpha), rel=1e-9)
    assert found.misfit() == pytest.approx(case.misfit(alpha), rel=1e-7)
    g = np.random.default_rng(0).standard_normal((2, len(C)))
    np.testing.assert_allclose(found.covariance(g), g @ C, rtol=1e-7, atol=1e-9)


def up_to(posterior, time):
    """The numbers of the readings up to a time."""
    times = (posterior.F.table.point - 1 + posterior.F.table.theta) * 5e-3
    return np.flatnonzero(times < time + 1e-9)


@pytest.mark.parallel([1, 3])
def test_after_each_time_the_posterior_is_that_of_the_readings_so_far(posterior):
    case, stream = dense(posterior), posterior.stream()
    reduced = isinstance(posterior.spectrum, ParameterSpace)
    assert type(stream.factor) is (ParameterInnovations if reduced else ReadingInnovations)
    np.testing.assert_allclose(stream.times, ALL_TIMES, rtol=1e-12)
    assert stream.posterior.log_evidence() == 0
    np.testing.assert_allclose(stream.posterior.variance(), np.diag(np.linalg.inv(case.A)) / 1.7, rtol=1e-9)
    kept = list(stream)
    assert len(kept) == len(ALL_TIMES)
    for now, time in zip(kept, ALL_TIMES, strict=True):  # the first ones have stayed as they were
        assert now.time == pytest.approx(time)
        which = up_to(posterior, time)
        assert sorted(now.numbers) == which.tolist()
        assert_same(now, case.restricted(which))
        np.testing.assert_allclose(now.predicted, case.offset + case.F @ now.x, rtol=1e-9)
    np.testing.assert_allclose(kept[-1].x, posterior.x, rtol=1e-8, atol=1e-9)
    assert kept[-1].log_evidence() == pytest.approx(posterior.log_evidence(), rel=1e-9)


@pytest.mark.parallel([1, 3])
def test_a_functional_with_only_these_readings(posterior):
    """Of the sensors' first times, in a functional of its own."""
    time = TIMES[3]
    early, other = TIMES <= time, OTHER_TIMES <= time
    values = [np.ma.getdata(part) for part in posterior.F.table.split(posterior.data)]
    own = problem(
        posterior.F.spacetime,
        readings=(values[0][early], values[1][other]),
        times=(TIMES[early], OTHER_TIMES[other]),
        noise=NOISE,
    )
    expected, found = own.parameter_to_observable().posterior(alpha=1.7), posterior.until(time)
    np.testing.assert_allclose(found.x, expected.x, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(found.variance(), expected.variance(), rtol=1e-8)
    assert found.log_evidence() == pytest.approx(expected.log_evidence(), rel=1e-8)


@pytest.mark.parallel([1, 3])
def test_readings_that_turn_out_to_be_missing(posterior):
    """NaN or masked, one of a time or all of it; the factor of the others stays as it was."""
    case, stream = dense(posterior), posterior.stream()
    left = []
    for step, numbers in enumerate(stream.numbers):
        values = np.ma.array(posterior.data[numbers])
        if step == 1:
            values[0] = np.nan
            numbers = numbers[1:]
        if step == 4:
            values[:] = np.ma.masked
            numbers = numbers[:0]
        left.extend(numbers)
        now = stream.update(values)
        assert_same(now, case.restricted(np.array(left)))
    np.testing.assert_allclose(posterior.until(1.0).x, posterior.x, rtol=1e-8, atol=1e-9)


def test_values_that_come_in_replace_the_data(posterior):
    """Of other readings by ``update`` and by ``with_data``; both use the factor that there is."""
    other = posterior.data + 0.1 * np.arange(len(posterior.data))
    stream, replaced = posterior.stream(), posterior.with_data(other).stream()
    assert stream.factor is replaced.factor
    for numbers in stream.numbers:
        stream.update(other[numbers])
    expected = dense(posterior.with_data(other)).x(1.7)
    np.testing.assert_allclose(stream.posterior.x, expected, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(replaced.until(1.0).x, expected, rtol=1e-8, atol=1e-9)
    assert_same(posterior.with_alpha(0.6).until(0.05), dense(posterior).restricted(up_to(posterior, 0.05)), 0.6)


def test_noise_that_is_correlated_in_time(posterior):
    """The readings so far have the block of the covariance that is theirs."""
    rng = np.random.default_rng(3)
    B = rng.standard_normal((len(posterior.data), len(posterior.data)))
    made = posterior.F.posterior(noise=NOISE**2 * (np.eye(len(B)) + 0.05 * B @ B.T), alpha=1.7)
    assert_same(made.until(0.045), dense(made).restricted(up_to(made, 0.045)))


@pytest.mark.parallel([1, 3])
def test_a_table_with_missing_readings():
    """Those that are masked when the map is made are in no time of the stream."""
    a, b = np.ma.array(np.ones((6, 3))), np.ma.array(np.ones((3, 1)))
    a[2, 1] = b[0, 0] = np.ma.masked
    a[4] = np.ma.masked
    made = problem(SpaceTime(), readings=(a, b)).parameter_to_observable().posterior(noise=NOISE, alpha=1.7)
    stream = made.stream()
    np.testing.assert_allclose(stream.times, np.setdiff1d(ALL_TIMES, TIMES[4:5]))
    assert [len(n) for n in stream.numbers] == [3, 3, 2, 1, 3, 3, 1]
    for now in stream:
        assert_same(now, dense(made).restricted(now.numbers))


def test_samples_have_the_covariance(posterior):
    """Of 4,000 samples: the mean, and the variance of some combinations, within five standard errors."""
    now = posterior.until(0.035)
    x, C = now.sample(4000, seed=5), dense(posterior).restricted(up_to(posterior, 0.035)).covariance(1.7)
    g = np.random.default_rng(1).standard_normal((6, len(C)))
    variance = np.einsum("ki,ij,kj->k", g, C, g)
    projected = (x - now.x) @ g.T
    assert (np.abs(projected.mean(axis=0)) < 5 * np.sqrt(variance / 4000)).all()
    np.testing.assert_allclose(projected.var(axis=0), variance, rtol=5 * np.sqrt(2 / 4000))
    np.testing.assert_allclose(now.sample(2, seed=5), x[:2], rtol=1e-13, atol=1e-13)  # products of other shapes


@pytest.mark.parallel([1, 3])
def test_what_does_not_fit_is_refused_on_every_rank(posterior):
    stream = posterior.stream()
    for values, words in (([1.0], "give 3 numbers"), ([1, 2, np.inf], "give 3 numbers"), (["a"] * 3, "give 3 numbers")):
        with pytest.raises(InputError, match=words):
            stream.update(values)
    assert stream.until(0.03).time == pytest.approx(0.02)
    with pytest.raises(InputError, match="start a new one"):
        stream.until(0.015)
    list(stream)
    with pytest.raises(InputError, match="all 8 times"):
        stream.update()


@pytest.mark.parallel([1, 3])
def test_controls_with_one_value_per_step():
    """A field per step beside a static one: after some times by dense matrices, and in the end the posterior itself."""
    made = heat(SpaceTime(), ("strength", "source"), n=2, steps=5).parameter_to_observable().posterior("riesz_map")
    states = list(made.stream())
    np.testing.assert_allclose(states[-1].x, made.x, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(states[-1].variance(), made.variance(), rtol=1e-8)
    if made.F.spacetime.comm.size == 1:
        assert_same(states[2], dense(made).restricted(states[2].numbers), 1.0)
