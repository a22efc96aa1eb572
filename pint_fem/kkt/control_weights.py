r"""The second derivative of the regularisation of controls with one value per step, and solves with it.

It is :math:`R = \Delta t\, R_1` for each step with the matrix :math:`R_1` of a bilinear form for each control, without
mixed terms; and, where rates of change are regularised, :math:`\Delta t\, R_t` for each rate :math:`(z_{n+1} - z_n) /
\Delta t`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import ufl
from firedrake import Function, assemble
from firedrake.functionspaceimpl import WithGeometry
from firedrake.petsc import PETSc

from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.kernels.arrays import is_real, own_size
from pint_fem.kernels.block_operator import BlockOperator, ManySolves
from pint_fem.kernels.factor import Factor, is_symmetric

__all__ = ["ControlWeights"]


class _MatrixWeight:
    """Products and solves with a sparse matrix."""

    def __init__(self, form: ufl.Form, name: str, *, solves: bool):
        self.matrix = assemble(form, mat_type="aij").petscmat
        if not is_symmetric(self.matrix):
            raise InputError(f"regularisation of {name!r}: its second derivative is not symmetric")
        self._product = BlockOperator(self.matrix)
        if solves:
            x, y = self.matrix.createVecs()
            x.array[:] = np.random.default_rng(self.matrix.comm.rank).standard_normal(x.getLocalSize())
            self.matrix.mult(x, y)
            if x.dot(y) < 0:
                raise InputError(f"regularisation of {name!r}: its second derivative is not positive")
            self._solves = ManySolves(Factor(self.matrix, {}, symmetric=True, prefix="kkt_control_"))

    def multiply(self, rows: np.ndarray) -> np.ndarray:
        return self._product(np.ascontiguousarray(rows))

    def solve(self, rows: np.ndarray) -> np.ndarray:
        return self._solves(rows)


class _RealWeight:
    """Products and solves with a number."""

    def __init__(self, form: ufl.Form, space: WithGeometry, *, solves: bool):
        one = Function(space).assign(1.0)
        self.value = float(assemble(ufl.replace(form, dict.fromkeys(form.arguments(), one))))
        if solves and not self.value > 0:
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
    rates
        One for the rates of change of each of them, or ``None``.

    Attributes
    ----------
    has_rates : bool
        Whether there are any of the latter.

    Raises
    ------
    InputError
        If a form is missing, not symmetric or singular, naming the control.
    """

    def __init__(
        self, evolution: Evolution, forms: Sequence[ufl.Form | None], rates: Sequence[ufl.Form | None] | None = None
    ):
        self.dt, self.evolution = evolution.dt, evolution
        self._weights: list[_MatrixWeight | _RealWeight] = []
        for control, form in zip(evolution.parameters, forms, strict=True):
            name = control.name()
            if form is None or form.empty():
                raise InputError(
                    f"the KKT system requires a regularisation that is quadratic in control {name!r}, such as "
                    "alpha/2*inner(q, q)*dx"
                )
            self._weights.append(_weight(form, control, solves=True))
        rates = [None] * len(self._weights) if rates is None else rates
        self._rates = [
            None if form is None or form.empty() else _weight(form, control, solves=False)
            for control, form in zip(evolution.parameters, rates, strict=True)
        ]
        self.has_rates = any(rate is not None for rate in self._rates)

    @property
    def matrices(self) -> list[PETSc.Mat | float]:
        """The assembled matrix of each control for weight 1, a number for a real one."""
        return [w.matrix if isinstance(w, _MatrixWeight) else w.value for w in self._weights]

    @property
    def rate_matrices(self) -> list[PETSc.Mat | float | None]:
        """The same for the rates of change, ``None`` where there is none."""
        return [None if w is None else w.matrix if isinstance(w, _MatrixWeight) else w.value for w in self._rates]

    def _apply(self, name: str, rows: np.ndarray, weight: float, weights: Sequence | None = None) -> np.ndarray:
        out = np.zeros(rows.shape)
        begin = 0
        for control, one in zip(self.evolution.parameters, weights or self._weights, strict=True):
            part = slice(begin, begin + own_size(control.function_space()))
            if one is not None:
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

    def multiply_rates(self, rows: np.ndarray) -> np.ndarray:
        r"""The products of :math:`\Delta t\, R_t / \Delta t^2` with rows ``(k, nz)`` (collective over space)."""
        return self._apply("multiply", rows, 1 / self.dt, self._rates)


def _weight(form: ufl.Form, control: Function, *, solves: bool) -> _MatrixWeight | _RealWeight:
    """The second derivative by a control."""
    space = control.function_space()
    if is_real(space):
        return _RealWeight(form, space, solves=solves)
    return _MatrixWeight(form, control.name(), solves=solves)
