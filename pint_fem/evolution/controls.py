"""What controls an evolution takes."""

from __future__ import annotations

import numpy as np
from firedrake import Function

from pint_fem.errors import InputError
from pint_fem.kernels.arrays import is_real

__all__ = ["checked_controls", "checked_per_step"]


def checked_controls(given, u: Function, found: set, initial: Function | None) -> tuple[Function, ...]:
    """The controls as a tuple; ``found``: the functions in the residual and the boundary values."""
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


def checked_per_step(given, controls: tuple[Function, ...], initial: Function | None) -> tuple[Function, ...]:
    """Controls with a value in each step."""
    if isinstance(given, (bool, np.bool_)):
        return tuple(c for c in controls if given and c is not initial)
    chosen = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    if any(c not in controls or c is initial for c in chosen):
        raise InputError(
            "per_step: give True, or those of the controls (not the initial condition) with a value a step"
        )
    return chosen
