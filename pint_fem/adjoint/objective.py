"""The reduced problem in an inner product, as optimisers see it: flat arrays in, representatives out."""

from __future__ import annotations

import numpy as np

from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.adjoint.riesz import ControlInner
from pint_fem.mgrit import SolverFailure

__all__ = ["Objective"]


class Objective:
    """What :class:`pint_fem.optimize.Problem` asks for.

    Parameters
    ----------
    problem
        Value and derivatives.
    inner
        The inner product; gradients and Hessian actions are representatives in it.
    """

    def __init__(self, problem: ReducedProblem, inner: ControlInner):
        self.problem, self._inner = problem, inner

    def value(self, x: np.ndarray) -> float:
        """``J(x)``; infinite where a sweep fails (on every rank alike): trial steps are then shortened."""
        try:
            return self.problem.value(x)
        except SolverFailure:
            return np.inf

    def gradient(self, x: np.ndarray) -> np.ndarray:
        """Representative of ``J'(x)``."""
        return self._inner.primal(self.problem.derivative(x))

    def hessian_action(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Representative of ``J''(x) v``."""
        return self._inner.primal(self.problem.hessian_action(x, v))

    def gauss_newton_action(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The same without the second derivatives of the steps."""
        return self._inner.primal(self.problem.hessian_action(x, v, gauss_newton=True))

    def inner(self, a: np.ndarray, b: np.ndarray) -> float:
        """The inner product."""
        return self._inner.inner(a, b)

    def dual(self, g: np.ndarray) -> np.ndarray:
        """Coefficients of the functional that ``g`` represents."""
        return self._inner.dual(g)

    @property
    def weights(self) -> np.ndarray | None:
        """The product's matrix where it is diagonal, else ``None``."""
        return self._inner.weights

    @property
    def owned(self) -> np.ndarray:
        """Which entries this rank contributes, the others being copies."""
        return self.problem.layout.owned
