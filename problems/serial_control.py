r"""A control problem the ordinary way: plain Firedrake, a loop over the steps on one pyadjoint tape, serial in time.

The baseline of :mod:`problems.control`: the same discrete problem, value for value, with none of ``pint_fem``'s
solvers. Stages by their values, as in :mod:`problems.serial_pyadjoint`: U solves

.. math::  m(U - W, v) + h\, a(U, v; q_n) = 0 ,

then :math:`W \leftarrow (1 - c) W + c U`. Operators of linear problems are factorised once (``constant_jacobian``). The
control of each step is a control of the tape.
"""

from __future__ import annotations

import time
from typing import Any

import ufl
from firedrake import (
    Constant,
    Function,
    LinearVariationalProblem,
    LinearVariationalSolver,
    NonlinearVariationalProblem,
    NonlinearVariationalSolver,
    RieszMap,
    TestFunction,
    TrialFunction,
    assemble,
    dx,
    inner,
)
from firedrake.adjoint import Control, ReducedFunctional

from pint_fem.errors import InputError
from pint_fem.kernels.arrays import is_real
from pint_fem.propagators.tape import recording
from problems.control import ControlForms, initial_state
from problems.serial_pyadjoint import DIRECT_MIXED, SCHEMES, SerialSource

__all__ = ["record"]

_NEWTON = {"snes_rtol": 1e-12, "snes_atol": 1e-13, "snes_stol": 0.0, "snes_linesearch_type": "basic", **DIRECT_MIXED}


def record(forms: ControlForms, *, steps: int, integrator: str) -> SerialSource:
    """Record the problem of :func:`problems.control.pose` on a tape.

    Parameters
    ----------
    forms
        On a mesh of one rank.
    steps, integrator
        Number of steps, and a name in :data:`~problems.serial_pyadjoint.SCHEMES`.

    Returns
    -------
    SerialSource
        Its controls are those of the first step, in the order of ``forms.controls``, then those of the second one, and
        so on. Their inner product is that of L2 in space and time.

    Raises
    ------
    InputError
        On an unknown integrator.
    """
    if integrator not in SCHEMES:
        raise InputError(f"unknown integrator {integrator!r}: give one of {', '.join(SCHEMES)}")
    start = time.perf_counter()
    dt = forms.final_time / steps
    length, weights = SCHEMES[integrator]
    spaces = [q.function_space() for q in forms.controls]
    given = [[Function(Q, name=q.name()) for Q, q in zip(spaces, forms.controls, strict=True)] for _ in range(steps)]
    current, h = [Function(Q) for Q in spaces], Constant(length * dt)
    with recording() as tape:
        u, W, stages = Function(forms.V).assign(initial_state(forms)), None, []
        W = u
        for c in map(float, weights):  # UFL does not take numpy's numbers before vectors
            U = Function(forms.V).assign(u)  # from where Newton's method starts
            stages.append(_stage(forms, U, W, current, h))
            W = U if c == 1 else (1 - c) * W + c * U
        J = 0.0
        for n, own in enumerate(given, start=1):
            for q, value in zip(current, own, strict=True):
                q.assign(value)
            for stage in stages:
                stage.solve()
            u.assign(W)
            # the time is a number of its own in the form of each step
            J += assemble(dt * forms.running(u, Constant(n * dt))) + assemble(dt * forms.regularisation(own))
        if forms.terminal is not None:
            J += assemble(forms.terminal(u))
    controls = [Control(q, riesz_map=_inner(q, dt)) for own in given for q in own]
    rf = ReducedFunctional(J, controls, tape=tape)
    return SerialSource(rf, [q for own in given for q in own], steps, time.perf_counter() - start)


def _stage(forms: ControlForms, U: Function, W: Any, controls: list[Function], h: Constant):
    """The solver of a stage."""
    w = TrialFunction(forms.V) if forms.linear else U
    v = TestFunction(forms.V)
    residual = forms.mass(w - W, v) + h * forms.rest(w, v, controls)
    if not forms.linear:
        problem = NonlinearVariationalProblem(residual, U, bcs=forms.bcs)
        return NonlinearVariationalSolver(problem, solver_parameters=_NEWTON)
    problem = LinearVariationalProblem(ufl.lhs(residual), ufl.rhs(residual), U, bcs=forms.bcs, constant_jacobian=True)
    return LinearVariationalSolver(problem, solver_parameters=DIRECT_MIXED)


def _inner(q: Function, dt: float) -> RieszMap:
    """The inner product of a step's control."""
    Q = q.function_space()
    a, b = TrialFunction(Q), TestFunction(Q)
    direct = {} if is_real(Q) else {"solver_parameters": {"ksp_type": "preonly", "pc_type": "cholesky"}}
    return RieszMap(Constant(dt) * inner(a, b) * dx, constant_jacobian=True, **direct)
