r"""Bounds and linear equality constraints: the method of multipliers around the projected trust region.

Minimise :math:`J(x)` subject to :math:`l \le x \le u`, component by component, and :math:`(c_i, x) = b_i`. With an
orthonormal basis :math:`q_i` of the normals (:mod:`pint_fem.optimize.constraints`) the constraints read
:math:`v_i(x) = (q_i, x) - \beta_i = 0`, and the *augmented Lagrangian* is

.. math::  L(x) = J(x) + \sum_i \nu_i v_i(x) + \tfrac{\mu}{2} \sum_i v_i(x)^2 , \qquad
           \nabla L = g + \sum_i (\nu_i + \mu v_i)\, q_i , \qquad \nabla^2 L = H + \mu \sum_i q_i (q_i, \cdot) .

It is minimised within the bounds (:mod:`pint_fem.optimize.trust_region.bounded`), then :math:`\nu_i \leftarrow \nu_i +
\mu v_i`, and so on [1, Alg. 17.4]: at the minimiser for these multipliers the gradient of L is that of the Lagrangian
with the new ones, so its projection measures the distance from the first-order conditions, and :math:`v` the violation
of the constraints. Each round shortens :math:`v` by about :math:`1 / (1 + \mu\, q^T H^{-1} q)`; from the third round on
the multipliers are those at which :math:`v` vanishes by the secants of the last rounds. :math:`\mu` is a small multiple
of the curvature of J along the normals: a larger one shortens the projected steps to the bounds, which then take many
times as many iterations. Five to ten times the Hessian actions of the run without constraints have to be expected.

References
----------
[1] J. Nocedal, S. J. Wright, Numerical Optimization, 2nd ed., Springer 2006.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pint_fem.optimize.argument_checks import check, check_stopping
from pint_fem.optimize.constraints import AffineConstraints
from pint_fem.optimize.guarded_problem import GuardedProblem
from pint_fem.optimize.preconditioners import make_preconditioner
from pint_fem.optimize.protocol import Preconditioner, Problem
from pint_fem.optimize.ranks import on_all_ranks
from pint_fem.optimize.records import IterationRecord, StopReason, TrustRegionResult
from pint_fem.optimize.trust_region.bounded import minimize_bounded
from pint_fem.optimize.trust_region.projected_step import Box

__all__ = ["minimize_bounded_constrained"]

# mu in curvatures of J along the normals; a round that shortens the violation by less than _FALL multiplies it by _GROW
_PENALTY, _GROW, _FALL = 10.0, 10.0, 0.5

# Rounds at most, and rounds in succession without a reduction of the violation by _STUCK, after which no point within
# the bounds meets the constraints.
_ROUNDS, _PATIENCE, _STUCK = 30, 3, 0.9

# The projected gradient falls by this from round to round, until it is small enough.
_TIGHTER = 1e-2


class AugmentedLagrangian:
    """The augmented Lagrangian L for given multipliers; a problem itself.

    Parameters
    ----------
    constraints : AffineConstraints
        The constraints and the problem J.
    multipliers : ndarray, shape (k,)
        The coefficients nu.
    penalty : float
        The coefficient mu.
    """

    def __init__(self, constraints: AffineConstraints, multipliers: np.ndarray, penalty: float):
        self.constraints, self.problem, self.inner = constraints, constraints.problem, constraints.inner
        self.multipliers, self.penalty = multipliers, penalty
        self.comm = constraints.comm
        if callable(getattr(self.problem, "gauss_newton_action", None)):
            self.gauss_newton_action = lambda x, v: self._with_penalty(v, self.problem.gauss_newton_action(x, v))
        if callable(getattr(self.problem, "prepare", None)):
            self.prepare = self.problem.prepare

    @property
    def failure(self) -> Exception | None:
        """Why the last value of J was not finite, if the problem reports it."""
        return self.constraints.failure

    def value(self, x: np.ndarray) -> float:
        """L(x)."""
        v = self.constraints.offsets(x)
        return self.problem.value(x) + float(self.multipliers @ v + 0.5 * self.penalty * v @ v)

    def gradient(self, x: np.ndarray) -> np.ndarray:
        """The Riesz representative of L'(x)."""
        return self.constraints.combined(self.next_multipliers(x), self.problem.gradient(x))

    def hessian_action(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The Hessian of L times v: H v and the part of the penalty."""
        return self._with_penalty(v, self.problem.hessian_action(x, v))

    def _with_penalty(self, v: np.ndarray, h: np.ndarray) -> np.ndarray:
        """``h + mu sum_i (q_i, v) q_i``."""
        return self.constraints.combined(self.penalty * self.constraints.components(v), h)

    def next_multipliers(self, x: np.ndarray) -> np.ndarray:
        """``nu + mu v(x)``."""
        return self.multipliers + self.penalty * self.constraints.offsets(x)


@on_all_ranks
def minimize_bounded_constrained(
    problem: Problem,
    x0: np.ndarray,
    lower: np.ndarray | float,
    upper: np.ndarray | float,
    normals: Sequence[np.ndarray],
    values: Sequence[float],
    *,
    gtol_rel: float = 1e-6,
    gtol_abs: float = 0.0,
    ctol: float = 1e-8,
    max_it: int = 500,
    preconditioner: Preconditioner | str | None = None,
    monitor: Callable[[str], object] | None = None,
    callback: Callable[[np.ndarray, IterationRecord], object] | None = None,
    **options: Any,
) -> TrustRegionResult:
    """Minimise a function within bounds and under linear equality constraints.

    Parameters
    ----------
    problem, lower, upper
        The problem with a diagonal inner product and the bounds, as for
        :func:`~pint_fem.optimize.trust_region.bounded.minimize_bounded`.
    x0 : ndarray, shape (n,)
        First guess; the run starts at the nearest point on the constraints, moved into the bounds.
    normals, values
        The Riesz representatives c_i and the numbers b_i, as for
        :class:`~pint_fem.optimize.constraints.AffineConstraints`.
    gtol_rel, gtol_abs : float
        Converged when the projected gradient of the Lagrangian has this norm, relative to the one at the start with the
        multipliers that make it smallest without regard to the bounds.
    ctol : float
        Norm of the violation of the constraints at the end, relative to ``|x|`` and the values.
    max_it : int
        Most steps to try, in all rounds.
    callback : callable, optional
        ``callback(x, record)`` after each step; the values of J in records are those of the augmented Lagrangian.
    preconditioner, monitor, **options
        Options of :func:`~pint_fem.optimize.trust_region.bounded.minimize_bounded`; there is no ``checkpoint``.

    Returns
    -------
    TrustRegionResult
        ``x`` is within the bounds exactly, and meets the constraints to ``ctol`` if ``converged``; ``value`` is J,
        ``gradient_norm`` that of the projected gradient of the Lagrangian. ``reason`` is ``"constraints not met"``
        where no point within the bounds was found that meets them.

    Raises
    ------
    ValueError
        Options out of range or arrays of the wrong shape, and a constraint that no point within the bounds meets.
    NonFiniteError
        J at the start, a gradient or a Hessian action is not finite.
    """
    check_stopping(gtol_rel, gtol_abs, max_it)
    check("ctol", ctol, "a number in (0, 1)", lambda v: 0 < v < 1)
    if options.get("checkpoint") is not None:
        raise ValueError("checkpoint = ... is refused with both bounds and constraints: leave it out")
    constraints = AffineConstraints(problem, normals, values)
    low, high = (np.broadcast_to(np.asarray(side, dtype=float), np.shape(x0)) for side in (lower, upper))
    _require_feasible(problem, normals, values, low, high)
    preconditioner, _ = make_preconditioner(preconditioner, problem.inner)

    x = np.clip(constraints.feasible(np.array(x0, dtype=np.float64)), low, high)
    multipliers = -constraints.components(problem.gradient(x))
    penalty = _PENALTY * max(constraints.curvatures(x)) or 1.0
    history: list[IterationRecord] = []
    calls, first_norm, tolerance, target, before = np.zeros(3, dtype=int), None, None, None, math.inf
    stuck, rounds = 0, []

    def renumbered_callback(x, record):
        return callback is not None and callback(x, replace(record, iteration=record.iteration + len(history)))

    for _ in range(_ROUNDS):
        lagrangian = AugmentedLagrangian(constraints, multipliers, penalty)
        if first_norm is None:
            first_norm = _projected_norm(lagrangian, x, low, high, multipliers)
            tolerance = max(gtol_abs, gtol_rel * first_norm)
            target = max(tolerance, _TIGHTER * first_norm)
        taken = sum(record.iteration > 0 for record in history)
        inner = minimize_bounded(
            lagrangian, x, lower, upper, gtol_rel=0.0, gtol_abs=target, max_it=max_it - taken, monitor=monitor,
            preconditioner=preconditioner, callback=renumbered_callback, **options,
        )  # fmt: skip
        history += [replace(r, iteration=r.iteration + len(history)) for r in inner.history]
        calls += inner.value_calls, inner.gradient_calls, inner.hessian_calls
        x = inner.x
        rounds.append((multipliers, constraints.offsets(x)))
        multipliers = _secant_multipliers(rounds, lagrangian.next_multipliers(x))
        violation, size = constraints.distance(x)
        if monitor is not None:
            monitor(f"constraints missed by {violation:.3e} (norm of x and the values {size:.3e})")
        met = violation <= ctol * size
        if inner.reason in (StopReason.CALLBACK, StopReason.MAX_IT) or (met and inner.gradient_norm <= tolerance):
            break
        stuck = stuck + 1 if violation > _STUCK * before else 0
        if (met and not inner.converged) or stuck == _PATIENCE:  # round-off or a radius too small; no feasible point
            break
        if violation > _FALL * before:
            penalty, rounds = penalty * _GROW, []
        target, before = max(tolerance, _TIGHTER * target), violation
    reason = inner.reason
    if not met and reason not in (StopReason.CALLBACK, StopReason.MAX_IT):
        reason = StopReason.CONSTRAINTS
    return replace(
        inner,
        x=x,
        value=float(problem.value(x)),
        iterations=sum(record.iteration > 0 for record in history),
        converged=met and inner.gradient_norm <= tolerance,
        reason=reason,
        history=history,
        value_calls=int(calls[0]) + 1,
        gradient_calls=int(calls[1]),
        hessian_calls=int(calls[2]),
    )


def _secant_multipliers(rounds: list[tuple[np.ndarray, np.ndarray]], following: np.ndarray) -> np.ndarray:
    """Multipliers at which the violation vanishes by its secants, where there are as many as constraints.

    Parameters
    ----------
    rounds : list of pairs of ndarray, shape (k,)
        Multipliers of the rounds with this penalty, and the violations at their ends.
    following : ndarray, shape (k,)
        The next multipliers of the method of multipliers.

    Returns
    -------
    ndarray, shape (k,)
    """
    last = rounds[-len(following) - 1 :]
    if len(last) <= len(following):
        return following
    steps, changes = (np.diff([pair[i] for pair in last], axis=0).T for i in (0, 1))
    coefficients, _, rank, _ = np.linalg.lstsq(changes, -last[-1][1], rcond=1e-10)
    return last[-1][0] + steps @ coefficients if rank == len(following) else following


def _projected_norm(problem: AugmentedLagrangian, x, low, high, multipliers) -> float:
    """Norm of the projected gradient of the Lagrangian."""
    g = problem.constraints.combined(multipliers, problem.problem.gradient(x))
    g = Box(low, high).projected_gradient(x, g)
    return math.sqrt(max(float(problem.inner(g, g)), 0.0))


def _require_feasible(problem: GuardedProblem, normals, values, low: np.ndarray, high: np.ndarray) -> None:
    """Compare the values of constraints with the least and largest values of their functionals within the bounds.

    Raises
    ------
    ValueError
        If no point within the bounds meets a constraint.
    """
    for i, (c, value) in enumerate(zip(normals, values, strict=True)):
        ends = []
        for a, b in ((low, high), (high, low)):
            side = np.where(c > 0, a, np.where(c < 0, b, 0.0))
            unbounded = problem.holds_anywhere(c, bool((~np.isfinite(side)).any()))
            ends.append(math.inf if unbounded else float(problem.inner(c, np.where(np.isfinite(side), side, 0.0))))
        least, most = (-ends[0] if math.isinf(ends[0]) else ends[0]), ends[1]
        slack = 1e-12 * max(abs(v) for v in (least, most, value) if math.isfinite(v))
        if not least - slack <= value <= most + slack:
            raise ValueError(
                f"constraint {i}: its functional is between {least:.6g} and {most:.6g} within the bounds, and never "
                f"{value:.6g}: give other bounds or another value"
            )
