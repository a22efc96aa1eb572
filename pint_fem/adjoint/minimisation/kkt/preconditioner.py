"""Inverse Hessians of optimal control problems from their KKT systems, for conjugate gradients of a trust region."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.adjoint.riesz import ControlInner
from pint_fem.all_at_once.stopping import DivergedError
from pint_fem.errors import InputError, SolverFailure
from pint_fem.kkt.choice import circulant_kkt
from pint_fem.optimize.records import TrustRegionResult

if TYPE_CHECKING:
    from pint_fem.adjoint.functional import ControlFunctional
    from pint_fem.adjoint.minimisation.bounds_and_constraints import Controls

__all__ = ["KKTPreconditioner", "by_active_sets", "minimize_by_kkt", "require_kkt_problem"]

_CG_SHARE = 0.1
"""Residual of conjugate gradients relative to the tolerance of the gradient: one step of Newton's method suffices."""
_ROUND_OFF = 1e-10
"""A product of the inverse Hessian relative to the magnitudes of its terms that may be round-off."""


def require_kkt_problem(functional: ControlFunctional) -> ReducedProblem:
    """The problem of a functional that may have a KKT system with circulant preconditioners.

    Raises
    ------
    InputError
        On every rank, where it has none; the message is the reason.
    """
    problem = functional.problem
    if not isinstance(problem, ReducedProblem):
        raise InputError("the functional is a sum, a multiple, or has an initial condition that is an expression")
    if not all(misfit.quadratic or misfit.piecewise for misfit in problem.misfits):
        raise InputError("a misfit is not quadratic")
    if not any(misfit.quadratic for misfit in problem.misfits):
        raise InputError("no misfit is quadratic")
    regularisation = problem.regularisation
    if regularisation is None:
        raise InputError("there is no regularisation")
    if not regularisation.quadratic or regularisation.coupled:
        raise InputError("the regularisation is not quadratic, or couples controls")
    return problem


class KKTPreconditioner:
    """The inverse of the Hessian, by solves of the KKT system, on representatives (collective). Misfits that are
    piecewise quadratic, such as bounds on the state, are left out.

    Where GMRES does not converge in the first solve, as for undamped waves with a large weight of the control, the
    inverse of the regularisation takes the place of that of the Hessian: such Hessians are near it, and conjugate
    gradients take few steps.

    Parameters
    ----------
    functional
        The functional that is minimised.
    ends
        Whether the KKT system is solved itself; without, the skew-circulant one.
    inner
        The inner product of the representatives; default: that of the functional.
    **given
        Options of :func:`pint_fem.kkt.choice.circulant_kkt`.

    Attributes
    ----------
    kkt : CirculantKKT
        The systems.
    how : str
        How their frequencies are solved.
    handed_over : str
        Why the inverse of the regularisation is used; empty where it is not.

    Raises
    ------
    InputError
        On every rank, where there is no such system; the message is the reason.
    """

    def __init__(
        self, functional: ControlFunctional, *, ends: bool = True, inner: ControlInner | None = None, **given: Any
    ):
        problem = require_kkt_problem(functional)
        self._layout, self._ends, self._inner = problem.layout, ends, inner or functional.inner
        controls = problem.layout.evolution.parameters
        forms = [problem.regularisation_hessian(control) for control in controls]
        rates = [problem.rate_hessian(control) for control in controls]
        misfits = [misfit for misfit in problem.misfits if misfit.quadratic]
        self.kkt, self.how = circulant_kkt(problem.sweeps, misfits, forms, rates, **given)
        if ends and not self.kkt.model.is_invariant:
            raise InputError("the misfits are not the same at all time points")
        self.handed_over, self._is_first = "", True
        self._instead: Callable[[np.ndarray], np.ndarray] | None = None
        self._regularisation = lambda: functional._preconditioner(self._inner, "regularisation")

    def __call__(self, r: np.ndarray) -> np.ndarray:
        """The product of the inverse Hessian with a representative, ``(layout.size,)``."""
        dual = self._inner.dual(r)
        c = np.ascontiguousarray(self._layout.steps(dual))
        if not self.handed_over:
            try:
                z = self._layout.from_steps(self.kkt.solve(c=c, ends=self._ends).z)
                if self._is_accurate(dual, z):
                    return z
            except DivergedError as error:
                if self.kkt.solves:
                    raise
                self.handed_over = str(error)
        if self._instead is None:
            self._instead = self._regularisation()
        return self._instead(r)

    def _is_accurate(self, dual: np.ndarray, z: np.ndarray) -> bool:
        """Whether the product ``z`` with a dual vector has a positive value at it beyond the errors of the solve; it
        has none for a last residual that is about as small as these, for which the regularisation takes its place.
        """
        value, size = self._layout.pairing(dual, z), self._layout.pairing(np.abs(dual), np.abs(z))
        accurate = value > _ROUND_OFF * size or size == 0
        first, self._is_first = self._is_first, False
        if not np.isfinite(value) or (first and not accurate):
            raise SolverFailure(
                f"the KKT system: the inverse Hessian is not positive in the direction of a residual ({value:.1e}), as "
                "the weight of a control is negative or too small for the accuracy of the solve"
            )
        return bool(accurate)

    def release(self) -> None:
        """Free the factors (collective)."""
        self.kkt.systems.release()


def by_active_sets(functional: ControlFunctional, options: Mapping) -> bool:
    """Whether KKT systems precondition active sets, as within bounds on controls or on the state and with L1 norms."""
    given = options.get("bounds") is not None or options.get("l1") is not None
    return given or not functional.problem.is_quadratic


def minimize_by_kkt(
    functional: ControlFunctional, start: Controls | None, options: Mapping, *, preconditioner: KKTPreconditioner,
    why: str,
) -> TrustRegionResult:  # fmt: skip
    """Minimise by the trust region, or within bounds by active sets, whose conjugate gradients are preconditioned by
    solves of the KKT system (collective).

    Parameters
    ----------
    functional, start, options
        The functional, the first controls and the options of the minimiser.
    preconditioner
        The KKT system.
    why
        Why this method was chosen, for the result.

    Returns
    -------
    TrustRegionResult
        ``choice`` says how the KKT systems were solved, and where another method took over.
    """
    options = dict(options)
    bounded = by_active_sets(functional, options)
    gtol = options.get("gtol_rel", 1e-6)
    if options.get("cg_rtol") is None and "cg_forcing" not in options and isinstance(gtol, Real):
        options["cg_rtol"] = _CG_SHARE * min(max(gtol, 1e-12), 1.0)
    method = functional.minimize_active_set if bounded else functional.minimize_trust_region
    name = "active sets" if bounded else "trust-region"
    try:
        result = method(start, preconditioner=preconditioner, **options)
        kkt, handed_over = preconditioner.kkt, preconditioner.handed_over
        if handed_over:
            choice = f"{name} with the regularisation as preconditioner, in the place of kkt: {handed_over}"
        else:
            systems = f"{kkt.solves} KKT system{'s' * (kkt.solves != 1)}"
            choice = f"kkt, {why}; {preconditioner.how}; {systems}, {kkt.iterations} iterations for the ends of time"
    except DivergedError as error:
        result = method(start, preconditioner="regularisation", **options)
        choice = f"{name} with the regularisation as preconditioner, in the place of kkt: {error}"
    except SolverFailure as error:  # such as a regularisation that leaves some of the controls out
        result = method(start, preconditioner=None if bounded else "limited-memory", **options)
        choice = f"{name} without the regularisation as preconditioner, in the place of kkt: {error}"
    finally:
        preconditioner.release()
    return replace(result, choice=choice)
