r"""Storage of vectors that depend on time as coefficients in a small basis.

In most problems such vectors are sums of a few fields with factors in time. The basis is orthonormal on this rank's
part of them, made by Gram-Schmidt (twice) from vectors at some times of the whole interval: so it is the same on all
ranks in time, and the vectors are bitwise identical on them. Vectors that are not in its span are not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import numpy as np
from mpi4py import MPI

__all__ = ["MOST", "CompressedVectors", "sample_times"]

MOST = 16
"""Largest number of vectors of a basis."""
ROUND_OFF = 4e-15
"""Largest remainder of a vector outside the basis, relative to the vector."""


class CompressedVectors:
    """Vectors ``(n,)`` by key.

    Parameters
    ----------
    comm
        The ranks that share a vector (mpi4py): all or none of them store it, as computing it again is collective.
    samples
        Functions that compute the vectors of which the basis is made, at most ``MOST``.
    floor
        Largest norm of a remainder besides round-off: the noise of vectors that are differences of larger ones.
    """

    def __init__(self, comm: MPI.Comm, samples: Iterable[Callable[[], np.ndarray]], *, floor: float = 0.0):
        self._comm, self._samples, self._floor = comm, list(samples), floor
        self._basis: np.ndarray | None = None  # (vectors, n)
        self._coefficients: dict[Hashable, np.ndarray] = {}

    def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        """A vector ``(n,)``; ``make`` computes it where it is not stored (collective)."""
        if self._basis is None:
            self._make_basis()
        if key not in self._coefficients:
            vector = make()
            c, rest = self._split(vector)
            fits = bool(np.linalg.norm(rest) <= ROUND_OFF * np.linalg.norm(vector) + self._floor)
            if not self._comm.allreduce(fits, op=MPI.LAND):
                return vector
            self._coefficients[key] = c
        return self._basis.T @ self._coefficients[key]

    def _make_basis(self) -> None:
        samples, self._samples = self._samples, []  # they refer to the owner of this object
        for make in samples:
            vector = make()
            if self._basis is None:
                self._basis = np.zeros((0, len(vector)))
            rest = self._split(vector)[1]
            norm = np.linalg.norm(rest)
            if norm > ROUND_OFF * np.linalg.norm(vector) + self._floor:
                self._basis = np.vstack([self._basis, rest / norm])

    def _split(self, vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients of a vector in the basis, and the part that is orthogonal to it."""
        c, rest = np.zeros(len(self._basis)), vector.copy()
        for _ in range(2):
            for i, b in enumerate(self._basis):
                d = b @ rest
                c[i] += d
                rest -= d * b
        return c, rest


def sample_times(first: float, last: float) -> np.ndarray:
    """``MOST`` equidistant times inside an interval."""
    return first + (last - first) * (np.arange(MOST) + 0.5) / MOST
