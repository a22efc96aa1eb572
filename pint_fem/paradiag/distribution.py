r"""Redistribution of a trajectory between slabs of steps, chunks of degrees of freedom and chunks of frequencies.

====================  =================  =======================================
``"slab"``            ``(k_r, n)``       the own steps, all (local) unknowns
``"columns"``         ``(N, c_r)``       all steps, some unknowns: for transforms
``"frequencies"``     ``(f_r, n)``       some frequencies, all unknowns: for solves
====================  =================  =======================================

A rank sends each other one a block of its part (``Alltoallv``): no rank ever has the whole trajectory. Chunks of
unknowns begin at multiples of :data:`LANES`: vector units then process an unknown with the same neighbours whatever the
number of ranks, and transforms are bitwise identical.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from mpi4py import MPI

from pint_fem.all_at_once.grids import split_steps

__all__ = ["LANES", "TimeTransposes"]

LANES = 16
_TYPES = {"d": MPI.DOUBLE, "D": MPI.C_DOUBLE_COMPLEX, "f": MPI.FLOAT, "F": MPI.C_FLOAT_COMPLEX}


class TimeTransposes:
    """Maps between the three layouts.

    Parameters
    ----------
    comm
        Time communicator.
    bounds
        ``comm.size + 1`` step bounds of the slabs.
    frequencies
        Number of frequencies.
    size
        Local unknowns of a state, the same on all ranks of ``comm``.
    backwards
        The ranks are those of another communicator in reverse order, and have the same chunks of frequencies as there.

    Attributes
    ----------
    own : range
        Frequencies of this rank.
    own_columns : range
        Unknowns of this rank.
    rows : tuple of range
        Steps of each rank.
    sent : int
        Bytes that the last exchange has sent to other ranks.
    """

    def __init__(self, comm: MPI.Comm, bounds: Sequence[int], frequencies: int, size: int, *, backwards: bool = False):
        self.comm, self.size, self.steps, self.frequencies = comm, size, bounds[-1], frequencies
        self.rows = _ranges(tuple(bounds))
        self._columns = _chunks(size, comm.size)
        self.sent, self._memory = 0, {}
        self._places = own_frequencies(frequencies, comm.size, backwards=backwards)
        self.own_columns = self._columns[comm.rank]
        self.own = self._places[comm.rank]

    def to_columns(self, slab: np.ndarray) -> np.ndarray:
        """Slabs to columns, ``(k, n) -> (N, c)`` (collective)."""
        return slab if self.comm.size == 1 else self.spread(slab, self.rows)

    def from_columns(self, columns: np.ndarray) -> np.ndarray:
        """Columns to slabs, ``(N, c) -> (k, n)`` (collective)."""
        return columns if self.comm.size == 1 else self.collect(columns, self.rows)

    def to_frequencies(self, columns: np.ndarray) -> np.ndarray:
        """Columns of all frequencies to own frequencies, ``(frequencies, c) -> (f, n)`` (collective)."""
        return columns if self.comm.size == 1 else self.collect(columns, self._places)

    def from_frequencies(self, rows: np.ndarray) -> np.ndarray:
        """Own frequencies to columns of all frequencies, ``(f, n) -> (frequencies, c)`` (collective)."""
        return rows if self.comm.size == 1 else self.spread(rows, self._places)

    def spread(self, mine: np.ndarray, rows: Sequence[range]) -> np.ndarray:
        """All columns of own rows to own columns of all rows, in an array that the next call overwrites."""
        packed, place = self._buffer("packed", (mine.size,), mine.dtype), 0
        sizes = [len(mine) * len(c) for c in self._columns]
        for c, size in zip(self._columns, sizes, strict=True):
            packed[place : place + size].reshape(len(mine), len(c))[...] = mine[:, _part(c)]
            place += size
        out = self._buffer("spread", (sum(map(len, rows)), len(self.own_columns)), mine.dtype)
        self._exchange(packed, out, sizes, None, *self._counts(rows))
        return out

    def collect(self, columns: np.ndarray, rows: Sequence[range]) -> np.ndarray:
        """Own columns of all rows to all columns of own rows, in an array that the next call overwrites."""
        count = len(rows[self.comm.rank])
        packed = self._buffer("packed", (count * self.size,), columns.dtype)
        sizes = [count * len(c) for c in self._columns]
        self._exchange(np.ascontiguousarray(columns), packed, *self._counts(rows), sizes, None)
        out, place = self._buffer("collected", (count, self.size), columns.dtype), 0
        for c, size in zip(self._columns, sizes, strict=True):
            out[:, _part(c)] = packed[place : place + size].reshape(count, len(c))
            place += size
        return out

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array in memory that is allocated once: new memory costs about as much as a message."""
        count = int(np.prod(shape)) * dtype.itemsize
        memory = self._memory.get(name)
        if memory is None or len(memory) < count:
            memory = self._memory[name] = np.empty(count, np.uint8)
        return memory[:count].view(dtype).reshape(shape)

    def _counts(self, rows: Sequence[range]) -> tuple[list[int], list[int]]:
        """Sizes and places of the ranks' rows in an array of own columns."""
        width = len(self.own_columns)
        return [width * len(r) for r in rows], [width * r.start for r in rows]

    def _exchange(self, send, receive, send_counts, send_places, counts, places) -> None:
        kind = _TYPES[send.dtype.char]
        if send_places is None:
            send_places = _offsets(send_counts)
        if places is None:
            places = _offsets(counts)
        self.sent = (sum(send_counts) - send_counts[self.comm.rank]) * send.itemsize
        self.comm.Alltoallv([send, send_counts, send_places, kind], [receive, counts, places, kind])


@lru_cache(maxsize=64)
def own_frequencies(frequencies: int, size: int, *, backwards: bool = False) -> tuple[range, ...]:
    """The ranks' chunks of frequencies; ``backwards``: those of a communicator in reverse order."""
    chunks = _ranges(tuple(split_steps(frequencies, size)))
    return chunks[::-1] if backwards else chunks


# virtual ranks in one process share what does not depend on the rank
@lru_cache(maxsize=64)
def _chunks(size: int, ranks: int) -> tuple[range, ...]:
    """The ranks' chunks of unknowns."""
    return _ranges(tuple(min(LANES * b, size) for b in split_steps(-(-size // LANES), ranks)))


@lru_cache(maxsize=64)
def _ranges(bounds: tuple[int, ...]) -> tuple[range, ...]:
    return tuple(range(a, b) for a, b in pairwise(bounds))


def _part(r: range) -> slice:
    return slice(r.start, r.stop)


def _offsets(counts: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(counts[:-1]).tolist()] if len(counts) else []
