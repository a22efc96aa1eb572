"""The Gaussian posterior of linear inverse problems against dense algebra, statistics and the minimiser."""

import numpy as np
import pytest
from firedrake import Function, TestFunction, TrialFunction, assemble, dx, grad, inner
from mpi4py import MPI
from scipy.stats import chi2, multivariate_normal

import pint_fem as pf
from pint_fem.errors import InputError
from pint_fem.inverse.spectra import DataSpace, ParameterSpace
from tests.inverse_problems import dense_map, grid, heat, lossy, random_control, readings_of

NOISES = {
    "weights": lambda m: (None, np.eye(m) / 3.0),
    "number": lambda m: (0.2, 0.04 * np.eye(m)),
    "readings": lambda m: (0.1 + 0.01 * np.arange(m), np.diag((0.1 + 0.01 * np.arange(m)) ** 2)),
    "full": lambda m: ((C := 0.05 * np.exp(-np.abs(np.subtract.outer(np.arange(m), np.arange(m))) / 2)), C),
}
SPACES = {
    "data": (("source", "initial", "wind"), DataSpace, 4),
    "parameters": (("wind", "level"), ParameterSpace, 9),
}


def dense(J, N, alpha=1.0):
    """Map, readings at zero, precision and mean of the prior, and the posterior's mean and covariance."""
    D, zero = dense_map(J)
    R, size = J.problem.regularisation, J.problem.layout.size
    A = np.array([R.hessian(np.zeros(size), unit) for unit in np.eye(size)])
    H = D.T @ np.linalg.solve(N, D) + alpha * A
    m0 = np.linalg.solve(A, -R.gradient(np.zeros(size)))
    return D, zero, A, m0, np.linalg.inv(H)


@pytest.mark.parallel([1])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("noise", NOISES)
def test_it_is_that_of_dense_algebra(space, noise):
    wanted, kind, count = SPACES[space]
    J = heat(grid(), wanted, sensors=lambda ev: readings_of(ev, count=count))
    F = J.parameter_to_observable()
    given, N = NOISES[noise](F.shape[0])
    for alpha in (1.0, 0.03):
        D, zero, A, m0, C = dense(J, N, alpha)
        posterior = F.posterior(noise=given, alpha=alpha)
        assert type(posterior.spectrum) is kind
        r = F.data - zero - D @ m0
        x = m0 + C @ D.T @ np.linalg.solve(N, r)
        scale = np.abs(C).max()
        np.testing.assert_allclose(posterior.x, x, rtol=1e-8, atol=1e-9 * np.abs(x).max())
        np.testing.assert_allclose(posterior.variance(), np.diag(C), rtol=1e-8)
        np.testing.assert_allclose(posterior.covariance(np.eye(len(x))), C, atol=1e-8 * scale)
        S = N + D @ np.linalg.solve(alpha * A, D.T)
        evidence = multivariate_normal(zero + D @ m0, S).logpdf(F.data)
        assert posterior.log_evidence() == pytest.approx(evidence, rel=1e-8)
        residual = F.data - zero - D @ x
        assert posterior.misfit() == pytest.approx(residual @ np.linalg.solve(N, residual), rel=1e-7)
        assert posterior.size() == pytest.approx((x - m0) @ A @ (x - m0), rel=1e-7)
        influence = np.trace(D @ C @ D.T @ np.linalg.inv(N))
        assert posterior.degrees_of_freedom() == pytest.approx(influence, rel=1e-8)
        np.testing.assert_allclose(posterior.predicted, zero + D @ x, rtol=1e-8)


@pytest.mark.parallel([1])
@pytest.mark.parametrize("space", SPACES)
def test_other_readings_and_weights_need_no_new_decomposition(space):
    wanted, _, count = SPACES[space]
    J = heat(grid(), wanted, sensors=lambda ev: readings_of(ev, count=count))
    posterior = J.parameter_to_observable().posterior()
    data = np.sin(np.arange(len(posterior.data)))
    D, zero, _, m0, C = dense(J, np.eye(len(data)) / 3, 0.5)
    other = posterior.with_data(data).with_alpha(0.5)
    x = m0 + C @ D.T @ (3 * (data - zero - D @ m0))
    np.testing.assert_allclose(other.x, x, rtol=1e-8, atol=1e-9 * np.abs(x).max())
    assert other.spectrum is posterior.spectrum
    assert not np.array_equal(posterior.data, data)
    curve = posterior.misfit(np.array([0.5, 1.0]))
    assert curve[1] == pytest.approx(posterior.misfit(), rel=1e-12)
    assert curve[0] == pytest.approx(posterior.with_alpha(0.5).misfit(), rel=1e-12)


@pytest.mark.parallel([1])
@pytest.mark.parametrize("space", SPACES)
def test_samples_have_its_covariance(space):
    wanted, _, count = SPACES[space]
    J = heat(grid(), wanted, sensors=lambda ev: readings_of(ev, count=count))
    posterior = J.parameter_to_observable().posterior(alpha=0.7)
    *_, C = dense(J, np.eye(len(posterior.data)) / 3, 0.7)
    count = 20_000
    x = posterior.sample(count, seed=1) - posterior.x
    L = np.linalg.cholesky(C)
    white = np.linalg.solve(L, x.T)
    empirical = white @ white.T / count
    # entries of a sample covariance of white noise have standard errors of at most sqrt(2 / count)
    assert np.abs(empirical - np.eye(len(C))).max() < 5 * np.sqrt(2 / count)
    assert np.abs(white.mean(axis=1)).max() < 5 / np.sqrt(count)
    np.testing.assert_array_equal(posterior.sample(2, seed=1), x[:2] + posterior.x)
    assert not np.array_equal(posterior.sample(2, seed=2), x[:2] + posterior.x)


@pytest.mark.parallel([1])
def test_ranks_of_drawn_truths_are_uniform():
    """Simulation-based calibration (Talts, Betancourt, Simpson, Vehtari, Gelman, arXiv:1804.06788)."""
    J = heat(grid(), ("source", "initial"))
    F = J.parameter_to_observable()
    posterior = F.posterior()
    draws, samples = 200, 19
    truths = posterior.prior.mean + posterior.prior.sample(draws, seed=5)
    readings = F.offset + F.product(truths) + posterior.noise.sample(draws, seed=6)
    rng = np.random.default_rng(7)
    for functional in (rng.standard_normal(F.shape[1]), F.rows[0], np.eye(F.shape[1])[3]):
        ranks = np.zeros(samples + 1)
        for i, (truth, d) in enumerate(zip(truths, readings, strict=True)):
            drawn = posterior.with_data(d).sample(samples, seed=100 + i)
            ranks[int((drawn @ functional < truth @ functional).sum())] += 1
        expected = draws / (samples + 1)
        assert ((ranks - expected) ** 2 / expected).sum() < chi2.ppf(0.99, samples)


@pytest.mark.parallel([1])
def test_the_mean_is_the_converged_minimiser():
    for J in (heat(grid(), ("source", "initial", "wind")), lossy(grid())):
        posterior = J.parameter_to_observable().posterior()
        result = J.minimize_trust_region(gtol_rel=1e-13, max_it=40)
        inner_product = J.inner.inner
        error = posterior.x - result.x
        assert inner_product(error, error) <= 1e-16 * inner_product(result.x, result.x)
        assert J(posterior.mean) <= result.value * (1 + 1e-12)
        value = 0.5 * (posterior.misfit() + posterior.size())
        assert value == pytest.approx(result.value, rel=1e-9)


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("space", SPACES)
def test_it_is_the_same_on_several_ranks(space):
    wanted, kind, count = SPACES[space]
    sensors = lambda ev: readings_of(ev, count=count)
    one = heat(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), wanted, sensors=sensors).parameter_to_observable().posterior()
    for shape in ("2x1", "1x2") if MPI.COMM_WORLD.size == 2 else ("1x3",):
        J = heat(pf.SpaceTime(shape), wanted, sensors=sensors)
        posterior = J.parameter_to_observable().posterior()
        assert type(posterior.spectrum) is kind
        assert posterior.log_evidence() == pytest.approx(one.log_evidence(), rel=1e-10)
        layout, norms = J.problem.layout, []
        for p, own in ((posterior, layout), (one, one.F.layout)):
            norms.append([own.pairing(v, v) for v in (p.x, p.variance(), p.covariance(p.x[None])[0])])
        np.testing.assert_allclose(norms[0], norms[1], rtol=1e-8)
        sample = posterior.sample(3, seed=4)
        comm = J.spacetime.time_comm
        assert all(np.array_equal(sample, other) for other in comm.allgather(sample))
        if shape != "2x1":
            np.testing.assert_allclose(sample, one.sample(3, seed=4), rtol=1e-7, atol=1e-8)


@pytest.mark.parallel([1])
def test_priors_and_functions():
    J = heat(grid(), ("source", "initial"))
    F = J.parameter_to_observable()
    V = J.evolution.V
    a, b = TrialFunction(V), TestFunction(V)
    form = (inner(grad(a), grad(b)) + 2 * a * b) * dx
    mean = [Function(V).assign(0.5), Function(V).assign(-1.0)]
    posterior = F.posterior(prior=[form, None], mean=mean, noise=0.1)
    D, zero = dense_map(J)
    n = V.dim()
    A = np.zeros((2 * n, 2 * n))
    A[:n, :n] = assemble(form).M.values
    A[n:, n:] = np.array([J.problem.regularisation.hessian(np.zeros(2 * n), e)[n:] for e in np.eye(2 * n)[n:]])
    C = np.linalg.inv(A + 100 * D.T @ D)
    m0 = np.repeat([0.5, -1.0], n)
    x = m0 + C @ D.T @ (100 * (F.data - zero - D @ m0))
    np.testing.assert_allclose(posterior.x, x, rtol=1e-8, atol=1e-9)
    np.testing.assert_array_equal(np.concatenate([f.dat.data_ro for f in posterior.mean]), posterior.x)
    std = np.concatenate([f.dat.data_ro for f in posterior.standard_deviation()])
    np.testing.assert_allclose(std, np.sqrt(np.diag(C)), rtol=1e-8)
    samples = posterior.samples(2, seed=3)
    np.testing.assert_array_equal(samples[1][0].dat.data_ro, posterior.sample(2, seed=3)[1, :n])


@pytest.mark.parallel([1, 3])
def test_bad_input():
    J = heat(grid(), ("source",))
    posterior = (F := J.parameter_to_observable()).posterior()
    with pytest.raises(InputError, match="positive number"):
        posterior.with_alpha(0.0)
    with pytest.raises(InputError, match="finite numbers"):
        posterior.with_data(np.ones(3))
    with pytest.raises(InputError, match="finite numbers"):
        posterior.with_data(np.full(F.shape[0], np.nan))
    with pytest.raises(InputError, match="positive number"):
        F.posterior(alpha=-1.0)
    with pytest.raises(InputError, match="prior"):
        F.posterior(prior=3)
    if MPI.COMM_WORLD.size > 1:
        with pytest.raises(InputError, match="readings"):
            posterior.with_data(F.data + MPI.COMM_WORLD.rank)
        with pytest.raises(InputError, match="noise"):
            F.posterior(noise=0.1 + MPI.COMM_WORLD.rank)
    assert random_control(J).shape == posterior.x.shape
