"""J, its gradient and products with its Hessian, with the error that is allowed for each and the estimated one.

An *oracle* decides how accurately the functions of a problem are evaluated. The one of this module uses exact values;
the one that chooses the accuracy is in :mod:`pint_fem.optimize.trust_region.inexact`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pint_fem.optimize.guarded_problem import GuardedProblem
from pint_fem.optimize.protocol import GradientOverflowError

__all__ = ["Estimate", "ExactOracle", "Gradient", "Iterate"]


@dataclass(frozen=True)
class Estimate:
    """J at a point, the absolute error allowed and the estimated one: both 0 where J is exact."""

    value: float
    tolerance: float = 0.0
    error: float = 0.0


@dataclass(frozen=True)
class Gradient:
    """A gradient, its norm, and allowed and estimated error in the same norm: both 0 where it is exact."""

    vector: np.ndarray
    norm: float
    tolerance: float = 0.0
    error: float = 0.0


@dataclass(frozen=True)
class Iterate:
    """A point with J and its gradient there."""

    x: np.ndarray
    value: Estimate
    gradient: Gradient


class ExactOracle:
    """J, gradients and Hessian products with all the accuracy that the problem has.

    Parameters
    ----------
    problem : GuardedProblem
        The problem.
    hessian : {"newton", "gauss-newton"}
        The form whose products `curvature` returns.

    Raises
    ------
    ValueError
        If the Gauss-Newton form is chosen and the problem has no `gauss_newton_action`.
    """

    inexact = False
    #: Relative error allowed for the model of the Hessian.
    model_rtol = 0.0

    def __init__(self, problem: GuardedProblem, hessian: str = "newton"):
        self.problem, self.inner = problem, problem.inner
        kind = {"newton": "hessian", "gauss-newton": "gauss_newton"}[hessian]
        self.action_name, self.model_name = f"{kind}_action", f"{kind}_model"
        if hessian == "gauss-newton" and not callable(getattr(problem, self.action_name, None)):
            raise ValueError(
                f"hessian = 'gauss-newton' is refused: {type(problem.given).__name__} has no "
                "gauss_newton_action(x, v); give it one or take hessian = 'newton'"
            )

    def set_final_norm(self, norm: float) -> None:
        """Set the norm of the gradient at which the run ends."""

    def first_iterate(self, x: np.ndarray) -> Iterate:
        """J and its gradient at the first guess.

        Raises
        ------
        NonFiniteError
            If J is not finite there.
        """
        value = self._first_value(x)
        if not math.isfinite(value.value):
            raise self.problem.no_value(
                f"iteration 0: J = {value.value} at the first guess; start where J is finite", x
            )
        return Iterate(x, value, self.gradient(x, 0, x))

    def _first_value(self, x: np.ndarray) -> Estimate:
        return Estimate(self.problem.value(x))

    def gradient(
        self,
        x: np.ndarray,
        iteration: int,
        last_good: np.ndarray,
        *,
        guess: float = math.inf,
        radius: float | None = None,
    ) -> Gradient:
        """The gradient at x.

        Parameters
        ----------
        x : ndarray
            The point.
        iteration : int
            The iteration, for messages.
        last_good : ndarray
            The last iterate at which J and its gradient were finite, for errors.
        guess, radius : float
            A norm that the gradient may have, and the radius of the ball in which it is used: an inexact oracle derives
            the accuracy from them.
        """
        g = self.problem.gradient(x)
        return Gradient(g, self.problem.gradient_norm(g, iteration, last_good))

    def trial_gradient(self, x: np.ndarray, iteration: int, last_good: np.ndarray, **expected: Any) -> Gradient | None:
        """The gradient at a trial point, as from :meth:`gradient`; ``None`` where its square overflows."""
        try:
            return self.gradient(x, iteration, last_good, **expected)
        except GradientOverflowError:
            return None

    def compare(
        self, iterate: Iterate, trial: np.ndarray, predicted: float, iteration: int
    ) -> tuple[Iterate, Estimate]:
        """The iterate and J at the trial point, both accurate enough for the actual reduction to be compared with the
        predicted one.
        """
        return iterate, Estimate(self.problem.value(trial))

    def prepare(self, x: np.ndarray) -> None:
        """Let the problem prepare its products at an iterate, if it has a method for that."""
        prepare = getattr(self.problem, "prepare", None)
        if callable(prepare):
            prepare(x)

    def start_path(self, x: np.ndarray, target: float) -> None:
        """Prepare products at x for conjugate gradients that stop at the residual `target` relative to |g|."""

    def curvature(
        self, x: np.ndarray, d: np.ndarray, dd: float, iteration: int, target: float
    ) -> tuple[np.ndarray, float, float]:
        """H d, (d, H d) and the relative error allowed; `dd` is (d, d), `target` the CG tolerance over |r_j|."""
        h = getattr(self.problem, self.action_name)(x, d)
        return h, self.problem.curvature(d, h, iteration, x), 0.0

    def refined(self, iterate: Iterate, iteration: int, radius: float) -> Iterate:
        """The iterate with a gradient accurate enough for a ball of this radius."""
        return iterate

    def state(self) -> dict[str, float]:
        """The numbers from which the oracle derives accuracies, for a checkpoint."""
        return {}

    def restore(self, state: dict[str, float]) -> None:
        """Set the numbers that :meth:`state` returned."""
