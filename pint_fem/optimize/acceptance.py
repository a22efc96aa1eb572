"""When a trust-region step is good enough, how the radius follows, and when lengths are lost in round-off."""

from __future__ import annotations

import math

import numpy as np

from pint_fem.optimize.evaluator import Estimate
from pint_fem.optimize.steihaug import CGStop

__all__ = ["is_lost", "judge", "next_radius"]

# Ratios below which the radius is reduced and above which it is enlarged.
_POOR, _GOOD = 0.25, 0.75

# Below this the square of a length is no normal number any more.
_SMALLEST_LENGTH = math.sqrt(np.finfo(float).tiny)


def judge(
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
        The ratio that makes a step acceptable.
    """
    if not math.isfinite(trial.value):
        return math.nan, False, False
    reduction, error = value.value - trial.value, value.error + trial.error
    noise = value_rtol * max(abs(value.value), abs(trial.value)) + error
    if abs(reduction) <= noise and predicted <= noise:
        return 1.0, True, True
    if not predicted > 0:
        return math.nan, False, False
    ratio = reduction / predicted
    return ratio, False, ratio - error / predicted > eta


def next_radius(
    radius: float, length: float, stop: CGStop, ratio: float, *, accepted: bool, most: float
) -> tuple[float, bool]:
    """The radius behind a step of this length and end, at `most` so long, and whether it was reduced."""
    if not (accepted and ratio >= _POOR):
        return 0.25 * length, True
    if ratio > _GOOD and stop in (CGStop.BOUNDARY, CGStop.NEGATIVE_CURVATURE):
        return min(2 * radius, float(most)), False
    return radius, False


def is_lost(radius: float, norm: float, least: float) -> bool:
    """Whether a radius, or the length of a step, is at `least`, or in the round-off of an iterate of this norm."""
    return radius <= max(least, np.finfo(float).eps * norm, _SMALLEST_LENGTH)
