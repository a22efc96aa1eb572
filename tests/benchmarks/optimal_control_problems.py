r"""Tracking problems of :mod:`tests.benchmarks.optimal_control`: heat, a wave and Maxwell's equations in a cavity.

Each has a control that is a field with a value in each step, and

.. math::
    J(q) = \frac12 \int_0^T \!\! \int |y - y_d|^2 \, dx\, dt + \frac{\beta}{2} \int_0^T \!\! \int |q|^2 \, dx\, dt ,

where y is the temperature, the displacement of the wave, or both fields in the cavity. The unit square has boundary
conditions of value zero.
"""

from __future__ import annotations

from collections.abc import Callable

from firedrake import (
    COMM_SELF,
    Constant,
    DirichletBC,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    UnitSquareMesh,
    as_vector,
    cos,
    dx,
    exp,
    grad,
    inner,
    pi,
    rot,
    sin,
)

from pint_fem.spacetime import SpaceTime
from problems.control import Bounds, ControlForms, ControlProblem, pose

__all__ = ["PROBLEMS", "cavity", "heat", "problem", "wave"]


def _square(cells: int, comm):
    return UnitSquareMesh(cells, cells, comm=comm, distribution_parameters={"partitioner_type": "simple"})


def _target(x):
    return sin(pi * x[0]) * sin(pi * x[1]) * exp(x[0] - x[1])


def heat(cells: int, degree: int, weight: float, comm=COMM_SELF) -> ControlForms:
    """Heat conduction with a source, T = 1; the target does not depend on time."""
    mesh, beta = _square(cells, comm), Constant(weight)
    V = FunctionSpace(mesh, "CG", degree)
    # in the space of the state, as the target's own quadrature degree is high
    target = Function(V, name="target").interpolate(_target(SpatialCoordinate(mesh)))
    return ControlForms(
        V=V,
        controls=(Function(V, name="source"),),
        mass=lambda rate, v: inner(rate, v) * dx,
        rest=lambda u, v, controls: (inner(grad(u), grad(v)) - inner(controls[0], v)) * dx,
        running=lambda u, t: 0.5 * (u - target) ** 2 * dx,
        regularisation=lambda controls: 0.5 * beta * controls[0] ** 2 * dx,
        initial=0 * SpatialCoordinate(mesh)[0],
        final_time=1.0,
        bcs=(DirichletBC(V, 0, "on_boundary"),),
    )


def wave(cells: int, degree: int, weight: float, comm=COMM_SELF) -> ControlForms:
    """The undamped wave equation with a force, as a system of displacement and velocity, T = 2."""
    mesh, beta = _square(cells, comm), Constant(weight)
    V = FunctionSpace(mesh, "CG", degree)
    W, target = V * V, Function(V, name="target").interpolate(_target(SpatialCoordinate(mesh)))
    return ControlForms(
        V=W,
        controls=(Function(V, name="force"),),
        mass=lambda rate, v: (rate[0] * v[0] + rate[1] * v[1]) * dx,
        rest=lambda u, v, controls: (inner(grad(u[0]), grad(v[1])) - u[1] * v[0] - controls[0] * v[1]) * dx,
        running=lambda u, t: 0.5 * (u[0] - target) ** 2 * dx,
        regularisation=lambda controls: 0.5 * beta * controls[0] ** 2 * dx,
        initial=as_vector((0 * target, 0 * target)),
        final_time=2.0,
        bcs=tuple(DirichletBC(W.sub(i), 0, "on_boundary") for i in range(2)),
    )


def cavity(cells: int, degree: int, weight: float, comm=COMM_SELF) -> ControlForms:
    """Maxwell's equations in a perfectly conducting cavity with a current that is to keep it without fields, T = 1."""
    mesh, beta = _square(cells, comm), Constant(weight)
    W = FunctionSpace(mesh, "N1curl", degree)
    V, x = W * FunctionSpace(mesh, "DG", degree - 1), SpatialCoordinate(mesh)
    electric = lambda u: as_vector((u[0], u[1]))
    return ControlForms(
        V=V,
        controls=(Function(W, name="current"),),
        mass=lambda rate, v: (inner(electric(rate), electric(v)) + rate[2] * v[2]) * dx,
        rest=lambda u, v, controls: (
            (-u[2] * rot(electric(v)) + rot(electric(u)) * v[2] - inner(controls[0], electric(v))) * dx
        ),
        running=lambda u, t: 0.5 * inner(u, u) * dx,
        regularisation=lambda controls: 0.5 * beta * inner(controls[0], controls[0]) * dx,
        initial=as_vector((0 * x[0], 0 * x[0], cos(pi * x[0]) * cos(2 * pi * x[1]))),
        final_time=1.0,
        bcs=(DirichletBC(V.sub(0), as_vector((0, 0)), "on_boundary"),),
    )


PROBLEMS: dict[str, Callable[..., ControlForms]] = {"heat": heat, "wave": wave, "cavity": cavity}


def problem(
    name: str,
    *,
    cells: int,
    degree: int,
    weight: float,
    steps: int,
    integrator: str,
    spacetime: SpaceTime | None = None,
    bounds: Bounds | None = None,
    **solver_parameters,
) -> ControlProblem:
    """Pose one of the :data:`PROBLEMS`.

    Parameters
    ----------
    name
        Its name.
    cells, degree, weight
        Squares along a side, degree of the elements, and the weight of the control.
    steps, integrator
        Time steps and a name of :func:`pint_fem.evolution.named_tableau`.
    spacetime
        Process grid; default: this rank alone.
    bounds
        Of the control.
    **solver_parameters
        Of :class:`~pint_fem.adjoint.TimeParallelReducedFunctional`; default: sequential sweeps.
    """
    spacetime = spacetime or SpaceTime("1x1", comm=COMM_SELF)
    forms = PROBLEMS[name](cells, degree, weight, spacetime.space_comm)
    given = solver_parameters or {"time_solver": "serial"}
    return pose(forms, spacetime, steps=steps, integrator=integrator, bounds=bounds, solver_parameters=given)
