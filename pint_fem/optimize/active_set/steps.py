"""Steps of a trust region on the faces on which the function is smooth, and the function with its nonsmooth part.

The mathematics and the symbols are those of :mod:`pint_fem.optimize.active_set.method`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np

from pint_fem.optimize.active_set.sets import ActiveSets, NonsmoothPart
from pint_fem.optimize.guarded_problem import GuardedProblem
from pint_fem.optimize.oracle import Estimate, ExactOracle, Gradient, Iterate
from pint_fem.optimize.trust_region.acceptance import Step
from pint_fem.optimize.trust_region.projected_step import ProjectedSteps

__all__ = ["ActiveSetStep", "ActiveSetSteps", "NonsmoothOracle"]


@dataclass(frozen=True)
class ActiveSetStep(Step):
    """A step, the sets for which it was computed, and whether it is one of the trust region."""

    sets: ActiveSets | None = None
    globalised: bool = False


class NonsmoothOracle(ExactOracle):
    """F instead of J; gradients are those of J, their norms measure how far F is from a minimum.

    Parameters
    ----------
    problem : GuardedProblem
        J and its derivatives.
    part : NonsmoothPart
        The bounds and the absolute value.
    hessian : {"newton", "gauss-newton"}
        As for :class:`~pint_fem.optimize.oracle.ExactOracle`.
    c : float
        The factor of the gradient in the definition of the sets; nan where it is still to be chosen.

    Attributes
    ----------
    is_pure : bool
        Whether the steps are still those of the primal-dual method, without a trust region.
    """

    def __init__(self, problem: GuardedProblem, part: NonsmoothPart, hessian: str, c: float):
        super().__init__(problem, hessian)
        self.part, self.c, self.is_pure = part, c, False

    def _first_value(self, x: np.ndarray) -> Estimate:
        return self.estimate(x)

    def estimate(self, x: np.ndarray) -> Estimate:
        """F at a point."""
        return Estimate(self.problem.value(x) + self.part.penalty(x))

    def compare(
        self, iterate: Iterate, trial: np.ndarray, predicted: float, iteration: int
    ) -> tuple[Iterate, Estimate]:
        """The iterate and F at the trial point."""
        return iterate, self.estimate(trial)

    def gradient(self, x: np.ndarray, iteration: int, last_good: np.ndarray, **expected: float | None) -> Gradient:
        """The gradient of J with the norm of the least subgradient of F, out of the bounds that of the residual of the
        first-order conditions.
        """
        g = super().gradient(x, iteration, last_good).vector
        measure = self.part.least_subgradient(x, g) if self.is_within(x) else self.part.residual(x, g, self.c)
        return Gradient(g, math.sqrt(self.inner(measure, measure)))

    def is_within(self, x: np.ndarray) -> bool:
        """Whether a point satisfies the bounds exactly (collective)."""
        return not self.problem.holds_anywhere(x, bool((self.part.box.project(x) != x).any()))

    def state(self) -> dict[str, float]:
        """The factor c, and 1 for a run without a trust region."""
        return {"c": self.c, "pure": float(self.is_pure)}

    def restore(self, state: dict[str, float]) -> None:
        """Set what :meth:`state` returned."""
        self.c, self.is_pure = state["c"], bool(state["pure"])


class ActiveSetSteps(ProjectedSteps):
    """Steps from one iterate within the bounds, on the face that it is on, for one radius after another.

    Parameters
    ----------
    oracle : NonsmoothOracle
        F and products with the Hessian.
    iterate : Iterate
        The iterate.
    tolerance, max_it, preconditioner, iteration
        As for :class:`~pint_fem.optimize.trust_region.projected_step.ProjectedSteps`.
    """

    def __init__(
        self,
        oracle: NonsmoothOracle,
        iterate: Iterate,
        *,
        tolerance: float,
        max_it: int,
        preconditioner: Callable[[np.ndarray], np.ndarray] | None,
        iteration: int,
    ):
        face, gradient = oracle.part.face(iterate.x, iterate.gradient.vector)
        on_face = replace(iterate, gradient=replace(iterate.gradient, vector=gradient))
        super().__init__(
            oracle, face, on_face, tolerance=tolerance, max_it=max_it, preconditioner=preconditioner,
            iteration=iteration,
        )  # fmt: skip
        self._sets = oracle.part.sets(iterate.x, iterate.gradient.vector, oracle.c)

    def step(self, radius: float) -> ActiveSetStep:
        """The projected Cauchy step, then conjugate gradients and projected searches on smaller and smaller faces."""
        step = super().step(radius)
        return ActiveSetStep(**{f.name: getattr(step, f.name) for f in fields(Step)}, sets=self._sets, globalised=True)
