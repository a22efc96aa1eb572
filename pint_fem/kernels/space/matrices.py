"""Sparse matrices that are distributed by rows, and their products with blocks of states in one exchange for all."""

from __future__ import annotations

import numpy as np
from firedrake.petsc import PETSc
from mpi4py import MPI
from scipy.sparse import csr_matrix

from pint_fem.kernels.lanes.compiled import aligned
from pint_fem.kernels.space.compiled import block_kernels, lanes_for

__all__ = ["BlockMatrix", "Halo"]

_TAG = 71


class Halo:
    """The exchange of other ranks' unknowns that a rank's rows refer to.

    Parameters
    ----------
    comm
        Communicator in space.
    bounds
        First unknown of each rank, and the number of all.
    ghosts
        The unknowns of other ranks, in ascending order.
    """

    def __init__(self, comm: MPI.Comm, bounds: np.ndarray, ghosts: np.ndarray):
        self.comm, self.own, self.count = comm, int(bounds[comm.rank + 1] - bounds[comm.rank]), len(ghosts)
        self._buffers: dict[tuple, list[np.ndarray]] = {}
        self._sources: list[tuple[int, slice]] = []
        self._targets: list[tuple[int, np.ndarray]] = []
        if comm.size == 1:
            return
        owners = np.searchsorted(bounds, ghosts, side="right") - 1
        counts = np.bincount(owners, minlength=comm.size).astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(counts)])
        asked = np.empty(comm.size, np.int64)
        comm.Alltoall(counts, asked)
        places = np.concatenate([[0], np.cumsum(asked)])
        wanted = np.empty(int(places[-1]), np.int64)
        comm.Alltoallv([np.ascontiguousarray(ghosts, np.int64), (counts, ends[:-1])], [wanted, (asked, places[:-1])])
        rows = (wanted - bounds[comm.rank]).astype(np.int32)
        for rank in range(comm.size):
            if counts[rank]:
                self._sources.append((rank, slice(self.own + int(ends[rank]), self.own + int(ends[rank + 1]))))
            if asked[rank]:
                self._targets.append((rank, rows[places[rank] : places[rank + 1]].copy()))

    def exchange(self, x: np.ndarray) -> None:
        """Fill the last rows of a block ``(own + count, W)`` with other ranks' unknowns (collective)."""
        if not self._sources and not self._targets:
            return
        lanes, key = x.shape[1], (x.shape[1], x.dtype)
        if key not in self._buffers:
            self._buffers[key] = [np.empty((len(rows), lanes), x.dtype) for _, rows in self._targets]
        gather, comm = block_kernels(lanes, x.dtype).gather, self.comm
        requests = [comm.Irecv(x[rows], source=rank, tag=_TAG) for rank, rows in self._sources]
        for (rank, rows), buffer in zip(self._targets, self._buffers[key], strict=True):
            gather(len(rows), rows.ctypes.data, x.ctypes.data, buffer.ctypes.data)
            requests.append(comm.Isend(buffer, dest=rank, tag=_TAG))
        MPI.Request.Waitall(requests)


class BlockMatrix:
    """A rank's rows of a sparse matrix.

    Parameters
    ----------
    matrix
        The rows ``(rows, columns + ghosts)``, ghosts being other ranks' unknowns.
    halo
        Their exchange.
    dtype
        Type of the numbers.

    Attributes
    ----------
    rows, columns : int
        Own rows, and own unknowns that they are multiplied with.
    """

    def __init__(self, matrix: csr_matrix, halo: Halo, dtype: np.dtype | type = np.float64):
        self.halo, self.dtype = halo, np.dtype(dtype)
        self.rows, self.columns = matrix.shape[0], halo.own
        self._ptr, self._index = matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32)
        self._values = aligned(max(1, matrix.nnz), self.dtype)
        self._values[: matrix.nnz] = matrix.data
        self._csr = self.rows, self._ptr.ctypes.data, self._index.ctypes.data, self._values.ctypes.data
        self.nnz = matrix.nnz
        self._work: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def of_petsc(cls, matrix: PETSc.Mat) -> BlockMatrix:
        """The own rows of an assembled AIJ matrix (collective)."""
        comm = matrix.comm.tompi4py()
        (rows, _), (own, total) = matrix.getSizes()
        ptr, columns, values = matrix.getValuesCSR()
        return cls.of_rows(comm, csr_matrix((values, columns, ptr), (rows, total)), own)

    @classmethod
    def of_rows(cls, comm: MPI.Comm, rows: csr_matrix, own: int) -> BlockMatrix:
        """A matrix of which each rank gives its rows, with the numbers of all unknowns as columns; ``own``: those that
        are this rank's (collective).
        """
        bounds = np.concatenate([[0], np.cumsum(comm.allgather(own))])
        first, last = bounds[comm.rank], bounds[comm.rank + 1]
        columns = rows.indices.astype(np.int64)
        outside = (columns < first) | (columns >= last)
        ghosts = np.unique(columns[outside])
        local = columns - first
        local[outside] = own + np.searchsorted(ghosts, columns[outside])
        made = csr_matrix((rows.data, local, rows.indptr), (rows.shape[0], own + len(ghosts)))
        return cls(made, Halo(comm, bounds, ghosts))

    def astype(self, dtype: np.dtype | type) -> BlockMatrix:
        """The same matrix with numbers of another type."""
        return BlockMatrix(self.local, self.halo, dtype)

    @property
    def local(self) -> csr_matrix:
        """The rows ``(rows, columns + ghosts)``."""
        parts = self._values[: self.nnz].copy(), self._index.copy(), self._ptr.copy()  # scipy sorts them in place
        return csr_matrix(parts, (self.rows, self.columns + self.halo.count))

    def vector(self, lanes: int) -> np.ndarray:
        """A block of zeros ``(columns + ghosts, lanes)``, whose first rows are the own unknowns."""
        return aligned((self.columns + self.halo.count, lanes), self.dtype)

    @property
    def diagonal(self) -> np.ndarray:
        """The entries on the diagonal of own rows of a square matrix."""
        return self.local[:, : self.columns].diagonal().astype(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the own rows."""
        return self._ptr.nbytes + self._index.nbytes + self._values.nbytes

    def product(self, x: np.ndarray, y: np.ndarray, factor: float = 1.0, keep: float = 0.0) -> None:
        """``y = keep y + factor A x`` (collective); ``x`` as of :meth:`vector`, ``y`` with the own rows first."""
        self.halo.exchange(x)
        block_kernels(x.shape[1], self.dtype).product(*self._csr, factor, keep, x.ctypes.data, y.ctypes.data)

    def product_of_rows(self, states: np.ndarray, out: np.ndarray) -> None:
        """Write the products with states ``(k, columns)`` to ``out`` ``(k, rows)``, for the same ``k`` on all ranks
        (collective); bitwise the same for any number of states.
        """
        first = 0
        while first < len(states):
            lanes = lanes_for(len(states) - first)
            count = min(lanes, len(states) - first)
            if lanes not in self._work:
                self._work[lanes] = self.vector(lanes), aligned((self.rows, lanes), self.dtype)
            x, y = self._work[lanes]
            x[: self.columns, :count] = states[first : first + count].T
            self.product(x, y)
            out[first : first + count] = y[:, :count].T
            first += count

    def residual(self, b: np.ndarray, x: np.ndarray, r: np.ndarray) -> None:
        """``r = b - A x`` (collective)."""
        self.halo.exchange(x)
        kernels = block_kernels(x.shape[1], self.dtype)
        kernels.residual(*self._csr, b.ctypes.data, x.ctypes.data, r.ctypes.data)

    def smooth(
        self, diagonal: np.ndarray, keep: float, factor: float, b: np.ndarray, x: np.ndarray, d: np.ndarray
    ) -> None:
        """``d = keep d + factor D (b - A x)`` with a diagonal ``D`` (collective)."""
        self.halo.exchange(x)
        kernels = block_kernels(x.shape[1], self.dtype)
        addresses = b.ctypes.data, x.ctypes.data, d.ctypes.data
        kernels.smooth(*self._csr, diagonal.ctypes.data, keep, factor, *addresses)
