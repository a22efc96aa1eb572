"""Records of the iterations of a simultaneous optimisation, their lines on a monitor, and its result."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from pint_fem.optimize.records import ReasonedResult, StopReason

__all__ = ["DesignUpdate", "OneShotRecord", "OneShotResult", "header"]


def header() -> str:
    """The line above the monitor's."""
    return f"{'it':>4} {'J':>16} {'|g|':>10} {'error':>9} {'residual':>9} {'|step|':>10} {'pairs':>5}  design"


class DesignUpdate(str, Enum):
    """The treatment of the design in an iteration; compares equal to its text."""

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
        Estimated error of the gradient; infinite before the first measurement.
    residual : float
        Relative residual of state and adjoint.
    step_norm : float
        Distance of the design from the last accepted one.
    pairs : int
        Number of pairs in the L-BFGS operator.
    update : DesignUpdate
        Whether the design is held for one more iteration, accepted or rejected.
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


@dataclass(frozen=True, repr=False)
class OneShotResult(ReasonedResult):
    """The last design of a simultaneous optimisation, and the history of the run.

    Attributes
    ----------
    x : ndarray
        The last accepted design.
    value, gradient_norm : float
        J and the norm of its gradient at `x`, accurate.
    residual : float
        Residual of state and adjoint at the last iteration at `x`.
    iterations, nit : int
        Iterations of the solvers after the first.
    converged, success : bool
        Whether `reason` is the gradient tolerance.
    reason : StopReason
        Why the run ended; its text is `message`.
    history : list of OneShotRecord
        ``iterations + 1`` records.
    advance_calls : int
        One per record; 0 if the problem has no ``advance``.
    value_calls, gradient_calls : int
        Accurate values and gradients: one of each at the end, and one more for each accurate gradient above the
        tolerance before it. Without ``advance`` one per record; no gradient where J is not finite.
    control : Function, EnsembleFunction or list of these, or None
        The controls found, one or a list of several, where a functional's method minimised; None in a pickled or deep
        copy.
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
    control: object = None

    def _quantities(self) -> dict[str, float]:
        return {
            "J": float(self.value),
            "|g|": float(self.gradient_norm),
            "residual": float(self.residual),
            "solver iterations": self.advance_calls,
            "accurate values": self.value_calls,
            "accurate gradients": self.gradient_calls,
        }
