r"""Find the heat source in a plate from readings of 24 sensors: the inverse problem, posed in UFL.

The state is the temperature rise of :mod:`problems.plate`; the control is the static source q in P1; and

.. math::
    J(q) = \frac{1}{2 n \sigma^2} \sum_r \sum_s (u(x_s, t_r) - d_{rs})^2
           + \frac{1}{2} \int \alpha |\nabla q|^2 + \beta q^2 ,

for n readings with noise of standard deviation sigma: the misfit is 1/2 where a source explains the readings up to
their noise. The regularisation's own inner product is the trust region's: conjugate gradients then see one eigenvalue
for all that the sensors do not see.
"""

from dataclasses import dataclass
from pathlib import Path

from firedrake import Function, FunctionSpace, SpatialCoordinate, TestFunction, TrialFunction

from pint_fem.adjoint import TimeParallelReducedFunctional
from pint_fem.evolution import Evolution, named_tableau
from pint_fem.misfits import PointSensors
from pint_fem.spacetime import SpaceTime
from problems.heat_readings import NOISE, READINGS
from problems.meshfile import locate, read_mesh
from problems.plate import BOUNDARIES, FINAL_TIME, MESH, REGIONS, boundary_conditions, residual, true_source
from problems.priors import prior_of
from problems.readings import Readings, misfit_weight, read_readings, require_weights

__all__ = ["HeatSource", "heat_source"]

ALPHA = 1e-4
BETA = 1e-5


@dataclass
class HeatSource:
    """The posed problem.

    Attributes
    ----------
    spacetime : SpaceTime
    readings : Readings
    evolution : Evolution
    sensors : PointSensors
    rf : TimeParallelReducedFunctional
    regularisation : ufl.Form
        Of ``evolution.control``.
    true_source : Function
        What made the shipped readings.
    """

    spacetime: SpaceTime
    readings: Readings
    evolution: Evolution
    sensors: PointSensors
    rf: TimeParallelReducedFunctional
    regularisation: object
    true_source: Function


def heat_source(
    spacetime: SpaceTime,
    *,
    mesh: str | Path = MESH,
    readings: str | Path | Readings = READINGS,
    steps: int = 512,
    integrator: str = "SDIRK2",
    alpha: float = ALPHA,
    beta: float = BETA,
    noise: float = NOISE,
    solver_parameters: dict | None = None,
) -> HeatSource:
    """Pose the problem on a process grid.

    Parameters
    ----------
    spacetime
        Process grid.
    mesh, readings
        A gmsh file with the tags of :mod:`problems.plate`, and a CSV as :mod:`problems.readings` reads it, or what was
        read.
    steps, integrator
        Time steps and a name of :func:`pint_fem.evolution.named_tableau`.
    alpha, beta
        Regularisation of the gradient and the size of q; not negative, beta positive.
    noise
        Standard deviation of the readings' noise, relative to the largest reading.
    solver_parameters
        Of :class:`~pint_fem.adjoint.TimeParallelReducedFunctional`.

    Raises
    ------
    InputError
        On every rank, on a bad file or value.
    """
    require_weights(alpha, beta, noise)
    tableau = named_tableau(integrator)
    data = read_readings(readings, FINAL_TIME)
    plate = spacetime.mesh(read_mesh, mesh, required_regions=REGIONS, required_boundaries=BOUNDARIES)
    locate(data.points, plate, data.sensors)
    V = FunctionSpace(plate, "CG", 1)
    u, q, v = Function(V, name="temperature"), Function(V, name="source"), TestFunction(V)
    evolution = Evolution(
        residual(u, v, q),
        u,
        tableau=tableau,
        dt=FINAL_TIME / steps if steps else 0.0,
        nsteps=steps,
        control=q,
        bcs=boundary_conditions(V),
    )
    sensors = PointSensors(data.points, data.times, data.values, weight=misfit_weight(data, noise))
    a = TrialFunction(V)
    prior = prior_of(alpha, beta)
    regularisation = 0.5 * prior(q, q)
    given = dict(spacetime=spacetime, solver_parameters=solver_parameters, riesz_map=prior(a, v))
    rf = TimeParallelReducedFunctional(evolution, sensors, regularisation=regularisation, **given)
    truth = Function(V, name="true source").interpolate(true_source(SpatialCoordinate(plate)))
    return HeatSource(spacetime, data, evolution, sensors, rf, regularisation, truth)
