r"""Find the heat source in a box of two metals from readings of 72 sensors: the inverse problem, posed in UFL.

The state is the temperature rise of :mod:`problems.heat_box_setting`, in P1 or P2 on a generated hierarchy of meshes;
the control is the static source q in P1 on the finest mesh; and

.. math::
    J(q) = \frac{1}{2 n \sigma^2} \sum_r \sum_s (u(x_s, t_r) - d_{rs})^2
           + \frac{1}{2} \int \alpha |\nabla q|^2 + \beta q^2 ,

for n readings with noise of standard deviation sigma: the misfit is 1/2 where a source explains the readings up to
their noise. The regularisation's own inner product is the trust region's.

=========  =======  ============  ============
refine     cells    unknowns, P1  unknowns, P2
=========  =======  ============  ============
0          6^3      343           2,197
1          12^3     2,197         15,625
2          24^3     15,625        117,649
3          48^3     117,649       912,673
4          96^3     912,673       7,189,057
=========  =======  ============  ============
"""

from __future__ import annotations

from pathlib import Path

from firedrake import Function, FunctionSpace, SpatialCoordinate, TestFunction

from pint_fem.errors import InputError
from pint_fem.evolution import Evolution, named_tableau
from pint_fem.misfits import PointSensors
from pint_fem.spacetime import SpaceTime
from problems.box import BoxSource, box_hierarchy, box_source, first_readings, require_refinements
from problems.heat_box_readings import NOISE, READINGS
from problems.heat_box_setting import (
    CELLS,
    COLUMNS,
    FINAL_TIME,
    boundary_conditions,
    initial_temperature,
    residual,
    true_source,
)
from problems.meshfile import locate
from problems.readings import Readings, misfit_weight, read_readings, require_weights

__all__ = ["ALPHA", "BETA", "DEGREES", "MOST_REFINEMENTS", "heat_box"]

ALPHA = 1e-4
BETA = 1e-5
DEGREES = {"P1": 1, "P2": 2}
MOST_REFINEMENTS = 4


def heat_box(
    spacetime: SpaceTime,
    *,
    refine: int = 2,
    elements: str = "P1",
    readings: str | Path | Readings = READINGS,
    steps: int = 64,
    integrator: str = "SDIRK2",
    alpha: float = ALPHA,
    beta: float = BETA,
    noise: float = NOISE,
    first_steps: int | None = None,
    solver_parameters: dict | None = None,
    step_parameters: dict | None = None,
) -> BoxSource:
    """Pose the problem on a process grid.

    Parameters
    ----------
    spacetime, alpha, beta, noise, solver_parameters
        As for :func:`problems.heat_source.heat_source`.
    refine, elements
        Refinements of the coarsest mesh, 0 to 4, and elements of the temperature, ``"P1"`` or ``"P2"``.
    readings
        A CSV as :mod:`problems.readings` reads it, or what was read.
    steps, integrator
        Time steps and a name of :func:`pint_fem.evolution.named_tableau`.
    first_steps
        Take only so many of the steps, with the readings until then; default: all.
    step_parameters
        PETSc options of the steps' systems; default: the package's.

    Raises
    ------
    InputError
        On every rank, on a bad file or value.
    """
    require_weights(alpha, beta, noise)
    if elements not in DEGREES:
        raise InputError(f"elements = {elements!r}: give one of {', '.join(DEGREES)}")
    tableau, data = named_tableau(integrator), read_readings(readings, FINAL_TIME, COLUMNS)
    weight, dt = misfit_weight(data, noise), FINAL_TIME / steps if steps else 0.0
    if first_steps is not None:
        data = first_readings(data, first_steps * dt)
    unknowns = (DEGREES[elements] * CELLS * 2 ** max(refine, 0) + 1) ** 3
    require_refinements(spacetime, CELLS, refine, MOST_REFINEMENTS, unknowns)
    mesh = box_hierarchy(spacetime, CELLS, refine)[-1]
    locate(data.points, mesh, data.sensors)
    V, x = FunctionSpace(mesh, "CG", DEGREES[elements]), SpatialCoordinate(mesh)
    u, q = Function(V, name="temperature"), Function(FunctionSpace(mesh, "CG", 1), name="source")
    evolution = Evolution(
        residual(u.interpolate(initial_temperature(x)), TestFunction(V), q), u, tableau=tableau, dt=dt,
        nsteps=steps if first_steps is None else first_steps, control=q, bcs=boundary_conditions(V),
        solver_parameters=step_parameters,
    )  # fmt: skip
    sensors = PointSensors(data.points, data.times, data.values, weight=weight)
    weights = dict(alpha=alpha, beta=beta)
    return box_source(
        spacetime, data, evolution, [sensors], true_source(x), **weights, solver_parameters=solver_parameters
    )
