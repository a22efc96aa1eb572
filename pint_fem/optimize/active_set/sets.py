r"""The active sets of bounds and of a weighted absolute value, and the faces on which both are smooth.

With the diagonal inner product :math:`(a, b) = \sum_i w_i a_i b_i` and numbers :math:`\beta_i \ge 0` let

.. math:: F(z) = J(z) + \sum_i w_i \beta_i |z_i|, \qquad l \le z \le u,

and let :math:`g` be the Riesz representative of :math:`J'(z)`. For any :math:`c > 0`, which may be another one for each
component, the first-order conditions are

.. math::
    z_i = \min(\max(S(y_i), l_i), u_i), \qquad y = z - c g, \qquad S(y_i) = \operatorname{sign}(y_i)\max(|y_i| - c
    \beta_i, 0).

Where the minimum or the maximum is attained by a bound, or :math:`S(y_i) = 0` although :math:`\beta_i > 0`, the
component is *held*, at :math:`l_i`, :math:`u_i` or 0; elsewhere it is *free*, with the equation :math:`g_i + \beta_i
\operatorname{sign}(y_i) = 0`. These are the five sets of [2]: lower, upper, zero, positive, negative; without
:math:`\beta` the three of [1].

At a z within the bounds, F is smooth on the *face* of vectors whose components have the signs that those of z have, or
that a descent from zero gives them. With s these signs, the projection of :math:`g + \beta s` on the directions
that do not leave the face is the subgradient of least norm of F within the bounds: the measure by which runs stop.

References
----------
[1] M. Hintermüller, K. Ito, K. Kunisch, The primal-dual active set strategy as a semismooth Newton method, SIAM J.
    Optim. 13 (2002) 865-888.
[2] G. Stadler, Elliptic optimal control problems with L1-control cost and applications for the placement of control
    devices, Comput. Optim. Appl. 44 (2009) 159-181.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pint_fem.optimize.trust_region.projected_step import Box

__all__ = ["LOWER", "NEGATIVE", "POSITIVE", "UPPER", "ZERO", "ActiveSets", "NonsmoothPart"]

LOWER, NEGATIVE, ZERO, POSITIVE, UPPER = -2, -1, 0, 1, 2
"""The set of a component. Free components without an absolute value are in the set POSITIVE."""


@dataclass(frozen=True)
class ActiveSets:
    """The set of each component and what follows from it for a Newton step.

    Attributes
    ----------
    labels : ndarray of int8, shape (n,)
        LOWER, NEGATIVE, ZERO, POSITIVE or UPPER.
    held : ndarray of bool, shape (n,)
        Components that are held.
    target : ndarray, shape (n,)
        Where they are held; 0 for the free ones.
    slope : ndarray, shape (n,)
        ``beta_i sign(y_i)`` of the free components, 0 for the others.
    """

    labels: np.ndarray
    held: np.ndarray
    target: np.ndarray
    slope: np.ndarray

    def free(self, v: np.ndarray) -> np.ndarray:
        """E v: zero where held."""
        return np.where(self.held, 0.0, v)


class NonsmoothPart:
    """Bounds and a weighted absolute value, this process's parts.

    Parameters
    ----------
    box : Box
        The bounds.
    l1 : ndarray, shape (n,)
        The numbers beta_i >= 0.
    inner : callable
        The inner product.
    """

    def __init__(self, box: Box, l1: np.ndarray, inner: Callable[[np.ndarray, np.ndarray], float]):
        self.box, self.l1, self._inner = box, l1, inner
        self._fixed = box.lower == box.upper

    def penalty(self, z: np.ndarray) -> float:
        """The sum ``w_i beta_i |z_i|`` over all processes (collective)."""
        return self._inner(self.l1, np.abs(z))

    def sets(self, z: np.ndarray, g: np.ndarray, c: float) -> ActiveSets:
        """The sets at z with the gradient g of J, for one factor c."""
        y = z - c * g
        shrunk = np.sign(y) * np.maximum(np.abs(y) - c * self.l1, 0.0)
        labels = np.where((y < 0) & (self.l1 > 0), NEGATIVE, POSITIVE).astype(np.int8)
        labels[(shrunk == 0) & (self.l1 > 0)] = ZERO
        return self._within_bounds(labels, shrunk)

    def next_sets(self, last: ActiveSets, z: np.ndarray, g: np.ndarray, c: float) -> ActiveSets:
        """The sets at the end z of the step for the sets `last`, with a factor of its own for each component: c for
        those that were held, an infinite one for those that were free, for which the step has solved the equation.

        A free component then changes its sign by way of zero, and a held one becomes free before it is held elsewhere.
        """
        keeps = (self.l1 == 0) | (last.labels * z > 0)
        labels = np.where(keeps, last.labels, ZERO).astype(np.int8)
        after_free = self._within_bounds(labels, np.where(keeps, z, 0.0)).labels
        return self.with_labels(np.where(last.held, self.sets(z, g, c).labels, after_free))

    def _within_bounds(self, labels: np.ndarray, shrunk: np.ndarray) -> ActiveSets:
        """The sets of labels without bounds, where components would be at `shrunk`."""
        labels[shrunk < self.box.lower] = LOWER
        labels[(shrunk > self.box.upper) | self._fixed] = UPPER
        return self.with_labels(labels)

    def with_labels(self, labels: np.ndarray) -> ActiveSets:
        """The sets that are given by their labels."""
        held = (labels == LOWER) | (labels == ZERO) | (labels == UPPER)
        target = np.where(labels == LOWER, self.box.lower, np.where(labels == UPPER, self.box.upper, 0.0))
        return ActiveSets(labels, held, target, np.where(held, 0.0, labels * self.l1))

    def residual(self, z: np.ndarray, g: np.ndarray, c: float) -> np.ndarray:
        """How far z is from the point that the first-order conditions name, over c: zero at a minimiser only, and
        continuous, out of the bounds as well.
        """
        y = z - c * g
        return (z - self.box.project(np.sign(y) * np.maximum(np.abs(y) - c * self.l1, 0.0))) / c

    def face(self, z: np.ndarray, g: np.ndarray) -> tuple[Box, np.ndarray]:
        """The face of a z within the bounds and the gradient of F on it."""
        up, down = z > 0, z < 0
        at_zero = ~(up | down)
        up, down = up | (at_zero & (g < -self.l1)), down | (at_zero & (g > self.l1))
        smooth = self.l1 == 0
        lower = np.where(smooth | down, self.box.lower, np.maximum(self.box.lower, 0.0))
        upper = np.where(smooth | up, self.box.upper, np.minimum(self.box.upper, 0.0))
        stays = ~(smooth | up | down)  # zero, which is then within the bounds
        lower, upper = np.where(stays, 0.0, lower), np.where(stays, 0.0, upper)
        return Box(lower, upper), g + self.l1 * (up.astype(float) - down)

    def least_subgradient(self, z: np.ndarray, g: np.ndarray) -> np.ndarray:
        """The subgradient of least norm of F within the bounds, at a z within them."""
        face, gradient = self.face(z, g)
        return face.projected_gradient(z, gradient)
