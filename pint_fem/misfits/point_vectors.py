"""Vectors (or numbers) that depend on time, one per local point: stored, stored in a small basis, or recomputed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from mpi4py import MPI

from pint_fem.kernels.compressed_vectors import MOST, CompressedVectors, sample_times

__all__ = ["PointVectors"]


class PointVectors:
    """A vector ``v(t_n)`` for each local point ``n``.

    Parameters
    ----------
    make
        ``make(time)`` computes the vector of a time, ``(size,)`` or a number; collective over space.
    times, active
        Times of the local points, and which of them have a vector that is not zero, ``(k + 1,)``.
    size
        Length of a vector, ``None`` for a number.
    moves, span
        Whether the vectors depend on time (otherwise a single one is stored); first and last time of all ranks.
    store
        Whether the vector of each active point is stored; otherwise it is represented in a basis of a few vectors and
        computed again where it is not in their span (:class:`~pint_fem.kernels.compressed_vectors.CompressedVectors`).
    comm, floor
        Ranks that share a vector; norm of what a representation may lack besides the vector's round-off.
    """

    def __init__(
        self, make: Callable[[float], np.ndarray | float], *, times: np.ndarray, active: np.ndarray, size: int | None,
        moves: bool, span: tuple[float, float], store: bool, comm: MPI.Comm, floor: float = 0.0,
    ):  # fmt: skip
        self._make, self._times, self._active, self.moves = make, times, active, moves
        self._shape = () if size is None else (size,)
        self._place = np.cumsum(active) - 1  # of a point among the stored vectors
        self._basis = self._stored = None
        if moves and not store:
            self._basis = CompressedVectors(comm, [partial(make, time) for time in sample_times(*span)], floor=floor)
        else:
            self._stored = self._compute(times[active] if moves else times[:1])
            self._make = None

    def _compute(self, times) -> np.ndarray:
        out = np.empty((len(times), *self._shape))
        for row, time in enumerate(times):
            make = partial(self._make, float(time))
            out[row] = make() if self._basis is None else self._basis.get(float(time), make)
        return out

    def at(self, time: float) -> np.ndarray | float:
        """The vector of a time; where vectors are stored per point, of the time of an active point."""
        if self._stored is None:
            return self._compute([time])[0]
        return self._stored[np.flatnonzero(self._times[self._active] == time)[0] if self.moves else 0]

    def __getitem__(self, points: slice) -> np.ndarray:
        """Vectors of some points, ``(b, size)``; one row ``(1, size)`` where they do not depend on time."""
        if not self.moves:
            return self._stored
        active = self._active[points]
        out = np.zeros((len(active), *self._shape))
        stored = self._stored is not None
        out[active] = (
            self._stored[self._place[points][active]] if stored else self._compute(self._times[points][active])
        )
        return out

    @property
    def is_zero(self) -> bool:
        """Whether all vectors of this rank are stored and zero."""
        return self._stored is not None and not self._stored.any()

    @property
    def nbytes(self) -> int:
        """Bytes of the stored vectors, or of a full basis."""
        return 8 * self._shape[0] * MOST if self._stored is None else self._stored.nbytes
