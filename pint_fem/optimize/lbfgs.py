r"""Limited-memory BFGS approximation of an inverse Hessian in a Hilbert space.

From pairs :math:`s_i, y_i` of directions and what the Hessian makes of them (differences of designs and of Riesz
gradients, say), the operator :math:`B` is the BFGS update of its predecessor by one pair after another,

.. math::
    B_{i+1} v = V_i^* B_i V_i v + \rho_i (s_i, v) s_i, \qquad V_i v = v - \rho_i (s_i, v) y_i, \qquad
    \rho_i = 1 / (s_i, y_i),                                                                            \tag{1}

started from :math:`\gamma P`, :math:`\gamma = (s, y) / (y, P y)` of the newest pair and :math:`P` the identity or a
preconditioner, and applied by the two-loop recursion [1, Alg. 7.4]. All products are the problem's, so :math:`B` is
self-adjoint there, and on the same pairs it does the same whatever the mesh.

**Conjugate pairs.** (1) obeys the newest secant equation :math:`B y = s` and spoils those before it, unless the
directions are conjugate. For a Hessian that does not change they can be made so [2]: with

.. math::
    s \leftarrow s - \sum_i c_i s_i, \qquad y \leftarrow y - \sum_i c_i y_i, \qquad c_i = \rho_i (s, y_i), \tag{2}

the new pair is one of the same Hessian, :math:`(s, y_i) = (y, s_i) = 0`, and :math:`B y_i = s_i` for all of them: the
quasi-Newton step from any point is the exact minimiser over all directions seen so far, without a line search, as that
of conjugate gradients with one. Whether the Hessian has changed shows in the pairs, as one that has not is symmetric.
Those with

.. math:: |(s, y_i) - (y, s_i)| > \tfrac1{10} \sqrt{(s, y)(s_i, y_i)} + |s|\,e_i + |s_i|\,e             \tag{3}

are left out of (2), so that the newest equation holds and the others as far as they can.

**Noise.** A pair is kept only if its curvature is known: :math:`(s, y) \ge 10^{-8} |s| |y|` keeps :math:`B` bounded and
positive definite, and if :math:`e` bounds the error of :math:`y`, that of the sum (2) is at most
:math:`e + \sum |c_i| e_i`, and

.. math:: (s, y) \ge 2 e |s|                                                                              \tag{4}

makes sure that the curvature of the exact pair is positive too, at least half of, at most one and a half times, the one
used. A pair that fails (4) still bounds the curvature along its direction: where :math:`\gamma` is below
:math:`(s, s) / ((s, y) + e |s|)`, the next step may be that much longer and its curvature easier to see.

References
----------
[1] J. Nocedal, S. J. Wright, Numerical Optimization, 2nd ed., Springer 2006.
[2] R. B. Schnabel, Quasi-Newton methods using multiple secant equations, Report CU-CS-247-83, University of Colorado
    1983.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np

__all__ = ["InverseLBFGS", "SecantPair"]

# Smallest cosine of the angle between s and y: bounds the norm of B times that of the curvature along s.
_MIN_COSINE = 1e-8

# Asymmetry, in terms of the curvatures, that shows a Hessian that has changed.
_ASYMMETRY = 0.1


class SecantPair(NamedTuple):
    """A direction, what the Hessian makes of it, and the bound of the latter's error."""

    s: np.ndarray
    y: np.ndarray
    noise: float
    sy: float
    ss: float


class InverseLBFGS:
    """The operator B, built from pairs one after another.

    Parameters
    ----------
    inner : callable
        ``inner(a, b)``, the inner product of two vectors, reduced over all processes.
    memory : int or None
        Most pairs kept; 0 leaves ``scale`` times P, None keeps all. Each costs two vectors.
    scale : float
        B is ``scale`` times P until there is a pair; positive.
    conjugate : bool
        Make the pairs conjugate.
    preconditioner : callable, optional
        P, self-adjoint and positive definite; by default the identity.

    Attributes
    ----------
    gamma : float
        The multiple of P that B is an update of.

    Raises
    ------
    ValueError
        A negative or fractional memory, a scale that is not finite and positive.
    """

    def __init__(
        self,
        inner: Callable[[np.ndarray, np.ndarray], float],
        *,
        memory: int | None = 10,
        scale: float = 1.0,
        conjugate: bool = False,
        preconditioner: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        if memory is not None and (isinstance(memory, bool) or not isinstance(memory, Integral) or memory < 0):
            raise ValueError(f"memory = {memory!r} is refused: give an integer >= 0")
        if not isinstance(scale, Real) or not 0 < scale < math.inf:
            raise ValueError(f"scale = {scale!r} is refused: give a finite number > 0")
        self.inner, self.conjugate, self.preconditioner = inner, conjugate, preconditioner
        self.gamma = float(scale)
        self._pairs: deque[SecantPair] = deque(maxlen=memory)

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def pairs(self) -> list[SecantPair]:
        """The pairs, the newest last."""
        return list(self._pairs)

    def restore(self, pairs: Iterable[SecantPair], gamma: float) -> None:
        """Take pairs and scale of an operator as they are."""
        self._pairs.clear()
        self._pairs.extend(pairs)
        self.gamma = gamma

    def update(self, s: np.ndarray, y: np.ndarray, *, noise: float = 0.0, copy: bool = True) -> bool:
        """Learn that the Hessian maps s to y, unless the curvature along s is not known to be positive.

        Parameters
        ----------
        s, y : ndarray, shape (n,)
        noise : float
            Bound of the error of `y` in the norm of the inner product.
        copy : bool
            Whether the arrays may be modified afterwards, so that copies of them have to be kept.

        Returns
        -------
        bool
            Whether the pair was kept; the oldest one makes room.
        """
        given, pair = s, self._measured(s, y, noise)
        if self.conjugate and 0 < pair.sy < math.inf:
            pair = self._conjugate(pair)
        s, y, noise, sy, ss = pair
        yy = float(self.inner(y, y))
        # Written so that a number that is not finite, or zero by underflow, drops the pair.
        if not (0 < ss < math.inf and 0 < yy < math.inf and math.isfinite(sy)):
            return False
        length = math.sqrt(ss)
        if not (sy > 0 and sy >= max(_MIN_COSINE * math.sqrt(yy), 2 * noise) * length):
            if 0 < sy + noise * length < math.inf and noise > 0 and self._pairs:
                self.gamma = max(self.gamma, ss / (sy + noise * length))
            return False
        if self._pairs.maxlen == 0:
            return False
        self._pairs.append(pair._replace(s=s.copy(), y=y.copy()) if copy and s is given else pair)
        self.gamma = sy / (yy if self.preconditioner is None else float(self.inner(y, self.preconditioner(y))))
        return True

    def _measured(self, s: np.ndarray, y: np.ndarray, noise: float) -> SecantPair:
        return SecantPair(s, y, noise, float(self.inner(s, y)), float(self.inner(s, s)))

    def _conjugate(self, pair: SecantPair) -> SecantPair:
        """(2), pair by pair, where (3) does not forbid it."""
        s, y, noise, sy, ss = pair
        for old in self._pairs:
            cross, mirrored = float(self.inner(s, old.y)), float(self.inner(y, old.s))
            errors = math.sqrt(ss) * old.noise + math.sqrt(old.ss) * noise
            if abs(cross - mirrored) <= _ASYMMETRY * math.sqrt(sy * old.sy) + errors:
                c = cross / old.sy
                s, y, noise = s - c * old.s, y - c * old.y, noise + abs(c) * old.noise
        return self._measured(s, y, noise)

    def apply(self, v: np.ndarray) -> np.ndarray:
        """Return B v: two inner products a pair and direction of the recursion."""
        r = v.copy()
        alphas = []
        for pair in reversed(self._pairs):
            alphas.append(float(self.inner(pair.s, r)) / pair.sy)
            r -= alphas[-1] * pair.y
        r = self.gamma * (r if self.preconditioner is None else self.preconditioner(r))
        for pair, alpha in zip(self._pairs, reversed(alphas), strict=True):
            r += (alpha - float(self.inner(pair.y, r)) / pair.sy) * pair.s
        return r

    def forget(self) -> None:
        """Drop all pairs; ``gamma`` stays."""
        self._pairs.clear()
