"""Leapfrog steps of evolutions whose operators depend on static controls."""

from __future__ import annotations

from irksome.tableaux.ButcherTableaux import ButcherTableau

from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.tableaux import ImplicitMidpoint
from pint_fem.propagators.coefficients.frozen import FrozenLeapfrog
from pint_fem.propagators.coefficients.propagator import CoefficientPropagator
from pint_fem.propagators.leapfrog import require_fields

__all__ = ["CoefficientLeapfrog"]


class CoefficientLeapfrog(CoefficientPropagator):
    """Leapfrog steps (:mod:`~pint_fem.propagators.leapfrog`) of an evolution whose operators depend on static controls;
    the tableau is ignored.

    Raises
    ------
    InputError
        If the evolution does not name a field to ``eliminate`` that is free of controls.
    """

    _kind = FrozenLeapfrog

    def __init__(self, evolution: Evolution, *, stride: int = 1, tableau: ButcherTableau | None = None):
        super().__init__(evolution, stride=stride, tableau=ImplicitMidpoint())
        require_fields(self.evolution)
