"""What a minimisation tells: a record and a line an iteration, and the result."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from pint_fem.optimize.trust_region.steihaug import CGStop

__all__ = ["IterationRecord", "StopReason", "TrustRegionResult", "header"]

# Columns of a line without accuracies: the longest reason why CG stopped fits in.
_WIDTH = 99


class StopReason(str, Enum):
    """Why a minimisation ended; compares equal to its text.

    "round-off" and "radius too small" far from a small gradient point to a derivative that is not that of J, or to a
    J less accurate than `value_rtol` or its own error estimate say. "accuracy not reached": the estimated error of the
    gradient is more than half its norm, however often a smaller one was asked for.
    """

    GRADIENT = "gradient tolerance"
    MAX_IT = "maximum iterations"
    RADIUS = "radius too small"
    ROUND_OFF = "round-off"
    ACCURACY = "accuracy not reached"
    CALLBACK = "stopped by callback"
    CONSTRAINTS = "constraints not met"


def header(inexact: bool = False) -> str:
    """The line above the monitor's, with the accuracies of an inexact problem on request."""
    line = f"{'it':>4} {'J':>16} {'|g|':>10} {'radius':>10} {'|step|':>10} {'ratio':>9} {'':>8} {'CG':>4}  CG stop"
    if inexact:
        line = f"{line:<{_WIDTH}}{'J asked':>9} {'J error':>8} {'g asked':>8} {'g error':>8} {'H rtol':>8}"
    return line


@dataclass(frozen=True)
class IterationRecord:
    """One iteration; record 0 is the first guess.

    Attributes
    ----------
    iteration : int
    value, gradient_norm : float
        J and the norm of its gradient at the iterate the iteration ends with (unchanged by a rejected step, unless an
        inexact problem was asked for better ones).
    radius, step_norm : float
        Radius the step was computed with and norm of the step, accepted or not; nan and 0 in record 0.
    ratio : float
        Actual over predicted reduction; 1 below the accuracy of J, nan where J was not finite and in record 0.
    accepted : bool
    cg_iterations : int
        Conjugate gradient directions the step is made of. After a rejected step they are known already.
    cg_stop : CGStop
    value_asked, value_error : float
        Absolute error `value` was last asked for, and its estimate; 0 where J is exact.
    gradient_asked, gradient_error : float
        The same for the gradient, in the problem's norm.
    hessian_rtol : float
        Smallest relative error the Hessian products of the step were asked for; 0 where they are exact.
    """

    iteration: int
    value: float
    gradient_norm: float
    radius: float
    step_norm: float
    ratio: float
    accepted: bool
    cg_iterations: int
    cg_stop: CGStop
    value_asked: float = 0.0
    value_error: float = 0.0
    gradient_asked: float = 0.0
    gradient_error: float = 0.0
    hessian_rtol: float = 0.0

    def __str__(self) -> str:
        """The monitor line; the accuracies follow where anything was asked for inexactly."""
        line = (
            f"{self.iteration:4d} {self.value:16.9e} {self.gradient_norm:10.3e} {self.radius:10.3e} "
            f"{self.step_norm:10.3e} {self.ratio:9.2e} {'' if self.accepted else 'rejected':>8} "
            f"{self.cg_iterations:4d}  {self.cg_stop.value}"
        ).rstrip()
        if self.value_asked or self.gradient_asked or self.hessian_rtol:
            line = (
                f"{line:<{_WIDTH}}{self.value_asked:9.1e} {self.value_error:8.1e} "
                f"{self.gradient_asked:8.1e} {self.gradient_error:8.1e} {self.hessian_rtol:8.1e}"
            )
        return line


@dataclass(frozen=True)
class TrustRegionResult:
    """Where a minimisation ended, and how it got there.

    Attributes
    ----------
    x : ndarray
        The last accepted iterate: no evaluated point has a lower J by more than the accuracy of J.
    value, gradient_norm : float
        J and the norm of its gradient at `x`.
    iterations : int
        Steps tried, accepted or not.
    converged : bool
        Whether `reason` is the gradient tolerance.
    reason : StopReason
    history : list of IterationRecord
        The first guess and every iteration: ``iterations + 1`` records.
    value_calls, gradient_calls, hessian_calls : int
        ``1 + iterations`` values; ``1 + accepted steps`` gradients, and one more if `reason` is round-off; the
        conjugate gradient iterations of every step not preceded by a rejected one. An inexact problem is asked more
        often. A continued run counts what was saved and what it did itself: directions found again after a rejected
        step count twice.
    value_error, gradient_error : float
        Estimated errors of the last two; 0 where they are exact.
    """

    x: np.ndarray
    value: float
    gradient_norm: float
    iterations: int
    converged: bool
    reason: StopReason
    history: list[IterationRecord]
    value_calls: int
    gradient_calls: int
    hessian_calls: int
    value_error: float = 0.0
    gradient_error: float = 0.0
