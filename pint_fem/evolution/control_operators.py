"""Linear operators from a control's own values to own values of a state, and their transposes: a sparse matrix for
fields, a column for each real number.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Protocol

import numpy as np
import ufl
from firedrake import Cofunction, Function, TrialFunction, assemble, derivative
from firedrake.petsc import PETSc
from mpi4py import MPI
from ufl.algorithms import expand_derivatives

from pint_fem.kernels.arrays import get, is_real

__all__ = ["ControlOperator", "MatrixOperator", "RealOperator", "absolute", "control_operator"]


class ControlOperator(Protocol):
    """``(nz,) -> (n,)`` and the transpose."""

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """The product."""

    def transposed(self, y: np.ndarray) -> np.ndarray:
        """The product with the transpose."""

    def absolute(self) -> ControlOperator:
        """The operator with the magnitudes of its entries."""


def absolute(matrix: PETSc.Mat) -> PETSc.Mat:
    """A sparse matrix of the magnitudes of a matrix's entries."""
    pointers, columns, values = matrix.getValuesCSR()
    return PETSc.Mat().createAIJ(matrix.getSizes(), csr=(pointers, columns, np.abs(values)), comm=matrix.comm)


class MatrixOperator:
    """A sparse matrix with some own rows set to zero."""

    def __init__(self, matrix: PETSc.Mat, zero_rows: np.ndarray):
        self.matrix = matrix.copy()
        first = matrix.getOwnershipRange()[0]
        self.matrix.setOption(PETSc.Mat.Option.KEEP_NONZERO_PATTERN, True)
        self.matrix.zeroRows((zero_rows + first).astype(PETSc.IntType), diag=0.0)
        self._z, self._y = self.matrix.createVecs()

    def __call__(self, z):
        """See :class:`ControlOperator`."""
        self._z.array[:] = z
        self.matrix.mult(self._z, self._y)
        return self._y.array_r.copy()

    def transposed(self, y):
        """See :class:`ControlOperator`."""
        self._y.array[:] = y
        self.matrix.multTranspose(self._y, self._z)
        return self._z.array_r.copy()

    def absolute(self):
        """See :class:`ControlOperator`."""
        return MatrixOperator(absolute(self.matrix), np.zeros(0, dtype=int))


class RealOperator:
    """The column of a real number, which the first rank in space owns.

    Parameters
    ----------
    space
        The control's space.
    column
        What the operator makes of the function 1.
    zero_rows
        Own rows set to zero.
    """

    def __init__(self, space, column: Callable[[Function], Function | Cofunction], zero_rows: np.ndarray):
        self._comm = space.mesh().comm
        self.column = get(column(Function(space).assign(1.0)))
        self.column[zero_rows] = 0.0

    def __call__(self, z):
        """See :class:`ControlOperator`."""
        value = np.empty(1)
        value[: len(z)] = z  # on the first rank
        self._comm.Bcast(value, root=0)
        return value * self.column

    def transposed(self, y):
        """See :class:`ControlOperator`."""
        total = self._comm.allreduce(float(self.column @ y), op=MPI.SUM)
        return np.full(1 if self._comm.rank == 0 else 0, total)

    def absolute(self):
        """See :class:`ControlOperator`."""
        made = copy(self)
        made.column = np.abs(self.column)
        return made


def control_operator(form: ufl.Form, control: Function, zero_rows: np.ndarray) -> ControlOperator | None:
    """The derivative of a 1-form that is affine in a control; ``None`` where it does not depend on it."""
    space = control.function_space()
    slope = lambda direction: expand_derivatives(derivative(form, control, direction))
    if slope(Function(space)).empty():
        return None
    if is_real(space):
        return RealOperator(space, lambda unit: assemble(slope(unit)), zero_rows)
    return MatrixOperator(assemble(slope(TrialFunction(space)), mat_type="aij").petscmat, zero_rows)
