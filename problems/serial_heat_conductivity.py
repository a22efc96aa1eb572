"""The conductivity problem the ordinary way: plain Firedrake, a loop over the steps on one pyadjoint tape.

The baseline of :mod:`problems.heat_conductivity`: the same discrete problem, value for value, with none of
``pint_fem``'s solvers; stages and solvers as in :mod:`problems.serial_pyadjoint`. The control is in the operator, so
that pyadjoint factorises at every stage of every step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from firedrake import COMM_SELF, Function, FunctionSpace, SpatialCoordinate, assemble, ds, dx, exp, grad, inner
from firedrake.adjoint import ReducedFunctional

from pint_fem.propagators.tape import recording
from problems.experiments import ExperimentReadings, read_experiments
from problems.heat_conductivity import ALPHA, BETA, STEPS, variation, weight_of
from problems.heat_conductivity_readings import NOISE, READINGS
from problems.heat_conductivity_setting import COLUMNS, HEATERS, course, heater
from problems.meshfile import locate, read_mesh
from problems.plate import (
    BOUNDARIES,
    CONVECTION,
    FINAL_TIME,
    HOLE_1,
    KAPPA,
    MESH,
    OUTER_EDGE,
    REGIONS,
    RHO_C,
    boundary_conditions,
)
from problems.priors import prior_of
from problems.serial_pyadjoint import SerialSource, add_squares, control_with_prior, trajectory

__all__ = ["serial_heat_conductivity"]


def serial_heat_conductivity(
    *,
    mesh: str | Path = MESH,
    readings: str | Path | ExperimentReadings = READINGS,
    steps: int = STEPS,
    integrator: str = "SDIRK2",
    regularisation: str = "tv",
    alpha: float | None = None,
    beta: float = BETA,
    noise: float = NOISE,
    experiments: Sequence[int] | None = None,
    comm=COMM_SELF,
    **ignored,
) -> SerialSource:
    """Record the problem of :func:`problems.heat_conductivity.heat_conductivity`, with the same arguments.

    Parameters
    ----------
    mesh, readings, steps, integrator, regularisation, alpha, beta, noise, experiments
        As there.
    comm
        Communicator of the mesh.
    **ignored
        What concerns the minimisation only.

    Raises
    ------
    InputError
        On a bad file or integrator.
    """
    start = time.perf_counter()
    data = read_experiments(readings, FINAL_TIME, COLUMNS, count=len(HEATERS))
    plate = read_mesh(mesh, comm, REGIONS, BOUNDARIES)
    V, x, heaters = FunctionSpace(plate, "CG", 1), SpatialCoordinate(plate), FunctionSpace(plate, "CG", 2)
    q, weight, alpha = Function(V, name="log conductivity"), data.weight(noise), weight_of(regularisation, alpha)
    prior = prior_of(ALPHA["h1"] if regularisation == "tv" else alpha, beta)
    with recording() as tape:
        J = assemble(variation(q, alpha, beta) if regularisation == "tv" else 0.5 * prior(q, q))
        for number in range(len(HEATERS)) if experiments is None else experiments:
            power, own = Function(heaters).interpolate(heater(x, number)), data.readings[number]
            states = trajectory(
                lambda w, v: sum(RHO_C[r] * w * v * dx(r) for r in REGIONS),
                lambda w, v: (
                    sum(KAPPA[r] * exp(q) * inner(grad(w), grad(v)) * dx(r, degree=2) for r in REGIONS)
                    + CONVECTION * w * v * ds((OUTER_EDGE, HOLE_1))
                ),
                lambda v, power=power: power * v * dx,
                V,
                boundary_conditions(V),
                dt=FINAL_TIME / steps,
                steps=steps,
                integrator=integrator,
                course=lambda t: float(course(t)),
                constant=False,
            )
            sensors = locate(own.points, plate, own.sensors)
            J = add_squares(J, states, own, weight, sensors, steps=steps, final_time=FINAL_TIME)
    rf = ReducedFunctional(J, control_with_prior(q, prior), tape=tape)
    return SerialSource(rf, q, steps, time.perf_counter() - start)
