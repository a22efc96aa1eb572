"""Copies of small matrices and states on ranks in space, for work that is not divided by unknowns.

Either every rank has whole copies of all states (:meth:`Replication.gathered`), or each has those of its own share of
them (:meth:`Replication.divided`, and back :meth:`Replication.returned`), so that the ranks work on different states.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from firedrake.petsc import PETSc
from mpi4py import MPI
from scipy.sparse import csr_matrix

__all__ = ["Replication", "whole_matrix"]


def whole_matrix(matrix: PETSc.Mat) -> csr_matrix:
    """All rows of an assembled sparse matrix, on every rank (collective)."""
    if matrix.comm.size == 1:
        ptr, columns, values = matrix.getValuesCSR()
        return csr_matrix((values, columns, ptr), shape=matrix.getSize())
    rows, columns = (PETSc.IS().createStride(n, comm=PETSc.COMM_SELF) for n in matrix.getSize())
    (whole,) = matrix.createSubMatrices([rows], [columns])
    copied = whole_matrix(whole)
    for item in (whole, rows, columns):
        item.destroy()
    return copied


class Replication:
    """States whose unknowns are distributed over the ranks of a communicator, and copies of them on every rank.

    Parameters
    ----------
    size
        Number of own unknowns.
    comm
        Communicator in space.

    Attributes
    ----------
    own : slice
        The own unknowns among all.
    total : int
        Number of all unknowns.
    """

    def __init__(self, size: int, comm: MPI.Comm):
        self.comm, sizes = comm, comm.allgather(size)
        self._ends = np.cumsum([0, *sizes])
        self.own, self.total = slice(*self._ends[comm.rank : comm.rank + 2].tolist()), int(self._ends[-1])

    @cached_property
    def _sizes(self) -> np.ndarray:
        return np.diff(self._ends)

    def gathered(self, states: np.ndarray) -> np.ndarray:
        """All unknowns ``(..., total)`` of states ``(..., own)`` (collective)."""
        if self.comm.size == 1:
            return states
        states = np.ascontiguousarray(states, dtype=float)
        count = int(np.prod(states.shape[:-1]))
        received = np.empty(count * self.total)
        self.comm.Allgatherv(states, [received, count * self._sizes])
        return self._joined(received, count).reshape(*states.shape[:-1], self.total)

    def _joined(self, received: np.ndarray, count: int) -> np.ndarray:
        """Whole states ``(count, total)`` from their parts, which follow each other by ranks."""
        out = np.empty((count, self.total))
        for a, b in zip(self._ends, self._ends[1:], strict=False):
            out[:, a:b] = received[count * a : count * b].reshape(count, b - a)
        return out

    def rows(self, own: np.ndarray) -> np.ndarray:
        """The numbers of all ranks' rows, in the order of ranks, of own rows among the own unknowns (collective)."""
        if self.comm.size == 1:
            return own
        return np.concatenate(self.comm.allgather(own + self.own.start))

    # -- states divided among the ranks --------------------------------------------------------------------------------
    def shares(self, count: int) -> np.ndarray:
        """Ends ``(ranks + 1)`` of the states of each rank, where that many are divided among the ranks."""
        return count * np.arange(self.comm.size + 1) // self.comm.size

    def divided(self, states: np.ndarray) -> np.ndarray:
        """All unknowns ``(share, ..., total)`` of the own share of states ``(count, ..., own)`` (collective)."""
        states = np.ascontiguousarray(states, dtype=float)
        shares, inner = self.shares(len(states)), states.shape[1:-1]
        each = int(np.prod(inner))
        count = int(shares[self.comm.rank + 1] - shares[self.comm.rank])
        received = np.empty(count * each * self.total)
        sent_counts = np.diff(shares) * each * self._sizes[self.comm.rank]
        self.comm.Alltoallv([states, sent_counts], [received, count * each * self._sizes])
        return self._joined(received, count * each).reshape(count, *inner, self.total)

    def returned(self, share: np.ndarray, out: np.ndarray) -> None:
        """Write the own unknowns of all states ``(count, ..., own)`` of which each rank has a share
        ``(share, ..., total)`` (collective).
        """
        shares, each = self.shares(len(out)), int(np.prod(out.shape[1:-1]))
        rows = share.reshape(-1, self.total)
        sent = np.concatenate([rows[:, a:b].ravel() for a, b in zip(self._ends, self._ends[1:], strict=False)])
        received = out if out.flags.c_contiguous and out.dtype == float else np.empty(out.shape)
        received_counts = np.diff(shares) * each * self._sizes[self.comm.rank]
        self.comm.Alltoallv([sent, len(rows) * self._sizes], [received, received_counts])
        if received is not out:
            out[...] = received
