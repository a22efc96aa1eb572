"""Time steps of finite element evolutions and their derivatives, on blocks of states."""

# Firedrake before Irksome: it initialises PETSc with the command line's options
import firedrake  # noqa: F401  isort: skip

from pint_fem.propagators.base import FEPropagator, StepData
from pint_fem.propagators.choice import make_propagator
from pint_fem.propagators.coefficients.propagator import CoefficientPropagator
from pint_fem.propagators.form import FormPropagator
from pint_fem.propagators.linear import LinearPropagator
from pint_fem.propagators.mesh_transfers import mesh_transfer
from pint_fem.propagators.spatial import coarse_evolution
from pint_fem.propagators.tape import TapePropagator

__all__ = [
    "CoefficientPropagator",
    "FEPropagator",
    "FormPropagator",
    "LinearPropagator",
    "StepData",
    "TapePropagator",
    "coarse_evolution",
    "make_propagator",
    "mesh_transfer",
]
