"""The methods by which a functional of controls is minimised, in the inner product of the controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ufl
from pyadjoint.tape import stop_annotating

from pint_fem.adjoint.consistency.control_values import ControlConsistency
from pint_fem.adjoint.interface import SweptProblem
from pint_fem.adjoint.minimisation.active_set import ActiveSetMinimisation
from pint_fem.adjoint.minimisation.bounds_and_constraints import Controls, bound_arrays, constraint_normals, named_array
from pint_fem.adjoint.minimisation.checkpoint import open_checkpoint
from pint_fem.adjoint.minimisation.inexact_objective import InexactObjective
from pint_fem.adjoint.minimisation.kkt.preconditioner import KKTPreconditioner
from pint_fem.adjoint.minimisation.low_rank import made_for
from pint_fem.adjoint.minimisation.objective import Objective
from pint_fem.adjoint.minimisation.tolerances import raise_tolerance, value_rtol
from pint_fem.adjoint.newton_kkt.minimise import NewtonKKTMinimisable
from pint_fem.adjoint.regularisation_in_time.inner_product import InnerInTime
from pint_fem.adjoint.riesz import ControlInner
from pint_fem.adjoint.total_variation.preconditioner import VariationPreconditioner
from pint_fem.collective import ending_all_ranks, require_same
from pint_fem.errors import InputError
from pint_fem.optimize.constraints import AffineConstraints
from pint_fem.optimize.one_shot.method import minimize_one_shot
from pint_fem.optimize.one_shot.records import OneShotResult
from pint_fem.optimize.records import TrustRegionResult
from pint_fem.optimize.scipy_methods.adapter import ScipyResult, scipy_minimize
from pint_fem.optimize.trust_region.acceptance import UNLIMITED
from pint_fem.optimize.trust_region.bounded import minimize_bounded
from pint_fem.optimize.trust_region.inexact import InexactOptions
from pint_fem.optimize.trust_region.multipliers import minimize_bounded_constrained
from pint_fem.optimize.trust_region.newton_cg import minimize_trust_region

__all__ = ["Minimisable"]

# Forcing term for a quadratic J with inexact sweeps, about what one MGRIT cycle gives: for a plate with 64 steps this
# takes the fewest cycles of 0.1, 0.02 and "superlinear", with and without a limited-memory preconditioner.
_MODEL_FORCING = 0.02

# Residual of conjugate gradients with total variation: the update of its dual supposes Newton's step, and looser ones
# take more iterations.
_VARIATION_RTOL = 1e-2


class Minimisable(ActiveSetMinimisation, NewtonKKTMinimisable):
    """The part of a functional of controls that minimises it; it has ``problem``, ``inner``, ``spacetime``, ``layout``,
    ``evolution``, ``array`` and ``function``.
    """

    def minimize_trust_region(
        self,
        start: Controls | None = None,
        *,
        monitor: Callable[[str], object] | None = None,
        inexact: bool | Mapping | InexactOptions | None = None,
        bounds: Sequence | None = None,
        constraints: Sequence[tuple[ufl.Form, float]] | None = None,
        preconditioner: str | ufl.Form | Sequence[ufl.Form] | Callable | None = None,
        checkpoint: str | Path | None = None,
        if_save_fails: str = "stop",
        choice: str = "",
        **options: Any,
    ) -> TrustRegionResult:
        """Minimise by :func:`pint_fem.optimize.minimize_trust_region` in the controls' inner product (collective).

        Parameters
        ----------
        start : Function, EnsembleFunction or list of these, optional
            First controls; default: those of the functional's last evaluation or minimisation.
        monitor : callable, optional
            Called with one line per iteration, on the first rank only.
        inexact : bool, InexactOptions or mapping of its fields, optional
            Sweeps are solved only as accurately as convergence requires, at best to their ``rtol``.
        bounds : pair, optional
            ``(lower, upper)``, such as ``(0, None)``: each a number, ``None`` for no bound, values of the controls, or
            a list with one of these for each control. The method is
            :func:`~pint_fem.optimize.trust_region.bounded.minimize_bounded`, with ``constraints``
            :func:`~pint_fem.optimize.trust_region.multipliers.minimize_bounded_constrained`. The inner product has to
            be diagonal; where it is not, ``"lumped"`` is used.
        constraints : list of pairs, optional
            UFL functionals that are affine in the controls and their values, such as ``[(q*dx, 1.0)]``; for controls
            with one value per step a functional is summed over the steps with weight ``dt``.
        preconditioner : str, ufl.Form, list of ufl.Form or callable, optional
            Preconditioner of conjugate gradients: ``"regularisation"`` (the inverse of its second derivative), a
            bilinear form or a list with one per control, ``"limited-memory"``, ``"circulant"`` (the inverse Hessian of
            the skew-circulant problem, for controls with one value per step, :mod:`pint_fem.kkt`), ``"low-rank"`` or a
            :class:`~pint_fem.adjoint.minimisation.low_rank.LowRankPreconditioner`, or a callable on flat
            representatives.
            With a total variation ``"regularisation"`` is
            :mod:`pint_fem.adjoint.total_variation.preconditioner`, and the default; ``"none"`` is none.
        checkpoint : str or pathlib.Path, optional
            An HDF5 file with the state after each iteration, from which the run continues if the file exists
            (:mod:`pint_fem.adjoint.minimisation.checkpoint`).
        if_save_fails : {"stop", "continue"}
            Where that file cannot be written, as on a full disk, ``"stop"`` raises ``InputError`` on every rank, and
            ``"continue"`` prints a line and continues. The last complete file remains in either case.
        choice : str, optional
            Why this method was chosen, for the result.
        **options
            Options of the minimiser. For a quadratic ``J`` the first radius is unlimited by default; with a total
            variation ``cg_rtol`` is 0.01.

        Returns
        -------
        TrustRegionResult
            ``control`` holds the controls found, which are also the values of the functional's own ``controls`` (the
            functions of the evolution keep theirs). ``x`` is this rank's part as an array.

        Raises
        ------
        InputError, ValueError
            Options that do not fit, on every rank, before anything is solved.
        """
        given = dict(inexact=inexact, bounds=bounds, constraints=constraints, preconditioner=preconditioner)
        given |= dict(checkpoint=checkpoint, if_save_fails=if_save_fails)
        with self._collective_run("trust_region", start, (), given | options) as start:
            options["monitor"] = self._on_root(monitor)
            low_rank = made_for(preconditioner)
            given["preconditioner"] = preconditioner if low_rank is None else low_rank
            result = replace(self._trust_region(start, options, **given), choice=choice)
            if low_rank is not None:
                result = replace(result, preconditioner=str(low_rank))
        return self._with_control(result)

    def minimize_one_shot(
        self, start: Controls | None = None, *, monitor: Callable[[str], object] | None = None,
        constraints: Sequence[tuple[ufl.Form, float]] | None = None,
        preconditioner: str | ufl.Form | Sequence[ufl.Form] | Callable | None = None,
        checkpoint: str | Path | None = None, if_save_fails: str = "stop", **options: Any,
    ) -> OneShotResult:  # fmt: skip
        """Minimise by :func:`pint_fem.optimize.minimize_one_shot`: between two updates of the controls one MGRIT cycle
        for the state and one for the adjoint (collective).

        Parameters
        ----------
        start, monitor, constraints, preconditioner, checkpoint, if_save_fails
            As for :meth:`minimize_trust_region`; the preconditioner ``"limited-memory"`` is built in.
        **options
            Options of the minimiser. ``memory``, the number of pairs, is 40 by default, 10 where a control has one
            value per step; the run is short where it is the number of directions that the data determine.

        Returns
        -------
        OneShotResult
            ``control`` holds the controls found, which are also the values of the functional's own ``controls``.

        Raises
        ------
        InputError, ValueError
            Options that do not fit, on every rank, before anything is solved.
        """
        given = dict(constraints=constraints, preconditioner=preconditioner)
        given |= dict(checkpoint=checkpoint, if_save_fails=if_save_fails)
        with self._collective_run("one_shot", start, (), given | options) as start:
            options.setdefault("value_rtol", value_rtol(self.problem))
            options.setdefault("memory", 10 if self.evolution.stepwise else 40)  # static controls are small
            self._require_residuals("one-shot")
            if self.problem.limits.accelerated:
                raise InputError("one-shot takes single MGRIT cycles: leave krylov out")
            if preconditioner == "limited-memory":
                raise InputError("one-shot has a limited-memory operator of its own: leave preconditioner= out")
            options["preconditioner"] = self._preconditioner(self.inner, preconditioner)
            options["monitor"] = self._on_root(monitor)
            objective = Objective(self.problem, self.inner)
            limited, start = self._constrained(objective, start, constraints)
            run = dict(method="one-shot", constrained=limited, constraints=constraints)
            with open_checkpoint(checkpoint, objective, if_save_fails, **run) as opened:
                result = minimize_one_shot(limited, start, checkpoint=opened, **options)
        return self._with_control(result)

    def minimize_scipy(
        self,
        start: Controls | None = None,
        method: str = "trust-krylov",
        *,
        bounds: Sequence | None = None,
        **options: Any,
    ) -> ScipyResult:
        """Minimise by scipy, whose vectors are whole on one rank: for controls of moderate size (collective).

        The variables are scaled by the root of the lumped mass matrix, and derivatives are exact in these coordinates
        (pyadjoint's ``minimize`` passes Riesz representatives to scipy).

        Parameters
        ----------
        start, bounds
            As for :meth:`minimize_trust_region`.
        method : str
            One of the methods of :func:`pint_fem.optimize.scipy_minimize`.
        **options
            Options of that function.

        Returns
        -------
        ScipyResult
            ``control`` holds the controls found, which are also the values of the functional's own ``controls``.

        Raises
        ------
        InputError, ValueError
            Arguments that do not fit, on every rank, before anything is solved.
        """
        with self._collective_run("scipy_method", start, (method,), {"bounds": bounds} | options) as start:
            scaling = self.inner.weights
            if scaling is None:
                scaling = ControlInner(self.layout, "lumped").weights
            lower, upper = (None, None) if bounds is None else bound_arrays(self, bounds)
            objective, comm = Objective(self.problem, self.inner, scaling=scaling), self.spacetime.comm
            result = scipy_minimize(objective, start, method, comm=comm, lower=lower, upper=upper, **options)
        return self._with_control(result)

    # -- what the methods share ----------------------------------------------------------------------------------------
    @contextmanager
    def _collective_run(self, name: str, start, args: tuple, given: dict):
        """The first controls as an array, after a comparison of all arguments and of static controls over the ranks."""
        start = self._current() if start is None else named_array(self, start, "start")
        comm = self.spacetime.comm
        with ending_all_ranks(comm):
            compared = {key: value for key, value in given.items() if key != "callback"}
            require_same(comm, minimiser=name, method=args, given=compared)
            ControlConsistency(self.layout).require({"start": start})
            with stop_annotating():
                yield start

    def _on_root(self, monitor: Callable | None) -> Callable | None:
        """The monitor on the first rank, None on the others."""
        return monitor if self.spacetime.is_root else None

    def _with_control(self, result: object):
        """The result with its controls as functions, which become the values of the functional's controls."""
        self._take(result.x)
        control = self.function(result.x)
        if isinstance(result, ScipyResult):
            result.control = control
            return result
        return replace(result, control=control)

    def _trust_region(
        self, start: np.ndarray, options: dict, *, inexact, bounds, constraints, preconditioner, checkpoint,
        if_save_fails,
    ) -> TrustRegionResult:  # fmt: skip
        """Choose options, objective and method, and run it."""
        problem, inner = self.problem, self.inner
        options.setdefault("value_rtol", value_rtol(problem))
        if problem.is_quadratic and bounds is None:
            # the model is J itself: a bound would only cut steps short
            options.setdefault("initial_radius", min(UNLIMITED, options.get("max_radius", np.inf)))
        inexact = self._inexact_options(inexact)
        if inexact is not None and problem.is_quadratic and options.get("cg_rtol") is None:
            # for a quadratic J, looser first iterations gain nothing
            options.setdefault("cg_forcing", _MODEL_FORCING)
        if bounds is not None:
            if inexact is not None:
                raise InputError("bounds go with exact solves: leave inexact= out")
            if inner.weights is None:
                inner = ControlInner(self.layout, "lumped")
        low_rank = made_for(preconditioner)
        if low_rank is not None:
            options["preconditioner"] = low_rank
        elif not (problem.has_variation and isinstance(preconditioner, str) and preconditioner == "regularisation"):
            options["preconditioner"] = self._preconditioner(inner, preconditioner)
        run = dict(method="trust region", constraints=constraints)
        if bounds is not None:
            lower, upper = bound_arrays(self, bounds)
            objective = Objective(problem, inner)
            if low_rank is not None:
                low_rank.begin(self, objective, inner)
            self._choose_for_variations(objective, inner, preconditioner, options)
            raise_tolerance(objective, start, checkpoint, options)
            if constraints:
                if checkpoint is not None:
                    raise InputError("checkpoint= goes with bounds or with integral constraints, not with both")
                normals, values = constraint_normals(self, objective, constraints)
                return minimize_bounded_constrained(objective, start, lower, upper, normals, values, **options)
            run = dict(method="trust region within bounds", sides={"lower": lower, "upper": upper})
            with open_checkpoint(checkpoint, objective, if_save_fails, **run) as opened:
                return minimize_bounded(objective, start, lower, upper, checkpoint=opened, **options)
        objective = Objective(problem, inner) if inexact is None else InexactObjective(problem, inner)
        if low_rank is not None:
            low_rank.begin(self, objective, inner)
        self._choose_for_variations(objective, inner, preconditioner, options)
        limited, start = self._constrained(objective, start, constraints)
        if inexact is None:
            raise_tolerance(objective, start, checkpoint, options)
        try:
            with open_checkpoint(checkpoint, objective, if_save_fails, constrained=limited, **run) as opened:
                return minimize_trust_region(limited, start, inexact=inexact, checkpoint=opened, **options)
        finally:
            problem.keep_evaluations(1)

    def _choose_for_variations(self, objective: Objective, inner: ControlInner, given: Any, options: dict) -> None:
        """Set the preconditioner and the tolerance of conjugate gradients where total variations are in the model."""
        if objective.model.duals:
            if given is None or (isinstance(given, str) and given == "regularisation"):
                options["preconditioner"] = VariationPreconditioner(objective, inner)
            if options.get("cg_rtol") is None and "cg_forcing" not in options:
                options["cg_rtol"] = _VARIATION_RTOL

    def _inexact_options(self, inexact) -> InexactOptions | None:
        """The options of inexact sweeps; refused where their accuracy cannot be chosen."""
        if isinstance(inexact, Mapping):
            inexact = InexactOptions(**inexact)
        inexact = InexactOptions() if inexact is True else inexact or None
        if inexact is not None:
            if not isinstance(self.problem, SweptProblem):
                raise InputError("inexact= chooses the accuracy of sweeps, which this functional does without")
            self._require_residuals("inexact=")
        return inexact

    def _require_residuals(self, what: str) -> None:
        """Refuse MGRIT without residuals where they decide on the accuracy."""
        if not self.problem.limits.has_residuals:
            raise InputError(f"{what} chooses accuracy by residuals: give mgrit residual='C' or 'full', not 'none'")

    def _constrained(self, objective: Objective, start: np.ndarray, constraints):
        """The objective on the controls that meet the constraints, and the nearest such control to the start."""
        if not constraints:
            return objective, start
        normals, values = constraint_normals(self, objective, constraints)
        try:
            limited = AffineConstraints(objective, normals, values)
        except ValueError as error:
            raise InputError(f"constraints: {error}") from error
        return limited, limited.feasible(start)

    def _preconditioner(self, inner: ControlInner, given: Any):
        """An approximate inverse Hessian on representatives."""
        if given is None or (isinstance(given, str) and given == "none"):
            return None
        if made_for(given) is not None:
            raise InputError("preconditioner 'low-rank' is for minimize_trust_region: leave it out with other methods")
        if given == "limited-memory" or (callable(given) and not isinstance(given, ufl.Form)):
            return given
        if isinstance(given, str) and given == "circulant":
            return KKTPreconditioner(self, ends=False, inner=inner)
        if isinstance(given, str) and given == "regularisation":
            controls = self.evolution.controls
            rates = {c: form for c in controls if (form := self.problem.rate_hessian(c)) is not None}
            prior = InnerInTime(self.layout, [self._second_derivative(c) for c in controls], rates)
            return lambda r: prior.primal(inner.dual(r))
        if isinstance(given, str):
            raise InputError(
                f"preconditioner {given!r}: give 'regularisation', 'limited-memory', 'circulant', 'low-rank', 'none', "
                "a bilinear form or a callable"
            )
        prior = ControlInner(self.layout, given)
        return lambda r: prior.primal(inner.dual(r))

    def _second_derivative(self, control) -> ufl.Form:
        """The second derivative of the regularisation by a control, as a bilinear form of its values."""
        second = self.problem.regularisation_hessian(control)
        if second is None:
            raise InputError(
                f"preconditioner 'regularisation': the regularisation is not quadratic in control {control.name()!r}"
            )
        return second
