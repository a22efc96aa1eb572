"""The map from controls to readings of a functional: of one evolution, of a sum, and with an initial condition that is
an expression of controls.

A functional is a weighted sum over evolutions, each of them a function of some of the common controls
(:mod:`pint_fem.adjoint.composed`). Where these functions are affine, the rows of the map of each evolution are pulled
back to the common controls (:mod:`pint_fem.inverse.sums`).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pint_fem.adjoint.composed import Selection
from pint_fem.adjoint.interface import ControlProblem
from pint_fem.adjoint.minimisation.fingerprint import map_numbers
from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.collective import collectively
from pint_fem.errors import InputError
from pint_fem.inverse.inversion import PriorForms
from pint_fem.inverse.map import ParameterToObservable, require_map
from pint_fem.inverse.sums import Leaf, SumOfMaps
from pint_fem.misfits.sensor_readings import SensorReadings

if TYPE_CHECKING:
    from pint_fem.adjoint.functional import ControlFunctional

__all__ = [
    "EvolutionPath",
    "evolution_paths",
    "make_map",
    "map_of_predictions",
    "prior_forms",
    "readings_at_zero",
    "require_readings",
]


class EvolutionPath(NamedTuple):
    """The problem of an evolution in a sum, its weight, and the maps from the common controls to its own ones."""

    weight: float
    problem: ReducedProblem
    maps: tuple[Selection, ...]

    def at(self, z: np.ndarray) -> np.ndarray:
        """The evolution's controls."""
        for own in self.maps:
            z = own.value(z)
        return z

    def pull_back(self, out: np.ndarray, dual: np.ndarray) -> None:
        """Add a dual vector of the evolution's controls to one of the common controls (collective over space)."""
        for own in reversed(self.maps):
            target = np.zeros(own.outer.size) if own is not self.maps[0] else out
            own.add_adjoint(target, np.zeros(own.outer.size), dual, 1.0)
            dual = target


def evolution_paths(problem: ControlProblem) -> list[EvolutionPath]:
    """The evolutions of a problem, each once, with the sum of its weights."""
    found: dict[ReducedProblem, EvolutionPath] = {}

    def add(problem: ControlProblem, weight: float, maps: tuple[Selection, ...]) -> None:
        if isinstance(problem, ReducedProblem):
            before = found[problem].weight if problem in found else 0.0
            found[problem] = EvolutionPath(before + weight, problem, maps)
        for term in problem.terms:
            add(term.problem, weight * term.weight, (*maps, term.map))

    add(problem, 1.0, ())
    return list(found.values())


def require_readings(functional: ControlFunctional) -> list[EvolutionPath]:
    """The evolutions of a functional that has a map; an ``InputError`` names what to use where it has none."""
    if functional.spacetime.experiments_size > 1:
        grid = "x".join(map(str, functional.spacetime.shape))
        raise InputError(
            f"parameter_to_observable: the grid {grid} has groups of experiments, over which a map is not divided: use "
            "minimize_trust_region, or a grid of two numbers"
        )
    paths = evolution_paths(functional.problem)
    for path in paths:
        if not all(own.is_affine for own in path.maps):
            raise InputError(
                "parameter_to_observable: the initial condition is a nonlinear expression of controls: use "
                "minimize_trust_region"
            )
        for misfit in path.problem.misfits:
            if not isinstance(misfit, SensorReadings):
                raise InputError(
                    f"parameter_to_observable: {type(misfit).__name__} observes the state everywhere, which is no "
                    "finite number of readings: use minimize_trust_region, or give PointSensors or LinearObservations"
                )
        require_map(path.problem.sweeps)
    return paths


def make_map(
    functional: ControlFunctional, *, load: str | Path | None, folder: str | Path | None, time_ranks: int | None
) -> ParameterToObservable:
    """Return the map of a functional (collective); arguments and errors are those of ``parameter_to_observable``."""
    problem = functional.problem
    paths = collectively(problem.spacetime.comm, "", require_readings, functional)
    given: dict = {
        "functions": functional,
        "regularisation": partial(prior_forms, problem),
        "inner": functional.inner,
        "description": partial(map_numbers, problem),
        "load": load,
        "folder": folder,
    }
    if isinstance(problem, ReducedProblem):
        return _map_of(problem, time_ranks=time_ranks, **given)
    zero = np.zeros(problem.layout.size)
    leaves = [
        Leaf(own.weight, own.problem.misfits, own.at(zero), own.pull_back, partial(_leaf_map, own, folder, time_ranks))
        for own in paths
    ]
    view = any(own.problem.sweeps.options.view for own in paths)
    return SumOfMaps(leaves, problem.layout, view=view, **given)


def _map_of(problem: ReducedProblem, **given: Any) -> ParameterToObservable:
    """The map of one evolution (collective)."""
    offset = partial(readings_at_zero, problem)
    return ParameterToObservable(problem.sweeps, problem.layout, problem.misfits, offset, **given)


def _leaf_map(
    own: EvolutionPath, folder: str | Path | None, time_ranks: int | None, sensors: np.ndarray
) -> ParameterToObservable:
    """The map of an evolution in a sum, with the rows of some sensors (collective)."""
    return _map_of(own.problem, folder=folder, sensors=sensors, time_ranks=time_ranks)


def map_of_predictions(functional: ControlFunctional, named: Sequence[SensorReadings]) -> ParameterToObservable:
    """Return the map to readings without data (collective); ``InputError`` is raised for several evolutions."""
    problem = functional.problem
    if not isinstance(problem, ReducedProblem):
        raise InputError(
            "predict: the functional is a sum, a multiple or has an initial condition that is an expression of "
            "controls: give predict= to the functional of one evolution with the initial condition as a control"
        )
    sensors, spacetime = [copy(one) for one in named], problem.spacetime
    for one in sensors:
        collectively(spacetime.comm, "predict", one.bind, problem.sweeps.evolution, spacetime, problem.sweeps.slab)
    offset = partial(readings_at_zero, problem, sensors)
    return ParameterToObservable(problem.sweeps, problem.layout, sensors, offset, functions=functional)


def readings_at_zero(problem: ReducedProblem, sensors: Sequence[SensorReadings] | None = None) -> np.ndarray:
    """The readings at zero controls, ``(m,)``, those of the problem's misfits or of other sensors; without a sweep
    where the state is zero then.
    """
    misfits = problem.misfits if sensors is None else sensors
    initial = problem.sweeps.evolution.initial_control is None and problem.sweeps.initial.any()
    moved = not problem.sweeps.evolution.is_homogeneous or initial
    if not problem.spacetime.comm.allreduce(int(moved)):
        return np.zeros(sum(int(misfit.present.sum()) for misfit in misfits))
    z = np.zeros(problem.layout.size)
    if sensors is None:
        observed = [problem.observations(z, misfit) for misfit in misfits]
    else:
        observed = [np.zeros((problem.sweeps.slab.k + 1, misfit.width)) for misfit in misfits]
        for first, U in problem.states(z):
            points = slice(first, first + len(U))
            for Y, misfit in zip(observed, misfits, strict=True):
                Y[points] = misfit.observe(points, U)
    pairs = zip(misfits, observed, strict=True)
    return np.concatenate([misfit.readings(Y)[misfit.present] for misfit, Y in pairs])


def prior_forms(problem: ControlProblem) -> PriorForms:
    """What the default prior follows from; an ``InputError`` where the regularisation couples controls."""
    gradient, found = None, [regularisation for _, regularisation in problem.regularisations()]
    if found and all(regularisation.quadratic for regularisation in found):
        gradient = _regularisation_gradient(problem, np.zeros(problem.layout.size))
    return PriorForms(problem.regularisation_hessians(), gradient)


def _regularisation_gradient(problem: ControlProblem, z: np.ndarray) -> np.ndarray:
    """The derivative of all regularisations of a problem, a dual vector."""
    own = problem.regularisation
    out = np.zeros(problem.layout.size) if own is None else np.array(own.gradient(z))
    for term in problem.terms:
        term.map.add_adjoint(out, z, _regularisation_gradient(term.problem, term.map.value(z)), term.weight)
    return out
