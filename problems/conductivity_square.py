r"""The benchmark problem of coefficients: heat conduction on a square whose log-conductivity is sought, in one
experiment or several with other sources, posed for the time-parallel functional and for a serial pyadjoint tape.

.. math::  \dot u - \nabla \cdot (e^q \nabla u) = f_e, \qquad u = 0 \text{ at } t = 0 \text{ and on the boundary.}

The misfit, the mesh and the time interval are those of :mod:`problems.heat_square`. Forms of the conductivity have an
explicit quadrature degree, as pyadjoint estimates the degree of each derivative anew.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import ufl
from firedrake import (
    COMM_SELF,
    DirichletBC,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    UnitSquareMesh,
    assemble,
    cos,
    dx,
    exp,
    grad,
    inner,
    sin,
)
from firedrake.adjoint import ReducedFunctional
from irksome import Dt

from pint_fem.adjoint import TimeParallelReducedFunctional
from pint_fem.evolution import Evolution, named_tableau
from pint_fem.misfits import RunningMisfit
from pint_fem.propagators.tape import recording
from pint_fem.spacetime import SpaceTime
from problems.heat_square import SIZE
from problems.serial_pyadjoint import SQUARE_TIME, SerialSource, control_with_prior, square_functionals, trajectory

__all__ = ["conductivity_square", "serial_conductivity_square"]

DEGREE = 2
"""Quadrature degree of the conductivity's form."""


def source(x: ufl.SpatialCoordinate, experiment: int) -> ufl.core.expr.Expr:
    """The source of an experiment, counted from 0."""
    return 10 * cos((2 + experiment) * x[0]) * sin((3 + experiment / 2) * x[1])


def conductivity_square(
    steps: int,
    integrator: str = "BackwardEuler",
    *,
    size: int = SIZE,
    experiments: Sequence[int] = (0,),
    spacetime: SpaceTime | None = None,
    propagator: type | None = None,
    weight: float = 1.0,
    **solver_parameters,
) -> TimeParallelReducedFunctional:
    """The functional of the log-conductivity, P1, ``size x size`` squares; default: on this rank alone.

    Parameters
    ----------
    steps, integrator, size
        Number of steps, name of the integrator and number of squares along a side.
    experiments
        Numbers of the experiments; the functional is the sum over them.
    spacetime
        The process grid.
    propagator
        Class of the propagators; default: the fastest exact one.
    weight
        Factor of the regularisation.
    **solver_parameters
        Of :class:`~pint_fem.adjoint.TimeParallelReducedFunctional`.
    """
    spacetime = spacetime or SpaceTime("1x1", comm=COMM_SELF)
    mesh = spacetime.mesh(UnitSquareMesh, size, size)
    V, x = FunctionSpace(mesh, "CG", 1), SpatialCoordinate(mesh)
    forms, q, v = square_functionals(V), Function(V, name="log conductivity"), TestFunction(V)
    evolutions, misfits = [], []
    for number in experiments:
        u, f = Function(V), Function(V).interpolate(source(x, number))
        residual = (Dt(u) - f) * v * dx + exp(q) * inner(grad(u), grad(v)) * dx(degree=DEGREE)
        evolutions.append(
            Evolution(
                residual, u, tableau=named_tableau(integrator), dt=SQUARE_TIME / steps, nsteps=steps, control=q,
                bcs=DirichletBC(V, 0, "on_boundary"),
            )
        )  # fmt: skip
        misfits.append(RunningMisfit(forms["misfit"](u)))
    one = len(evolutions) == 1
    return TimeParallelReducedFunctional(
        evolutions[0] if one else evolutions,
        misfits[0] if one else misfits,
        regularisation=weight * forms["regularisation"](q),
        spacetime=spacetime,
        solver_parameters=solver_parameters,
        **({} if propagator is None else {"propagator": propagator}),
    )


def serial_conductivity_square(
    steps: int,
    integrator: str = "BackwardEuler",
    *,
    size: int = SIZE,
    experiments: Sequence[int] = (0,),
    comm=COMM_SELF,
) -> SerialSource:
    """Record the same problem in plain Firedrake: a loop over the steps of each experiment on one tape.

    Parameters
    ----------
    steps, integrator, size, experiments
        As for :func:`conductivity_square`.
    comm
        Communicator of the mesh.
    """
    start = time.perf_counter()
    mesh = UnitSquareMesh(size, size, comm=comm)
    V, dt, x = FunctionSpace(mesh, "CG", 1), SQUARE_TIME / steps, SpatialCoordinate(mesh)
    forms, q = square_functionals(V), Function(V, name="log conductivity")
    with recording() as tape:
        J = assemble(forms["regularisation"](q))
        for number in experiments:
            f = Function(V).interpolate(source(x, number))
            states = trajectory(
                lambda w, v: w * v * dx,
                lambda w, v: exp(q) * inner(grad(w), grad(v)) * dx(degree=DEGREE),
                lambda v, f=f: f * v * dx,
                V,
                [DirichletBC(V, 0, "on_boundary")],
                dt=dt,
                steps=steps,
                integrator=integrator,
                constant=False,
            )
            for k, u in states:
                if k:
                    J += assemble(dt * forms["misfit"](u))
    rf = ReducedFunctional(J, control_with_prior(q, lambda a, b: a * b * dx), tape=tape)
    return SerialSource(rf, q, steps, time.perf_counter() - start)
