"""When a trust-region step is good enough, how the radius follows, and when lengths are lost in round-off."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from pint_fem.optimize.evaluator import Estimate
from pint_fem.optimize.trust_region.steihaug import CGStop

__all__ = ["UNLIMITED", "is_lost", "is_wild", "judge", "next_radius"]

UNLIMITED = 1e99
"""A first radius that bounds no step; its square is finite."""

# Ratios below which the radius is reduced and above which it is enlarged.
_POOR, _GOOD = 0.25, 0.75

# How much larger the error of J may be at the trial point than at the iterate.
_COMPARABLE = 10.0

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
    if not math.isfinite(trial.value) or is_wild(value, trial, predicted):
        return math.nan, False, False
    reduction, error = value.value - trial.value, value.error + trial.error
    noise = value_rtol * max(abs(value.value), abs(trial.value)) + error
    if abs(reduction) <= noise and predicted <= noise:
        return 1.0, True, True
    if not predicted > 0:
        return math.nan, False, False
    ratio = reduction / predicted
    return ratio, False, ratio - error / predicted > eta


def is_wild(value: Estimate, trial: Estimate, predicted: float) -> bool:
    """Whether J at the trial point is off by more than all that J is at the iterate: where a step went too far, values
    and their errors are huge, and a change within such an error is none that is too small to be seen.
    """
    return trial.error > abs(value.value) + predicted + _COMPARABLE * value.error


class _Length(Protocol):
    """What the radius follows of a step: its norm and why its conjugate gradients ended."""

    norm: float
    stop: CGStop


def next_radius(radius: float, step: _Length, ratio: float, *, accepted: bool, most: float) -> tuple[float, bool]:
    """The radius behind a step, at `most` so long, and whether it was reduced."""
    if not (accepted and ratio >= _POOR):
        return 0.25 * step.norm, True
    if ratio > _GOOD and step.stop in (CGStop.BOUNDARY, CGStop.NEGATIVE_CURVATURE):
        return min(2 * radius, float(most)), False
    return radius, False


def is_lost(radius: float, norm: float, least: float) -> bool:
    """Whether a radius, or the length of a step, is at `least`, or in the round-off of an iterate of this norm."""
    return radius <= max(least, np.finfo(float).eps * norm, _SMALLEST_LENGTH)
