"""The posterior of controls with one value per step, beside static ones, and of low rank."""

import numpy as np
import pytest
from mpi4py import MPI

import pint_fem as pf
from pint_fem.errors import InputError
from pint_fem.inverse.per_step import applied_modes, covered_responses, spectrum_choice
from pint_fem.inverse.per_step.low_rank import BLOCK, low_rank_eigenpairs
from tests.inverse_problems import heat
from tests.ranks import cases
from tests.step_controls import KINDS, functional

COMM = MPI.COMM_WORLD
ALONE = "one term of weight 1", ("strength", "source", "initial")
MANY = "terms with weights in time", KINDS
REAL = "fewer unknowns than readings", ("amplitude",)


def alone(wanted=KINDS, **options):
    """The functional on one rank."""
    return functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), wanted, **options)


def dense_posterior(F, prior, noise, alpha=1.0):
    """Mean, covariance and -2 log evidence by dense algebra, of all controls on one rank."""
    matrix = F.product(np.eye(F.shape[1])).T
    A, N = alpha * prior.precision(np.eye(F.shape[1])), noise.covariance(np.eye(F.shape[0]))
    r = F.data - F.offset - matrix @ prior.mean
    covariance = np.linalg.inv(A + matrix.T @ np.linalg.solve(N, matrix))
    mean = prior.mean + covariance @ matrix.T @ np.linalg.solve(N, r)
    marginal = N + matrix @ np.linalg.solve(A, matrix.T)
    _, log_det = np.linalg.slogdet(2 * np.pi * marginal)
    return mean, covariance, -0.5 * (r @ np.linalg.solve(marginal, r) + log_det)


@pytest.mark.parametrize("wanted", [ALONE[1], MANY[1], REAL[1]], ids=[ALONE[0], MANY[0], REAL[0]])
def test_mean_covariance_and_evidence_are_those_of_dense_algebra(wanted, monkeypatch):
    monkeypatch.setattr(applied_modes, "_NUMBERS", 1500)  # a few vectors at once
    monkeypatch.setattr(covered_responses, "_NUMBERS", 1500)
    F = alone(wanted).parameter_to_observable()
    correlated = np.eye(F.shape[0]) + 0.4 * np.eye(F.shape[0], k=1) + 0.4 * np.eye(F.shape[0], k=-1)
    for alpha, noise in ((1.0, None), (0.3, 0.02 * correlated)):
        posterior = F.posterior(noise=noise, alpha=alpha)
        mean, covariance, evidence = dense_posterior(F, posterior.prior, posterior.noise, alpha)
        scale = covariance.diagonal().max()
        np.testing.assert_allclose(posterior.x, mean, rtol=0, atol=1e-9 * np.abs(mean).max())
        np.testing.assert_allclose(posterior.covariance(np.eye(len(mean))), covariance, rtol=0, atol=1e-9 * scale)
        np.testing.assert_allclose(posterior.variance(), covariance.diagonal(), rtol=1e-8)
        assert posterior.log_evidence() == pytest.approx(evidence, rel=1e-10)
        z = posterior.x - posterior.prior.mean
        assert posterior.size() == pytest.approx(z @ posterior.prior.precision(z[None])[0], rel=1e-8)
        r = F.data - F.predict(posterior.x)
        assert posterior.misfit() == pytest.approx(r @ posterior.noise.inverse(r[None])[0], rel=1e-8)
    few = wanted == REAL[1]  # of the number of unknowns, by random vectors
    assert (len(posterior.spectrum.lam) < F.shape[0]) == few


def test_mean_is_the_minimiser_of_the_functional():
    J = alone(("source", "strength", "wall"), n=3, steps=6)
    posterior = J.parameter_to_observable().posterior()
    found = J.minimize_trust_region(gtol_rel=1e-12)
    z = J.array(found.control)
    np.testing.assert_allclose(posterior.x, z, rtol=0, atol=1e-8 * np.abs(z).max())


def test_samples_have_the_posterior_covariance():
    J = alone(("strength", "wall"), n=2, steps=4)
    posterior = J.parameter_to_observable().posterior()
    count = 4000
    samples = posterior.sample(count, seed=1)
    np.testing.assert_allclose(posterior.sample(3, seed=1), samples[:3], rtol=0, atol=1e-11)
    _, covariance, _ = dense_posterior(posterior.F, posterior.prior, posterior.noise)
    root = np.linalg.cholesky(covariance)
    white = np.linalg.solve(root, (samples - posterior.x).T)
    # entries of the sample covariance of white noise have the variance 1/count, 2/count on the diagonal
    found = (white @ white.T / count - np.eye(len(root))) * np.sqrt(count / (1 + np.eye(len(root))))
    assert np.abs(found).max() < 5.5
    assert np.abs(white.mean(axis=1)).max() * np.sqrt(count) < 5


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("wanted", [ALONE[1], MANY[1], REAL[1]], ids=[ALONE[0], MANY[0], REAL[0]])
def test_ranks_in_time_and_space(wanted):
    one = alone(wanted)
    expected = one.parameter_to_observable().posterior()
    for grid in [(1, COMM.size), (COMM.size, 1)][: 1 + (COMM.size == 2)]:
        J = functional(pf.SpaceTime(grid), wanted)
        found = J.parameter_to_observable().posterior()
        np.testing.assert_allclose(found.predicted, expected.predicted, rtol=0, atol=1e-10)
        assert found.log_evidence() == pytest.approx(expected.log_evidence(), rel=1e-10)
        np.testing.assert_allclose(found.spectrum.lam[-5:], expected.spectrum.lam[-5:], rtol=1e-8)
        if grid[0] > 1:
            continue
        slab = J.layout.slab
        for of in (found, expected):
            of.variances = of.variance()
        for a, b in zip(J.evolution.controls, one.evolution.controls, strict=True):
            own = slice(slab.lo, slab.hi) if a in J.evolution.stepwise else slice(None)
            for name in ("x", "variances"):
                values = one.layout.part(getattr(expected, name), b)
                np.testing.assert_allclose(J.layout.part(getattr(found, name), a), values[own], rtol=1e-8, atol=1e-9)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("static", cases([True, False], on_ranks=[False]))
def test_low_rank_where_both_spaces_are_large(static, monkeypatch):
    """The exact posterior for the combinations of the readings that are kept: deviations are not too small."""
    monkeypatch.setattr(spectrum_choice, "LARGEST_DENSE", 10)
    st = pf.SpaceTime()
    count = 30
    J = heat(st, ("source", "initial"), n=6, steps=count) if static else functional(st, n=4, steps=count, weight=5.0)
    F = J.parameter_to_observable()
    monkeypatch.undo()
    exact = F.posterior()
    monkeypatch.setattr(spectrum_choice, "LARGEST_DENSE", 5)
    for tolerance in (0.5, 1e-7):
        found = F.posterior(tolerance=tolerance)
        assert isinstance(found.spectrum, applied_modes.AppliedModes)
        assert not static or not isinstance(exact.spectrum, applied_modes.AppliedModes)
        lam = np.sort(exact.spectrum.lam)[::-1]
        rank = len(found.spectrum.lam)
        left_out = lam[rank] if rank < len(lam) else 0.0
        assert left_out <= found.spectrum.remainder <= tolerance or found.spectrum.remainder == left_out == 0
        both = zip(found.spectrum.lam[::-1][:8], lam, strict=False)
        assert all(abs(a - b) <= max(tolerance, 1e-9 * lam[0]) for a, b in both)
        variance, expected = found.variance(), exact.variance()
        assert (variance >= expected * (1 - 1e-9)).all()
        np.testing.assert_allclose(variance, expected, rtol=0, atol=(tolerance + 1e-9) * exact.prior.variance().max())
        again = F.posterior(tolerance=tolerance)
        np.testing.assert_array_equal(again.x, found.x)
    np.testing.assert_allclose(found.x, exact.x, rtol=0, atol=1e-3 * np.abs(exact.x).max())


def test_eigenpairs_by_random_vectors():
    """Of a matrix with known eigenvalues: those above the tolerance, the remainder's estimate, ranks of 0 and all."""
    rng = np.random.default_rng(0)
    m = 3 * BLOCK + 5
    basis = np.linalg.qr(rng.standard_normal((m, m)))[0]
    apply = lambda lam: lambda rows: rows @ (basis * lam) @ basis.T
    lam = 10.0 ** -np.arange(0, m / 4, 0.25)
    for tolerance in (1e-2, 1e-6):
        found, U, remainder = low_rank_eigenpairs(apply(lam), m, tolerance=tolerance, comm=MPI.COMM_SELF)
        assert lam[len(found)] <= remainder <= tolerance
        assert len(found) < m
        np.testing.assert_allclose(U.T @ U, np.eye(len(found)), rtol=0, atol=1e-12)
        np.testing.assert_allclose(found[::-1][:BLOCK // 2], lam[:BLOCK // 2], rtol=0, atol=tolerance)  # fmt: skip
        np.testing.assert_allclose(apply(lam)(U.T), (U * found).T, rtol=0, atol=2 * tolerance)
    few = np.where(np.arange(m) < 7, 1.0 + np.arange(m), 0.0)
    found, _, remainder = low_rank_eigenpairs(apply(few), m, tolerance=1e-16, comm=MPI.COMM_SELF)
    np.testing.assert_allclose(found, few[:7], rtol=1e-12)
    assert remainder < 1e-11
    found, U, remainder = low_rank_eigenpairs(apply(np.ones(m)), m, tolerance=0.1, comm=MPI.COMM_SELF)
    assert (len(found), U.shape, remainder) == (m, (m, m), 0.0)
    assert len(low_rank_eigenpairs(apply(np.zeros(m)), m, tolerance=0.1, comm=MPI.COMM_SELF)[0]) == 0


@pytest.mark.parametrize("tolerance", [0, -1.0, np.nan, "1"])
def test_tolerances_that_are_none_are_refused(tolerance):
    F = alone(("amplitude",), n=2, steps=4).parameter_to_observable()
    with pytest.raises(InputError, match="give a positive number"):
        F.posterior(tolerance=tolerance)
