r"""The initial condition as an expression of controls: :math:`u_0 = E(z)`, interpolated into the state's space.

.. math::  \delta u_0 = E'(z)\,\delta z, \qquad g = E'(z)^T \lambda_0, \qquad
           \delta g = \big(E''(z)\,\delta z\big)^T \lambda_0 .

:math:`E'` is the interpolation of UFL's derivative of the expression, a sparse matrix for each control that is a field
and a column for each real number; :math:`E''\,\delta z` is that of the derivative along :math:`\delta z`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import ufl
from firedrake import Constant, Function, TrialFunction, assemble, derivative, interpolate
from pyadjoint.tape import stop_annotating
from ufl.algorithms import extract_coefficients
from ufl.algorithms.apply_algebra_lowering import apply_algebra_lowering
from ufl.algorithms.apply_derivatives import apply_derivatives

from pint_fem.errors import InputError
from pint_fem.evolution.control_operators import MatrixOperator, RealOperator
from pint_fem.kernels.arrays import get, is_real, own_size, put

__all__ = ["InitialExpression", "split_initial"]

_NOTHING = np.zeros(0, dtype=int)


def split_initial(
    initial, u: Function, control, found: set, t: Function | None, t0: float
) -> tuple[ufl.core.expr.Expr | None, Function | None, Sequence | Function | None]:
    """What a user gives as ``initial=``: the expression, the function that is the initial condition, and the controls
    of the evolution.

    Parameters
    ----------
    initial
        A function, an expression or ``None``.
    u
        The state.
    control
        As given.
    found
        Functions in the residual and in boundary values.
    t, t0
        The time, and its value in the expression.

    Returns
    -------
    expression
        With ``t0`` in the place of ``t``; ``None`` where a function is given.
    function
        Of its own for an expression, and a control where the expression contains some.
    control
        As given but for those that are in the expression only.

    Raises
    ------
    InputError
        If it cannot be interpolated.
    """
    V = u.function_space()
    if initial is None or isinstance(initial, Function):
        if initial is not None and initial.function_space() != V:
            raise InputError("initial: give a Function in the state's space, or an expression to be interpolated")
        return None, initial, control
    controls = list(control) if isinstance(control, (list, tuple)) else [] if control is None else [control]
    try:
        with stop_annotating():
            expression = ufl.as_ufl(initial)
            if t is not None:  # a constant, as a number might leave no control in a * t
                expression = ufl.replace(expression, {t: Constant(t0, name="t0")})
            made = Function(V, name="initial condition").interpolate(expression)
    except Exception as error:  # UFL and Firedrake raise many kinds
        raise InputError(
            f"initial: {type(initial).__name__} cannot be interpolated into the state's space ({error}); give a "
            "Function in it or an expression of its shape"
        ) from error
    inside = set(extract_coefficients(expression))
    if u in inside:
        raise InputError("initial: the expression contains the state u, whose initial value it is")
    if not inside & set(controls):
        return expression, made, control
    return expression, made, [*(c for c in controls if c in found or c not in inside), made]


class InitialExpression:
    """``E`` and its derivatives on own values.

    Parameters
    ----------
    expression
        In functions that may be written to.
    V
        The state's space.
    controls
        The functions in the expression that are controls.
    """

    def __init__(self, expression, V, controls: Sequence[Function]):
        self.V, self.controls, self._value = V, list(controls), expression
        self._directions = [Function(c.function_space()) for c in self.controls]
        slopes = [self._slope(expression, c, d) for c, d in zip(self.controls, self._directions, strict=True)]
        #: Whether it is affine in the controls.
        self.affine = not set(self.controls) & {c for slope in slopes for c in extract_coefficients(slope)}
        self._along = sum(slopes[1:], start=slopes[0])
        self._kept: tuple[list[np.ndarray], list] | None = None

    @staticmethod
    def _slope(expression, control: Function, direction):
        return apply_derivatives(apply_algebra_lowering(derivative(expression, control, direction)))

    def _put(self, functions, parts: Sequence[np.ndarray]) -> None:
        for f, part in zip(functions, parts, strict=True):
            put(f, part)

    def value(self, z: Sequence[np.ndarray]) -> np.ndarray:
        """``E(z)``, ``(n,)``; ``z`` are the controls' own values."""
        self._put(self.controls, z)
        with stop_annotating():
            return get(Function(self.V).interpolate(self._value))

    def tangent(self, z: Sequence[np.ndarray], dz: Sequence[np.ndarray]) -> np.ndarray:
        """``E'(z) dz``, ``(n,)``."""
        out = np.zeros(own_size(self.V))
        for operator, part in zip(self._derivative(z), dz, strict=True):
            out += operator(part)
        return out

    def adjoint(self, z: Sequence[np.ndarray], lam: np.ndarray) -> list[np.ndarray]:
        """``E'(z)^T lam`` of each control, dual vectors."""
        return [operator.transposed(lam) for operator in self._derivative(z)]

    def second(self, z: Sequence[np.ndarray], dz: Sequence[np.ndarray], lam: np.ndarray) -> list[np.ndarray]:
        """``(E''(z) dz)^T lam`` of each control."""
        if self.affine:
            return [np.zeros(own_size(c.function_space())) for c in self.controls]
        self._put(self.controls, z)
        self._put(self._directions, dz)
        return [operator.transposed(lam) for operator in self._operators(self._along)]

    def _derivative(self, z: Sequence[np.ndarray]) -> list:
        """``E'(z)``, the last one kept, collectively the same one."""
        same = self._kept is not None and (self.affine or all(map(np.array_equal, self._kept[0], z)))
        if not self.V.mesh().comm.allreduce(int(not same)):
            return self._kept[1]
        self._put(self.controls, z)
        self._kept = [np.array(part) for part in z], self._operators(self._value)
        return self._kept[1]

    def forget(self) -> None:
        """Data in the expression have other values."""
        self._kept = None

    def _operators(self, expression) -> list:
        """The derivative of an expression by each control, at the values that the functions have."""
        with stop_annotating():
            return [self._operator(expression, control) for control in self.controls]

    def _operator(self, expression, control: Function):
        space = control.function_space()
        if is_real(space):
            column = lambda one: Function(self.V).interpolate(self._slope(expression, control, one))
            return RealOperator(space, column, _NOTHING)
        slope = self._slope(expression, control, TrialFunction(space))
        return MatrixOperator(assemble(interpolate(slope, self.V)).petscmat, _NOTHING)
