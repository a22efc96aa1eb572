r"""Sparse factors :math:`P A P^T = L D R^T` for solves on lanes, with ``L`` and ``R`` unit lower triangular.

The factors are SuperLU's, in an order that reduces the fill: minimum degree, or nested dissection by METIS, whichever
has fewer nonzeros. Large symmetric positive definite matrices are factored by dense fronts
(:mod:`~pint_fem.kernels.lanes.multifrontal`). Where the matrix is symmetric, ``R = L`` is stored once. Pivots are taken
from the diagonal; a matrix for which a trial solve is then not accurate is factored with partial pivoting, where rows
have another order than columns.

Adjacent columns of ``L`` are stored as *panels*, dense blocks that include zeros where arithmetic with them costs less
than another pass over the rows (``panels.c``).
"""

from __future__ import annotations

import ctypes
from copy import copy
from typing import Any

import numpy as np
from scipy.sparse import csc_matrix, csr_matrix, tril
from scipy.sparse.linalg import splu

from pint_fem.kernels.lanes.compiled import address, aligned
from pint_fem.kernels.lanes.multifrontal import Elimination, EliminationTree, eliminate
from pint_fem.kernels.lanes.ordering import nested_dissection
from pint_fem.kernels.lanes.structures import FactorStruct, LowerStruct, kernels

__all__ = ["ACCURATE", "Lower", "TriangularFactors", "fill_reducing_order"]

ACCURATE = 1e-11
"""Largest backward error of the trial solve with a factor, relative to the terms of each row."""
COSTS = np.array([4.0, 1.5, 1.0])
"""Estimated times of a panel, of each of its rows, and of each entry, in units of the last."""
LARGE = 1_000_000
"""Nonzeros of a factor above which only nested dissection is tried, and dense fronts where the matrix is positive
definite.
"""
LARGEST = 20_000_000
"""Nonzeros of a factor above which there is none by SuperLU: packages with dense kernels are much faster then."""
LARGEST_POSITIVE = 120_000_000
"""Nonzeros of a factor above which there is none of a positive definite matrix: 1 GB."""


class Lower:
    """A unit lower triangular matrix, stored by panels.

    Parameters
    ----------
    matrix
        The matrix; entries on and above the diagonal are not read.

    Attributes
    ----------
    n, panels, entries : int
        Rows, number of panels, and entries stored in them with explicit zeros.
    """

    def __init__(self, matrix: csc_matrix):
        matrix = csc_matrix(matrix)
        matrix.sort_indices()
        compiled, self.n = kernels(), matrix.shape[0]
        n = self.n
        ptr, index = matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32)
        value = np.ascontiguousarray(matrix.data, dtype=float)
        starts, counts, found = np.zeros(n + 1, np.int32), np.zeros(n + 1, np.int32), ctypes.c_void_p()
        count = compiled.find_panels(
            ctypes.c_int(n), address(ptr), address(index), address(COSTS), address(starts), address(counts),
            ctypes.byref(found),
        )  # fmt: skip
        if count < 0:
            raise MemoryError(f"no memory for the panels of a factor of {n} rows")
        self.panels = int(count)
        starts, counts = starts[: count + 1].copy(), counts[:count].astype(np.int64)
        total = int(counts.sum())
        own = np.ctypeslib.as_array(ctypes.cast(found, ctypes.POINTER(ctypes.c_int)), (total + 1,))[:total].copy()
        compiled.release(found)
        padded, widths = -(-counts // 4) * 4, np.diff(starts).astype(np.int64)
        offsets = lambda sizes: np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.starts, self.row_ptr = starts, offsets(padded)
        self.triangle_ptr, self.tile_ptr = offsets(widths**2), offsets(widths * padded)
        self.rows = np.full(max(1, int(self.row_ptr[-1])), n, np.int32)
        place_in_panel = np.arange(total) - np.repeat(offsets(counts)[:-1], counts)
        self.rows[np.repeat(self.row_ptr[:-1], counts) + place_in_panel] = own
        self.triangles, self.tiles = aligned(int(self.triangle_ptr[-1]) + 1), aligned(int(self.tile_ptr[-1]) + 1)
        place = np.zeros(n + 1, np.int32)
        failed = compiled.pack_panels(
            ctypes.c_int(n), address(ptr), address(index), address(value), ctypes.c_int(self.panels), address(starts),
            address(self.row_ptr), address(self.rows), address(self.triangle_ptr), address(self.triangles),
            address(self.tile_ptr), address(self.tiles), address(place),
        )  # fmt: skip
        if failed:
            raise ArithmeticError("an entry of a factor is in no panel")
        self.entries = int(self.tile_ptr[-1] + self.triangle_ptr[-1])
        self._kept: dict[tuple, tuple] = {}

    @classmethod
    def identity(cls, n: int) -> Lower:
        """The identity of ``n`` rows, by which kernels do nothing."""
        made = cls.__new__(cls)
        made.n, made.panels, made.entries = n, 0, 0
        made.starts, made.rows = np.zeros(1, np.int32), np.full(1, n, np.int32)
        made.row_ptr = made.triangle_ptr = made.tile_ptr = np.zeros(1, np.int64)
        made.triangles, made.tiles, made._kept = aligned(1), aligned(1), {}
        return made

    def struct(self, dtype: np.dtype) -> LowerStruct:
        """The struct of the kernels, with entries of a type."""
        if dtype not in self._kept:
            entries = [self.triangles, self.tiles]
            if dtype != np.float64:
                entries = [_converted(part, dtype) for part in entries]
            arrays = [self.starts, self.rows, self.row_ptr, self.triangle_ptr, self.tile_ptr, *entries]
            self._kept[dtype] = LowerStruct(self.n, self.panels, *(address(a) for a in arrays)), arrays
        return self._kept[dtype][0]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays in use."""
        arrays = {id(a): a for _, kept in self._kept.values() for a in kept if a is not None}
        for a in (self.starts, self.rows, self.row_ptr, self.triangles, self.tiles):
            arrays[id(a)] = a
        return sum(a.nbytes for a in arrays.values())


def _converted(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A copy with another type of numbers, aligned."""
    out = aligned(array.shape, dtype)
    out[...] = array
    return out


class TriangularFactors:
    """The factors of a real sparse matrix.

    Parameters
    ----------
    matrix
        A square matrix.
    symmetric
        Whether it is symmetric.
    order
        Rows and columns in the order of elimination; default: :func:`fill_reducing_order`.

    Attributes
    ----------
    order : ndarray
        ``order[i]`` is the row and column that is eliminated as number ``i``, if no pivots were needed.
    enter, leave : ndarray or None
        Where pivots were needed, a right-hand side in this order has to be permuted before the solve, ``r[enter]``, and
        the solution afterwards, ``x[leave]``; transposed solves take the arguments ``argsort(leave)``,
        ``argsort(enter)``.
    left, right : Lower
        ``L`` and ``R``.
    inverse_diagonal : ndarray
        The inverse of ``D``.

    Raises
    ------
    ArithmeticError
        If a pivot is zero, the factors are not accurate or have too many nonzeros: other packages may do better.
    """

    def __init__(self, matrix: csr_matrix, *, symmetric: bool, order: np.ndarray | None = None):
        self.symmetric = symmetric
        self.n = matrix.shape[0]
        matrix = csc_matrix(matrix)
        self.order, lu = fill_reducing_order(matrix, symmetric=symmetric) if order is None else (order, None)
        self.enter: np.ndarray | None = None
        self.leave: np.ndarray | None = None
        self._kernels = kernels()
        self._structs: dict[tuple, FactorStruct] = {}
        if not (self._factor_without_pivots(matrix, lu) and self.is_accurate(matrix)):
            self.symmetric = False
            if not (self._factor_with_pivots(matrix) and self.is_accurate(matrix)):
                raise ArithmeticError("the triangular factors of a matrix are not accurate")

    @classmethod
    def of_parts(cls, order: np.ndarray, left: Lower, right: Lower, inverse_diagonal: np.ndarray) -> TriangularFactors:
        """The factors ``left D right^T`` of a matrix in the given order of elimination; the diagonal is not applied
        where ``left`` is :meth:`Lower.identity`.
        """
        made = cls.__new__(cls)
        made.symmetric, made.n, made.order = left is right, len(order), order
        made.enter = made.leave = None
        made._kernels, made._structs = kernels(), {}
        made.left, made.right, made.inverse_diagonal = left, right, inverse_diagonal
        return made

    def _factor_without_pivots(self, matrix: csc_matrix, lu: Any | None) -> bool:
        """Factor in the given order; whether all pivots are finite and not zero."""
        if lu is None and self.symmetric:
            lu = _by_fronts(matrix, self.order)
            if lu is not None and not np.array_equal(lu.order, self.order):
                place = np.empty(self.n, np.int64)
                place[self.order] = np.arange(self.n)
                self.enter = place[lu.order]
                self.leave = np.argsort(self.enter)
        if isinstance(lu, Elimination):
            return self._store_positive(lu)
        if lu is None:
            lu = _without_pivots(matrix[self.order][:, self.order])
            if lu is None:
                return False
            if not np.array_equal(lu.perm_c, np.arange(self.n)):  # a subtree's columns follow each other: the same fill
                self.enter, self.leave = np.argsort(lu.perm_c), lu.perm_c.astype(np.int64)
        return self._store(lu)

    def _factor_with_pivots(self, matrix: csc_matrix) -> bool:
        """Factor with partial pivoting, in an order of the columns that limits the fill for any pivots; whether all
        pivots are finite and not zero.
        """
        ordered = matrix[self.order][:, self.order]
        try:
            lu = splu(ordered, permc_spec="COLAMD", diag_pivot_thresh=1.0)
        except RuntimeError as error:
            raise ArithmeticError(f"a matrix is singular ({error})") from error
        self.enter, self.leave = np.argsort(lu.perm_r), lu.perm_c.astype(np.int64)
        return self._store(lu)

    def _store_positive(self, found: Elimination) -> bool:
        """Store factors by dense fronts; whether all inverses of pivots are finite."""
        self.inverse_diagonal = aligned(self.n)
        with np.errstate(over="ignore"):
            self.inverse_diagonal[:] = 1.0 / found.diagonal
        if not np.isfinite(self.inverse_diagonal).all():
            return False
        self._structs.clear()
        self.left = self.right = Lower(found.lower)
        return True

    def _store(self, lu: Any) -> bool:
        """Store factors of SuperLU; whether all pivots and their inverses are finite."""
        U = lu.U
        diagonal = U.diagonal()
        self.inverse_diagonal = aligned(self.n)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            self.inverse_diagonal[:] = 1.0 / diagonal
        if not (np.isfinite(diagonal).all() and np.isfinite(self.inverse_diagonal).all()):
            return False
        self._structs.clear()
        self.left = Lower(tril(lu.L, -1, format="csc"))
        self.right = self.left
        if not self.symmetric:
            U = U.tocsr()
            R = csr_matrix((U.data / np.repeat(diagonal, np.diff(U.indptr)), U.indices, U.indptr), U.shape).T
            self.right = Lower(tril(R.tocsc(), -1, format="csc"))
        return True

    def struct(self, dtype: np.dtype | type = float) -> FactorStruct:
        """The struct of the kernels with numbers of a type."""
        dtype = np.dtype(dtype)
        if dtype not in self._structs:
            made = FactorStruct()
            made.left, made.right = (ctypes.pointer(part.struct(dtype)) for part in (self.left, self.right))
            made.diagonal = _converted(self.inverse_diagonal, dtype)
            made.inverse_diagonal = made.diagonal.ctypes.data
            self._structs[dtype] = made
        return self._structs[dtype]

    def solve(self, b: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        """Solve for one vector ``(n,)``, in the order of the matrix's rows."""
        order = self.order if self.enter is None else self.order[np.argsort(self.leave) if transposed else self.enter]
        x, run = aligned(self.n + 1), self._kernels.solve
        x[:-1] = b[order]
        run(ctypes.byref(self.struct()), address(x), ctypes.c_int(transposed))
        out = np.empty(self.n)
        leave = slice(-1) if self.enter is None else np.argsort(self.enter) if transposed else self.leave
        out[self.order] = x[leave]
        return out

    @property
    def is_positive(self) -> bool:
        """Whether the matrix is symmetric positive definite: factored without pivots, and all entries of ``D`` are
        positive (Sylvester's law of inertia).
        """
        return self.symmetric and bool((self.inverse_diagonal > 0).all())

    @property
    def log_det(self) -> float:
        """Logarithm of the determinant of a positive definite matrix."""
        return -float(np.log(self.inverse_diagonal).sum())

    def inverse_root(self) -> TriangularFactors:
        """Factors by which a solve is the product with :math:`S = P^T L^{-T} D^{-1/2}` (and a permutation), for which
        :math:`S S^T = A^{-1}`; of a positive definite matrix.
        """
        made = copy(self)
        made.symmetric, made._structs = False, {}
        made.left = Lower(csc_matrix((self.n, self.n)))
        made.inverse_diagonal = aligned(self.n)
        made.inverse_diagonal[:] = np.sqrt(self.inverse_diagonal)
        return made

    def is_accurate(self, matrix: csc_matrix) -> bool:
        """Whether the backward error of a trial solve is at round-off in each row, whose scales may differ widely."""
        magnitudes = abs(matrix)
        b = np.asarray(magnitudes.sum(axis=1)).ravel() * np.cos(np.arange(self.n, dtype=float) ** 2)
        x = self.solve(b)
        return bool(np.all(np.abs(matrix @ x - b) <= ACCURATE * (magnitudes @ np.abs(x) + np.abs(b))))

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        both = [self.left] if self.right is self.left else [self.left, self.right]
        return sum(part.nbytes for part in both) + self.inverse_diagonal.nbytes


def fill_reducing_order(matrix: csc_matrix, *, symmetric: bool = False) -> tuple[np.ndarray, Any | None]:
    """The order of elimination with the fewest nonzeros in a factor: minimum degree or nested dissection.

    Parameters
    ----------
    matrix
        The matrix.
    symmetric
        Whether it is symmetric: large ones that are positive definite are factored by dense fronts.

    Returns
    -------
    ndarray, object
        The order ``(n,)``, and the factor without pivots in this order, by SuperLU or by dense fronts; ``None`` where
        a pivot is zero.

    Raises
    ------
    ArithmeticError
        If the factor has more than :data:`LARGEST` nonzeros, or :data:`LARGEST_POSITIVE` by dense fronts.
    """
    dissection = nested_dissection(_symmetric_pattern(matrix))
    found = [] if dissection is None else [(dissection, "NATURAL")]
    if dissection is not None and symmetric:
        by_fronts = _by_fronts(matrix, dissection)
        if by_fronts is not None:
            return by_fronts.order, by_fronts
    fill = 0 if dissection is None else _fill(matrix, dissection)
    if fill > LARGEST or (dissection is None and matrix.shape[0] > LARGEST // 100):
        raise ArithmeticError("a matrix is too large for triangular factors: its factor is left to PETSc")
    # minimum degree costs a factorisation, and has more fill in large three-dimensional problems
    if fill < LARGE:
        found.append((np.arange(matrix.shape[0]), "MMD_AT_PLUS_A"))
    made = [(order, _without_pivots(matrix[order][:, order], kind)) for order, kind in found]
    made = [(order, lu) for order, lu in made if lu is not None]
    if not made:
        return found[0][0], None
    order, lu = min(made, key=lambda pair: pair[1].nnz)
    return order[np.argsort(lu.perm_c)], lu


def _by_fronts(matrix: csc_matrix, order: np.ndarray) -> Elimination | None:
    """The factor of a large positive definite matrix in an order of elimination; ``None`` for others."""
    if matrix.nnz == 0 or not (matrix.diagonal() > 0).all():
        return None
    tree = EliminationTree.of_pattern(csr_matrix(matrix), order, most=LARGEST_POSITIVE)
    if not LARGE <= tree.fill <= LARGEST_POSITIVE:
        return None
    try:
        return eliminate(csr_matrix(matrix), tree)
    except ArithmeticError:  # it is indefinite
        return None


def _without_pivots(matrix: csc_matrix, kind: str = "NATURAL") -> Any | None:
    """SuperLU's factor with pivots on the diagonal, or ``None`` where there is none."""
    try:
        lu = splu(csc_matrix(matrix), permc_spec=kind, diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    except RuntimeError:  # a pivot is zero
        return None
    return lu if np.array_equal(lu.perm_c, lu.perm_r) else None


def _symmetric_pattern(matrix: csc_matrix) -> csr_matrix:
    """The pattern of a matrix and its transpose."""
    ones = csr_matrix((np.ones(len(matrix.data)), matrix.indices, matrix.indptr), matrix.shape)
    return csr_matrix(ones + ones.T)


def _fill(matrix: csc_matrix, order: np.ndarray) -> int:
    """Number of nonzeros below the diagonal of a factor in an order of elimination."""
    both = _symmetric_pattern(matrix[order][:, order])
    arrays = both.indptr.astype(np.int64), both.indices.astype(np.int32), np.empty((2, len(order)), np.int32)
    return int(kernels().count_fill(ctypes.c_int(len(order)), *(address(a) for a in arrays)))
