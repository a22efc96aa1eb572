r"""The second derivative of the regularisation of controls with one value per step, and solves with it.

It is :math:`R = \Delta t\, R_1` for each step with the matrix :math:`R_1` of a bilinear form for each control, without
mixed terms.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import ufl
from firedrake import Function, assemble
from firedrake.petsc import PETSc

from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.kernels.arrays import is_real, own_size
from pint_fem.kernels.block_operator import BlockOperator, ManySolves
from pint_fem.kernels.factor import Factor, is_symmetric

__all__ = ["ControlWeights"]


class _MatrixWeight:
    """Products and solves with a sparse matrix."""

    def __init__(self, form: ufl.Form, name: str):
        self.matrix = assemble(form, mat_type="aij").petscmat
        if not is_symmetric(self.matrix):
            raise InputError(f"regularisation of {name!r}: its second derivative is not symmetric")
        self._product = BlockOperator(self.matrix)
        self._solves = ManySolves(Factor(self.matrix, {}, symmetric=True, prefix="kkt_control_"))

    def multiply(self, rows: np.ndarray) -> np.ndarray:
        return self._product(np.ascontiguousarray(rows))

    def solve(self, rows: np.ndarray) -> np.ndarray:
        return self._solves(rows)


class _RealWeight:
    """Products and solves with a number."""

    def __init__(self, form: ufl.Form, space):
        one = Function(space).assign(1.0)
        self.value = float(assemble(ufl.replace(form, dict.fromkeys(form.arguments(), one))))
        if not self.value > 0:
            raise InputError("regularisation of a real control: its second derivative is not positive")

    def multiply(self, rows: np.ndarray) -> np.ndarray:
        return self.value * rows

    def solve(self, rows: np.ndarray) -> np.ndarray:
        return rows / self.value


class ControlWeights:
    """The second derivative of the regularisation for one step, on rows of controls.

    Parameters
    ----------
    evolution
        All its parameters have one value per step.
    forms
        A bilinear form for each of its ``parameters``, positive definite.

    Raises
    ------
    InputError
        If a form is missing, not symmetric or singular, naming the control.
    """

    def __init__(self, evolution: Evolution, forms: Sequence[ufl.Form | None]):
        self.dt, self.evolution = evolution.dt, evolution
        self._weights: list[_MatrixWeight | _RealWeight] = []
        for control, form in zip(evolution.parameters, forms, strict=True):
            name, space = control.name(), control.function_space()
            if form is None or form.empty():
                raise InputError(
                    f"the KKT system requires a regularisation that is quadratic in control {name!r}, such as "
                    "alpha/2*inner(q, q)*dx"
                )
            self._weights.append(_RealWeight(form, space) if is_real(space) else _MatrixWeight(form, name))

    @property
    def matrices(self) -> list[PETSc.Mat | float]:
        """The assembled matrix of each control for weight 1, a number for a real one."""
        return [w.matrix if isinstance(w, _MatrixWeight) else w.value for w in self._weights]

    def _apply(self, name: str, rows: np.ndarray, weight: float) -> np.ndarray:
        out = np.empty(rows.shape)
        begin = 0
        for control, one in zip(self.evolution.parameters, self._weights, strict=True):
            part = slice(begin, begin + own_size(control.function_space()))
            out[:, part] = getattr(one, name)(np.ascontiguousarray(rows[:, part]))
            begin = part.stop
        out *= weight
        return out

    def multiply(self, rows: np.ndarray) -> np.ndarray:
        """``R z`` of each step, dual vectors ``(k, nz)`` (collective over space)."""
        return self._apply("multiply", rows, self.dt)

    def solve(self, rows: np.ndarray) -> np.ndarray:
        """``R^{-1} c`` of each step for dual vectors ``(k, nz)`` (collective over space)."""
        return self._apply("solve", rows, 1 / self.dt)
