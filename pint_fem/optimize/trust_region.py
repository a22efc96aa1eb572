r"""Matrix-free trust-region Newton-CG (Steihaug-Toint) in a Hilbert space.

Minimise :math:`J` on a space with inner product :math:`(a, b)` and norm :math:`|a|`. With the Riesz representatives
:math:`g` of :math:`J'(x)` and :math:`H` of :math:`J''(x)`, iteration :math:`k` minimises approximately the model

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

until the residual is small, :math:`|r_j| \le \min(1/2, \sqrt{|g|/|g_0|})\,|g|` (superlinear convergence, [3]), or the
path :math:`p_0, p_1, \dots` leaves the ball, or :math:`(d_j, H d_j) \le 0`; in the last two cases it is followed to the
boundary. A part :math:`\tau d_j` of the path lowers the model by
:math:`\tau (r_j, r_j) - \tfrac12 \tau^2 (d_j, H d_j)`, so the prediction costs no Hessian action. As :math:`|p_j|`
grows with :math:`j` [2, Thm 2.1], the step for a smaller radius is the same path cut earlier: the directions are
kept, and the retry after a rejected step needs no Hessian action.

Differences of J below its own accuracy say nothing: if promise and outcome both are below
:math:`\varepsilon \max(|J(x)|, |J(x+s)|)`, :math:`\rho = 1` is used [4, Sec. 17.4.2], and the run ends if such a step
lowers neither J nor the norm of the gradient.

References
----------
[1] J. Nocedal, S. J. Wright, Numerical Optimization, 2nd ed., Springer 2006.
[2] T. Steihaug, The conjugate gradient method and trust regions in large scale optimization, SINUM 20 (1983) 626-637.
[3] S. C. Eisenstat, H. F. Walker, Choosing the forcing terms in an inexact Newton method, SISC 17 (1996) 16-32.
[4] A. R. Conn, N. I. M. Gould, P. L. Toint, Trust-Region Methods, SIAM 2000.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from numbers import Integral, Real
from typing import Protocol

import numpy as np

from pint_fem.optimize.steihaug import CGStop, SteihaugPath

__all__ = [
    "CGStop",
    "IterationRecord",
    "NonFiniteError",
    "Problem",
    "StopReason",
    "TrustRegionResult",
    "minimize_trust_region",
]

# Below this the square of a length is no normal number any more.
_SMALLEST_LENGTH = math.sqrt(np.finfo(float).tiny)

_HEADER = f"{'it':>4} {'J':>16} {'|g|':>10} {'radius':>10} {'|step|':>10} {'ratio':>9} {'':>8} {'CG':>4}  CG stop"


class Problem(Protocol):
    """What the minimiser asks of an objective J on a Hilbert space.

    A vector is a 1-D float64 array: this process's part of a distributed vector. `value` and `inner` return the same
    number on every process. Arguments are not to be modified; results may be views of reused memory.
    """

    def value(self, x: np.ndarray) -> float:
        """J(x); ``inf`` or ``nan`` where J cannot be evaluated (the trial step is then shortened)."""

    def gradient(self, x: np.ndarray) -> np.ndarray:
        """The g with ``inner(g, v) = J'(x) v`` for all v; same shape as `x`."""

    def hessian_action(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The h with ``inner(h, w) = J''(x)(v, w)`` for all w; same shape as `x`."""

    def inner(self, a: np.ndarray, b: np.ndarray) -> float:
        """The inner product (a, b): symmetric, positive definite, reduced over all processes."""


class StopReason(str, Enum):
    """Why a minimisation ended; compares equal to its text.

    "round-off" and "radius too small" far from a small gradient point to a derivative that is not that of J, or to a
    J less accurate than `value_rtol` says.
    """

    GRADIENT = "gradient tolerance"
    MAX_IT = "maximum iterations"
    RADIUS = "radius too small"
    ROUND_OFF = "round-off"
    CALLBACK = "stopped by callback"


class NonFiniteError(FloatingPointError):
    """J at the first guess, a gradient or a Hessian action is infinite or not a number.

    Attributes
    ----------
    x : ndarray
        The last iterate at which J and its gradient were finite (the first guess if there is none).
    """

    def __init__(self, message: str, x: np.ndarray):
        """Say what broke in which iteration, and keep `x`."""
        super().__init__(message)
        self.x = x


@dataclass(frozen=True)
class IterationRecord:
    """One iteration; record 0 is the first guess.

    Attributes
    ----------
    iteration : int
    value, gradient_norm : float
        J and the norm of its gradient at the iterate the iteration ends with (unchanged by a rejected step).
    radius, step_norm : float
        Radius the step was computed with and norm of the step, accepted or not; nan and 0 in record 0.
    ratio : float
        Actual over predicted reduction; 1 below the accuracy of J, nan where J was not finite and in record 0.
    accepted : bool
    cg_iterations : int
        Conjugate gradient directions the step is made of. After a rejected step they are known already.
    cg_stop : CGStop
    """

    iteration: int
    value: float
    gradient_norm: float
    radius: float
    step_norm: float
    ratio: float
    accepted: bool
    cg_iterations: int
    cg_stop: CGStop

    def __str__(self) -> str:
        """The monitor line."""
        return (
            f"{self.iteration:4d} {self.value:16.9e} {self.gradient_norm:10.3e} {self.radius:10.3e} "
            f"{self.step_norm:10.3e} {self.ratio:9.2e} {'' if self.accepted else 'rejected':>8} "
            f"{self.cg_iterations:4d}  {self.cg_stop.value}"
        ).rstrip()


@dataclass(frozen=True)
class TrustRegionResult:
    """Where a minimisation ended, and how it got there.

    Attributes
    ----------
    x : ndarray
        The last accepted iterate: no evaluated point has a lower J by more than the accuracy of J.
    value, gradient_norm : float
        J and the norm of its gradient at `x`.
    iterations : int
        Steps tried, accepted or not.
    converged : bool
        Whether `reason` is the gradient tolerance.
    reason : StopReason
    history : list of IterationRecord
        The first guess and every iteration: ``iterations + 1`` records.
    value_calls, gradient_calls, hessian_calls : int
        ``1 + iterations`` values; ``1 + accepted steps`` gradients, and one more if `reason` is round-off; the
        conjugate gradient iterations of every step not preceded by a rejected one.
    """

    x: np.ndarray
    value: float
    gradient_norm: float
    iterations: int
    converged: bool
    reason: StopReason
    history: list[IterationRecord]
    value_calls: int
    gradient_calls: int
    hessian_calls: int


class _Evaluator:
    """The problem's functions, counted and refused where they are not finite.

    Finiteness is judged by reduced numbers only, so that all processes agree.
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        self.values = self.gradients = self.hessians = 0

    def value(self, x: np.ndarray) -> float:
        self.values += 1
        return float(self.problem.value(x))

    def gradient(self, x: np.ndarray, iteration: int, last_good: np.ndarray) -> tuple[np.ndarray, float]:
        self.gradients += 1
        g = _like(x, self.problem.gradient(x), "gradient")
        square = self.inner(g, g)
        if not math.isfinite(square):
            raise NonFiniteError(f"iteration {iteration}: the gradient is not finite, (g, g) = {square}", last_good)
        if square < 0:
            raise ValueError(f"(g, g) = {square} < 0: the problem's inner product must be positive definite")
        return g, math.sqrt(square)

    def curvature(self, x: np.ndarray, d: np.ndarray, iteration: int) -> tuple[np.ndarray, float]:
        self.hessians += 1
        h = _like(x, self.problem.hessian_action(x, d), "hessian_action")
        curvature = self.inner(d, h)
        if not math.isfinite(curvature):
            raise NonFiniteError(f"iteration {iteration}: the Hessian action is not finite, (d, Hd) = {curvature}", x)
        return h, curvature

    def inner(self, a: np.ndarray, b: np.ndarray) -> float:
        return float(self.problem.inner(a, b))


def _like(x: np.ndarray, v: np.ndarray, name: str) -> np.ndarray:
    """A copy of `v` (the problem may reuse its memory), refused unless it has the shape of `x`."""
    v = np.array(v, dtype=np.float64)
    if v.shape != x.shape:
        raise ValueError(f"{name} returned an array of shape {v.shape}: give one of the shape of x, {x.shape}")
    return v


def _reduction_ratio(value: float, trial: float, predicted: float, value_rtol: float) -> tuple[float, bool]:
    """Actual over predicted reduction, and whether both are below the accuracy of J."""
    if not math.isfinite(trial):
        return math.nan, False
    noise = value_rtol * max(abs(value), abs(trial))
    if abs(value - trial) <= noise and predicted <= noise:
        return 1.0, True
    return ((value - trial) / predicted if predicted > 0 else math.nan), False


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
    cg_max_it: int = 100,
    cg_rtol: float | None = None,
    value_rtol: float = 1e-12,
    monitor: Callable[[str], object] | None = None,
    callback: Callable[[np.ndarray, IterationRecord], object] | None = None,
) -> TrustRegionResult:
    """Minimise a function by trust-region Newton-CG in the problem's inner product.

    An iteration costs one value, a Hessian action for each CG iteration (none after a rejected step) and, if its step
    is accepted, one gradient. Lengths are in the problem's norm. With several processes call it on all of them with
    the same options; `callback` must return the same on all of them.

    Parameters
    ----------
    problem : Problem
    x0 : ndarray, shape (n,)
        First guess; not modified.
    gtol_rel, gtol_abs : float
        Converged when ``|g| <= max(gtol_abs, gtol_rel * |g at x0|)``.
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
    cg_max_it : int
        Most CG iterations an iterate; also the number of vectors kept.
    cg_rtol : float, optional
        Residual of CG relative to |g|; by default ``min(0.5, sqrt(|g| / |g at x0|))``.
    value_rtol : float
        Relative accuracy of J. Where J comes from an iterative solver, about the tolerance of that solver.
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
        An option outside its range, `x0` or a derivative of the wrong shape, an indefinite inner product.
    NonFiniteError
        A FloatingPointError: J at `x0`, a gradient or a Hessian action is not finite. It carries the last good
        iterate as ``x``. A J that is not finite at a trial point is no error: the radius is reduced.
    """
    _check("gtol_rel", gtol_rel, "a number in [0, 1)", lambda v: 0 <= v < 1)
    _check("gtol_abs", gtol_abs, "a finite number >= 0", lambda v: 0 <= v < math.inf)
    _check("max_it", max_it, "an integer >= 0", lambda v: isinstance(v, Integral) and v >= 0)
    _check("max_radius", max_radius, "a number > 0, infinity included", lambda v: v > 0)
    _check("min_radius", min_radius, f"a number in [0, max_radius = {max_radius})", lambda v: 0 <= v < max_radius)
    if initial_radius is not None:
        _check(
            "initial_radius",
            initial_radius,
            f"a finite number above min_radius = {min_radius} and up to max_radius = {max_radius}, or None",
            lambda v: min_radius < v <= max_radius and v < math.inf,
        )
    _check("eta", eta, "a number in [0, 0.25)", lambda v: 0 <= v < 0.25)
    _check("cg_max_it", cg_max_it, "an integer >= 1", lambda v: isinstance(v, Integral) and v >= 1)
    if cg_rtol is not None:
        _check("cg_rtol", cg_rtol, "a number in (0, 1), or None", lambda v: 0 < v < 1)
    _check("value_rtol", value_rtol, "a number in [0, 1)", lambda v: 0 <= v < 1)
    for name, function in (("monitor", monitor), ("callback", callback)):
        if function is not None and not callable(function):
            raise ValueError(f"{name} = {function!r} is refused: give a callable or None")
    if np.ndim(x0) != 1 or np.iscomplexobj(x0):
        raise ValueError(f"x0 of shape {np.shape(x0)} and type {np.asarray(x0).dtype} is refused: give 1-D real array")

    evaluator = _Evaluator(problem)
    x = np.array(x0, dtype=np.float64)
    value = evaluator.value(x)
    if not math.isfinite(value):
        raise NonFiniteError(f"iteration 0: J = {value} at the first guess; start where J is finite", x)
    g, g_norm = evaluator.gradient(x, 0, x)
    g_norm_first, tolerance = g_norm, max(gtol_abs, gtol_rel * g_norm)

    history: list[IterationRecord] = []

    def record(*step) -> IterationRecord:
        history.append(IterationRecord(len(history), value, g_norm, *step))
        if monitor is not None:
            monitor(str(history[-1]))
        return history[-1]

    if monitor is not None:
        monitor(_HEADER)
    record(math.nan, 0.0, math.nan, True, 0, CGStop.NONE)

    path, radius = None, initial_radius
    reason = StopReason.GRADIENT if g_norm <= tolerance else None
    for iteration in range(1, max_it + 1):
        if reason is not None:
            break
        if path is None:
            forcing = min(0.5, math.sqrt(g_norm / g_norm_first)) if cg_rtol is None else cg_rtol
            path = SteihaugPath(
                evaluator, x, g, g_norm, tolerance=forcing * g_norm, max_it=cg_max_it, iteration=iteration
            )
        if radius is None:
            radius = min(path.first_radius(), max_radius)
        step = path.step(radius)
        trial = x + step.p
        trial_value = evaluator.value(trial)
        ratio, below_accuracy = _reduction_ratio(value, trial_value, step.reduction, value_rtol)
        accepted = ratio > eta  # false for nan
        if accepted:
            trial_g, trial_norm = evaluator.gradient(trial, iteration, x)
            if below_accuracy and trial_value >= value and trial_norm >= g_norm:
                accepted, reason = False, StopReason.ROUND_OFF
            else:
                x, value, g, g_norm, path = trial, trial_value, trial_g, trial_norm, None
        entry = record(radius, step.norm, ratio, accepted, step.cg_iterations, step.stop)

        if not ratio >= 0.25:
            radius = 0.25 * step.norm
            if radius <= max(min_radius, np.finfo(float).eps * math.sqrt(evaluator.inner(x, x)), _SMALLEST_LENGTH):
                reason = StopReason.RADIUS
        elif ratio > 0.75 and step.stop in (CGStop.BOUNDARY, CGStop.NEGATIVE_CURVATURE):
            radius = min(2 * radius, max_radius)
        if callback is not None and callback(x.copy(), entry):
            reason = StopReason.CALLBACK
        if g_norm <= tolerance:
            reason = StopReason.GRADIENT

    reason = reason or StopReason.MAX_IT
    return TrustRegionResult(
        x,
        value,
        g_norm,
        len(history) - 1,
        reason is StopReason.GRADIENT,
        reason,
        history,
        evaluator.values,
        evaluator.gradients,
        evaluator.hessians,
    )


def _check(name: str, value: object, allowed: str, accepts: Callable[[Real], bool]) -> None:
    """Refuse an option that is no real number or out of range."""
    if isinstance(value, bool) or not isinstance(value, Real) or not accepts(value):
        raise ValueError(f"{name} = {value!r} is refused: give {allowed}")
