r"""The objective to a tolerance: as few cycles as the accuracy asked for needs.

With the state's residual :math:`r = \Phi(u) - u` the value is off by :math:`\lambda^T r` to first order (dual weighted
residual: R. Becker, R. Rannacher, Acta Numerica 10, 2001), hence

.. math::  |J_h - J| \approx |\lambda^T r| \le \|\lambda\|\,\|r\| ,

with the adjoint at hand (that of the iterate, while a trial point has none) and norms over the C-points, where the
residual is. A gradient's error is linear in the residuals of state and adjoint:
:math:`c_u\,\rho_u + c_\lambda\,\rho_\lambda` for relative residuals :math:`\rho`. For :math:`c_\lambda` the norm of the
adjoint's part of the gradient is taken, which is linear in :math:`\lambda`; :math:`c_u` is measured whenever a gradient
is computed again more accurately,

.. math::  c_u = \|g_{\text{new}} - g_{\text{old}}\| / \rho_{u,\text{old}} .

Hessian products are those of a symmetric operator near the Hessian, a fixed number of cycles and their transposes
(:mod:`~pint_fem.mgrit.transposed_cycles`, :mod:`~pint_fem.paradiag.transposed_iterations`), where there is one, and otherwise solves to a
tolerance of their own.

The theory of inexact trust regions asks for errors up to a constant that may be unknown
(:mod:`pint_fem.optimize.trust_region.newton_cg`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from pint_fem.adjoint.evaluation import Evaluation, relative_residual
from pint_fem.adjoint.minimisation.objective import Objective
from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.adjoint.riesz import ControlInner
from pint_fem.errors import SolverFailure

__all__ = ["InexactObjective"]

_TRIES = 3  # solves for one tolerance
_FALLS = 0.99  # residuals of a model, from one number of cycles to the next
_SAFETY = 0.5  # of what a tolerance allows


class InexactObjective(Objective):
    """An :class:`~pint_fem.adjoint.minimisation.objective.Objective` whose accuracy can be chosen; two points stay warm.

    Parameters
    ----------
    problem, inner
        As for an objective. The ``rtol`` of the problem's sweeps is the most that is asked of them.
    loosest
        Relative residual that solves start with, and never exceed.
    """

    def __init__(self, problem: ReducedProblem, inner: ControlInner, *, loosest: float = 1e-2):
        super().__init__(problem, inner)
        self.tightest = problem.sweeps.options.rtol
        self.loosest = max(loosest, self.tightest)
        self._state_factor: float | None = None  # c_u
        self._adjoint_factor = 0.0  # c_lambda
        self._weight: float | None = None  # norm of the last adjoint
        self._cycles = 1  # of a product of the model
        problem.keep_evaluations(2)

    def memory(self) -> dict[str, float | None]:
        """What estimates rest on, for a checkpoint."""
        factors = {"weight": self._weight, "state": self._state_factor, "adjoint": self._adjoint_factor}
        return factors | {"cycles": self._cycles}

    def recall(self, memory: dict[str, float | None]) -> None:
        """Take what :meth:`memory` gave."""
        self._weight, self._state_factor = memory["weight"], memory["state"]
        self._adjoint_factor, self._cycles = memory["adjoint"], memory["cycles"]

    def _clip(self, rtol: float) -> float:
        return min(max(rtol, self.tightest), self.loosest)

    # -- value ---------------------------------------------------------------------------------------------------------
    def value_within(self, x: np.ndarray, tolerance: float) -> tuple[float, float]:
        """``J(x)`` and an estimate of its error, at most ``tolerance`` where the sweeps' ``rtol`` allows."""
        self.failure = None
        try:
            value, error = self._value_within(x, tolerance)
        except SolverFailure as failure:
            return self._failed(failure), 0.0
        self._name_parts(value)
        return value, error

    def _value_within(self, x: np.ndarray, tolerance: float) -> tuple[float, float]:
        problem, rtol = self.problem, self.loosest
        for _ in range(_TRIES):
            value, point = problem.value(x, rtol=rtol), problem.at(x)
            if not np.isfinite(value):  # no accuracy makes it so
                return value, 0.0
            if self._weight is None:
                problem.derivative(x, rtol=rtol)
                self._see_adjoint(point)
            relative = relative_residual(point.state)
            error = self._weight * relative * _scale(point)
            if error <= tolerance or relative <= self.tightest:
                break
            rtol = self._clip(_SAFETY * relative * tolerance / error)
        return value, error

    def _see_adjoint(self, point: Evaluation) -> None:
        """Remember the adjoint's norm, and its part of the gradient's; sequential solves have no residuals to weigh."""
        scale = point.adjoint.scale
        self._weight = scale if np.isfinite(scale) else 0.0
        self._adjoint_factor = self._norm(self._inner.primal(self.problem.adjoint_part(point)))

    def _norm(self, v: np.ndarray) -> float:
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
        """``c_u`` and ``c_lambda``; the first is taken for the second until it is measured."""
        state = self._adjoint_factor if self._state_factor is None else self._state_factor
        return state, self._adjoint_factor

    def _residuals(self, x: np.ndarray) -> tuple[float, float]:
        """Relative residuals of state and adjoint."""
        point = self.problem.at(x)
        return relative_residual(point.state), relative_residual(point.adjoint)

    def _gradient(self, x: np.ndarray, rtol: float) -> np.ndarray:
        """The gradient with both residuals at most ``rtol``; measures the factors."""
        point = self.problem.at(x)
        before = None
        if point.adjoint is not None and point.state is not None:
            before = self.gradient_here(point), self._residuals(x)
        g = self._inner.primal(self.problem.derivative(x, rtol=rtol))
        self._see_adjoint(point)
        if before is not None:
            old, (state, adjoint) = before
            if state >= adjoint and state > 0 and max(self._residuals(x)) <= 0.1 * state:
                self._state_factor = self._norm(g - old) / state
        return g

    def gradient_here(self, point: Evaluation) -> np.ndarray:
        """Representative of the gradient that a point's trajectories give as they are."""
        return self._inner.primal(self.problem.gradient_of(point))

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
        return self._models(gauss_newton=False)

    @property
    def gauss_newton_model(self) -> Callable[[np.ndarray, float], Callable[[np.ndarray], np.ndarray]]:
        """The same of the Gauss-Newton form."""
        return self._models(gauss_newton=True)

    def _models(self, *, gauss_newton: bool):
        if self.problem.sweeps.solvers.transposed_adjoint is None:
            raise AttributeError("no model: the sweeps have no transposed cycles")
        return partial(self._model, gauss_newton=gauss_newton)

    def _model(self, x: np.ndarray, rtol: float, *, gauss_newton: bool) -> Callable[[np.ndarray], np.ndarray]:
        rtol, most, cycles = self._clip(rtol), self.problem.sweeps.options.max_it, None

        def action(v: np.ndarray) -> np.ndarray:
            nonlocal cycles
            before = np.inf
            while True:
                taken = self._cycles if cycles is None else cycles
                h, residual = self.problem.symmetric_action(x, v, taken, gauss_newton=gauss_newton)
                # more cycles do not help where residuals fall no more: round-off, modes that grow
                if cycles is not None or residual <= rtol or taken >= most or residual > _FALLS * before:
                    cycles = taken
                    return self._inner.primal(h)
                self._cycles, before = taken + 1, residual

        return action

    def hessian_action_within(self, x: np.ndarray, v: np.ndarray, rtol: float) -> np.ndarray:
        """Hessian action with relative residuals of its two sweeps at most ``rtol``."""
        return self._inner.primal(self.problem.hessian_action(x, v, rtol=self._clip(rtol)))

    def gauss_newton_action_within(self, x: np.ndarray, v: np.ndarray, rtol: float) -> np.ndarray:
        """The same without the second derivatives of the steps."""
        return self._inner.primal(self.problem.hessian_action(x, v, gauss_newton=True, rtol=self._clip(rtol)))


def _scale(point: Evaluation) -> float:
    """Norm of the state, zero where it was solved sequentially and has no residual."""
    return point.state.scale if np.isfinite(point.state.scale) else 0.0
