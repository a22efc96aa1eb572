r"""J and its gradient after each iteration of the state and adjoint solvers, with estimates of their errors.

The estimate is (3) of :mod:`pint_fem.optimize.one_shot.method`: errors are proportional to the residual, with factors
measured by the changes from one evaluation of a design to a later one.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace

import numpy as np

from pint_fem.optimize.guarded_problem import GuardedProblem
from pint_fem.optimize.protocol import GradientOverflowError

__all__ = ["DesignEvaluation", "InexactEvaluations"]

# Number of measurements of kappa in use, and the slowest contraction assumed in one.
_MEASUREMENTS, _SLOWEST = 5, 0.95

# An evaluation is stored as a reference for later ones if its residual is below this part of the last reference's.
_NEXT_REFERENCE = 0.8


@dataclass(frozen=True)
class DesignEvaluation:
    """J, gradient, residual and estimated errors at a design after one iteration of the solvers."""

    x: np.ndarray
    value: float
    g: np.ndarray
    norm: float
    residual: float
    error: float = 0.0  # of g
    value_error: float = 0.0


class InexactEvaluations:
    """Evaluations of a problem by single iterations of its solvers, and measurements of their errors.

    Parameters
    ----------
    problem : GuardedProblem
        The problem; without ``advance`` all evaluations are accurate.

    Attributes
    ----------
    factors : deque of (float, float)
        Errors of gradient and value per residual, as last measured.
    measured : int
        How many of them, the last ones, were measured at the last design.
    references : list of DesignEvaluation
        Evaluations of the last design with which later ones are compared.
    """

    def __init__(self, problem: GuardedProblem):
        self.problem, self.inner = problem, problem.inner
        self.advance = getattr(problem, "advance", None)
        self.factors: deque[tuple[float, float]] = deque(maxlen=_MEASUREMENTS)
        self.measured = 0
        self.references: list[DesignEvaluation] = []

    def restore(self, references: list[DesignEvaluation], factors: list[tuple[float, float]], measured: int) -> None:
        """Set the measurements of an earlier run."""
        self.references, self.measured = references, measured
        self.factors.clear()
        self.factors.extend(factors)

    def evaluate(self, x: np.ndarray, iteration: int, last_good: np.ndarray) -> DesignEvaluation | None:
        """One iteration at x; None if J is not finite, or the gradient's square overflows."""
        if self.advance is None:
            return self.evaluate_exactly(x, iteration, last_good)
        value, g, residual = self.advance(x)
        if not math.isfinite(value):
            return None
        try:
            norm = self.problem.gradient_norm(g, iteration, last_good)
        except GradientOverflowError:
            return None
        found = DesignEvaluation(x, value, g, norm, residual)
        self._measure(found)
        return self._with_errors(found)

    def evaluate_exactly(self, x: np.ndarray, iteration: int, last_good: np.ndarray) -> DesignEvaluation | None:
        """The accurate J and gradient; None if J is not finite, or the gradient's square overflows."""
        value = self.problem.value(x)
        if not math.isfinite(value):
            return None
        g = self.problem.gradient(x)
        try:
            return DesignEvaluation(x, value, g, self.problem.gradient_norm(g, iteration, last_good), 0.0)
        except GradientOverflowError:
            return None

    def _measure(self, found: DesignEvaluation) -> None:
        """Compare with the latest evaluation of the same design that has twice the residual, or with the first."""
        if self.references and self.references[0].x is not found.x:
            self.references, self.measured = [], 0
        while len(self.references) > 1 and self.references[1].residual >= 2 * found.residual:
            del self.references[0]
        if self.references and self.references[0].residual > 0:
            before = self.references[0]
            change = found.g - before.g
            fall = max(before.residual - found.residual, (1 - _SLOWEST) * before.residual)
            changes = math.sqrt(self.inner(change, change)), abs(found.value - before.value)
            if all(map(math.isfinite, changes)):
                self.factors.append((changes[0] / fall, changes[1] / fall))
                self.measured += 1
        if not self.references or found.residual <= _NEXT_REFERENCE * self.references[-1].residual:
            self.references.append(found)

    def discard_measurements(self) -> None:
        """Discard the measurements at the last design, where it is too far from others for them to hold elsewhere."""
        for _ in range(min(self.measured, len(self.factors))):
            self.factors.pop()
        self.measured = 0

    def _with_errors(self, found: DesignEvaluation) -> DesignEvaluation:
        """The evaluation with the errors that its residual implies."""
        if found.residual == 0:
            return found
        if not self.factors:
            return replace(found, error=math.inf, value_error=math.inf)
        kappa, kappa_value = (max(factors) for factors in zip(*self.factors, strict=True))
        return replace(found, error=kappa * found.residual, value_error=kappa_value * found.residual)

    def measure_by(self, exact: DesignEvaluation, found: DesignEvaluation) -> None:
        """Measure the errors of an evaluation by the accurate one of the same design."""
        gap = exact.g - found.g
        gaps = math.sqrt(self.inner(gap, gap)), abs(exact.value - found.value)
        self.factors.append((gaps[0] / found.residual, gaps[1] / found.residual))
