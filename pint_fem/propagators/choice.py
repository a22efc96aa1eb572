"""The choice of an evolution's propagator."""

from __future__ import annotations

from irksome.tableaux.ButcherTableaux import ButcherTableau

from pint_fem.evolution.evolution import Evolution
from pint_fem.propagators.base import FEPropagator
from pint_fem.propagators.coefficients.leapfrog import CoefficientLeapfrog
from pint_fem.propagators.coefficients.propagator import CoefficientPropagator
from pint_fem.propagators.form import FormPropagator
from pint_fem.propagators.leapfrog import LeapfrogPropagator
from pint_fem.propagators.linear import LinearPropagator

__all__ = ["leapfrog", "make_propagator"]


def make_propagator(evolution: Evolution, *, stride: int = 1, tableau: ButcherTableau | None = None) -> FEPropagator:
    """A level's propagator: :class:`LinearPropagator` where the evolution is linear with constant operators,
    :class:`CoefficientPropagator` where these depend on static controls, else :class:`FormPropagator`.

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
    kind: type[FEPropagator] = FormPropagator
    if evolution.affine_parts is not None:
        kind = CoefficientPropagator if evolution.has_controlled_operators else LinearPropagator
    return kind(evolution, stride=stride, tableau=tableau)


def leapfrog(evolution: Evolution, *, stride: int = 1, tableau: ButcherTableau | None = None) -> FEPropagator:
    """Leapfrog on the finest level, an implicit method on the others: a ``propagator`` for
    :class:`~pint_fem.adjoint.TimeParallelReducedFunctional`.

    Parameters
    ----------
    evolution
        A linear evolution with operators that do not depend on time, and ``eliminate``.
    stride
        Step size of the level in fine steps; 1 on the finest.
    tableau
        Implicit method of the coarse levels; default: the evolution's.

    Raises
    ------
    InputError
        If the step of the finest level is not stable.
    """
    evolution = evolution.private()
    if stride > 1:
        return make_propagator(evolution, stride=stride, tableau=tableau)
    kind: type[FEPropagator] = LeapfrogPropagator
    if evolution.has_controlled_operators:
        kind = CoefficientLeapfrog
    return kind(evolution, stride=stride, tableau=tableau)
