"""Multigrid reduction in time: algebra on arrays with a leading time axis; numpy and mpi4py only."""

from pint_fem.mgrit.levels import Propagator, coarse_points, split_steps
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.mgrit.solver import MGRIT
from pint_fem.mgrit.stopping import DivergedError, SolveResult, SolverFailure
from pint_fem.mgrit.theory import dirk_stability, two_level_bound
from pint_fem.mgrit.transfer import Transfer

__all__ = [
    "MGRIT",
    "DivergedError",
    "MGRITOptions",
    "Propagator",
    "SolveResult",
    "SolverFailure",
    "Transfer",
    "coarse_points",
    "dirk_stability",
    "split_steps",
    "two_level_bound",
]
