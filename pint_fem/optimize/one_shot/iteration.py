r"""One iteration of a simultaneous optimisation: evaluation, acceptance of the step, update of the operator B, next
step.

The method and the symbols are those of :mod:`pint_fem.optimize.one_shot.method`.
"""

from __future__ import annotations

import math

import numpy as np

from pint_fem.optimize.lbfgs import InverseLBFGS
from pint_fem.optimize.one_shot.inexact_evaluations import DesignEvaluation, InexactEvaluations
from pint_fem.optimize.one_shot.records import DesignUpdate, OneShotRecord
from pint_fem.optimize.records import StopReason
from pint_fem.optimize.trust_region.acceptance import below_resolution

__all__ = ["Run"]

# delta: part of the linear model's reduction that a step must achieve.
_DECREASE = 1e-4

# Largest share of |(g, s)| in the errors of J with which values of J decide on a step.
_VALUES_COUNT = 0.1

# e |d| may be this part of |(g, d)|.
_DESCENT = 0.5

# A shortened step keeps between these parts of its length.
_SHORTEST, _LONGEST = 0.1, 0.5

# The relative error allowed for g is not halved below this part of `accuracy`.
_FINEST = 1e-2

# A step along which the slope vanishes within its `_SHORTEST` part is a pair for B only where J rises as a quadratic
# with these slopes would, up to this part of that. A fourth power is off by 0.5, an exponential by nearly 1.
_QUADRATIC = 0.4

# After so many rejected steps in succession x is solved accurately.
_PATIENCE = 3

# Accepted steps that lower neither J by more than its accuracy nor the smallest |g|, before the run ends.
_IDLE = 10


class Run:
    """The state between two iterations: the accepted design x, and the design z that is being evaluated.

    All attributes but the options are in a checkpoint (:mod:`pint_fem.optimize.one_shot.restart`).

    Attributes
    ----------
    x, z : ndarray
        The same array where the accepted design is held.
    s, slope, tau : ndarray, float, float
        z - x, (g, s), and the length of s relative to the step -B g.
    base, exact : DesignEvaluation or None
        The last evaluation of x that was accurate enough, None before the first; the accurate one, if there was any.
    first_norm : float or None
        Norm of the first such gradient.
    theta : float
        Relative error of g that is allowed at present.
    residual : float
        Residual of the last evaluation of x.
    count, measure : int, bool
        Evaluations of z, and whether more than one is required.
    mark, since_mark : float, int
        The residual of z when it last halved, and evaluations since.
    rejections : int
        Rejected steps in succession.
    smallest, idle : float, int
        The smallest norm of a gradient so far, and steps below the accuracy of J without a smaller one.
    reason : StopReason or None
        Why the run has ended, if so.
    not_quadratic : bool
        Whether J along the last step is far from a quadratic with the slopes at its ends: the step is shortened, but
        its curvature does not enter B. Set anew for each step.
    """

    def __init__(
        self,
        solvers: InexactEvaluations,
        x: np.ndarray,
        B: InverseLBFGS,
        *,
        gtol_rel: float,
        gtol_abs: float,
        residual_tol: float,
        accuracy: float,
        hold_max_it: int,
        initial_step: float | None,
        value_rtol: float,
    ):
        self.solvers, self.inner, self.B = solvers, solvers.inner, B
        self.gtol_rel, self.gtol_abs, self.residual_tol = gtol_rel, gtol_abs, residual_tol
        self.first_norm: float | None = None
        self.accuracy, self.theta, self.hold_max_it = accuracy, accuracy, hold_max_it
        self.initial_step, self.value_rtol = initial_step, value_rtol
        self.x = self.z = x
        self.base: DesignEvaluation | None = None
        self.residual = math.inf
        self.reason: StopReason | None = None
        self.s, self.slope, self.tau = np.zeros_like(x), 0.0, 1.0
        self.count, self.measure = 0, True
        self.mark, self.since_mark = math.inf, 0
        self.exact: DesignEvaluation | None = None
        self.rejections = 0
        self.smallest, self.idle = math.inf, 0
        self.not_quadratic = False

    @property
    def tolerance(self) -> float:
        """The norm of the gradient that ends the run."""
        return max(self.gtol_abs, self.gtol_rel * (self.first_norm or 0.0))

    def resume(self, reason: StopReason | None) -> None:
        """Continue from a restored state, unless the run has ended and its end still holds."""
        if reason is StopReason.GRADIENT and self.exact.norm > self.tolerance:
            reason = None
        self.reason = reason

    def iterate(self, iteration: int) -> OneShotRecord:
        """One iteration of the solvers at z, and the decision on z."""
        step_norm, pairs = math.sqrt(self.inner(self.s, self.s)), len(self.B)
        found = self.solvers.evaluate(self.z, iteration, self.x)
        if found is None and self.z is self.x:
            raise self.solvers.problem.no_value(
                f"iteration {iteration}: J is not finite at the first or an accepted design", self.x
            )
        self.count += 1
        update = self._decide(found, iteration)
        if iteration == 0:
            update = DesignUpdate.FIRST
        if found is None:
            found = DesignEvaluation(self.z, math.nan, self.z, math.nan, math.nan, math.nan)
        return OneShotRecord(iteration, found.value, found.norm, found.error, found.residual, step_norm, pairs, update)

    def _decide(self, found: DesignEvaluation | None, iteration: int) -> DesignUpdate:
        """Hold, accept or reject z, and set the next design."""
        if found is not None and found.residual <= 0.5 * self.mark:
            self.mark, self.since_mark = found.residual, 0
        self.since_mark += 1
        stalls = self.since_mark >= self.hold_max_it
        if self.z is self.x:
            self.residual = found.residual
            if self._is_accurate(found):
                self._set_base(found)
                self._leave(iteration, stalls)
            if stalls and self.z is self.x and self.reason is None:
                self.reason = StopReason.ACCURACY
            return DesignUpdate.HELD
        if found is None:
            factor = _SHORTEST
        elif self._is_accurate(found):
            factor = self._step_fraction(found)
        elif stalls:
            factor = _LONGEST
        else:
            return DesignUpdate.HELD
        if factor < 1:
            if found is None or not self._is_accurate(found) or not self._retry_from_base(found):
                self._reject(factor, iteration)
            return DesignUpdate.REJECTED
        self._accept(found)
        self._leave(iteration, stalls)
        return DesignUpdate.ACCEPTED

    def _is_accurate(self, found: DesignEvaluation) -> bool:
        """Whether an evaluation is accurate enough to decide on a step and to compute the next one."""
        if self.measure and self.count == 1 and found.residual > 0:
            return False
        return found.error <= self.theta * max(found.norm, self.tolerance)

    def _set_base(self, found: DesignEvaluation) -> None:
        """Use an evaluation of x for the next steps; the first one scales tolerance and step."""
        if self.base is None:
            self.first_norm = found.norm
            if found.norm > 0:
                self.B.gamma = (self.initial_step or abs(found.value) / found.norm or 1.0) / found.norm
        self.base = found

    def _step_fraction(self, found: DesignEvaluation) -> float:
        """1 if the step is accepted, else the part of it to try next."""
        base, slope, slope_end, self.not_quadratic = self.base, self.slope, self.inner(found.g, self.s), False
        noise = base.value_error + found.value_error
        noise += self.value_rtol * max(abs(base.value), abs(found.value))
        rise = found.value - base.value
        if noise <= _VALUES_COUNT * abs(slope):
            fine = rise <= _DECREASE * slope + noise
        else:
            # an error larger than all of J is that of a design too far away, and hides any rise
            rises = rise > min(noise, base.value_error + abs(base.value) + abs(slope))
            fine = not rises and 0.5 * (slope + slope_end) <= _DECREASE * slope
        if fine:
            return 1.0
        zero = slope / (slope - slope_end) if slope_end > slope else math.inf
        trapezoid = 0.5 * (slope + slope_end)
        self.not_quadratic = zero < _SHORTEST and not abs(rise - trapezoid) <= _QUADRATIC * abs(trapezoid)
        return min(max(zero, _SHORTEST), _LONGEST)

    def _retry_from_base(self, found: DesignEvaluation) -> bool:
        """Update B by a rejected step, which contains more information on the Hessian than an accepted one, and step
        from x again; whether that was possible.
        """
        base, longest = self.base, math.sqrt(self.inner(self.s, self.s))
        if self.not_quadratic:
            self.solvers.discard_measurements()
            return False
        if self.rejections + 1 >= _PATIENCE or not self._update_operator(found):
            return False
        d = -self.B.apply(base.g)
        slope, length = self.inner(base.g, d), math.sqrt(self.inner(d, d))
        tau = min(1.0, longest * (_LONGEST if self.rejections else 1.0) / length) if length > 0 else 0.0
        if not 0 < length < math.inf or base.error * length > _DESCENT * abs(slope):
            return False
        self.rejections += 1
        self._set_step(tau * d, tau * slope, tau)
        return True

    def _update_operator(self, found: DesignEvaluation) -> bool:
        """Add the pair of the step to B; whether its curvature is accurate enough for that."""
        noise = self.base.error + found.error
        return self.B.update(self.s, found.g - self.base.g, noise=noise)

    def _reject(self, factor: float, iteration: int) -> None:
        """Try a part of the step from a more accurate evaluation of x, as an inaccurate one may be the reason."""
        self.rejections += 1
        if self.base.residual == 0:
            self._set_step(factor * self.s, factor * self.slope, factor * self.tau)
            return
        self.measure, self.tau = True, factor * self.tau
        self.theta = max(0.5 * self.theta, _FINEST * self.accuracy)
        self.s, self.slope = np.zeros_like(self.x), 0.0
        if self.rejections < _PATIENCE:
            self._move_to(self.x)
        else:
            self._use_exact(iteration)
            self._leave(iteration, stalls=False)

    def _use_exact(self, iteration: int) -> None:
        """Replace the evaluation of x by the accurate one, and measure errors by the difference."""
        exact = self.end(iteration)
        self.solvers.measure_by(exact, self.base)
        self.base = exact

    def _accept(self, found: DesignEvaluation) -> None:
        """Make z the accepted design, and add the pair of the step to B."""
        noise = self.base.error + found.error
        if self._update_operator(found):
            self.theta = min(self.accuracy, 2 * self.theta)
        elif noise > 0:
            self.theta = max(0.5 * self.theta, _FINEST * self.accuracy)
        if not len(self.B):  # without pairs the scale follows the steps, longer where J still falls at the end
            steep = self.inner(found.g, self.s) < 0.5 * self.slope
            self.B.gamma *= self.tau * (2 if steep else 1)
        self.x, self.base, self.residual, self.exact = self.z, found, found.residual, None
        self.measure, self.tau, self.rejections = False, 1.0, 0
        below = abs(self.slope) <= self.value_rtol * abs(found.value)
        self.idle = self.idle + 1 if below and found.norm >= self.smallest else 0
        self.smallest = min(self.smallest, found.norm)
        if self.idle == _IDLE:
            self.reason = StopReason.ROUND_OFF

    def _leave(self, iteration: int, stalls: bool) -> None:
        """Set a new design, hold x for a smaller residual or a better direction, or end."""
        self.s, self.slope = np.zeros_like(self.x), 0.0
        if self.base.norm <= self.tolerance:
            if self.base.residual > self.residual_tol:
                return
            exact = self.end(iteration)
            if exact.norm <= self.tolerance:
                self.reason = StopReason.GRADIENT
                return
            if self.base.residual == 0:  # neither a measurement nor a more accurate evaluation is possible
                self.reason = StopReason.ACCURACY
                return
            self._use_exact(iteration)
        d = -self.B.apply(self.base.g)
        slope = self.inner(self.base.g, d)
        if self.base.error * math.sqrt(self.inner(d, d)) > _DESCENT * abs(slope):
            if not stalls:
                return
            self.B.clear()  # the error of g is small enough for -g
            d = -self.B.apply(self.base.g)
            slope = self.inner(self.base.g, d)
        self._set_step(self.tau * d, self.tau * slope, self.tau)

    def _set_step(self, s: np.ndarray, slope: float, tau: float) -> None:
        """Move to the design x + s; end where s is below the round-off of x."""
        self.s, self.slope, self.tau = s, slope, tau
        self._move_to(self.x + s)
        if below_resolution(math.sqrt(self.inner(s, s)), math.sqrt(self.inner(self.x, self.x)), 0.0):
            self.reason = StopReason.RADIUS

    def _move_to(self, z: np.ndarray) -> None:
        """Evaluate z from the next iteration on."""
        self.z, self.count = z, 0
        self.mark, self.since_mark = math.inf, 0

    def end(self, iteration: int) -> DesignEvaluation:
        """The accurate J and gradient at x."""
        if self.exact is None and self.solvers.advance is None and self.base is not None:
            self.exact = self.base
        if self.exact is None:
            self.exact = self.solvers.evaluate_exactly(self.x, iteration, self.x)
        if self.exact is None:
            raise self.solvers.problem.no_value(
                f"iteration {iteration}: the accurate J is not finite at an accepted design", self.x
            )
        return self.exact

    def within(self, end: DesignEvaluation) -> bool:
        """Whether the accurate evaluation `end` meets the tolerances, for whatever reason the run has ended."""
        if self.first_norm is None:
            self.first_norm = end.norm
        return end.norm <= self.tolerance and self.residual <= self.residual_tol
