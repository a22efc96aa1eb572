r"""Direct solves over several ranks in space by substructuring, on lanes.

The unknowns that couple the ranks are the *interface* :math:`\Gamma`: of two coupled unknowns on different ranks the
one on the rank with the larger number. Without it the matrix falls into one block for each rank,

.. math::
    A = \begin{pmatrix} A_{11} & & A_{1\Gamma} \\ & \ddots & \vdots \\ A_{\Gamma 1} & \cdots & A_{\Gamma\Gamma}
    \end{pmatrix} , \qquad
    S = A_{\Gamma\Gamma} - \sum_p A_{\Gamma p} A_{pp}^{-1} A_{p\Gamma} ,

which each rank factors for itself (:mod:`~pint_fem.kernels.lanes.multifrontal`), with its part of the Schur complement
:math:`S`. A solve is forward substitution on each rank, one exchange of the interface's right-hand sides, the product
with :math:`S^{-1}`, of which each rank has some rows, one exchange of the results, and backward substitution (B. Smith,
P. Bjorstad, W. Gropp, Domain Decomposition, 1996, chapter 4). A rank reads its share of the factor only, so that the
time of a solve falls with the number of ranks as long as :math:`S` is small. Any number of states is solved for by the
same two exchanges. Sums over ranks are in their order: results are the same from run to run, and for a state whatever
others are solved for with it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from firedrake.petsc import PETSc
from mpi4py import MPI
from scipy.linalg.lapack import dpotrf, dpotri, dpotrs
from scipy.sparse import block_array, csr_matrix

from pint_fem.all_at_once.grids import split_steps
from pint_fem.collective import all_ranks
from pint_fem.kernels.lanes.compiled import aligned
from pint_fem.kernels.lanes.lane_steps import LaneSteps
from pint_fem.kernels.lanes.multifrontal import EliminationTree, eliminate
from pint_fem.kernels.lanes.ordering import nested_dissection
from pint_fem.kernels.lanes.program import STATE, StepProgram
from pint_fem.kernels.lanes.triangular import Lower, TriangularFactors
from pint_fem.kernels.space.compiled import block_kernels, lanes_for

__all__ = ["LARGEST_INTERFACE", "Partition", "Substructuring"]

LARGEST_INTERFACE = 6000
"""Unknowns of an interface above which there is no substructuring: its dense inverse grows with the square."""


@dataclass(frozen=True)
class Partition:
    """The interior and the interface of a rank's rows of a matrix.

    Attributes
    ----------
    comm : MPI.Comm
        Communicator in space.
    interior, own_interface : ndarray
        Own rows of each kind.
    counts : ndarray
        Number of the interface's unknowns on each rank.
    touched : ndarray
        Numbers, among all of the interface, of those that the interior is coupled to.
    inside, coupling, interface : csr_matrix
        The interior's block, its couplings to ``touched``, and the own rows of the interface's block.
    order : ndarray
        An order of elimination of the interior.
    first : int
        Number of the first own row among all.
    numbers : ndarray
        Rows of the interface among all.
    """

    comm: MPI.Comm
    interior: np.ndarray
    own_interface: np.ndarray
    counts: np.ndarray
    touched: np.ndarray
    inside: csr_matrix
    coupling: csr_matrix
    interface: csr_matrix
    order: np.ndarray
    first: int
    numbers: np.ndarray

    @classmethod
    def of_matrix(cls, matrix: PETSc.Mat, order: np.ndarray | None = None) -> Partition | None:
        """That of an AIJ matrix with a symmetric pattern; ``None`` on all ranks if the interface has more than
        :data:`LARGEST_INTERFACE` unknowns or no order of elimination is found (collective). ``order``: the order of
        elimination for a matrix with this pattern.
        """
        comm, (first, last) = matrix.comm.tompi4py(), matrix.getOwnershipRange()
        ptr, columns, values = matrix.getValuesCSR()
        rows = np.repeat(np.arange(last - first), np.diff(ptr))
        on_interface = np.zeros(last - first, bool)
        on_interface[rows[columns < first]] = True
        interior, own = np.flatnonzero(~on_interface), np.flatnonzero(on_interface)
        counts = np.array(comm.allgather(len(own)))
        if counts.sum() > LARGEST_INTERFACE:
            return None
        every = np.concatenate(comm.allgather(own + first)).astype(np.int64)  # ascending, as ranks are
        place = np.full(last - first, -1)
        place[interior] = np.arange(len(interior))
        at = np.minimum(np.searchsorted(every, columns), max(0, len(every) - 1))
        on = every[at] == columns if len(every) else np.zeros(len(columns), bool)
        inner = ~on_interface[rows] & ~on
        inside = csr_matrix(
            (values[inner], (place[rows[inner]], place[columns[inner] - first])), (len(interior), len(interior))
        )
        across = ~on_interface[rows] & on
        touched, number = np.unique(at[across], return_inverse=True)
        coupling = csr_matrix((values[across], (place[rows[across]], number)), (len(interior), len(touched)))
        edge = on_interface[rows] & on
        of_own = np.cumsum(on_interface) - 1
        interface = csr_matrix((values[edge], (of_own[rows[edge]], at[edge])), (len(own), len(every)))
        if order is None or len(order) != len(interior):
            order = np.empty(0, np.int64)
            try:
                order = nested_dissection(inside) if len(interior) else order
            except MemoryError:  # the others would wait for ever
                order = None
        if not all_ranks(comm, order is not None):
            return None
        return cls(comm, interior, own, counts, touched, inside, coupling, interface, order, first, every)

    @property
    def whole(self) -> csr_matrix:
        """Interior and touched interface as one symmetric matrix, without the interface's own block."""
        m = len(self.touched)
        return csr_matrix(block_array([[self.inside, self.coupling], [self.coupling.T, csr_matrix((m, m))]]))

    def tree(self, most: float = np.inf) -> EliminationTree:
        """The elimination tree of the interior, after which the interface is left; counted up to ``most`` nonzeros."""
        m = len(self.interior)
        order = np.concatenate([self.order, m + np.arange(len(self.touched))])
        return EliminationTree.of_pattern(self.whole, order, len(self.touched), most)


class Substructuring:
    """Solves with a symmetric positive definite matrix on several ranks.

    Parameters
    ----------
    partition
        Of the matrix.
    tree
        Of the partition.

    Attributes
    ----------
    fill : int
        Nonzeros of this rank's factor.

    Raises
    ------
    ArithmeticError
        On every rank, if the matrix is not positive definite to working precision, or a rank has no memory for this.
    """

    is_direct = True

    def __init__(self, partition: Partition, tree: EliminationTree):
        self.partition, comm = partition, partition.comm
        self._size, made = len(tree.order), None
        try:
            made = eliminate(partition.whole, tree)
        except (ArithmeticError, MemoryError):
            pass
        if not all_ranks(comm, made is not None):
            raise ArithmeticError("a matrix is not positive definite")
        self.fill = made.lower.nnz
        inverse = aligned(self._size)
        inverse[:] = 1.0
        inverse[: len(made.diagonal)] = 1 / made.diagonal
        lower = Lower(made.lower)
        none, ones = Lower.identity(self._size), aligned(self._size)
        ones[:] = 1.0
        self._log_det = float(np.log(made.diagonal).sum())
        self._root_of_inverse = np.empty(self._size)
        self._root_of_inverse[tree.order] = np.sqrt(inverse)
        self._forward = self._steps(TriangularFactors.of_parts(tree.order, lower, none, inverse))
        self._backward = self._steps(TriangularFactors.of_parts(tree.order, none, lower, ones))
        self._lower = lower
        self._touched = comm.allgather(partition.touched)
        self._bounds = np.array(split_steps(int(partition.counts.sum()), comm.size))
        self._inverse = self._interface_inverse(made.schur)

    @staticmethod
    def _steps(factors: TriangularFactors) -> LaneSteps:
        program = StepProgram({"whole": slice(0, factors.n)}, factors.n)
        program.solve(STATE, factors)
        return LaneSteps(program)

    def _interface_inverse(self, part: np.ndarray) -> np.ndarray:
        """Own rows of the inverse Schur complement (collective)."""
        p, comm = self.partition, self.partition.comm
        total = int(p.counts.sum())
        starts = np.concatenate([[0], np.cumsum(p.counts)])
        S = None
        with suppress(MemoryError):
            S = np.zeros((total, total))
        if not all_ranks(comm, S is not None):
            raise ArithmeticError("there is no memory for the Schur complement of a matrix")
        for rank in range(comm.size):  # in their order: the same sum on all ranks and in each run
            touched, block, rows = comm.bcast(
                (p.touched, part.shape, p.interface) if rank == comm.rank else None, root=rank
            )
            S[starts[rank] : starts[rank + 1]] += rows.toarray()
            values = np.ascontiguousarray(part) if rank == comm.rank else np.empty(block)
            comm.Bcast(values, root=rank)
            S[np.ix_(touched, touched)] += values
        own, failed = np.empty((0, total)), 0
        if total:
            first, last = self._bounds[comm.rank : comm.rank + 2]
            try:
                own, failed = _rows_of_inverse(S, first, last, comm.size)
            except MemoryError:
                failed = 1
        if not all_ranks(comm, not failed and bool(np.isfinite(own).all())):
            raise ArithmeticError("the Schur complement of a matrix is not positive definite")
        made = aligned(own.shape)
        made[...] = own
        return made

    def solve(self, rows: np.ndarray) -> np.ndarray:
        """Solve for right-hand sides ``(k, n)``, own unknowns, the same ``k`` on all ranks; solutions ``(k, n)``
        (collective).
        """
        p, comm, count, inside = self.partition, self.partition.comm, len(rows), len(self.partition.interior)
        if not count:
            return np.empty(rows.shape)
        local = np.zeros((count, self._size))
        local[:, :inside] = rows[:, p.interior]
        found = np.empty((count, 1, self._size))
        self._forward.run(local, found)
        sources = self._sources(rows[:, p.own_interface], found[:, 0, inside:])
        values = self._interface_solution(sources)
        found[:, 0, inside:] = values[:, p.touched]
        result = np.empty((count, 1, self._size))
        self._backward.run(np.ascontiguousarray(found[:, 0]), result)
        out = np.empty((count, rows.shape[1]))
        out[:, p.interior] = result[:, 0, :inside]
        first = int(p.counts[: comm.rank].sum())
        out[:, p.own_interface] = values[:, first : first + len(p.own_interface)]
        return out

    def _sources(self, own: np.ndarray, eliminated: np.ndarray) -> np.ndarray:
        """The interface's right-hand sides ``(k, total)``, summed over the ranks in their order (collective)."""
        p, comm, count = self.partition, self.partition.comm, len(own)
        sent = np.concatenate([own, eliminated], axis=1)
        sizes = [count * (int(c) + len(t)) for c, t in zip(p.counts, self._touched, strict=True)]
        received = np.empty(sum(sizes))
        comm.Allgatherv(np.ascontiguousarray(sent), [received, sizes])
        out, ends = np.zeros((count, int(p.counts.sum()))), np.concatenate([[0], np.cumsum(sizes)])
        start = 0
        for rank, touched in enumerate(self._touched):
            block = received[ends[rank] : ends[rank + 1]].reshape(count, -1)
            width = int(p.counts[rank])
            out[:, start : start + width] += block[:, :width]
            out[:, touched] += block[:, width:]
            start += width
        return out

    @staticmethod
    def _products(matrix: np.ndarray, states: np.ndarray) -> np.ndarray:
        """The products ``(k, rows)`` of a full matrix with states ``(k, columns)``, for each as if it were alone."""
        (rows, columns), count = matrix.shape, len(states)
        out, begin = np.empty((count, rows)), 0
        while begin < count and rows:
            lanes = lanes_for(count - begin)
            some = min(lanes, count - begin)
            x, y = np.zeros((columns, lanes)), np.empty((rows, lanes))
            x[:, :some] = states[begin : begin + some].T
            block_kernels(lanes).full(rows, columns, matrix.ctypes.data, x.ctypes.data, y.ctypes.data)
            out[begin : begin + some] = y[:, :some].T
            begin += some
        return out

    def _interface_solution(self, sources: np.ndarray) -> np.ndarray:
        """The interface's unknowns ``(k, total)`` (collective)."""
        comm, (count, total) = self.partition.comm, sources.shape
        own = self._products(self._inverse, sources)
        sizes = count * np.diff(self._bounds)
        received = np.empty(count * total)
        comm.Allgatherv(own, [received, sizes])
        out = np.empty((count, total))
        for rank in range(comm.size):
            a, b = self._bounds[rank : rank + 2]
            out[:, a:b] = received[count * a : count * b].reshape(count, b - a)
        return out

    @cached_property
    def _interface_root(self) -> np.ndarray:
        """A lower triangular matrix whose product with its transpose is the inverse Schur complement (collective)."""
        total, comm = int(self.partition.counts.sum()), self.partition.comm
        whole = np.empty((total, total))
        comm.Allgatherv(self._inverse, [whole, total * np.diff(self._bounds)])
        root, failed = dpotrf(np.asfortranarray(whole), lower=1, clean=1) if total else (whole, 0)
        if failed:
            raise ArithmeticError("the inverse Schur complement of a matrix is not positive definite")
        made = aligned(root.shape)
        made[...] = root
        return made

    @property
    def log_det(self) -> float:
        """Logarithm of the determinant of the matrix (collective)."""
        inside = float(sum(self.partition.comm.allgather(self._log_det)))
        return inside - 2 * float(np.log(self._interface_root.diagonal()).sum())

    def root(self, rows: np.ndarray) -> np.ndarray:
        r"""The products ``(k, n)`` of a matrix ``T``, ``T T^T = A^{-1}``, with vectors ``(k, total)`` that are the same
        on all ranks; own unknowns of the results (collective).

        With :math:`S^{-1} = C C^T`, the interface has :math:`C w_\Gamma` and an interior
        :math:`L^{-T} (D^{-1/2} w - L_{\Gamma}^T C w_\Gamma)`, which is backward substitution.
        """
        p, count, inside = self.partition, len(rows), len(self.partition.interior)
        out = np.empty((count, inside + len(p.own_interface)))
        if not count:
            return out
        values = self._products(self._interface_root, rows[:, p.numbers])
        local, result = np.empty((count, self._size)), np.empty((count, 1, self._size))
        local[:, :inside] = self._root_of_inverse[:inside] * rows[:, p.first + p.interior]
        local[:, inside:] = values[:, p.touched]
        self._backward.run(local, result)
        out[:, p.interior] = result[:, 0, :inside]
        start = int(p.counts[: p.comm.rank].sum())
        out[:, p.own_interface] = values[:, start : start + len(p.own_interface)]
        return out

    def solve_within(self, tolerance: float | None) -> None:
        """Direct solves have no tolerance."""

    @property
    def description(self) -> str:
        """The method with the sizes of this rank's factor and of the interface."""
        return (
            f"substructuring on {self.partition.comm.size} ranks, factors of {self.fill / 1e6:.1f} million entries on "
            f"a rank and an interface of {int(self.partition.counts.sum())} unknowns"
        )

    @property
    def in_space(self) -> tuple[str, dict[str, float]]:
        """The kind with the number of the interface's unknowns, for the performance model."""
        return "substructuring", {"interface": float(self.partition.counts.sum())}

    @property
    def nbytes(self) -> int:
        """Bytes of the factors and of the own rows of the interface's inverse."""
        return self._lower.nbytes + self._inverse.nbytes + 16 * self._size


def _rows_of_inverse(S: np.ndarray, first: int, last: int, shares: int) -> tuple[np.ndarray, int]:
    """Rows ``first`` to ``last`` of the inverse of a positive definite matrix, and LAPACK's number of a pivot that is
    not positive, or zero.
    """
    factor, failed = dpotrf(np.asfortranarray(S), lower=1, overwrite_a=1)
    if failed:
        return np.empty((0, len(S))), int(failed)
    if shares <= 3:  # the inverse takes fewer operations than solves for a share of the columns
        inverse, failed = dpotri(factor, lower=1, overwrite_c=1)
        own = np.concatenate([inverse[first:last, :first], inverse[first:, first:last].T], axis=1)
        square, below = own[:, first:last], np.tril_indices(last - first, -1)
        square[below] = square.T[below]
        return own, int(failed)
    units = np.zeros((len(S), last - first), order="F")
    units[np.arange(first, last), np.arange(last - first)] = 1.0
    solution, failed = dpotrs(factor, units, lower=1, overwrite_b=1)
    return solution.T, int(failed)
