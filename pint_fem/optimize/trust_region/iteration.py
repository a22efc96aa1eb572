"""The trust-region iteration that the methods without and within bounds share.

They differ in the step that minimises the model in a ball: :mod:`pint_fem.optimize.trust_region.steihaug` without and
:mod:`pint_fem.optimize.trust_region.projected_step` within bounds. Acceptance, radius, forcing terms, preconditioner,
records, checkpoints and stopping are those of :mod:`pint_fem.optimize.trust_region.newton_cg`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pint_fem.optimize.argument_checks import (
    check,
    check_callable,
    check_checkpoint,
    check_choice,
    check_count,
    check_stopping,
)
from pint_fem.optimize.oracle import ExactOracle, Iterate
from pint_fem.optimize.preconditioners import make_preconditioner, merged_pairs
from pint_fem.optimize.protocol import Checkpoint, Preconditioner
from pint_fem.optimize.records import IterationRecord, StopReason, TrustRegionResult, header
from pint_fem.optimize.restart import RunState, restore, save
from pint_fem.optimize.trust_region.acceptance import (
    UNLIMITED,
    Step,
    below_resolution,
    next_radius,
    reduction_ratio,
)
from pint_fem.optimize.trust_region.forcing import first_forcing_term, next_forcing_term
from pint_fem.optimize.trust_region.projected_step import ProjectedSteps
from pint_fem.optimize.trust_region.steihaug import SteihaugPath

__all__ = ["NewtonOptions", "TrustRegionRun"]

Steps = SteihaugPath | ProjectedSteps


@dataclass(frozen=True, kw_only=True)
class NewtonOptions:
    """The options that the trust-region methods share; their meaning is documented in
    :func:`~pint_fem.optimize.trust_region.newton_cg.minimize_trust_region`.

    Raises
    ------
    InputError
        An option out of range; InputTypeError where it is of a wrong type.
    """

    gtol_rel: float = 1e-6
    gtol_abs: float = 0.0
    max_it: int = 50
    initial_radius: float | None = None
    max_radius: float = math.inf
    min_radius: float = 0.0
    eta: float = 1e-4
    hessian: str = "newton"
    cg_max_it: int = 100
    cg_rtol: float | None = None
    preconditioner: Preconditioner | str | None = None
    preconditioner_memory: int = 8
    value_rtol: float = 1e-12
    checkpoint: Checkpoint | None = None
    monitor: Callable[[str], object] | None = None
    callback: Callable[[np.ndarray, IterationRecord], object] | None = None

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check_stopping(self.gtol_rel, self.gtol_abs, self.max_it)
        low, high = self.min_radius, self.max_radius
        check("max_radius", high, "a number > 0, infinity included", lambda v: v > 0)
        check("min_radius", low, f"a number in [0, max_radius = {high})", lambda v: 0 <= v < high)
        if self.initial_radius is not None:
            allowed = f"a finite number above min_radius = {low} and up to max_radius = {high}, or None"
            check("initial_radius", self.initial_radius, allowed, lambda v: low < v <= high and v < math.inf)
        check("eta", self.eta, "a number in [0, 0.25)", lambda v: 0 <= v < 0.25)
        check_choice("hessian", self.hessian, ("newton", "gauss-newton"))
        check_count("cg_max_it", self.cg_max_it, 1)
        if self.cg_rtol is not None:
            check("cg_rtol", self.cg_rtol, "a number in (0, 1), or None", lambda v: 0 < v < 1)
        if isinstance(self.preconditioner, str):
            check_choice("preconditioner", self.preconditioner, ("limited-memory",))
        else:
            check_callable("preconditioner", self.preconditioner)
        check_count("preconditioner_memory", self.preconditioner_memory, 1)
        check("value_rtol", self.value_rtol, "a number in [0, 1)", lambda v: 0 <= v < 1)
        check_checkpoint(self.checkpoint)
        check_callable("monitor", self.monitor)
        check_callable("callback", self.callback)


class TrustRegionRun:
    """A run of a trust-region method.

    Parameters
    ----------
    oracle : ExactOracle
        J and its derivatives.
    options : NewtonOptions
        The options.
    x0 : ndarray, shape (n,)
        A vector of the space, for its shape.
    kind : str
        The method, as a checkpoint names it.

    Attributes
    ----------
    state : RunState or None
        The state of the run; None before the first iterate.
    preconditioner : callable or None
        The preconditioner of conjugate gradients.
    learns : bool
        Whether it is updated by pairs (d, H d).
    """

    #: The dataclass of the history's records.
    record_type: type[IterationRecord] = IterationRecord

    def __init__(self, oracle: ExactOracle, options: NewtonOptions, x0: np.ndarray, kind: str):
        self.oracle, self.options, self.kind = oracle, options, kind
        self.preconditioner, self.learns = make_preconditioner(options.preconditioner, oracle.inner)
        self.state = None
        if options.checkpoint is not None:
            self.state = restore(options.checkpoint, x0, oracle, kind, self.record_type)

    def minimise(
        self,
        start: np.ndarray,
        steps_at: Callable[[Iterate, int, float], Steps],
        cg_forcing: str | float,
    ) -> TrustRegionResult:
        """Run from `start`, or from the restored state, to the end.

        Parameters
        ----------
        start : ndarray, shape (n,)
            First guess.
        steps_at : callable
            ``steps_at(iterate, iteration, tolerance)``: the steps at an iterate by conjugate gradients up to a residual
            of this norm.
        cg_forcing : str or float
            Forcing term, as in :mod:`pint_fem.optimize.trust_region.forcing`.

        Returns
        -------
        TrustRegionResult
        """
        o, oracle = self.options, self.oracle
        if o.monitor is not None:
            o.monitor(self.header())
        if self.state is None:
            oracle.set_final_norm(o.gtol_abs)
            iterate, radius = oracle.first_iterate(start), None if o.initial_radius is None else float(o.initial_radius)
            self.state = RunState(iterate, iterate.gradient.norm, first_forcing_term(cg_forcing), radius)
            self._record(math.nan, math.nan, True, Step(start))
        elif self.state.pairs and self.learns:
            self.preconditioner.update(self.state.pairs)
        state = self.state
        tolerance = max(o.gtol_abs, o.gtol_rel * state.first_norm)
        oracle.set_final_norm(tolerance)

        steps, reason = None, _end(state.iterate, tolerance) or state.reason
        for iteration in range(len(state.history), o.max_it + 1):
            if reason is not None:
                break
            if steps is None:
                gradient = state.iterate.gradient
                oracle.prepare(state.iterate.x)
                steps = steps_at(state.iterate, iteration, max(state.forcing * gradient.norm, gradient.error))
            if self._step(steps, iteration, cg_forcing, tolerance):
                steps = None
            reason = _end(state.iterate, tolerance) or state.reason
            stopped = o.callback is not None and o.callback(state.iterate.x.copy(), state.history[-1])
            if stopped and reason is not StopReason.GRADIENT:
                reason = StopReason.CALLBACK
        return state.result(oracle.problem, reason or StopReason.MAX_IT)

    def header(self) -> str:
        """The line above those of the iterations."""
        return header(self.oracle.inexact)

    def _details(self, step: Step) -> dict[str, object]:
        """Further entries of the record of a step, which the class of the records has."""
        return {}

    def _step(self, steps: Steps, iteration: int, cg_forcing: str | float, tolerance: float) -> bool:
        """Try a step; whether the iterate or its gradient has changed, so that conjugate gradients start anew."""
        o, oracle, state = self.options, self.oracle, self.state
        if state.radius is None:
            state.radius = min(steps.first_radius(), float(o.max_radius))
        radius, step = state.radius, steps.step(state.radius)
        state.iterate, trial_value = oracle.compare(state.iterate, step.trial, step.reduction, iteration)
        before = state.iterate
        ratio, below_accuracy, accepted = reduction_ratio(
            before.value, trial_value, step.reduction, o.value_rtol, o.eta
        )
        state.radius, reduced = next_radius(radius, step, ratio, accepted=accepted, most=o.max_radius)
        if accepted:
            guess = before.gradient.norm
            g = oracle.trial_gradient(step.trial, iteration, before.x, guess=guess, radius=state.radius)
            if g is None:
                ratio, accepted = math.nan, False
                state.radius, reduced = next_radius(radius, step, ratio, accepted=False, most=o.max_radius)
        if not accepted and step.norm >= UNLIMITED:
            state.radius = min(state.radius, steps.first_radius())
        moved = False
        if accepted:
            errors = before.value.error + trial_value.error
            not_lower = trial_value.value + errors >= before.value.value and g.norm >= before.gradient.norm
            if below_accuracy and not_lower:
                accepted, state.reason = False, StopReason.ROUND_OFF
            else:
                moved = True
                self._accept(steps, step, Iterate(step.trial, trial_value, g), cg_forcing, tolerance)
        else:
            state.iterate = oracle.refined(before, iteration, state.radius)
            moved = state.iterate is not before
        x = state.iterate.x
        if reduced and below_resolution(state.radius, math.sqrt(oracle.inner(x, x)), o.min_radius):
            state.reason = StopReason.RADIUS
        self._record(radius, ratio, accepted, step)
        return moved

    def _accept(self, steps: Steps, step: Step, iterate: Iterate, cg_forcing: str | float, tolerance: float) -> None:
        """Move to the trial point, with its forcing term, and update the preconditioner."""
        state = self.state
        state.forcing = next_forcing_term(
            cg_forcing, last=state.forcing, norm=iterate.gradient.norm, norm_before=state.iterate.gradient.norm,
            model_norm=step.model_norm, first_norm=state.first_norm, final_norm=tolerance,
        )  # fmt: skip
        state.iterate = iterate
        pairs = steps.pairs(step.cg_iterations) if self.learns else []
        if pairs:
            state.pairs = merged_pairs(state.pairs, pairs, self.options.preconditioner_memory)
            self.preconditioner.update(state.pairs)

    def _record(self, radius: float, ratio: float, accepted: bool, step: Step) -> None:
        """Add a record to the history, save the state and print a line."""
        o, state, value, gradient = self.options, self.state, self.state.iterate.value, self.state.iterate.gradient
        state.history.append(
            self.record_type(
                len(state.history), value.value, gradient.norm, radius, step.norm, ratio, accepted, step.cg_iterations,
                step.stop, value.tolerance, value.error, gradient.tolerance, gradient.error,
                step.rtol or self.oracle.model_rtol, **self._details(step),
            )
        )  # fmt: skip
        if o.checkpoint is not None:
            save(o.checkpoint, state, self.oracle, self.kind)
        if o.monitor is not None:
            o.monitor(str(state.history[-1]))


def _end(iterate: Iterate, tolerance: float) -> StopReason | None:
    """Whether the gradient ends the run: certainly small enough, or dominated by its error."""
    gradient = iterate.gradient
    if gradient.norm + gradient.error <= tolerance:
        return StopReason.GRADIENT
    return StopReason.ACCURACY if 2 * gradient.error > gradient.norm else None
