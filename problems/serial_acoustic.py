r"""The wave-speed problem the ordinary way: plain Firedrake, a loop over the steps on one pyadjoint tape.

The baseline of :mod:`problems.acoustic_velocity`: the same discrete problem, value for value, with none of
``pint_fem``'s solvers; stages as in :mod:`problems.serial_pyadjoint`, of the mixed system. The control is in the
operator, so that pyadjoint factorises at every stage of every step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import ufl
from firedrake import (
    COMM_SELF,
    Constant,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    as_vector,
    assemble,
    ds,
    dx,
    grad,
    inner,
)
from firedrake.adjoint import ReducedFunctional

from pint_fem.propagators.tape import recording
from problems.acoustic import P, free_surface, state_space
from problems.acoustic_readings import NOISE, READINGS, filtered
from problems.acoustic_setting import (
    CELLS,
    COLUMNS,
    FINAL_TIME,
    PEAK_FREQUENCY,
    RECORD_END,
    SHOTS,
    SURFACE,
    WALLS,
    damping,
    filtered_pulse,
    ground_mesh,
    shot_shape,
)
from problems.acoustic_velocity import ALPHA, BETA, DEGREE, INTEGRATOR, STEPS, speed_of
from problems.experiments import ExperimentReadings, read_experiments
from problems.meshfile import locate
from problems.priors import prior_of
from problems.serial_pyadjoint import DIRECT_MIXED, SerialSource, add_squares, control_with_prior, trajectory

__all__ = ["serial_acoustic_velocity"]


def serial_acoustic_velocity(
    *,
    band: float = PEAK_FREQUENCY,
    cells: int = CELLS,
    degree: int = DEGREE,
    readings: str | Path | ExperimentReadings = READINGS,
    steps: int = STEPS,
    integrator: str = INTEGRATOR,
    alpha: float = ALPHA,
    beta: float = BETA,
    noise: float = NOISE,
    experiments: Sequence[int] | None = None,
    comm=COMM_SELF,
    **ignored,
) -> SerialSource:
    """Record the problem of :func:`problems.acoustic_velocity.acoustic_velocity`, with the same arguments.

    Parameters
    ----------
    band, cells, degree, readings, steps, integrator, alpha, beta, noise, experiments
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
    data = filtered(read_experiments(readings, RECORD_END, COLUMNS, count=len(SHOTS)), band)
    mesh = ground_mesh(cells, comm)
    space, x = state_space(mesh, degree), SpatialCoordinate(mesh)
    q, prior = Function(FunctionSpace(mesh, "CG", 1), name="log speed"), prior_of(alpha, beta)
    weight = data.weight(noise)
    inside, wall = dx(degree=2 * degree + 1), ds(WALLS, degree=2 * degree + 1)
    fields = lambda w: (w[0], as_vector((w[1], w[2])))  # also of a sum of functions, which split() does not take

    def mass(w, v) -> ufl.Form:
        (p, velocity), (a, r) = fields(w), fields(v)
        return (p * a / speed_of(q, x) ** 2 + inner(velocity, r)) * inside

    def stiffness(w, v) -> ufl.Form:
        (p, velocity), (a, r) = fields(w), fields(v)
        lost = damping(x) * p * a / speed_of(q, x) ** 2
        return (lost + inner(grad(p), r) - inner(velocity, grad(a))) * inside + p * a / speed_of(q, x) * wall

    with recording() as tape:
        J = assemble(0.5 * prior(q, q))
        for number in range(len(SHOTS)) if experiments is None else experiments:
            own, place = data.readings[number], Constant(SHOTS[number])
            states = trajectory(
                mass,
                stiffness,
                lambda v, place=place: shot_shape(x, place) * v[0] * dx(degree=degree + 6),
                space,
                free_surface(space, SURFACE),
                dt=FINAL_TIME / steps,
                steps=steps,
                integrator=integrator,
                course=lambda t: float(filtered_pulse(t, band)),
                constant=False,
                parameters=DIRECT_MIXED,
            )
            sensors = locate(own.points, mesh, own.sensors)
            pressure = dict(observed=lambda u: ufl.split(u)[P])
            J = add_squares(J, states, own, weight, sensors, steps=steps, final_time=FINAL_TIME, **pressure)
    rf = ReducedFunctional(J, control_with_prior(q, prior), tape=tape)
    return SerialSource(rf, q, steps, time.perf_counter() - start)
