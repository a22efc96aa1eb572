r"""Optimal control of an evolution: what the ready control problems are made of, for all steps at once and for a tape.

The state u follows, with a control q that has a value of its own in each step,

.. math::  m(\partial_t u, v) + a(u, v; q) = 0 \quad \text{for all } v, \qquad u(0) = u_0 ,

and the functional is

.. math::
    J(q) = \sum_{n=1}^{N} \Delta t\, j(u_n, t_n) + j_N(u_N) + \sum_{n=1}^{N} \Delta t\, R(q_n) .

The forms m, a, j, :math:`j_N` and R are written once (:class:`ControlForms`). :func:`pose` makes the time-parallel
functional of them, and :func:`problems.serial_control.record` the same discrete problem on a serial pyadjoint tape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ufl
from firedrake import DirichletBC, Function, TestFunction
from firedrake.functionspaceimpl import WithGeometry
from irksome import Dt
from ufl.core.expr import Expr

from pint_fem.adjoint import TimeParallelReducedFunctional
from pint_fem.errors import InputError
from pint_fem.evolution import Evolution, named_tableau, time_function
from pint_fem.misfits import RunningMisfit, TerminalMisfit
from pint_fem.spacetime import SpaceTime

__all__ = ["ControlForms", "ControlProblem", "checked_bounds", "pose", "require_positive"]

Bounds = tuple[float | None, float | None]
"""Lower and upper bound of all controls, ``None`` where there is none."""


@dataclass(frozen=True)
class ControlForms:
    """The forms of a control problem on a mesh.

    Attributes
    ----------
    V : WithGeometry
        Space of the state.
    controls : tuple of Function
        Zero functions in the controls' spaces, with their names.
    mass : callable
        ``mass(rate, v)``, the form m; linear in both.
    rest : callable
        ``rest(u, v, controls)``, the form a; affine in the controls.
    running : callable
        ``running(u, t)``, the functional j; ``t`` is a UFL scalar.
    regularisation : callable
        ``regularisation(controls)``, the functional R.
    initial : Expr
        The initial condition, which is interpolated.
    final_time : float
    linear : bool
        Whether a is affine in the state.
    terminal : callable or None
        ``terminal(u)``, the functional of the last state.
    target : callable or None
        ``target(t)``, what the shown part of the state has to be near to; ``None`` for zero.
    shown : callable
        ``shown(u)``, the part of the state in pictures, a UFL scalar.
    bcs : tuple of DirichletBC
    """

    V: WithGeometry
    controls: tuple[Function, ...]
    mass: Callable[[Expr, Expr], ufl.Form]
    rest: Callable[[Expr, Expr, Sequence[Function]], ufl.Form]
    running: Callable[[Function, Expr], ufl.Form]
    regularisation: Callable[[Sequence[Function]], ufl.Form]
    initial: Expr
    final_time: float
    linear: bool = True
    terminal: Callable[[Function], ufl.Form] | None = None
    target: Callable[[Expr], Expr] | None = None
    shown: Callable[[Function], Expr] = lambda u: u
    bcs: tuple[DirichletBC, ...] = ()


@dataclass(frozen=True)
class ControlProblem:
    """A posed control problem.

    Attributes
    ----------
    spacetime : SpaceTime
    forms : ControlForms
    evolution : Evolution
    misfits : tuple of Misfit
        The running one, and the terminal one where there is one.
    regularisation : ufl.Form
        Of ``evolution.controls``.
    rf : TimeParallelReducedFunctional
    bounds : pair or None
        Lower and upper bound of all controls.
    """

    spacetime: SpaceTime
    forms: ControlForms
    evolution: Evolution
    misfits: tuple[RunningMisfit | TerminalMisfit, ...]
    regularisation: ufl.Form
    rf: TimeParallelReducedFunctional
    bounds: Bounds | None = None


def pose(
    forms: ControlForms,
    spacetime: SpaceTime,
    *,
    steps: int,
    integrator: str,
    bounds: Bounds | None = None,
    solver_parameters: dict[str, Any] | None = None,
) -> ControlProblem:
    """Make the time-parallel functional of a control problem's forms.

    Parameters
    ----------
    forms
        On a mesh of ``spacetime.space_comm``.
    spacetime
        Process grid.
    steps, integrator
        Time steps and a name of :func:`pint_fem.evolution.named_tableau`.
    bounds
        Of all controls.
    solver_parameters
        Of :class:`~pint_fem.adjoint.TimeParallelReducedFunctional`.

    Raises
    ------
    InputError
        On every rank, on a bad value.
    """
    tableau = named_tableau(integrator)
    u, v, t = Function(forms.V, name="state"), TestFunction(forms.V), time_function(forms.V.mesh().unique())
    u.assign(initial_state(forms))
    evolution = Evolution(
        forms.mass(Dt(u), v) + forms.rest(u, v, forms.controls),
        u,
        tableau=tableau,
        dt=forms.final_time / steps if steps else 0.0,
        nsteps=steps,
        control=list(forms.controls),
        per_step=True,
        t=t,
        bcs=forms.bcs,
    )
    misfits: tuple[Any, ...] = (RunningMisfit(forms.running(u, t)),)
    if forms.terminal is not None:
        misfits += (TerminalMisfit(forms.terminal(u)),)
    regularisation = forms.regularisation(forms.controls)
    given = dict(spacetime=spacetime, solver_parameters=solver_parameters)
    rf = TimeParallelReducedFunctional(evolution, list(misfits), regularisation=regularisation, **given)
    return ControlProblem(spacetime, forms, evolution, misfits, regularisation, rf, bounds)


def initial_state(forms: ControlForms) -> Function:
    """Return the initial condition, which meets the boundary conditions."""
    u = Function(forms.V, name="initial state").interpolate(forms.initial)
    for bc in forms.bcs:
        bc.apply(u)
    return u


# -- checks of settings ------------------------------------------------------------------------------------------------
def require_positive(**values: float) -> None:
    """Refuse settings that are not positive numbers, by their names; ``InputError``."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise InputError(f"{name.replace('_', ' ')} {value}: give a positive number")


def checked_bounds(bounds: Bounds | None) -> Bounds | None:
    """Return bounds of the controls; an ``InputError`` unless they are a pair with the lower one below the upper."""
    if bounds is None:
        return None
    low, high = bounds
    if low is not None and high is not None and not low < high:
        raise InputError(f"bounds {low}, {high}: give a lower bound below the upper one")
    return bounds
