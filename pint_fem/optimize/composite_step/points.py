"""Points of the space of states and controls: objective, constraint, multipliers and reduced gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pint_fem.errors import SolverFailure
from pint_fem.optimize.composite_step.protocol import GuardedConstrainedProblem

__all__ = ["Point", "evaluate", "first_point"]


@dataclass(frozen=True)
class Point:
    r"""A state with a control.

    Attributes
    ----------
    u, z : ndarray
        State and control.
    value, constraint_norm : float
        J and the norm of c.
    c : ndarray
        The constraint.
    lam : ndarray
        The multiplier with :math:`A^T \lambda = -J_u`, the adjoint at (u, z).
    gradient : ndarray
        The representative of :math:`J_z + c_z^T \lambda`, the reduced gradient.
    gradient_norm, lagrangian : float
        Its norm, and :math:`J + \langle\lambda, c\rangle`.
    """

    u: np.ndarray
    z: np.ndarray
    value: float
    c: np.ndarray
    constraint_norm: float
    lam: np.ndarray
    gradient: np.ndarray
    gradient_norm: float
    lagrangian: float

    def merit(self, penalty: float) -> float:
        r"""The augmented Lagrangian :math:`J + \langle\lambda, c\rangle + \rho\,|c|^2`."""
        return self.lagrangian + penalty * self.constraint_norm**2


def evaluate(problem: GuardedConstrainedProblem, u: np.ndarray, z: np.ndarray) -> Point:
    """Evaluate everything at a point (collective).

    Raises
    ------
    SolverFailure
        Where the constraint, the adjoint or one of the numbers cannot be computed.
    """
    c = problem.constraint(u, z)
    norm, value = problem.state_norm(c), float(problem.value(u, z))
    if not (math.isfinite(norm) and math.isfinite(value)):
        raise SolverFailure(f"J = {value:g} and |c| = {norm:g} at a trial point")
    of_state, of_control = problem.gradient(u, z)
    lam, _ = problem.solve_adjoint(u, z, -of_state, None)
    gradient = problem.representative(of_control + problem.control_adjoint(u, z, lam))
    square, product = problem.inner(gradient, gradient), float(problem.pairing(lam, c))
    if not (math.isfinite(square) and math.isfinite(product)):
        raise SolverFailure(f"(g, g) = {square:g} and <lam, c> = {product:g} at a trial point")
    return Point(u, z, value, c, norm, lam, gradient, math.sqrt(max(square, 0.0)), value + product)


def first_point(problem: GuardedConstrainedProblem, u: np.ndarray, z: np.ndarray) -> Point:
    """Evaluate the first guess; a failure there names it."""
    try:
        return evaluate(problem, u, z)
    except SolverFailure as failure:
        raise SolverFailure(f"first guess of composite steps: {failure}") from failure
