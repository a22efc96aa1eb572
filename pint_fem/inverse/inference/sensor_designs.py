r"""Values of sets of sensors, and greedy choices among them, in the space of the readings or of the controls.

In the space of the readings these are the matrices :math:`I + G` and :math:`H` of all sensors
(:mod:`pint_fem.inverse.inference.sensor_choice`), which are conditioned on the chosen sensors by Schur complements. In
the space of few controls, with :math:`\Gamma = V V^T` and :math:`B_s = N_s^{-1/2} F_s V`, they are

.. math::
    G_{st} = B_s R B_t^T, \qquad H_{st} = B_s R X R B_t^T, \qquad R = \Big(I + \sum_{s \in S} B_s^T B_s\Big)^{-1},
    \qquad X = V^T M V ,

conditioned by updates of :math:`B R` of the rank of a sensor's readings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy.linalg import cholesky, solve_triangular

__all__ = ["ParameterDesign", "ReadingDesign", "SensorDesign"]


class SensorDesign(ABC):
    """Values of sets of sensors."""

    sensors: int
    """Number of sensors."""

    @abstractmethod
    def value(self, sensors: Sequence[int]) -> float:
        """The criterion of a set of sensors: the logarithm of the determinant, or the trace of the covariance."""

    @abstractmethod
    def contributions(self, sensors: Sequence[int]) -> np.ndarray:
        """What each sensor of a set adds to the others, ``(len(sensors),)``: by how much the logarithm of the
        determinant is less, or the trace of the covariance more, without it.
        """

    @abstractmethod
    def choose(self, count: int, candidates: Sequence[int]) -> tuple[list[int], list[float]]:
        """Choose one sensor after another, each time the one that adds most; of equal ones the first.

        Returns
        -------
        order : list of int
            The chosen sensors.
        values : list of float
            The criterion before the first and after each.
        """


def _gain(P: np.ndarray, H: np.ndarray | None) -> float:
    """What readings add whose blocks of ``I + G`` and of ``H`` are given."""
    if not len(P):
        return 0.0
    L = cholesky(P, lower=True, check_finite=False)
    if H is None:
        return float(2 * np.log(L.diagonal()).sum())
    half = solve_triangular(L, H, lower=True, check_finite=False)
    return float(np.trace(solve_triangular(L, half.T, lower=True, check_finite=False)))


class ReadingDesign(SensorDesign):
    """In the space of the readings.

    Parameters
    ----------
    G
        Covariance of the reduced readings of all sensors, relative to their noise, ``(r, r)``.
    blocks
        The rows of each sensor.
    H
        ``B Γ M Γ B^T``, ``(r, r)``, for the trace of the covariance; default: the criterion is the determinant.
    trace
        Trace of the prior covariance.
    """

    def __init__(self, G: np.ndarray, blocks: Sequence[slice], H: np.ndarray | None = None, trace: float = 0.0):
        self.blocks, self.trace, self._H = list(blocks), trace, H
        self.sensors = len(self.blocks)
        self._P = np.eye(len(G)) + 0.5 * (G + G.T)

    def _rows(self, sensors: Sequence[int]) -> tuple[np.ndarray, list[slice]]:
        """The rows of some sensors, and where those of each are among them."""
        rows = [np.arange(self.blocks[s].start, self.blocks[s].stop) for s in sensors]
        ends = np.cumsum([0, *map(len, rows)]).tolist()
        places = [slice(a, b) for a, b in pairwise(ends)]
        return np.concatenate([np.zeros(0, dtype=int), *rows]), places

    def _after(self, gains: float) -> float:
        return gains if self._H is None else self.trace - gains

    def value(self, sensors: Sequence[int]) -> float:
        """By the blocks of the sensors."""
        rows, _ = self._rows(sensors)
        at = np.ix_(rows, rows)
        return self._after(_gain(self._P[at], None if self._H is None else self._H[at]))

    def contributions(self, sensors: Sequence[int]) -> np.ndarray:
        """By the blocks of the inverse of ``I + G``."""
        rows, places = self._rows(sensors)
        at = np.ix_(rows, rows)
        L = cholesky(self._P[at], lower=True, check_finite=False)
        half = solve_triangular(L, np.eye(len(L)), lower=True, check_finite=False)
        R = half.T @ half
        if self._H is None:
            return np.array([-float(np.linalg.slogdet(R[p, p])[1]) for p in places])
        X = R @ self._H[at] @ R
        return np.array([float(np.trace(np.linalg.solve(R[p, p], X[p, p]))) for p in places])

    def choose(self, count: int, candidates: Sequence[int]) -> tuple[list[int], list[float]]:
        """By Schur complements of the chosen sensors."""
        rows, places = self._rows(candidates)
        at = np.ix_(rows, rows)
        P, H = self._P[at], None if self._H is None else self._H[at]
        left, order, total = dict(zip(candidates, places, strict=True)), [], 0.0
        values = [self._after(0.0)]
        for _ in range(count):
            gains = {s: _gain(P[p, p], None if H is None else H[p, p]) for s, p in left.items()}
            best = max(gains, key=gains.__getitem__)
            total += gains[best]
            order.append(best)
            values.append(self._after(total))
            p = left.pop(best)
            L = cholesky(P[p, p], lower=True, check_finite=False)
            X = solve_triangular(L, P[p], lower=True, check_finite=False)
            if H is not None:
                Y = solve_triangular(L, H[p], lower=True, check_finite=False)
                Z = solve_triangular(L, Y[:, p].T, lower=True, check_finite=False)
                cross = X.T @ (Y - 0.5 * Z @ X)
                H = H - cross - cross.T
            P = P - X.T @ X
        return order, values


class ParameterDesign(SensorDesign):
    """In the space of the controls.

    Parameters
    ----------
    B
        Readings of unit coefficients, relative to the noise, ``(m, n)``.
    rows
        The rows of each sensor.
    X
        ``V^T M V``, ``(n, n)``, for the trace of the covariance; default: the criterion is the determinant.
    """

    def __init__(self, B: np.ndarray, rows: Sequence[np.ndarray], X: np.ndarray | None = None):
        self._B = [B[own] for own in rows]
        self.sensors, self._X = len(self._B), X
        self._n = B.shape[1]

    def _precision(self, sensors: Sequence[int]) -> np.ndarray:
        return sum((self._B[s].T @ self._B[s] for s in sensors), np.eye(self._n))

    def value(self, sensors: Sequence[int]) -> float:
        """By the precision of the coefficients."""
        K = self._precision(sensors)
        return float(np.linalg.slogdet(K)[1] if self._X is None else np.trace(np.linalg.solve(K, self._X)))

    def contributions(self, sensors: Sequence[int]) -> np.ndarray:
        """By the inverse of the precision of the coefficients."""
        R, out = np.linalg.inv(self._precision(sensors)), []
        for s in sensors:
            BR = self._B[s] @ R
            left = np.eye(len(BR)) - BR @ self._B[s].T
            if self._X is None:
                out.append(-float(np.linalg.slogdet(left)[1]))
            else:
                out.append(float(np.trace(np.linalg.solve(left, BR @ self._X @ BR.T))))
        return np.array(out)

    def choose(self, count: int, candidates: Sequence[int]) -> tuple[list[int], list[float]]:
        """By updates of the rows of all candidates."""
        B = np.concatenate([self._B[s] for s in candidates])
        ends = np.cumsum([0, *(len(self._B[s]) for s in candidates)]).tolist()
        left = {s: slice(a, b) for s, a, b in zip(candidates, ends[:-1], ends[1:], strict=True)}
        BR, C, order, total = B.copy(), None, [], 0.0
        if self._X is not None:
            C = cholesky(self._X, lower=True, check_finite=False)
            BRC, total = B @ C, float(np.trace(self._X))
        values = [total]
        for _ in range(count):
            gains = {}
            for s, p in left.items():
                H = None if C is None else BRC[p] @ BRC[p].T
                gains[s] = _gain(np.eye(p.stop - p.start) + BR[p] @ B[p].T, H)
            best = max(gains, key=gains.__getitem__)
            total += gains[best] if C is None else -gains[best]
            order.append(best)
            values.append(total)
            p = left.pop(best)
            L = cholesky(np.eye(p.stop - p.start) + BR[p] @ B[p].T, lower=True, check_finite=False)
            Y = solve_triangular(L, BR[p], lower=True, check_finite=False)
            E = B @ Y.T
            BR -= E @ Y
            if C is not None:
                BRC -= E @ (Y @ C)
        return order, values
