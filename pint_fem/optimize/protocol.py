"""What the minimisers ask of a problem, a preconditioner and a checkpoint, and the error of a problem that broke."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

__all__ = [
    "Checkpoint",
    "GaussNewtonProblem",
    "GradientOverflowError",
    "InexactProblem",
    "NonFiniteError",
    "Preconditioner",
    "Problem",
]


class Problem(Protocol):
    """What the minimiser asks of an objective J on a Hilbert space.

    A vector is a 1-D float64 array: this process's part of a distributed vector. `value` and `inner` return the same
    number on every process. Arguments are not to be modified; results may be views of reused memory.

    Two attributes are optional. ``comm``, an mpi4py communicator, are the processes that call together: options are
    compared over it, and stops and failures are shared (:mod:`pint_fem.optimize.ranks`); give it where vectors are
    distributed. ``failure`` is the exception because of which the last value is not finite, or None: monitors show it.
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

    Each method is optional: what a problem does not offer is taken as exact. `x` is always the current iterate or the
    trial point, so a problem that keeps the solutions at both answers a looser question for free, and a tighter one
    from where it stopped. Errors are the same number on every process. An accuracy that cannot be reached is missed,
    not refused: the larger error returned tells so, and is not asked for again at that `x`. A tolerance may be
    infinite (at the first guess, where no scale is known yet: the cheapest answer with an honest error) or 0 (the best
    that can be done).
    """

    def value_within(self, x: np.ndarray, tolerance: float) -> tuple[float, float]:
        """J(x) and its estimated absolute error, asked to be at most `tolerance`."""

    def gradient_within(self, x: np.ndarray, tolerance: float) -> tuple[np.ndarray, float]:
        """The gradient and the estimated norm of its error, asked to be at most `tolerance`."""

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
        """The same up to an error of norm `rtol` times its own; optional."""

    def gauss_newton_model(self, x: np.ndarray, rtol: float) -> Callable[[np.ndarray], np.ndarray]:
        """A self-adjoint operator within about `rtol` of it, as `hessian_model`; optional."""


class Preconditioner(Protocol):
    """An approximation P of the inverse Hessian, self-adjoint and positive definite in the problem's inner product."""

    def __call__(self, r: np.ndarray) -> np.ndarray:
        """P r; `r` is not to be modified."""

    def update(self, pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Learn from pairs (d, H d) of the last iterates, the latest last; optional.

        Called after each accepted step, and once when a run is continued from a checkpoint.
        """


class Checkpoint(Protocol):
    """Where a run is kept while it goes on; both methods are called on all processes."""

    def save(self, scalars: dict[str, object], vectors: dict[str, np.ndarray]) -> None:
        """Keep a state instead of the last one.

        `scalars` can be written as JSON and is the same on every process. `vectors` holds distributed vectors: arrays
        of the shape of x, which are not to be modified but may be kept without a copy.
        """

    def load(self) -> tuple[dict[str, object], dict[str, np.ndarray]] | None:
        """The last state, to the last bit, or None if there is none."""


class NonFiniteError(FloatingPointError):
    """J at the first guess, a gradient or a Hessian action is infinite or not a number.

    Attributes
    ----------
    x : ndarray
        The last iterate at which J and its gradient were finite (the first guess if there is none).
    """

    def __init__(self, message: str, x: np.ndarray):
        """Say what broke in which iteration, and keep `x`."""
        super().__init__(message)
        self.x = x


class GradientOverflowError(NonFiniteError):
    """The inner product of a gradient with itself exceeds the largest number.

    At a trial point that is no error of the problem: the step went too far, and minimisers shorten it.
    """
