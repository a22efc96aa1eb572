"""Bounds and integral constraints on controls, from what a user gives to arrays for the minimisers."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
import ufl
from firedrake import EnsembleFunction, Function, TestFunction, assemble, derivative
from ufl.algorithms import expand_derivatives, extract_coefficients

from pint_fem.adjoint.minimisation.objective import Objective
from pint_fem.errors import InputError
from pint_fem.evolution.quadrature import with_fixed_degrees
from pint_fem.kernels.arrays import get

if TYPE_CHECKING:
    from pint_fem.adjoint.functional import ControlFunctional

if TYPE_CHECKING:
    from pint_fem.adjoint.reduced_functional import TimeParallelReducedFunctional

__all__ = ["Controls", "bound_arrays", "constraint_normals", "l1_factors", "named_array"]


Controls = Function | EnsembleFunction | Sequence[Function | EnsembleFunction]
"""Values of one control or of several: one per step, an EnsembleFunction, or static, a Function."""


def named_array(rf: ControlFunctional, values: Controls, what: str) -> np.ndarray:
    """Own values of controls as an array; the message of an error begins with the name of the argument.

    Raises
    ------
    InputError
        If the values are not in the controls' spaces.
    """
    try:
        return rf.array(values)
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def bound_arrays(rf: ControlFunctional, bounds: Sequence) -> tuple[np.ndarray | float, np.ndarray | float]:
    """Lower and upper bounds as numbers or arrays of own values.

    Parameters
    ----------
    rf : ControlFunctional
        The functional.
    bounds : pair
        ``(lower, upper)``: each a number, ``None`` for no bound, values of the controls, or a list with one of these
        for each control.

    Raises
    ------
    InputError
        If they are no pair, or do not fit the controls.
    """
    if not isinstance(bounds, (list, tuple)) or len(bounds) != 2:
        raise InputError(f"bounds {bounds!r}: give a pair (lower, upper), such as (0, None)")
    return tuple(_side(rf, side, none) for side, none in zip(bounds, (-np.inf, np.inf), strict=True))


def l1_factors(rf: ControlFunctional, l1: float | Controls | Sequence | None) -> np.ndarray | float:
    """Factors of the absolute values of controls as a number or an array of own values; 0 for ``None``.

    Parameters
    ----------
    rf : ControlFunctional
        The functional.
    l1 : float, values of the controls or list
        A number, values of the controls, or a list with one of these, or ``None``, for each control.

    Raises
    ------
    InputError
        If they do not fit the controls.
    """
    return _side(rf, l1, 0.0, "l1")


def _is_number(side) -> bool:
    """Whether a bound is a number, or None for no bound."""
    return side is None or isinstance(side, Real)


def _side(rf: TimeParallelReducedFunctional, side, none: float, what: str = "bounds"):
    """One of the two bounds, or what messages name; ``none`` is the number for ``None``."""
    controls = rf.evolution.controls
    if _is_number(side):
        return none if side is None else float(side)
    sides = side if isinstance(side, (list, tuple)) else [side]
    if len(sides) != len(controls):
        raise InputError(f"{what}: {len(sides)} values for {len(controls)} controls; give a number, or one for each")
    if not any(map(_is_number, sides)):
        return named_array(rf, sides, what)
    zeros = rf.function(np.zeros(rf.layout.size))
    zeros = [zeros] if len(controls) == 1 else zeros
    given = [zero if _is_number(one) else one for one, zero in zip(sides, zeros, strict=True)]
    parts = rf.layout.parts(named_array(rf, given, what))
    whole = np.empty(rf.layout.size)
    for part, values, one in zip(rf.layout.parts(whole), parts, sides, strict=True):
        part[...] = none if one is None else float(one) if isinstance(one, Real) else values
    return whole


def constraint_normals(
    rf: ControlFunctional, objective: Objective, constraints: Sequence[tuple[ufl.Form, float]]
) -> tuple[list[np.ndarray], list[float]]:
    """Representatives of the derivatives of constraints, and the numbers that these have to be at the controls: the
    values minus those of the functionals at zero.

    Parameters
    ----------
    rf : ControlFunctional
        The functional.
    objective : Objective
        The inner product.
    constraints : list of pairs
        UFL functionals that are affine in the controls, and their values; for controls with one value per step a
        functional is summed over the steps with weight ``dt``.

    Raises
    ------
    InputError
        If a functional is not affine in the controls, contains none, or contains the state or the time.
    """
    pairs = list(constraints) if isinstance(constraints, (list, tuple)) else [constraints]
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise InputError("constraints: give a list of pairs of a functional and its value, such as [(q*dx, 1.0)]")
    found = [_normal(rf, form) for form, _ in pairs]
    values = [float(value) - constant for (_, value), (_, constant) in zip(pairs, found, strict=True)]
    return [objective.representative(dual) for dual, _ in found], values


def _normal(rf: TimeParallelReducedFunctional, form) -> tuple[np.ndarray, float]:
    """The derivative of a constraint, a dual vector, and its value at zero."""
    controls = [c for c in rf.evolution.controls if isinstance(form, ufl.Form) and c in extract_coefficients(form)]
    if not controls or form.arguments():
        raise InputError("constraints: give pairs of a functional of the controls, such as q*dx, and its value")
    moving = {f for ev in rf.problem.evolutions for f in (ev.u, ev.t)}
    if moving & set(extract_coefficients(form)):
        raise InputError("constraints: a functional contains the state u or the time t: give one of controls and data")
    form = with_fixed_degrees(form)
    dual = np.zeros(rf.layout.size)
    stepwise = [c in rf.evolution.stepwise for c in controls]
    for control, has_steps in zip(controls, stepwise, strict=True):
        slope = expand_derivatives(derivative(form, control, TestFunction(control.function_space())))
        if set(controls) & set(extract_coefficients(slope)):
            raise InputError("constraints: a functional is not linear in the controls")
        rf.layout.part(dual, control)[...] = get(assemble(slope)) * (rf.evolution.dt if has_steps else 1.0)
    constant = float(assemble(ufl.replace(form, {c: Function(c.function_space()) for c in controls})))
    if constant and any(stepwise) and not all(stepwise):
        raise InputError(
            "constraints: a functional of static controls and some with one value per step has a part without "
            "controls: give that part in the value"
        )
    return dual, constant * (rf.evolution.dt * rf.evolution.nsteps if any(stepwise) else 1.0)
