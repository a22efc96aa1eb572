r"""Controls in boundary values: :math:`u = E(z, t)` on the Dirichlet rows, with ``E`` affine in the controls.

A change :math:`\delta z` changes the rows by :math:`D\,\delta z`, ``D`` the interpolation of the derivative of ``E``;
derivatives with respect to boundary values are pulled back by its transpose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import ufl
from firedrake import DirichletBC, Function, TrialFunction, assemble, derivative, interpolate
from ufl.algorithms import extract_coefficients
from ufl.algorithms.apply_algebra_lowering import apply_algebra_lowering
from ufl.algorithms.apply_derivatives import apply_derivatives

from pint_fem.errors import InputError
from pint_fem.evolution.control_operators import MatrixOperator, RealOperator
from pint_fem.kernels.arrays import boundary_rows, condition_rows, is_real, own_size, rows_in_whole

if TYPE_CHECKING:
    from pint_fem.evolution.evolution import Evolution

__all__ = ["BoundaryControls", "boundary_value", "control_values"]


def boundary_value(bc: DirichletBC) -> ufl.core.expr.Expr:
    """The value of a condition as UFL, as the user gave it."""
    value = bc._original_arg
    return ufl.as_tensor(value) if isinstance(value, (list, tuple)) else ufl.as_ufl(value)


def control_values(evolution: Evolution) -> BoundaryControls | None:
    """The boundary values' operators; ``None`` where no control is in one."""
    found = {c for bc in evolution.bcs for c in extract_coefficients(boundary_value(bc))}
    return BoundaryControls(evolution) if found & set(evolution.parameters) else None


class BoundaryControls:
    """``D`` on the own rows, for the time that ``evolution.t`` has; assembled once where it does not depend on time.

    Raises
    ------
    InputError
        If a boundary value is not affine in a control.
    """

    def __init__(self, evolution: Evolution):
        self.evolution = evolution
        self.rows = boundary_rows(evolution.bcs, evolution.V)
        # the control's number, derivative as an expression of a direction, the condition's space, its rows there and in
        # the whole space
        self._terms = []
        self.depends_on_time = False
        taken = np.zeros(0, dtype=np.int32)
        for bc in reversed(evolution.bcs):  # where conditions overlap, the last one counts
            local = condition_rows(bc)
            rows = rows_in_whole(bc.function_space())[local]
            first = ~np.isin(rows, taken)
            local, rows = local[first], rows[first]
            taken = np.union1d(taken, rows)
            value = boundary_value(bc)
            for index, control in enumerate(evolution.parameters):
                if control not in extract_coefficients(value):
                    continue
                slope = lambda direction, value=value, control=control: apply_derivatives(
                    apply_algebra_lowering(derivative(value, control, direction))
                )
                moving = set(extract_coefficients(slope(Function(control.function_space()))))
                if moving & {*evolution.parameters, evolution.u}:
                    raise InputError(f"a boundary value is not affine in the control {control.name()!r}")
                self.depends_on_time |= evolution.t in moving
                self._terms.append((index, slope, bc.function_space(), local, rows))
        self._operators: list[list[tuple]] | None = None

    def _assembled(self) -> list[list[tuple]]:
        """Of each control: operators to the conditions' spaces, rows there and in the whole space, its size."""
        if self._operators is None or self.depends_on_time:
            made = [[] for _ in self.evolution.parameters]
            for index, slope, V, local, rows in self._terms:
                space = self.evolution.parameters[index].function_space()
                drop = np.setdiff1d(np.arange(own_size(V)), local)
                if is_real(space):
                    columns = lambda one, slope=slope, V=V: Function(V).interpolate(slope(one))
                    operator = RealOperator(space, columns, drop)
                else:
                    matrix = assemble(interpolate(slope(TrialFunction(space)), V)).petscmat
                    operator = MatrixOperator(matrix, drop)
                made[index].append((operator, local, rows, own_size(V)))
            self._operators = made
        return self._operators

    def update_data(self) -> None:
        """Data in the boundary values have other values now: assemble the operators again when they are next used."""
        self._operators = None

    def lift(self, dz: np.ndarray) -> np.ndarray:
        """``D dz`` on the Dirichlet rows, zero elsewhere, ``(n,)``, for a step's vector of controls."""
        out = np.zeros(self.evolution.state_size)
        for operators, part in zip(self._assembled(), self.evolution.split_controls(dz), strict=True):
            for operator, local, rows, _ in operators:
                out[rows] += operator(part)[local]
        return out

    def pull_back(self, r: np.ndarray) -> np.ndarray:
        """``D^T r`` of what is on the Dirichlet rows of ``r`` ``(n,)``, a step's vector of controls."""
        out = np.zeros(self.evolution.control_size)
        for operators, part in zip(self._assembled(), self.evolution.split_controls(out), strict=True):
            for operator, local, rows, size in operators:
                values = np.zeros(size)
                values[local] = r[rows]
                part += operator.transposed(values)
        return out
