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

from pint_fem.spacetime import SpaceTime

__all__ = ["ReducedRows"]

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
