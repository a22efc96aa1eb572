"""Records of the iterations of composite steps, their lines on a monitor, and the result."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pint_fem.optimize.records import IterationRecord, TrustRegionResult, header

__all__ = ["CompositeStepRecord", "CompositeStepResult", "composite_header", "continued"]

_WIDTH = 99  # of the columns of a trust-region record


def composite_header() -> str:
    """The line above the monitor's."""
    return f"{header():<{_WIDTH}}{'|c|':>10} {'normal':>9} {'penalty':>9} {'KKT':>4}"


@dataclass(frozen=True)
class CompositeStepRecord(IterationRecord):
    """One composite step; record 0 is the first guess. Other attributes are those of
    :class:`~pint_fem.optimize.records.IterationRecord`, with the norm of the *reduced* gradient.

    Attributes
    ----------
    constraint_norm : float
        Norm of the constraint at the iterate the iteration ends with.
    normal_norm : float
        Norm of the quasi-normal step, which changes the state only, in the norm of states.
    penalty : float
        Penalty parameter of the merit function.
    kkt_iterations : int
        Iterations of the Krylov method in the KKT solves of the step; 0 without KKT solves.
    corrected : bool
        Whether the step has a second-order correction.
    note : str
        What was not as usual.
    """

    constraint_norm: float = 0.0
    normal_norm: float = 0.0
    penalty: float = 0.0
    kkt_iterations: int = 0
    corrected: bool = False
    note: str = ""

    def __str__(self) -> str:
        """The monitor line."""
        line = (
            f"{super().__str__():<{_WIDTH}}{self.constraint_norm:10.3e} {self.normal_norm:9.2e} {self.penalty:9.2e} "
            f"{self.kkt_iterations:4d}{'  second-order correction' if self.corrected else ''}"
        )
        return line if not self.note else f"{line}\n     {self.note}"


@dataclass(frozen=True, repr=False)
class CompositeStepResult(TrustRegionResult):
    """The last iterate of a minimisation by composite steps, and the history of the run. Other attributes are those of
    :class:`~pint_fem.optimize.records.TrustRegionResult`; ``x`` is the control.

    Attributes
    ----------
    state, multipliers : ndarray or None
        State and multipliers at the last composite step.
    constraint_norm : float
        Norm of the constraint at ``(state, x)``.
    breakdown : str
        Why composite steps ended without convergence, empty where they converged or were stopped.
    composite_steps : int
        Number of iterations by composite steps; the others were done by the method that continued the run.
    handed_over : str
        Name of the method that continued the run after a breakdown; empty where none did.
    """

    state: np.ndarray | None = None
    multipliers: np.ndarray | None = None
    constraint_norm: float = 0.0
    breakdown: str = ""
    composite_steps: int = 0
    handed_over: str = ""

    @property
    def message(self) -> str:
        """Why the minimisation ended, and why it was handed over to another method, if it was."""
        if not self.breakdown:
            return self.reason.value
        if not self.handed_over:
            return f"{self.reason.value}: {self.breakdown}"
        return f"{self.reason.value}; composite steps handed over to the {self.handed_over}: {self.breakdown}"

    def _quantities(self) -> dict[str, float]:
        return {**super()._quantities(), "|c|": float(self.constraint_norm)}


def continued(first: CompositeStepResult, second: TrustRegionResult, method: str) -> CompositeStepResult:
    """The result of a run that another method continued from the control of composite steps.

    Parameters
    ----------
    first
        Result of the composite steps, which broke down.
    second
        Result of the method that continued, whose constraint holds at each control.
    method
        Name of that method.

    Returns
    -------
    CompositeStepResult
        The last iterate of the second, with the records of both, numbered consecutively, and the sums of their counts.
    """
    tail = [replace(record, iteration=first.iterations + record.iteration) for record in second.history[1:]]
    return replace(
        first, x=second.x, value=second.value, gradient_norm=second.gradient_norm,
        iterations=first.iterations + second.iterations, converged=second.converged, reason=second.reason,
        history=[*first.history, *tail], value_calls=first.value_calls + second.value_calls,
        gradient_calls=first.gradient_calls + second.gradient_calls,
        hessian_calls=first.hessian_calls + second.hessian_calls, value_error=second.value_error,
        gradient_error=second.gradient_error, state=None, multipliers=None, constraint_norm=0.0,
        handed_over=method,
    )  # fmt: skip
