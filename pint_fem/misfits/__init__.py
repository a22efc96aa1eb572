"""Misfits: functionals of the observed states that are compared with data."""

from pint_fem.misfits.base import BlockMisfit, Misfit
from pint_fem.misfits.functionals import RunningMisfit, TerminalMisfit
from pint_fem.misfits.linear_observations import LinearObservations
from pint_fem.misfits.point_sensors import PointSensors
from pint_fem.misfits.state_bounds import StateBounds

__all__ = [
    "BlockMisfit",
    "LinearObservations",
    "Misfit",
    "PointSensors",
    "RunningMisfit",
    "StateBounds",
    "TerminalMisfit",
]
