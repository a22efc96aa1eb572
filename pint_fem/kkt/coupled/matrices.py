r"""The coupled system of a frequency as a weighted sum of real sparse matrices, for a diagonally implicit method.

The stages (:mod:`~pint_fem.kkt.scheme`) begin at :math:`W_i = g_i u_0 + \sum_{j<i} G_{ij} U_j` and the step ends at
:math:`e_0 u_0 + \sum_j e_j U_j`. The equations of a frequency, :math:`u = \mu \Phi u + \Psi z + a`, are

.. math::
   S_i U_i - M \Big(\mu g_i u + \sum_{j<i} G_{ij} U_j\Big) - h_i F z = 0 , \qquad
   (1 - \mu e_0)\, u - \sum_j e_j U_j = a .

The last one defines :math:`U_s` by the others. What remains has the unknowns :math:`Y = (U_1, \dots, U_{s-1}, u)` and
is :math:`D Y - C z = r(a)`, where :math:`D = D_0 + \mu D_1`, :math:`C_i = h_i F` and :math:`r_s = S_s a / e_s`. With
multipliers :math:`P` of the stages the adjoint equation is :math:`D^H P - E Q u = E b` (``E`` selects ``u``), the
adjoint of the step :math:`\lambda = S_s^T P_s / e_s` and :math:`\Psi^T \lambda = C^T P`. Rows and unknowns are paired
so that the pattern is symmetric and pivots may be those of :math:`D`, :math:`R` and :math:`D^H`:

.. math::
   \begin{pmatrix} D & -C & \\ & R_k & C^T \\ -E Q E^T & & D^H \end{pmatrix}
   \begin{pmatrix} Y \\ z \\ P \end{pmatrix} = \begin{pmatrix} r(a) \\ c \\ E b \end{pmatrix} .

It is regular wherever the system of :math:`u, z, \lambda` is, also where :math:`I - \mu \Phi` is singular. Stages after
the last one with a weight do not change the step and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc
from scipy.sparse import csr_matrix, diags_array

from pint_fem.evolution.tableaux import DIRK
from pint_fem.kkt.scheme import StageCoefficients
from pint_fem.paradiag.distributed_systems import Product
from pint_fem.paradiag.panels import real_product

__all__ = [
    "Blocks",
    "DistributedOperator",
    "Layout",
    "Operator",
    "StageWeights",
    "coupled_blocks",
    "distributed",
    "own_rows",
    "stage_operators",
    "stage_weights",
]

Blocks = dict[tuple[int, int], csr_matrix]
"""Blocks of a matrix by row and column, each with own rows and the columns of all ranks."""


class StageWeights(NamedTuple):
    """The numbers of a method in the equations of a frequency.

    Attributes
    ----------
    stages : int
        ``s``.
    diagonal : ndarray
        ``a_ii``, ``(s,)``.
    g, G, e : ndarray
        ``(s,)``, ``(s, s)`` and ``(s,)``.
    e0 : float
    """

    stages: int
    diagonal: np.ndarray
    g: np.ndarray
    G: np.ndarray
    e: np.ndarray
    e0: float


def stage_weights(dirk: DIRK) -> StageWeights:
    """The numbers of a method.

    Parameters
    ----------
    dirk
        Coefficients of the method.
    """
    found = StageCoefficients.of(dirk)
    s = int(np.flatnonzero(found.e)[-1]) + 1
    return StageWeights(s, dirk.diagonal[:s], found.w0[:s], found.w[:s, :s], found.e[:s], found.e0)


class Operator:
    """A real matrix on one rank, with its transpose.

    Parameters
    ----------
    X
        The matrix.

    Attributes
    ----------
    ways : tuple of csr_matrix
        Own rows of the matrix and of its transpose, with the columns of all ranks.
    column_starts : ndarray
        The first column of each rank, and the number of all at the end.
    """

    comm: MPI.Comm = MPI.COMM_SELF

    def __init__(self, X: csr_matrix):
        X = csr_matrix(X)
        self.ways = X, csr_matrix(X.T)
        self.column_starts = np.array([0, X.shape[1]])

    def __call__(self, r: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        """The products with complex vectors ``(f, n)`` (collective)."""
        return np.ascontiguousarray(real_product(self.ways[transposed], r.T).T)

    @property
    def largest(self) -> float:
        """The largest magnitude of an entry (collective)."""
        return self.comm.allreduce(float(abs(self.ways[0]).max()) if self.ways[0].nnz else 0.0, op=MPI.MAX)


class DistributedOperator(Operator):
    """A matrix of several ranks.

    Parameters
    ----------
    X
        An assembled AIJ matrix.
    """

    def __init__(self, X: PETSc.Mat):
        self.comm, self._product = X.comm.tompi4py(), Product(X)
        self.ways = own_rows(X), own_rows(X.transpose(PETSc.Mat()))
        self.column_starts = np.asarray(X.getOwnershipRangesColumn())

    def __call__(self, r: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        """The products with complex vectors ``(f, n)`` of own unknowns (collective)."""
        own = self.ways[not transposed].shape[0]  # rows of the other one are the columns
        out = np.empty((len(r), self.ways[transposed].shape[0]), complex)
        for source, target in zip(np.reshape(r, (len(r), own)), out, strict=True):
            target[:] = self._product(source, transposed=transposed)
        return out


def distributed(X: csr_matrix, columns: int, comm: PETSc.Comm) -> PETSc.Mat:
    """The matrix of which ``X`` are the own rows, and a number of columns the own ones (collective)."""
    csr = X.indptr.astype(PETSc.IntType), X.indices.astype(PETSc.IntType), X.data
    return PETSc.Mat().createAIJ(((X.shape[0], None), (columns, X.shape[1])), csr=csr, comm=comm)


def own_rows(X: PETSc.Mat) -> csr_matrix:
    """Own rows of an assembled AIJ matrix, with the columns of all ranks."""
    return csr_matrix(X.getValuesCSR()[::-1], shape=(X.getLocalSize()[0], X.getSize()[1]))


def stage_operators(
    M: csr_matrix | PETSc.Mat, K: csr_matrix | PETSc.Mat, F: csr_matrix | PETSc.Mat, free: np.ndarray, h: np.ndarray
) -> tuple[dict[float, Operator], Operator, Operator]:
    """``S = M + h K`` with unit rows and columns where there are conditions, ``M`` and ``F`` with zero rows there.

    Parameters
    ----------
    M, K, F
        Matrices without conditions, of scipy or, with several ranks, of PETSc.
    free
        Own unknowns without a condition.
    h
        The steps of the stages.

    Returns
    -------
    tuple
        ``S`` by ``h``, ``M`` and ``F``.
    """
    if not isinstance(M, PETSc.Mat):
        keep, unit = diags_array(free.astype(float)), diags_array((~free).astype(float))
        S = {x: Operator(csr_matrix(keep @ (M + x * K) @ keep + unit)) for x in dict.fromkeys(h)}
        return S, Operator(csr_matrix(keep @ M)), Operator(csr_matrix(keep @ F))
    S, rows = {}, (np.flatnonzero(~free) + M.getOwnershipRange()[0]).astype(PETSc.IntType)
    for x in dict.fromkeys(h):
        total = M.copy()
        total.axpy(x, K, PETSc.Mat.Structure.DIFFERENT_NONZERO_PATTERN)
        total.zeroRowsColumns(rows, diag=1.0)
        S[x] = DistributedOperator(total)
    masked = M.copy(), F.copy()
    for X in masked:
        X.setOption(PETSc.Mat.Option.KEEP_NONZERO_PATTERN, True)
        X.zeroRows(rows, diag=0.0)
    return S, *map(DistributedOperator, masked)


class Layout:
    """Unknowns of several fields, where each rank has its own of all fields one after another.

    Parameters
    ----------
    starts
        Of each field the first unknown of each rank, and the number of all at the end, ``(ranks + 1,)``.
    rank
        The own rank.

    Attributes
    ----------
    size, total : int
        Own unknowns and those of all ranks.
    own : list of slice
        Own unknowns of each field among the own ones.
    """

    def __init__(self, starts: Sequence[np.ndarray], rank: int):
        self._starts = [np.asarray(s, dtype=np.int64) for s in starts]
        counts = np.array([np.diff(s) for s in self._starts])
        begin = np.concatenate([[0], np.cumsum(counts.sum(axis=0))])
        self._offset = begin[:-1] + np.cumsum(counts, axis=0) - counts
        self.size, self.total = int(counts[:, rank].sum()), int(begin[-1])
        first = self._offset[:, rank] - begin[rank]
        self.own = [slice(int(a), int(a + n)) for a, n in zip(first, counts[:, rank], strict=True)]

    def columns(self, j: int, columns: np.ndarray) -> np.ndarray:
        """The numbers, among the unknowns of all ranks, of some unknowns of a field."""
        starts = self._starts[j]
        owner = np.searchsorted(starts, columns, side="right") - 1
        return self._offset[j][owner] + columns - starts[owner]

    def matrix(self, blocks: Mapping[tuple[int, int], csr_matrix]) -> csr_matrix:
        """Own rows of a matrix of blocks, ``(size, total)``."""
        rows, columns, values = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)]
        for (i, j), block in blocks.items():
            entries = block.tocoo()
            rows.append(self.own[i].start + entries.row.astype(np.int64))
            columns.append(self.columns(j, entries.col))
            values.append(entries.data)
        joined = [np.concatenate(x) for x in (values, rows, columns)]
        return csr_matrix((joined[0], (joined[1], joined[2])), shape=(self.size, self.total))


def coupled_blocks(
    weights: StageWeights,
    S: Mapping[float, Operator],
    M: Operator,
    F: Operator,
    Q: Operator,
    R: Operator,
    *,
    dt: float,
    tau: float,
    sigma: float,
) -> list[Blocks]:
    r"""The real parts of the coupled system, with the weights ``1``, :math:`\mu` and :math:`\bar\mu`.

    Multipliers are scaled by ``tau`` and controls by ``sigma``: unknowns are ``P / tau`` and ``z / sigma``, the adjoint
    rows are divided by ``tau`` and those of controls multiplied by ``sigma / tau``.

    Parameters
    ----------
    weights
        Numbers of the method with ``s`` stages.
    S, M, F
        Matrices of the stages by ``a_ii dt``, the mass matrix and the loads of controls, as in a step
        (:func:`stage_operators`).
    Q, R
        Second derivatives.
    dt, tau, sigma
        Step size and scales.

    Returns
    -------
    list of dict
        Fields are numbered ``Y_1 .. Y_s``, ``z``, ``P_1 .. P_s`` and rows like the unknowns that they are paired with.
    """
    s, _, g, G, e, e0 = weights
    z, last = s, s - 1
    constant: Blocks = {(z, z): sigma**2 / tau * R.ways[0], (s + 1 + last, last): -Q.ways[0] / tau}
    moving: Blocks = {}
    conjugate: Blocks = {}

    def add(to: Blocks, to_transposed: Blocks, i: int, j: int, of_S: float, of_M: float) -> None:
        for blocks, place, way in ((to, (i, j), 0), (to_transposed, (s + 1 + j, s + 1 + i), 1)):
            for weight, operator in ((of_S, S[weights.diagonal[i] * dt]), (of_M, M)):
                if weight:
                    matrix = weight * operator.ways[way]
                    blocks[place] = blocks[place] + matrix if place in blocks else matrix

    for i, h in enumerate(weights.diagonal * dt):
        constant[i, z], constant[z, s + 1 + i] = -sigma * h * F.ways[0], sigma * h * F.ways[1]
        for j in range(last):
            add(constant, constant, i, j, float(i == j) - float(i == last) * e[j] / e[last], -G[i, j])
        at_end = float(i == last) / e[last]
        add(constant, constant, i, last, at_end, 0.0)
        add(moving, conjugate, i, last, -at_end * e0, -g[i])
    return [constant, moving, conjugate]
