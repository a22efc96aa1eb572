"""The reduced problem as the minimisers call it: on flat arrays, with Riesz representatives of derivatives."""

from __future__ import annotations

import numpy as np

from pint_fem.adjoint.interface import ControlProblem
from pint_fem.adjoint.riesz import ControlInner
from pint_fem.adjoint.total_variation.primal_dual import PrimalDualModel
from pint_fem.errors import SolverFailure

__all__ = ["Objective"]


class Objective:
    """A :class:`pint_fem.optimize.Problem` made of a reduced problem and an inner product.

    Parameters
    ----------
    problem : ControlProblem
        Value and derivatives, as dual vectors.
    inner : ControlInner
        The inner product; gradients and Hessian actions are representatives in it.
    scaling : ndarray, optional
        Scaling of the variables for scipy, as ``weights``; default: the diagonal of the inner product.

    Attributes
    ----------
    comm : mpi4py communicator
        The ranks that evaluate collectively.
    model : PrimalDualModel
        What stands for the second derivatives of total variations in products at an iterate that :meth:`prepare` was
        called for.
    iterate : ndarray or None
        The iterate that :meth:`prepare` was called for last.
    failure : SolverFailure or None
        Why the last value was not finite.
    """

    def __init__(self, problem: ControlProblem, inner: ControlInner, *, scaling: np.ndarray | None = None):
        self.problem, self._inner, self._scaling = problem, inner, scaling
        self.failure: SolverFailure | None = None
        self.iterate: np.ndarray | None = None
        self.comm = problem.spacetime.comm
        self.model = PrimalDualModel(problem)

    def value(self, x: np.ndarray) -> float:
        """``J(x)``.

        Raises
        ------
        SolverFailure
            If a sweep fails for a numerical reason, on every rank; minimisers then use infinity.
        """
        value = self.problem.value(x)
        self._report_parts(value)
        return value

    def _report_parts(self, value: float) -> None:
        """Store the parts of a value that is not finite: data, weights or states overflow."""
        self.failure = None
        if not np.isfinite(value):
            parts = ", ".join(f"{name} {part:g}" for name, part in self.problem.parts.items())
            self.failure = SolverFailure(f"J is not finite: {parts}; see data and weights")

    def gradient(self, x: np.ndarray) -> np.ndarray:
        """The representative of ``J'(x)``."""
        return self._inner.primal(self.problem.derivative(x))

    def hessian_action(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The representative of ``J''(x) v``."""
        return self._product(self.problem.hessian_action(x, v), v)

    def hessian_actions(self, x: np.ndarray, vs: list[np.ndarray]) -> list[np.ndarray]:
        """The representatives of ``J''(x) v`` for several directions, by sweeps of all of them at once."""
        return [self._product(h, v) for h, v in zip(self.problem.hessian_actions(x, vs), vs, strict=True)]

    def gauss_newton_action(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The representative of ``J''(x) v`` without the second derivatives of the steps."""
        return self._product(self.problem.hessian_action(x, v, gauss_newton=True), v)

    def prepare(self, x: np.ndarray) -> None:
        """Let the products that follow be those at the iterate ``x`` of a trust region, with the primal-dual operators
        of total variations.
        """
        self.iterate = x
        self.model.move_to(x)

    def _product(self, h: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The representative of a Hessian action in direction ``v``, with those operators."""
        return self._inner.primal(self.model.add(h, v))

    def inner(self, a: np.ndarray, b: np.ndarray) -> float:
        """The inner product (a, b) of the controls."""
        return self._inner.inner(a, b)

    def dual(self, g: np.ndarray) -> np.ndarray:
        """The coefficients of the functional that ``g`` represents."""
        return self._inner.dual(g)

    @property
    def weights(self) -> np.ndarray | None:
        """The scaling of the variables, or the product's diagonal matrix; ``None`` where that is not diagonal."""
        return self._inner.weights if self._scaling is None else self._scaling

    def representative(self, dual: np.ndarray) -> np.ndarray:
        """The representative of a functional given by its coefficients."""
        return self._inner.primal(dual)

    def advance(self, x: np.ndarray) -> tuple[float, np.ndarray, float]:
        """``J`` and its gradient after one MGRIT cycle for each sweep, and the relative residual.

        Raises
        ------
        SolverFailure
            If a sweep fails, on every rank; it starts anew at the next design.
        """
        self.failure = None
        value, g, residual = self.problem.advance(x)
        return value, self._inner.primal(g), residual

    def update_copies(self, x: np.ndarray) -> None:
        """Set the entries that are copies from the rank that owns them."""
        self.problem.layout.share(x)

    @property
    def owned(self) -> np.ndarray:
        """Which entries this rank contributes to the global vector; the others are copies."""
        return self.problem.layout.owned
