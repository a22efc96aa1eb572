"""Minimisation by Newton's method for the KKT system, continued by the reduced trust region where it breaks down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pint_fem.adjoint.newton_kkt.averaged import AveragedKKT
from pint_fem.adjoint.newton_kkt.constrained import ConstrainedEvolution
from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.errors import InputError, SolverFailure
from pint_fem.optimize.argument_checks import check_choice
from pint_fem.optimize.composite_step.method import minimize_composite_step
from pint_fem.optimize.composite_step.records import CompositeStepResult, continued
from pint_fem.optimize.trust_region.acceptance import UNLIMITED

if TYPE_CHECKING:
    from pint_fem.adjoint.minimisation.bounds_and_constraints import Controls
    from pint_fem.adjoint.minimisation.minimisable import Minimisable

__all__ = ["NewtonKKTMinimisable"]

REDUCED = "reduced trust region"
"""The method that continues a run."""
_SHARED = ("max_it", "max_radius", "min_radius", "eta", "cg_max_it", "callback")
"""Options that the reduced trust region has, too."""


class NewtonKKTMinimisable:
    """The part of a functional of controls that is minimised over state and control at once."""

    def minimize_newton_kkt(
        self: Minimisable,  # type: ignore[misc]
        start: Controls | None = None,
        *,
        monitor: Callable[[str], object] | None = None,
        first_state: str = "solved",
        kkt: str = "auto",
        **options: Any,
    ) -> CompositeStepResult:
        """Minimise over the states of all steps and the controls at once, with the time steps as constraint
        (collective).

        The method is :func:`~pint_fem.optimize.composite_step.method.minimize_composite_step`, a trust-region SQP
        method with composite steps. No nonlinear evolution is solved but the first; an iteration evaluates all steps
        once, none after another, and solves linear sweeps. Where it breaks down, as its radius becomes too small, KKT
        solves do not contract or nothing becomes smaller, :meth:`minimize_trust_region` continues from its control; a
        line of the monitor, ``result.message`` and ``result.choice`` name the reason.

        Parameters
        ----------
        start : Function, EnsembleFunction or list of these, optional
            First controls; default: those of the functional's last evaluation or minimisation.
        monitor : callable, optional
            Called with one line per iteration, on the first rank only.
        first_state : {"solved", "initial"}
            The first states: those of the first controls, or the initial condition at all points, which takes no sweep
            and does not satisfy the time steps.
        kkt : {"auto", "averaged", "none"}
            Whether conjugate gradients for tangential steps are preconditioned by the KKT system of the evolution with
            averaged operators (:mod:`~pint_fem.adjoint.newton_kkt.averaged`): ``"auto"`` where there is one.
        **options
            Options of the minimiser, such as ``gtol_rel``, ``gtol_abs``, ``ctol_rel``, ``max_it``, ``callback``.

        Returns
        -------
        CompositeStepResult
            ``control`` holds the controls found, which are also the values of the functional's own ``controls``. ``x``
            is this rank's part as an array, ``state`` that of the trajectory, ``breakdown`` why composite steps ended
            early, if they did.

        Raises
        ------
        InputError
            On every rank, where options do not fit, or the functional is not that of one evolution whose trajectories
            are stored at all points.
        SolverFailure
            On every rank, where the states of the first controls cannot be computed.
        """
        with self._collective_run("newton_kkt", start, (), {"first_state": first_state, "kkt": kkt} | options) as start:
            check_choice("first_state", first_state, ("solved", "initial"))
            check_choice("kkt", kkt, ("auto", "averaged", "none"))
            problem = require_one_evolution(self.problem)
            options.setdefault("value_rtol", 10 * problem.limits.rtol)
            if problem.is_quadratic:  # the model is J itself
                options.setdefault("initial_radius", min(UNLIMITED, options.get("max_radius", np.inf)))
                options.setdefault("cg_rtol", min(0.5, max(0.1 * options.get("gtol_rel", 1e-6), 1e-14)))
            averaged, why = _averaged(problem, kkt)
            constrained = ConstrainedEvolution(problem, self.inner, averaged)
            u = _first_trajectory(problem, start, first_state)
            on_root = self._on_root(monitor)
            result = minimize_composite_step(constrained, u, start, monitor=on_root, **options)
            if result.breakdown:
                result = _continued(self, result, start, options, on_root)
        return self._with_control(replace(result, choice=_choice(result, why)))


def require_one_evolution(problem: object) -> ReducedProblem:
    """The problem of one evolution with all states stored; ``InputError`` for others."""
    name = "minimize_newton_kkt"
    if not isinstance(problem, ReducedProblem):
        raise InputError(
            f"{name}: the functional is a sum, or has an initial condition with controls in an expression; give that "
            "of one evolution, or use minimize_trust_region"
        )
    if problem.sweeps.intervals is not None:
        raise InputError(f"{name}: trajectories are stored at C-points only; give mgrit storage='all'")
    if problem.has_variation:
        raise InputError(f"{name}: a total variation is not twice differentiable; use minimize_trust_region")
    return problem


def _first_trajectory(problem: ReducedProblem, start: np.ndarray, kind: str) -> np.ndarray:
    """The first states, ``(k + 1, n)``."""
    if kind == "solved":
        return problem.cache.state(start).U.copy()
    u, initial = problem.sweeps.new_slab(), problem.layout.initial(start)
    u[:] = problem.sweeps.initial if initial is None else initial
    return u


def _continued(
    functional: Minimisable, first: CompositeStepResult, start: np.ndarray, options: Mapping, monitor: Callable | None
) -> CompositeStepResult:
    """The run that the reduced trust region continues: from the last control, or from the first one where J is larger
    or not finite at the last.
    """
    problem, where = functional.problem, "last"
    try:
        value = problem.value(first.x)
    except SolverFailure:  # on all ranks
        value = np.inf
    x = first.x
    if not value <= first.history[0].value:
        x, where = start, "first"
    if monitor is not None:
        monitor(f"Newton-KKT hands over to the {REDUCED}, from the {where} control: {first.breakdown}")
    given = {name: options[name] for name in _SHARED if name in options}
    tolerance = max(options.get("gtol_abs", 0.0), options.get("gtol_rel", 1e-6) * first.history[0].gradient_norm)
    given |= dict(gtol_rel=0.0, gtol_abs=tolerance, monitor=monitor, value_rtol=options["value_rtol"])
    nothing = dict.fromkeys(("inexact", "bounds", "constraints", "preconditioner", "checkpoint"))
    second = functional._trust_region(x, given, **nothing, if_save_fails="stop")
    return continued(first, second, REDUCED)


def _averaged(problem: ReducedProblem, kkt: str) -> tuple[AveragedKKT | None, str]:
    """The KKT system of averaged operators, and how conjugate gradients are preconditioned (collective)."""
    if kkt == "none":
        return None, "conjugate gradients without preconditioner, as kkt='none'"
    try:
        return AveragedKKT(problem), "conjugate gradients preconditioned by the KKT system of averaged operators"
    except InputError as error:  # on all ranks
        if kkt == "averaged":
            raise InputError(f"kkt='averaged': {error}; give kkt='auto' or 'none'") from error
        return None, f"conjugate gradients without preconditioner, as {error}"


def _choice(result: CompositeStepResult, why: str) -> str:
    """The methods of the run, and why."""
    if not result.breakdown:
        return f"newton-kkt: {why}"
    return f"newton-kkt for {result.composite_steps} iterations, then the {result.handed_over}: {result.breakdown}"
