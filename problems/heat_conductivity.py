r"""Find the conductivity of a plate from eight heating experiments: the inverse problem, posed in UFL.

The states are the temperature rises of :mod:`problems.plate` in the experiments of
:mod:`problems.heat_conductivity_setting`; the conductivity is the known one of the two metals times :math:`e^q`, the
control :math:`q` is in P1; and

.. math::
    J(q) = \frac{1}{2 n \sigma^2} \sum_e \sum_r \sum_s (u_e(x_s, t_r) - d_{ers})^2
           + \frac{1}{2} \int \alpha |\nabla q|^2 + \beta q^2 ,

for n readings with noise of standard deviation sigma: the misfit is 1/2 where a conductivity explains the readings up
to their noise. The inner product of this regularisation is the trust region's. With total variation
:math:`\int \alpha \sqrt{|\nabla q|^2 + \varepsilon}` is in the place of the squared gradient, for edges.
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
    sqrt,
)
from ufl import Form

from pint_fem.adjoint import TimeParallelReducedFunctional
from pint_fem.adjoint.total_variation.functional import TotalVariation
from pint_fem.errors import InputError
from pint_fem.evolution import Evolution, named_tableau, time_function
from pint_fem.spacetime import SpaceTime
from problems.experiments import Coefficient, CoefficientProblem, ExperimentReadings, point_misfits, read_experiments
from problems.heat_conductivity_readings import NOISE, READINGS
from problems.heat_conductivity_setting import COLUMNS, HEATERS, INCLUSIONS, course, heater, true_log_factor
from problems.meshfile import locate, read_mesh
from problems.plate import BOUNDARIES, FINAL_TIME, MESH, REGIONS, boundary_conditions, residual
from problems.priors import prior_of
from problems.readings import require_weights

__all__ = [
    "ALPHA",
    "BETA",
    "LABEL",
    "REGULARISATIONS",
    "SMOOTHING",
    "STEPS",
    "heat_conductivity",
    "variation",
    "weight_of",
]

REGULARISATIONS = ("h1", "tv")
#: Weight of the gradient with each regularisation, and of the size.
ALPHA = {"h1": 1e-4, "tv": 7e-4}
BETA = 1e-5
#: Smoothing of the total variation; a jump by the factor 3 over one cell has a gradient with the square 500.
SMOOTHING = 0.1
STEPS = 128
LABEL = "log₂(conductivity / that of the metal)"


def weight_of(regularisation: str, alpha: float | None) -> float:
    """Return the given weight, or the default one of a regularisation.

    Raises
    ------
    InputError
        If there is no such regularisation.
    """
    if regularisation not in REGULARISATIONS:
        raise InputError(f"regularisation = {regularisation!r}: give one of {', '.join(REGULARISATIONS)}")
    return ALPHA[regularisation] if alpha is None else alpha


def variation(q: Function, alpha: float, beta: float) -> Form:
    """Return the regularisation with total variation of a control as a UFL functional."""
    return (alpha * sqrt(inner(grad(q), grad(q)) + SMOOTHING) + 0.5 * beta * q * q) * dx


def heat_conductivity(
    spacetime: SpaceTime,
    *,
    mesh: str | Path = MESH,
    readings: str | Path | ExperimentReadings = READINGS,
    steps: int = STEPS,
    integrator: str = "SDIRK2",
    regularisation: str = "tv",
    alpha: float | None = None,
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
    regularisation
        ``"tv"``, total variation, or ``"h1"``, the squared gradient.
    alpha, beta
        Weights of the gradient and the size of q in it; positive. Default of alpha: that of the regularisation.
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
    alpha = weight_of(regularisation, alpha)
    require_weights(alpha, beta, noise)
    tableau = named_tableau(integrator)
    data = read_experiments(readings, FINAL_TIME, COLUMNS, count=len(HEATERS))
    plate = spacetime.mesh(read_mesh, mesh, required_regions=REGIONS, required_boundaries=BOUNDARIES)
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
    misfits, tv = [every[number] for number in chosen], regularisation == "tv"
    prior = prior_of(ALPHA["h1"] if tv else alpha, beta)
    added: list = [0.5 * prior(q, q)]
    if tv:
        added = [TotalVariation(q, weight=alpha, smoothing=SMOOTHING), 0.5 * beta * q * q * dx]
    rf = TimeParallelReducedFunctional(
        evolutions,
        misfits,
        regularisation=added,
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
