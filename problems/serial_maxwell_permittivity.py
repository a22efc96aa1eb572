r"""The radar problem the ordinary way: plain Firedrake, a loop over the steps of each antenna on one pyadjoint tape.

The baseline of :mod:`problems.maxwell_permittivity`: the same discrete problem, value for value, with none of
``pint_fem``'s solvers; stages as in :mod:`problems.serial_pyadjoint`. A stage is one solve of the mixed system of E
and B, whose matrix the tape assembles and factors anew, as the controls are in it; the controls' inner products are
those of the regularisation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from firedrake import (
    COMM_SELF,
    FacetNormal,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    as_vector,
    assemble,
    conditional,
    curl,
    ds,
    dx,
    exp,
    inner,
    split,
    sqrt,
)
from firedrake.adjoint import ReducedFunctional

from pint_fem.propagators.tape import recording
from problems.experiments import ExperimentReadings, read_experiments
from problems.maxwell import E, state_space, tangential
from problems.maxwell_permittivity import (
    ALPHA,
    ALPHA_CONDUCTIVITY,
    BETA,
    COLUMNS,
    DEGREE,
    LOAD_DEGREE,
    NOISE,
    OPERATOR_DEGREE,
    READINGS,
)
from problems.maxwell_soil import ANTENNAS, BACKGROUND, CELLS, FINAL_TIME, STEPS, current, in_soil, pulse, soil_mesh
from problems.meshfile import locate
from problems.priors import prior_of
from problems.serial_pyadjoint import DIRECT_MIXED, SerialSource, add_squares, control_with_prior, trajectory

__all__ = ["serial_maxwell_permittivity"]


def serial_maxwell_permittivity(
    *, cells: int = CELLS, degree: int = DEGREE, readings: str | Path | ExperimentReadings = READINGS,
    steps: int = STEPS, integrator: str = "ImplicitMidpoint", alpha: float = ALPHA,
    alpha_conductivity: float = ALPHA_CONDUCTIVITY, beta: float = BETA, noise: float = NOISE,
    experiments: Sequence[int] | None = None, comm=COMM_SELF, **ignored,
) -> SerialSource:  # fmt: skip
    """Record the problem of :func:`problems.maxwell_permittivity.maxwell_permittivity`, with the same arguments;
    ``ignored`` are those of the minimisation.

    Raises
    ------
    InputError
        On a bad file or integrator.
    """
    start = time.perf_counter()
    data = read_experiments(readings, FINAL_TIME, COLUMNS, count=len(ANTENNAS))
    weight, mesh = data.weight(noise), soil_mesh(cells, comm)
    V, x, n = state_space(mesh, degree), SpatialCoordinate(mesh), FacetNormal(mesh)
    controls = [Function(FunctionSpace(mesh, "CG", 1), name=name) for name in ("permittivity", "conductivity")]
    priors = [prior_of(alpha, beta), prior_of(alpha_conductivity, beta)]
    epsilon, sigma = (
        conditional(in_soil(x), value * exp(control), outside)
        for value, control, outside in zip(BACKGROUND, controls, (1.0, 0.0), strict=True)
    )
    admittance = conditional(in_soil(x), sqrt(BACKGROUND[0]), 1.0)
    inside = dx(degree=OPERATOR_DEGREE)

    def mass(w, v):
        (e, b), (f, c) = _fields(w), _fields(v)
        return (epsilon * inner(e, f) + inner(b, c)) * inside

    def stiffness(w, v):
        (e, b), (f, c) = _fields(w), _fields(v)
        lossy = (sigma * inner(e, f) - inner(b, curl(f)) + inner(curl(e), c)) * inside
        return lossy + admittance * inner(tangential(n, e), tangential(n, f)) * ds

    with recording() as tape:
        J = sum(assemble(0.5 * own(control, control)) for own, control in zip(priors, controls, strict=True))
        for k in range(len(ANTENNAS)) if experiments is None else experiments:
            profile, own = current(x, ANTENNAS[k]), data.readings[k]
            states = trajectory(
                mass,
                stiffness,
                lambda v, profile=profile: -inner(profile, split(v)[E]) * dx(degree=LOAD_DEGREE),
                V,
                [],
                dt=FINAL_TIME / steps,
                steps=steps,
                integrator=integrator,
                course=pulse,
                constant=False,
                parameters=DIRECT_MIXED,
            )
            receivers = locate(own.points, mesh, own.sensors)
            length = dict(steps=steps, final_time=FINAL_TIME)
            J = add_squares(J, states, own, weight, receivers, **length, observed=lambda u: split(u)[E][0])
    rf = ReducedFunctional(J, [control_with_prior(*pair) for pair in zip(controls, priors, strict=True)], tape=tape)
    return SerialSource(rf, controls, steps, time.perf_counter() - start)


def _fields(w):
    """E and B of a function of the mixed space or of a combination of such."""
    return as_vector((w[0], w[1])), w[2]
