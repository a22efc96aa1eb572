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
    def of_pattern(cls, pattern: csr_matrix, order: np.ndarray, kept: int = 0, most: float = np.inf) -> EliminationTree:
        """The tree of a matrix's symmetric pattern.

        Parameters
        ----------
        pattern
            A matrix ``(n, n)`` with a symmetric pattern, whose entries are not read.
        order
            An order of elimination ``(n,)`` that limits the fill; the last ``kept`` unknowns are not eliminated.
        kept
            Their number.
        most
            Nonzeros of a factor above which the count stops: then only :attr:`fill` is of use, which is larger.

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
                ctypes.c_int(n),
                ctypes.c_int(m),
                *(address(a) for a in (ptr, index, parent, count, seen)),
                ctypes.c_int64(int(min(most, 2**62))),
            )
        )
        if fill > most:
            return cls(order, kept, np.zeros(1, np.int64), np.empty(0, np.int64), fill, np.inf)
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
    order : ndarray
        The order of the tree.
    """

    lower: csc_matrix
    diagonal: np.ndarray
    schur: np.ndarray
    order: np.ndarray


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
    n, starts, compiled = len(tree.order), tree.fronts, _functions()
    compiled.store_columns.restype = ctypes.c_int64
    m, count = n - tree.kept, len(starts) - 1
    columns = csc_matrix(tril(_permuted(matrix, tree.order), format="csc"))
    columns.sort_indices()
    ptr, index, values = columns.indptr, columns.indices, columns.data
    waiting: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(count + 1)]
    where, diagonal = np.empty(n, np.int32), np.empty(m)
    counts, found_rows, found_values = np.zeros(n, np.int64), np.empty(tree.fill, np.int32), np.empty(tree.fill)
    stored = 0
    for front in range(count):
        first, last = int(starts[front]), int(starts[front + 1])
        width, own = last - first, slice(ptr[first], ptr[last])
        below = np.unique(np.concatenate([index[own], *(rows for rows, _ in waiting[front])]))
        rows = np.concatenate([np.arange(first, last), below[np.searchsorted(below, last) :]]).astype(np.int32)
        size = len(rows)
        where[rows] = np.arange(size)
        panel, rest = np.zeros((size, width), order="F"), np.zeros((size - width, size - width), order="F")
        panel[where[index[own]], np.repeat(np.arange(width), np.diff(ptr[first : last + 1]))] = values[own]
        _extend_add(waiting[front], where, panel, rest)
        waiting[front] = []
        L11, info = dpotrf(panel[:width], lower=1, clean=1)
        if info or not np.isfinite(L11[-1, -1]):
            raise ArithmeticError("a matrix is not positive definite: a pivot of its factor is not positive")
        d = L11.diagonal().copy()
        diagonal[first:last] = d**2
        panel[:width] = L11
        if size > width:
            L21 = dtrsm(1.0, L11, panel[width:], side=1, lower=1, trans_a=1)
            panel[width:] = L21
            rest = dsyrk(-1.0, L21, beta=1.0, c=rest, lower=1, overwrite_c=1)
            waiting[tree.parent[front]].append((rows[width:], rest))
        panel /= d
        stored = compiled.store_columns(
            ctypes.c_int(size), ctypes.c_int(width), address(panel), address(rows), ctypes.c_int64(stored),
            ctypes.c_int64(tree.fill), address(found_rows), address(found_values), address(counts[first:]),
        )  # fmt: skip
        if stored < 0:
            raise ArithmeticError("a factor has more nonzeros than its pattern")
    lower_ptr = np.concatenate([[0], np.cumsum(counts)])
    lower = csc_matrix((found_values[:stored], found_rows[:stored], lower_ptr), (n, n))
    where[m:] = np.arange(tree.kept)
    S = np.asfortranarray(columns[m:, m:].toarray())
    _extend_add(waiting[count], where, np.empty((len(S), 0)), S)
    return Elimination(lower, diagonal, np.tril(S) + np.tril(S, -1).T, tree.order)


def _extend_add(
    updates: list[tuple[np.ndarray, np.ndarray]], where: np.ndarray, panel: np.ndarray, rest: np.ndarray
) -> None:
    """Add update matrices, whose lower triangles are given, at the places of their rows in a front."""
    size, width = panel.shape
    for rows, update in updates:
        at = where[rows]
        _functions().extend_add(
            ctypes.c_int(len(at)), address(at), address(update), ctypes.c_int(size), ctypes.c_int(width),
            address(panel), address(rest),
        )  # fmt: skip
