"""Multigrid reduction in time: algebra on arrays with a leading time axis; numpy and mpi4py only."""

from pint_fem.mgrit.levels import Propagator, split_steps
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.mgrit.solver import MGRIT, DivergedError, SolveResult, SolverFailure
from pint_fem.mgrit.theory import dirk_stability, two_level_bound

__all__ = [
    "MGRIT",
    "DivergedError",
    "MGRITOptions",
    "Propagator",
    "SolveResult",
    "SolverFailure",
    "dirk_stability",
    "split_steps",
    "two_level_bound",
]
