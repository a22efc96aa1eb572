"""The reduced problem in an inner product, as optimisers see it: flat arrays in, representatives out."""

from __future__ import annotations

import numpy as np

from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.adjoint.riesz import ControlInner
from pint_fem.errors import SolverFailure, release

__all__ = ["Objective"]


class Objective:
    """What :class:`pint_fem.optimize.Problem` asks for.

    Parameters
    ----------
    problem
        Value and derivatives.
    inner
        The inner product; gradients and Hessian actions are representatives in it.
    scaling
        What ``weights`` says instead of the inner product's diagonal.

    Attributes
    ----------
    comm : mpi4py communicator
        The ranks that evaluate together.
    failure : SolverFailure or None
        Why the last value was infinite.
    """

    def __init__(self, problem: ReducedProblem, inner: ControlInner, *, scaling: np.ndarray | None = None):
        self.problem, self._inner, self._scaling = problem, inner, scaling
        self.failure: SolverFailure | None = None
        #: Over which optimisers decide.
        self.comm = problem.spacetime.comm

    def _failed(self, failure: SolverFailure) -> float:
        """Keep why there is no value, and return what stands for it."""
        release(failure)
        self.failure = failure
        return np.inf

    def value(self, x: np.ndarray) -> float:
        """``J(x)``; infinite where a sweep fails for a numerical reason (on every rank): trial steps are then
        shortened. What failed is kept as :attr:`failure`.
        """
        self.failure = None
        try:
            value = self.problem.value(x)
        except SolverFailure as failure:
            return self._failed(failure)
        self._name_parts(value)
        return value

    def _name_parts(self, value: float) -> None:
        """Keep which part of a value is not finite: data, weights or states that overflow."""
        if not np.isfinite(value):
            parts = ", ".join(f"{name} {part:g}" for name, part in self.problem.parts.items())
            self.failure = SolverFailure(f"J is not finite: {parts}; see data and weights")

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
        """The product's matrix where it is diagonal, else ``None``; or the scaling of the variables."""
        return self._inner.weights if self._scaling is None else self._scaling

    def representative(self, dual: np.ndarray) -> np.ndarray:
        """Of a functional given by its coefficients."""
        return self._inner.primal(dual)

    def advance(self, x: np.ndarray) -> tuple[float, np.ndarray, float]:
        """``J`` and its gradient after one MGRIT cycle for each sweep, and their relative residual; infinite where a
        sweep fails (on every rank alike): it starts anew at the next design.
        """
        self.failure = None
        try:
            value, g, residual = self.problem.advance(x)
        except SolverFailure as failure:
            return self._failed(failure), np.zeros_like(x), np.inf
        return value, self._inner.primal(g), residual

    def update_copies(self, x: np.ndarray) -> None:
        """Set the entries that are copies from the rank that owns them."""
        self.problem.layout.share(x)

    @property
    def owned(self) -> np.ndarray:
        """Which entries this rank contributes, the others being copies."""
        return self.problem.layout.owned
