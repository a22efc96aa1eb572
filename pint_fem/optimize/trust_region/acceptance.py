"""The steps of trust-region methods: acceptance, the next radius, and lengths below floating-point resolution."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pint_fem.optimize.oracle import Estimate
from pint_fem.optimize.records import UNLIMITED, CGStop

__all__ = [
    "FIRST_RADIUS",
    "UNLIMITED",
    "Step",
    "below_resolution",
    "error_exceeds_scale",
    "exit_length",
    "first_radius",
    "next_radius",
    "reduction_ratio",
]

# Ratios below which the radius is reduced and above which it is enlarged.
_POOR, _GOOD = 0.25, 0.75

# How much larger the error of J may be at the trial point than at the iterate.
_COMPARABLE = 10.0

# The first radius in lengths of the Cauchy step: generous, as a retry needs no Hessian action.
FIRST_RADIUS = 10.0

# Below this the square of a length is no normal number any more.
_SMALLEST_LENGTH = math.sqrt(np.finfo(float).tiny)


@dataclass(frozen=True)
class Step:
    """A step of conjugate gradients.

    Attributes
    ----------
    trial : ndarray, shape (n,)
        The point it leads to.
    norm : float
        Its length.
    reduction : float
        J minus the model at its end.
    cg_iterations : int
        Hessian products it is made of.
    stop : CGStop
        Why conjugate gradients ended.
    model_norm : float
        Norm of the model's gradient at its end; nan where it is not computed.
    rtol : float
        Smallest relative error allowed for the products; 0 where they are exact.
    """

    trial: np.ndarray
    norm: float = 0.0
    reduction: float = 0.0
    cg_iterations: int = 0
    stop: CGStop = CGStop.NONE
    model_norm: float = math.nan
    rtol: float = 0.0


def reduction_ratio(
    value: Estimate, trial: Estimate, predicted: float, value_rtol: float, eta: float
) -> tuple[float, bool, bool]:
    """Actual over predicted reduction, whether both are below the accuracy of J, and whether the step is acceptable.

    Parameters
    ----------
    value, trial : Estimate
        J at the iterate and at the trial point.
    predicted : float
        Reduction of the model.
    value_rtol : float
        Relative accuracy of J.
    eta : float
        The ratio above which a step is acceptable.
    """
    if not math.isfinite(trial.value) or error_exceeds_scale(value, trial, predicted):
        return math.nan, False, False
    reduction, error = value.value - trial.value, value.error + trial.error
    noise = value_rtol * max(abs(value.value), abs(trial.value)) + error
    if abs(reduction) <= noise and predicted <= noise:
        return 1.0, True, True
    if not predicted > 0:
        return math.nan, False, False
    ratio = reduction / predicted
    return ratio, False, ratio - error / predicted > eta


def error_exceeds_scale(value: Estimate, trial: Estimate, predicted: float) -> bool:
    """Whether the error of J at the trial point exceeds the size of J at the iterate.

    Where a step went too far, values and their errors are huge, and a change of J within such an error is not one below
    the accuracy of J.
    """
    return trial.error > abs(value.value) + predicted + _COMPARABLE * value.error


def first_radius(cauchy_length: float, otherwise: float) -> float:
    """A multiple of the length of the Cauchy step, which scales as x does whatever the unit of J; a second length where
    that is not finite.
    """
    return FIRST_RADIUS * cauchy_length if math.isfinite(FIRST_RADIUS * cauchy_length) else otherwise


def exit_length(pp: float, pd: float, dd: float, radius: float) -> float:
    """The tau >= 0 with ``|p + tau d| = radius`` for p in the ball, from (p, p), (p, d), (d, d); no cancellation."""
    gap = max(radius * radius - pp, 0.0)
    root = math.sqrt(pd * pd + dd * gap)
    return gap / (root + pd) if pd >= 0 else (root - pd) / dd


def next_radius(radius: float, step: Step, ratio: float, *, accepted: bool, most: float) -> tuple[float, bool]:
    """The radius after a step, at most `most`, and whether it was reduced."""
    if not (accepted and ratio >= _POOR):
        return 0.25 * step.norm, True
    if ratio > _GOOD and step.stop in (CGStop.BOUNDARY, CGStop.NEGATIVE_CURVATURE):
        return min(2 * radius, float(most)), False
    return radius, False


def below_resolution(length: float, norm: float, least: float) -> bool:
    """Whether a radius or the length of a step is at most `least` or the round-off of an iterate of this norm."""
    return length <= max(least, np.finfo(float).eps * norm, _SMALLEST_LENGTH)
