"""Tolerances of minimisations that follow from the accuracy of the sweeps."""

from __future__ import annotations

from numbers import Real

import numpy as np

from pint_fem.adjoint.interface import ControlProblem
from pint_fem.adjoint.minimisation.objective import Objective
from pint_fem.errors import SolverFailure

__all__ = ["raise_tolerance", "value_rtol"]


def value_rtol(problem: ControlProblem) -> float:
    """Relative accuracy of ``J``, from that of the sweeps."""
    return 10 * problem.limits.rtol


def raise_tolerance(objective: Objective, start: np.ndarray, checkpoint: object, options: dict) -> None:
    """Raise the tolerance of the gradient to its error where the start fits the data to round-off.

    A tolerance relative to such a gradient is never reached. A run with a checkpoint may continue from another control.
    """
    given = options.get("gtol_abs", 0.0)
    if checkpoint is not None or not isinstance(given, Real):
        return
    try:
        error = objective.problem.gradient_error(start)
    except SolverFailure:  # the minimisation reports what fails at the start
        return
    if error is not None:
        error = objective.representative(error)
        options["gtol_abs"] = max(float(given), float(np.sqrt(max(objective.inner(error, error), 0.0))))
