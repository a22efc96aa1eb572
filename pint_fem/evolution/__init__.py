"""The initial value problem that a user poses: residual, tableau, boundary values, initial condition, controls."""

# Firedrake before Irksome: it initialises PETSc with the command line's options
import firedrake  # noqa: F401  isort: skip

from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.residual import time_function
from pint_fem.evolution.tableaux import SDIRK2, BackwardEuler, ImplicitMidpoint, named_tableau

__all__ = ["SDIRK2", "BackwardEuler", "Evolution", "ImplicitMidpoint", "named_tableau", "time_function"]
