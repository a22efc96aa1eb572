r"""Trust-region Newton-CG within bounds (TRON).

Minimise :math:`J(x)` subject to :math:`l \le x \le u`, component by component, by the method of Lin and Moré [1] in a
Hilbert space whose inner product is diagonal, :math:`(a, b) = \sum_i w_i a_i b_i`. Then the pointwise
:math:`P(y) = \min(\max(y, l), u)` is the orthogonal projection on the box. It does not lengthen distances, so what is
projected from within a ball about a feasible x stays in the ball. Let :math:`g` and :math:`H` be the Riesz
representatives of the derivatives and

.. math::
    q(s) = (g, s) + \tfrac12 (s, H s), \qquad
    \hat g_i = \begin{cases}
        0 & x_i = l_i,\ g_i > 0 \ \text{ or }\ x_i = u_i,\ g_i < 0, \\ g_i & \text{else.}
    \end{cases}

The *projected gradient* :math:`\hat g` vanishes at the points that satisfy the first-order conditions, and only there.
An iteration with the radius :math:`\Delta` takes

1. the projected Cauchy step :math:`s = P(x - \alpha g) - x` with :math:`q(s) \le \mu_0 (g, s)`: first
   :math:`\alpha = \min(|\hat g|^2 / (\hat g, H \hat g),\ \Delta / |\hat g|)`, the minimiser of the model along
   :math:`-\hat g` or the boundary of the ball, then shorter ones;
2. with the components on a bound at :math:`x + s` held there, conjugate gradients for the free ones until
   :math:`|\nabla q(s)| \le \xi |\hat g|` on them, or the ball's boundary: a direction :math:`p`;
3. the projected search: :math:`s \leftarrow P(x + s + \beta p) - x` with
   :math:`q(\text{new}) \le q(s) + \mu_0 \min((\nabla q(s), \text{new} - s), 0)`, :math:`\beta = 1` first, then
   shorter. If it met bounds, 2. is repeated with more components held, else the step is complete.

Acceptance and radius are those of :mod:`pint_fem.optimize.trust_region.newton_cg`. Near a minimiser at which no multiplier of an
active bound is zero, the Cauchy step alone finds the active bounds in finitely many iterations [1], and then the steps
are those of Newton's method for the free components: superlinear convergence with
:math:`\xi = \min(1/2, (|\hat g|/|\hat g_0|)^{1/2})`. If nothing is bounded, the Cauchy step is the first conjugate
gradient iteration, the others continue it, and the iterates are those of the unbounded minimiser.

Which bounds are active is decided where the component lives. All else is decided by inner products: "is any bound met"
is the norm of a vector that is 1 there.

References
----------
[1] C.-J. Lin, J. J. Moré, Newton's method for large bound-constrained optimization problems, SIAM J. Optim. 9 (1999)
    1100-1127.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from pint_fem.collective import collectively
from pint_fem.optimize.argument_checks import check_bounds, check_newton
from pint_fem.optimize.evaluator import Estimate, Evaluator, ExactOracle, Gradient, Point
from pint_fem.optimize.preconditioners import chosen, merged_pairs
from pint_fem.optimize.protocol import Checkpoint, Preconditioner, Problem
from pint_fem.optimize.ranks import holds_anywhere, on_all_ranks
from pint_fem.optimize.records import IterationRecord, StopReason, TrustRegionResult, header
from pint_fem.optimize.restart import State, restore, save
from pint_fem.optimize.trust_region.acceptance import is_lost, judge, next_radius
from pint_fem.optimize.trust_region.projected_step import Box, BoxStep, ProjectedSteps
from pint_fem.optimize.trust_region.steihaug import CGStop

__all__ = ["minimize_bounded"]

# Round-off of a product of two vectors without a common component, relative to their lengths: none if it is diagonal.
_DIAGONAL_RTOL = 1e-14

_KIND = "bounded trust region 1"


@on_all_ranks
def minimize_bounded(
    problem: Problem,
    x0: np.ndarray,
    lower: np.ndarray | float = -math.inf,
    upper: np.ndarray | float = math.inf,
    *,
    gtol_rel: float = 1e-6,
    gtol_abs: float = 0.0,
    max_it: int = 50,
    initial_radius: float | None = None,
    max_radius: float = math.inf,
    min_radius: float = 0.0,
    eta: float = 1e-4,
    hessian: str = "newton",
    cg_max_it: int = 100,
    cg_rtol: float | None = None,
    preconditioner: Preconditioner | str | None = None,
    preconditioner_memory: int = 8,
    value_rtol: float = 1e-12,
    checkpoint: Checkpoint | None = None,
    monitor: Callable[[str], object] | None = None,
    callback: Callable[[np.ndarray, IterationRecord], object] | None = None,
) -> TrustRegionResult:
    """Minimise a function within bounds by trust-region Newton-CG in the problem's inner product.

    An iteration costs one value, the Hessian actions of its Cauchy step, conjugate gradients and projected searches
    (mostly none after a rejected step) and, if its step is accepted, one gradient. Every point at which the problem is
    asked for anything satisfies the bounds exactly. With several processes call it on all of them with the same
    options, which are compared, each with its part of the vectors; a `callback` that returns true on any of them stops
    all.

    Parameters
    ----------
    problem : Problem
        Its inner product must be diagonal, ``inner(a, b) = sum_i w_i a_i b_i`` with positive weights, and its
        gradient, the Riesz representative, is then the derivative's coefficients over ``w``. For finite elements lump
        the mass matrix. The weights themselves are not needed; that the product is diagonal is tested.
    x0 : ndarray, shape (n,)
        First guess; not modified. If it is out of bounds, the run starts at the nearest point within, and says so on
        the monitor.
    lower, upper : ndarray, shape (n,), or float
        ``lower <= upper``, infinite where there is no bound; equal where the component is fixed.
    gtol_rel, gtol_abs : float
        Converged when ``|pg| <= max(gtol_abs, gtol_rel * |pg at the start|)``, pg the projected gradient.
    initial_radius : float, optional
        First radius, a length in the space of x. By default 10 times the step to the minimiser of the model along the
        projected gradient.
    cg_max_it : int
        Most Hessian actions an iterate, but for those of a Cauchy step that meets bounds; twice as many vectors are
        kept.
    cg_rtol : float, optional
        Residual of CG relative to |pg|; by default ``min(0.5, sqrt(|pg| / |pg at the start|))``.
    preconditioner : callable or "limited-memory", optional
        ``P r``, self-adjoint and positive definite in the inner product, an approximate inverse of the Hessian. For
        the free components, selected by E, it is used as ``E P E``. Lengths stay those of the problem's norm. Its
        method ``update(pairs)``, if it has one, is called after each accepted step.
    max_it, max_radius, min_radius, eta, hessian, preconditioner_memory, value_rtol, checkpoint, monitor, callback
        As for :func:`~pint_fem.optimize.trust_region.newton_cg.minimize_trust_region`.

    Returns
    -------
    TrustRegionResult
        ``gradient_norm`` is that of the projected gradient; ``cg_iterations`` counts Hessian actions of a step.

    Raises
    ------
    ValueError
        An option outside its range, `lower` above `upper`, arrays of the wrong shape, an inner product that is not
        diagonal or not definite, a checkpoint of another run.
    NonFiniteError
        A FloatingPointError: J at the start, a gradient or a Hessian action is not finite. It carries the last good
        iterate as ``x``. A J that is not finite at a trial point is no error, nor is a gradient there whose inner
        product with itself overflows: the radius is reduced.
    """
    check_newton(
        gtol_rel=gtol_rel, gtol_abs=gtol_abs, max_it=max_it, radii=(initial_radius, max_radius, min_radius), eta=eta,
        hessian=hessian, cg_max_it=cg_max_it, cg_rtol=cg_rtol, preconditioner=preconditioner,
        preconditioner_memory=preconditioner_memory, value_rtol=value_rtol, checkpoint=checkpoint, monitor=monitor,
        callback=callback,
    )  # fmt: skip

    evaluator = Evaluator(problem, hessian)
    x0 = np.array(x0, dtype=np.float64)
    box = _box(evaluator, x0, lower, upper)
    oracle = _BoxOracle(evaluator, box)
    preconditioner, learns = chosen(preconditioner, evaluator.inner)

    def record(radius: float, ratio: float, accepted: bool, step: BoxStep | None) -> None:
        norm, products, stop = (0.0, 0, CGStop.NONE) if step is None else (step.norm, step.cg_iterations, step.stop)
        value, g_norm = state.point.value.value, state.point.gradient.norm
        state.history.append(
            IterationRecord(len(state.history), value, g_norm, radius, norm, ratio, accepted, products, stop)
        )
        if checkpoint is not None:
            save(checkpoint, state, evaluator, oracle, _KIND)
        if monitor is not None:
            monitor(str(state.history[-1]))

    state = None if checkpoint is None else restore(checkpoint, x0, evaluator, oracle, _KIND)
    start = box.project(x0 if state is None else state.point.x)
    outside = start - (x0 if state is None else state.point.x)
    distance = math.sqrt(evaluator.inner(outside, outside))
    if state is not None and distance > 0:
        raise ValueError(
            f"the checkpoint holds an iterate {distance:.1e} out of bounds: continue it with the same bounds"
        )
    if monitor is not None:
        if distance > 0:
            monitor(f"the first guess is out of bounds by {distance:.3e}: the run starts at the nearest point within")
        monitor(header())
    if state is None:
        point = oracle.first_point(start)
        first_radius = None if initial_radius is None else float(initial_radius)
        state = State(point, point.gradient.norm, cg_rtol or 0.5, first_radius)
        record(math.nan, math.nan, True, None)
    elif state.pairs and learns:
        preconditioner.update(state.pairs)
    tolerance = max(gtol_abs, gtol_rel * state.first_norm)

    steps, reason = None, StopReason.GRADIENT if state.point.gradient.norm <= tolerance else state.reason
    for iteration in range(len(state.history), max_it + 1):
        if reason is not None:
            break
        point = state.point
        if steps is None:
            steps = ProjectedSteps(
                evaluator,
                box,
                point.x,
                point.gradient.vector,
                tolerance=state.forcing * point.gradient.norm,
                max_it=cg_max_it,
                preconditioner=preconditioner,
                iteration=iteration,
            )
        if state.radius is None:
            state.radius = min(steps.first_radius(), float(max_radius))
        radius, step = state.radius, steps.step(state.radius)
        trial_value = Estimate(evaluator.value(step.point))
        ratio, below_accuracy, accepted = judge(point.value, trial_value, step.reduction, value_rtol, eta)
        g = oracle.trial_gradient(step.point, iteration, point.x) if accepted else None
        if accepted and g is None:
            ratio, accepted = math.nan, False
        state.radius, reduced = next_radius(radius, step, ratio, accepted=accepted, most=max_radius)
        if reduced and is_lost(state.radius, math.sqrt(evaluator.inner(point.x, point.x)), min_radius):
            state.reason = StopReason.RADIUS
        if accepted:
            if below_accuracy and trial_value.value >= point.value.value and g.norm >= point.gradient.norm:
                accepted, state.reason = False, StopReason.ROUND_OFF
            else:
                state.point = Point(step.point, trial_value, g)
                state.forcing = cg_rtol or min(0.5, math.sqrt(g.norm / state.first_norm))
                if learns:
                    state.pairs = merged_pairs(state.pairs, steps.positive_pairs(), preconditioner_memory)
                    preconditioner.update(state.pairs)
                steps = None
        record(radius, ratio, accepted, step)

        reason = StopReason.GRADIENT if state.point.gradient.norm <= tolerance else state.reason
        stopped = callback is not None and callback(state.point.x.copy(), state.history[-1])
        if stopped and reason is not StopReason.GRADIENT:
            reason = StopReason.CALLBACK

    reason = reason or StopReason.MAX_IT
    return state.result(evaluator, reason)


class _BoxOracle(ExactOracle):
    """Gradients come with the norm of the projected one."""

    def __init__(self, evaluator: Evaluator, box: Box):
        super().__init__(evaluator)
        self._box = box

    def gradient(self, x: np.ndarray, iteration: int, last_good: np.ndarray, **expected) -> Gradient:
        """See :class:`~pint_fem.optimize.evaluator.ExactOracle`."""
        g, _ = self.evaluator.gradient(x, iteration, last_good)
        projected = self._box.projected_gradient(x, g)
        return Gradient(g, math.sqrt(self.inner(projected, projected)))


def _box(evaluator: Evaluator, x: np.ndarray, lower, upper) -> Box:
    """The bounds as arrays of the shape of x, refused on all processes if they make no box or the product is no sum.

    Something is wrong on all of them where it is on one.
    """
    collectively(evaluator.problem.comm, "", check_bounds, lower, upper)
    bounds = [np.asarray(bound, dtype=np.float64) for bound in (lower, upper)]
    misshapen = any(bound.shape not in ((), x.shape) for bound in bounds)
    if holds_anywhere(evaluator.problem, x, misshapen):
        raise ValueError(
            f"bounds of shapes {bounds[0].shape} and {bounds[1].shape}: give numbers or arrays of the shape of x0, "
            f"{x.shape}"
        )
    low, high = (np.broadcast_to(bound, x.shape) for bound in bounds)
    wrong = ~(low <= high) | (low == math.inf) | (high == -math.inf)  # nan among them
    if holds_anywhere(evaluator.problem, x, wrong.any()):
        first = f", first {low[wrong][0]} and {high[wrong][0]}" if wrong.any() else ""
        raise ValueError(
            f"lower and upper leave no room for {wrong.sum()} components of this process{first}: "
            "give lower <= upper, -inf and inf where there is no bound"
        )
    ones = np.random.default_rng(0).uniform(0.5, 1.5, x.shape)
    half = np.arange(x.size) % 2 == 0
    product = evaluator.inner(np.where(half, ones, 0.0), np.where(half, 0.0, ones))
    if abs(product) > _DIAGONAL_RTOL * evaluator.inner(ones, ones):
        raise ValueError(
            f"the inner product of two vectors without a common component is {product}: bounds need a diagonal one, "
            "inner(a, b) = sum w_i a_i b_i, with the gradient to it (finite elements: a lumped mass matrix)"
        )
    return Box(np.array(low), np.array(high))
