"""Time-parallel reduced functionals with exact derivatives."""

from pint_fem.adjoint.misfits import Misfit, PointSensors, RunningMisfit, TerminalMisfit
from pint_fem.adjoint.reduced_functional import TimeParallelReducedFunctional

__all__ = ["Misfit", "PointSensors", "RunningMisfit", "TerminalMisfit", "TimeParallelReducedFunctional"]
