r"""Find the current in a box from readings of the electric field at 64 probes: the inverse problem, posed in UFL.

The state is (E, B) of :mod:`problems.maxwell`; the control is the static vector J in P1, the current being J(x) s(t)
with the time course s known; and

.. math::
    \mathcal{J}(J) = \frac{1}{2 n \sigma^2} \sum_r \sum_s |E(x_s, t_r) - d_{rs}|^2
           + \frac{1}{2} \int \alpha |\nabla J|^2 + \beta |J|^2 ,

for n readings with noise of standard deviation sigma: the misfit is 1/2 where a current explains the readings up to
their noise. The regularisation's own inner product is the trust region's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from firedrake import Function, TestFunction, TrialFunction, VectorFunctionSpace

from pint_fem.adjoint import TimeParallelReducedFunctional
from pint_fem.capacity import require_memory
from pint_fem.evolution import Evolution, named_tableau, time_function
from pint_fem.misfits import PointSensors
from pint_fem.propagators import make_propagator
from pint_fem.propagators.choice import leapfrog
from pint_fem.spacetime import SpaceTime
from problems.maxwell import B, E, Medium, perfect_conductor, residual, state_space
from problems.maxwell_readings import COLUMNS, NOISE, readings_file
from problems.maxwell_setting import CELLS, Setting, box_mesh, setting, signal, true_current
from problems.meshfile import locate
from problems.priors import prior_of
from problems.readings import Readings, misfit_weight, read_readings, require_weights

__all__ = ["ALPHA", "BETA", "MaxwellSource", "evolution_of", "maxwell_source"]

#: Weights of the regularisation in each regime.
ALPHA = {"lossy": 3e-3, "cavity": 1e-2}
BETA = {"lossy": 1e-3, "cavity": 1e-2}
DEGREE = 2


@dataclass
class MaxwellSource:
    """The posed problem.

    Attributes
    ----------
    spacetime : SpaceTime
    setting : Setting
    readings : Readings
    evolution : Evolution
    sensors : list of PointSensors
        Of each component of E.
    rf : TimeParallelReducedFunctional
    regularisation : ufl.Form
        Of ``evolution.control``.
    true_current : Function
        What made the shipped readings.
    """

    spacetime: SpaceTime
    setting: Setting
    readings: Readings
    evolution: Evolution
    sensors: list[PointSensors]
    rf: TimeParallelReducedFunctional
    regularisation: object
    true_current: Function

    def predicted(self, z: np.ndarray) -> np.ndarray:
        """Readings ``(times, probes, components)`` of a control's state, on every rank."""
        return np.stack([s.readings(self.rf.problem.observations(z, s)) for s in self.sensors], axis=-1)


def evolution_of(
    mesh,
    given: Setting,
    *,
    steps: int,
    integrator: str,
    degree: int = DEGREE,
    solver_parameters=None,
    first_steps: int | None = None,
) -> Evolution:
    """The evolution of a setting on a mesh of the box, in the plane or in space, controlled by the current's shape.

    Parameters
    ----------
    mesh, given
        A mesh and what is in it.
    steps, integrator, degree
        Time steps, a name of :func:`pint_fem.evolution.named_tableau`, degree of the elements.
    solver_parameters
        PETSc options of the steps' systems for E.
    first_steps
        Take only so many of the steps; default: all.
    """
    space, t = state_space(mesh, degree), time_function(mesh)
    u, current = Function(space, name="field"), Function(VectorFunctionSpace(mesh, "CG", 1), name="current")
    form = residual(u, Medium(mesh, given.regions), current=signal(t, given) * current, walls=given.walls)
    return Evolution(
        form,
        u,
        tableau=named_tableau(integrator),
        dt=given.final_time / steps if steps else 0.0,
        nsteps=steps if first_steps is None else first_steps,
        control=current,
        t=t,
        bcs=perfect_conductor(space, given.walls),
        solver_parameters=solver_parameters,
        eliminate=B,
    )


def maxwell_source(
    spacetime: SpaceTime,
    *,
    regime: str = "lossy",
    cells: int = CELLS,
    degree: int = DEGREE,
    readings: str | Path | Readings | None = None,
    steps: int | None = None,
    integrator: str | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    noise: float = NOISE,
    solver_parameters: dict | None = None,
    step_parameters: dict | None = None,
) -> MaxwellSource:
    """Pose the problem on a process grid.

    Parameters
    ----------
    spacetime, alpha, beta, noise, solver_parameters
        As for :func:`problems.heat_source.heat_source`; default of the weights: the regime's.
    regime
        ``"lossy"`` or ``"cavity"`` (see :mod:`problems.maxwell_setting`).
    cells, degree
        Mesh and elements.
    readings
        A CSV as :mod:`problems.readings` reads it, or what was read; default: the shipped one of the regime.
    steps, integrator
        Time steps and a name of :func:`pint_fem.evolution.named_tableau`, or ``"Leapfrog"`` with implicit midpoint
        steps on coarse levels; default: the regime's.
    step_parameters
        PETSc options of the steps' systems for E.

    Raises
    ------
    InputError
        On every rank, on a bad file or value.
    """
    given = setting(regime)
    alpha = ALPHA[regime] if alpha is None else alpha
    beta = BETA[regime] if beta is None else beta
    require_weights(alpha, beta, noise)
    integrator, steps = integrator or given.integrator, given.steps if steps is None else steps
    explicit = integrator == "Leapfrog"
    data = read_readings(readings or readings_file(regime), given.final_time, COLUMNS)
    unknowns = 2 * cells**2 * (degree + 1) * (degree + 2)  # of the elements, which share some
    least = (200 * cells**2 + 8 * unknowns * (degree + 1) * (degree + 2)) // spacetime.space_size
    what = f"{cells} x {cells} cells of degree {degree}"
    require_memory(spacetime.comm, least, what, "give fewer cells or a lower degree")
    mesh = spacetime.mesh(box_mesh, cells)
    locate(data.points, mesh, data.sensors)
    evolution = evolution_of(
        mesh,
        given,
        steps=steps,
        integrator="ImplicitMidpoint" if explicit else integrator,
        degree=degree,
        solver_parameters=step_parameters,
    )
    weight = misfit_weight(data, noise)
    sensors = [
        PointSensors(data.points, data.times, data.values[..., i], weight=weight, field=E, component=i) for i in (0, 1)
    ]
    current = evolution.control
    a, b = TrialFunction(current.function_space()), TestFunction(current.function_space())
    prior = prior_of(alpha, beta)
    regularisation = 0.5 * prior(current, current)
    rf = TimeParallelReducedFunctional(
        evolution,
        sensors,
        regularisation=regularisation,
        spacetime=spacetime,
        solver_parameters=solver_parameters,
        riesz_map=prior(a, b),
        propagator=leapfrog if explicit else make_propagator,
    )
    truth = Function(current.function_space(), name="true current").interpolate(true_current(mesh))
    return MaxwellSource(spacetime, given, data, evolution, sensors, rf, regularisation, truth)
