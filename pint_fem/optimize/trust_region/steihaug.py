r"""The conjugate gradient path of Steihaug and Toint, preconditioned, in a ball of the problem's norm.

The path is that of :mod:`pint_fem.optimize.trust_region.newton_cg`; with a preconditioner :math:`P`, self-adjoint and
positive definite in :math:`(\cdot, \cdot)`, it runs along

.. math::
    z_j = P r_j, \quad d_j = -z_j + \frac{(r_j, z_j)}{(r_{j-1}, z_{j-1})} d_{j-1}, \quad
    \alpha_j = \frac{(r_j, z_j)}{(d_j, H d_j)}

and is left where it first crosses the sphere :math:`|p| = \Delta`. Without :math:`P`, :math:`|p_j|` grows with
:math:`j`; with it the path may come back into the ball later, which is not used. Either way the step for a
smaller radius is the same path cut earlier.

**Products that are inexact.** Let :math:`h_j = H d_j + e_j` be the product that the problem returns. The recurrences
keep :math:`r_j = g + q_j`, :math:`q_j = \sum_{i<j} \alpha_i h_i`, and :math:`(r_j, d_j) = -(r_j, z_j)` as
:math:`\alpha_j` uses :math:`(d_j, h_j)`. But the reduction :math:`\tau (r_j, z_j) - \tfrac12 \tau^2 (d_j, h_j)` along
:math:`p_j + \tau d_j` supposes :math:`(p_j, h_j) = (q_j, d_j)`, which holds for a symmetric operator only. The
prediction is therefore :math:`-(g, p) - \tfrac12 (p, q)` itself, whose increment is

.. math:: \tau \left((r_j, z_j) - \tfrac12 [(p_j, h_j) - (q_j, d_j)]\right) - \tfrac12 \tau^2 (d_j, h_j),
    \quad (q_j, d_j) = -(r_j, z_j) - (g, d_j):

two more inner products. It need not rise along the path any more. A part of the path at whose end it would be less than
half of its value at some earlier node is not taken, the step ends before it. So the predicted reduction is never less
than half that of the Cauchy step, which suffices for convergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import numpy as np

from pint_fem.optimize.oracle import ExactOracle, Iterate
from pint_fem.optimize.records import CGStop
from pint_fem.optimize.trust_region.acceptance import Step, exit_length, first_radius

__all__ = ["SteihaugPath"]

# The prediction of a step in terms of the largest on its path, where products are inexact.
_LEAST_SHARE = 0.5


@dataclass(frozen=True)
class _Segment:
    """The path from p_j along d_j, with the numbers that give its exit from a ball and the reduction of the model."""

    direction: np.ndarray
    product: np.ndarray | None  # H d_j, where it is stored
    length: float  # alpha_j, infinite along a direction of negative curvature
    curvature: float  # (d_j, H d_j)
    slope: float  # (r_j, z_j), corrected for inexact products
    rr: float  # (r_j, r_j)
    pp: float  # (p_j, p_j)
    pd: float  # (p_j, d_j)
    dd: float  # (d_j, d_j)
    reduction: float  # J - m(p_j)
    rtol: float  # relative error allowed for the product
    rh: float  # (r_j, H d_j) and (H d_j, H d_j), nan unless follow_gradient
    hh: float

    def exit_length(self, radius: float) -> float:
        """The tau >= 0 with |p_j + tau d_j| = radius."""
        return exit_length(self.pp, self.pd, self.dd, radius)

    def reduction_at(self, tau: float) -> float:
        """J - m(p_j + tau d_j)."""
        return self.reduction + tau * self.slope - 0.5 * tau * tau * self.curvature

    def model_norm_at(self, tau: float) -> float:
        """|g + H (p_j + tau d_j)|, nan unless follow_gradient."""
        return math.sqrt(max(self.rr + 2 * tau * self.rh + tau * tau * self.hh, 0.0))


class SteihaugPath:
    """The conjugate gradient path at one iterate, computed as far as the radii of the steps require.

    Parameters
    ----------
    oracle : ExactOracle
        Products with the Hessian.
    iterate : Iterate
        The iterate.
    tolerance : float
        The path ends where |r_j| is no larger.
    max_it : int
        Most directions.
    iteration : int
        For error messages.
    preconditioner : callable, optional
        P, self-adjoint and positive definite.
    keep_products : bool
        Store the Hessian products, for :meth:`pairs`.
    follow_gradient : bool
        Compute the norm of the model's gradient on the boundary as well.
    """

    def __init__(
        self,
        oracle: ExactOracle,
        iterate: Iterate,
        *,
        tolerance: float,
        max_it: int,
        iteration: int,
        preconditioner: Callable[[np.ndarray], np.ndarray] | None = None,
        keep_products: bool = False,
        follow_gradient: bool = False,
    ):
        self.oracle, self.x, self.g, self.iteration = oracle, iterate.x, iterate.gradient.vector, iteration
        self.tolerance, self.max_it, self.preconditioner = tolerance, max_it, preconditioner
        self.keep_products, self.follow_gradient = keep_products, follow_gradient
        self.segments: list[_Segment] = []
        self._p, self._r, self._d = np.zeros_like(self.x), self.g, None
        self._rr, self._rz, self._pp, self._reduction = iterate.gradient.norm**2, math.nan, 0.0, 0.0
        oracle.start_path(self.x, tolerance / iterate.gradient.norm)

    def _next_direction(self) -> None:
        """The direction d_j from r_j."""
        z, rz = self._r, self._rr
        if self.preconditioner is not None:
            z = self.preconditioner(self._r)
            rz = self.oracle.inner(self._r, z)
            if not 0 < rz < math.inf:
                raise ValueError(
                    f"iteration {self.iteration}: (r, P r) = {rz}: the preconditioner must be positive definite in the "
                    "problem's inner product"
                )
        self._d = -z if self._d is None else (rz / self._rz) * self._d - z
        self._rz = rz

    def _extend(self) -> None:
        """Conjugate gradient iteration j: one Hessian action."""
        self._next_direction()
        inner, p, d, rz, first = self.oracle.inner, self._p, self._d, self._rz, not self.segments
        dd = inner(d, d)
        target = self.tolerance / math.sqrt(self._rr)
        h, curvature, rtol = self.oracle.curvature(self.x, d, dd, self.iteration, target)
        pd = 0.0 if first else inner(p, d)
        slope, rh, hh = rz, math.nan, math.nan
        if rtol > 0 and not first:
            slope = rz - 0.5 * (inner(p, h) + rz + inner(self.g, d))
        if self.follow_gradient:
            rh, hh = inner(self._r, h), inner(h, h)
        alpha = rz / curvature if curvature > 0 else math.inf
        product = h if self.keep_products else None
        segment = _Segment(
            d, product, alpha, curvature, slope, self._rr, self._pp, pd, dd, self._reduction, rtol, rh, hh
        )
        self.segments.append(segment)
        if math.isfinite(alpha):
            self._p = p + alpha * d
            self._r = self._r + alpha * h
            self._rr = inner(self._r, self._r)
            self._pp += 2 * alpha * segment.pd + alpha * alpha * segment.dd
            self._reduction = segment.reduction_at(alpha)

    def step(self, radius: float) -> Step:
        """The step along the path from 0 to its end or to the boundary of the ball, whichever comes first."""
        p, most = np.zeros_like(self.x), 0.0
        for j in count():
            if j == len(self.segments):
                if self._rr <= self.tolerance**2:
                    return self._node(p, j, CGStop.RESIDUAL)
                if j == self.max_it:
                    return self._node(p, j, CGStop.MAX_IT)
                self._extend()
            segment = self.segments[j]
            tau = segment.exit_length(radius)
            outside = tau <= segment.length
            tau = tau if outside else segment.length
            reduction, most = segment.reduction_at(tau), max(most, segment.reduction)
            if segment.rtol > 0 and reduction < _LEAST_SHARE * most:
                return self._node(p, j, CGStop.INEXACT)
            if outside:
                stop = CGStop.BOUNDARY if segment.curvature > 0 else CGStop.NEGATIVE_CURVATURE
                p = p + tau * segment.direction
                norm = segment.model_norm_at(tau)
                return Step(self.x + p, radius, reduction, j + 1, stop, norm, self._rtol(j + 1))
            p += segment.length * segment.direction

    def _node(self, p: np.ndarray, j: int, stop: CGStop) -> Step:
        """The step that ends at p_j."""
        last = j == len(self.segments)
        pp, rr, reduction = self._pp, self._rr, self._reduction
        if not last:
            pp, rr, reduction = self.segments[j].pp, self.segments[j].rr, self.segments[j].reduction
        return Step(self.x + p, math.sqrt(pp), reduction, j, stop, math.sqrt(rr), self._rtol(j))

    def _rtol(self, directions: int) -> float:
        """The smallest relative error allowed for the first products."""
        return min((segment.rtol for segment in self.segments[:directions]), default=0.0)

    def pairs(self, products: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The pairs (d_j, H d_j) of positive curvature among the first products, where these are stored."""
        return [(s.direction, s.product) for s in self.segments[:products] if s.curvature > 0]

    def first_radius(self) -> float:
        """A multiple of the length of the Cauchy step, |g|^3 / |(g, Hg)| without a preconditioner."""
        if not self.segments:
            self._extend()
        first = self.segments[0]
        slope = first.rr if self.preconditioner is None else first.slope
        cauchy = slope / abs(first.curvature) * math.sqrt(first.dd) if first.curvature else math.inf
        return first_radius(cauchy, math.sqrt(first.rr))
