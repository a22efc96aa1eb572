"""Products of an assembled matrix with many states, and solves for many right-hand sides."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from firedrake.petsc import PETSc

from pint_fem.collective import all_ranks
from pint_fem.kernels.direct import matrix_bytes
from pint_fem.kernels.factor import Factor
from pint_fem.kernels.lanes.lane_steps import LaneSteps
from pint_fem.kernels.lanes.products import LaneProduct
from pint_fem.kernels.lanes.program import STATE, StepProgram
from pint_fem.kernels.lanes.structures import kernels
from pint_fem.kernels.replication import Replication, whole_matrix
from pint_fem.kernels.space.compiled import block_kernels
from pint_fem.kernels.space.matrices import BlockMatrix
from pint_fem.kernels.space.substructuring import Substructuring
from pint_fem.kernels.steps import execution

__all__ = ["BlockOperator", "ManySolves"]


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
        self._product, self._distributed = None, None
        if matrix.comm.size == 1 and kernels() is not None:
            self._product = LaneProduct(whole_matrix(matrix))
        elif all_ranks(matrix.comm.tompi4py(), block_kernels(1) is not None):
            self._distributed = BlockMatrix.of_petsc(matrix)
        else:
            self._x, self._y = matrix.createVecs()

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of the matrix on this rank, and of its copy for the kernels or of PETSc's work vectors."""
        if self._product is not None:
            return {"matrices": matrix_bytes(self.matrix), "kernels": self._product.nbytes}
        if self._distributed is not None:
            return {"matrices": matrix_bytes(self.matrix), "kernels": self._distributed.nbytes}
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
        if self._distributed is not None:
            self._distributed.product_of_rows(states, out)
            return out
        for state, result in zip(states, out, strict=True):
            self._x.array[:] = state
            self.matrix.mult(self._x, self._y)
            result[:] = self._y.array_r
        return out


class ManySolves:
    """Solves ``A x[i] = b[i]`` for many right-hand sides, bitwise the same for any number of them.

    Parameters
    ----------
    factor
        A factor of a regular matrix; its triangular factors, where it has them, are applied on lanes.

    Attributes
    ----------
    own, total : slice, int
        The own unknowns among all, and the number of all.
    """

    _COPIED = 4e6  # numbers, about, in the vectors of all unknowns at a time

    def __init__(self, factor: Factor):
        self.factor, self.size = factor, factor.matrix.getLocalSize()[0]
        comm = factor.matrix.comm.tompi4py()
        replication = Replication(self.size, comm)
        self.own, self.total = replication.own, replication.total
        self._steps = execution(self._program(self.size, factor), comm)

    @staticmethod
    def _program(size: int, factor: object) -> StepProgram:
        program = StepProgram({"whole": slice(0, size)}, size)
        program.solve(STATE, factor)
        return program

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of arrays for the kernels, or of vectors for PETSc, without the matrix and its factors."""
        return self._steps.nbytes

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """The solutions ``(k, n)`` for right-hand sides ``(k, n)``, own unknowns, the same ``k`` on all ranks
        (collective).

        Raises
        ------
        ArithmeticError, PETSc.Error
            If a solver fails.
        """
        out = np.empty((len(rows), self.size))
        self._steps.run(np.require(rows, float, "CA"), out[:, None])
        return out

    @cached_property
    def _root(self) -> LaneSteps:
        return LaneSteps(self._program(self.total, self.factor.triangular.inverse_root()))

    @property
    def has_root(self) -> bool:
        """Whether there are :meth:`root` and :attr:`log_det`: the matrix is positive definite and solved directly, by
        triangular factors or by substructuring.
        """
        if isinstance(self.factor.blocks, Substructuring):
            return True
        return self.factor.triangular is not None and self.factor.triangular.is_positive

    @property
    def log_det(self) -> float:
        """Logarithm of the determinant of the matrix (collective)."""
        blocks = self.factor.blocks
        return blocks.log_det if isinstance(blocks, Substructuring) else self.factor.triangular.log_det

    def root(self, rows: np.ndarray) -> np.ndarray:
        """The products ``(k, n)`` of a matrix ``S``, ``S S^T = A^{-1}``, with vectors ``(k, total)`` that are the same
        on all ranks; own unknowns of the results (collective).
        """
        if isinstance(self.factor.blocks, Substructuring):
            return self.factor.blocks.root(rows)
        out = np.empty((len(rows), self.size))
        most = max(1, int(self._COPIED / max(1, self.total)))
        for first in range(0, len(rows), most):
            part = np.require(rows[first : first + most], float, "CA")
            results = np.empty((len(part), 1, self.total))
            self._root.run(part, results)
            out[first : first + most] = results[:, 0, self.own]
        return out
