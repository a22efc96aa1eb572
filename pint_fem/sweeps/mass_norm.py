"""Norms of states in the inner product of their function space, for the residuals of time-parallel solves."""

from __future__ import annotations

import numpy as np
from firedrake import TestFunction, TrialFunction, assemble, dx, inner

from pint_fem.kernels.blocks import Factor
from pint_fem.spacetime import SpaceTime

__all__ = ["MassNorm"]


class MassNorm:
    """Squared L2 norms of states: ``u^T M u`` of coefficients, ``l^T M^{-1} l`` of dual vectors (adjoints).

    One product (solve) a state, so a state's bits do not depend on the others.

    Parameters
    ----------
    V
        Function space of the state.
    spacetime
        Process grid.
    dual
        Whether states are dual vectors.
    """

    def __init__(self, V, spacetime: SpaceTime, *, dual: bool = False):
        self.spacetime, self.dual = spacetime, dual
        self.M = assemble(inner(TrialFunction(V), TestFunction(V)) * dx, mat_type="aij").petscmat
        self._x, self._y = self.M.createVecs()
        self._factor = Factor(self.M, {}, symmetric=True) if dual else None

    def finite(self, block: np.ndarray) -> np.ndarray:
        """Cheap squared norms, to find states that are not finite."""
        return self.spacetime.point_norms(block)

    def __call__(self, block: np.ndarray) -> np.ndarray:
        """Squared norms of the states ``(k, own dofs)``, shape ``(k,)`` (collective over space)."""
        out = np.empty(len(block))
        for i, row in enumerate(block):
            self._x.array[:] = row
            if self.dual:
                self._factor.solve(self._x, self._y)
            else:
                self.M.mult(self._x, self._y)
            out[i] = row @ self._y.array_r
        return self.spacetime.sum_over_space(out)
