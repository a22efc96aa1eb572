"""Inverse Hessians of optimal control problems from their KKT systems, for conjugate gradients of a trust region."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.all_at_once.stopping import DivergedError
from pint_fem.errors import InputError
from pint_fem.kkt.choice import circulant_kkt

if TYPE_CHECKING:
    from pint_fem.adjoint.functional import ControlFunctional

__all__ = ["KKTPreconditioner", "require_kkt_problem"]


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
    if not all(misfit.quadratic for misfit in problem.misfits):
        raise InputError("a misfit is not quadratic")
    regularisation = problem.regularisation
    if regularisation is None:
        raise InputError("there is no regularisation")
    if not regularisation.quadratic or regularisation.coupled:
        raise InputError("the regularisation is not quadratic, or couples controls")
    return problem


class KKTPreconditioner:
    """The inverse of the Hessian, by solves of the KKT system, on representatives (collective).

    Where GMRES does not converge in the first solve, as for undamped waves with a large weight of the control, the
    inverse of the regularisation takes the place of that of the Hessian: such Hessians are near it, and conjugate
    gradients take few steps.

    Parameters
    ----------
    functional
        The functional that is minimised.
    ends
        Whether the KKT system is solved itself; without, the skew-circulant one.
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

    def __init__(self, functional: ControlFunctional, *, ends: bool = True, **given: Any):
        problem = require_kkt_problem(functional)
        self._layout, self._ends, self._inner = problem.layout, ends, functional.inner
        controls = problem.layout.evolution.parameters
        forms = [problem.regularisation_hessian(control) for control in controls]
        self.kkt, self.how = circulant_kkt(problem.sweeps, problem.misfits, forms, **given)
        if ends and not self.kkt.model.is_invariant:
            raise InputError("the misfits are not the same at all time points")
        self.handed_over = ""

    def __call__(self, r: np.ndarray) -> np.ndarray:
        """The product of the inverse Hessian with a representative, ``(layout.size,)``."""
        c = np.ascontiguousarray(self._layout.steps(self._inner.dual(r)))
        if not self.handed_over:
            try:
                return self._as_vector(self.kkt.solve(c=c, ends=self._ends).z)
            except DivergedError as error:
                if self.kkt.solves:
                    raise
                self.handed_over = str(error)
        return self._as_vector(self.kkt.model.weights.solve(c))

    def _as_vector(self, rows: np.ndarray) -> np.ndarray:
        """The vector of controls ``(layout.size,)`` from those of the own steps, ``(k, nz)``."""
        layout, out = self._layout, np.empty(self._layout.size)
        parts = self.kkt.model.sweeps.evolution.split_controls(rows)
        for control, part in zip(layout.evolution.parameters, parts, strict=True):
            layout.part(out, control)[...] = part
        return out

    def release(self) -> None:
        """Free the factors (collective)."""
        self.kkt.systems.release()
