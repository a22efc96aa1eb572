r"""Rows of a map from controls to readings, reduced to as many for each sensor as are linearly independent.

The readings of a sensor at many times depend on few combinations of the controls: diffusion damps all others. With the
singular value decomposition :math:`F_s = Q_s C_s` of a sensor's rows, truncated at round-off, the map is :math:`F = Q
C` with orthonormal columns of :math:`Q`, block by block, and what is left of the readings outside the range of
:math:`Q` does not depend on the controls.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.linalg import qr, svd

from pint_fem.inverse.laws.noise import Noise
from pint_fem.spacetime import SpaceTime

__all__ = ["ReducedRows", "estimated_size"]

_SAMPLED = 2
"""Sensors of each rank from which the number of reduced rows is estimated."""

_ROUND_OFF = 1e-15
"""Singular values below this part of a sensor's largest one are left out."""


class ReducedRows:
    """``F = Q C`` for the rows of this rank in time.

    Parameters
    ----------
    rows
        Rows ``(readings, columns)`` of the sensors of this rank, own columns of this rank in space.
    sensors
        Slices of the rows of each sensor.
    numbers
        Numbers of the readings of these rows among all ``m`` readings.
    spacetime
        Process grid.

    Attributes
    ----------
    C : ndarray, shape (own reduced rows, columns)
    counts : ndarray of int
        Number of reduced rows of each rank in time.
    blocks : list of (ndarray, ndarray)
        Of all sensors of all ranks in time, one after another: the numbers of their readings, and ``Q_s``.
    """

    def __init__(self, rows: np.ndarray, sensors: Sequence[slice], numbers: np.ndarray, spacetime: SpaceTime):
        own, reduced = [], []
        for part in sensors:
            Q = _range(rows[part], spacetime)
            own.append((numbers[part], Q))
            reduced.append(Q.T @ rows[part])
        self.C = np.concatenate([np.zeros((0, rows.shape[1])), *reduced])
        comm = spacetime.time_comm
        everyone = [own] if comm.size == 1 else comm.allgather(own)
        self.counts = np.array([sum(Q.shape[1] for _, Q in blocks) for blocks in everyone])
        self.blocks = [block for blocks in everyone for block in blocks]

    @property
    def size(self) -> int:
        """Number of reduced rows of all ranks."""
        return int(self.counts.sum())

    def contract(self, y: np.ndarray) -> np.ndarray:
        """``Q^T y`` for several data vectors ``(k, m)``, ``(k, size)``."""
        return np.concatenate([np.zeros((len(y), 0)), *(y[:, numbers] @ Q for numbers, Q in self.blocks)], axis=1)

    def expand(self, c: np.ndarray, m: int) -> np.ndarray:
        """``Q c`` for several vectors ``(k, size)``, ``(k, m)``."""
        out, place = np.zeros((len(c), m)), 0
        for numbers, Q in self.blocks:
            out[:, numbers] = c[:, place : place + Q.shape[1]] @ Q.T
            place += Q.shape[1]
        return out

    def gram(self, noise: Noise, m: int) -> np.ndarray:
        """:math:`Q^T N^{-1} Q` for the noise of the ``m`` readings, ``(size, size)``."""
        if not noise.is_diagonal:
            return self.contract(noise.inverse(self.expand(np.eye(self.size), m)))
        precision, place = 1.0 / noise.variance(), 0
        out = np.zeros((self.size, self.size))
        for numbers, Q in self.blocks:
            own = slice(place, place + Q.shape[1])
            out[own, own] = Q.T @ (precision[numbers, None] * Q)
            place = own.stop
        return out


def estimated_size(rows: np.ndarray, sensors: Sequence[slice], spacetime: SpaceTime) -> float:
    """Number of reduced rows of all ranks if all sensors had as many as the first few of each rank (collective)."""
    some = sensors[:_SAMPLED]
    ranks = [_range(rows[part], spacetime).shape[1] for part in some]
    mean = float(np.mean(ranks)) if ranks else 0.0
    return sum(spacetime.time_comm.allgather(mean * len(sensors)))


def _range(rows: np.ndarray, spacetime: SpaceTime) -> np.ndarray:
    """An orthonormal basis of the range of a sensor's rows, ``(readings, rank)`` (collective over space)."""
    if not len(rows):
        return np.zeros((0, 0))
    R = _triangle(rows.T)
    comm = spacetime.space_comm
    if comm.size > 1:
        R = _triangle(np.concatenate(comm.allgather(R)))
    U, sigma, _ = svd(R.T, full_matrices=False, check_finite=False)
    rank = int((sigma > _ROUND_OFF * sigma[0]).sum()) if sigma[0] > 0 else 0
    Q = np.ascontiguousarray(U[:, :rank])
    return comm.bcast(Q) if comm.size > 1 else Q


def _triangle(columns: np.ndarray) -> np.ndarray:
    """The triangular factor of a QR factorisation."""
    if len(columns) <= columns.shape[1]:
        return columns
    return qr(columns, mode="r", overwrite_a=False, check_finite=False)[0][: columns.shape[1]]
