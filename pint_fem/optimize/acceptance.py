"""When a trust-region step is good enough, how the radius follows, and when lengths are lost in round-off."""

from __future__ import annotations

import math

import numpy as np

from pint_fem.optimize.evaluator import Estimate

__all__ = ["GOOD", "POOR", "SMALLEST_LENGTH", "judge"]

# Ratios below which the radius is reduced and above which it is enlarged.
POOR, GOOD = 0.25, 0.75

# Below this the square of a length is no normal number any more.
SMALLEST_LENGTH = math.sqrt(np.finfo(float).tiny)


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
