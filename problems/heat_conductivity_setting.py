"""Thermal tomography of the plate: eight heaters, thermocouples, and what is hidden in the plate.

In each experiment one heater delivers a pulse to the plate of :mod:`problems.plate`, and all thermocouples are read.
The conductivity is the known one of the two metals times a factor, which jumps at the edges of two inclusions.
"""

import numpy as np
from firedrake import cos, exp, pi
from ufl.core.expr import Expr

from problems.experiments import Inclusion, columns_of
from problems.plate import FINAL_TIME

__all__ = ["COLUMNS", "HEATERS", "INCLUSIONS", "THERMOCOUPLES", "course", "heater", "true_log_factor"]

COLUMNS = columns_of("temperature")

#: Centres of the heaters, around the rim of the plate; an experiment has the number of its heater.
HEATERS = np.array(
    [(0.25, 0.15), (0.75, 0.15), (1.25, 0.15), (1.80, 0.15), (1.80, 0.60), (1.25, 1.05), (0.80, 1.05), (0.20, 1.00)]
)
#: Width and largest power of a heater.
WIDTH, POWER = 0.15, 60.0

_HOLES = ((0.45, 0.80, 0.16), (1.50, 0.40, 0.14))
_CLEARANCE = 0.04


def _thermocouples() -> np.ndarray:
    """The points of a square grid with a pitch of 0.2 that are in the plate and away from its boundaries."""
    grid = np.array([(0.1 + 0.2 * i, 0.1 + 0.2 * j) for j in range(6) for i in range(10)])
    inside = (grid[:, 0] < 1.4) | (grid[:, 1] < 0.8)
    for x, y, radius in _HOLES:
        inside &= np.hypot(grid[:, 0] - x, grid[:, 1] - y) > radius + _CLEARANCE
    return grid[inside].round(10)


#: Places of the 48 thermocouples.
THERMOCOUPLES = _thermocouples()

INCLUSIONS = (
    Inclusion("well conducting inclusion", (0.45, 0.33), (0.20, 0.16), 3.0),
    Inclusion("poorly conducting inclusion", (1.27, 0.78), (0.125, 0.20), 1 / 3),
)


def heater(x, number: int) -> Expr:
    """Return the power per volume of a heater at its full power.

    Parameters
    ----------
    x
        A ``SpatialCoordinate``.
    number
        Of the heater.
    """
    a, b = HEATERS[number]
    return POWER * exp(-(((x[0] - a) / WIDTH) ** 2) - ((x[1] - b) / WIDTH) ** 2)


def course(t) -> Expr:
    """Return the power of a heater at time ``t`` over its full power, a pulse that rises and falls smoothly."""
    return 0.5 * (1 - cos(2 * pi * t / FINAL_TIME))


def true_log_factor(x) -> Expr:
    """Return the logarithm of the factor behind the shipped readings at ``x``, a ``SpatialCoordinate``."""
    return sum(float(np.log(inclusion.contrast)) * inclusion.inside(x) for inclusion in INCLUSIONS)
