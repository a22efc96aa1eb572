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

Acceptance and radius are those of :mod:`pint_fem.optimize.trust_region.newton_cg`. Near a minimiser at which no
multiplier of an active bound is zero, the Cauchy step alone finds the active bounds in finitely many iterations [1],
and then the steps are those of Newton's method for the free components: superlinear convergence with :math:`\xi =
\min(1/2, (|\hat g|/|\hat g_0|)^{1/2})`. If nothing is bounded, the Cauchy step is the first conjugate gradient
iteration, the others continue it, and the iterates are those of the unbounded minimiser.

Which bounds are active is decided on the process that owns the component. All else is decided by inner products:
whether any bound is met follows from the norm of a vector that is 1 there.

References
----------
[1] C.-J. Lin, J. J. Moré, Newton's method for large bound-constrained optimization problems, SIAM J. Optim. 9 (1999)
    1100-1127.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pint_fem.collective import collectively
from pint_fem.errors import InputError
from pint_fem.optimize.argument_checks import check_bounds
from pint_fem.optimize.guarded_problem import GuardedProblem
from pint_fem.optimize.oracle import ExactOracle, Gradient, Iterate
from pint_fem.optimize.protocol import Problem
from pint_fem.optimize.ranks import on_all_ranks
from pint_fem.optimize.records import TrustRegionResult
from pint_fem.optimize.trust_region.iteration import NewtonOptions, TrustRegionRun
from pint_fem.optimize.trust_region.projected_step import Box, ProjectedSteps

__all__ = ["checked_box", "minimize_bounded"]

# Round-off of a product of two vectors without a common component, relative to their lengths: none if it is diagonal.
_DIAGONAL_RTOL = 1e-14

_KIND = "bounded trust region 1"


@on_all_ranks
def minimize_bounded(
    problem: Problem,
    x0: np.ndarray,
    lower: np.ndarray | float = -math.inf,
    upper: np.ndarray | float = math.inf,
    **options: Any,
) -> TrustRegionResult:
    """Minimise a function within bounds by trust-region Newton-CG in the problem's inner product.

    An iteration costs one value, the Hessian actions of its Cauchy step, conjugate gradients and projected searches
    (mostly none after a rejected step) and, if its step is accepted, one gradient. Every point at which the problem is
    evaluated satisfies the bounds exactly. With several processes call it on all of them with the same
    options, which are compared, each with its part of the vectors; a `callback` that returns true on any of them stops
    all.

    Parameters
    ----------
    problem : Problem
        Its inner product must be diagonal, ``inner(a, b) = sum_i w_i a_i b_i`` with positive weights, and its
        gradient, the Riesz representative, is then the derivative's coefficients over ``w``. For finite elements lump
        the mass matrix. The weights themselves are not needed; that the product is diagonal is tested.
    x0 : ndarray, shape (n,)
        First guess; not modified. If it is out of bounds, the run starts at the nearest point within, and the monitor
        prints the distance.
    lower, upper : ndarray, shape (n,), or float
        ``lower <= upper``, infinite where there is no bound; equal where the component is fixed.
    **options
        The options of :func:`~pint_fem.optimize.trust_region.newton_cg.minimize_trust_region` except `cg_forcing` and
        `inexact`. The projected gradient pg stands for the gradient: the run has converged when
        ``|pg| <= max(gtol_abs, gtol_rel * |pg at the start|)``, `initial_radius` is by default 10 times the step to the
        minimiser of the model along pg, and `cg_rtol`, the residual of conjugate gradients relative to ``|pg|``, is by
        default ``min(0.5, sqrt(|pg| / |pg at the start|))``. `cg_max_it` limits the Hessian actions at an iterate but
        for those of a Cauchy step that meets bounds; twice as many vectors are stored. A `preconditioner` P is used as
        ``E P E`` for the free components, selected by E; lengths stay those of the problem's norm.

    Returns
    -------
    TrustRegionResult
        ``gradient_norm`` is that of the projected gradient; ``cg_iterations`` counts Hessian actions of a step.

    Raises
    ------
    ValueError
        An option outside its range (InputTypeError, which is a TypeError as well, where its type is wrong), `lower`
        above `upper`, arrays of the wrong shape, an inner product that is not diagonal or not definite, a checkpoint of
        another run.
    NonFiniteError
        A FloatingPointError: J at the start, a gradient or a Hessian action is not finite. It carries the last good
        iterate as ``x``. A J that is not finite at a trial point is no error, nor is a gradient there whose inner
        product with itself overflows: the radius is reduced.
    """
    given = NewtonOptions(**options)
    x0 = np.array(x0, dtype=np.float64)
    box = checked_box(problem, x0, lower, upper)
    oracle = _BoxOracle(problem, box, given.hessian)
    run = TrustRegionRun(oracle, given, x0, _KIND)
    first = x0 if run.state is None else run.state.iterate.x
    start = box.project(first)
    distance = math.sqrt(problem.inner(start - first, start - first))
    if run.state is not None and distance > 0:
        raise ValueError(
            f"the checkpoint holds an iterate {distance:.1e} out of bounds: continue it with the same bounds"
        )
    if given.monitor is not None and distance > 0:
        given.monitor(f"the first guess is out of bounds by {distance:.3e}: the run starts at the nearest point within")

    def steps_at(iterate: Iterate, iteration: int, tolerance: float) -> ProjectedSteps:
        return ProjectedSteps(
            oracle, box, iterate, tolerance=tolerance, max_it=given.cg_max_it, preconditioner=run.preconditioner,
            iteration=iteration,
        )  # fmt: skip

    return run.minimise(start, steps_at, given.cg_rtol or "superlinear")


class _BoxOracle(ExactOracle):
    """Gradients whose norm is that of the projected gradient."""

    def __init__(self, problem: GuardedProblem, box: Box, hessian: str):
        super().__init__(problem, hessian)
        self._box = box

    def gradient(self, x: np.ndarray, iteration: int, last_good: np.ndarray, **expected: float | None) -> Gradient:
        """The gradient at x with the norm of the projected one."""
        g = super().gradient(x, iteration, last_good).vector
        projected = self._box.projected_gradient(x, g)
        return Gradient(g, math.sqrt(self.inner(projected, projected)))


def checked_box(problem: GuardedProblem, x: np.ndarray, lower: np.ndarray | float, upper: np.ndarray | float) -> Box:
    """The bounds as arrays of the shape of x, after a check that the inner product is diagonal (collective).

    Raises
    ------
    InputError
        On all processes: bounds of another shape, a lower bound above the upper one, a product that is not diagonal.
    """
    collectively(problem.comm, "", check_bounds, lower, upper)
    bounds = [np.asarray(bound, dtype=np.float64) for bound in (lower, upper)]
    misshapen = any(bound.shape not in ((), x.shape) for bound in bounds)
    if problem.holds_anywhere(x, misshapen):
        raise InputError(
            f"bounds of shapes {bounds[0].shape} and {bounds[1].shape}: give numbers or arrays of the shape of x0, "
            f"{x.shape}"
        )
    low, high = (np.broadcast_to(bound, x.shape) for bound in bounds)
    wrong = ~(low <= high) | (low == math.inf) | (high == -math.inf)  # nan among them
    if problem.holds_anywhere(x, wrong.any()):
        first = f", first {low[wrong][0]} and {high[wrong][0]}" if wrong.any() else ""
        raise InputError(
            f"lower and upper contain no value for {wrong.sum()} components of this process{first}: "
            "give lower <= upper, -inf and inf where there is no bound"
        )
    ones = np.random.default_rng(0).uniform(0.5, 1.5, x.shape)
    half = np.arange(x.size) % 2 == 0
    product = problem.inner(np.where(half, ones, 0.0), np.where(half, 0.0, ones))
    if abs(product) > _DIAGONAL_RTOL * problem.inner(ones, ones):
        raise InputError(
            f"the inner product of two vectors without a common component is {product}: bounds need a diagonal one, "
            "inner(a, b) = sum w_i a_i b_i, with the gradient to it (finite elements: a lumped mass matrix)"
        )
    return Box(np.array(low), np.array(high))
