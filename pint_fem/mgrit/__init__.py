"""Multigrid reduction in time: algebra on arrays with a leading time axis; numpy and mpi4py only."""

from pint_fem.all_at_once.grids import coarse_points, split_steps
from pint_fem.all_at_once.propagator import Propagator
from pint_fem.all_at_once.stopping import DivergedError, SolveResult, SolverFailure
from pint_fem.mgrit.checks.check import CheckReport, check
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.mgrit.solver import MGRIT
from pint_fem.mgrit.transfer import Transfer

__all__ = [
    "MGRIT",
    "CheckReport",
    "DivergedError",
    "MGRITOptions",
    "Propagator",
    "SolveResult",
    "SolverFailure",
    "Transfer",
    "check",
    "coarse_points",
    "split_steps",
]
