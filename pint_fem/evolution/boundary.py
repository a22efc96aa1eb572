r"""Controls in boundary values: :math:`u = E(z, t)` on the Dirichlet rows, with ``E`` affine in the controls.

A change :math:`\delta z` changes the rows by :math:`D\,\delta z`, ``D`` the interpolation of the derivative of ``E``;
derivatives with respect to boundary values are pulled back by its transpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import ufl
from firedrake import DirichletBC, Function
from firedrake.functionspaceimpl import WithGeometry
from ufl.algorithms import extract_coefficients

from pint_fem.errors import InputError
from pint_fem.evolution.control_operators import ControlOperator, expression_derivative, interpolation_operator
from pint_fem.kernels.arrays import condition_rows, own_size, rows_in_whole, split_values

__all__ = ["BoundaryControls", "boundary_controls", "boundary_value"]


def boundary_value(bc: DirichletBC) -> ufl.core.expr.Expr:
    """The value of a Dirichlet condition as a UFL expression, as the user gave it."""
    value = bc._original_arg
    return ufl.as_tensor(value) if isinstance(value, (list, tuple)) else ufl.as_ufl(value)


class _Dependence(NamedTuple):
    """A control in the value of a condition: its number, the value, the condition's space, and the rows that the
    condition fixes, among those of its space and of the state's.
    """

    index: int
    value: ufl.core.expr.Expr
    space: object
    local: np.ndarray
    rows: np.ndarray


class BoundaryControls:
    """The operator ``D`` on a rank's own rows at the present time; assembled once where it does not depend on time.

    Parameters
    ----------
    bcs
        Dirichlet conditions on ``V`` or parts of it.
    V
        The state's space.
    parameters
        Controls of a step.
    u
        The state.
    t
        Time function, or ``None``.

    Attributes
    ----------
    depends_on_time : bool
        Whether ``D`` depends on time.

    Raises
    ------
    InputError
        If a boundary value is not affine in a control.
    """

    def __init__(
        self,
        bcs: Sequence[DirichletBC],
        V: WithGeometry,
        parameters: Sequence[Function],
        u: Function,
        t: Function | None,
    ):
        self._parameters, self._size = parameters, own_size(V)
        self._dependences: list[_Dependence] = []
        self.depends_on_time = False
        fixed = np.zeros(0, dtype=np.int32)
        for bc in reversed(bcs):  # where conditions overlap, the last one holds
            local = condition_rows(bc)
            rows = rows_in_whole(bc.function_space())[local]
            first = ~np.isin(rows, fixed)
            local, rows = local[first], rows[first]
            fixed = np.union1d(fixed, rows)
            value = boundary_value(bc)
            for index, control in enumerate(parameters):
                if control not in extract_coefficients(value):
                    continue
                slope = expression_derivative(value, control, Function(control.function_space()))
                moving = set(extract_coefficients(slope))
                if moving & {*parameters, u}:
                    raise InputError(f"a boundary value is not affine in the control {control.name()!r}")
                self.depends_on_time |= t in moving
                self._dependences.append(_Dependence(index, value, bc.function_space(), local, rows))
        self._operators: list[ControlOperator] | None = None

    def _assembled(self) -> list[ControlOperator]:
        """Operators from a control to the condition's space, one for each dependence."""
        if self._operators is None or self.depends_on_time:
            self._operators = []
            for index, value, space, local, _ in self._dependences:
                other_rows = np.setdiff1d(np.arange(own_size(space)), local)
                self._operators.append(interpolation_operator(value, self._parameters[index], space, other_rows))
        return self._operators

    def update_data(self) -> None:
        """Discard the operators, as data in the boundary values have changed; they are assembled when next needed."""
        self._operators = None

    def lift(self, dz: np.ndarray) -> np.ndarray:
        """The product ``D dz``, ``(n,)``, zero off the Dirichlet rows, for a step's vector of controls ``(nz,)``."""
        out, parts = np.zeros(self._size), split_values(dz, self._parameters)
        for operator, (index, _, _, local, rows) in zip(self._assembled(), self._dependences, strict=True):
            out[rows] += operator(parts[index])[local]
        return out

    def pull_back(self, r: np.ndarray) -> np.ndarray:
        """The product ``D^T r``, ``(nz,)``, with the entries of ``r`` ``(n,)`` on the Dirichlet rows."""
        out = np.zeros(sum(own_size(c.function_space()) for c in self._parameters))
        parts = split_values(out, self._parameters)
        for operator, (index, _, space, local, rows) in zip(self._assembled(), self._dependences, strict=True):
            values = np.zeros(own_size(space))
            values[local] = r[rows]
            parts[index] += operator.transposed(values)
        return out

    def pull_back_rows(self, rows: np.ndarray) -> np.ndarray:
        """:meth:`pull_back` of each of several vectors ``(k, n)``, ``(k, nz)``; ``k`` is the same on all ranks."""
        out = np.zeros((len(rows), sum(own_size(c.function_space()) for c in self._parameters)))
        parts = split_values(out, self._parameters)
        for operator, (index, _, space, local, own) in zip(self._assembled(), self._dependences, strict=True):
            values = np.zeros((len(rows), own_size(space)))
            values[:, local] = rows[:, own]
            parts[index] += operator.transposed_rows(values)
        return out

    @property
    def indices(self) -> set[int]:
        """Numbers of the parameters that boundary values contain."""
        return {dependence.index for dependence in self._dependences}


def boundary_controls(
    bcs: Sequence[DirichletBC], V: WithGeometry, parameters: Sequence[Function], u: Function, t: Function | None
) -> BoundaryControls | None:
    """The operator of controls in boundary values, with the parameters and errors of :class:`BoundaryControls`;
    ``None`` where no value contains one.
    """
    found = {c for bc in bcs for c in extract_coefficients(boundary_value(bc))}
    return BoundaryControls(bcs, V, parameters, u, t) if found & set(parameters) else None
