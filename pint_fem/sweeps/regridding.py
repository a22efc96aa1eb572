"""Sweeps of the same evolution on another process grid."""

from __future__ import annotations

from typing import Any

from pint_fem.evolution.evolution import Evolution
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.propagators import make_propagator
from pint_fem.propagators.base import FEPropagator
from pint_fem.spacetime import SpaceTime
from pint_fem.sweeps.sweeps import Sweeps

__all__ = ["sweeps_on_grid"]


def sweeps_on_grid(sweeps: Sweeps, spacetime: SpaceTime) -> Sweeps:
    """The sweeps of the same evolution with the same options and propagators on another process grid, whose space
    communicator is congruent; all points are stored, and estimates are not reported again (collective over that grid).

    Raises
    ------
    InputError
        On every rank of the grid, if it has more time ranks than steps, or groups of steps.
    """
    given = sweeps.given | {"options": MGRITOptions.make(sweeps.given.get("options"), storage="all", trace="")}
    make, known = given.pop("propagator", make_propagator), {p.stride: p for p in sweeps.propagators}

    def propagator(evolution: Evolution, *, stride: int, tableau: Any) -> FEPropagator:
        return known.get(stride) or make(evolution, stride=stride, tableau=tableau)

    made = Sweeps(sweeps.evolution, spacetime, propagator=propagator, **given)
    made.solvers.reported = True
    return made
