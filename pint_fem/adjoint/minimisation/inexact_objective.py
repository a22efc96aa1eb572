r"""J, its gradient and Hessian products within tolerances, with as few cycles as these require.

With the state's residual :math:`r = \Phi(u) - u` the value is off by :math:`\lambda^T r` to first order (dual weighted
residual: R. Becker, R. Rannacher, Acta Numerica 10, 2001), hence

.. math::  |J_h - J| \approx |\lambda^T r| \le \|\lambda\|\,\|r\| ,

with the last adjoint (that of the iterate, while a trial point has none) and norms over the C-points, where the
residual is computed. A gradient's error is linear in the residuals of state and adjoint:
:math:`c_u\,\rho_u + c_\lambda\,\rho_\lambda` for relative residuals :math:`\rho`. For :math:`c_\lambda` the norm of the
adjoint's part of the gradient is used, which is linear in :math:`\lambda`; :math:`c_u` is measured whenever a gradient
is computed again more accurately,

.. math::  c_u = \|g_{\text{new}} - g_{\text{old}}\| / \rho_{u,\text{old}} .

Of a sum over several evolutions these are the norms of all states and all adjoints, and the largest relative residuals.
Hessian products are those of a symmetric operator near the Hessian, a fixed number of cycles and their transposes
(:mod:`~pint_fem.mgrit.transposed_cycles`, :mod:`~pint_fem.paradiag.transposed_iterations`), where there is one, and
otherwise solves to a tolerance of their own.

The theory of inexact trust regions requires errors only up to an unspecified constant
(:mod:`pint_fem.optimize.trust_region.inexact`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from pint_fem.adjoint.interface import SweptProblem
from pint_fem.adjoint.minimisation.objective import Objective
from pint_fem.adjoint.riesz import ControlInner

__all__ = ["InexactObjective"]

_TRIES = 3  # solves for one tolerance
_FALLS = 0.99  # residuals of a model, from one number of cycles to the next
_LOOSEST = 1e-2  # relative residual of a solve, with which solves start
_SAFETY = 0.5  # of what a tolerance allows


class InexactObjective(Objective):
    """An objective whose accuracy can be chosen; the trajectories of iterate and trial point are first guesses.

    Parameters
    ----------
    problem : SweptProblem
        Value and derivatives, whose accuracy can be chosen; the ``rtol`` of its sweeps is their smallest tolerance.
    inner : ControlInner
        The inner product.
    """

    def __init__(self, problem: SweptProblem, inner: ControlInner):
        super().__init__(problem, inner)
        self.tightest, self._most_cycles = problem.limits.rtol, problem.limits.max_it
        self.loosest = max(_LOOSEST, self.tightest)
        self._state_factor: float | None = None  # c_u
        self._adjoint_factor = 0.0  # c_lambda
        self._weight: float | None = None  # norm of the last adjoint
        self._cycles = 1  # of a product of the model
        problem.keep_evaluations(2)

    def state(self) -> dict[str, float | None]:
        """The numbers of the error estimates, for a checkpoint."""
        factors = {"weight": self._weight, "state": self._state_factor, "adjoint": self._adjoint_factor}
        return factors | {"cycles": self._cycles}

    def restore(self, state: dict[str, float | None]) -> None:
        """Set the numbers that :meth:`state` returned."""
        self._weight, self._state_factor = state["weight"], state["state"]
        self._adjoint_factor, self._cycles = state["adjoint"], state["cycles"]

    def _clip(self, rtol: float) -> float:
        """The tolerance within the range of the sweeps."""
        return min(max(rtol, self.tightest), self.loosest)

    # -- value ---------------------------------------------------------------------------------------------------------
    def value_within(self, x: np.ndarray, tolerance: float) -> tuple[float, float]:
        """``J(x)`` and an estimate of its error, at most ``tolerance`` where the sweeps' ``rtol`` allows.

        Raises
        ------
        SolverFailure
            If a sweep fails for a numerical reason, on every rank; minimisers then use infinity.
        """
        self.failure = None
        problem, rtol = self.problem, self.loosest
        for _ in range(_TRIES):
            value = problem.value(x, rtol=rtol)
            if not np.isfinite(value):  # with any accuracy
                self._report_parts(value)
                return value, 0.0
            if self._weight is None:
                problem.derivative(x, rtol=rtol)
                self._measure_adjoint(x)
            accuracy = problem.accuracy_at(x)
            error = self._weight * accuracy.state_residual
            if error <= tolerance or accuracy.state <= self.tightest:
                break
            rtol = self._clip(_SAFETY * accuracy.state * tolerance / error)
        return value, error

    def _measure_adjoint(self, x: np.ndarray) -> None:
        """Compute the norms of the adjoint and of its part of the gradient; sequential solves have no residuals."""
        self._weight = self.problem.accuracy_at(x).adjoint_norm
        self._adjoint_factor = self._norm(self._inner.primal(self.problem.current_derivative(x, regularised=False)))

    def _norm(self, v: np.ndarray) -> float:
        """The norm of a vector in the inner product."""
        return float(np.sqrt(max(self.inner(v, v), 0.0)))

    # -- derivatives ---------------------------------------------------------------------------------------------------
    def gradient_within(self, x: np.ndarray, tolerance: float) -> tuple[np.ndarray, float]:
        """The gradient and an estimate of the norm of its error, at most ``tolerance`` where the sweeps allow."""
        if self._state_factor is None:
            self._gradient(x, self.loosest)
            self._gradient(x, self._clip(1e-2 * max(self._residuals(x))))  # measures the state's factor
        factors = self._factors()
        rtol = self._clip(_SAFETY * tolerance / sum(factors)) if sum(factors) > 0 else self.loosest
        for _ in range(_TRIES):
            g = self._gradient(x, rtol)
            error = float(np.dot(self._factors(), self._residuals(x)))
            if error <= tolerance or rtol <= self.tightest:
                break
            rtol = self._clip(_SAFETY * rtol * tolerance / error)
        return g, error

    def _factors(self) -> tuple[float, float]:
        """``c_u`` and ``c_lambda``; the second stands for the first until that is measured."""
        state = self._adjoint_factor if self._state_factor is None else self._state_factor
        return state, self._adjoint_factor

    def _residuals(self, x: np.ndarray) -> tuple[float, float]:
        """The relative residuals of state and adjoint."""
        return self.problem.accuracy_at(x)[:2]

    def _gradient(self, x: np.ndarray, rtol: float) -> np.ndarray:
        """The gradient with both residuals at most ``rtol``; measures the factors."""
        before, accuracy = None, self.problem.accuracy_at(x)
        if np.isfinite(accuracy.state) and np.isfinite(accuracy.adjoint):
            before = self.current_gradient(x), accuracy[:2]
        g = self._inner.primal(self.problem.derivative(x, rtol=rtol))
        self._measure_adjoint(x)
        if before is not None:
            old, (state, adjoint) = before
            if state >= adjoint and state > 0 and max(self._residuals(x)) <= 0.1 * state:
                self._state_factor = self._norm(g - old) / state
        return g

    def current_gradient(self, x: np.ndarray) -> np.ndarray:
        """The representative of the gradient from the cached trajectories, without further solves."""
        return self._inner.primal(self.problem.current_derivative(x))

    @property
    def hessian_model(self) -> Callable[[np.ndarray, float], Callable[[np.ndarray], np.ndarray]]:
        """``hessian_model(x, rtol)``: the action of a self-adjoint operator near the Hessian at ``x``. Its sweeps are
        as many cycles as the first product needs for relative residuals of at most ``rtol``, and no fewer than an
        earlier model's.

        Raises
        ------
        AttributeError
            Where there are no transposed cycles (:mod:`~pint_fem.mgrit.transposed_cycles`,
            :mod:`~pint_fem.paradiag.transposed_iterations`): the method is absent.
        """
        return self._model_factory(gauss_newton=False)

    @property
    def gauss_newton_model(self) -> Callable[[np.ndarray, float], Callable[[np.ndarray], np.ndarray]]:
        """``gauss_newton_model(x, rtol)``: as :attr:`hessian_model`, of the Gauss-Newton form."""
        return self._model_factory(gauss_newton=True)

    def _model_factory(self, *, gauss_newton: bool):
        if not self.problem.has_symmetric_actions():
            raise AttributeError("no model: the sweeps have no transposed cycles")
        return partial(self._model, gauss_newton=gauss_newton)

    def _model(self, x: np.ndarray, rtol: float, *, gauss_newton: bool) -> Callable[[np.ndarray], np.ndarray]:
        rtol, most, cycles = self._clip(rtol), self._most_cycles, None

        def action(v: np.ndarray) -> np.ndarray:
            nonlocal cycles
            before = np.inf
            while True:
                taken = self._cycles if cycles is None else cycles
                h, residual = self.problem.symmetric_action(x, v, taken, gauss_newton=gauss_newton)
                # where residuals do not decrease (round-off, growing modes), neither do errors
                if cycles is not None or residual <= rtol or taken >= most or residual > _FALLS * before:
                    cycles = taken
                    return self._product(h, v)
                self._cycles, before = taken + 1, residual

        return action

    def hessian_action_within(self, x: np.ndarray, v: np.ndarray, rtol: float) -> np.ndarray:
        """The Hessian action with relative residuals of its two sweeps of at most ``rtol``."""
        return self._product(self.problem.hessian_action(x, v, rtol=self._clip(rtol)), v)

    def gauss_newton_action_within(self, x: np.ndarray, v: np.ndarray, rtol: float) -> np.ndarray:
        """As :meth:`hessian_action_within`, without the second derivatives of the steps."""
        return self._product(self.problem.hessian_action(x, v, gauss_newton=True, rtol=self._clip(rtol)), v)
