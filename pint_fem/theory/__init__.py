"""A-priori convergence estimates of MGRIT and ParaDiag for linear evolutions, from the spectra of their propagators."""

from pint_fem.theory.alpha_circulant import contraction
from pint_fem.theory.stability import dirk_stability
from pint_fem.theory.two_level import (
    ConvergenceEstimate,
    expected_iterations,
    two_level_bound,
    two_level_estimate,
    two_level_factors,
)

__all__ = [
    "ConvergenceEstimate",
    "contraction",
    "dirk_stability",
    "expected_iterations",
    "two_level_bound",
    "two_level_estimate",
    "two_level_factors",
]
