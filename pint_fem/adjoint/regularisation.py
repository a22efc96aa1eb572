"""A functional of the control alone, in UFL, with its derivative and Hessian action; constant operators are assembled
once.
"""

from __future__ import annotations

import numpy as np
import ufl
from firedrake import Function, TestFunction, TrialFunction, action, assemble, derivative
from firedrake.assemble import get_assembler
from ufl.algorithms import expand_derivatives, extract_coefficients

from pint_fem.errors import InputError
from pint_fem.propagators.arrays import get, put

__all__ = ["Regularisation"]


class Regularisation:
    r"""``R(z)`` for a static control, :math:`\sum_n \Delta t R(z_n)` for one a step.

    Parameters
    ----------
    form
        UFL functional of ``control`` and fixed data.
    control
        The evolution's control function.
    state
        The evolution's state, which must not appear.
    space_sum
        Sums a small array over the space ranks.

    Raises
    ------
    InputError
        If the form is no functional of the control alone.
    """

    def __init__(self, form: ufl.Form, control: Function, state: Function, space_sum):
        if not isinstance(form, ufl.Form) or form.arguments() or control not in extract_coefficients(form):
            raise InputError(
                "regularisation: give a functional of the control, such as alpha/2*inner(grad(q), grad(q))*dx"
            )
        if state in extract_coefficients(form):
            raise InputError("regularisation: the functional contains the state u; use a misfit for it")
        self.control, self._space_sum = control, space_sum
        space = control.function_space()
        self._dz = Function(space)
        gradient = expand_derivatives(derivative(form, control, TestFunction(space)))
        second = expand_derivatives(derivative(gradient, control, TrialFunction(space)))
        self.quadratic = not second.empty() and control not in extract_coefficients(second)
        self._value = get_assembler(form)
        self._gradient = get_assembler(gradient)
        if self.quadratic:
            self._matrix = assemble(second, mat_type="aij").petscmat
            self._x, self._y = self._matrix.createVecs()
            zero = Function(space)
            self._linear = get(assemble(ufl.replace(gradient, {control: zero})))
            self._constant = float(assemble(ufl.replace(form, {control: zero})))
        else:
            self._hessian = None if second.empty() else get_assembler(expand_derivatives(action(second, self._dz)))

    def _product(self, z: np.ndarray) -> np.ndarray:
        self._x.array[:] = z
        self._matrix.mult(self._x, self._y)
        return self._y.array_r.copy()

    def value(self, z: np.ndarray) -> float:
        """``R(z)`` for ``z`` ``(nz,)``."""
        if self.quadratic:
            return float(self._space_sum(np.array([z @ (0.5 * self._product(z) + self._linear)]))[0]) + self._constant
        put(self.control, z)
        return float(self._value.assemble())

    def gradient(self, z: np.ndarray) -> np.ndarray:
        """``R'(z)``, a dual vector ``(nz,)``."""
        if self.quadratic:
            return self._product(z) + self._linear
        put(self.control, z)
        return get(self._gradient.assemble())

    def hessian(self, z: np.ndarray, dz: np.ndarray) -> np.ndarray:
        """``R''(z) dz``, a dual vector ``(nz,)``."""
        if self.quadratic:
            return self._product(dz)
        if self._hessian is None:
            return np.zeros_like(dz)
        put(self.control, z)
        put(self._dz, dz)
        return get(self._hessian.assemble())
