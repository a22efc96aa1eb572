"""Nonlinear problems, and what a serial pyadjoint tape of the same steps is: viscous Burgers and a conductivity that
depends on temperature.
"""

from __future__ import annotations

from typing import NamedTuple

import ufl
from firedrake import (
    COMM_SELF,
    Constant,
    DirichletBC,
    Function,
    FunctionSpace,
    NonlinearVariationalProblem,
    NonlinearVariationalSolver,
    SpatialCoordinate,
    TestFunction,
    VectorFunctionSpace,
    as_vector,
    assemble,
    cos,
    dot,
    dx,
    grad,
    inner,
    pi,
    sin,
)
from firedrake.adjoint import Control, ReducedFunctional
from irksome import Dt

import pint_fem as pf
from pint_fem.evolution.tableaux import DIRK, named_tableau
from pint_fem.propagators import make_propagator
from pint_fem.propagators.tape import recording
from tests.meshes import square

__all__ = ["PROBLEMS", "Posed", "burgers", "conductivity", "functional", "tape_functional"]


class Posed(NamedTuple):
    """An evolution with functionals of its state and control.

    Attributes
    ----------
    evolution : Evolution
    running, regularisation
        UFL functionals ``running(u)`` and ``regularisation(q)``.
    control, direction
        Expressions to take derivatives at and along.
    """

    evolution: pf.Evolution
    running: object
    regularisation: object
    control: object
    direction: object


def _mesh(n, comm):
    return square(n, comm)


def burgers(n, steps, *, tableau="BackwardEuler", degree=2, comm=COMM_SELF, final_time=0.5, per_step=False) -> Posed:
    """Viscous Burgers in the plane, at rest on the boundary, driven by an unknown force."""
    mesh = _mesh(n, comm)
    V = VectorFunctionSpace(mesh, "CG", degree)
    x, y = SpatialCoordinate(mesh)
    u, v, q = Function(V), TestFunction(V), Function(V)
    F = (inner(Dt(u), v) + inner(dot(u, ufl.nabla_grad(u)), v) + 0.02 * inner(grad(u), grad(v)) - inner(q, v)) * dx
    u.interpolate(as_vector((sin(pi * x) * sin(pi * y), sin(2 * pi * x) * sin(pi * y))))
    target = Function(V).interpolate(as_vector((sin(pi * x) * sin(2 * pi * y), 0 * x)))
    evolution = pf.Evolution(
        F,
        u,
        tableau=named_tableau(tableau),
        dt=final_time / steps,
        nsteps=steps,
        control=q,
        per_step=per_step,
        bcs=DirichletBC(V, 0, "on_boundary"),
    )
    return Posed(
        evolution,
        lambda w: 0.5 * inner(w - target, w - target) * dx,
        lambda z: 0.5e-3 * inner(z, z) * dx,
        as_vector((cos(2 * x) * y, x * y)),
        as_vector((sin(3 * y), x - y)),
    )


def conductivity(n, steps, *, tableau="BackwardEuler", degree=1, comm=COMM_SELF, final_time=0.2, per_step=False):
    """Heat conduction with a conductivity that depends on the temperature, and an unknown source."""
    mesh = _mesh(n, comm)
    V = FunctionSpace(mesh, "CG", degree)
    x, y = SpatialCoordinate(mesh)
    u, v, q = Function(V), TestFunction(V), Function(V)
    F = (Dt(u) * v + (1 + u**2) * inner(grad(u), grad(v)) - q * v) * dx
    u.interpolate(sin(pi * x) * sin(pi * y))
    target = Function(V).interpolate(x * y)
    evolution = pf.Evolution(
        F,
        u,
        tableau=named_tableau(tableau),
        dt=final_time / steps,
        nsteps=steps,
        control=q,
        per_step=per_step,
        bcs=DirichletBC(V, 0, "on_boundary"),
    )
    return Posed(
        evolution,
        lambda w: 0.5 * (w - target) ** 2 * dx,
        lambda z: 0.5e-3 * z**2 * dx,
        10 * cos(2 * x) * sin(3 * y),
        x * cos(pi * y),
    )


PROBLEMS = {"burgers": burgers, "conductivity": conductivity}


def functional(
    posed: Posed, spacetime=None, propagator=make_propagator, **parameters
) -> pf.TimeParallelReducedFunctional:
    """The time-parallel functional; default: on this rank alone."""
    spacetime = spacetime or pf.SpaceTime("1x1", comm=COMM_SELF)
    ev = posed.evolution
    return pf.TimeParallelReducedFunctional(
        ev,
        pf.RunningMisfit(posed.running(ev.u)),
        regularisation=posed.regularisation(ev.control),
        spacetime=spacetime,
        solver_parameters=parameters,
        propagator=propagator,
    )


NEWTON = {
    "snes_rtol": 1e-10,
    "snes_atol": 1e-12,
    "snes_linesearch_type": "basic",
    "ksp_type": "preonly",
    "pc_type": "lu",
    "pc_factor_mat_solver_type": "petsc",
    "pc_factor_mat_ordering_type": "nd",
}


def tape_functional(posed: Posed, newton: dict | None = None) -> ReducedFunctional:
    """A tape with one ``NonlinearVariationalSolver`` a stage, recorded once (stiffly accurate tableaux)."""
    ev = posed.evolution
    dirk = DIRK(ev.tableau)
    q = Function(ev.control.function_space()).interpolate(posed.control)
    with recording() as tape:
        u, solvers, W = ev.initial.copy(deepcopy=True), [], None
        W, d = u, []
        for i in range(dirk.stages):
            U = Function(ev.V)
            form = ufl.replace(ev.stage_form(U, W, Constant(dirk.diagonal[i] * ev.dt)), {ev.control: q})
            problem = NonlinearVariationalProblem(form, U, bcs=ev.bcs)
            solvers.append(NonlinearVariationalSolver(problem, solver_parameters=newton or NEWTON))
            d.append(U - W)
            if i + 1 < dirk.stages:
                W = u + sum(float(dirk.alpha[i + 1, j]) * d[j] for j in range(i + 1))
        J = assemble(posed.regularisation(q))
        for _ in range(ev.nsteps):
            for solver in solvers:
                solver.solve()
            u.assign(U)
            J += assemble(ev.dt * posed.running(u))
    return ReducedFunctional(J, Control(q), tape=tape)
