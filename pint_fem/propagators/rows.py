r"""Vectors that depend on time, in little memory: in most problems they are sums of a few fields with factors in time.

Rows :math:`v(t)` are kept as coefficients in an orthonormal basis of this rank's part of them, which grows as rows come
(Gram-Schmidt, twice). Rows that would make it larger than its bound are not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import numpy as np
from mpi4py import MPI

__all__ = ["RowSpace"]

MOST = 16
"""Vectors of a basis."""
ROUND_OFF = 4e-15
"""What may be left of a row, relative to it."""


class RowSpace:
    """Rows ``(n,)`` by key.

    Parameters
    ----------
    comm
        Of the ranks that share a row (mpi4py): they keep a row all or none, as making it again is collective.
    most
        Vectors of the basis.
    """

    def __init__(self, comm, most: int = MOST):
        self._comm, self.most = comm, most
        self._basis: list[np.ndarray] = []
        self._coefficients: dict[Hashable, np.ndarray] = {}

    def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        """A row, made if it is not kept."""
        if key in self._coefficients:
            c = self._coefficients[key]
            return np.array(self._basis[: len(c)]).T @ c if len(c) else np.zeros(self._size)
        row = make()
        self._size = len(row)
        c, rest = self._split(row)
        norm, fits = np.linalg.norm(rest), True
        if norm > ROUND_OFF * np.linalg.norm(row):
            fits = len(self._basis) < self.most
        if self._comm.allreduce(fits, op=MPI.LAND):
            if norm > ROUND_OFF * np.linalg.norm(row):
                self._basis.append(rest / norm)
                c = np.append(c, norm)
            self._coefficients[key] = c
        return row

    def _split(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients of a row, and what is orthogonal to the basis."""
        c, rest = np.zeros(len(self._basis)), row.copy()
        for _ in range(2):
            for i, b in enumerate(self._basis):
                d = b @ rest
                c[i] += d
                rest -= d * b
        return c, rest

    @property
    def nbytes(self) -> int:
        """Of the largest basis; coefficients are a few numbers a row."""
        return sum(b.nbytes for b in self._basis)
