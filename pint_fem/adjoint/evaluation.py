"""Trajectories, values and derivatives of the last controls at which a reduced problem was evaluated, and the solves
for them.

An evaluation is found by the value of its control, which all ranks compare at the same time: they either all use the
cached one or all solve anew, and a rank with another control, direction or tolerance is an error on every rank.

Solves may have a tolerance of their own (``rtol``): a trajectory that is cached to this tolerance or better is not
solved again, one that is less accurate is the first guess. ``cycles`` runs that many cycles instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from pint_fem.adjoint.consistency.control_values import ControlConsistency
from pint_fem.adjoint.consistency.user_data import UserData
from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.errors import FAILURES, SolverFailure
from pint_fem.evolution.control_layout import ControlLayout
from pint_fem.sweeps.sweeps import Sweeps

if TYPE_CHECKING:
    from pint_fem.adjoint.trajectories import CPointTrajectories, Source, StoredTrajectories

__all__ = ["Evaluation", "EvaluationCache", "relative_residual", "solve_for"]


class Evaluation:
    """Trajectories at one control, how accurately they are solved, and what was computed from them.

    Attributes
    ----------
    z : ndarray or None
        The control.
    U, L : ndarray, shape (k + 1, n)
        State and adjoint, or first guesses of them; at the C-points with ``storage="C"``.
    state, adjoint : SolveResult or None
        Results of their solves for this control; the adjoint's for the current state.
    rtol : dict
        Tolerances to which ``"state"`` and ``"adjoint"`` are solved.
    cold : dict
        Whether each of them holds no solution, so that the next solve starts from the initial condition or from zero.
    value, gradient : float, ndarray or None
        ``J`` and ``J'``.
    parts : dict
        Value of misfit and regularisation.
    controls : ndarray or None
        Part of the gradient that was computed with the adjoint's right-hand side.
    computed : dict
        What second derivatives of the steps have computed from state and adjoint alone.
    readings : list of ndarray or None
        Observations of each misfit, where the state is not stored at all points.
    """

    def __init__(self, sweeps: Sweeps):
        self.U, self.L = sweeps.new_slab(), sweeps.new_slab()
        self.reset(sweeps.initial)

    def reset(self, initial: np.ndarray) -> None:
        """Discard everything: solves start from the initial condition ``(n,)`` and from zero."""
        self.U[:], self.L[:] = initial, 0
        self.cold = {"state": True, "adjoint": True}
        self.move_to(None)

    def move_to(self, z: np.ndarray | None) -> None:
        """Set another control, for which the trajectories are first guesses."""
        self.z = None if z is None else z.copy()
        self.state: SolveResult | None = None
        self.rtol = {"state": np.inf, "adjoint": np.inf}
        self.state_changed()

    def state_changed(self) -> None:
        """Discard what was computed from the state."""
        self.adjoint: SolveResult | None = None
        self.rtol["adjoint"] = np.inf
        self.value: float | None = None
        self.gradient = self.controls = self.readings = None
        self.parts: dict[str, float] = {}
        self.computed: dict = {}


class EvaluationCache:
    """The last few evaluations, the latest first, and solves for their trajectories.

    Parameters
    ----------
    sweeps, trajectories
        The solvers, and the adjoint's right-hand side.
    layout
        The controls.
    data
        The user's data, which are checked for changes with each search.
    before_first_solve
        Called once, on all ranks.

    Attributes
    ----------
    evaluations : list of Evaluation
        At least one.
    """

    def __init__(
        self,
        sweeps: Sweeps,
        trajectories: StoredTrajectories | CPointTrajectories,
        layout: ControlLayout,
        data: UserData,
        before_first_solve: Callable | None,
    ):
        self._sweeps, self._layout, self._data, self._trajectories = sweeps, layout, data, trajectories
        self._consistency, self._before_first_solve = ControlConsistency(layout), before_first_solve
        self.evaluations = [Evaluation(sweeps)]

    @property
    def latest(self) -> Evaluation:
        """That of the last control."""
        return self.evaluations[0]

    def resize(self, count: int) -> None:
        """Store the last ``count`` evaluations."""
        del self.evaluations[count:]
        while len(self.evaluations) < count:
            self.evaluations.append(Evaluation(self._sweeps))

    def invalidate(self) -> None:
        """Discard all solutions: the next solves start from the initial condition and from zero."""
        self._sweeps.solvers.invalidate()
        for evaluation in self.evaluations:
            evaluation.reset(self._sweeps.initial)

    def find(
        self, z: np.ndarray, directions: Mapping[str, np.ndarray] | None = None, **accuracy: float
    ) -> Evaluation | None:
        """Return the evaluation of a control, or ``None``, on all ranks the same (one reduction over all ranks).

        The control, the ``directions`` (other vectors of the call by name) and the ``accuracy`` are compared between
        ranks; where they differ, or the mesh has moved, all ranks raise ``InputError``.
        """
        z = np.asarray(z, dtype=float)
        same = [e.z is not None and np.array_equal(e.z, z.ravel()) for e in self.evaluations]
        votes = [*same, *(not changed for changed in self._data.changed())]
        vectors = {"control": z, **(directions or {})}
        votes = self._consistency.require(vectors, call=accuracy, votes=votes, failure=self._data.failure)
        found = votes[: len(same)]
        self._data.warn(~votes[len(same) :])
        return self.evaluations[int(np.argmax(found))] if found.any() else None

    def at(self, z: np.ndarray, **accuracy: float) -> Evaluation:
        """Return the evaluation of a control and make it the latest (collective, as :meth:`find`). Where the control is
        a new one, it replaces the oldest evaluation and starts from the trajectories of the latest.
        """
        z = np.array(z, dtype=float).ravel()
        evaluation = self.find(z, **accuracy)
        if evaluation is None:
            evaluation = self.evaluations[-1]
            if evaluation is not self.latest:
                evaluation.U[:], evaluation.L[:] = self.latest.U, self.latest.L
                evaluation.cold = dict(self.latest.cold)
            evaluation.move_to(z)
        self.evaluations.remove(evaluation)
        self.evaluations.insert(0, evaluation)
        return evaluation

    # -- solves --------------------------------------------------------------------------------------------------------
    def state(self, z: np.ndarray, **accuracy: float) -> Evaluation:
        """Return the evaluation of a control with its state solved."""
        evaluation = self.at(z, **accuracy)
        steps, initial = self._layout.steps(evaluation.z), self._layout.initial(evaluation.z)
        solve = lambda U, cold: self._sweeps.state(steps, U, initial=initial, cold=cold, **accuracy)
        self._solve(evaluation, "state", accuracy, solve)
        return evaluation

    def adjoint(self, z: np.ndarray, **accuracy: float) -> Evaluation:
        """Return the evaluation of a control with its state and adjoint solved."""
        evaluation = self.state(z, **accuracy)
        if evaluation.rtol["adjoint"] > accuracy.get("rtol", self._sweeps.options.rtol):
            self.adjoint_of(evaluation, **accuracy)
        return evaluation

    def adjoint_source(self, evaluation: Evaluation) -> Source:
        """Return the right-hand side of the adjoint equation at the current state."""
        with self.resetting_on_failure(evaluation):
            return self._trajectories.gradient(evaluation, self._layout.steps(evaluation.z))

    def adjoint_of(self, evaluation: Evaluation, **accuracy: float) -> None:
        """Solve for the adjoint of the current state."""
        steps, source = self._layout.steps(evaluation.z), self.adjoint_source(evaluation)
        solve = lambda L, cold: self._sweeps.adjoint(steps, evaluation.U, source.rows, L, cold=cold, **accuracy)
        self._solve(evaluation, "adjoint", accuracy, solve)
        evaluation.controls = source.controls

    @contextmanager
    def resetting_on_failure(self, evaluation: Evaluation) -> Iterator[None]:
        """Discard a trajectory of which no value or gradient can be computed: it is no first guess."""
        try:
            yield
        except SolverFailure:
            evaluation.reset(self._sweeps.initial)
            self._sweeps.solvers.invalidate(factors=True)
            raise

    def _solve(self, evaluation: Evaluation, kind: str, accuracy: dict, solve: Callable) -> None:
        """Solve for the state or the adjoint of an evaluation, by ``solve(trajectory, cold=)``; sequential solves are
        exact, whatever the tolerance, as none of their residuals is computed.
        """
        with self._sweeps.solves_within(accuracy.get("rtol") if self.retries else None):
            solve_for(kind, [(self, evaluation)], accuracy, lambda _, u, cold: solve(*u, cold=cold))

    def before_solve(self) -> None:
        """Do what is to be done before the first solve, once."""
        if self._before_first_solve is not None:
            show, self._before_first_solve = self._before_first_solve, None
            show()

    def is_cached(self, evaluation: Evaluation, kind: str, accuracy: dict) -> bool:
        """Return whether a trajectory is cached to the required tolerance."""
        rtol = accuracy.get("rtol", self._sweeps.options.rtol)
        return "cycles" not in accuracy and evaluation.rtol[kind] <= rtol

    def restart(self, evaluation: Evaluation, kind: str, *, failed: bool = False) -> None:
        """Set a trajectory to the first guess of a cold solve, after a ``failed`` solve without all linearisations."""
        trajectory = evaluation.U if kind == "state" else evaluation.L
        trajectory[:] = self._sweeps.initial if kind == "state" else 0
        if failed:
            self._sweeps.solvers.invalidate(factors=True)

    def accept(self, evaluation: Evaluation, kind: str, result: SolveResult, accuracy: dict) -> None:
        """Note the result of a solve."""
        evaluation.cold[kind] = False
        if kind == "state":
            evaluation.state_changed()
            evaluation.state = result
        else:
            evaluation.gradient, evaluation.adjoint, evaluation.computed = None, result, {}
        rtol, exact = accuracy.get("rtol", self._sweeps.options.rtol), result.reason in ("exact", "serial")
        evaluation.rtol[kind] = 0.0 if exact else np.inf if "cycles" in accuracy else rtol

    @property
    def retries(self) -> bool:
        """Whether solves depend on a first guess."""
        return not self._sweeps.solvers.is_sequential


def solve_for(
    kind: str, pairs: Sequence[tuple[EvaluationCache, Evaluation]], accuracy: dict, solve: Callable[..., SolveResult]
) -> None:
    """Solve for the states or the adjoints of one or several evaluations, unless they are cached to the required
    tolerance.

    A solve that fails from first guesses is repeated from the initial conditions or from zero, so that no failure is
    due to earlier controls.

    Parameters
    ----------
    kind
        ``"state"`` or ``"adjoint"``.
    pairs
        Evaluations with their caches.
    accuracy
        ``rtol`` or ``cycles`` of this solve.
    solve
        ``solve(which, trajectories, cold=)`` for those of the evaluations with the numbers ``which``.
    """
    which = [i for i, (cache, evaluation) in enumerate(pairs) if not cache.is_cached(evaluation, kind, accuracy)]
    if not which:
        return
    pending = [pairs[i] for i in which]
    for cache, evaluation in pending:
        cache.before_solve()
        evaluation.rtol[kind], evaluation.computed = np.inf, {}
    retries = "cycles" not in accuracy and pending[0][0].retries
    trajectories = [evaluation.U if kind == "state" else evaluation.L for _, evaluation in pending]
    for cold in (True,) if all(evaluation.cold[kind] for _, evaluation in pending) else (False, True):
        for cache, evaluation in pending:
            if cold or evaluation.cold[kind]:
                cache.restart(evaluation, kind)
        try:
            result = solve(which, trajectories, cold=cold)
            break
        except FAILURES as failure:
            final = cold or not retries or not isinstance(failure, SolverFailure)
            for cache, evaluation in pending:
                cache.restart(evaluation, kind, failed=True)
                if final:
                    evaluation.cold[kind] = True
                    evaluation.move_to(None) if kind == "state" else evaluation.state_changed()
            if final:
                raise
    for cache, evaluation in pending:
        cache.accept(evaluation, kind, result, accuracy)


def relative_residual(result: SolveResult) -> float:
    """Return the last residual of a solve relative to the trajectory; 0 for sequential solves, infinite where none was
    computed.
    """
    residual = result.relative_residual
    return np.inf if np.isnan(residual) else residual
