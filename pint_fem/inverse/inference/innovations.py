r"""Triangular factors of the covariance of readings in an order, and what their rows are to the controls.

With :math:`K = F \Gamma F^T / \alpha + N = L L^T` these are the rows of :math:`L` and of :math:`V = L^{-1} F \Gamma /
\alpha`, appended for one set of readings after another (:mod:`pint_fem.inverse.inference.streaming`).

* In the space of the readings :math:`L` is the factor of the dense matrix.
* In the space of few controls, with :math:`F = B V_0^T A`, :math:`\Gamma = V_0 V_0^T` and independent noise, the
  covariance :math:`K_t` of the coefficients after the readings so far gives the next rows: :math:`L_{tt} L_{tt}^T = B_t
  K_t B_t^T + N_t`, :math:`X_t = L_{tt}^{-1} B_t K_t`, :math:`K_{t+1} = K_t - X_t^T X_t`. Outside its diagonal blocks
  :math:`L_{ts} = B_t X_s^T`, of which only the factors are stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import cholesky, solve_triangular

from pint_fem.capacity import require_memory
from pint_fem.collective import on_first_rank
from pint_fem.inverse.inference.data_covariance import DataCovariance
from pint_fem.inverse.spectra import ParameterSpace

if TYPE_CHECKING:
    from pint_fem.inverse.posterior import GaussianPosterior

__all__ = ["InnovationFactor", "ParameterInnovations", "ReadingInnovations", "innovation_factor"]


class InnovationFactor(ABC):
    """Rows of ``L`` and ``V`` for readings in the order in which they are appended (collective).

    Parameters
    ----------
    posterior
        Prior, noise, map and weight of the prior.

    Attributes
    ----------
    order : ndarray of int, shape (p,)
        Numbers of the readings.
    V : ndarray, shape (p, own)
        The entries that this rank works on.
    """

    def __init__(self, posterior: GaussianPosterior):
        self.posterior = posterior
        self.order = np.zeros(0, dtype=int)
        self.V = np.zeros((0, len(posterior.F.partition.own)))

    @cached_property
    def prior_variance(self) -> np.ndarray:
        """Variances of the prior with its weight, ``(layout.size,)`` (collective when first used)."""
        return self.posterior.prior.variance() / self.posterior.alpha

    @abstractmethod
    def append(self, numbers: np.ndarray) -> None:
        """Append the rows of readings of some numbers (collective)."""

    @abstractmethod
    def append_all(self, numbers: Sequence[np.ndarray]) -> None:
        """Append the rows of several sets of readings (collective)."""

    @abstractmethod
    def first(self, p: int) -> InnovationFactor:
        """A copy with the first ``p`` readings only, those of whole sets."""

    @abstractmethod
    def corner(self, p: int, k: int) -> np.ndarray:
        """The diagonal block of ``L`` of the set of ``k`` readings that begins with row ``p``."""

    @abstractmethod
    def innovation(self, p: int, residual: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Rows of ``L^{-1} r`` of the set that begins with row ``p``, from its residual ``(..., k)`` and the rows
        before, ``(..., p)``.
        """

    @abstractmethod
    def innovations(self, r: np.ndarray) -> np.ndarray:
        """``L^{-1} r`` for several vectors of the first readings, ``(count, p)``."""


class ReadingInnovations(InnovationFactor):
    """The factor of the dense covariance of the readings."""

    def __init__(self, posterior: GaussianPosterior):
        super().__init__(posterior)
        F = posterior.F
        m, own = F.shape[0], len(F.partition.own)
        _require_memory(posterior, m * (3 * m + 2 * own))
        self._covariance, self.L = DataCovariance(F, posterior.prior), np.zeros((0, 0))

    def append(self, numbers: np.ndarray) -> None:
        """Append a block of rows to the factor."""
        alpha, noise, p = self.posterior.alpha, self.posterior.noise, len(self.order)
        order = np.concatenate([self.order, numbers])
        units = np.zeros((len(numbers), noise.size))
        units[np.arange(len(numbers)), numbers] = 1.0

        def factored() -> tuple[np.ndarray, np.ndarray]:
            S = self._covariance.between(numbers, order) / alpha + noise.covariance(units)[:, order]
            X = _solved(self.L, S[:, :p].T)
            return X, cholesky(S[:, p:] - X.T @ X, lower=True, check_finite=False)

        X, corner = on_first_rank(self.posterior.F.spacetime.comm, "posterior", factored)
        D = self._covariance.with_controls(numbers) / alpha - X.T @ self.V
        self.V = np.concatenate([self.V, _solved(corner, D)])
        self.L = np.block([[self.L, np.zeros((p, len(numbers)))], [X.T, corner]])
        self.order = order

    def append_all(self, numbers: Sequence[np.ndarray]) -> None:
        """Append all rows by one factorisation."""
        self.append(np.concatenate([np.zeros(0, dtype=int), *numbers]))

    def first(self, p: int) -> ReadingInnovations:
        """A copy with the leading block of the factor."""
        made = copy(self)
        made.order, made.L, made.V = self.order[:p], self.L[:p, :p], self.V[:p]
        return made

    def corner(self, p: int, k: int) -> np.ndarray:
        """The diagonal block of some rows."""
        return self.L[p : p + k, p : p + k]

    def innovation(self, p: int, residual: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Forward substitution with the rows of a set."""
        k = residual.shape[-1]
        return _solved(self.corner(p, k), (residual - y @ self.L[p : p + k, :p].T).T).T

    def innovations(self, r: np.ndarray) -> np.ndarray:
        """Forward substitution."""
        p = r.shape[-1]
        return _solved(self.L[:p, :p], r.T).T


class ParameterInnovations(InnovationFactor):
    """The factor in the coefficients of a posterior that is computed in the space of the controls."""

    def __init__(self, posterior: GaussianPosterior):
        super().__init__(posterior)
        F, modes = posterior.F, len(posterior.spectrum.lam)
        m, own = F.shape[0], len(F.partition.own)
        _require_memory(posterior, m * (2 * modes + own) + 3 * modes**2)
        self._B = np.ascontiguousarray(F.product(posterior.spectrum.expand(np.eye(modes))).T)
        self._K, self._X = np.eye(modes) / posterior.alpha, np.zeros((0, modes))
        self._starts: list[int] = []
        self._corners: list[np.ndarray] = []

    def append(self, numbers: np.ndarray) -> None:
        """Append a set of rows, whose covariance is that given the readings before."""
        self.append_all([numbers])

    def append_all(self, numbers: Sequence[np.ndarray]) -> None:
        """Append the rows of one set after another."""
        variance, comm = self.posterior.noise.variance(), self.posterior.F.spacetime.comm
        made, starts, corners, place = [np.zeros((0, len(self._K)))], [], [], len(self.order)
        for some in numbers:
            if not len(some):
                continue
            corner, X = on_first_rank(comm, "posterior", _conditioned, self._B[some], self._K, variance[some])
            self._K = self._K - X.T @ X
            starts.append(place)
            corners.append(corner)
            made.append(X)
            place += len(some)
        rows = np.concatenate(made)
        self._starts, self._corners = self._starts + starts, self._corners + corners
        self._X, self.order = np.concatenate([self._X, rows]), np.concatenate([self.order, *numbers])
        self.V = np.concatenate([self.V, rows @ self.posterior.spectrum.W])

    def first(self, p: int) -> ParameterInnovations:
        """A copy with the first readings; the covariance of the coefficients is that after these."""
        made, count = copy(self), int(np.searchsorted(self._starts, p))
        made._starts, made._corners = self._starts[:count], self._corners[:count]
        made.order, made._X, made.V = self.order[:p], self._X[:p], self.V[:p]
        if p < len(self.order):
            made._K = np.eye(len(self._K)) / self.posterior.alpha - made._X.T @ made._X
        return made

    def corner(self, p: int, k: int) -> np.ndarray:
        """The stored block of a set."""
        return self._corners[int(np.searchsorted(self._starts, p))] if k else np.zeros((0, 0))

    def innovation(self, p: int, residual: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The residual of the mean of the coefficients after the readings before, relative to its covariance."""
        k = residual.shape[-1]
        mean = y @ self._X[:p]
        return _solved(self.corner(p, k), (residual - mean @ self._B[self.order[p : p + k]].T).T).T

    def innovations(self, r: np.ndarray) -> np.ndarray:
        """The innovations of one set after another."""
        y, p = np.zeros((len(r), 0)), r.shape[-1]
        for a, b in zip(self._starts, [*self._starts[1:], len(self.order)], strict=True):
            if a < p:
                y = np.concatenate([y, self.innovation(a, r[:, a:b], y)], axis=1)
        return y


def _conditioned(B: np.ndarray, K: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``L`` of ``B K B^T`` and independent noise, and ``L^{-1} B K``."""
    Y = B @ K
    corner = cholesky(Y @ B.T + np.diag(variance), lower=True, check_finite=False)
    return corner, _solved(corner, Y)


def innovation_factor(posterior: GaussianPosterior) -> InnovationFactor:
    """The factor of a posterior, without readings yet, in the smaller one of the spaces of readings and of controls."""
    if isinstance(posterior.spectrum, ParameterSpace) and posterior.noise.is_diagonal:
        return ParameterInnovations(posterior)
    return ReadingInnovations(posterior)


def _require_memory(posterior: GaussianPosterior, numbers: int) -> None:
    require_memory(
        posterior.F.spacetime.comm,
        8 * numbers,
        f"factors of the covariance of {posterior.F.shape[0]} readings for a stream of them",
        "give fewer readings, or more ranks",
    )


def _solved(L: np.ndarray, right: np.ndarray) -> np.ndarray:
    """``L^{-1}`` times columns."""
    return solve_triangular(L, right, lower=True, check_finite=False) if len(L) else right
