"""Inverse Hessians of optimal control problems from their KKT systems, for the conjugate gradients of a trust region."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pint_fem.adjoint.problem import ReducedProblem
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

    Raises
    ------
    InputError
        On every rank, where there is no such system; the message is the reason.
    """

    def __init__(self, functional: ControlFunctional, *, ends: bool = True, **given: float):
        problem = require_kkt_problem(functional)
        self._layout, self._ends = problem.layout, ends
        controls = problem.layout.evolution.parameters
        forms = [problem.regularisation_hessian(control) for control in controls]
        self.kkt, self.how = circulant_kkt(problem.sweeps, problem.misfits, forms, **given)
        if not self.kkt.model.is_invariant and ends:
            raise InputError("the misfits are not the same at all time points")
        self._inner = functional.inner

    def __call__(self, r: np.ndarray) -> np.ndarray:
        """The product of the inverse Hessian with a representative, ``(layout.size,)``."""
        layout = self._layout
        rows = self.kkt.solve(c=np.ascontiguousarray(layout.steps(self._inner.dual(r))), ends=self._ends).z
        out = np.empty(layout.size)
        parts = self.kkt.model.sweeps.evolution.split_controls(rows)
        for control, part in zip(layout.evolution.parameters, parts, strict=True):
            layout.part(out, control)[...] = part
        return out
