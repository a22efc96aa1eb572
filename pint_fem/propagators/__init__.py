"""One time step of a finite element evolution and its derivatives, on blocks of states."""

# Firedrake before Irksome: it initialises PETSc with the command line's options
import firedrake  # noqa: F401  isort: skip

from pint_fem.evolution.evolution import Evolution
from pint_fem.propagators.base import FEPropagator, StepData
from pint_fem.propagators.form import FormPropagator
from pint_fem.propagators.linear import LinearPropagator
from pint_fem.propagators.spatial import coarse_evolution, mesh_transfer
from pint_fem.propagators.tape import TapePropagator

__all__ = [
    "FEPropagator",
    "FormPropagator",
    "LinearPropagator",
    "StepData",
    "TapePropagator",
    "coarse_evolution",
    "make_propagator",
    "mesh_transfer",
]


def make_propagator(evolution: Evolution, *, stride: int = 1, tableau=None) -> FEPropagator:
    """The fastest propagator that is exact for the evolution: linear where it applies, else form."""
    evolution = evolution.private()
    kind = FormPropagator if evolution.linear_operators() is None else LinearPropagator
    return kind(evolution, stride=stride, tableau=tableau)
