r"""The state of a simultaneous optimisation between two iterations, and what one iteration does to it.

The method is that of :mod:`pint_fem.optimize.one_shot.method`.
"""

from __future__ import annotations

import math

import numpy as np

from pint_fem.optimize.lbfgs import InverseLBFGS
from pint_fem.optimize.one_shot.records import DesignUpdate, OneShotRecord
from pint_fem.optimize.one_shot.running_solvers import Reading, RunningSolvers
from pint_fem.optimize.records import StopReason
from pint_fem.optimize.trust_region.acceptance import is_lost

__all__ = ["Run"]

# delta: part of the linear model's reduction that a step must achieve.
_DECREASE = 1e-4

# Share of |(g, s)| the errors of J may have for values of J to judge a step.
_VALUES_COUNT = 0.1

# e |d| may be this part of |(g, d)|.
_DESCENT = 0.5

# A shortened step keeps between these parts of its length.
_SHORTEST, _LONGEST = 0.1, 0.5

# The relative error asked of g is not halved below this part of `accuracy`.
_FINEST = 1e-2

# A step along which the slope vanishes within its `_SHORTEST` part is learned from only where J rises as a quadratic
# with these slopes would, up to this part of that. A fourth power is off by 0.5, an exponential by nearly 1.
_QUADRATIC = 0.4

# After so many rejected steps in succession x is solved accurately.
_PATIENCE = 3

# Accepted steps that lower neither J by more than its accuracy nor the smallest |g|, before the run ends.
_IDLE = 10


class Run:
    """The state between two iterations: the accepted design x, and the design z whose solution is under way.

    All attributes but the options are in a checkpoint (:mod:`pint_fem.optimize.one_shot.restart`).

    Attributes
    ----------
    x, z : ndarray
        The same array where the accepted design is held.
    s, slope, tau : ndarray, float, float
        z - x, (g, s), and s as part of the step -B g.
    base, exact : Reading or None
        The last reading of x that was accurate enough, None before the first; an accurate one, if there was any.
    first_norm : float or None
        Norm of the first such gradient.
    theta : float
        Relative error that is allowed at present.
    residual : float
        Of the last reading of x.
    count, measure : int, bool
        Readings of z, and whether one is not enough.
    mark, since_mark : float, int
        The residual of z when it last halved, and readings since.
    rejections : int
        In succession.
    smallest, idle : float, int
        The smallest norm of a gradient so far, and steps below the accuracy of J without a smaller one.
    reason : StopReason or None
        Why the run has ended, if so.
    wild : bool
        Whether the step judged last led where J is no quadratic any more that has to do with J at x: it is shortened,
        but its curvature is that of another place. Nothing that lasts.
    """

    def __init__(
        self,
        solvers: RunningSolvers,
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
        self.base: Reading | None = None
        self.residual = math.inf
        self.reason: StopReason | None = None
        self.s, self.slope, self.tau = np.zeros_like(x), 0.0, 1.0
        self.count, self.measure = 0, True
        self.mark, self.since_mark = math.inf, 0
        self.exact: Reading | None = None
        self.rejections = 0
        self.smallest, self.idle = math.inf, 0
        self.wild = False

    @property
    def tolerance(self) -> float:
        """The norm of the gradient that ends the run."""
        return max(self.gtol_abs, self.gtol_rel * (self.first_norm or 0.0))

    def resume(self, reason: StopReason | None) -> None:
        """Go on from a restored state, unless it was the end and still is."""
        if reason is StopReason.GRADIENT and self.exact.norm > self.tolerance:
            reason = None
        self.reason = reason

    def iterate(self, iteration: int) -> OneShotRecord:
        """One iteration of the solvers at z and what follows from it."""
        step_norm, pairs = math.sqrt(self.inner(self.s, self.s)), len(self.B)
        reading = self.solvers.read(self.z, iteration, self.x)
        if reading is None and self.z is self.x:
            raise self.solvers.exact.no_value(
                f"iteration {iteration}: J is not finite at the first or an accepted design", self.x
            )
        self.count += 1
        update = self._decide(reading, iteration)
        if iteration == 0:
            update = DesignUpdate.FIRST
        if reading is None:
            reading = Reading(self.z, math.nan, self.z, math.nan, math.nan, math.nan)
        return OneShotRecord(
            iteration, reading.value, reading.norm, reading.error, reading.residual, step_norm, pairs, update
        )

    def _decide(self, reading: Reading | None, iteration: int) -> DesignUpdate:
        if reading is not None and reading.residual <= 0.5 * self.mark:
            self.mark, self.since_mark = reading.residual, 0
        self.since_mark += 1
        stalls = self.since_mark >= self.hold_max_it
        if self.z is self.x:
            self.residual = reading.residual
            if self._believed(reading):
                self._start(reading)
                self._depart(iteration, stalls)
            if stalls and self.z is self.x and self.reason is None:
                self.reason = StopReason.ACCURACY
            return DesignUpdate.HELD
        if reading is None:
            factor = _SHORTEST
        elif self._believed(reading):
            factor = self._judge(reading)
        elif stalls:
            factor = _LONGEST
        else:
            return DesignUpdate.HELD
        if factor < 1:
            if reading is None or not self._believed(reading) or not self._retry(reading):
                self._reject(factor, iteration)
            return DesignUpdate.REJECTED
        self._accept(reading)
        self._depart(iteration, stalls)
        return DesignUpdate.ACCEPTED

    def _believed(self, reading: Reading) -> bool:
        """Whether a reading is accurate enough to judge a step by and to take the next one from."""
        if self.measure and self.count == 1 and reading.residual > 0:
            return False
        return reading.error <= self.theta * max(reading.norm, self.tolerance)

    def _start(self, reading: Reading) -> None:
        """Take over a reading of x; the first one scales tolerance and step."""
        if self.base is None:
            self.first_norm = reading.norm
            if reading.norm > 0:
                self.B.gamma = (self.initial_step or abs(reading.value) / reading.norm or 1.0) / reading.norm
        self.base = reading

    def _judge(self, reading: Reading) -> float:
        """1 if the step is accepted, else the part of it to try next."""
        base, slope, slope_end, self.wild = self.base, self.slope, self.inner(reading.g, self.s), False
        noise = base.value_error + reading.value_error
        noise += self.value_rtol * max(abs(base.value), abs(reading.value))
        rise = reading.value - base.value
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
        self.wild = zero < _SHORTEST and not abs(rise - trapezoid) <= _QUADRATIC * abs(trapezoid)
        return min(max(zero, _SHORTEST), _LONGEST)

    def _retry(self, reading: Reading) -> bool:
        """Learn from a rejected step, which says more of the Hessian than an accepted one, and step from x again."""
        base, longest = self.base, math.sqrt(self.inner(self.s, self.s))
        if self.wild:
            self.solvers.disregard()
            return False
        if self.rejections + 1 >= _PATIENCE or not self._learn(reading):
            return False
        d = -self.B.apply(base.g)
        slope, length = self.inner(base.g, d), math.sqrt(self.inner(d, d))
        tau = min(1.0, longest * (_LONGEST if self.rejections else 1.0) / length) if length > 0 else 0.0
        if not 0 < length < math.inf or base.error * length > _DESCENT * abs(slope):
            return False
        self.rejections += 1
        self._go(tau * d, tau * slope, tau)
        return True

    def _learn(self, reading: Reading) -> bool:
        """Use the step to the reading's design as a pair; whether its curvature is known well enough."""
        noise = self.base.error + reading.error
        return self.B.update(self.s, reading.g - self.base.g, noise=noise)

    def _reject(self, factor: float, iteration: int) -> None:
        """Try a part of the step: from a better reading of x, as the one it was judged by may be what is wrong."""
        self.rejections += 1
        if self.base.residual == 0:
            self._go(factor * self.s, factor * self.slope, factor * self.tau)
            return
        self.measure, self.tau = True, factor * self.tau
        self.theta = max(0.5 * self.theta, _FINEST * self.accuracy)
        self.s, self.slope = np.zeros_like(self.x), 0.0
        if self.rejections < _PATIENCE:
            self._look_at(self.x)
        else:
            self._take_exactly(iteration)
            self._depart(iteration, stalls=False)

    def _take_exactly(self, iteration: int) -> None:
        """Replace the reading of x by an accurate one, and learn from the difference."""
        exact = self.end(iteration)
        self.solvers.compare(self.base, exact)
        self.base = exact

    def _accept(self, reading: Reading) -> None:
        """Make z the design, and learn from the step."""
        noise = self.base.error + reading.error
        if self._learn(reading):
            self.theta = min(self.accuracy, 2 * self.theta)
        elif noise > 0:
            self.theta = max(0.5 * self.theta, _FINEST * self.accuracy)
        if not len(self.B):  # the scale is all that is known: follow the steps, longer where J still falls at the end
            steep = self.inner(reading.g, self.s) < 0.5 * self.slope
            self.B.gamma *= self.tau * (2 if steep else 1)
        self.x, self.base, self.residual, self.exact = self.z, reading, reading.residual, None
        self.measure, self.tau, self.rejections = False, 1.0, 0
        below = abs(self.slope) <= self.value_rtol * abs(reading.value)
        self.idle = self.idle + 1 if below and reading.norm >= self.smallest else 0
        self.smallest = min(self.smallest, reading.norm)
        if self.idle == _IDLE:
            self.reason = StopReason.ROUND_OFF

    def _depart(self, iteration: int, stalls: bool) -> None:
        """Leave x for a new design, hold it for a smaller residual or a better direction, or end."""
        self.s, self.slope = np.zeros_like(self.x), 0.0
        if self.base.norm <= self.tolerance:
            if self.base.residual > self.residual_tol:
                return
            exact = self.end(iteration)
            if exact.norm <= self.tolerance:
                self.reason = StopReason.GRADIENT
                return
            if self.base.residual == 0:  # nothing to be measured, and nothing more to be had
                self.reason = StopReason.ACCURACY
                return
            self._take_exactly(iteration)
        d = -self.B.apply(self.base.g)
        slope = self.inner(self.base.g, d)
        if self.base.error * math.sqrt(self.inner(d, d)) > _DESCENT * abs(slope):
            if not stalls:
                return
            self.B.forget()  # the error of g is small enough for -g
            d = -self.B.apply(self.base.g)
            slope = self.inner(self.base.g, d)
        self._go(self.tau * d, self.tau * slope, self.tau)

    def _go(self, s: np.ndarray, slope: float, tau: float) -> None:
        self.s, self.slope, self.tau = s, slope, tau
        self._look_at(self.x + s)
        if is_lost(math.sqrt(self.inner(s, s)), math.sqrt(self.inner(self.x, self.x)), 0.0):
            self.reason = StopReason.RADIUS

    def _look_at(self, z: np.ndarray) -> None:
        self.z, self.count = z, 0
        self.mark, self.since_mark = math.inf, 0

    def end(self, iteration: int) -> Reading:
        """The accurate J and gradient at x."""
        if self.exact is None and self.solvers.advance is None and self.base is not None:
            self.exact = self.base
        if self.exact is None:
            self.exact = self.solvers.read_exactly(self.x, iteration, self.x)
        if self.exact is None:
            raise self.solvers.exact.no_value(
                f"iteration {iteration}: the accurate J is not finite at an accepted design", self.x
            )
        return self.exact

    def within(self, end: Reading) -> bool:
        """Whether this is an end that was asked for, however the run came to it."""
        if self.first_norm is None:
            self.first_norm = end.norm
        return end.norm <= self.tolerance and self.residual <= self.residual_tol
