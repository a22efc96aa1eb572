"""The methods that the minimisers call on a problem, a preconditioner and a checkpoint, and the error of values that
are not finite.

:data:`RETURNS` is the one place in which the methods of a problem are listed. From it follow what is checked in the
results (:mod:`pint_fem.optimize.guarded_problem`) and what is projected on a null space
(:mod:`pint_fem.optimize.constraints`): a further optional method is a line there and a method of the protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

__all__ = [
    "RETURNS",
    "Checkpoint",
    "GaussNewtonProblem",
    "GradientOverflowError",
    "InexactProblem",
    "NonFiniteError",
    "OneShotProblem",
    "Preconditioner",
    "Problem",
]

RETURNS: dict[str, tuple[str, ...]] = {
    "value": ("number",),
    "gradient": ("vector",),
    "hessian_action": ("vector",),
    # optional:
    "hessian_actions": ("vectors",),
    "gauss_newton_action": ("vector",),
    "value_within": ("number", "error"),
    "gradient_within": ("vector", "error"),
    "hessian_action_within": ("vector",),
    "gauss_newton_action_within": ("vector",),
    "hessian_model": ("operator",),
    "gauss_newton_model": ("operator",),
    "advance": ("number", "vector", "residual"),
    "prepare": ("nothing",),
}
"""What each method of a problem returns, ``inner`` apart. The first argument is the point x; the methods with
``_action`` in their names take a direction as the second, ``hessian_actions`` a list of them.
"""


class Problem(Protocol):
    """An objective J on a Hilbert space, as the minimisers call it.

    A vector is a 1-D float64 array: this process's part of a distributed vector. `value` and `inner` return the same
    number on every process. Arguments are not to be modified; results may be views of reused memory.

    A method ``hessian_actions(x, vs)`` is optional: the list of ``hessian_action(x, v)`` for a list of directions,
    where several at once cost less than one after another.

    A method ``prepare(x)`` is optional: it is called at each iterate before the products there, so that a problem may
    return products with another symmetric operator than the Hessian, which depends on the iterates before.

    Two attributes are optional, too. ``comm``, an mpi4py communicator, contains the processes that call collectively:
    options are compared over it, and stops and failures are shared (:mod:`pint_fem.optimize.ranks`); give it where
    vectors are distributed. ``failure`` is the exception because of which the last value is not finite, or None:
    monitors print it.
    """

    def value(self, x: np.ndarray) -> float:
        """J(x); ``inf`` or ``nan`` where J cannot be evaluated (the trial step is then shortened)."""

    def gradient(self, x: np.ndarray) -> np.ndarray:
        """The g with ``inner(g, v) = J'(x) v`` for all v; same shape as `x`."""

    def hessian_action(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The h with ``inner(h, w) = J''(x)(v, w)`` for all w; same shape as `x`."""

    def inner(self, a: np.ndarray, b: np.ndarray) -> float:
        """The inner product (a, b): symmetric, positive definite, reduced over all processes."""


class InexactProblem(Problem, Protocol):
    """A problem whose accuracy can be chosen; used with ``inexact=InexactOptions()`` only.

    Each method is optional: a quantity without such a method is treated as exact. `x` is always the current iterate or
    the trial point, so a problem that stores the solutions at both returns a less accurate result at no cost, and
    continues from the stored solution for a more accurate one. Errors are the same number on every process. A
    tolerance that cannot be reached is no error: the larger estimate is returned, and that tolerance is not requested
    again at the same `x`. A tolerance may be infinite (at the first guess, before any scale has been computed: the
    cheapest result with a valid error estimate) or 0 (the best that can be done).
    """

    def value_within(self, x: np.ndarray, tolerance: float) -> tuple[float, float]:
        """J(x) and its estimated absolute error, which should be at most `tolerance`."""

    def gradient_within(self, x: np.ndarray, tolerance: float) -> tuple[np.ndarray, float]:
        """The gradient and the estimated norm of its error, which should be at most `tolerance`."""

    def hessian_action_within(self, x: np.ndarray, v: np.ndarray, rtol: float) -> np.ndarray:
        """The h of `hessian_action` up to an error of norm `rtol` times its own."""

    def hessian_model(self, x: np.ndarray, rtol: float) -> Callable[[np.ndarray], np.ndarray]:
        """The action ``v -> H v`` of a self-adjoint operator within a relative error of about `rtol` of the Hessian.

        It is used for all products at `x`, instead of `hessian_action_within`.
        """


class GaussNewtonProblem(Problem, Protocol):
    """A problem with a positive semidefinite approximation of its Hessian; used with ``hessian="gauss-newton"``."""

    def gauss_newton_action(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The Riesz representative of the Gauss-Newton form at `x` in direction `v`; same shape as `x`."""

    def gauss_newton_action_within(self, x: np.ndarray, v: np.ndarray, rtol: float) -> np.ndarray:
        """The Gauss-Newton action up to an error of norm `rtol` times its own; optional."""

    def gauss_newton_model(self, x: np.ndarray, rtol: float) -> Callable[[np.ndarray], np.ndarray]:
        """The action of a self-adjoint operator within a relative error of about `rtol` of the form; optional."""


class OneShotProblem(Problem, Protocol):
    """A problem whose solvers can be advanced by one iteration; the method is optional."""

    def advance(self, x: np.ndarray) -> tuple[float, np.ndarray, float]:
        """One iteration of the state and of the adjoint solver at x, from the iterates of the last call.

        Returns
        -------
        value, gradient, residual
            J and the Riesz gradient at the new iterates, inexact, and the norm of the residual of state and adjoint
            relative to a typical size, >= 0 and the same on all processes; 0 if they are exact. Where the solvers
            break down, return a `value` of inf or nan and go back to iterates that can be used at another design.
        """


class Preconditioner(Protocol):
    """An approximation P of the inverse Hessian, self-adjoint and positive definite in the problem's inner product."""

    def __call__(self, r: np.ndarray) -> np.ndarray:
        """P r; `r` is not to be modified."""

    def update(self, pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Build P from pairs (d, H d) of the last iterates, the latest last; optional.

        Called after each accepted step, and once when a run is continued from a checkpoint.
        """


class Checkpoint(Protocol):
    """Storage for the state of a run; both methods are called on all processes."""

    def save(self, scalars: dict[str, object], vectors: dict[str, np.ndarray]) -> None:
        """Store a state instead of the last one.

        `scalars` can be written as JSON and is the same on every process. `vectors` holds distributed vectors: arrays
        of the shape of x, which are not to be modified but may be stored without a copy.
        """

    def load(self) -> tuple[dict[str, object], dict[str, np.ndarray]] | None:
        """The last state, bitwise identical to what was saved, or None if there is none."""


class NonFiniteError(FloatingPointError):
    """J at the first guess, a gradient or a Hessian action is infinite or not a number.

    Attributes
    ----------
    x : ndarray
        The last iterate at which J and its gradient were finite (the first guess if there is none).
    """

    def __init__(self, message: str, x: np.ndarray):
        """Make the error from its message and the last good iterate."""
        super().__init__(message)
        self.x = x


class GradientOverflowError(NonFiniteError):
    """The inner product of a gradient with itself exceeds the largest number.

    At a trial point that is no error of the problem: the step went too far, and minimisers shorten it.
    """
