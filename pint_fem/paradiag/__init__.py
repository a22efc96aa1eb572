"""ParaDiag: an alpha-circulant solve of all steps of a linear evolution; algebra only: numpy, scipy and mpi4py."""

from pint_fem.paradiag.circulant import AlphaCirculant, shifts
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.paradiag.solver import ParaDiag
from pint_fem.paradiag.stability import shifted_factors
from pint_fem.paradiag.theory import contraction

__all__ = ["AlphaCirculant", "ParaDiag", "ParaDiagOptions", "contraction", "shifted_factors", "shifts"]
