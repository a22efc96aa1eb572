"""The iteration of primal-dual active sets for quadratic functions, and its safeguard.

The mathematics and the symbols are those of :mod:`pint_fem.optimize.active_set.method`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import numpy as np

from pint_fem.optimize.active_set.records import ActiveSetRecord, active_set_header
from pint_fem.optimize.active_set.reduced_system import newton_step
from pint_fem.optimize.active_set.sets import LOWER, UPPER, ZERO, ActiveSets
from pint_fem.optimize.active_set.steps import ActiveSetStep, ActiveSetSteps, NonsmoothOracle
from pint_fem.optimize.oracle import Iterate
from pint_fem.optimize.preconditioners import merged_pairs
from pint_fem.optimize.records import CGStop, StopReason, TrustRegionResult
from pint_fem.optimize.restart import RunState
from pint_fem.optimize.trust_region.acceptance import UNLIMITED, Step
from pint_fem.optimize.trust_region.forcing import first_forcing_term
from pint_fem.optimize.trust_region.iteration import NewtonOptions, TrustRegionRun

__all__ = ["ActiveSetRun"]

# Residual of conjugate gradients relative to the norm of the subgradient, for quadratic functions and piecewise ones.
_CG_RTOL = {True: 1e-3, "piecewise": 1e-4}

# Conjugate gradients need not go far below the norm at which the run ends.
_OF_FINAL_NORM = 0.5

# Primal-dual steps after which the trust region takes over, if in none of them fewer components have changed their sets
# or the norm of the subgradient has been smaller than before.
_PATIENCE = 3

# Such steps for a piecewise quadratic function, which may change sets of its own.
_PATIENCE_OF_PIECES = 8

# Norms of two iterates of the primal-dual method that are the same up to round-off.
_SAME = 1e-9


class ActiveSetRun(TrustRegionRun):
    """A run of the primal-dual active-set method.

    Parameters
    ----------
    oracle : NonsmoothOracle
        F and the derivatives of J.
    options : NewtonOptions
        The options.
    x0 : ndarray, shape (n,)
        A vector of the space, for its shape.
    kind : str
        The method, as a checkpoint names it.
    """

    record_type = ActiveSetRecord

    def __init__(self, oracle: NonsmoothOracle, options: NewtonOptions, x0: np.ndarray, kind: str):
        self._one_factor = not math.isnan(oracle.c)  # before a factor is restored
        super().__init__(oracle, options, x0, kind)
        self.nonsmooth = oracle

    def run(self, start: np.ndarray, *, quadratic: bool | str) -> TrustRegionResult:
        """Run from `start`, a point within the bounds, or from the restored state, to the end.

        Parameters
        ----------
        start : ndarray, shape (n,)
            First guess.
        quadratic : bool or "piecewise"
            Whether J is a quadratic function, or a piecewise one: then the run begins without a trust region.

        Returns
        -------
        TrustRegionResult
        """
        o, oracle = self.options, self.nonsmooth
        forcing = o.cg_rtol or "superlinear"
        if self.state is None:
            oracle.is_pure = bool(quadratic)
            oracle.set_final_norm(o.gtol_abs)
            radius = None if o.initial_radius is None else float(o.initial_radius)
            if quadratic is True and radius is None:  # the model is J itself: a bound would only cut steps short
                radius = min(UNLIMITED, float(o.max_radius))
            iterate = oracle.first_iterate(start)
            self.state = RunState(iterate, iterate.gradient.norm, first_forcing_term(forcing), radius)
            if math.isnan(oracle.c):
                oracle.c = self._step_of_steepest_descent(iterate)
            sets = self._sets_at(iterate)
            if quadratic:
                self.state.further["sets"] = sets.labels.astype(np.float64)
            self._record(math.nan, math.nan, True, ActiveSetStep(start, sets=sets))
        elif oracle.is_pure and self.state.pairs and self.learns:
            self.preconditioner.update(self.state.pairs)
        if oracle.is_pure:
            reason = self._primal_dual(max(o.gtol_abs, o.gtol_rel * self.state.first_norm), quadratic)
            if reason is not None:
                return self.state.result(oracle.problem, reason)
        return self.minimise(start, self._steps_at, forcing)

    def header(self) -> str:
        """The line above those of the iterations."""
        return active_set_header()

    def _steps_at(self, iterate: Iterate, iteration: int, tolerance: float) -> ActiveSetSteps:
        return ActiveSetSteps(
            self.nonsmooth, iterate, tolerance=tolerance, max_it=self.options.cg_max_it,
            preconditioner=self.preconditioner, iteration=iteration,
        )  # fmt: skip

    def _sets_at(self, iterate: Iterate) -> ActiveSets:
        return self.nonsmooth.part.sets(iterate.x, iterate.gradient.vector, self.nonsmooth.c)

    def _step_of_steepest_descent(self, iterate: Iterate) -> float:
        """The minimiser of the model along the least subgradient: the factor c, of the unit that it has to have."""
        d = -self.nonsmooth.part.least_subgradient(iterate.x, iterate.gradient.vector)
        slope = self.nonsmooth.inner(d, d)
        if not slope > 0:
            return 1.0
        _, curvature, _ = self.nonsmooth.curvature(iterate.x, d, slope, 0, math.nan)
        c = slope / curvature if curvature > 0 else 1.0
        return c if 0 < c < math.inf else 1.0

    # -- without a trust region ----------------------------------------------------------------------------------------
    def _primal_dual(self, tolerance: float, quadratic: bool | str) -> StopReason | None:
        """Steps of the primal-dual method; why the run ended, or None where the trust region has to go on."""
        o, oracle, state = self.options, self.nonsmooth, cast(RunState, self.state)
        if o.monitor is not None:
            o.monitor(self.header())
        reason: StopReason | None = self._end_within(tolerance)
        why = ""
        for iteration in range(len(state.history), o.max_it + 1):
            if reason is not None or why:
                break
            why = self._primal_dual_step(iteration, tolerance, o.cg_rtol or _CG_RTOL[quadratic])
            if why:
                break
            reason = self._end_within(tolerance)
            stopped = o.callback is not None and o.callback(state.iterate.x.copy(), state.history[-1])
            if reason is None and stopped:
                reason = StopReason.CALLBACK
            why = self._recurs(pieces=quadratic == "piecewise")
        if reason is None and not why:
            reason = StopReason.MAX_IT
        if not oracle.is_within(state.iterate.x):
            self._move_within()
        if reason is None:
            oracle.is_pure = False
            del state.further["sets"]
            if o.monitor is not None:
                o.monitor(f"{why}: from here on steps of a trust region")
        return reason

    def _primal_dual_step(self, iteration: int, tolerance: float, cg_rtol: float) -> str:
        """One step; why none was possible, or an empty text."""
        o, oracle, state = self.options, self.nonsmooth, cast(RunState, self.state)
        iterate, sets = state.iterate, oracle.part.with_labels(state.further["sets"].astype(np.int8))
        z, g, norm = iterate.x, iterate.gradient.vector, iterate.gradient.norm
        oracle.prepare(z)
        found = newton_step(
            oracle, z, g, sets, tolerance=max(cg_rtol * norm, _OF_FINAL_NORM * tolerance),
            max_it=o.cg_max_it, preconditioner=self.preconditioner, iteration=iteration, keep_pairs=self.learns,
        )  # fmt: skip
        if found.stop is CGStop.NEGATIVE_CURVATURE:
            return "J has a direction without curvature"
        trial = np.where(sets.held, sets.target, z + found.s)
        value = oracle.estimate(trial)
        gradient = oracle.trial_gradient(trial, iteration, z) if math.isfinite(value.value) else None
        if gradient is None:
            return "J is not finite at the trial point"
        predicted = -(oracle.inner(g, found.s) + 0.5 * oracle.inner(found.s, found.hs))
        predicted += oracle.part.penalty(z) - oracle.part.penalty(trial)
        noise = o.value_rtol * max(abs(value.value), abs(iterate.value.value))
        ratio = (iterate.value.value - value.value) / predicted if abs(predicted) > noise else 1.0
        state.iterate = Iterate(trial, value, gradient)
        following = self._sets_at(state.iterate)
        if not self._one_factor:
            following = oracle.part.next_sets(sets, trial, gradient.vector, oracle.c)
        state.further["sets"] = following.labels.astype(np.float64)
        if found.pairs:
            state.pairs = merged_pairs(state.pairs, found.pairs, o.preconditioner_memory)
            self.preconditioner.update(state.pairs)
        length = math.sqrt(oracle.inner(found.s, found.s))
        self._record(
            math.inf, ratio, True, ActiveSetStep(trial, length, predicted, found.products, found.stop, sets=sets)
        )
        return ""

    def _end_within(self, tolerance: float) -> StopReason | None:
        """Whether the iterate, or the point of the box next to it, satisfies the first-order conditions."""
        state = cast(RunState, self.state)
        if state.iterate.gradient.norm <= tolerance and not self.nonsmooth.is_within(state.iterate.x):
            self._move_within()
        return StopReason.GRADIENT if state.iterate.gradient.norm <= tolerance else None

    def _move_within(self) -> None:
        """Replace the iterate, and its record, by the next point within the bounds."""
        oracle, state = self.nonsmooth, cast(RunState, self.state)
        x = oracle.part.box.project(state.iterate.x)
        state.iterate = oracle.first_iterate(x)
        state.further["sets"] = self._sets_at(state.iterate).labels.astype(np.float64)
        norm, value = state.iterate.gradient.norm, state.iterate.value.value
        state.history[-1] = replace(state.history[-1], value=value, gradient_norm=norm)

    def _recurs(self, *, pieces: bool) -> str:
        """Why the sequence does not converge, or an empty text: an earlier iterate has come again, as the next one
        depends on the sets alone, or the last ones are no better than those before.
        """
        history = [cast(ActiveSetRecord, record) for record in cast(RunState, self.state).history]
        last, norms = history[-1], [record.gradient_norm for record in history]
        if (last.changed or pieces) and any(
            _sizes(record) == _sizes(last) and abs(record.gradient_norm - last.gradient_norm) <= _SAME * norms[-1]
            for record in history[1:-1]
        ):
            return "the active sets recur"
        if pieces:  # the first guess may violate nothing
            most, best = _PATIENCE_OF_PIECES, 1 + int(np.argmin(norms[1:]))
        else:
            changes = [record.changed for record in history[1:]]
            most, best = _PATIENCE, max(int(np.argmin(norms)), 1 + int(np.argmin(changes)))
        if len(norms) - 1 - best >= most:
            return f"{most} active-set steps have changed the sets without coming closer to a minimum"
        return ""

    # -- records -------------------------------------------------------------------------------------------------------
    def _details(self, step: Step) -> dict[str, object]:
        """The sizes of the sets of a step, and how many components are in another one at the iterate."""
        state, problem = cast(RunState, self.state), self.nonsmooth.problem
        sets = cast(ActiveSetStep, step).sets
        if sets is None:
            return {}
        labels, after = sets.labels, state.further.get("sets")
        after = self._sets_at(state.iterate).labels if after is None else after
        owned = getattr(problem, "owned", np.ones(labels.shape, dtype=bool))
        kinds = (labels == LOWER, labels == UPPER, labels == ZERO, ~sets.held, labels != after)
        own = np.array([np.count_nonzero(kind & owned) for kind in kinds])
        total = problem.comm.allreduce(own)
        names = ("at_lower", "at_upper", "at_zero", "free", "changed")
        globalised = cast(ActiveSetStep, step).globalised
        return dict(zip(names, map(int, total), strict=True)) | {"globalised": globalised}


def _sizes(record: ActiveSetRecord) -> tuple[int, ...]:
    return record.at_lower, record.at_upper, record.at_zero, record.free, record.changed
