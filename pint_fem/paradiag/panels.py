"""The pattern of the factors of a structurally symmetric matrix: columns with the same rows below them form panels.

The ordering is that of SuperLU's minimum degree or, where PETSc has METIS, nested dissection, whichever has less fill.
Elimination tree, postordering, column counts and rows are those of T. Davis, Direct Methods for Sparse Linear Systems
(SIAM, 2006), chapter 4.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix, identity
from scipy.sparse.linalg import splu

from pint_fem.paradiag.lane_kernels import LaneKernels, long

__all__ = ["Panels", "minimum_degree", "on_pattern", "ones", "permuted", "real_product"]


def minimum_degree(pattern: csr_matrix) -> np.ndarray:
    """SuperLU's ordering of a symmetric pattern: unknown ``order[i]`` is eliminated in place ``i``."""
    # a dominant diagonal, as that of a saddle point has zeros
    n = pattern.shape[0]
    first = splu(
        (ones(pattern) + 2 * np.diff(pattern.indptr).max(initial=1) * identity(n)).tocsc(),
        permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True},
    )  # fmt: skip
    return np.argsort(first.perm_c)


def permuted(pattern: csr_matrix, order: np.ndarray) -> csr_matrix:
    """Rows and columns in another order, with sorted columns."""
    out = csr_matrix(pattern[order][:, order])
    out.sort_indices()
    return out


class Panels:
    """Panels of the factor of a symmetric pattern, in a given order.

    Parameters
    ----------
    kernels
        Kernels of any precision and width.
    pattern
        A symmetric pattern with a full diagonal, ``(n, n)``.
    order
        Order of elimination, ``(n,)``; children are moved right before their parents, which changes no fill.

    Attributes
    ----------
    order : ndarray of int32, shape (n,)
        The final order.
    count, entries : int
        Number of panels, and of entries below the diagonal of a factor.
    """

    def __init__(self, kernels: LaneKernels, pattern: csr_matrix, order: np.ndarray):
        n = pattern.shape[0]
        work, parent, post = np.empty(3 * n, np.int32), np.empty(n, np.int32), np.empty(n, np.int32)
        first = permuted(pattern, order)
        kernels.call("elimination_tree", n, _int(first.indptr), _int(first.indices), parent, work)
        kernels.call("postorder", n, parent, post, work)
        order = order[post]
        self.pattern = permuted(pattern, order)
        ptr, idx = _int(self.pattern.indptr), _int(self.pattern.indices)
        kernels.call("elimination_tree", n, ptr, idx, parent, work)
        counts = np.empty(n, np.int64)
        kernels.call("column_counts", n, ptr, idx, parent, counts, work)
        columns = np.empty(n + 1, np.int32)
        self.count = kernels.call("panels", n, parent, counts, columns)
        self.first = columns[: self.count + 1].copy()
        widths = np.diff(self.first).astype(np.int64)
        self.panel = np.repeat(np.arange(self.count, dtype=np.int32), widths)
        below = counts[self.first[1:] - 1]
        self.begin = np.concatenate([[0], np.cumsum(below)])
        self.start = np.concatenate([[0], np.cumsum(widths * (widths - 1) // 2 + below * widths)])
        self.entries = int(self.start[-1])
        self.rows = np.empty(self.begin[-1], np.int32)
        kernels.call(
            "panel_rows", n, ptr, idx, parent, self.first, self.panel, self.begin, self.rows, work,
            np.zeros(self.count, np.int64),
        )  # fmt: skip
        self.order = order.astype(np.int32)

    def places(self, kernels: LaneKernels, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Places of the entries ``(i, j)`` of the reordered matrix, ``i > j``, in the panels' memory."""
        out = np.empty(len(i), np.int64)
        kernels.call(
            "places", long(len(i)), _int(i), _int(j), self.first, self.panel, self.begin, self.rows, self.start, out
        )
        return out


def _int(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.int32)


def ones(X: csr_matrix) -> csr_matrix:
    """A matrix with ones where another has entries."""
    X = csr_matrix(X).copy()
    X.data[:] = 1.0
    return X


def on_pattern(X: csr_matrix, pattern: csr_matrix) -> np.ndarray:
    """Entries of a matrix on a larger pattern, whose columns are sorted."""
    rows, columns = X.shape
    number = lambda Y: np.repeat(np.arange(rows, dtype=np.int64), np.diff(Y.indptr)) * columns + Y.indices
    out = np.zeros(pattern.nnz)
    out[np.searchsorted(number(pattern), number(X))] = X.data
    return out


def real_product(X: csr_matrix, r: np.ndarray) -> np.ndarray:
    """A real sparse matrix times complex vectors, ``(n,)`` or ``(n, k)``."""
    r = np.ascontiguousarray(r, dtype=complex)
    return (X @ r.view(float).reshape(len(r), -1)).view(complex).reshape(X.shape[0], *r.shape[1:])
