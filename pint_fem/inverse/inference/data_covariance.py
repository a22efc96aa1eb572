r"""The covariance of the readings under the prior, :math:`F \Gamma F^T`, and that with the controls, :math:`F \Gamma`.

Static controls have reduced rows :math:`F = Q C` (:mod:`pint_fem.inverse.reduction`), so that one product with the
prior covariance for each of them is enough; with controls that have one value per step, :math:`Q = I`.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pint_fem.inverse.laws.priors import Prior
    from pint_fem.inverse.map import ParameterToObservable

__all__ = ["DataCovariance"]

_ROWS = 256
"""Rows of the map with which the prior covariance is multiplied at once."""


class DataCovariance:
    """``F Γ F^T = Q G Q^T`` and ``F Γ = Q D`` of a map and a prior (collective).

    Parameters
    ----------
    F
        The map.
    prior
        The prior, with the weight one.

    Attributes
    ----------
    G : ndarray, shape (r, r)
        On every rank; ``r = m`` where rows are not reduced.
    D : ndarray, shape (r, own)
        Primal vectors, the entries that this rank works on (:mod:`pint_fem.inverse.partition`).
    """

    def __init__(self, F: ParameterToObservable, prior: Prior):
        spacetime, partition, m = F.spacetime, F.partition, F.shape[0]
        self._F = F
        if not F.layout.evolution.stepwise:
            rows = F.reduced
            self.D = partition.columns(prior.covariance(rows.C, shared=False))
            own = partition.columns(rows.C)
        else:
            units, parts = np.eye(m), [(np.zeros((0, len(partition.own))),) * 2]
            for first in range(0, m, _ROWS):
                g = F.transposed_product(units[first : first + _ROWS])
                parts.append((g[:, partition.own], prior.covariance(g)[:, partition.own]))
            own, self.D = (np.concatenate(part) for part in zip(*parts, strict=True))
        G = spacetime.sum_over_grid(own @ self.D.T)
        self.G = 0.5 * (G + G.T)

    @cached_property
    def Q(self) -> np.ndarray:
        """The matrix ``(m, r)`` from reduced readings to readings, on every rank; the identity where rows are not
        reduced.
        """
        m = self._F.shape[0]
        if self._F.layout.evolution.stepwise:
            return np.eye(m)
        return np.ascontiguousarray(self._F.reduced.expand(np.eye(self._F.reduced.size), m).T)

    def between(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Covariances ``(rows, others)`` of readings of some numbers with others."""
        return self.Q[rows] @ self.G @ self.Q[others].T

    def with_controls(self, rows: np.ndarray) -> np.ndarray:
        """Rows of ``F Γ`` of readings of some numbers, own entries ``(rows, own)``."""
        return self.Q[rows] @ self.D
