r"""The posterior of the readings up to a time, for each time in turn as readings come in.

With the readings in the order of time, their covariance :math:`K = F \Gamma F^T / \alpha + N = L L^T` and :math:`V =
L^{-1} F \Gamma / \alpha`, the posterior of the first :math:`p` readings has

.. math::
    z = m_0 + V_p^T y_p, \qquad \mathrm{Cov} = \Gamma / \alpha - V_p^T V_p, \qquad
    -2 \log \pi(d_p) = |y_p|^2 + 2 \log\det L_p + p \log 2\pi, \qquad y = L^{-1} r ,

where :math:`L_p` and :math:`V_p` are the first rows of :math:`L` and :math:`V`: those of a further time are added to
what there is, as in a Kalman filter of a constant state. :math:`L` and :math:`V` do not depend on the readings and are
computed once for all times (:mod:`~pint_fem.inverse.inference.innovations`); a time is then a product with its rows.
Where a reading turns out to be missing, the rows of all later times are computed as they come.

Source: A. H. Sayed, T. Kailath, IEEE Signal Process. Mag. 11(3), 1994 (innovations).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from pint_fem.collective import collectively, require_same
from pint_fem.errors import InputError
from pint_fem.inverse.inference.gaussian_law import GaussianLaw
from pint_fem.inverse.inference.innovations import InnovationFactor, innovation_factor

if TYPE_CHECKING:
    from pint_fem.inverse.posterior import GaussianPosterior

__all__ = ["ReadingStream", "StreamedPosterior"]

_SAME_TIME = 1e-9
"""Readings whose times differ by less than this part of a step belong together."""
_SAMPLES = 2**40
"""What is added to the seed of samples for the noise in them."""


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
        readings: np.ndarray,
        log_evidence: float,
    ):
        self.F, self._factor, self._of = factor.posterior.F, factor, factor.posterior
        self.time, self.x, self._readings = time, x, readings
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
        y = self._factor.innovations(differences)
        return self.x + x - self.F.partition.spread(y @ self._factor.V[:p])

    def log_evidence(self) -> float:
        """The logarithm of the probability density of its readings, the controls integrated out."""
        return self._log_evidence

    def misfit(self) -> float:
        """The squared norm of the residual of its readings at the mean, relative to the noise."""
        there = np.zeros(len(self._of.data), dtype=bool)
        there[self.numbers] = True
        r = self._readings[np.argsort(self.numbers)] - self.predicted[there]
        return float(r @ self._of.noise.restricted(there).inverse(r[None])[0]) if len(r) else 0.0


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
        if F.sweeps is None:
            raise InputError(
                "stream: the map is that of a sum, or of an initial condition that is an expression, without common "
                "times: make the map of one evolution, or leave later readings out and give posterior()"
            )
        self._of, table, ev = posterior, F.table, F.propagator.evolution
        place = table.point - 1 + table.theta
        order = np.argsort(np.round(place / _SAME_TIME), kind="stable")
        starts = np.flatnonzero(np.diff(place[order], prepend=-np.inf) > 2 * _SAME_TIME)
        ends = [*starts.tolist(), len(order)]
        self.numbers = [np.sort(order[a:b]) for a, b in pairwise(ends)]
        self.times = ev.t0 + ev.dt * place[order[starts]]
        if factor is None:
            factor = innovation_factor(posterior)
            factor.append_all(self.numbers)
        self.factor, self._ahead = factor, True
        self._predicted_by_prior = posterior.F.predict(posterior.prior.mean)
        self.count = 0
        self.posterior = StreamedPosterior(
            factor, None, posterior.prior.mean.copy(), np.zeros(len(F.partition.own)), *np.zeros((2, 0)), 0.0
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
        V, corner = self.factor.V[p : p + k], self.factor.corner(p, k)
        residual = given[there] - self._predicted_by_prior[numbers[there]]
        y = self.factor.innovation(p, residual, before._y)
        exponent = y @ y + 2 * np.log(corner.diagonal()).sum() + k * np.log(2 * np.pi)
        self.posterior = StreamedPosterior(
            self.factor if self._ahead else self.factor.first(p + k),
            float(self.times[self.count]),
            before.x + self._of.F.partition.spread((y @ V)[None])[0],
            before._squares + (V**2).sum(axis=0),
            np.concatenate([before._y, y]),
            np.concatenate([before._readings, given[there]]),
            before.log_evidence() - 0.5 * float(exponent),
        )
        self.count += 1
        return self.posterior

    def until(self, time: float) -> StreamedPosterior:
        """Add the readings of the map's data up to a time, this included, and return the posterior (collective).

        Raises
        ------
        InputError
            On every rank, if it is no number, not the same on all ranks, or the stream has later readings already.
        """
        require_same(self._of.F.spacetime.comm, time=time)
        if not isinstance(time, Real) or np.isnan(time):
            raise InputError(f"until: time = {time!r}: give a number")
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
