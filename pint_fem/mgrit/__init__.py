"""Multigrid reduction in time: algebra on arrays with a leading time axis; numpy and mpi4py only."""

from pint_fem.mgrit.checks.check import CheckReport, check
from pint_fem.mgrit.grids import coarse_points, split_steps
from pint_fem.mgrit.levels import Propagator
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.mgrit.solver import MGRIT
from pint_fem.mgrit.stopping import DivergedError, SolveResult, SolverFailure
from pint_fem.mgrit.theory import (
    Verdict,
    dirk_stability,
    error_propagation,
    expected_iterations,
    two_level_bound,
    two_level_factors,
    verdict,
)
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
    "Verdict",
    "check",
    "coarse_points",
    "dirk_stability",
    "error_propagation",
    "expected_iterations",
    "split_steps",
    "two_level_bound",
    "two_level_factors",
    "verdict",
]
