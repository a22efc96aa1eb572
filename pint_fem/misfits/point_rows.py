"""Rows that depend on time, one for each point of a slab: kept, kept in a small space, or computed when asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from pint_fem.kernels.compressed_vectors import MOST, CompressedVectors, sample_times

__all__ = ["PointRows"]


class PointRows:
    """A row, or a number, for each point.

    Parameters
    ----------
    make
        ``make(time)`` computes the row of a time, ``(size,)`` or a number; collective over space.
    times
        Of the points.
    wanted
        Points whose rows are not zero, ``(k + 1,)``.
    size
        Length of a row, ``None`` for a number.
    moves
        Whether rows depend on time; else one row is all there is.
    span
        First and last time of all ranks.
    keep
        Whether a row is kept for each point that is wanted.
    comm
        Of the ranks that share a row.
    floor
        Norm of what may be left of a row where rows are kept in a small space, besides round-off of the row.
    """

    def __init__(
        self,
        make: Callable[[float], np.ndarray | float],
        *,
        times: np.ndarray,
        wanted: np.ndarray,
        size: int | None,
        moves: bool,
        span: tuple[float, float],
        keep: bool,
        comm,
        floor: float = 0.0,
    ):
        self._make, self._times, self._wanted, self.moves = make, times, wanted, moves
        self._shape = () if size is None else (size,)
        self._place = np.cumsum(wanted) - 1  # among the kept rows
        self._space = self._rows = None
        if moves and not keep:
            samples = [partial(make, time) for time in sample_times(*span)]
            self._space = CompressedVectors(comm, samples, floor=floor)
        else:
            self._rows = self._computed(times[wanted] if moves else times[:1])
            self._make = None

    def _computed(self, times) -> np.ndarray:
        rows = np.empty((len(times), *self._shape))
        for row, time in enumerate(times):
            rows[row] = self._one(float(time))
        return rows

    def _one(self, time: float) -> np.ndarray | float:
        make = partial(self._make, time)
        return make() if self._space is None else self._space.get(time, make)

    def at(self, time: float) -> np.ndarray | float:
        """The row of a time, one of the wanted points' where rows are kept for each of them."""
        if self._rows is None:
            return self._one(float(time))
        if not self.moves:
            return self._rows[0]
        return self._rows[np.flatnonzero(self._times[self._wanted] == time)[0]]

    def __getitem__(self, where) -> np.ndarray:
        """Rows of some points, zero where they are not wanted; one row where all are the same."""
        if not self.moves:
            return self._rows
        wanted = self._wanted[where]
        out = np.zeros((len(wanted), *self._shape))
        kept = self._rows is not None
        out[wanted] = self._rows[self._place[where][wanted]] if kept else self._computed(self._times[where][wanted])
        return out

    @property
    def is_zero(self) -> bool:
        """Whether all rows of this rank are zero and will be."""
        return self._rows is not None and not self._rows.any()

    @property
    def nbytes(self) -> int:
        """Of what is kept, at most."""
        return 8 * self._shape[0] * MOST if self._rows is None else self._rows.nbytes
