r"""Factors :math:`P A P^T = L D L^T` of symmetric positive definite matrices by dense fronts, and Schur complements.

The multifrontal method (Duff and Reid, ACM Trans. Math. Softw. 9, 1983; Liu, SIAM Review 34, 1992): a *front* is the
dense matrix of some unknowns that are eliminated together and of those that they are coupled to then. It is the sum of
the matrix's entries in these columns and of the update matrices of the fronts below it in the elimination tree.
LAPACK factors it, and what remains is its own update matrix. Unknowns that are not eliminated come last: the sum of
the update matrices on them, with the matrix's own entries, is the Schur complement

.. math::  S = A_{\Gamma\Gamma} - A_{\Gamma I} A_{II}^{-1} A_{I\Gamma} .

Small subtrees are one front each, so that there are some hundred times fewer fronts than unknowns; entries that are
zero for their pattern are exactly zero, and are not stored in the factor.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy.linalg.blas import dsyrk, dtrsm
from scipy.linalg.lapack import dpotrf
from scipy.sparse import csc_matrix, csr_matrix, tril

from pint_fem.kernels.lanes.compiled import address, library

__all__ = ["Elimination", "EliminationTree", "eliminate"]

SUBTREE = 96
"""Largest number of unknowns of a subtree of the elimination tree that is one front."""
_SLACK = 0.08, 8  # relative and absolute growth of rows for which adjacent columns share a front


@cache
def _functions() -> ctypes.CDLL | None:
    """The compiled functions, or ``None``."""
    return library((Path(__file__).parent / "elimination.c").read_text())


@dataclass(frozen=True)
class EliminationTree:
    """Symbolic factorisation of a symmetric pattern.

    Attributes
    ----------
    order : ndarray
        Unknowns in the order of elimination, those of each subtree one after the other; then those that are kept.
    kept : int
        Number of unknowns that are not eliminated, the last ones.
    fronts : ndarray
        First place of each front's unknowns in that order, and the number of unknowns that are eliminated.
    parent : ndarray
        Number of the front to which each front's update matrix is added; the number of fronts where none is.
    fill : int
        Nonzeros of the factor below the diagonal.
    operations : float
        Multiplications and additions of the factorisation.
    """

    order: np.ndarray
    kept: int
    fronts: np.ndarray
    parent: np.ndarray
    fill: int
    operations: float

    @classmethod
    def of_pattern(cls, pattern: csr_matrix, order: np.ndarray, kept: int = 0) -> EliminationTree:
        """The tree of a matrix's symmetric pattern.

        Parameters
        ----------
        pattern
            A matrix ``(n, n)`` with a symmetric pattern, whose entries are not read.
        order
            An order of elimination ``(n,)`` that limits the fill; the last ``kept`` unknowns are not eliminated.
        kept
            Their number.

        Raises
        ------
        ArithmeticError
            Without compiled kernels.
        """
        compiled, n = _functions(), len(order)
        if compiled is None:
            raise ArithmeticError("elimination trees require compiled kernels")
        compiled.elimination_tree.restype = ctypes.c_int64
        m = n - kept
        ordered = _permuted(pattern, order)
        ptr, index = ordered.indptr.astype(np.int64), ordered.indices.astype(np.int32)
        parent, count, seen = np.empty(m, np.int32), np.empty(m, np.int64), np.empty(n, np.int32)
        fill = int(
            compiled.elimination_tree(
                ctypes.c_int(n), ctypes.c_int(m), *(address(a) for a in (ptr, index, parent, count, seen))
            )
        )
        after, size = np.empty(m, np.int32), np.empty(m, np.int32)
        if compiled.postorder(ctypes.c_int(m), address(parent), address(after), address(size)) < 0:
            raise MemoryError("no memory for the order of an elimination tree")
        place = np.empty(m + 1, np.int64)
        place[after] = np.arange(m)
        place[m] = m
        root = (parent < 0) | (parent >= m)
        above = place[np.where(root, m, parent)][after]
        count, size = count[after], size[after]
        fronts = _fronts(above, count, size)
        of_column = np.repeat(np.arange(len(fronts) - 1), np.diff(fronts))
        last = fronts[1:] - 1
        next_front = np.append(of_column, len(fronts) - 1)[above[last]] if m else np.empty(0, np.int64)
        order = np.concatenate([order[:m][after], order[m:]])
        work = float(np.sum((count + 1.0) ** 2))
        return cls(order, kept, fronts, next_front, fill, work)


def _permuted(matrix: csr_matrix, order: np.ndarray) -> csr_matrix:
    """Rows and columns in another order."""
    return csr_matrix(matrix)[order][:, order]


def _fronts(above: np.ndarray, count: np.ndarray, size: np.ndarray) -> np.ndarray:
    """First columns of the fronts, and the number of columns; arguments by column in postorder."""
    m = len(above)
    if not m:
        return np.zeros(1, np.int64)
    columns = np.arange(m)
    # the last column of a subtree that is one front: small, below one that is not
    whole = np.append(size, m + SUBTREE + 1)
    small = size <= SUBTREE
    roots = np.flatnonzero(small & (whole[above] > SUBTREE))
    inside = np.zeros(m + 1, np.int64)
    np.add.at(inside, roots - size[roots] + 1, 1)
    np.add.at(inside, roots + 1, -1)
    inside = np.cumsum(inside[:-1]) > 0
    nested = (count[1:] + 1 - count[:-1]) <= _SLACK[0] * count[:-1] + _SLACK[1]
    joined = (above[:-1] == columns[1:]) & nested & ~inside[:-1]
    joined |= inside[:-1] & inside[1:] & ~np.isin(columns[:-1], roots)
    return np.concatenate([[0], np.flatnonzero(~joined) + 1, [m]]).astype(np.int64)


@dataclass(frozen=True)
class Elimination:
    """Factors of the eliminated part of a matrix.

    Attributes
    ----------
    lower : csc_matrix
        ``L`` below the diagonal, ``(n, n)`` in the order of the tree; the columns of unknowns that are kept are empty.
    diagonal : ndarray
        ``D`` of the unknowns that are eliminated, positive.
    schur : ndarray
        ``S``, ``(kept, kept)``, symmetric.
    """

    lower: csc_matrix
    diagonal: np.ndarray
    schur: np.ndarray


def eliminate(matrix: csr_matrix, tree: EliminationTree) -> Elimination:
    """Eliminate all unknowns of a symmetric positive definite matrix but those that are kept.

    Parameters
    ----------
    matrix
        A symmetric matrix ``(n, n)`` with the tree's pattern; the part that is eliminated is positive definite.
    tree
        Its elimination tree.

    Raises
    ------
    ArithmeticError
        If the part that is eliminated is not positive definite to working precision.
    """
    n, starts = len(tree.order), tree.fronts
    m, count = n - tree.kept, len(starts) - 1
    columns = csc_matrix(tril(_permuted(matrix, tree.order), format="csc"))
    columns.sort_indices()
    ptr, index, values = columns.indptr, columns.indices, columns.data
    waiting: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(count + 1)]
    where, diagonal = np.empty(n, np.int64), np.empty(m)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for front in range(count):
        first, last = int(starts[front]), int(starts[front + 1])
        width, own = last - first, slice(ptr[first], ptr[last])
        found = [index[own], *(rows for rows, _ in waiting[front])]
        below = np.unique(np.concatenate(found))
        rows = np.concatenate([np.arange(first, last), below[np.searchsorted(below, last) :]])
        size = len(rows)
        where[rows] = np.arange(size)
        F = np.zeros((size, size), order="F")
        F[where[index[own]], np.repeat(np.arange(width), np.diff(ptr[first : last + 1]))] = values[own]
        _extend_add(F, waiting[front], where)
        waiting[front] = []
        L11, info = dpotrf(F[:width, :width], lower=1, clean=1)
        if info or not np.isfinite(L11[-1, -1]):
            raise ArithmeticError("a matrix is not positive definite: a pivot of its factor is not positive")
        d = L11.diagonal()
        diagonal[first:last] = d**2
        if size > width:
            L21 = dtrsm(1.0, L11, F[width:, :width], side=1, lower=1, trans_a=1)
            rest = np.asfortranarray(F[width:, width:])
            waiting[tree.parent[front]].append(
                (rows[width:], dsyrk(-1.0, L21, beta=1.0, c=rest, lower=1, overwrite_c=1))
            )
            panel = np.concatenate([L11, L21])
        else:
            panel = L11
        panel /= d
        panel[np.arange(width), np.arange(width)] = 0.0
        column, row = np.nonzero(panel.T)
        parts.append((np.bincount(column, minlength=width), rows[row].astype(np.int32), panel[row, column]))
    lower = _assembled(n, m, parts)
    where[m:] = np.arange(tree.kept)
    S = np.asfortranarray(columns[m:, m:].toarray())
    _extend_add(S, waiting[count], where)
    S = np.tril(S) + np.tril(S, -1).T
    return Elimination(lower, diagonal, S)


def _extend_add(F: np.ndarray, updates: list[tuple[np.ndarray, np.ndarray]], where: np.ndarray) -> None:
    """Add update matrices, whose lower triangles are given, at the places of their rows."""
    for rows, update in updates:
        at = where[rows]
        if at[-1] - at[0] + 1 == len(at):
            F[at[0] : at[-1] + 1, at[0] : at[-1] + 1] += update
        else:
            F.T[np.ix_(at, at)] += update.T  # both are stored by columns


def _assembled(n: int, m: int, parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> csc_matrix:
    """The matrix of columns that are given by fronts."""
    counts = np.concatenate([p[0] for p in parts] + [np.zeros(n - m, np.int64)]).astype(np.int64)
    ptr = np.concatenate([[0], np.cumsum(counts)])
    join = lambda k, dtype: np.concatenate([p[k] for p in parts]) if parts else np.empty(0, dtype)
    return csc_matrix((join(2, float), join(1, np.int32), ptr), (n, n))
