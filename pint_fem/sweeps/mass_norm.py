"""L2 norms of finite element states and of dual vectors, for the residuals of time-parallel solves."""

from __future__ import annotations

import numpy as np
from firedrake import TestFunction, TrialFunction, assemble, dx, inner
from firedrake.functionspaceimpl import WithGeometry

from pint_fem.kernels.factor import Factor
from pint_fem.spacetime import SpaceTime

__all__ = ["MassNorm"]


class MassNorm:
    r"""Squared norms :math:`u^T M u` of coefficients, or :math:`l^T M^{-1} l` of dual vectors, with the mass matrix.

    The result for a state is bitwise independent of the other states in its block.

    Parameters
    ----------
    V
        Function space of the state.
    spacetime
        Process grid.
    dual
        Whether states are dual vectors (adjoints).
    """

    def __init__(self, V: WithGeometry, spacetime: SpaceTime, *, dual: bool = False):
        self.spacetime, self.dual = spacetime, dual
        self.M = assemble(inner(TrialFunction(V), TestFunction(V)) * dx, mat_type="aij").petscmat
        self._x, self._y = self.M.createVecs()
        self._factor = Factor(self.M, {}, symmetric=True) if dual else None

    def finite(self, block: np.ndarray) -> np.ndarray:
        """Squared Euclidean norms ``(k,)``, which find states that are not finite at less cost."""
        return self.spacetime.point_norms(block)

    def __call__(self, block: np.ndarray) -> np.ndarray:
        """Squared norms ``(k,)`` of states ``(k, own dofs)`` (collective over space)."""
        out = np.empty(len(block))
        for i, row in enumerate(block):
            self._x.array[:] = row
            if self.dual:
                self._factor.solve(self._x, self._y)
            else:
                self.M.mult(self._x, self._y)
            out[i] = row @ self._y.array_r
        return self.spacetime.sum_over_space(out)
