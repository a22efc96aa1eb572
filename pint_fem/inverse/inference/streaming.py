r"""The posterior of the readings up to a time, for each time in turn as readings come in.

With the readings in the order of time, their covariance :math:`K = F \Gamma F^T / \alpha + N = L L^T` and :math:`V =
L^{-1} F \Gamma / \alpha`, the posterior of the first :math:`p` readings has

.. math::
    z = m_0 + V_p^T y_p, \qquad \mathrm{Cov} = \Gamma / \alpha - V_p^T V_p, \qquad
    -2 \log \pi(d_p) = |y_p|^2 + 2 \log\det L_p + p \log 2\pi, \qquad y = L^{-1} r ,

where :math:`L_p` and :math:`V_p` are the first rows of :math:`L` and :math:`V`: those of a further time are added to
what there is, as in a Kalman filter of a constant state. :math:`L` and :math:`V` do not depend on the readings and are
computed once for all times; a time is then a product with its rows. Where a reading turns out to be missing, the rows
of all later times are computed as they come.

Source: A. H. Sayed, T. Kailath, IEEE Signal Process. Mag. 11(3), 1994 (innovations).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import cholesky, solve_triangular

from pint_fem.capacity import require_memory
from pint_fem.collective import collectively, require_same
from pint_fem.errors import InputError
from pint_fem.inverse.inference.data_covariance import DataCovariance
from pint_fem.inverse.inference.gaussian_law import GaussianLaw
from pint_fem.inverse.spectra import on_first_rank

if TYPE_CHECKING:
    from pint_fem.inverse.posterior import GaussianPosterior

__all__ = ["InnovationFactor", "ReadingStream", "StreamedPosterior"]

_SAME_TIME = 1e-9
"""Readings whose times differ by less than this part of a step belong together."""
_SAMPLES = 2**40
"""What is added to the seed of samples for the noise in them."""


class InnovationFactor:
    """Rows of ``L`` and ``V`` for readings in the order in which they are appended (collective).

    Parameters
    ----------
    posterior
        Prior, noise, map and weight of the prior.

    Attributes
    ----------
    order : ndarray of int, shape (p,)
        Numbers of the readings.
    L : ndarray, shape (p, p)
        On every rank.
    V : ndarray, shape (p, own)
        The entries that this rank works on.
    """

    def __init__(self, posterior: GaussianPosterior):
        F = posterior.F
        m, own = F.shape[0], len(F.partition.own)
        require_memory(
            F.spacetime.comm,
            8 * m * (3 * m + 2 * own),
            f"factors of the covariance of {m} readings for a stream of them",
            "give fewer readings, or more ranks",
        )
        self.posterior, self._covariance = posterior, DataCovariance(F, posterior.prior)
        self.order = np.zeros(0, dtype=int)
        self.L, self.V = np.zeros((0, 0)), np.zeros((0, own))

    @cached_property
    def prior_variance(self) -> np.ndarray:
        """Variances of the prior with its weight, ``(layout.size,)`` (collective when first used)."""
        return self.posterior.prior.variance() / self.posterior.alpha

    def append(self, numbers: np.ndarray) -> None:
        """Append the rows of readings of some numbers (collective)."""
        alpha, noise, p = self.posterior.alpha, self.posterior.noise, len(self.order)
        order = np.concatenate([self.order, numbers])
        units = np.zeros((len(numbers), noise.size))
        units[np.arange(len(numbers)), numbers] = 1.0

        def factored() -> tuple[np.ndarray, np.ndarray]:
            S = self._covariance.between(numbers, order) / alpha + noise.covariance(units)[:, order]
            X = solve_triangular(self.L, S[:, :p].T, lower=True, check_finite=False) if p else np.zeros((0, len(S)))
            return X, cholesky(S[:, p:] - X.T @ X, lower=True, check_finite=False)

        X, corner = on_first_rank(self.posterior.F.spacetime.comm, factored)
        D = self._covariance.with_controls(numbers) / alpha - X.T @ self.V
        self.V = np.concatenate([self.V, solve_triangular(corner, D, lower=True, check_finite=False)])
        self.L = np.block([[self.L, np.zeros((p, len(numbers)))], [X.T, corner]])
        self.order = order

    def first(self, p: int) -> InnovationFactor:
        """A copy with the first ``p`` readings only."""
        made = object.__new__(InnovationFactor)
        made.__dict__.update(self.__dict__)
        made.order, made.L, made.V = self.order[:p], self.L[:p, :p], self.V[:p]
        return made


class StreamedPosterior(GaussianLaw):
    """The posterior of the readings up to a time.

    Attributes
    ----------
    time : float or None
        Time of the last reading; ``None`` before the first.
    numbers : ndarray of int
        The numbers of the readings that it has, in the order of time.
    """

    def __init__(
        self,
        factor: InnovationFactor,
        time: float | None,
        x: np.ndarray,
        squares: np.ndarray,
        y: np.ndarray,
        log_evidence: float,
    ):
        self.F, self._factor, self.time, self.x = factor.posterior.F, factor, time, x
        self._squares, self._y, self._log_evidence = squares, y, log_evidence
        self.numbers = factor.order[: len(y)]

    def variance(self) -> np.ndarray:
        """The variance of each entry of the controls, ``(layout.size,)`` (collective)."""
        return np.maximum(self._factor.prior_variance - self.F.partition.spread(self._squares[None])[0], 0.0)

    def _covariance(self, g: np.ndarray) -> np.ndarray:
        V, partition = self._factor.V[: len(self._y)], self.F.partition
        inner = self.F.spacetime.sum_over_grid(g[:, partition.own] @ V.T)
        posterior = self._factor.posterior
        return posterior.prior.covariance(g) / posterior.alpha - partition.spread(inner @ V)

    def sample(self, count: int, seed: int = 0) -> np.ndarray:
        """Samples of the controls, ``(count, layout.size)`` (collective); the same for the same seed.

        They are samples of the prior, corrected by how their readings with noise differ from none.
        """
        p, posterior = len(self._y), self._factor.posterior
        x = posterior.prior.sample(count, seed) / np.sqrt(posterior.alpha)
        differences = (self.F.product(x) + posterior.noise.sample(count, int(seed) + _SAMPLES))[:, self.numbers]
        half = _solved(self._factor.L[:p, :p], differences.T).T
        return self.x + x - self.F.partition.spread(half @ self._factor.V[:p])

    def log_evidence(self) -> float:
        """The logarithm of the probability density of its readings, the controls integrated out."""
        return self._log_evidence

    def misfit(self) -> float:
        """The squared norm of the residual of its readings at the mean, relative to the noise."""
        p, noise = len(self._y), self._factor.posterior.noise
        weights = np.zeros(noise.size)
        weights[self.numbers] = _solved(self._factor.L[:p, :p], self._y, trans="T")
        return float(weights @ noise.covariance(weights[None])[0])


def _solved(L: np.ndarray, right: np.ndarray, trans: str = "N") -> np.ndarray:
    return solve_triangular(L, right, lower=True, trans=trans, check_finite=False) if len(L) else right


class ReadingStream:
    """Readings that come in one time after another.

    Parameters
    ----------
    posterior
        Prior, noise, map and weight of the prior; its readings are those that :meth:`update` takes by default.
    factor
        The factor of all readings in the order of time, or ``None`` to compute it.

    Attributes
    ----------
    times : ndarray
        All times of readings, increasing.
    numbers : list of ndarray of int
        Numbers of the readings at each time among those of the map: one misfit after the other.
    count : int
        How many times the stream has the readings of.
    posterior : StreamedPosterior
        The posterior of these readings; that of no reading is the prior.
    """

    def __init__(self, posterior: GaussianPosterior, factor: InnovationFactor | None = None):
        F = posterior.F
        self._of, table, ev = posterior, F.table, F.propagator.evolution
        place = table.point - 1 + table.theta
        order = np.argsort(np.round(place / _SAME_TIME), kind="stable")
        starts = np.flatnonzero(np.diff(place[order], prepend=-np.inf) > 2 * _SAME_TIME)
        ends = [*starts.tolist(), len(order)]
        self.numbers = [np.sort(order[a:b]) for a, b in pairwise(ends)]
        self.times = ev.t0 + ev.dt * place[order[starts]]
        if factor is None:
            factor = InnovationFactor(posterior)
            factor.append(np.concatenate([np.zeros(0, dtype=int), *self.numbers]))
        self.factor, self._ahead = factor, True
        self._residual_of_prior = posterior.F.predict(posterior.prior.mean)
        self.count = 0
        self.posterior = StreamedPosterior(
            factor, None, posterior.prior.mean.copy(), np.zeros(len(F.partition.own)), np.zeros(0), 0.0
        )

    def __iter__(self) -> Iterator[StreamedPosterior]:
        """Yield the posterior after each further time with the readings of the map's data."""
        while self.count < len(self.times):
            yield self.update()

    def update(self, values: ArrayLike | None = None) -> StreamedPosterior:
        """Add the readings of the next time (collective).

        Parameters
        ----------
        values
            The readings at the time ``times[count]``, in the order of ``numbers[count]``, NaN or masked where one is
            missing; default: those of the posterior's data.

        Returns
        -------
        StreamedPosterior
            The posterior of all readings so far; it stays as it is when further ones are added.

        Raises
        ------
        InputError
            On every rank, if there is no further time, or the values do not fit.
        """
        comm = self._of.F.spacetime.comm
        given = collectively(comm, "", self._checked, values)
        require_same(comm, readings=given)
        numbers, there, before = self.numbers[self.count], ~np.isnan(given), self.posterior
        p = len(before.numbers)
        if not there.all() and self._ahead:
            self.factor, self._ahead = self.factor.first(p), False
        if not self._ahead:
            self.factor.append(numbers[there])
        k = int(there.sum())
        L, V = self.factor.L[p : p + k], self.factor.V[p : p + k]
        residual = given[there] - self._residual_of_prior[numbers[there]]
        corner = L[:, p : p + k]
        y = _solved(corner, residual - L[:, :p] @ before._y)
        exponent = y @ y + 2 * np.log(corner.diagonal()).sum() + k * np.log(2 * np.pi)
        self.posterior = StreamedPosterior(
            self.factor if self._ahead else self.factor.first(p + k),
            float(self.times[self.count]),
            before.x + self._of.F.partition.spread((y @ V)[None])[0],
            before._squares + (V**2).sum(axis=0),
            np.concatenate([before._y, y]),
            before.log_evidence() - 0.5 * float(exponent),
        )
        self.count += 1
        return self.posterior

    def until(self, time: float) -> StreamedPosterior:
        """Add the readings of the map's data up to a time, this included, and return the posterior (collective).

        Raises
        ------
        InputError
            On every rank, if the stream has later readings already.
        """
        slack = 2 * _SAME_TIME * self._of.F.propagator.evolution.dt
        if self.count and self.times[self.count - 1] > time + slack:
            raise InputError(
                f"until({time:g}): the stream has the readings up to {self.times[self.count - 1]:g}: start a new one "
                "by posterior.stream()"
            )
        while self.count < len(self.times) and self.times[self.count] <= time + slack:
            self.update()
        return self.posterior

    def _checked(self, values: ArrayLike | None) -> np.ndarray:
        """The readings of the next time as floats, NaN where they are missing."""
        if self.count == len(self.times):
            raise InputError(f"update: the stream has the readings of all {len(self.times)} times")
        numbers = self.numbers[self.count]
        if values is None:
            return self._of.data[numbers]
        try:
            masked = np.ma.array(values, dtype=float)
        except (TypeError, ValueError) as error:
            raise InputError(f"update: {values!r}: give {len(numbers)} numbers") from error
        given = masked.filled(np.nan).ravel()
        if given.shape != (len(numbers),) or np.isinf(given).any():
            raise InputError(
                f"update: readings of shape {masked.shape}: give {len(numbers)} numbers for the time "
                f"{self.times[self.count]:g}, NaN where one is missing"
            )
        return given
