"""Steps of a trust region that are semi-smooth Newton steps where these lower the model enough.

The mathematics and the symbols are those of :mod:`pint_fem.optimize.active_set.method`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np

from pint_fem.optimize.active_set.reduced_system import NewtonStep, newton_step
from pint_fem.optimize.active_set.sets import ActiveSets, NonsmoothPart
from pint_fem.optimize.guarded_problem import GuardedProblem
from pint_fem.optimize.oracle import Estimate, ExactOracle, Gradient, Iterate
from pint_fem.optimize.records import CGStop
from pint_fem.optimize.trust_region.acceptance import Step
from pint_fem.optimize.trust_region.projected_step import ProjectedSteps

__all__ = ["ActiveSetStep", "ActiveSetSteps", "NonsmoothOracle"]

# The reduction of the model, relative to that of the projected Cauchy step, from which on a Newton step is taken.
_SHARE = 0.5


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
    """Steps from one iterate within the bounds, for one radius after another.

    Parameters
    ----------
    oracle : NonsmoothOracle
        F and products with the Hessian.
    iterate : Iterate
        The iterate.
    tolerance, max_it, preconditioner, iteration
        As for :class:`~pint_fem.optimize.trust_region.projected_step.ProjectedSteps`.
    keep_pairs : bool
        Store directions and products, for :meth:`pairs`.
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
        keep_pairs: bool,
    ):
        face, gradient = oracle.part.face(iterate.x, iterate.gradient.vector)
        on_face = replace(iterate, gradient=replace(iterate.gradient, vector=gradient))
        super().__init__(
            oracle, face, on_face, tolerance=tolerance, max_it=max_it, preconditioner=preconditioner,
            iteration=iteration,
        )  # fmt: skip
        self._part, self._of_smooth = oracle.part, iterate.gradient.vector
        self._sets = oracle.part.sets(iterate.x, self._of_smooth, oracle.c)
        self._penalty, self._keep_pairs = oracle.part.penalty(iterate.x), keep_pairs
        self._newton: NewtonStep | None = None

    def step(self, radius: float) -> ActiveSetStep:
        """The Newton step, shortened to the radius and projected, or that of the projected conjugate gradients."""
        begins = self._newton is None
        if self._newton is None:
            self._newton = newton_step(
                self.oracle, self.x, self._of_smooth, self._sets, tolerance=self.tolerance, max_it=self.max_it,
                preconditioner=self.preconditioner, iteration=self.iteration, keep_pairs=self._keep_pairs,
            )  # fmt: skip
        found = self._projected(self._newton, radius)
        self._used = 0
        place, hs, _, _ = self._cauchy(radius)
        cauchy = -(self.inner(self.g, place.s) + 0.5 * self.inner(place.s, hs))
        spent = self._newton.products if begins else 0
        if found.reduction >= _SHARE * cauchy:
            return replace(found, cg_iterations=spent + self._used)
        step = super().step(radius)
        entries = {f.name: getattr(step, f.name) for f in fields(Step)} | {"cg_iterations": spent + step.cg_iterations}
        return ActiveSetStep(**entries, sets=self._sets, globalised=True)

    def _projected(self, newton: NewtonStep, radius: float) -> ActiveSetStep:
        """The Newton step within the ball, projected on the bounds and the signs of its sets."""
        length = math.sqrt(self.inner(newton.s, newton.s))
        t = 1.0 if length <= radius else radius / length
        whole = np.where(self._sets.held, self._sets.target, self.x + newton.s)
        trial = self._part.clipped(whole if t == 1 else self.x + t * newton.s, self._sets)
        s, hs = trial - self.x, t * newton.hs
        gap = s - t * newton.s
        ss = self.inner(s, s)
        if self.inner(gap, gap) > (1e-15) ** 2 * ss and ss > 0:
            hs, _, _ = self.oracle.curvature(self.x, s, ss, self.iteration, math.nan)
        reduction = -(self.inner(self._of_smooth, s) + 0.5 * self.inner(s, hs))
        reduction -= self._part.penalty(trial) - self._penalty
        stop = newton.stop if t == 1 else CGStop.BOUNDARY
        return ActiveSetStep(trial, math.sqrt(ss), reduction, 0, stop, sets=self._sets, globalised=True)

    def pairs(self, products: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The pairs (d, H d) of positive curvature of all steps, those of the Newton step last."""
        return super().pairs(products) + ([] if self._newton is None else self._newton.pairs)
