"""The benchmark problem: heat conduction on a square, posed for the time-parallel functional, and its control."""

from __future__ import annotations

import numpy as np
from firedrake import COMM_SELF, DirichletBC, Function, FunctionSpace, TestFunction, UnitSquareMesh, dx, grad, inner
from irksome import Dt

from pint_fem.adjoint import TimeParallelReducedFunctional
from pint_fem.evolution import Evolution, named_tableau
from pint_fem.misfits import RunningMisfit
from pint_fem.spacetime import SpaceTime
from problems.serial_pyadjoint import SQUARE_TIME, square_functionals

__all__ = ["SIZE", "field", "square"]

SIZE = 64


def square(
    steps: int,
    integrator: str = "BackwardEuler",
    *,
    size: int = SIZE,
    spacetime: SpaceTime | None = None,
    **solver_parameters,
) -> TimeParallelReducedFunctional:
    """The time-parallel twin of :func:`problems.serial_pyadjoint.serial_square`, P1, ``size x size`` squares; default:
    on this rank alone.
    """
    spacetime = spacetime or SpaceTime("1x1", comm=COMM_SELF)
    mesh = spacetime.mesh(UnitSquareMesh, size, size)
    V = FunctionSpace(mesh, "CG", 1)
    forms = square_functionals(V)
    u, q, v = Function(V), Function(V), TestFunction(V)
    evolution = Evolution(
        Dt(u) * v * dx + inner(grad(u), grad(v)) * dx - q * v * dx,
        u,
        tableau=named_tableau(integrator),
        dt=SQUARE_TIME / steps,
        nsteps=steps,
        control=q,
        bcs=DirichletBC(V, 0, "on_boundary"),
    )
    return TimeParallelReducedFunctional(
        evolution,
        RunningMisfit(forms["misfit"](u)),
        regularisation=forms["regularisation"](q),
        spacetime=spacetime,
        solver_parameters=solver_parameters,
    )


def field(rf, name: str, scale: float = 1.0) -> np.ndarray:
    """Coefficients of the control or the direction of :func:`~problems.serial_pyadjoint.square_functionals`."""
    V = rf.controls[0].control.function_space()
    return scale * Function(V).interpolate(square_functionals(V)[name]()).dat.data_ro
