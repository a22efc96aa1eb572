r"""The methods that the composite-step minimiser calls on a problem with equality constraints.

The problem is to minimise :math:`J(u, z)` subject to :math:`c(u, z) = 0`, with a state :math:`u` that the constraint
determines for each control :math:`z`: the derivative :math:`A = c_u(u, z)` is invertible. With multipliers
:math:`\lambda` the Lagrangian is :math:`L = J + \langle\lambda, c\rangle`.

States and values of the constraint are arrays of one shape, primal; derivatives by the state and multipliers are arrays
of the same shape, dual: coefficients of linear functionals. Controls are 1-D arrays, and derivatives by them are dual,
too, until :meth:`ConstrainedProblem.representative` represents them in the inner product of the controls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from mpi4py import MPI

from pint_fem.collective import collectively

__all__ = ["ConstrainedProblem", "GuardedConstrainedProblem", "KKTReport"]


class KKTReport(NamedTuple):
    """How a KKT system was solved.

    Attributes
    ----------
    converged : bool
        Whether the residual was reduced to the required tolerance.
    iterations : int
        Iterations of the Krylov method.
    residual : float
        Last residual relative to the right-hand side.
    message : str
        Why the iteration did not converge.
    """

    converged: bool
    iterations: int = 0
    residual: float = 0.0
    message: str = ""


class ConstrainedProblem(Protocol):
    """An objective and constraints, as :func:`~pint_fem.optimize.composite_step.method.minimize_composite_step` calls
    them.

    Arrays are this process's parts of distributed vectors; numbers are the same on every process. Arguments are not to
    be modified. A method raises :class:`~pint_fem.errors.SolverFailure` where it fails for a numerical reason: a trial
    point is then rejected. ``comm``, an mpi4py communicator of the processes that call collectively, is optional.

    ``rtol`` is the relative residual that a linear solve has to reach, ``None`` for the best that the problem offers;
    the solves return the norm of the residual that they estimate, 0 where it is round-off.

    A method ``kkt_solve(u, z, lam, rhs, rtol) -> (du, dz, dlam, report)`` is optional. It solves approximately

    .. math::
        L_{uu}\\, du + L_{uz}\\, dz + A^T d\\lambda = a, \\quad
        L_{zu}\\, du + L_{zz}\\, dz + c_z^T d\\lambda = r, \\quad  A\\, du + c_z\\, dz = b

    for ``rhs = (a, r, b)`` with ``r`` and its equation represented in the inner product of the controls, and reports a
    :class:`KKTReport`; entries of ``rhs`` that are ``None`` are zero, and results that nobody uses may be ``None``. As
    a map from ``r`` to ``dz`` it should be symmetric and positive definite.
    """

    def value(self, u: np.ndarray, z: np.ndarray) -> float:
        """J(u, z)."""

    def gradient(self, u: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The partial derivatives of J, dual arrays."""

    def constraint(self, u: np.ndarray, z: np.ndarray) -> np.ndarray:
        """c(u, z)."""

    def solve_linearised(
        self, u: np.ndarray, z: np.ndarray, r: np.ndarray, rtol: float | None
    ) -> tuple[np.ndarray, float]:
        """The du with ``A du = r``, and the norm of the residual."""

    def tangent(self, u: np.ndarray, z: np.ndarray, dz: np.ndarray, rtol: float | None) -> tuple[np.ndarray, float]:
        """The du with ``A du = -c_z dz``, and the norm of the residual."""

    def solve_adjoint(
        self, u: np.ndarray, z: np.ndarray, r: np.ndarray, rtol: float | None
    ) -> tuple[np.ndarray, float]:
        """The multiplier lam with ``A^T lam = r``, and the norm of the residual."""

    def control_adjoint(self, u: np.ndarray, z: np.ndarray, lam: np.ndarray) -> np.ndarray:
        """``c_z^T lam``, a dual array."""

    def lagrangian_hessian(
        self, u: np.ndarray, z: np.ndarray, lam: np.ndarray, du: np.ndarray, dz: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The second derivatives of L in the direction (du, dz), dual arrays; ``du`` is the tangent in the direction
        ``dz``, or ``dz`` is ``None`` and ``du`` any direction. Of the former only products with tangents are used.
        """

    def representative(self, dual: np.ndarray) -> np.ndarray:
        """The control that represents a dual array in the inner product of the controls."""

    def inner(self, a: np.ndarray, b: np.ndarray) -> float:
        """The inner product of controls."""

    def inner_states(self, a: np.ndarray, b: np.ndarray) -> float:
        """The inner product of states and of values of the constraint."""

    def pairing(self, dual: np.ndarray, primal: np.ndarray) -> float:
        """The value of a dual array of states at a state, or of a multiplier at a value of the constraint."""

    def multiplier_norm(self, lam: np.ndarray) -> float:
        """A norm of multipliers with ``|<lam, c>| <= multiplier_norm(lam) * sqrt(inner_states(c, c))``."""


_METHODS = (
    *("value", "gradient", "constraint", "solve_linearised", "tangent", "solve_adjoint"),
    *("control_adjoint", "lagrangian_hessian", "representative", "kkt_solve"),
)


class GuardedConstrainedProblem:
    """A problem whose methods fail on all processes where they fail on one, with counts of their calls.

    Parameters
    ----------
    problem : ConstrainedProblem
        The problem; an optional method that it lacks is absent here as well.

    Attributes
    ----------
    given : ConstrainedProblem
        The problem.
    comm : mpi4py communicator
        The processes on which methods are called.
    calls : dict
        Number of calls by the name of the method.
    """

    def __init__(self, problem: Any):
        self.given, comm = problem, getattr(problem, "comm", None)
        self.comm = MPI.COMM_SELF if comm is None else comm
        self.calls = dict.fromkeys(_METHODS, 0)

    @property
    def has_kkt_solve(self) -> bool:
        """Whether the problem solves KKT systems."""
        return callable(getattr(self.given, "kkt_solve", None))

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.given, name)
        return self._guarded(name, method) if name in _METHODS else method

    def _guarded(self, name: str, method: Callable) -> Callable:
        def call(*args: Any) -> Any:
            self.calls[name] += 1
            return collectively(self.comm, name, method, *args)

        return call

    def norm(self, z: np.ndarray) -> float:
        """The norm of a control."""
        return float(np.sqrt(max(self.given.inner(z, z), 0.0)))

    def state_norm(self, u: np.ndarray) -> float:
        """The norm of a state or of a value of the constraint."""
        return float(np.sqrt(max(self.given.inner_states(u, u), 0.0)))
