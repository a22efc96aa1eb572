"""The iteration of composite steps: trial points, acceptance, radius, penalty, corrections and breakdowns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pint_fem.errors import SolverFailure
from pint_fem.optimize.argument_checks import check, check_callable, check_count, check_stopping
from pint_fem.optimize.composite_step.merit import INEXACT, Prediction
from pint_fem.optimize.composite_step.points import Point, evaluate, first_point
from pint_fem.optimize.composite_step.protocol import GuardedConstrainedProblem
from pint_fem.optimize.composite_step.records import CompositeStepRecord, CompositeStepResult, composite_header
from pint_fem.optimize.composite_step.steps import LocalModel
from pint_fem.optimize.oracle import Estimate
from pint_fem.optimize.records import CGStop, StopReason
from pint_fem.optimize.trust_region.acceptance import (
    UNLIMITED,
    Step,
    below_resolution,
    next_radius,
    reduction_ratio,
)

__all__ = ["CompositeOptions", "CompositeRun"]

SHARE = 0.8
"""Share of the radius within which the quasi-normal step stays (zeta)."""
LOOSE = 1e-2
"""Largest tolerance of linear solves whose residual is monitored."""
TIGHTENINGS = 4
"""How often the tangential step is solved for again with a smaller tolerance, at most."""
KKT_FAILURES = 2
"""Iterations in a row in which KKT solves break down, after which the run ends."""
STAGNATION = 12
"""Iterations without progress after which the run ends."""
PROGRESS = 0.1
"""Relative decrease of the Lagrangian that is progress, as a halving of the gradient or of the constraint is."""


@dataclass(frozen=True, kw_only=True)
class CompositeOptions:
    """The options of :func:`~pint_fem.optimize.composite_step.method.minimize_composite_step`.

    Raises
    ------
    InputError
        An option out of range; InputTypeError where it is of a wrong type.
    """

    gtol_rel: float = 1e-6
    gtol_abs: float = 0.0
    ctol_rel: float = 1e-8
    ctol_abs: float = 0.0
    max_it: int = 50
    initial_radius: float | None = None
    max_radius: float = math.inf
    min_radius: float = 0.0
    eta: float = 1e-4
    cg_max_it: int = 100
    cg_rtol: float | None = None
    use_kkt: bool = True
    value_rtol: float = 1e-12
    monitor: Callable[[str], object] | None = None
    callback: Callable[[np.ndarray, CompositeStepRecord], object] | None = None

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check_stopping(self.gtol_rel, self.gtol_abs, self.max_it)
        check("ctol_rel", self.ctol_rel, "a number in [0, 1)", lambda v: 0 <= v < 1)
        check("ctol_abs", self.ctol_abs, "a finite number >= 0", lambda v: 0 <= v < math.inf)
        low, high = self.min_radius, self.max_radius
        check("max_radius", high, "a number > 0, infinity included", lambda v: v > 0)
        check("min_radius", low, f"a number in [0, max_radius = {high})", lambda v: 0 <= v < high)
        if self.initial_radius is not None:
            allowed = f"a finite number above min_radius = {low} and up to max_radius = {high}, or None"
            check("initial_radius", self.initial_radius, allowed, lambda v: low < v <= high and v < math.inf)
        check("eta", self.eta, "a number in [0, 0.25)", lambda v: 0 <= v < 0.25)
        check_count("cg_max_it", self.cg_max_it, 1)
        if self.cg_rtol is not None:
            check("cg_rtol", self.cg_rtol, "a number in (0, 1), or None", lambda v: 0 < v < 1)
        check("value_rtol", self.value_rtol, "a number in [0, 1)", lambda v: 0 <= v < 1)
        check_callable("monitor", self.monitor)
        check_callable("callback", self.callback)


@dataclass(frozen=True)
class _Trial:
    """A composite step: its parts, the point it leads to, and the predicted reductions."""

    theta: float
    step: Step
    norm: float
    du: np.ndarray
    point: Point | None
    prediction: Prediction
    note: str = ""


class CompositeRun:
    """A run of composite steps.

    Parameters
    ----------
    problem : GuardedConstrainedProblem
        The problem.
    options : CompositeOptions
        The options.

    Attributes
    ----------
    point : Point
        The iterate.
    radius, state_scale : float or None
        Radius, and ratio of the norms of control and state in tangential steps; None before the first step.
    penalty : float
        Penalty of the merit function.
    history : list of CompositeStepRecord
        Records.
    breakdown : str
        Why the run ended early.
    """

    def __init__(self, problem: GuardedConstrainedProblem, options: CompositeOptions):
        self.problem, self.options = problem, options
        self.radius = None if options.initial_radius is None else float(options.initial_radius)
        self.state_scale: float | None = None
        self.penalty, self.breakdown = 0.0, ""
        self.history: list[CompositeStepRecord] = []
        self._model: LocalModel | None = None
        self._kkt_failures, self._best = 0, (math.inf, math.inf, math.inf, 0)

    # -- the loop ------------------------------------------------------------------------------------------------------
    def minimise(self, u: np.ndarray, z: np.ndarray) -> CompositeStepResult:
        """Run from a state and a control to the end."""
        o = self.options
        if o.monitor is not None:
            o.monitor(composite_header())
        self.point = first_point(self.problem, u, z)
        self._first_norm = self.point.gradient_norm
        self.tolerance = max(o.gtol_abs, o.gtol_rel * self._first_norm)
        squares = self.problem.inner_states(u, u)
        self.penalty = abs(self.point.value) / squares if squares > 0 else 1.0
        self._record(math.nan, math.nan, True, Step(z), "")
        reason = self._end()
        for iteration in range(1, o.max_it + 1):
            if reason is not None:
                break
            try:
                reason = self._iterate(iteration)
            except SolverFailure as failure:
                self.breakdown, reason = f"a linear solve failed: {failure}", StopReason.BREAKDOWN
                break
            reason = self._end() or reason
            stopped = o.callback is not None and o.callback(self.point.z.copy(), self.history[-1])
            if stopped and reason is not StopReason.GRADIENT:
                reason = StopReason.CALLBACK
        return self._result(reason or StopReason.MAX_IT)

    @property
    def constraint_tolerance(self) -> float:
        """The norm of the constraint up to which it holds."""
        o = self.options
        return max(o.ctol_abs, o.ctol_rel * self.problem.state_norm(self.point.u))

    def _end(self) -> StopReason | None:
        """Whether gradient and constraint are small enough."""
        met = self.point.gradient_norm <= self.tolerance and self.point.constraint_norm <= self.constraint_tolerance
        return StopReason.GRADIENT if met else None

    def _iterate(self, iteration: int) -> StopReason | None:
        """Try a step."""
        if self._model is None:
            self._model = self._new_model(iteration)
        model, before = self._model, self.point
        if self.radius is None:
            self.radius = min(model.first_radius(1.0), float(self.options.max_radius), UNLIMITED)
        trial = self._trial(model, before, self.radius)
        ratio, below, accepted = self._judge(before, trial)
        corrected = False
        if not accepted and trial.point is not None and self._is_spoilt_by_constraint(before, trial):
            better = self._corrected(trial)
            if better is not None:
                again = self._judge(before, better)
                if again[2]:
                    trial, corrected, (ratio, below, accepted) = better, True, again
        measured = Step(before.z, trial.norm, stop=CGStop.BOUNDARY if trial.theta < 1 else trial.step.stop)
        radius = self.radius
        self.radius, reduced = next_radius(radius, measured, ratio, accepted=accepted, most=self.options.max_radius)
        reason = None
        if accepted and below and not self._is_lower(before, trial.point):
            accepted, reason = False, StopReason.ROUND_OFF
            self.breakdown = "steps are below the accuracy of J"
        if accepted:
            self.point, self._model = trial.point, None
        size = self.problem.norm(self.point.z)
        if reduced and below_resolution(self.radius, size, self.options.min_radius):
            reason, self.breakdown = StopReason.RADIUS, "the trust region's radius became too small"
        self._record(radius, ratio, accepted, trial.step, trial.note, model, trial.norm, corrected)
        return reason or self._broken(model, accepted, iteration)

    def _new_model(self, iteration: int) -> LocalModel:
        """The model at the iterate, with tolerances that decrease with the gradient."""
        share = min(1.0, self.point.gradient_norm / self._first_norm) if self._first_norm > 0 else 1.0
        forcing = min(0.5, math.sqrt(share)) if self.options.cg_rtol is None else self.options.cg_rtol
        return LocalModel(
            self.problem, self.point, tolerance=max(forcing * self.point.gradient_norm, 0.1 * self.tolerance),
            rtol=LOOSE * share, kkt_rtol=min(LOOSE, 0.1 * forcing), cg_max_it=self.options.cg_max_it,
            negligible=0.01 * self.constraint_tolerance,
            iteration=iteration, preconditioned=self.options.use_kkt and self.problem.has_kkt_solve,
        )  # fmt: skip

    def _broken(self, model: LocalModel, accepted: bool, iteration: int) -> StopReason | None:
        """Whether KKT solves break down repeatedly, or there is no progress."""
        if accepted:
            self._kkt_failures = self._kkt_failures + 1 if model.fails else 0
        if self._kkt_failures >= KKT_FAILURES:
            self.breakdown = model.breakdown
            return StopReason.BREAKDOWN
        gradient, constraint, lagrangian, last = self._best
        point, norm = self.point, max(self.point.constraint_norm, self.constraint_tolerance)
        lower = not math.isfinite(lagrangian) or point.lagrangian < lagrangian - PROGRESS * abs(lagrangian)
        if point.gradient_norm <= 0.5 * gradient or norm <= 0.5 * constraint or lower:
            self._best = min(gradient, point.gradient_norm), min(constraint, norm), point.lagrangian, iteration
        elif iteration - last >= STAGNATION:
            self.breakdown = (
                f"neither the gradient ({point.gradient_norm:.1e}) nor the constraint ({norm:.1e}) has been halved, "
                f"nor has the Lagrangian become {PROGRESS:.0%} smaller, in {STAGNATION} iterations"
            )
            return StopReason.BREAKDOWN
        return None

    # -- a step --------------------------------------------------------------------------------------------------------
    def _trial(self, model: LocalModel, at: Point, radius: float) -> _Trial:
        """The composite step within a radius, and the point it leads to."""
        theta = 0.0
        if model.normal is not None:
            theta = 1.0 if self.state_scale is None else model.fraction(radius, self.state_scale, SHARE)
        step = model.tangential(theta, radius)
        after = (1 - theta) * at.constraint_norm + theta * model.normal_residual
        reduction = model.normal_reduction(theta) + step.reduction
        rtol, trial = model.rtol, None
        for _ in range(TIGHTENINGS + 1):
            du, residual = np.zeros_like(at.u), 0.0
            if step.norm > 0:
                du, residual = self.problem.tangent(at.u, at.z, step.trial, rtol)
            self._set_scales(model, step, du, radius)
            scale = 1.0 if self.state_scale is None else self.state_scale
            norm = max(scale * theta * model.normal_norm, step.norm)
            trial = self._tried(model, at, theta, step, norm, du, reduction, after)
            if trial.point is None or residual == 0:
                break
            self.penalty = trial.prediction.updated(self.penalty)
            change = self.problem.multiplier_norm(trial.point.lam - at.lam)
            error = trial.prediction.error(self.penalty, residual, change)
            if error <= INEXACT * max(trial.prediction(self.penalty), 0.0):
                break
            rtol *= 0.1
        if trial.point is not None:
            self.penalty = trial.prediction.updated(self.penalty)
        return trial

    def _set_scales(self, model: LocalModel, step: Step, du: np.ndarray, radius: float) -> None:
        """The ratio of the norms of control and state, once, and a first radius that the quasi-normal step fits in."""
        length = self.problem.state_norm(du) if self.state_scale is None and step.norm > 0 else 0.0
        if length > 0:
            self.state_scale = step.norm / length
            if self.options.initial_radius is None and not self.history[1:]:
                most = float(self.options.max_radius)
                self.radius = min(max(radius, self.state_scale * model.normal_norm / SHARE), most)

    def _tried(
        self, model: LocalModel, at: Point, theta: float, step: Step, norm: float, du: np.ndarray, reduction: float,
        after: float,
    ) -> _Trial:  # fmt: skip
        """The trial with everything at its end; no point where an evaluation fails."""
        u = at.u + du if theta == 0 else at.u + theta * model.normal + du
        try:
            point, note, multipliers = evaluate(self.problem, u, at.z + step.trial), "", 0.0
            if theta < 1 and at.constraint_norm > 0:
                multipliers = (1 - theta) * float(self.problem.pairing(point.lam - at.lam, at.c))
        except SolverFailure as failure:
            point, note, multipliers = None, f"no trial point: {' '.join(str(failure).split())}", 0.0
        prediction = Prediction(reduction, multipliers, at.constraint_norm, after)
        return _Trial(theta, step, norm, du, point, prediction, note)

    def _judge(self, before: Point, trial: _Trial) -> tuple[float, bool, bool]:
        """Ratio of reductions, whether they are below the accuracy of J, and whether the step is accepted."""
        if trial.point is None:
            return math.nan, False, False
        o, values = self.options, [Estimate(p.merit(self.penalty)) for p in (before, trial.point)]
        return reduction_ratio(*values, trial.prediction(self.penalty), o.value_rtol, o.eta)

    def _is_lower(self, before: Point, after: Point) -> bool:
        """Whether a step below the accuracy of J makes something smaller."""
        if after.merit(self.penalty) < before.merit(self.penalty) or after.gradient_norm < before.gradient_norm:
            return True
        return after.constraint_norm < before.constraint_norm and before.constraint_norm > self.constraint_tolerance

    # -- second-order correction ---------------------------------------------------------------------------------------
    def _is_spoilt_by_constraint(self, before: Point, trial: _Trial) -> bool:
        """Whether the step would be accepted if the constraint were as small as the model predicts."""
        point, predicted = trial.point, trial.prediction(self.penalty)
        most = trial.prediction.after
        if not (predicted > 0 and point.constraint_norm > most):
            return False
        return before.merit(self.penalty) - point.value - self.penalty * most**2 > self.options.eta * predicted

    def _corrected(self, trial: _Trial) -> _Trial | None:
        """The trial with a Newton step for the constraint at its end, by a change of the state; None where it fails."""
        point = trial.point
        try:
            du, _ = self.problem.solve_linearised(point.u, point.z, -point.c, LOOSE)
            length = (self.state_scale or 1.0) * self.problem.state_norm(du)
            if not length <= max(trial.norm, self.radius):
                return None
            corrected = evaluate(self.problem, point.u + du, point.z)
        except SolverFailure:  # the step is rejected as it is
            return None
        return _Trial(trial.theta, trial.step, trial.norm, trial.du, corrected, trial.prediction)

    # -- records -------------------------------------------------------------------------------------------------------
    def _record(
        self, radius: float, ratio: float, accepted: bool, step: Step, note: str, model: LocalModel | None = None,
        norm: float = 0.0, corrected: bool = False,
    ) -> None:  # fmt: skip
        """Add a record and print its line."""
        if model is not None and model.breakdown:
            note = f"{note}; {model.breakdown}" if note else model.breakdown
        self.history.append(
            CompositeStepRecord(
                len(self.history), self.point.value, self.point.gradient_norm, radius, norm, ratio, accepted,
                step.cg_iterations, step.stop, constraint_norm=self.point.constraint_norm,
                normal_norm=0.0 if model is None else model.normal_norm, penalty=self.penalty,
                kkt_iterations=0 if model is None else model.kkt_iterations, corrected=corrected, note=note,
            )
        )  # fmt: skip
        if self.options.monitor is not None:
            self.options.monitor(str(self.history[-1]))

    def _result(self, reason: StopReason) -> CompositeStepResult:
        """The result of the run."""
        calls, iterations = self.problem.calls, len(self.history) - 1
        return CompositeStepResult(
            self.point.z, self.point.value, self.point.gradient_norm, iterations, reason is StopReason.GRADIENT, reason,
            self.history, calls["value"], calls["gradient"], calls["lagrangian_hessian"], state=self.point.u,
            multipliers=self.point.lam, constraint_norm=self.point.constraint_norm, breakdown=self.breakdown,
            composite_steps=iterations,
        )  # fmt: skip
