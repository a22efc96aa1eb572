r"""Find the wave speed of a section through the ground from eight shots: full-waveform inversion, posed in UFL.

The states are (p, v) of :mod:`problems.acoustic` after each shot of :mod:`problems.acoustic_setting`; the speed is a
known one that rises with depth times :math:`e^q`, with the control :math:`q` in P1; and

.. math::
    J(q) = \frac{1}{2 n \sigma^2} \sum_e \sum_r \sum_s (p_e(x_s, t_r) - d_{ers})^2
           + \frac{1}{2} \int \alpha |\nabla q|^2 + \beta q^2 ,

for n readings with noise of standard deviation sigma: the misfit is 1/2 where a speed explains the readings up to their
noise. Pulse and readings are filtered to one band. The misfit has local minima where waves are late by more than half a
period, so that bands are minimised from low frequencies to high ones, each from the result of the one before. The
regularisation's own inner product is the trust region's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from firedrake import (
    Constant,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    TrialFunction,
    exp,
    ln,
)

from pint_fem.adjoint import TimeParallelReducedFunctional
from pint_fem.capacity import require_memory
from pint_fem.evolution import Evolution, named_tableau, time_function
from pint_fem.spacetime import SpaceTime
from problems.acoustic import P, V, free_surface, residual, state_space
from problems.acoustic_readings import NOISE, READINGS, filtered
from problems.acoustic_setting import (
    CELLS,
    COLUMNS,
    FINAL_TIME,
    INCLUSIONS,
    LAYER_SPEEDS,
    PEAK_FREQUENCY,
    RECORD_END,
    SHOTS,
    SURFACE,
    WALLS,
    damping,
    filtered_pulse,
    ground_mesh,
    shot_shape,
    start_speed,
    true_speed,
)
from problems.experiments import Coefficient, CoefficientProblem, ExperimentReadings, point_misfits, read_experiments
from problems.meshfile import locate
from problems.priors import prior_of
from problems.readings import require_weights

__all__ = ["ALPHA", "BETA", "DEGREE", "INTEGRATOR", "STEPS", "acoustic_velocity", "speed_of"]

ALPHA = 2e-2
BETA = 1e-4
STEPS = 200
DEGREE = 2
INTEGRATOR = "ImplicitMidpoint"


def speed_of(q, x):
    """Return the wave speed of a control ``q`` at ``x``, a ``SpatialCoordinate``."""
    return start_speed(x) * exp(q)


def acoustic_velocity(
    spacetime: SpaceTime,
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
    bounds: tuple[float, float] | None = None,
    experiments: Sequence[int] | None = None,
    solver_parameters: dict | None = None,
) -> CoefficientProblem:
    """Pose the problem of one band on a process grid.

    Parameters
    ----------
    spacetime
        Process grid.
    band
        Peak frequency that pulse and readings are filtered to, at most that of the shots.
    cells, degree
        Cells per kilometre, a multiple of 4, and degree of the pressure.
    readings
        A CSV as :mod:`problems.experiments` reads it, or what was read.
    steps, integrator
        Time steps and a name of :func:`pint_fem.evolution.named_tableau`.
    alpha, beta
        Regularisation of the gradient and the size of q; not negative, beta positive.
    noise
        Standard deviation of the readings' noise, relative to the largest reading before the filter.
    bounds
        Of the speed over that of the start.
    experiments
        Numbers of the shots in the functional, each with its weight in the sum of all; default: all.
    solver_parameters
        Of :class:`~pint_fem.adjoint.TimeParallelReducedFunctional`.

    Raises
    ------
    InputError
        On every rank, on a bad file or value.
    """
    require_weights(alpha, beta, noise)
    tableau = named_tableau(integrator)
    data = filtered(read_experiments(readings, RECORD_END, COLUMNS, count=len(SHOTS)), band)
    least = int(3 * cells**2 * 2000) * degree**2 // spacetime.space_size
    require_memory(spacetime.comm, least, f"{cells} cells per kilometre", "give fewer cells or a lower degree")
    mesh = spacetime.mesh(ground_mesh, cells)
    for own in data.readings:
        locate(own.points, mesh, own.sensors)
    space, x, t = state_space(mesh, degree), SpatialCoordinate(mesh), time_function(mesh)
    Q = FunctionSpace(mesh, "CG", 1)
    q, a, b = Function(Q, name="log speed"), TrialFunction(Q), TestFunction(Q)
    chosen = list(range(len(SHOTS)) if experiments is None else experiments)

    def evolution(number: int) -> Evolution:
        u, place = Function(space, name="field"), Constant(SHOTS[number])
        source = filtered_pulse(t, band) * shot_shape(x, place)
        return Evolution(
            residual(u, speed_of(q, x), source=source, damping=damping(x), walls=WALLS),
            u,
            tableau=tableau,
            dt=FINAL_TIME / steps if steps else 0.0,
            nsteps=steps,
            control=q,
            t=t,
            bcs=free_surface(space, SURFACE),
            eliminate=V,
        )

    evolutions, every = [evolution(number) for number in chosen], point_misfits(data, noise, [(P, None)])
    misfits, prior = [every[number] for number in chosen], prior_of(alpha, beta)
    rf = TimeParallelReducedFunctional(
        evolutions,
        misfits,
        regularisation=0.5 * prior(q, q),
        spacetime=spacetime,
        solver_parameters=solver_parameters,
        riesz_map=prior(a, b),
    )
    speed = Coefficient(
        q,
        "wave speed",
        "ln(speed / that of the start)",
        lambda f: speed_of(f, x) / LAYER_SPEEDS[1] - 1,  # of which inclusions have their contrast
        lambda f: f,
        ln(true_speed(x) / start_speed(x)),
        INCLUSIONS,
    )
    limits = None if bounds is None else tuple(float(np.log(bound)) for bound in bounds)
    return CoefficientProblem(spacetime, data, evolutions, misfits, rf, [speed], [prior], SHOTS[chosen], limits)
