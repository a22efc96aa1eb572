r"""Minimisation within bounds and with an absolute value: primal-dual active sets, a semi-smooth Newton method.

Minimise

.. math:: F(z) = J(z) + \sum_i w_i \beta_i |z_i| \quad\text{subject to}\quad l \le z \le u

in a Hilbert space with the diagonal inner product :math:`(a, b) = \sum_i w_i a_i b_i`. With the sets of
:mod:`~pint_fem.optimize.active_set.sets`, which follow from the iterate and its gradient, a step solves

.. math:: z^+_i = t_i \text{ (held)}, \qquad (g + H (z^+ - z))_i + \beta_i \sigma_i = 0 \text{ (free)},

which is a step of Newton's method for the first-order conditions [1, 2]: held components go to their bound or to zero
at once, and the system for the free ones (:mod:`~pint_fem.optimize.active_set.reduced_system`) is solved by conjugate
gradients, with any preconditioner of the problem without bounds.

*Quadratic J.* These steps are taken as they are, iterates may be out of the bounds in between. The next iterate depends
on the sets alone, so where they are the same twice in a row it is the minimiser, and where sets recur later the method
would cycle. The number of steps is that of the sequential method with direct solves, as long as conjugate gradients are
accurate enough to find the same sets. If H is smoothing and its smallest eigenvalue, the weight of the control, is
small, the method may cycle [1]. So where an iterate recurs, or in three steps neither fewer components have changed
their sets nor the norm of the subgradient has been smaller than before, or a direction has no curvature, the run goes
on as for any other J from the point within the bounds next to the iterate.

*Piecewise quadratic J,* such as a quadratic function with a penalty of its positive parts. With a generalised Hessian
the steps are the same, and those of a primal-dual active-set method for the penalised constraints as well. Iterates
recur, or do not improve, where the norms of the subgradient do not; for large penalties these are dominated by small
violations, so that conjugate gradients have to be more accurate, and more steps are granted.

*Other J.* Steps are those of :mod:`~pint_fem.optimize.trust_region.bounded` in a trust region about a z within the
bounds, on the face of z (:mod:`~pint_fem.optimize.active_set.sets`), on which F is smooth: a projected Cauchy step,
conjugate gradients for the components that it has not brought to a bound or to zero, and projected searches. A
component changes its sign by way of zero, in two steps. Acceptance, radius, records and stopping are those of
:mod:`~pint_fem.optimize.trust_region.newton_cg`. F falls from iterate to iterate.

The run has converged where the least subgradient of F within the bounds, which is the projected gradient where
:math:`\beta = 0`, is small at a point that satisfies the bounds exactly.

References
----------
[1] M. Hintermüller, K. Ito, K. Kunisch, The primal-dual active set strategy as a semismooth Newton method, SIAM J.
    Optim. 13 (2002) 865-888.
[2] G. Stadler, Elliptic optimal control problems with L1-control cost and applications for the placement of control
    devices, Comput. Optim. Appl. 44 (2009) 159-181.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np

from pint_fem.collective import collectively
from pint_fem.errors import InputError, InputTypeError
from pint_fem.optimize.active_set.iteration import ActiveSetRun
from pint_fem.optimize.active_set.sets import NonsmoothPart
from pint_fem.optimize.active_set.steps import NonsmoothOracle
from pint_fem.optimize.argument_checks import check, is_real
from pint_fem.optimize.guarded_problem import GuardedProblem
from pint_fem.optimize.protocol import Problem
from pint_fem.optimize.ranks import on_all_ranks
from pint_fem.optimize.records import TrustRegionResult
from pint_fem.optimize.trust_region.bounded import checked_box
from pint_fem.optimize.trust_region.iteration import NewtonOptions

__all__ = ["checked_factors", "minimize_active_set"]

_KIND = "active sets 1"


@on_all_ranks
def minimize_active_set(
    problem: Problem,
    x0: np.ndarray,
    lower: np.ndarray | float = -math.inf,
    upper: np.ndarray | float = math.inf,
    l1: np.ndarray | float = 0.0,
    *,
    quadratic: bool | str = False,
    prox_step: float | None = None,
    **options: Any,
) -> TrustRegionResult:
    """Minimise a function within bounds, and with a weighted absolute value, by primal-dual active sets.

    A step for a quadratic J costs one value, one gradient and the Hessian actions of conjugate gradients on the free
    components; for other J it costs what it costs in :func:`~pint_fem.optimize.trust_region.bounded.minimize_bounded`.
    With several processes call it on all of them with the same options, each with its part of the vectors.

    Parameters
    ----------
    problem : Problem
        J. Its inner product must be diagonal, as for :func:`~pint_fem.optimize.trust_region.bounded.minimize_bounded`.
    x0 : ndarray, shape (n,)
        First guess; not modified. If it is out of bounds, the run starts at the nearest point within, and the monitor
        prints the distance.
    lower, upper : ndarray, shape (n,), or float
        ``lower <= upper``, infinite where there is no bound; equal where the component is fixed.
    l1 : ndarray, shape (n,), or float
        The factors beta, finite and >= 0, of the sum ``w_i beta_i |z_i|`` that is added to J; 0 for none.
    quadratic : bool or "piecewise"
        Whether J is a quadratic function, or consists of quadratic functions with a continuous gradient between them,
        so that the run begins without a trust region; then J has to be defined out of the bounds.
    prox_step : float, optional
        The factor c > 0 in the definition of the sets, for all components. By default the factor at the first guess is
        the step from there to the minimiser of the model along the least subgradient, one Hessian action, and later
        free components of a quadratic J have an infinite one, for which the sets settle more often.
    **options
        The options of :func:`~pint_fem.optimize.trust_region.newton_cg.minimize_trust_region` except `cg_forcing` and
        `inexact`. The least subgradient pg of F within the bounds stands for the gradient. `cg_rtol`, the residual of
        conjugate gradients relative to ``|pg|``, is by default 1e-3 for a quadratic J, 1e-4 for a piecewise quadratic
        one, and ``min(0.5, sqrt(|pg| / |pg at the start|))`` for others and in a trust region. The first radius of that
        is unlimited for a quadratic J.

    Returns
    -------
    TrustRegionResult
        ``value`` is F, ``gradient_norm`` that of its least subgradient, and `x` satisfies the bounds exactly.
        ``history`` contains :class:`~pint_fem.optimize.active_set.records.ActiveSetRecord`, with the sizes of the sets.
        For a quadratic J the iterates that `callback` is given may be out of bounds.

    Raises
    ------
    ValueError
        As for :func:`~pint_fem.optimize.trust_region.bounded.minimize_bounded`; on all processes where `l1` is
        negative, not finite or of another shape on one.
    NonFiniteError
        A FloatingPointError: J at the start, a gradient or a Hessian action is not finite.
    """
    given = NewtonOptions(**options)
    if not isinstance(quadratic, bool) and quadratic != "piecewise":
        raise InputTypeError(f"quadratic = {quadratic!r} is refused: give True, False or 'piecewise'")
    if prox_step is not None:
        check("prox_step", prox_step, "a finite number > 0, or None", lambda v: 0 < v < math.inf)
    x0 = np.array(x0, dtype=np.float64)
    guarded = cast(GuardedProblem, problem)  # by the decorator
    box = checked_box(guarded, x0, lower, upper)
    part = NonsmoothPart(box, checked_factors(guarded, x0, l1), guarded.inner)
    oracle = NonsmoothOracle(guarded, part, given.hessian, math.nan if prox_step is None else float(prox_step))
    run = ActiveSetRun(oracle, given, x0, _KIND)
    if run.state is not None:
        if not oracle.is_pure and not oracle.is_within(run.state.iterate.x):
            raise ValueError("the checkpoint holds an iterate out of bounds: continue it with the same bounds")
        return run.run(run.state.iterate.x, quadratic=quadratic)
    start = box.project(x0)
    distance = math.sqrt(guarded.inner(start - x0, start - x0))
    if given.monitor is not None and distance > 0:
        given.monitor(f"the first guess is out of bounds by {distance:.3e}: the run starts at the nearest point within")
    return run.run(start, quadratic=quadratic)


def checked_factors(problem: GuardedProblem, x: np.ndarray, l1: np.ndarray | float) -> np.ndarray:
    """The factors of the absolute value as an array of the shape of x (collective).

    Raises
    ------
    InputError
        On all processes: factors of another shape or type, negative or not finite.
    """
    collectively(problem.comm, "", _check_type, l1)
    factors = np.asarray(l1, dtype=np.float64)
    if problem.holds_anywhere(x, factors.shape not in ((), x.shape)):
        raise InputError(f"l1 of shape {factors.shape}: give a number or an array of the shape of x0, {x.shape}")
    factors = np.array(np.broadcast_to(factors, x.shape))
    wrong = ~((factors >= 0) & (factors < math.inf))  # nan among them
    if problem.holds_anywhere(x, bool(wrong.any())):
        first = f", first {factors[wrong][0]}" if wrong.any() else ""
        raise InputError(
            f"l1 is negative or not finite in {wrong.sum()} components of this process{first}: give numbers >= 0"
        )
    return factors


def _check_type(l1: object) -> None:
    if not is_real(l1):
        raise InputTypeError(f"l1 = {l1!r} is refused: give a number >= 0 or an array of them")
