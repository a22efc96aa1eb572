"""The conjugate gradient path of Steihaug and Toint: the mathematics is in :mod:`pint_fem.optimize.trust_region`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from itertools import count

import numpy as np

__all__ = ["CGStop", "SteihaugPath"]


# The first radius in lengths of the Cauchy step: generous, as a retry needs no Hessian action.
_FIRST_RADIUS = 10.0


class CGStop(str, Enum):
    """Why the conjugate gradient path of one iteration ended; compares equal to its text."""

    NONE = ""
    RESIDUAL = "residual"
    BOUNDARY = "boundary"
    NEGATIVE_CURVATURE = "negative curvature"
    MAX_IT = "maximum iterations"


@dataclass(frozen=True)
class _Segment:
    """The path from p_j along d_j, with the numbers that say where it leaves a ball and how far it lowers the model."""

    direction: np.ndarray
    length: float  # alpha_j, infinite along a direction of negative curvature
    curvature: float  # (d_j, H d_j)
    rr: float  # (r_j, r_j)
    pp: float  # (p_j, p_j)
    pd: float  # (p_j, d_j), negative by round-off only
    dd: float  # (d_j, d_j)
    reduction: float  # J - m(p_j)

    def exit_length(self, radius: float) -> float:
        """The tau >= 0 with |p_j + tau d_j| = radius, free of cancellation."""
        gap = max(radius**2 - self.pp, 0.0)
        root = math.sqrt(self.pd**2 + self.dd * gap)
        return gap / (root + self.pd) if self.pd >= 0 else (root - self.pd) / self.dd

    def reduction_at(self, tau: float) -> float:
        return self.reduction + tau * self.rr - 0.5 * tau**2 * self.curvature


@dataclass(frozen=True)
class _Step:
    p: np.ndarray
    norm: float
    reduction: float
    cg_iterations: int
    stop: CGStop


class SteihaugPath:
    """The conjugate gradient path at one iterate, computed as far as the radii asked for need it."""

    def __init__(
        self,
        evaluator,
        x: np.ndarray,
        g: np.ndarray,
        g_norm: float,
        *,
        tolerance: float,
        max_it: int,
        iteration: int,
    ):
        self.evaluator, self.x, self.iteration = evaluator, x, iteration
        self.tolerance, self.max_it = tolerance, max_it
        self.segments: list[_Segment] = []
        self._p, self._r, self._d = np.zeros_like(x), g, -g
        self._rr, self._pp, self._reduction = g_norm**2, 0.0, 0.0

    def _extend(self) -> None:
        """Conjugate gradient iteration j: one Hessian action."""
        inner, p, d, rr = self.evaluator.inner, self._p, self._d, self._rr
        hd, curvature = self.evaluator.curvature(self.x, d, self.iteration)
        alpha = rr / curvature if curvature > 0 else math.inf
        pd = inner(p, d) if self.segments else 0.0
        segment = _Segment(d, alpha, curvature, rr, self._pp, pd, inner(d, d), self._reduction)
        self.segments.append(segment)
        if math.isfinite(alpha):
            self._p = p + alpha * d
            self._r = self._r + alpha * hd
            self._rr = inner(self._r, self._r)
            self._d = (self._rr / rr) * d - self._r
            self._pp += 2 * alpha * segment.pd + alpha**2 * segment.dd
            self._reduction = segment.reduction_at(alpha)

    def step(self, radius: float) -> _Step:
        """Follow the path from 0 to its end or to the boundary of the ball, whichever comes first."""
        p = np.zeros_like(self.x)
        for j in count():
            if j == len(self.segments):
                if self._rr <= self.tolerance**2:
                    return _Step(p, math.sqrt(self._pp), self._reduction, j, CGStop.RESIDUAL)
                if j == self.max_it:
                    return _Step(p, math.sqrt(self._pp), self._reduction, j, CGStop.MAX_IT)
                self._extend()
            segment = self.segments[j]
            tau = segment.exit_length(radius)
            if tau <= segment.length:
                stop = CGStop.BOUNDARY if segment.curvature > 0 else CGStop.NEGATIVE_CURVATURE
                return _Step(p + tau * segment.direction, radius, segment.reduction_at(tau), j + 1, stop)
            p += segment.length * segment.direction

    def first_radius(self) -> float:
        """Some lengths |g|^3 / |(g, Hg)| of the Cauchy step, which scales as x does whatever the unit of J."""
        if not self.segments:
            self._extend()
        first = self.segments[0]
        cauchy = first.rr**1.5 / abs(first.curvature) if first.curvature else math.inf
        return _FIRST_RADIUS * cauchy if math.isfinite(_FIRST_RADIUS * cauchy) else math.sqrt(first.rr)
