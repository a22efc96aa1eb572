"""The problem's functions as the minimisers call them: counted, copied, and refused where they are not finite.

An *oracle* says how accurate they are asked for. The exact one is here; the one that chooses the accuracy is in
:mod:`pint_fem.optimize.trust_region.inexact`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pint_fem.errors import InputError
from pint_fem.optimize.protocol import GradientOverflowError, NonFiniteError, Problem

__all__ = ["Estimate", "Evaluator", "ExactOracle", "Gradient", "Point", "error_estimate", "like", "number", "shaped"]


@dataclass(frozen=True)
class Estimate:
    """J at a point, the absolute error asked for and the estimated one: both 0 where J is exact."""

    value: float
    asked: float = 0.0
    error: float = 0.0


@dataclass(frozen=True)
class Gradient:
    """A gradient and its norm, the error asked for and the estimated one in the same norm: both 0 where exact."""

    vector: np.ndarray
    norm: float
    asked: float = 0.0
    error: float = 0.0


@dataclass(frozen=True)
class Point:
    """An iterate and what is known there."""

    x: np.ndarray
    value: Estimate
    gradient: Gradient


class Evaluator:
    """The problem's functions, counted and refused where they are not finite.

    Finiteness is judged by reduced numbers only, so that all processes agree.

    Parameters
    ----------
    problem : Problem
    hessian : {"newton", "gauss-newton"}
        Whose action `curvature` takes.

    Raises
    ------
    ValueError
        If the problem has no `gauss_newton_action` and is asked for it.
    """

    def __init__(self, problem: Problem, hessian: str = "newton"):
        self.problem = problem
        kind = {"newton": "hessian", "gauss-newton": "gauss_newton"}[hessian]
        self.action_name, self.model_name = f"{kind}_action", f"{kind}_model"
        if hessian == "gauss-newton" and not callable(getattr(problem, self.action_name, None)):
            name = type(getattr(problem, "given", problem)).__name__
            raise ValueError(
                f"hessian = 'gauss-newton' is refused: {name} has no gauss_newton_action(x, v); "
                "give it one or take hessian = 'newton'"
            )
        self.values = self.gradients = self.hessians = 0

    def no_value(self, message: str, x: np.ndarray) -> NonFiniteError:
        """The error of a J that is not finite where it has to be, with what the problem knows of the cause."""
        failure = getattr(self.problem, "failure", None)
        error = NonFiniteError(message if failure is None else f"{message} ({failure})", x)
        error.__cause__ = failure
        return error

    def value(self, x: np.ndarray) -> float:
        """J(x), finite or not."""
        self.values += 1
        return float(self.problem.value(x))

    def value_within(self, x: np.ndarray, tolerance: float) -> tuple[float, float]:
        """J(x) and its estimated error."""
        self.values += 1
        value, error = self.problem.value_within(x, tolerance)
        return float(value), (error_estimate("value_within", error) if math.isfinite(value) else math.inf)

    def gradient(self, x: np.ndarray, iteration: int, last_good: np.ndarray) -> tuple[np.ndarray, float]:
        """The gradient at x and its norm."""
        self.gradients += 1
        return self._checked_gradient(x, self.problem.gradient(x), "gradient", iteration, last_good)

    def gradient_within(
        self, x: np.ndarray, tolerance: float, iteration: int, last_good: np.ndarray
    ) -> tuple[np.ndarray, float, float]:
        """The gradient at x, its norm and its estimated error."""
        self.gradients += 1
        g, error = self.problem.gradient_within(x, tolerance)
        g, norm = self._checked_gradient(x, g, "gradient_within", iteration, last_good)
        return g, norm, error_estimate("gradient_within", error)

    def _checked_gradient(self, x, g, name: str, iteration: int, last_good) -> tuple[np.ndarray, float]:
        g = like(x, g, name)
        square = self.inner(g, g)
        if not math.isfinite(square):
            kind = GradientOverflowError if square == math.inf else NonFiniteError
            raise kind(f"iteration {iteration}: the gradient is not finite, (g, g) = {square}", last_good)
        if square < 0:
            raise ValueError(f"(g, g) = {square} < 0: the problem's inner product must be positive definite")
        return g, math.sqrt(square)

    def curvature(
        self, x: np.ndarray, d: np.ndarray, iteration: int, rtol: float | None = None
    ) -> tuple[np.ndarray, float]:
        """H d and (d, H d), exact without `rtol`."""
        self.hessians += 1
        if rtol is None:
            h = like(x, getattr(self.problem, self.action_name)(x, d), self.action_name)
        else:
            name = f"{self.action_name}_within"
            h = like(x, getattr(self.problem, name)(x, d, rtol), name)
        return self._with_curvature(h, x, d, iteration)

    def model_curvature(
        self, model: Callable[[np.ndarray], np.ndarray], x: np.ndarray, d: np.ndarray, iteration: int
    ) -> tuple[np.ndarray, float]:
        """H d and (d, H d) of a model of the Hessian."""
        self.hessians += 1
        return self._with_curvature(like(x, model(d), self.model_name), x, d, iteration)

    def _with_curvature(self, h: np.ndarray, x: np.ndarray, d: np.ndarray, iteration: int) -> tuple[np.ndarray, float]:
        curvature = self.inner(d, h)
        if not math.isfinite(curvature):
            raise NonFiniteError(f"iteration {iteration}: the Hessian action is not finite, (d, Hd) = {curvature}", x)
        return h, curvature

    def inner(self, a: np.ndarray, b: np.ndarray) -> float:
        """The inner product (a, b)."""
        return float(self.problem.inner(a, b))


def like(x: np.ndarray, v: np.ndarray, name: str) -> np.ndarray:
    """A copy of `v` (the problem may reuse its memory), refused unless it has the shape of `x`."""
    return np.array(shaped(x, v, name))


def shaped(x: np.ndarray, v: np.ndarray, name: str) -> np.ndarray:
    """`v` as an array of floats, refused unless it has the shape of `x`."""
    try:
        v = np.asarray(v, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} returned {_kind(v)}: give an array of numbers of the shape of x, {x.shape}"
        ) from error
    if v.shape != x.shape:
        raise InputError(f"{name} returned an array of shape {v.shape}: give one of the shape of x, {x.shape}")
    return v


def number(name: str, value: float) -> float:
    """`value` as a float, refused if it is no number."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} returned {_kind(value)}: give a number") from error


def error_estimate(name: str, error: float) -> float:
    """The error estimate as a number, refused if it is none."""
    error = number(name, error)
    if not error >= 0:
        raise InputError(f"{name} returned the error {error}: give a number >= 0, infinity where it is unknown")
    return error


def _kind(value: object) -> str:
    """What a value is, in an error message."""
    shape = f" of shape {value.shape}" if isinstance(value, np.ndarray) else ""
    return "None" if value is None else f"a {type(value).__name__}{shape}"


class ExactOracle:
    """All the accuracy the problem has, at every call."""

    inexact = False
    #: Relative error the Hessian's model was asked for.
    model_rtol = 0.0

    def __init__(self, evaluator: Evaluator):
        self.evaluator, self.inner = evaluator, evaluator.inner

    def aim(self, tolerance: float) -> None:
        """Hear the norm of the gradient at which the run ends."""

    def first_point(self, x: np.ndarray) -> Point:
        """J and its gradient at the first guess.

        Raises
        ------
        NonFiniteError
            If J is not finite there.
        """
        value = self._first_value(x)
        if not math.isfinite(value.value):
            raise self.evaluator.no_value(
                f"iteration 0: J = {value.value} at the first guess; start where J is finite", x
            )
        return Point(x, value, self.gradient(x, 0, x))

    def _first_value(self, x: np.ndarray) -> Estimate:
        return Estimate(self.evaluator.value(x))

    def gradient(
        self,
        x: np.ndarray,
        iteration: int,
        last_good: np.ndarray,
        *,
        guess: float = math.inf,
        radius: float | None = None,
    ) -> Gradient:
        """The gradient at x, in a ball of this radius; `guess` is a norm it may have."""
        return Gradient(*self.evaluator.gradient(x, iteration, last_good))

    def trial_gradient(self, x: np.ndarray, iteration: int, last_good: np.ndarray, **expected) -> Gradient | None:
        """The gradient at a trial point, as :meth:`gradient` has it; ``None`` where its square overflows."""
        try:
            return self.gradient(x, iteration, last_good, **expected)
        except GradientOverflowError:
            return None

    def compare(self, point: Point, trial: np.ndarray, predicted: float, iteration: int) -> tuple[Point, Estimate]:
        """J at the iterate and at the trial point, accurate enough to judge the predicted reduction."""
        return point, Estimate(self.evaluator.value(trial))

    def start_path(self, x: np.ndarray, target: float) -> None:
        """Products at x are wanted next; CG will stop at the residual `target` relative to |g|."""

    def curvature(
        self, x: np.ndarray, d: np.ndarray, dd: float, iteration: int, target: float
    ) -> tuple[np.ndarray, float, float]:
        """H d, (d, H d) and the relative error asked for; `dd` is (d, d), `target` the CG tolerance over |r_j|."""
        return *self.evaluator.curvature(x, d, iteration), 0.0

    def refined(self, point: Point, iteration: int, radius: float) -> Point:
        """The same point with a gradient accurate enough for a ball of this radius."""
        return point

    def memory(self) -> dict[str, float]:
        """What it has learned, for a checkpoint."""
        return {}

    def recall(self, memory: dict[str, float]) -> None:
        """Take back what `memory` gave."""
