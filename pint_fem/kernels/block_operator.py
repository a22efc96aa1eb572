"""Products of an assembled matrix with many states."""

from __future__ import annotations

import numpy as np
from firedrake.petsc import PETSc

from pint_fem.kernels.direct import matrix_bytes
from pint_fem.kernels.lanes.products import LaneProduct
from pint_fem.kernels.lanes.structures import kernels
from pint_fem.kernels.replication import whole_matrix

__all__ = ["BlockOperator"]


class BlockOperator:
    """Products ``out[i] = A u[i]`` of an AIJ matrix with many states, bitwise the same for any number of them.

    Parameters
    ----------
    matrix
        The matrix, distributed over a communicator in space.
    """

    def __init__(self, matrix: PETSc.Mat):
        self.matrix = matrix
        (self.rows, _), (self._columns, _) = matrix.getSizes()
        self._product = None
        if matrix.comm.size == 1 and kernels() is not None:
            self._product = LaneProduct(whole_matrix(matrix))
        else:
            self._x, self._y = matrix.createVecs()

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of the matrix on this rank, and of its copy for the kernels or of PETSc's work vectors."""
        if self._product is not None:
            return {"matrices": matrix_bytes(self.matrix), "kernels": self._product.nbytes}
        return {"matrices": matrix_bytes(self.matrix), "vectors": 8 * (self.rows + self._columns)}

    def __call__(self, states: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The products ``(k, rows)`` with states ``(k, columns)``, for the same ``k`` on all ranks (collective); in
        ``out`` where it is given, with contiguous rows of float64.
        """
        if out is None:
            out = np.empty((len(states), self.rows))
        if self._product is not None:
            self._product(np.require(states, float, "CA"), out)
            return out
        for state, result in zip(states, out, strict=True):
            self._x.array[:] = state
            self.matrix.mult(self._x, self._y)
            result[:] = self._y.array_r
        return out
