"""What a simultaneous optimisation tells: a record and a line an iteration, and the result."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from pint_fem.optimize.records import StopReason

__all__ = ["DesignUpdate", "OneShotRecord", "OneShotResult", "header"]


def header() -> str:
    """The line above the monitor's."""
    return f"{'it':>4} {'J':>16} {'|g|':>10} {'error':>9} {'residual':>9} {'|step|':>10} {'pairs':>5}  design"


class DesignUpdate(str, Enum):
    """What an iteration did with its design; compares equal to its text."""

    FIRST = "first guess"
    HELD = "held"
    ACCEPTED = "accepted"
    REJECTED = "rejected"


@dataclass(frozen=True)
class OneShotRecord:
    """One iteration of the solvers; record 0 is the first.

    Attributes
    ----------
    iteration : int
    value, gradient_norm : float
        The inexact J and the norm of the inexact gradient.
    gradient_error : float
        Its estimate; infinite before the first measurement.
    residual : float
        Relative, of state and adjoint.
    step_norm : float
        Distance of the design from the last accepted one.
    pairs : int
        In the L-BFGS operator.
    update : DesignUpdate
        Held to be looked at once more, accepted or rejected.
    """

    iteration: int
    value: float
    gradient_norm: float
    gradient_error: float
    residual: float
    step_norm: float
    pairs: int
    update: DesignUpdate

    def __str__(self) -> str:
        """The monitor line."""
        return (
            f"{self.iteration:4d} {self.value:16.9e} {self.gradient_norm:10.3e} {self.gradient_error:9.2e} "
            f"{self.residual:9.2e} {self.step_norm:10.3e} {self.pairs:5d}  {self.update.value}"
        )


@dataclass(frozen=True)
class OneShotResult:
    """Where a simultaneous optimisation ended, and how it got there.

    Attributes
    ----------
    x : ndarray
        The last accepted design.
    value, gradient_norm : float
        J and the norm of its gradient at `x`, accurate.
    residual : float
        Of state and adjoint at the last iteration at `x`.
    iterations : int
        Iterations of the solvers after the first.
    converged : bool
        Whether `reason` is the gradient tolerance.
    reason : StopReason
    history : list of OneShotRecord
        ``iterations + 1`` records.
    advance_calls : int
        One a record; 0 if the problem has no ``advance``.
    value_calls, gradient_calls : int
        Accurate values and gradients: one of each at the end, and one more for each end that was contradicted. Without
        ``advance`` one a record; no gradient where J is not finite.
    """

    x: np.ndarray
    value: float
    gradient_norm: float
    residual: float
    iterations: int
    converged: bool
    reason: StopReason
    history: list[OneShotRecord]
    advance_calls: int
    value_calls: int
    gradient_calls: int
