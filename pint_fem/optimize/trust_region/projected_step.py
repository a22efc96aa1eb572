"""The step within bounds and a ball: projected Cauchy step, conjugate gradients on faces, projected searches.

The mathematics and the symbols are those of :mod:`pint_fem.optimize.trust_region.bounded`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pint_fem.optimize.oracle import ExactOracle, Iterate
from pint_fem.optimize.records import CGStop
from pint_fem.optimize.trust_region.acceptance import Step, exit_length, first_radius

__all__ = ["Box", "ProjectedSteps"]

# mu_0: the decrease required, relative to that of the linear model.
_DECREASE = 0.01

# The next trial of a search is the minimiser of the model towards the last one, within these parts of its length.
_SHORTEST, _LONGEST = 0.1, 0.5

# Trials of one projected search; the Cauchy step stands if none succeeds.
_TRIALS = 8

# A step this close to the ball's boundary has reached it.
_ON_BOUNDARY = 1 - 1e-10


class Box:
    """The set of vectors within bounds, this process's parts.

    Parameters
    ----------
    lower, upper : ndarray, shape (n,)
        -inf and inf where there is no bound.
    """

    def __init__(self, lower: np.ndarray, upper: np.ndarray):
        self.lower, self.upper = lower, upper

    def project(self, x: np.ndarray) -> np.ndarray:
        """The nearest point of the box."""
        return np.clip(x, self.lower, self.upper)

    def projected_gradient(self, x: np.ndarray, g: np.ndarray) -> np.ndarray:
        """g without the components that point out of the box at x."""
        out = ((x <= self.lower) & (g > 0)) | ((x >= self.upper) & (g < 0)) | (self.lower == self.upper)
        return np.where(out, 0.0, g)

    def start(self, x: np.ndarray) -> _BoxPoint:
        """No step yet, no component held."""
        return _BoxPoint(np.zeros_like(x), np.full(x.shape, math.nan))

    def move(self, x: np.ndarray, place: _BoxPoint, p: np.ndarray) -> _BoxPoint:
        """P(x + s + p) - x; held components stay, and those that meet a bound are held there from now on."""
        y = x + place.s + p
        bound = np.where(y <= self.lower, self.lower, np.where(y >= self.upper, self.upper, math.nan))
        bound = np.where(place.held, place.bound, bound)
        return _BoxPoint(np.where(np.isnan(bound), place.s + p, bound - x), bound)


@dataclass(frozen=True)
class _BoxPoint:
    """A step s and the bounds it has met.

    The bounds themselves are stored because ``x + (l - x)`` need not be ``l``.
    """

    s: np.ndarray
    bound: np.ndarray  # nan where the component is free

    @property
    def held(self) -> np.ndarray:
        """Which components are on a bound that the step has met."""
        return ~np.isnan(self.bound)

    def free(self, v: np.ndarray) -> np.ndarray:
        """E v: zero where held."""
        return np.where(self.held, 0.0, v)

    def point(self, x: np.ndarray) -> np.ndarray:
        """x + s, exactly on the bounds that are met."""
        return np.where(self.held, self.bound, x + self.s)


class ProjectedSteps:
    """Steps from one iterate, for one radius after another.

    A smaller radius requires the same Hessian actions until the ball interferes: they are stored in order, so the
    retry after a rejected step mostly computes none.

    Parameters
    ----------
    oracle : ExactOracle
        Products with the Hessian.
    box : Box
        The bounds.
    iterate : Iterate
        The iterate; its gradient's norm is that of the projected one.
    tolerance : float
        Conjugate gradients end where the residual on the free components is no larger.
    max_it : int
        Most Hessian actions, but for those of a Cauchy step that meets bounds.
    preconditioner : callable, optional
        P, self-adjoint and positive definite; on the free components, selected by E, E P E is applied.
    iteration : int
        For error messages.
    """

    def __init__(
        self,
        oracle: ExactOracle,
        box: Box,
        iterate: Iterate,
        *,
        tolerance: float,
        max_it: int,
        preconditioner: Callable[[np.ndarray], np.ndarray] | None,
        iteration: int,
    ):
        self.oracle, self.inner, self.box = oracle, oracle.inner, box
        self.x, self.g, self.iteration = iterate.x, iterate.gradient.vector, iteration
        self.tolerance, self.max_it, self.preconditioner = tolerance, max_it, preconditioner
        self.descent = -box.projected_gradient(self.x, self.g)
        self.slope = self.inner(self.descent, self.descent)
        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self._curvatures: list[float] = []
        self._used = 0

    # -- Hessian actions ----------------------------------------------------------------------------------------------
    def _product(self, d: np.ndarray) -> tuple[np.ndarray, float]:
        """H d and (d, H d), stored if the last step used the same direction as its product of this number."""
        if self._used < len(self._pairs):
            gap = d - self._pairs[self._used][0]
            if self.inner(gap, gap) != 0:
                del self._pairs[self._used :], self._curvatures[self._used :]
        if self._used == len(self._pairs):
            hd, curvature, _ = self.oracle.curvature(self.x, d, math.nan, self.iteration, math.nan)
            self._pairs.append((d, hd))
            self._curvatures.append(curvature)
        self._used += 1
        return self._pairs[self._used - 1][1], self._curvatures[self._used - 1]

    def first_radius(self) -> float:
        """A multiple of the length of the Cauchy step."""
        self._used = 0
        _, curvature = self._product(self.descent)
        cauchy = self.slope / abs(curvature) * math.sqrt(self.slope) if curvature else math.inf
        return first_radius(cauchy, math.sqrt(self.slope))

    def pairs(self, products: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The pairs (d, H d) of positive curvature: of the last step and of longer steps that were rejected."""
        return [pair for pair, curvature in zip(self._pairs, self._curvatures, strict=True) if curvature > 0]

    # -- the step -----------------------------------------------------------------------------------------------------
    def step(self, radius: float) -> Step:
        """The Cauchy step, then conjugate gradients and projected searches on smaller and smaller faces."""
        self._used = 0
        place, hs, stop, last = self._cauchy(radius)
        while True:
            r = place.free(self.g + hs)
            rr, ss = self.inner(r, r), self.inner(place.s, place.s)
            if stop is None and rr <= self.tolerance**2:
                stop = CGStop.RESIDUAL
            elif stop is None and math.sqrt(ss) >= _ON_BOUNDARY * radius:
                stop = CGStop.BOUNDARY
            elif stop is None and self._used >= self.max_it:
                stop = CGStop.MAX_IT
            if stop is not None:
                break
            p, hp, cg_stop = self._conjugate_gradients(place, r, rr, radius, last)
            last = None
            found = self._search(place, hs, r, p, hp)
            if found is None:
                stop = cg_stop
                break
            place, hs, complete = found
            # Only conjugate gradients that ended with a small residual on one face are run again on the next.
            stop = None if cg_stop is CGStop.RESIDUAL and not complete else cg_stop
        reduction = -(self.inner(self.g, place.s) + 0.5 * self.inner(place.s, hs))
        return Step(self.box.project(place.point(self.x)), math.sqrt(ss), reduction, self._used, stop)

    def _cauchy(self, radius: float):
        """The Cauchy step, H times it, the stop if it is complete, and the CG direction it is, if it met no bound."""
        d, start = self.descent, self.box.start(self.x)
        hd, curvature = self._product(d)
        minimiser = self.slope / curvature if curvature > 0 else math.inf
        exit_length = radius / math.sqrt(self.slope)
        alpha = min(minimiser, exit_length)
        while True:
            place = self.box.move(self.x, start, alpha * d)
            if not self._any(place.held & (d != 0)):
                stop = None
                if alpha == exit_length:
                    stop = CGStop.BOUNDARY if curvature > 0 else CGStop.NEGATIVE_CURVATURE
                return place, alpha * hd, stop, ((d, self.slope) if alpha == minimiser else None)
            hs, shs = self._product(place.s)
            gs = self.inner(self.g, place.s)
            if gs + 0.5 * shs <= _DECREASE * gs:
                return place, hs, None, None
            alpha *= min(max(-gs / shs, _SHORTEST), _LONGEST)  # shs > 0 as the model does not fall enough

    def _any(self, mask: np.ndarray) -> bool:
        """Whether a component of any process is in the mask."""
        indicator = mask.astype(float)
        return self.inner(indicator, indicator) > 0

    def _precondition(self, place: _BoxPoint, r: np.ndarray, rr: float) -> tuple[np.ndarray, float]:
        """z = E P r on the free components, and (r, z)."""
        if self.preconditioner is None:
            return r, rr
        z = place.free(self.preconditioner(r))
        rz = self.inner(r, z)
        if not 0 < rz < math.inf:
            raise ValueError(f"(r, P r) = {rz}: the preconditioner must be positive definite in the inner product")
        return z, rz

    def _conjugate_gradients(self, place: _BoxPoint, r: np.ndarray, rr: float, radius: float, last):
        """The direction p on the free components, H p, and why it ends; at least one iteration.

        `last` is the direction before, with its (r, r), if it belongs to the same sequence.
        """
        s = place.s
        p, hp = np.zeros_like(s), np.zeros_like(s)
        z, rz = self._precondition(place, r, rr)
        d = -z if last is None or self.preconditioner is not None else (rz / last[1]) * last[0] - z
        while True:
            hd, curvature = self._product(d)
            sp = s + p
            tau = exit_length(self.inner(sp, sp), self.inner(sp, d), self.inner(d, d), radius)
            alpha = rz / curvature if curvature > 0 else math.inf
            if tau <= alpha:
                stop = CGStop.BOUNDARY if curvature > 0 else CGStop.NEGATIVE_CURVATURE
                return p + tau * d, hp + tau * hd, stop
            p, hp = p + alpha * d, hp + alpha * hd
            r = r + alpha * place.free(hd)
            rr = self.inner(r, r)
            if rr <= self.tolerance**2:
                return p, hp, CGStop.RESIDUAL
            if self._used >= self.max_it:
                return p, hp, CGStop.MAX_IT
            old = rz
            z, rz = self._precondition(place, r, rr)
            d = (rz / old) * d - z

    def _search(self, place: _BoxPoint, hs: np.ndarray, r: np.ndarray, p: np.ndarray, hp: np.ndarray):
        """The next step, H times it, and whether p was used in full; None if no trial lowers the model enough."""
        beta = 1.0
        for _ in range(_TRIALS):
            new = self.box.move(self.x, place, beta * p)
            if not self._any(new.held & ~place.held):
                return new, hs + beta * hp, beta == 1
            if self._used >= self.max_it:
                return None
            moved = new.s - place.s
            h_moved, curvature = self._product(moved)
            slope = self.inner(r, moved)
            if slope + 0.5 * curvature <= _DECREASE * min(slope, 0.0):
                return new, hs + h_moved, False
            beta *= min(max(-slope / curvature, _SHORTEST), _LONGEST) if curvature > 0 else _LONGEST
        return None
