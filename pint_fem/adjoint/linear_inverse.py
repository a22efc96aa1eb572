"""The map from controls to readings of a functional, for linear inverse problems (:mod:`pint_fem.inverse`)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pyadjoint.tape import stop_annotating

from pint_fem.adjoint.composed import Selection
from pint_fem.adjoint.interface import ControlProblem
from pint_fem.adjoint.minimisation.fingerprint import map_numbers
from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.collective import collectively
from pint_fem.errors import InputError
from pint_fem.inverse.map import ParameterToObservable, PriorForms, require_map
from pint_fem.inverse.memory import require_rows_argument
from pint_fem.inverse.sums import Leaf, SumOfMaps
from pint_fem.misfits.sensor_readings import SensorReadings

if TYPE_CHECKING:
    from pint_fem.adjoint.functional import ControlFunctional

__all__ = ["LinearInverse"]


class _Path(NamedTuple):
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


def _paths(problem: ControlProblem) -> list[_Path]:
    """The evolutions of a problem, each once, with the sum of its weights."""
    found: dict[ReducedProblem, _Path] = {}

    def add(problem: ControlProblem, weight: float, maps: tuple[Selection, ...]) -> None:
        if isinstance(problem, ReducedProblem):
            before = found[problem].weight if problem in found else 0.0
            found[problem] = _Path(before + weight, problem, maps)
        for term in problem.terms:
            add(term.problem, weight * term.weight, (*maps, term.map))

    add(problem, 1.0, ())
    return list(found.values())


def _require_readings(functional: ControlFunctional) -> list[_Path]:
    """The evolutions of a functional that has a map; an ``InputError`` names what to use where it has none."""
    paths = _paths(functional.problem)
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


class LinearInverse:
    """The part of a functional that makes the map from controls to readings; it has ``problem``, ``inner``,
    ``spacetime``, ``array`` and ``function``.
    """

    def parameter_to_observable(
        self, *, load: str | Path | None = None, rows: str = "memory", path: str | Path | None = None
    ) -> ParameterToObservable:
        """Return the map from controls to readings as a matrix, by one adjoint sweep per sensor (collective).

        It exists for evolutions that are linear with constant operators and misfits of finitely many readings,
        ``PointSensors`` and ``LinearObservations``; of a sum its rows are those of all evolutions, and an initial
        condition may be an affine expression of controls. From it the minimiser and the whole Gaussian posterior follow
        without another sweep (:class:`~pint_fem.inverse.map.ParameterToObservable`).

        Parameters
        ----------
        load
            A file that ``F.save(path)`` wrote for the same evolution, controls, sensors and times of readings, from
            which the map is read; it may have been written on another number of ranks in time. Readings, noise and
            regularisation may be others.
        rows, path
            ``"memory"``, or ``"file"``: the rows of each rank are then in a file without a name in the folder ``path``,
            for maps that are larger than the memory. What fits no machine is refused before the sweep; the time
            solver's option ``view`` prints the memory that is needed.

        Raises
        ------
        InputError
            On every rank, where there is no map; the message names what to use. With ``load``, if the file cannot be
            read or is that of another problem; the message names the differences.
        """
        with stop_annotating():
            require_rows_argument(self.spacetime.comm, rows, path)
            paths = collectively(self.spacetime.comm, "", _require_readings, self)
            given: dict = {
                "functions": self,
                "regularisation": partial(_prior_forms, self.problem),
                "inner": self.inner,
                "description": partial(map_numbers, self.problem),
                "load": load,
                "folder": path,
            }
            if isinstance(self.problem, ReducedProblem):
                return _map_of(self.problem, **given)
            zero = np.zeros(self.layout.size)
            leaves = [
                Leaf(own.weight, own.problem.misfits, own.at(zero), own.pull_back, partial(_leaf_map, own, path))
                for own in paths
            ]
            view = any(own.problem.sweeps.options.view for own in paths)
            return SumOfMaps(leaves, self.layout, view=view, **given)


def _map_of(problem: ReducedProblem, **given: Any) -> ParameterToObservable:
    """The map of one evolution (collective)."""
    offset = partial(_readings_at_zero, problem)
    return ParameterToObservable(problem.sweeps, problem.layout, problem.misfits, offset, **given)


def _leaf_map(own: _Path, folder: str | Path | None, sensors: np.ndarray) -> ParameterToObservable:
    """The map of an evolution in a sum, with the rows of some sensors (collective)."""
    return _map_of(own.problem, folder=folder, sensors=sensors)


def _readings_at_zero(problem: ReducedProblem) -> np.ndarray:
    """The readings at zero controls, ``(m,)``; without a sweep where the state is zero then."""
    initial = problem.sweeps.evolution.initial_control is None and problem.sweeps.initial.any()
    moved = not problem.sweeps.evolution.is_homogeneous or initial
    if not problem.spacetime.comm.allreduce(int(moved)):
        return np.zeros(sum(int(misfit.present.sum()) for misfit in problem.misfits))
    z = np.zeros(problem.layout.size)
    observed = [problem.observations(z, misfit) for misfit in problem.misfits]
    pairs = zip(problem.misfits, observed, strict=True)
    return np.concatenate([misfit.readings(Y)[misfit.present] for misfit, Y in pairs])


def _prior_forms(problem: ControlProblem) -> PriorForms:
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
