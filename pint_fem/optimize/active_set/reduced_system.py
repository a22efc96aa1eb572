r"""The linear system of a semi-smooth Newton step: the Hessian on the free components, by conjugate gradients.

The step s moves the held components to their targets, :math:`s_A = t_A - z_A`, and the free ones to the zero of the
gradient's model,

.. math:: H_{II}\, s_I = -(g + \beta\sigma)_I - H_{IA}\, s_A .

With E the selection of the free components this is :math:`E H E\, p = -E (g + \beta\sigma + H s_A)`, a self-adjoint
positive definite operator on their space where the Hessian is one. A preconditioner P of the whole space, such as the
inverse of the Hessian without bounds, is used as :math:`E P E`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pint_fem.optimize.active_set.sets import ActiveSets
from pint_fem.optimize.oracle import ExactOracle
from pint_fem.optimize.records import CGStop

__all__ = ["NewtonStep", "newton_step"]

Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class NewtonStep:
    """A step and its product with the Hessian.

    Attributes
    ----------
    s, hs : ndarray, shape (n,)
        The step and H s.
    products : int
        Hessian actions that it took.
    stop : CGStop
        Why conjugate gradients ended; after negative curvature the step is the last one before it.
    pairs : list of pairs of ndarray
        Directions of positive curvature on the free components and their products, where they are stored.
    """

    s: np.ndarray
    hs: np.ndarray
    products: int
    stop: CGStop
    pairs: list[Pair] = field(default_factory=list)


def newton_step(
    oracle: ExactOracle, z: np.ndarray, g: np.ndarray, sets: ActiveSets, *, tolerance: float, max_it: int,
    preconditioner: Callable[[np.ndarray], np.ndarray] | None, iteration: int, keep_pairs: bool = False,
) -> NewtonStep:  # fmt: skip
    """The Newton step for given sets, up to a residual of norm `tolerance` on the free components.

    Parameters
    ----------
    oracle : ExactOracle
        Products with the Hessian at z.
    z, g : ndarray, shape (n,)
        The iterate and the gradient of the smooth part there.
    sets : ActiveSets
        The sets.
    tolerance : float
        Norm of the residual at which conjugate gradients end.
    max_it : int
        Most conjugate gradient iterations.
    preconditioner : callable or None
        P, self-adjoint and positive definite on the whole space.
    iteration : int
        For error messages.
    keep_pairs : bool
        Store directions and products.

    Raises
    ------
    ValueError
        If the preconditioner is not positive definite.
    NonFiniteError
        If a product is not finite.
    """
    inner, products, directions, pairs = oracle.inner, 0, 0, []
    s = np.where(sets.held, sets.target - z, 0.0)
    hs = np.zeros_like(s)
    ss = inner(s, s)
    if ss > 0:
        hs, _, _ = oracle.curvature(z, s, ss, iteration, math.nan)
        products = 1
    r, d, rz = sets.free(g + sets.slope + hs), None, math.nan
    while True:
        if inner(r, r) <= tolerance**2:
            return NewtonStep(s, hs, products, CGStop.RESIDUAL, pairs)
        if directions >= max_it:
            return NewtonStep(s, hs, products, CGStop.MAX_IT, pairs)
        p = r if preconditioner is None else sets.free(preconditioner(r))
        old, rz = rz, inner(r, p)
        if not 0 < rz < math.inf:
            raise ValueError(f"(r, P r) = {rz}: the preconditioner must be positive definite in the inner product")
        d = -p if d is None else (rz / old) * d - p
        hd, curvature, _ = oracle.curvature(z, d, math.nan, iteration, math.nan)
        products += 1
        if curvature <= 0:
            return NewtonStep(s, hs, products, CGStop.NEGATIVE_CURVATURE, pairs)
        alpha = rz / curvature
        s, hs, r = s + alpha * d, hs + alpha * hd, r + alpha * sets.free(hd)
        directions += 1
        if keep_pairs:
            pairs.append((d, hd))
