"""ParaDiag: an alpha-circulant solve of all steps of a linear evolution; algebra only: numpy and mpi4py."""

from pint_fem.paradiag.circulant import AlphaCirculant, shifts
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.paradiag.solver import ParaDiag
from pint_fem.paradiag.stage_shifts import shifted_factors

__all__ = ["AlphaCirculant", "ParaDiag", "ParaDiagOptions", "shifted_factors", "shifts"]
