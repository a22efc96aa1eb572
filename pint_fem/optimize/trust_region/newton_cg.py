r"""Matrix-free trust-region Newton-CG (Steihaug-Toint) in a Hilbert space.

Minimise :math:`J` on a space with inner product :math:`(a, b)` and norm :math:`|a|`. With the Riesz representatives
:math:`g` of :math:`J'(x)` and :math:`H` of :math:`J''(x)` (or of a Gauss-Newton form in its place), iteration
:math:`k` minimises approximately the model

.. math:: m(s) = J(x) + (g, s) + \tfrac12 (s, H s) \quad\text{subject to}\quad |s| \le \Delta

and compares what it promised with what it got,

.. math:: \rho = \frac{J(x) - J(x + s)}{J(x) - m(s)}:

the step is accepted if :math:`\rho > \eta`; :math:`\Delta` becomes :math:`|s|/4` if :math:`\rho < 1/4` and doubles if
:math:`\rho > 3/4` and the step ends on the boundary [1, Alg. 4.1]. Iterates, steps and radius are measured in the
problem's own norm, so a good inner product is the preconditioner: iteration counts then do not depend on the mesh.

The model is minimised by conjugate gradients from :math:`p_0 = 0, r_0 = g, d_0 = -g` [2; 1, Alg. 7.2],

.. math::
    \alpha_j = \frac{(r_j, r_j)}{(d_j, H d_j)}, \quad p_{j+1} = p_j + \alpha_j d_j, \quad
    r_{j+1} = r_j + \alpha_j H d_j, \quad d_{j+1} = -r_{j+1} + \frac{(r_{j+1}, r_{j+1})}{(r_j, r_j)} d_j,

until the residual is small, :math:`|r_j| \le \min(1/2, \sqrt{|g|/|g_0|})\,|g|` (superlinear convergence, [3]; other
choices in :mod:`pint_fem.optimize.trust_region.forcing`), or the path :math:`p_0, p_1, \dots` leaves the ball, or
:math:`(d_j, H d_j) \le 0`; in the last two cases it is followed to the boundary. A part :math:`\tau d_j` of the path
lowers the model by :math:`\tau (r_j, r_j) - \tfrac12 \tau^2 (d_j, H d_j)`, so the prediction costs no Hessian action.
As :math:`|p_j|` grows with :math:`j` [2, Thm 2.1], the step for a smaller radius is the same path cut earlier: the
directions are kept, and the retry after a rejected step needs no Hessian action.

Differences of J below its own accuracy say nothing: if promise and outcome both are below
:math:`\varepsilon \max(|J(x)|, |J(x+s)|)`, :math:`\rho = 1` is used [4, Sec. 17.4.2], and the run ends if such a step
lowers neither J nor the norm of the gradient.

Modules of the same folder add to this: :mod:`~pint_fem.optimize.trust_region.inexact` asks a problem for no more accuracy than
convergence needs, :mod:`~pint_fem.optimize.trust_region.steihaug` holds the path, preconditioned and with inexact products,
:mod:`~pint_fem.optimize.preconditioners` learns a preconditioner from it, :mod:`~pint_fem.optimize.restart` continues
a run that was interrupted.

References
----------
[1] J. Nocedal, S. J. Wright, Numerical Optimization, 2nd ed., Springer 2006.
[2] T. Steihaug, The conjugate gradient method and trust regions in large scale optimization, SINUM 20 (1983) 626-637.
[3] S. C. Eisenstat, H. F. Walker, Choosing the forcing terms in an inexact Newton method, SISC 17 (1996) 16-32.
[4] A. R. Conn, N. I. M. Gould, P. L. Toint, Trust-Region Methods, SIAM 2000.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from pint_fem.optimize.argument_checks import check, check_choice, check_newton
from pint_fem.optimize.evaluator import Evaluator, ExactOracle, Point
from pint_fem.optimize.preconditioners import chosen, merged_pairs
from pint_fem.optimize.protocol import Checkpoint, NonFiniteError, Preconditioner, Problem
from pint_fem.optimize.ranks import on_all_ranks
from pint_fem.optimize.records import IterationRecord, StopReason, TrustRegionResult, header
from pint_fem.optimize.restart import State, restore, save
from pint_fem.optimize.trust_region.acceptance import UNLIMITED, is_lost, judge, next_radius
from pint_fem.optimize.trust_region.forcing import CHOICES, first_forcing_term, next_forcing_term
from pint_fem.optimize.trust_region.inexact import InexactOptions, InexactOracle
from pint_fem.optimize.trust_region.steihaug import CGStop, SteihaugPath, Step

__all__ = [
    "CGStop",
    "IterationRecord",
    "NonFiniteError",
    "Problem",
    "StopReason",
    "TrustRegionResult",
    "minimize_trust_region",
]


def _forcing_choice(cg_rtol: float | None, cg_forcing: str | float) -> str | float:
    """The one of the two options that is given."""
    if cg_rtol is not None:
        if cg_forcing != "superlinear":
            raise ValueError(f"cg_rtol = {cg_rtol} and cg_forcing = {cg_forcing!r} are refused: give one of them")
        return cg_rtol
    if isinstance(cg_forcing, str):
        check_choice("cg_forcing", cg_forcing, CHOICES)
    else:
        check("cg_forcing", cg_forcing, f"a number in (0, 1), or one of {CHOICES}", lambda v: 0 < v < 1)
    return cg_forcing


@on_all_ranks
def minimize_trust_region(
    problem: Problem,
    x0: np.ndarray,
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
    cg_forcing: str | float = "superlinear",
    preconditioner: Preconditioner | str | None = None,
    preconditioner_memory: int = 8,
    value_rtol: float = 1e-12,
    inexact: InexactOptions | None = None,
    checkpoint: Checkpoint | None = None,
    monitor: Callable[[str], object] | None = None,
    callback: Callable[[np.ndarray, IterationRecord], object] | None = None,
) -> TrustRegionResult:
    """Minimise a function by trust-region Newton-CG in the problem's inner product.

    An iteration costs one value, a Hessian action for each CG iteration (none after a rejected step) and, if its step
    is accepted, one gradient. Lengths are in the problem's norm. With several processes call it on all of them with
    the same options, which are compared; a `callback` that returns true on any of them stops all.

    Parameters
    ----------
    problem : Problem
    x0 : ndarray, shape (n,)
        First guess; not modified.
    gtol_rel, gtol_abs : float
        Converged when ``|g| <= max(gtol_abs, gtol_rel * |g at x0|)``; the estimated error of an inexact g counts in.
    max_it : int
        Most steps to try, accepted or not.
    initial_radius : float, optional
        First radius, a length in the space of x. By default 10 times the Cauchy step (to the minimiser of the model
        along -g, or as long if the curvature is negative); its Hessian action is the first of CG.
    max_radius : float
        No step is longer; may be infinite.
    min_radius : float
        Give up at or below this radius, or if a step is lost in the round-off of x.
    eta : float
        Accept a step if actual over predicted reduction exceeds this; 0 <= eta < 1/4.
    hessian : {"newton", "gauss-newton"}
        Model J by its Hessian or by the problem's Gauss-Newton form (``problem.gauss_newton_action(x, v)``).
    cg_max_it : int
        Most CG iterations an iterate; also the number of vectors kept (twice as many with a preconditioner that
        learns).
    cg_rtol : float, optional
        Residual of CG relative to |g|, a number instead of `cg_forcing`.
    cg_forcing : {"superlinear", "eisenstat-walker-1", "eisenstat-walker-2"} or float
        The same by a rule of :mod:`pint_fem.optimize.trust_region.forcing`; "superlinear" is ``min(0.5, sqrt(|g| / |g at x0|))``.
        Where g is inexact, CG does not go below its error.
    preconditioner : callable or "limited-memory", optional
        An approximate inverse Hessian for CG, ``preconditioner(r)``, self-adjoint and positive definite in the
        problem's inner product; its method ``update(pairs)``, if it has one, is called after each accepted step.
        "limited-memory" is :class:`~pint_fem.optimize.preconditioners.LimitedMemoryPreconditioner`.
    preconditioner_memory : int
        Most pairs (d, H d) handed to ``update``.
    value_rtol : float
        Relative accuracy of J. Where J comes from an iterative solver, about the tolerance of that solver. With
        `inexact`, the best accuracy J is asked for.
    inexact : InexactOptions, optional
        Ask a problem that has ``value_within``, ``gradient_within`` or ``hessian_action_within``
        (:class:`~pint_fem.optimize.protocol.InexactProblem`) for no more accuracy than convergence needs. By default
        those methods are not used.
    checkpoint : Checkpoint, optional
        ``checkpoint.save`` keeps the state after the first guess and each iteration. If ``checkpoint.load()`` returns
        one, the run goes on from there as if it had not stopped, given the same problem and options, and `x0` says no
        more than the shape of the vectors.
    monitor : callable, optional
        Called with a header and one line for the first guess and each iteration; ``print``, on one process.
    callback : callable, optional
        ``callback(x, record)`` after each iteration, accepted or not, with a copy of the iterate; a true result stops.

    Returns
    -------
    TrustRegionResult

    Raises
    ------
    ValueError
        An option outside its range, a problem without the Gauss-Newton action asked for, `x0` or a derivative of the
        wrong shape, an indefinite inner product or preconditioner, the checkpoint of another kind of run.
    NonFiniteError
        A FloatingPointError: J at `x0`, a gradient or a Hessian action is not finite. It carries the last good
        iterate as ``x``. A J that is not finite at a trial point is no error, nor is a gradient there whose inner
        product with itself overflows: the radius is reduced.
    """
    check_newton(
        gtol_rel=gtol_rel, gtol_abs=gtol_abs, max_it=max_it, radii=(initial_radius, max_radius, min_radius), eta=eta,
        hessian=hessian, cg_max_it=cg_max_it, cg_rtol=cg_rtol, preconditioner=preconditioner,
        preconditioner_memory=preconditioner_memory, value_rtol=value_rtol, checkpoint=checkpoint, monitor=monitor,
        callback=callback,
    )  # fmt: skip
    cg_forcing = _forcing_choice(cg_rtol, cg_forcing)
    if not isinstance(inexact, InexactOptions | None):
        raise ValueError(f"inexact = {inexact!r} is refused: give InexactOptions(...) or None")

    evaluator = Evaluator(problem, hessian)
    oracle = ExactOracle(evaluator) if inexact is None else InexactOracle(evaluator, inexact, value_rtol)
    preconditioner, learns = chosen(preconditioner, evaluator.inner)

    def record(radius: float, ratio: float, accepted: bool, step: Step) -> None:
        value, gradient = state.point.value, state.point.gradient
        state.history.append(
            IterationRecord(
                len(state.history), value.value, gradient.norm, radius, step.norm, ratio, accepted, step.cg_iterations,
                step.stop, value.asked, value.error, gradient.asked, gradient.error, step.rtol or oracle.model_rtol,
            )
        )  # fmt: skip
        if checkpoint is not None:
            save(checkpoint, state, evaluator, oracle)
        if monitor is not None:
            monitor(str(state.history[-1]))

    if monitor is not None:
        monitor(header(oracle.inexact))
    x0 = np.array(x0, dtype=np.float64)
    state = None if checkpoint is None else restore(checkpoint, x0, evaluator, oracle)
    if state is None:
        oracle.aim(gtol_abs)
        point = oracle.first_point(x0)
        first_norm, radius = point.gradient.norm, None if initial_radius is None else float(initial_radius)
        state = State(point, first_norm, first_forcing_term(cg_forcing), radius)
        record(math.nan, math.nan, True, Step.none(x0))
    elif state.pairs and learns:
        preconditioner.update(state.pairs)
    tolerance = max(gtol_abs, gtol_rel * state.first_norm)
    oracle.aim(tolerance)

    path, reason = None, _end(state.point, tolerance) or state.reason
    for iteration in range(len(state.history), max_it + 1):
        if reason is not None:
            break
        if path is None:
            gradient = state.point.gradient
            path = SteihaugPath(
                oracle,
                state.point,
                tolerance=max(state.forcing * gradient.norm, gradient.error),
                max_it=cg_max_it,
                iteration=iteration,
                preconditioner=preconditioner,
                keep_products=learns,
                follow_gradient=cg_forcing == "eisenstat-walker-1",
            )
        if state.radius is None:
            state.radius = min(path.first_radius(), float(max_radius))
        radius, step = state.radius, path.step(state.radius)
        trial = state.point.x + step.p
        state.point, trial_value = oracle.compare(state.point, trial, step.reduction, iteration)
        point = state.point
        ratio, below_accuracy, accepted = judge(point.value, trial_value, step.reduction, value_rtol, eta)
        state.radius, reduced = next_radius(radius, step, ratio, accepted=accepted, most=max_radius)
        if accepted:
            before = point.gradient.norm
            g = oracle.trial_gradient(trial, iteration, point.x, guess=before, radius=state.radius)
            if g is None:
                ratio, accepted = math.nan, False
                state.radius, reduced = next_radius(radius, step, ratio, accepted=False, most=max_radius)
        if not accepted and step.norm >= UNLIMITED:
            state.radius = min(state.radius, path.first_radius())
        if accepted:
            errors = point.value.error + trial_value.error
            if below_accuracy and trial_value.value + errors >= point.value.value and g.norm >= before:
                accepted, state.reason = False, StopReason.ROUND_OFF
            else:
                state.point = Point(trial, trial_value, g)
                state.forcing = next_forcing_term(
                    cg_forcing,
                    last=state.forcing,
                    norm=g.norm,
                    norm_before=before,
                    model_norm=step.model_norm,
                    first_norm=state.first_norm,
                    final_norm=tolerance,
                )
                new_pairs = path.pairs(step.cg_iterations) if learns else []
                if new_pairs:
                    state.pairs = merged_pairs(state.pairs, new_pairs, preconditioner_memory)
                    preconditioner.update(state.pairs)
                path = None
        else:
            state.point = oracle.refined(point, iteration, state.radius)
            path = path if state.point is point else None
        x = state.point.x
        if reduced and is_lost(state.radius, math.sqrt(evaluator.inner(x, x)), min_radius):
            state.reason = StopReason.RADIUS
        record(radius, ratio, accepted, step)

        reason = _end(state.point, tolerance) or state.reason
        stopped = callback is not None and callback(state.point.x.copy(), state.history[-1])
        if stopped and reason is not StopReason.GRADIENT:
            reason = StopReason.CALLBACK

    reason = reason or StopReason.MAX_IT
    return state.result(evaluator, reason)


def _end(point: Point, tolerance: float) -> StopReason | None:
    """Whether the gradient ends the run: small enough for sure, or lost in its error."""
    gradient = point.gradient
    if gradient.norm + gradient.error <= tolerance:
        return StopReason.GRADIENT
    return StopReason.ACCURACY if 2 * gradient.error > gradient.norm else None
