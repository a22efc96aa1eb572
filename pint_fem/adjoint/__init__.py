"""Time-parallel reduced functionals with exact derivatives."""

from pint_fem.adjoint.reduced_functional import TimeParallelReducedFunctional

__all__ = ["TimeParallelReducedFunctional"]
