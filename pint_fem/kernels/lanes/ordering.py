"""Orders of elimination that PETSc computes."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix

__all__ = ["nested_dissection"]


def nested_dissection(pattern: csr_matrix) -> np.ndarray | None:
    """METIS's order of elimination for a symmetric pattern, whose entries are not read.

    Parameters
    ----------
    pattern
        A matrix ``(n, n)``.

    Returns
    -------
    ndarray of int64, shape (n,), or None
        Unknown ``order[i]`` is eliminated in place ``i``; ``None`` without petsc4py, or where PETSc has been built
        without METIS.
    """
    try:
        from petsc4py import PETSc
    except ImportError:
        return None
    csr = pattern.indptr.astype(PETSc.IntType), pattern.indices.astype(PETSc.IntType), np.ones(pattern.nnz)
    matrix = PETSc.Mat().createAIJ(pattern.shape, csr=csr, comm=PETSc.COMM_SELF)
    try:
        rows, columns = matrix.getOrdering("metisnd")
    except (PETSc.Error, AttributeError):
        return None
    finally:
        matrix.destroy()
    order = rows.indices.astype(np.int64)
    for found in (rows, columns):
        found.destroy()
    return order
