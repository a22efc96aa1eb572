"""Checks of what a user gives to an evolution: an ``InputError`` names what was given and what is accepted."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import ufl
from firedrake import DirichletBC, Function
from firedrake.functionspaceimpl import WithGeometry
from firedrake.utils import complex_mode

from pint_fem.all_at_once.grids import is_integer
from pint_fem.errors import InputError
from pint_fem.kernels.arrays import is_real, rows_in_whole, whole_space

__all__ = [
    "check_residual",
    "check_state_and_steps",
    "checked_conditions",
    "checked_controls",
    "checked_field",
    "checked_per_step",
]


def check_state_and_steps(u: Function, dt: float, nsteps: int) -> None:
    """Require a real build of PETSc, a function as state, a positive step size and at least one step."""
    if complex_mode:
        raise InputError("PETSc is built for complex numbers: pint_fem needs a real build (--with-scalar-type=real)")
    if not isinstance(u, Function):
        raise InputError(f"state u is a {type(u).__name__}: give a firedrake Function")
    if not isinstance(dt, Real) or not 0 < dt < np.inf:
        raise InputError(f"time step dt = {dt!r}: give a positive number")
    if not is_integer(nsteps) or nsteps < 1:
        raise InputError(f"nsteps = {nsteps!r}: give a whole number of at least 1")


def check_residual(residual: ufl.Form, V: WithGeometry) -> None:
    """Require a 1-form with a test function in the state's space, which has no real numbers."""
    if not isinstance(residual, ufl.Form) or len(residual.arguments()) != 1:
        raise InputError("residual is not a linear form: write F(Dt(u), u; v) with one TestFunction v, and no '== 0'")
    if any(is_real(part) for part in V):
        raise InputError(
            "the state has a real number in it (space R), of which Firedrake assembles no matrix that can be "
            "factored: write the residual without it. For the mean of a pressure give nullspace=; a number with a "
            "value in each step can be a control (per_step=)"
        )
    if residual.arguments()[0].function_space() != V:
        raise InputError(
            "the residual's test function is not in the state's space: use TestFunction(u.function_space())"
        )


def checked_conditions(given: Any, V: WithGeometry) -> tuple[DirichletBC, ...]:
    """The boundary conditions as a tuple; required are ``DirichletBC`` on the state's space or parts of it."""
    bcs = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    if any(not isinstance(bc, DirichletBC) for bc in bcs):
        raise InputError("bcs: give DirichletBC objects")
    if any(whole_space(bc.function_space()) != V for bc in bcs):
        raise InputError("a boundary condition is not on the state's space or a part of it such as V.sub(0)")
    return bcs


def checked_controls(given: Any, u: Function, found: set, initial: Function | None) -> tuple[Function, ...]:
    """The controls as a tuple; required are different functions of the evolution.

    Parameters
    ----------
    given
        A function, several, or ``None``.
    u
        The state.
    found
        Functions in the residual and the boundary values.
    initial
        The initial condition where it is a function other than the state.
    """
    controls = tuple(given) if isinstance(given, (list, tuple)) else () if given is None else (given,)
    for control in controls:
        if not isinstance(control, Function):
            raise InputError(f"control is a {type(control).__name__}: give a firedrake Function")
        name = control.name()
        if control is u:
            raise InputError("the state u is no control: give its initial value as a function of its own, initial=")
        if control is initial and control in found:
            raise InputError(f"control {name!r} is the initial condition and in the residual: give two functions")
        if control is not initial and control not in found:
            raise InputError(
                f"the control {name!r} does not appear in the residual, in a boundary value or as initial=: use the "
                "same Function in both"
            )
        if is_real(control.function_space()) and control.ufl_shape:
            raise InputError(f"control {name!r} is a vector of real numbers: give a function in R for each of them")
        if control.function_space().mesh().unique() is not u.function_space().mesh().unique():
            raise InputError("the control lives on another mesh than the state")
    if len(set(controls)) < len(controls):
        raise InputError("a control is given twice")
    return controls


def checked_per_step(given: Any, controls: tuple[Function, ...], initial: Function | None) -> tuple[Function, ...]:
    """The controls with a value of their own in each step, from ``True``, ``False`` or some of the controls."""
    if isinstance(given, (bool, np.bool_)):
        return tuple(c for c in controls if given and c is not initial)
    chosen = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    if any(c not in controls or c is initial for c in chosen):
        raise InputError(
            "per_step: give True, or those of the controls (not the initial condition) with one value per step"
        )
    return chosen


def checked_field(given: Any, V: WithGeometry, bcs: tuple[DirichletBC, ...]) -> int | None:
    """The number of the field to eliminate, or ``None``; it must have no boundary condition (collective)."""
    if given is None:
        return None
    if not is_integer(given) or not 0 <= given < len(V) or len(V) == 1:
        raise InputError(
            f"eliminate = {given!r}: give the number of a field of a mixed state, "
            + (f"0 to {len(V) - 1}" if len(V) > 1 else "this state is not mixed")
        )
    rows = set(rows_in_whole(V.sub(given)).tolist())
    fixed = [bc for bc in bcs if not rows.isdisjoint(rows_in_whole(bc.function_space()).tolist())]
    if V.mesh().comm.allreduce(len(fixed)):
        raise InputError(f"eliminate = {given}: the field has a boundary condition; eliminate one without")
    return int(given)
