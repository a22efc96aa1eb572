r"""Loads of the stages where operators depend on controls: the lifting of boundary values depends on them, too.

With boundary values ``g`` and :math:`S = M + h K` without conditions, the load of a stage is :math:`h f(t_i, z) - S g`
on the free degrees of freedom, and ``g`` on the others.
"""

from __future__ import annotations

import numpy as np
import ufl
from firedrake import Function
from firedrake.assemble import get_assembler

from pint_fem.evolution.boundary import boundary_value
from pint_fem.evolution.control_operators import MatrixOperator
from pint_fem.kernels.arrays import get
from pint_fem.propagators.loads import StageLoads

__all__ = ["CoefficientLoads"]


class CoefficientLoads(StageLoads):
    """The loads of one level's stages, for operators that are set (:meth:`set_operators`); parameters as for
    :class:`~pint_fem.propagators.loads.StageLoads`.
    """

    def _prepare(self) -> None:
        ev = self.evolution
        load = ev.affine_parts.load
        self._source = None
        if not load.empty():
            at_zero = {control: Function(control.function_space()) for control in ev.parameters}
            self._source = get_assembler(ufl.replace(load, at_zero))
        zero = all(isinstance(boundary_value(bc), ufl.classes.Zero) for bc in ev.bcs)
        self.has_values = not zero
        self._sources: dict[tuple | int, tuple[np.ndarray, np.ndarray]] = {}

    def update_data(self) -> None:
        """Discard stored loads, as data in them have changed."""
        self._sources = {}
        self._discard()
        if not self._store and (self._lifting or not self.has_values):  # else when operators are set
            super().update_data()

    def set_operators(self, lifting: dict[float, MatrixOperator]) -> None:
        """Set the operators ``S`` without conditions by ``a_ii dt``, which lift boundary values."""
        if self.has_values:
            self._lifting = lifting
            self._discard()
            if not self._store:
                super().update_data()

    def _assemble(self, t: float, i: int) -> np.ndarray:
        key = (float(t), i) if self.evolution.depends_on_time else i
        if key not in self._sources:
            made = self._parts(t, i)
            if not (self._store and self.has_values):
                return self._combined(*made, i)
            self._sources[key] = made
        return self._combined(*self._sources[key], i)

    def _parts(self, t: float, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The load without boundary values, and the boundary values, ``(n,)``."""
        ev = self.evolution
        controls = ev.get_controls()
        self._lift_boundary_values(t, i)
        load = np.zeros(ev.state_size)
        if self._source is not None:
            load += self.steps[i] * get(self._source.assemble())
        load[self.bc_rows] = 0.0
        ev.put_controls(controls)
        return load, get(self._lift)

    def _combined(self, load: np.ndarray, values: np.ndarray, i: int) -> np.ndarray:
        """The load with the lifting of the boundary values."""
        load = load.copy()
        if self.has_values:
            load -= self._lifting[self.steps[i]](values)
            load[self.bc_rows] = values[self.bc_rows]
        return self._scaled(load)
