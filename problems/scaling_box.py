r"""Heat conduction in the unit cube, for measurements of solvers in space: a source is found from the whole state.

.. math::  \partial_t u - \Delta u = q, \qquad u = 0 \text{ on the boundary and at } t = 0,

.. math::  J(q) = \frac12 \int_0^T \!\! \int (u - u_d)^2 \, dx\, dt + \frac{\alpha}{2} \int q^2 \, dx ,

with :math:`u_d = t \prod_i \sin \pi x_i`, in P1 on cubes of six tetrahedra. With ``32`` cubes along a side there are
35,937 unknowns, with 48 117,649.
"""

from __future__ import annotations

import math

from firedrake import (
    DirichletBC,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    UnitCubeMesh,
    dx,
    grad,
    inner,
    pi,
    sin,
)
from irksome import Dt

from pint_fem.adjoint import TimeParallelReducedFunctional
from pint_fem.errors import InputError
from pint_fem.evolution import Evolution, named_tableau, time_function
from pint_fem.misfits import RunningMisfit
from pint_fem.spacetime import SpaceTime

__all__ = ["FINAL_TIME", "box", "box_evolution"]

FINAL_TIME = 0.1
ALPHA = 1e-4


def box_evolution(spacetime: SpaceTime, *, cells: int, steps: int, integrator: str = "SDIRK2") -> Evolution:
    """Pose the evolution on a process grid, with a static source as control.

    Parameters
    ----------
    spacetime
        Process grid.
    cells
        Cubes along a side, at least 1.
    steps, integrator
        Time steps to :data:`FINAL_TIME` and a name of :func:`pint_fem.evolution.named_tableau`.

    Raises
    ------
    InputError
        On every rank, on a bad value.
    """
    if cells < 1:
        raise InputError(f"cells {cells}: give at least 1")
    tableau = named_tableau(integrator)
    mesh = UnitCubeMesh(
        cells, cells, cells, comm=spacetime.space_comm, distribution_parameters={"partitioner_type": "simple"}
    )
    V = FunctionSpace(mesh, "CG", 1)
    u, q, v = Function(V, name="temperature"), Function(V, name="source"), TestFunction(V)
    return Evolution(
        Dt(u) * v * dx + inner(grad(u), grad(v)) * dx - q * v * dx,
        u,
        tableau=tableau,
        dt=FINAL_TIME / steps if steps else 0.0,
        nsteps=steps,
        control=q,
        t=time_function(mesh),
        bcs=DirichletBC(V, 0, "on_boundary"),
    )


def box(
    spacetime: SpaceTime,
    *,
    cells: int,
    steps: int,
    integrator: str = "SDIRK2",
    solver_parameters: dict | None = None,
) -> TimeParallelReducedFunctional:
    """Pose the functional on a process grid; parameters are those of :func:`box_evolution`, and the options of
    :class:`~pint_fem.adjoint.TimeParallelReducedFunctional`.
    """
    ev = box_evolution(spacetime, cells=cells, steps=steps, integrator=integrator)
    u, q = ev.u, ev.controls[0]
    target = math.prod(sin(pi * x) for x in SpatialCoordinate(ev.V.mesh()))
    return TimeParallelReducedFunctional(
        ev,
        RunningMisfit(0.5 * (u - ev.t * target) ** 2 * dx),
        regularisation=0.5 * ALPHA * q**2 * dx,
        spacetime=spacetime,
        solver_parameters=solver_parameters,
    )
