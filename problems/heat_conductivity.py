r"""Find the conductivity of a plate from eight heating experiments: the inverse problem, posed in UFL.

The states are the temperature rises of :mod:`problems.plate` in the experiments of
:mod:`problems.heat_conductivity_setting`; the conductivity is the known one of the two metals times :math:`e^q`, the
control :math:`q` is in P1; and

.. math::
    J(q) = \frac{1}{2 n \sigma^2} \sum_e \sum_r \sum_s (u_e(x_s, t_r) - d_{ers})^2
           + \frac{1}{2} \int \alpha |\nabla q|^2 + \beta q^2 ,

for n readings with noise of standard deviation sigma: the misfit is 1/2 where a conductivity explains the readings up
to their noise. The regularisation's own inner product is the trust region's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from firedrake import (
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    TrialFunction,
    dx,
    exp,
    grad,
    inner,
)

from pint_fem.adjoint import TimeParallelReducedFunctional
from pint_fem.evolution import Evolution, named_tableau, time_function
from pint_fem.spacetime import SpaceTime
from problems.experiments import Coefficient, CoefficientProblem, ExperimentReadings, point_misfits, read_experiments
from problems.heat_conductivity_readings import NOISE, READINGS
from problems.heat_conductivity_setting import COLUMNS, HEATERS, INCLUSIONS, course, heater, true_log_factor
from problems.meshfile import locate, read_mesh
from problems.plate import BOUNDARIES, FINAL_TIME, MESH, REGIONS, boundary_conditions, residual
from problems.readings import require_weights

__all__ = ["ALPHA", "BETA", "LABEL", "STEPS", "heat_conductivity", "prior_of"]

ALPHA = 3e-4
BETA = 1e-4
STEPS = 128
LABEL = "log₂(conductivity / that of the metal)"


def prior_of(alpha: float, beta: float):
    """Return what makes the bilinear form of the regularisation, ``prior(a, b)``."""
    return lambda a, b: (alpha * inner(grad(a), grad(b)) + beta * a * b) * dx


def heat_conductivity(
    spacetime: SpaceTime,
    *,
    mesh: str | Path = MESH,
    readings: str | Path | ExperimentReadings = READINGS,
    steps: int = STEPS,
    integrator: str = "SDIRK2",
    alpha: float = ALPHA,
    beta: float = BETA,
    noise: float = NOISE,
    bounds: tuple[float, float] | None = None,
    experiments: Sequence[int] | None = None,
    solver_parameters: dict | None = None,
) -> CoefficientProblem:
    """Pose the problem on a process grid.

    Parameters
    ----------
    spacetime
        Process grid.
    mesh, readings
        A gmsh file with the tags of :mod:`problems.plate`, and a CSV as :mod:`problems.experiments` reads it, or what
        was read.
    steps, integrator
        Time steps and a name of :func:`pint_fem.evolution.named_tableau`.
    alpha, beta
        Regularisation of the gradient and the size of q; not negative, beta positive.
    noise
        Standard deviation of the readings' noise, relative to the largest reading.
    bounds
        Of the conductivity over that of the metal.
    experiments
        Numbers of those in the functional, each with its weight in the sum of all; default: all.
    solver_parameters
        Of :class:`~pint_fem.adjoint.TimeParallelReducedFunctional`.

    Raises
    ------
    InputError
        On every rank, on a bad file or value.
    """
    require_weights(alpha, beta, noise)
    tableau = named_tableau(integrator)
    data = read_experiments(readings, FINAL_TIME, COLUMNS, count=len(HEATERS))
    plate = read_mesh(mesh, spacetime.space_comm, REGIONS, BOUNDARIES)
    for own in data.readings:
        locate(own.points, plate, own.sensors)
    V, x, t = FunctionSpace(plate, "CG", 1), SpatialCoordinate(plate), time_function(plate)
    q, v, a = Function(V, name="log conductivity"), TestFunction(V), TrialFunction(V)
    chosen = list(range(len(HEATERS)) if experiments is None else experiments)
    heaters = FunctionSpace(plate, "CG", 2)

    def evolution(number: int) -> Evolution:
        u = Function(V, name="temperature")
        power = Function(heaters, name=f"heater {number}").interpolate(heater(x, number))
        return Evolution(
            residual(u, v, power * course(t), exp(q)),
            u,
            tableau=tableau,
            dt=FINAL_TIME / steps if steps else 0.0,
            nsteps=steps,
            control=q,
            t=t,
            bcs=boundary_conditions(V),
        )

    evolutions, every = [evolution(number) for number in chosen], point_misfits(data, noise)
    misfits, prior = [every[number] for number in chosen], prior_of(alpha, beta)
    rf = TimeParallelReducedFunctional(
        evolutions,
        misfits,
        regularisation=0.5 * prior(q, q),
        spacetime=spacetime,
        solver_parameters=solver_parameters,
        riesz_map=prior(a, v),
    )
    conductivity = Coefficient(
        q, "conductivity", LABEL, exp, lambda f: f / np.log(2), true_log_factor(x), INCLUSIONS
    )  # fmt: skip
    limits = None if bounds is None else tuple(float(np.log(b)) for b in bounds)
    return CoefficientProblem(
        spacetime, data, evolutions, misfits, rf, [conductivity], [prior], HEATERS[chosen], limits
    )  # fmt: skip
