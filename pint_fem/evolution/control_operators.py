r"""Linear operators from a control's own values to own values of a state, with their transposes.

For a control that is a field the operator is a sparse matrix, for a real number a column. It is the derivative of a
1-form, or the interpolation of the derivative of an expression.

A load's operator may depend on time by scalar factors, :math:`O(t) = \sum_k c_k(t)\, O_k`: a current
:math:`J(x)\, s(t)` with unknown ``J`` has one term. The terms are found by sampling: :math:`O(t) x` for a fixed random
``x`` at some times, and those of them that are no linear combinations of others give the :math:`O_k = O(t_k)`.
Coefficients at another time solve a least-squares problem for :math:`O(t) x`; its residual shows whether the operator
is of this form there. All follows from the evolution only, not from the steps that a rank has.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cached_property
from typing import Protocol

import numpy as np
import ufl
from firedrake import Cofunction, Function, TrialFunction, assemble, derivative, interpolate
from firedrake.assemble import get_assembler
from firedrake.functionspaceimpl import WithGeometry
from firedrake.petsc import PETSc
from mpi4py import MPI
from ufl.algorithms import expand_derivatives, extract_coefficients
from ufl.algorithms.apply_algebra_lowering import apply_algebra_lowering
from ufl.algorithms.apply_derivatives import apply_derivatives

from pint_fem.errors import InputError
from pint_fem.kernels.arrays import get, is_real, own_size, put
from pint_fem.kernels.block_operator import BlockOperator

__all__ = [
    "ControlOperator",
    "MatrixOperator",
    "SeparatedOperator",
    "absolute",
    "control_operator",
    "expression_derivative",
    "interpolation_operator",
    "separated_operator",
]

MOST_TERMS = 8
"""Terms that an operator may have."""
SAMPLES = 48
"""Times of the interval at which an operator is sampled."""
_TOLERANCE = 1e-12


class ControlOperator(Protocol):
    """A linear map ``(nz,) -> (n,)`` with its transpose; collective over space."""

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """The product with a control's own values ``(nz,)``, ``(n,)``."""

    def transposed(self, y: np.ndarray) -> np.ndarray:
        """The product of the transpose with a dual vector ``(n,)``, ``(nz,)``."""

    def transposed_rows(self, rows: np.ndarray) -> np.ndarray:
        """:meth:`transposed` of several dual vectors ``(k, n)``, ``(k, nz)``; ``k`` is the same on all ranks."""

    def absolute(self) -> ControlOperator:
        """The operator with the magnitudes of its entries."""


def absolute(matrix: PETSc.Mat) -> PETSc.Mat:
    """A sparse matrix of the magnitudes of a matrix's entries."""
    pointers, columns, values = matrix.getValuesCSR()
    return PETSc.Mat().createAIJ(matrix.getSizes(), csr=(pointers, columns, np.abs(values)), comm=matrix.comm)


class MatrixOperator:
    """A :class:`ControlOperator` by a sparse matrix.

    Parameters
    ----------
    matrix
        Assembled matrix, which is copied.
    zero_rows
        Own rows that are set to zero.
    """

    def __init__(self, matrix: PETSc.Mat, zero_rows: np.ndarray):
        self.matrix = matrix.copy()
        first = matrix.getOwnershipRange()[0]
        self.matrix.setOption(PETSc.Mat.Option.KEEP_NONZERO_PATTERN, True)
        self.matrix.zeroRows((zero_rows + first).astype(PETSc.IntType), diag=0.0)
        self._z, self._y = self.matrix.createVecs()

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """The product with the matrix, ``(n,)``."""
        self._z.array[:] = z
        self.matrix.mult(self._z, self._y)
        return self._y.array_r.copy()

    def transposed(self, y: np.ndarray) -> np.ndarray:
        """The product with the transposed matrix, ``(nz,)``."""
        self._y.array[:] = y
        self.matrix.multTranspose(self._y, self._z)
        return self._z.array_r.copy()

    @cached_property
    def _turned(self) -> BlockOperator:
        return BlockOperator(self.matrix.transpose(PETSc.Mat()))

    def transposed_rows(self, rows: np.ndarray) -> np.ndarray:
        """The products of the transposed matrix with rows ``(k, n)``, ``(k, nz)``."""
        return self._turned(rows)

    def absolute(self) -> MatrixOperator:
        """The operator of the matrix of magnitudes."""
        return MatrixOperator(absolute(self.matrix), np.zeros(0, dtype=int))


class _RealOperator:
    """A :class:`ControlOperator` of a real number, which the first rank in space owns, by ``column(1)``."""

    def __init__(self, space: WithGeometry, column: Callable[[Function], Function | Cofunction], zero_rows: np.ndarray):
        self._comm = space.mesh().comm
        self.column = get(column(Function(space).assign(1.0)))
        self.column[zero_rows] = 0.0

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """The number times the column, ``(n,)``."""
        value = np.empty(1)
        value[: len(z)] = z  # on the first rank
        self._comm.Bcast(value, root=0)
        return value * self.column

    def transposed(self, y: np.ndarray) -> np.ndarray:
        """The dot product with the column over space, on the first rank, ``(1,)`` or ``(0,)``."""
        total = self._comm.allreduce(float(self.column @ y), op=MPI.SUM)
        return np.full(1 if self._comm.rank == 0 else 0, total)

    def transposed_rows(self, rows: np.ndarray) -> np.ndarray:
        """Dot products of rows ``(k, n)`` with the column: ``(k, 1)`` on the first rank in space, else ``(k, 0)``."""
        totals = self._comm.allreduce(rows @ self.column, op=MPI.SUM)
        return totals[:, None] if self._comm.rank == 0 else np.zeros((len(rows), 0))

    def absolute(self) -> MatrixOperator:
        """The operator of the column of magnitudes."""
        made = copy(self)
        made.column = np.abs(self.column)
        return made


def control_operator(form: ufl.Form, control: Function, zero_rows: np.ndarray) -> ControlOperator | None:
    """The derivative of a 1-form that is affine in a control (collective over space).

    Parameters
    ----------
    form
        The 1-form.
    control
        A field, or a real number.
    zero_rows
        Own rows that the operator leaves out.

    Returns
    -------
    ControlOperator or None
        ``None`` where the form does not depend on the control.
    """
    space = control.function_space()
    slope = lambda direction: expand_derivatives(derivative(form, control, direction))
    if slope(Function(space)).empty():
        return None
    if is_real(space):
        return _RealOperator(space, lambda unit: assemble(slope(unit)), zero_rows)
    return MatrixOperator(assemble(slope(TrialFunction(space)), mat_type="aij").petscmat, zero_rows)


def expression_derivative(
    expression: ufl.core.expr.Expr, control: Function, direction: Function | ufl.Argument
) -> ufl.core.expr.Expr:
    """The derivative of an expression by a control in a direction, as an expression."""
    return apply_derivatives(apply_algebra_lowering(derivative(expression, control, direction)))


def interpolation_operator(
    expression: ufl.core.expr.Expr, control: Function, V: WithGeometry, zero_rows: np.ndarray
) -> ControlOperator:
    """The interpolation into ``V`` of an expression's derivative by a control (collective over space).

    Parameters
    ----------
    expression
        The expression, differentiated at the values that the functions in it have.
    control
        A field, or a real number.
    V
        The space of the result.
    zero_rows
        Own rows that the operator leaves out.
    """
    space = control.function_space()
    slope = lambda direction: expression_derivative(expression, control, direction)
    if is_real(space):
        return _RealOperator(space, lambda unit: Function(V).interpolate(slope(unit)), zero_rows)
    return MatrixOperator(assemble(interpolate(slope(TrialFunction(space)), V)).petscmat, zero_rows)


class SeparatedOperator:
    """A load's operator as a sum of constant operators with coefficients that depend on time.

    Parameters
    ----------
    form
        The residual with the sign of a load, affine in the control.
    control
        A field, or a real number.
    zero_rows
        Own rows that the operator leaves out.
    t
        Time function, or ``None``.
    interval
        Times ``(t0, t1)`` between which the operator is sampled.

    Attributes
    ----------
    terms : list of ControlOperator
        The constant operators.
    constant : bool
        Whether the operator does not depend on time: one term with the coefficient 1.
    separable : bool
        Whether ``MOST_TERMS`` terms are enough.
    """

    def __init__(
        self,
        form: ufl.Form,
        control: Function,
        zero_rows: np.ndarray,
        t: Function | None,
        interval: tuple[float, float],
    ):
        if t is not None:  # samples are taken at times of its own
            moving, t = t, Function(t.function_space(), name="t")
            form = ufl.replace(form, {moving: t})
        self._make = lambda: control_operator(form, control, zero_rows)
        self._t, self._zero_rows, self.name = t, zero_rows, control.name()
        space = control.function_space()
        x = Function(space)
        action = expand_derivatives(derivative(form, control, x))
        self.constant = t is None or t not in extract_coefficients(action)
        self.separable, self.terms = True, []
        if self.constant:
            self.terms.append(self._make())
            return
        self._comm = space.mesh().comm
        rng = np.random.default_rng(self._comm.rank)
        put(x, np.ones(own_size(space)) if is_real(space) else rng.standard_normal(own_size(space)))
        V = form.arguments()[0].function_space()
        self._assembler, self._vector = get_assembler(action), Cofunction(V.dual())
        self._cached: dict[float, np.ndarray] = {}
        self._find_terms(np.linspace(*interval, SAMPLES))

    def _sample(self, time: float) -> np.ndarray:
        """The vector ``O(t) x``."""
        self._t.assign(time)
        values = get(self._assembler.assemble(tensor=self._vector))
        values[self._zero_rows] = 0
        return values

    def _dot(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Matrix product summed over space."""
        return self._comm.allreduce(a @ b, op=MPI.SUM)

    def _find_terms(self, times: np.ndarray) -> None:
        """Choose the times of the terms by Gram-Schmidt with pivoting on the samples."""
        samples = np.array([self._sample(time) for time in times])
        norms = np.sqrt(self._comm.allreduce((samples**2).sum(axis=1), op=MPI.SUM))
        self._scale, remainders, chosen = norms.max(), samples.copy(), []
        while True:
            norms = np.sqrt(self._comm.allreduce((remainders**2).sum(axis=1), op=MPI.SUM))
            worst = int(np.argmax(norms))
            if norms[worst] <= _TOLERANCE * self._scale:
                break
            if len(chosen) == MOST_TERMS:
                self.separable = False
                return
            chosen.append(worst)
            q = remainders[worst] / norms[worst]
            for _ in range(2):
                remainders -= np.outer(self._dot(remainders, q), q)
        self._basis = samples[chosen]
        self._gram = self._dot(self._basis, self._basis.T)
        for index in chosen:
            self._t.assign(times[index])
            self.terms.append(self._make())

    def coefficients(self, times: np.ndarray) -> np.ndarray:
        """The coefficients :math:`c_k(t)` at some times, ``(times, terms)`` (collective over space).

        Raises
        ------
        InputError
            If the operator is no combination of the terms at a time.
        """
        if self.constant:
            return np.ones((len(times), 1))
        return np.array([self._coefficients_at(float(t)) for t in times]).reshape(len(times), len(self.terms))

    def _coefficients_at(self, time: float) -> np.ndarray:
        """The coefficients at a time, ``(terms,)``; computed once."""
        if time not in self._cached:
            values = self._sample(time)
            c = np.linalg.solve(self._gram, self._dot(self._basis, values)) if self.terms else np.zeros(0)
            rest = values - c @ self._basis
            if self._dot(rest, rest) ** 0.5 > 1e3 * _TOLERANCE * max(self._scale, self._dot(values, values) ** 0.5):
                raise InputError(
                    f"the residual's dependence on time beside the control {self.name!r} is not a sum of "
                    f"{len(self.terms)} terms at t = {time:g}: give propagator=FormPropagator"
                )
            self._cached[time] = c
        return self._cached[time]


def separated_operator(
    form: ufl.Form, control: Function, zero_rows: np.ndarray, t: Function | None, interval: tuple[float, float]
) -> SeparatedOperator | None:
    """The operator of a control in a load, with the parameters of :class:`SeparatedOperator`; ``None`` where the form
    does not depend on the control (collective over space).
    """
    if expand_derivatives(derivative(form, control, Function(control.function_space()))).empty():
        return None
    return SeparatedOperator(form, control, zero_rows, t, interval)
