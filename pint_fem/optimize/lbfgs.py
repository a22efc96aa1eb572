r"""Limited-memory BFGS approximation of an inverse Hessian in a Hilbert space.

From pairs :math:`s_i = x_{i+1} - x_i`, :math:`y_i = g_{i+1} - g_i` of designs and Riesz gradients, the operator
:math:`B` obeys the newest secant equation :math:`B y = s` and is the BFGS update of its predecessor,

.. math::
    B_{i+1} v = V_i^* B_i V_i v + \rho_i (s_i, v) s_i, \qquad V_i v = v - \rho_i (s_i, v) y_i, \qquad
    \rho_i = 1 / (s_i, y_i),

started from :math:`\gamma I`, :math:`\gamma = (s, y) / (y, y)` of the newest pair, and applied by the two-loop
recursion [1, Alg. 7.4]. All products are the problem's, so :math:`B` is self-adjoint there, and on the same pairs it
does the same whatever the mesh.

A pair is kept only if its curvature is known: :math:`(s, y) \ge 10^{-8} |s| |y|` keeps :math:`B` bounded and positive
definite, and if :math:`|e|` bounds the error of :math:`y`, the curvature of the exact pair is
:math:`(s, y) + (s, e)`; :math:`(s, y) \ge 2 |e| |s|` makes sure that it is positive too, and at least half of, at most
one and a half times, the one used.

References
----------
[1] J. Nocedal, S. J. Wright, Numerical Optimization, 2nd ed., Springer 2006.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from numbers import Integral, Real

import numpy as np

__all__ = ["InverseLBFGS"]

# Smallest cosine of the angle between s and y: bounds the norm of B times that of the curvature along s.
_MIN_COSINE = 1e-8


class InverseLBFGS:
    """The operator B, built from pairs one after another.

    Parameters
    ----------
    inner : callable
        ``inner(a, b)``, the inner product of two vectors, reduced over all processes.
    memory : int
        Most pairs kept; 0 leaves ``scale`` times the identity. Each costs two vectors.
    scale : float
        B is ``scale`` times the identity until there is a pair; positive.

    Attributes
    ----------
    gamma : float
        The multiple of the identity that B is an update of.

    Raises
    ------
    ValueError
        A negative or fractional memory, a scale that is not finite and positive.
    """

    def __init__(self, inner: Callable[[np.ndarray, np.ndarray], float], *, memory: int = 10, scale: float = 1.0):
        if isinstance(memory, bool) or not isinstance(memory, Integral) or memory < 0:
            raise ValueError(f"memory = {memory!r} is refused: give an integer >= 0")
        if not isinstance(scale, Real) or not 0 < scale < math.inf:
            raise ValueError(f"scale = {scale!r} is refused: give a finite number > 0")
        self.inner = inner
        self.gamma = float(scale)
        self._pairs: deque[tuple[np.ndarray, np.ndarray, float]] = deque(maxlen=memory)

    def __len__(self) -> int:
        return len(self._pairs)

    def update(self, s: np.ndarray, y: np.ndarray, *, noise: float = 0.0) -> bool:
        """Learn that the Hessian maps s to y, unless the curvature along s is not known to be positive.

        Parameters
        ----------
        s, y : ndarray, shape (n,)
            Differences of two designs and of their gradients; copied.
        noise : float
            Bound of the error of `y` in the norm of the inner product.

        Returns
        -------
        bool
            Whether the pair was kept; the oldest one makes room.
        """
        sy, ss, yy = float(self.inner(s, y)), float(self.inner(s, s)), float(self.inner(y, y))
        # Written so that a number that is not finite, or zero by underflow, drops the pair.
        if not (0 < sy < math.inf and 0 < ss < math.inf and 0 < yy < math.inf):
            return False
        if not sy >= max(_MIN_COSINE * math.sqrt(yy), 2 * noise) * math.sqrt(ss):
            return False
        if self._pairs.maxlen:
            self._pairs.append((s.copy(), y.copy(), 1 / sy))
            self.gamma = sy / yy
        return bool(self._pairs.maxlen)

    def apply(self, v: np.ndarray) -> np.ndarray:
        """Return B v: two inner products a pair and direction of the recursion."""
        r = v.copy()
        alphas = []
        for s, y, rho in reversed(self._pairs):
            alphas.append(rho * float(self.inner(s, r)))
            r -= alphas[-1] * y
        r *= self.gamma
        for (s, y, rho), alpha in zip(self._pairs, reversed(alphas), strict=True):
            r += (alpha - rho * float(self.inner(y, r))) * s
        return r

    def forget(self) -> None:
        """Drop all pairs; ``gamma`` stays."""
        self._pairs.clear()
