r"""State and adjoint solvers under way: what they say about J and its gradient, and how wrong that is.

The mathematics of the estimate is in :mod:`pint_fem.optimize.one_shot.method`.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from pint_fem.optimize.evaluator import Evaluator, like
from pint_fem.optimize.protocol import GradientOverflowError, NonFiniteError, Problem

__all__ = ["OneShotProblem", "Reading", "RunningSolvers"]

# Measurements of kappa that count, and the slowest contraction assumed in one.
_MEASUREMENTS, _SLOWEST = 5, 0.95

# A reading is kept to compare later ones with if its residual is below this part of that of the last one kept.
_NEXT_HELD = 0.8


class OneShotProblem(Problem, Protocol):
    """A problem whose solvers can be advanced one iteration at a time; the method is optional."""

    def advance(self, x: np.ndarray) -> tuple[float, np.ndarray, float]:
        """One iteration of the state and of the adjoint solver at x, from where the last call left them.

        Returns
        -------
        value, gradient, residual
            J and the Riesz gradient at the new iterates, inexact, and the norm of what is unsolved there relative to
            a typical size, >= 0 and the same on all processes; 0 if they are exact. Where the solvers break down,
            return a `value` of inf or nan and go back to iterates that can be used at another design.
        """


@dataclass(frozen=True)
class Reading:
    """What one iteration says about a design."""

    x: np.ndarray
    value: float
    g: np.ndarray
    norm: float
    residual: float
    error: float = 0.0  # of g
    value_error: float = 0.0


class RunningSolvers:
    """The inexact functions of the problem, and what their errors are."""

    def __init__(self, problem: Problem):
        self.exact = Evaluator(problem)
        self.inner = self.exact.inner
        self.advance = getattr(problem, "advance", None)
        self.advances = 0
        #: (gradient, value) error per residual, as last measured.
        self.factors: deque[tuple[float, float]] = deque(maxlen=_MEASUREMENTS)
        #: Measurements among them, the last ones, that are of the last design.
        self.measured = 0
        #: Readings that later ones of the same design are compared with.
        self.held: list[Reading] = []

    def restore(self, held: list[Reading], factors: list[tuple[float, float]], measured: int) -> None:
        """Take what another run had measured."""
        self.held, self.measured = held, measured
        self.factors.clear()
        self.factors.extend(factors)

    def read(self, x: np.ndarray, iteration: int, last_good: np.ndarray) -> Reading | None:
        """One iteration at x; None if J is not finite, or the gradient's square overflows."""
        if self.advance is None:
            return self.read_exactly(x, iteration, last_good)
        self.advances += 1
        value, g, residual = self.advance(x)
        value, residual = float(value), float(residual)
        if not math.isfinite(value):
            return None
        if not 0 <= residual < math.inf:
            raise ValueError(f"advance returned the residual {residual}: give a finite number >= 0, or a J of inf")
        g = like(x, g, "advance")
        square = self.inner(g, g)
        if square == math.inf:
            return None
        if not math.isfinite(square):
            raise NonFiniteError(f"iteration {iteration}: the gradient is not finite, (g, g) = {square}", last_good)
        reading = Reading(x, value, g, math.sqrt(max(square, 0.0)), residual)
        self._measure(reading)
        return self.estimated(reading)

    def _measure(self, reading: Reading) -> None:
        """Compare with a late reading of the same design that has twice the residual, or with the first."""
        if self.held and self.held[0].x is not reading.x:
            self.held, self.measured = [], 0
        while len(self.held) > 1 and self.held[1].residual >= 2 * reading.residual:
            del self.held[0]
        if self.held and self.held[0].residual > 0:
            before = self.held[0]
            change = reading.g - before.g
            fall = max(before.residual - reading.residual, (1 - _SLOWEST) * before.residual)
            changes = math.sqrt(self.inner(change, change)), abs(reading.value - before.value)
            if all(map(math.isfinite, changes)):
                self.factors.append((changes[0] / fall, changes[1] / fall))
                self.measured += 1
        if not self.held or reading.residual <= _NEXT_HELD * self.held[-1].residual:
            self.held.append(reading)

    def read_exactly(self, x: np.ndarray, iteration: int, last_good: np.ndarray) -> Reading | None:
        """Accurate J and gradient; None as for :meth:`read`."""
        value = self.exact.value(x)
        if not math.isfinite(value):
            return None
        try:
            g, norm = self.exact.gradient(x, iteration, last_good)
        except GradientOverflowError:
            return None
        return Reading(x, value, g, norm, 0.0)

    def disregard(self) -> None:
        """Take back what was measured at the last design, which was too far from others to say anything of them."""
        for _ in range(min(self.measured, len(self.factors))):
            self.factors.pop()
        self.measured = 0

    def estimated(self, reading: Reading) -> Reading:
        """The reading with the errors that its residual means."""
        if reading.residual == 0:
            return reading
        if not self.factors:
            return replace(reading, error=math.inf, value_error=math.inf)
        kappa, kappa_value = (max(factors) for factors in zip(*self.factors, strict=True))
        return replace(reading, error=kappa * reading.residual, value_error=kappa_value * reading.residual)

    def compare(self, reading: Reading, exact: Reading) -> None:
        """Measure by an accurate reading of the same design."""
        gap = exact.g - reading.g
        gaps = math.sqrt(self.inner(gap, gap)), abs(exact.value - reading.value)
        self.factors.append((gaps[0] / reading.residual, gaps[1] / reading.residual))
