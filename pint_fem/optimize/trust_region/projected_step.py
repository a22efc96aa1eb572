"""The step of the bounded minimiser: the mathematics is in :mod:`pint_fem.optimize.trust_region.bounded`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pint_fem.optimize.evaluator import Evaluator, like
from pint_fem.optimize.trust_region.steihaug import CGStop

__all__ = ["Box", "BoxStep", "ProjectedSteps"]

# mu_0: the decrease asked for, relative to that of the linear model.
_DECREASE = 0.01

# The next trial of a search is the minimiser of the model towards the last one, within these parts of its length.
_SHORTEST, _LONGEST = 0.1, 0.5

# Trials of one projected search; the Cauchy step stands if none succeeds.
_TRIALS = 8

# The first radius in lengths of the Cauchy step: generous, as a retry needs no Hessian action.
_FIRST_RADIUS = 10.0

# A step this close to the ball's boundary has reached it.
_ON_BOUNDARY = 1 - 1e-10


class Box:
    """The bounds, this process's parts.

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

    def start(self, x: np.ndarray) -> _Place:
        """No step yet, no component held."""
        return _Place(np.zeros_like(x), np.full(x.shape, math.nan))

    def move(self, x: np.ndarray, place: _Place, p: np.ndarray) -> _Place:
        """P(x + s + p) - x; held components stay, and those that meet a bound are held there from now on."""
        y = x + place.s + p
        bound = np.where(y <= self.lower, self.lower, np.where(y >= self.upper, self.upper, math.nan))
        bound = np.where(place.held, place.bound, bound)
        return _Place(np.where(np.isnan(bound), place.s + p, bound - x), bound)


@dataclass(frozen=True)
class _Place:
    """A step s and the bounds it has met.

    The bounds themselves are kept because ``x + (l - x)`` need not be ``l``.
    """

    s: np.ndarray
    bound: np.ndarray  # nan where the component is free

    @property
    def held(self) -> np.ndarray:
        return ~np.isnan(self.bound)

    def free(self, v: np.ndarray) -> np.ndarray:
        """E v: zero where held."""
        return np.where(self.held, 0.0, v)

    def point(self, x: np.ndarray) -> np.ndarray:
        return np.where(self.held, self.bound, x + self.s)


@dataclass(frozen=True)
class BoxStep:
    """A trial point and what the model says about it.

    Attributes
    ----------
    point : ndarray, shape (n,)
        In the box; exactly on the bounds it met.
    norm : float
        Length of the step.
    reduction : float
        J(x) minus the model there.
    cg_iterations : int
        Hessian actions the step is made of.
    stop : CGStop
        Why the last conjugate gradients ended.
    """

    point: np.ndarray
    norm: float
    reduction: float
    cg_iterations: int
    stop: CGStop


class ProjectedSteps:
    """Steps from one iterate, for one radius after another.

    A smaller radius asks for the same Hessian actions up to where it interferes: they are remembered in order, so the
    retry after a rejected step mostly needs none. All remembered pairs are in `pairs`.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        box: Box,
        x: np.ndarray,
        g: np.ndarray,
        *,
        tolerance: float,
        max_it: int,
        preconditioner: Callable[[np.ndarray], np.ndarray] | None,
        iteration: int,
    ):
        self.evaluator, self.inner, self.box = evaluator, evaluator.inner, box
        self.x, self.g, self.iteration = x, g, iteration
        self.tolerance, self.max_it, self.preconditioner = tolerance, max_it, preconditioner
        self.descent = -box.projected_gradient(x, g)
        self.slope = self.inner(self.descent, self.descent)
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self._curvatures: list[float] = []
        self._used = 0

    # -- Hessian actions ----------------------------------------------------------------------------------------------
    def _product(self, d: np.ndarray) -> tuple[np.ndarray, float]:
        """H d and (d, H d), remembered if the last step asked for the same at this place."""
        if self._used < len(self.pairs):
            gap = d - self.pairs[self._used][0]
            if self.inner(gap, gap) != 0:
                del self.pairs[self._used :], self._curvatures[self._used :]
        if self._used == len(self.pairs):
            hd, curvature = self.evaluator.curvature(self.x, d, self.iteration)
            self.pairs.append((d, hd))
            self._curvatures.append(curvature)
        self._used += 1
        return self.pairs[self._used - 1][1], self._curvatures[self._used - 1]

    def first_radius(self) -> float:
        """Some lengths of the Cauchy step, which scales as x does whatever the unit of J."""
        self._used = 0
        _, curvature = self._product(self.descent)
        length = _FIRST_RADIUS * (self.slope / abs(curvature) * math.sqrt(self.slope) if curvature else math.inf)
        return length if math.isfinite(length) else math.sqrt(self.slope)

    def positive_pairs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The (d, H d) of positive curvature, for a preconditioner that learns."""
        return [pair for pair, curvature in zip(self.pairs, self._curvatures, strict=True) if curvature > 0]

    # -- the step -----------------------------------------------------------------------------------------------------
    def step(self, radius: float) -> BoxStep:
        """Cauchy step, then conjugate gradients and projected searches on smaller and smaller faces."""
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
        return BoxStep(self.box.project(place.point(self.x)), math.sqrt(ss), reduction, self._used, stop)

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

    def _precondition(self, place: _Place, r: np.ndarray, rr: float) -> tuple[np.ndarray, float]:
        if self.preconditioner is None:
            return r, rr
        z = place.free(like(r, self.preconditioner(r), "preconditioner"))
        rz = self.inner(r, z)
        if not 0 < rz < math.inf:
            raise ValueError(f"(r, P r) = {rz}: the preconditioner must be positive definite in the inner product")
        return z, rz

    def _conjugate_gradients(self, place: _Place, r: np.ndarray, rr: float, radius: float, last):
        """p on the free components with H p and why it ends there; at least one iteration.

        `last` is the direction before, with its (r, r), if it belongs to the same sequence.
        """
        s = place.s
        p, hp = np.zeros_like(s), np.zeros_like(s)
        z, rz = self._precondition(place, r, rr)
        d = -z if last is None or self.preconditioner is not None else (rz / last[1]) * last[0] - z
        while True:
            hd, curvature = self._product(d)
            tau = _exit_length(self.inner, s + p, d, radius)
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

    def _search(self, place: _Place, hs: np.ndarray, r: np.ndarray, p: np.ndarray, hp: np.ndarray):
        """The next place, H times its step and whether it is all of p; None if no trial lowers the model enough."""
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


def _exit_length(inner, s: np.ndarray, d: np.ndarray, radius: float) -> float:
    """The tau >= 0 with |s + tau d| = radius for s in the ball, free of cancellation."""
    sd, dd = inner(s, d), inner(d, d)
    gap = max(radius * radius - inner(s, s), 0.0)
    root = math.sqrt(sd * sd + dd * gap)
    return gap / (root + sd) if sd >= 0 else (root - sd) / dd
