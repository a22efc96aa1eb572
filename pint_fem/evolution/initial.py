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
from firedrake import Constant, Function
from firedrake.functionspaceimpl import WithGeometry
from pyadjoint.tape import stop_annotating
from ufl.algorithms import extract_coefficients

from pint_fem.errors import InputError
from pint_fem.evolution.control_operators import ControlOperator, expression_derivative, interpolation_operator
from pint_fem.kernels.arrays import get, own_size, put

__all__ = ["InitialExpression", "split_initial"]

_NO_ROWS = np.zeros(0, dtype=int)


def split_initial(
    initial: Function | ufl.core.expr.Expr | None,
    u: Function,
    control: Function | Sequence[Function] | None,
    found: set,
    t: Function | None,
    t0: float,
) -> tuple[ufl.core.expr.Expr | None, Function | None, Sequence | Function | None]:
    """Split what a user gives as ``initial=`` into an expression, a function and the evolution's controls.

    Parameters
    ----------
    initial
        A function, an expression or ``None``, as the user gave it.
    u
        The state.
    control
        The controls, as the user gave them.
    found
        Functions in the residual and in boundary values.
    t, t0
        The time function, or ``None``, and the time at which an expression is evaluated.

    Returns
    -------
    expression
        The expression with ``t0`` in the place of ``t``; ``None`` where a function is given.
    function
        The initial condition; for an expression a new function, which is a control where the expression contains one.
    control
        The controls as given, without those that are in the expression only.

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
    """An initial condition ``E(z)`` and its derivatives, on own values.

    Parameters
    ----------
    expression
        The expression, in functions that may be written to.
    V
        The state's space.
    controls
        The functions in the expression that are controls.

    Attributes
    ----------
    affine : bool
        Whether the expression is affine in the controls.
    """

    def __init__(self, expression: ufl.core.expr.Expr, V: WithGeometry, controls: Sequence[Function]):
        self.V, self.controls, self._value = V, list(controls), expression
        self._directions = [Function(c.function_space()) for c in self.controls]
        pairs = zip(self.controls, self._directions, strict=True)
        slopes = [expression_derivative(expression, control, direction) for control, direction in pairs]
        self.affine = not set(self.controls) & {c for slope in slopes for c in extract_coefficients(slope)}
        self._directional = sum(slopes[1:], start=slopes[0])
        self._cached: tuple[list[np.ndarray], list[ControlOperator]] | None = None

    def _put(self, functions: Sequence[Function], parts: Sequence[np.ndarray]) -> None:
        for f, part in zip(functions, parts, strict=True):
            put(f, part)

    def value(self, z: Sequence[np.ndarray]) -> np.ndarray:
        """``E(z)``, ``(n,)``, for the controls' own values ``z``."""
        self._put(self.controls, z)
        with stop_annotating():
            return get(Function(self.V).interpolate(self._value))

    def tangent(self, z: Sequence[np.ndarray], dz: Sequence[np.ndarray]) -> np.ndarray:
        """``E'(z) dz``, ``(n,)``, for own values ``z`` and directions ``dz`` of the controls."""
        out = np.zeros(own_size(self.V))
        for operator, part in zip(self._derivative(z), dz, strict=True):
            out += operator(part)
        return out

    def adjoint(self, z: Sequence[np.ndarray], lam: np.ndarray) -> list[np.ndarray]:
        """``E'(z)^T lam`` for each control, dual vectors."""
        return [operator.transposed(lam) for operator in self._derivative(z)]

    def second(self, z: Sequence[np.ndarray], dz: Sequence[np.ndarray], lam: np.ndarray) -> list[np.ndarray]:
        """``(E''(z) dz)^T lam`` for each control, dual vectors."""
        if self.affine:
            return [np.zeros(own_size(c.function_space())) for c in self.controls]
        self._put(self.controls, z)
        self._put(self._directions, dz)
        present = set(extract_coefficients(self._directional))
        nonlinear = [c for c in self.controls if c in present]
        found = dict(zip(nonlinear, self._operators(self._directional, nonlinear), strict=True))
        size = lambda c: own_size(c.function_space())
        return [found[c].transposed(lam) if c in found else np.zeros(size(c)) for c in self.controls]

    def _derivative(self, z: Sequence[np.ndarray]) -> list[ControlOperator]:
        """``E'(z)``; the last one is cached, and used again if all ranks in space have the same ``z`` as then."""
        same = self._cached is not None and (self.affine or all(map(np.array_equal, self._cached[0], z)))
        if not self.V.mesh().comm.allreduce(int(not same)):
            return self._cached[1]
        self._put(self.controls, z)
        self._cached = [np.array(part) for part in z], self._operators(self._value, self.controls)
        return self._cached[1]

    def invalidate(self) -> None:
        """Discard the cached derivative, as data in the expression have changed."""
        self._cached = None

    def _operators(self, expression: ufl.core.expr.Expr, controls: Sequence[Function]) -> list[ControlOperator]:
        """The derivative of an expression by each of some controls in it, at the values that the functions have."""
        with stop_annotating():
            return [interpolation_operator(expression, control, self.V, _NO_ROWS) for control in controls]
