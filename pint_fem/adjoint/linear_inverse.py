"""The map from controls to readings of a functional, for linear inverse problems (:mod:`pint_fem.inverse`)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from pyadjoint.tape import stop_annotating

from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.collective import collectively
from pint_fem.errors import InputError
from pint_fem.inverse.map import ParameterToObservable, PriorForms, require_map
from pint_fem.misfits.sensor_readings import SensorReadings

if TYPE_CHECKING:
    from pint_fem.adjoint.functional import ControlFunctional

__all__ = ["LinearInverse"]


def _require_readings(functional: ControlFunctional) -> ReducedProblem:
    """The problem of a functional that has a map; an ``InputError`` names what to use where it has none."""
    problem = functional.problem
    if not isinstance(problem, ReducedProblem):
        raise InputError(
            "parameter_to_observable: the functional is a sum, a multiple or has an initial condition that is an "
            "expression of controls: use minimize_trust_region, or make the map of one evolution"
        )
    for misfit in problem.misfits:
        if not isinstance(misfit, SensorReadings):
            raise InputError(
                f"parameter_to_observable: {type(misfit).__name__} observes the state everywhere, which is no finite "
                "number of readings: use minimize_trust_region, or give PointSensors or LinearObservations"
            )
    require_map(problem.sweeps)
    return problem


class LinearInverse:
    """The part of a functional that makes the map from controls to readings; it has ``problem``, ``inner``,
    ``spacetime``, ``array`` and ``function``.
    """

    def parameter_to_observable(self) -> ParameterToObservable:
        """Return the map from controls to readings as a matrix, by one adjoint sweep per sensor (collective).

        It exists for evolutions that are linear with constant operators and misfits of finitely many readings,
        ``PointSensors`` and ``LinearObservations``. From it the minimiser and the whole Gaussian posterior follow
        without another sweep (:class:`~pint_fem.inverse.map.ParameterToObservable`).

        Raises
        ------
        InputError
            On every rank, where there is none; the message names what to use.
        """
        with stop_annotating():
            problem = collectively(self.spacetime.comm, "", _require_readings, self)
            return ParameterToObservable(
                problem.sweeps,
                problem.layout,
                problem.misfits,
                _readings_at_zero(problem),
                functions=self,
                regularisation=partial(_prior_forms, problem),
                inner=self.inner,
            )


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


def _prior_forms(problem: ReducedProblem) -> PriorForms:
    """What the default prior follows from; an ``InputError`` where the regularisation couples controls."""
    gradient, regularisation = None, problem.regularisation
    if regularisation is not None and regularisation.quadratic:
        gradient = regularisation.gradient(np.zeros(problem.layout.size))
    return PriorForms(problem.regularisation_hessians(), gradient)
