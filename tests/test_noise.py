"""Noise of readings against dense numpy algebra."""

import numpy as np
import pytest

from pint_fem.errors import InputError
from pint_fem.inverse.laws.noise import make_noise

WEIGHTS = np.array([4.0, 1.0, 0.25, 2.0, 8.0])
GROUPS = np.array([0, 1, 2, 0, 2])  # two times; the reading of sensor 1 at the second one is missing
RNG = np.random.default_rng(1)
ROWS = RNG.standard_normal((3, 5))


def spd(n, seed=0):
    A = np.random.default_rng(seed).standard_normal((n, n))
    return A @ A.T + n * np.eye(n)


FULL, FIRST, SECOND = spd(5), spd(2, 1), spd(3, 2)
BLOCKS = np.zeros((5, 5))
BLOCKS[:2, :2], BLOCKS[2:, 2:] = FIRST, SECOND
DEVIATIONS = np.array([0.1, 2.0, 0.5, 1.0, 3.0])
CASES = {
    "misfit": (None, np.diag(1 / WEIGHTS), True),
    "number": (0.3, 0.09 * np.eye(5), True),
    "whole number": (2, 4 * np.eye(5), True),
    "reading": (DEVIATIONS, np.diag(DEVIATIONS**2), True),
    "sensor": ([0.1, 2.0, 0.5], np.diag(np.array([0.1, 2.0, 0.5, 0.1, 0.5]) ** 2), True),
    "named reading": ({"reading": DEVIATIONS}, np.diag(DEVIATIONS**2), True),
    "named sensor": ({"sensor": [0.1, 2.0, 0.5]}, np.diag(np.array([0.1, 2.0, 0.5, 0.1, 0.5]) ** 2), True),
    "full": (FULL, FULL, False),
    "nested list": (FULL.tolist(), FULL, False),
    "blocks": ([FIRST, SECOND], BLOCKS, False),
    "one block": (FULL[None], FULL, False),
}


@pytest.mark.parametrize("case", CASES)
def test_products_determinant_and_variances_are_those_of_the_dense_covariance(case):
    given, N, diagonal = CASES[case]
    noise = make_noise(given, WEIGHTS, GROUPS)
    assert noise.is_diagonal == diagonal
    assert noise.size == 5
    for rows in (ROWS, ROWS[0]):
        np.testing.assert_allclose(noise.covariance(rows), rows @ N, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(noise.inverse(rows), rows @ np.linalg.inv(N), rtol=1e-11, atol=1e-13)
        white = noise.whitened(rows)
        np.testing.assert_allclose((white**2).sum(-1), ((rows @ np.linalg.inv(N)) * rows).sum(-1), rtol=1e-11)
        np.testing.assert_allclose(noise.correlated(white), rows, rtol=1e-11, atol=1e-13)
    assert noise.log_det == pytest.approx(np.linalg.slogdet(N)[1], rel=1e-12)
    np.testing.assert_allclose(noise.variance(), N.diagonal(), rtol=1e-14)


@pytest.mark.parametrize("case", ["reading", "full", "blocks"])
def test_some_of_the_readings_have_the_rows_and_columns_that_are_theirs(case):
    given, N, _ = CASES[case]
    for mask in ([True, False, True, True, False], [True, True, False, False, False], [False] * 5):
        part = make_noise(given, WEIGHTS, GROUPS).restricted(np.array(mask))
        kept = N[np.ix_(mask, mask)]
        assert part.size == sum(mask)
        np.testing.assert_allclose(part.covariance(np.eye(part.size)), kept, rtol=1e-14, atol=1e-15)
        assert part.log_det == pytest.approx(np.linalg.slogdet(kept)[1] if part.size else 0.0, abs=1e-12)


@pytest.mark.parametrize("case", ["reading", "full", "blocks"])
def test_samples_have_the_covariance(case):
    given, N, _ = CASES[case]
    noise, count = make_noise(given, WEIGHTS, GROUPS), 20_000
    samples = noise.sample(count, seed=3)
    white = np.linalg.solve(np.linalg.cholesky(N), samples.T)
    np.testing.assert_allclose(white @ white.T / count, np.eye(5), atol=5 * np.sqrt(2 / count))
    np.testing.assert_allclose(white.mean(axis=1), 0, atol=5 / np.sqrt(count))
    np.testing.assert_array_equal(noise.sample(7, seed=3), samples[:7])
    assert not np.array_equal(noise.sample(7, seed=4), samples[:7])


def test_the_dense_covariance_of_blocks():
    np.testing.assert_array_equal(make_noise([FIRST, SECOND], WEIGHTS, GROUPS).dense, BLOCKS)


def test_a_noise_is_returned_as_it_is():
    noise = make_noise(FULL, WEIGHTS, GROUPS)
    assert make_noise(noise, WEIGHTS, GROUPS) is noise
    with pytest.raises(InputError, match="a Noise of 5 readings: there are 4"):
        make_noise(noise, WEIGHTS[:4], GROUPS[:4])


def test_without_readings():
    for given in (None, 1.0, np.zeros((0, 0))):
        noise = make_noise(given, np.zeros(0), np.zeros(0))
        assert noise.size == 0
        assert noise.log_det == 0
        assert noise.sample(2, 0).shape == (2, 0)


def test_as_many_sensors_as_readings_is_ambiguous_unless_the_orders_agree():
    deviations = np.array([1.0, 2.0, 3.0])
    same = make_noise(deviations, np.ones(3), [0, 1, 2])
    np.testing.assert_array_equal(same.variance(), deviations**2)
    with pytest.raises(InputError, match=r"3 standard deviations for 3 readings of 3 sensors.*\{'reading': array\}"):
        make_noise(deviations, np.ones(3), [0, 0, 2])
    np.testing.assert_array_equal(make_noise({"reading": deviations}, np.ones(3), [0, 0, 2]).variance(), [1, 4, 9])
    np.testing.assert_array_equal(make_noise({"sensor": deviations}, np.ones(3), [0, 0, 2]).variance(), [1, 1, 9])
    # the last sensor has no reading
    np.testing.assert_array_equal(make_noise(deviations, np.ones(2), [1, 0], sensors=3).variance(), [4, 1])
    with pytest.raises(InputError, match="give a positive standard deviation, an array of them for the 2 readings"):
        make_noise(deviations, np.ones(2), [1, 0])


BAD = {
    "zero": (0.0, "entry 0 is 0, not positive"),
    "negative": (-1.0, "entry 0 is -1, not positive"),
    "not a number": (np.nan, "entry 0 is nan"),
    "infinite": (np.inf, "entry 0 is inf"),
    "tiny": (1e-200, "entry 0 is 1e-200"),
    "truth value": (True, "noise: True: give a standard deviation"),
    "text": ("gaussian", "noise: 'gaussian': give a standard deviation"),
    "complex": (1j, "noise: 1j"),
    "objects": ([object()], "give a standard deviation, an array of them"),
    "ragged": ([[1.0], [1.0, 2.0]], "give a standard deviation, an array of them"),
    "length": (np.ones(4), r"an array of shape \(4,\): give a positive.*5 readings or the 3 sensors"),
    "one negative": ([1, 1, -2.0, 1, 1], "entry 2 is -2"),
    "shape": (np.ones((2, 5)), r"a covariance of shape \(2, 5\): give .*\(5, 5\)"),
    "dimensions": (np.ones((1, 1, 5, 5)), "give a standard deviation"),
    "asymmetric": (FULL + np.triu(np.ones((5, 5)), 1), r"not symmetric, by up to 1: give \(C \+ C.T\)/2"),
    "indefinite": (FULL - 40 * np.eye(5), "not positive definite.*smallest eigenvalue -"),
    "singular": (np.ones((5, 5)), "not positive definite, or singular"),
    "not finite": (np.where(np.eye(5), np.nan, 0), "infinite or NaN"),
    "rows of blocks": ([FIRST, FIRST], "blocks with 4 rows in all: give blocks with 5"),
    "rectangular block": ([FIRST, np.ones((3, 2))], r"block 1 has the shape \(3, 2\)"),
    "bad block": ([FIRST, -SECOND], r"noise \(block 1 of 2\): the covariance is not positive definite"),
    "mapping": ({"time": [1.0]}, r"a mapping of \['time'\]"),
    "two names": ({"sensor": [1, 1, 1], "reading": np.ones(5)}, "give {'reading': array} or"),
    "named length": ({"sensor": np.ones(5)}, r"noise of each sensor: an array of shape \(5,\): give \(3,\)"),
    "named blocks": ({"reading": [FIRST, SECOND]}, "noise of each reading: blocks"),
    "named negative": ({"sensor": [1, -1, 1]}, "noise of each sensor: entry 1 is -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_with_a_remedy(case):
    given, message = BAD[case]
    with pytest.raises(InputError, match=message):
        make_noise(given, WEIGHTS, GROUPS)


def test_a_reading_with_the_weight_zero_has_no_variance():
    weights = np.array([1, 1, 0, 1, 1.0])
    with pytest.raises(InputError, match=r"entry 2 is 0.*leave it out of the data, or give noise="):
        make_noise(None, weights, GROUPS)
    assert make_noise(1.0, weights, GROUPS).size == 5


def test_arguments_of_methods():
    noise = make_noise(1.0, WEIGHTS, GROUPS)
    for count, seed, message in (
        (1.5, 0, "count = 1.5"),
        (-1, 0, "count = -1"),
        (1, None, "seed = None"),
        (1, -2, "-2"),
    ):
        with pytest.raises(InputError, match=message):
            noise.sample(count, seed)
    for mask in (np.ones(4, bool), np.ones(5), [0, 1]):
        with pytest.raises(InputError, match=r"mask of readings.*give \(5,\) truth values"):
            noise.restricted(mask)
