"""Copies on every rank in space of matrices and states that are small, for work that is not divided."""

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
        out = np.empty((count, self.total))
        for a, b in zip(self._ends, self._ends[1:], strict=False):
            out[:, a:b] = received[count * a : count * b].reshape(count, b - a)
        return out.reshape(*states.shape[:-1], self.total)

    def rows(self, own: np.ndarray) -> np.ndarray:
        """The numbers of all ranks' rows, in the order of ranks, of own rows among the own unknowns (collective)."""
        if self.comm.size == 1:
            return own
        return np.concatenate(self.comm.allgather(own + self.own.start))
