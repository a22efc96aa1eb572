"""The primal-dual active-set method for functionals of controls: bounds, sparse controls, bounds on the state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ufl

from pint_fem.adjoint.minimisation.bounds_and_constraints import Controls, bound_arrays, l1_factors
from pint_fem.adjoint.minimisation.checkpoint import open_checkpoint
from pint_fem.adjoint.minimisation.objective import Objective
from pint_fem.adjoint.minimisation.tolerances import raise_tolerance, value_rtol
from pint_fem.adjoint.riesz import ControlInner
from pint_fem.optimize.active_set.method import checked_factors, minimize_active_set
from pint_fem.optimize.guarded_problem import GuardedProblem
from pint_fem.optimize.records import TrustRegionResult
from pint_fem.optimize.trust_region.bounded import checked_box

__all__ = ["ActiveSetMinimisation"]


class ActiveSetMinimisation:
    """The part of a functional of controls that minimises it by active sets; it has the attributes and methods that
    :class:`~pint_fem.adjoint.minimisation.minimisable.Minimisable` requires and has.
    """

    if TYPE_CHECKING:
        problem: Any
        inner: ControlInner
        layout: Any
        _collective_run: Callable[..., Any]
        _on_root: Callable[..., Any]
        _preconditioner: Callable[..., Any]
        _choose_for_variations: Callable[..., None]
        _with_control: Callable[..., Any]

    def minimize_active_set(
        self,
        start: Controls | None = None,
        *,
        bounds: Sequence | None = None,
        l1: float | Controls | Sequence | None = None,
        monitor: Callable[[str], object] | None = None,
        preconditioner: str | ufl.Form | Sequence[ufl.Form] | Callable | None = None,
        checkpoint: str | Path | None = None,
        if_save_fails: str = "stop",
        choice: str = "",
        **options: Any,
    ) -> TrustRegionResult:
        """Minimise within bounds, and with L1 norms of controls, by
        :func:`pint_fem.optimize.minimize_active_set` (collective).

        For a quadratic ``J``, also with :class:`~pint_fem.misfits.state_bounds.StateBounds`, it is the primal-dual
        active-set method, with a trust region where the sets do not settle; for other ``J`` it is Newton's method in a
        trust region on the faces of the bounds and of the absolute values.

        Parameters
        ----------
        start : Function, EnsembleFunction or list of these, optional
            First controls; default: those of the functional's last evaluation or minimisation.
        bounds : pair, optional
            ``(lower, upper)``, such as ``(0, None)``: each a number, ``None`` for no bound, values of the controls
            (which have one value per step where the control has), or a list with one of these for each control. The
            inner product has to be diagonal; where it is not, ``"lumped"`` is used.
        l1 : float, values of the controls, or list, optional
            Factors ``beta >= 0`` of the L1 norms that are added to ``J``: the integral of ``beta |q|`` over space, for
            a control with one value per step over space and time, with the weights of the inner product. A list
            contains a factor or ``None`` for each control.
        monitor : callable, optional
            Called with one line per iteration, on the first rank only.
        preconditioner, checkpoint, if_save_fails, choice
            As for :meth:`minimize_trust_region`. Conjugate gradients are those on the components that no bound holds.
        **options
            Options of the minimiser, such as ``gtol_rel=``, ``cg_rtol=``, ``prox_step=``.

        Returns
        -------
        TrustRegionResult
            ``value`` includes the L1 norms; ``control`` holds the controls found, which are also the values of the
            functional's own ``controls``; ``history`` has the sizes of the active sets.

        Raises
        ------
        InputError, ValueError
            Options that do not fit, on every rank, before anything is solved.
        """
        given = dict(bounds=bounds, l1=l1, preconditioner=preconditioner)
        given |= dict(checkpoint=checkpoint, if_save_fails=if_save_fails)
        with self._collective_run("active_set", start, (), given | options) as start:
            options["monitor"] = self._on_root(monitor)
            result = replace(self._active_set(start, options, **given), choice=choice)
        return self._with_control(result)

    def _active_set(
        self, start: np.ndarray, options: dict, *, bounds, l1, preconditioner, checkpoint, if_save_fails
    ) -> TrustRegionResult:
        """Choose options and objective, and run the method."""
        problem, inner = self.problem, self.inner
        options.setdefault("value_rtol", value_rtol(problem))
        piecewise = "piecewise" if problem.is_piecewise_quadratic else False
        options.setdefault("quadratic", True if problem.is_quadratic else piecewise)
        if inner.weights is None:
            inner = ControlInner(self.layout, "lumped")
        lower, upper = (-np.inf, np.inf) if bounds is None else bound_arrays(self, bounds)
        factors, objective = l1_factors(self, l1), Objective(problem, inner)
        guarded = GuardedProblem(objective)
        checked_box(guarded, start, lower, upper)
        checked_factors(guarded, start, factors)
        if not (problem.has_variation and isinstance(preconditioner, str) and preconditioner == "regularisation"):
            options["preconditioner"] = self._preconditioner(inner, preconditioner)
        self._choose_for_variations(objective, inner, preconditioner, options)
        raise_tolerance(objective, start, checkpoint, options)
        run = dict(method="active sets", sides={"lower": lower, "upper": upper, "l1": factors})
        with open_checkpoint(checkpoint, objective, if_save_fails, **run) as opened:
            return minimize_active_set(objective, start, lower, upper, factors, checkpoint=opened, **options)
