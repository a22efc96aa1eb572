r"""Vectors that depend on time, in little memory: in most problems they are sums of a few fields with factors in time.

Rows :math:`v(t)` are kept as coefficients in an orthonormal basis of this rank's part of them, made (by Gram-Schmidt,
twice) of rows at some times of the whole interval: so it is the same on all ranks in time, and so are the rows' bits.
Rows that are not in its span are not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import numpy as np
from mpi4py import MPI

__all__ = ["MOST", "RowSpace", "sample_times"]

MOST = 16
"""Vectors of a basis, at most."""
ROUND_OFF = 4e-15
"""What may be left of a row, relative to it."""


class RowSpace:
    """Rows ``(n,)`` by key.

    Parameters
    ----------
    comm
        Of the ranks that share a row (mpi4py): they keep a row all or none, as making it again is collective.
    samples
        What makes the rows that the basis is of, at most ``MOST``.
    floor
        Norm of what may be left of a row besides its round-off: noise of rows that are differences of larger ones.
    """

    def __init__(self, comm, samples: Iterable[Callable[[], np.ndarray]], *, floor: float = 0.0):
        self._comm, self._samples, self._floor = comm, list(samples), floor
        self._basis: np.ndarray | None = None  # (vectors, n)
        self._coefficients: dict[Hashable, np.ndarray] = {}

    def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        """A row, made if it is not kept."""
        if self._basis is None:
            self._begin()
        if key not in self._coefficients:
            row = make()
            c, rest = self._split(row)
            fits = bool(np.linalg.norm(rest) <= ROUND_OFF * np.linalg.norm(row) + self._floor)
            if not self._comm.allreduce(fits, op=MPI.LAND):
                return row
            self._coefficients[key] = c
        return self._basis.T @ self._coefficients[key]

    def _begin(self) -> None:
        samples, self._samples = self._samples, []  # they refer to who has this object
        for make in samples:
            row = make()
            if self._basis is None:
                self._basis = np.zeros((0, len(row)))
            rest = self._split(row)[1]
            norm = np.linalg.norm(rest)
            if norm > ROUND_OFF * np.linalg.norm(row) + self._floor:
                self._basis = np.vstack([self._basis, rest / norm])

    def _split(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients of a row, and what is orthogonal to the basis."""
        c, rest = np.zeros(len(self._basis)), row.copy()
        for _ in range(2):
            for i, b in enumerate(self._basis):
                d = b @ rest
                c[i] += d
                rest -= d * b
        return c, rest


def sample_times(first: float, last: float) -> np.ndarray:
    """``MOST`` times of an interval."""
    return first + (last - first) * (np.arange(MOST) + 0.5) / MOST
