r"""Composite-step trust-region SQP for equality constraints, with inexact linear solves.

Minimise :math:`J(x)` subject to :math:`c(x) = 0`, :math:`x = (u, z)`. State and control are iterated at the same time:
the constraint holds at the end only. A step :math:`s = n + t` is the sum of a *quasi-normal* step, which reduces the
linearised constraint, and a *tangential* one, which minimises the quadratic model of the Lagrangian without changing it
(:mod:`~pint_fem.optimize.composite_step.steps`). It is accepted where the augmented Lagrangian is reduced by more than
:math:`\eta` times the predicted amount (:mod:`~pint_fem.optimize.composite_step.merit`); the radius follows the rules
of :mod:`pint_fem.optimize.trust_region.newton_cg`. Where only the curvature of the constraint prevents acceptance, one
Newton step for the constraint, a second-order correction, is added. Near a solution, one iteration with a KKT solve is
a step of Newton's method for the optimality system, at the cost of linear solves only: no nonlinear state equation is
solved.

Linear solves are inexact. The quasi-normal step and KKT solves have a tolerance that decreases with the gradient; the
tangential step is solved for again, more accurately, where its residual would decide on acceptance.

The run ends without convergence where the radius becomes too small, KKT solves break down in two iterations in a row,
a linear solve fails at an iterate, or none of gradient, constraint and Lagrangian becomes smaller. The result names the
reason, so that another method may continue from its control.

Source: M. Heinkenschloss, D. Ridzal, A matrix-free trust-region SQP method for equality constrained optimization, SIAM
J. Optim. 24 (2014) 1507-1541, with the quasi-normal step of J. E. Dennis, M. Heinkenschloss, L. N. Vicente, SIAM J.
Control Optim. 36 (1998) 1750-1794.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pint_fem.collective import any_rank, collectively, ending_all_ranks, require_same
from pint_fem.errors import InputError
from pint_fem.optimize.composite_step.protocol import ConstrainedProblem, GuardedConstrainedProblem
from pint_fem.optimize.composite_step.records import CompositeStepRecord, CompositeStepResult
from pint_fem.optimize.composite_step.run import CompositeOptions, CompositeRun
from pint_fem.optimize.ranks import check_run, collective_callback

__all__ = ["minimize_composite_step"]


def minimize_composite_step(
    problem: ConstrainedProblem,
    u0: np.ndarray,
    z0: np.ndarray,
    *,
    monitor: Callable[[str], object] | None = None,
    callback: Callable[[np.ndarray, CompositeStepRecord], object] | None = None,
    **options: Any,
) -> CompositeStepResult:
    """Minimise J(u, z) subject to c(u, z) = 0 by composite steps.

    An iteration costs one evaluation of J, of the constraint and of its adjoint, one linear solve for the quasi-normal
    step with an adjoint, a tangent and an adjoint solve for each direction of conjugate gradients (one or two where KKT
    solves precondition them), and one tangent. With several processes call it on all of them with the same options.

    Parameters
    ----------
    problem : ConstrainedProblem
        Objective, constraint, their derivatives and linear solves.
    u0, z0 : ndarray
        First guesses of state and control, where the constraint need not hold; not modified.
    monitor : callable, optional
        Called with a header and one line for the first guess and each iteration.
    callback : callable, optional
        ``callback(z, record)`` after each iteration; a true result on any process stops.
    **options
        ``gtol_rel`` (1e-6), ``gtol_abs`` (0): the norm of the reduced gradient at which the run ends, relative to that
        at the first guess, or absolute. ``ctol_rel`` (1e-8), ``ctol_abs`` (0): the norm of the constraint at which it
        ends, relative to that of the state, or absolute; gradient *and* constraint have to be small. ``max_it`` (50):
        steps to try. ``initial_radius``, ``max_radius``, ``min_radius``, ``eta``, ``cg_max_it``, ``cg_rtol``,
        ``value_rtol``: as for :func:`~pint_fem.optimize.trust_region.newton_cg.minimize_trust_region`. ``use_kkt``
        (True): precondition by the problem's KKT solves, if it has any.

    Returns
    -------
    CompositeStepResult

    Raises
    ------
    InputError
        On every process, for an option outside its range, before anything is evaluated.
    SolverFailure
        On every process, where the first guess cannot be evaluated.
    """
    guarded = GuardedConstrainedProblem(problem)
    comm = guarded.comm
    with ending_all_ranks(comm):
        require_same(comm, minimiser="minimize_composite_step", given=options)
        collectively(comm, "", _check, u0, z0, monitor, callback)
        has_monitor, has_callback = any_rank(comm, monitor is not None), any_rank(comm, callback is not None)
        made = CompositeOptions(
            monitor=_collective_monitor(comm, monitor) if has_monitor else None,
            callback=collective_callback(comm, callback) if has_callback else None, **options,
        )  # fmt: skip
        u, z = np.array(u0, dtype=np.float64), np.array(z0, dtype=np.float64)
        return CompositeRun(guarded, made).minimise(u, z)


def _check(u0: np.ndarray, z0: np.ndarray, monitor: object, callback: object) -> None:
    """Check the arguments that may differ between processes."""
    check_run(z0, monitor, callback)
    if np.iscomplexobj(u0) or np.asarray(u0).dtype.kind not in "biuf":
        raise InputError(f"u0 of type {np.asarray(u0).dtype} is refused: give a real array")


def _collective_monitor(comm, given: Callable[[str], object] | None) -> Callable[[str], None]:
    """A monitor that fails on all processes where it fails on one."""
    return lambda line: collectively(comm, "monitor", given or (lambda _: None), line)
