"""Time steps of finite element evolutions and their derivatives, on blocks of states."""

# Firedrake before Irksome: it initialises PETSc with the command line's options
import firedrake  # noqa: F401  isort: skip

from irksome.tableaux.ButcherTableaux import ButcherTableau

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


def make_propagator(evolution: Evolution, *, stride: int = 1, tableau: ButcherTableau | None = None) -> FEPropagator:
    """A level's propagator: :class:`LinearPropagator` where the evolution is linear with constant operators, else
    :class:`FormPropagator`.

    Parameters
    ----------
    evolution
        The problem.
    stride
        Step size of the level in fine steps.
    tableau
        Integrator of the level; default: the evolution's.
    """
    evolution = evolution.private()
    kind = FormPropagator if evolution.linear_operators() is None else LinearPropagator
    return kind(evolution, stride=stride, tableau=tableau)
