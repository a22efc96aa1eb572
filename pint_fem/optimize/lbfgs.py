r"""Limited-memory BFGS approximation of an inverse Hessian in a Hilbert space.

From pairs of directions :math:`s_i` and products :math:`y_i` of the Hessian with them (or differences of designs and of
Riesz gradients) the operator :math:`B` is the BFGS update of its predecessor by one pair after another,

.. math::
    B_{i+1} v = V_i^* B_i V_i v + \rho_i (s_i, v) s_i, \qquad V_i v = v - \rho_i (s_i, v) y_i, \qquad
    \rho_i = 1 / (s_i, y_i),                                                                            \tag{1}

started from :math:`\gamma P`, :math:`\gamma = (s, y) / (y, P y)` of the newest pair and :math:`P` the identity or a
preconditioner, and applied by the two-loop recursion [1, Alg. 7.4]. All products are the problem's, so :math:`B` is
self-adjoint there, and its action does not depend on the mesh.

**Noise.** A pair is used only if its curvature is certain: :math:`(s, y) \ge 10^{-8} |s| |y|` keeps :math:`B` bounded
and positive definite, and if :math:`e` bounds the error of :math:`y`,

.. math:: (s, y) \ge 2 e |s|                                                                              \tag{2}

makes sure that the curvature of the exact pair is positive too, at least half of, at most one and a half times, the one
used. A pair that fails (2) still bounds the curvature along its direction: where :math:`\gamma` is below :math:`(s, s)
/ ((s, y) + e |s|)` it is raised to that, the next step is longer and its curvature exceeds the noise more easily.

**Conjugate pairs.** (1) obeys the newest secant equation :math:`B y = s` and spoils those before it, unless the
directions are conjugate. For a Hessian that does not change they can be made so [2]: with

.. math::
    s' = s - \sum_i c_i s_i, \qquad y' = y - \sum_i c_i y_i, \qquad c_i = \rho_i (s, y_i),           \tag{3}

the new pair is one of the same Hessian, :math:`(s', y_i) = (y', s_i) = 0`, and :math:`B y_i = s_i` for all of them: the
quasi-Newton step from any point is the exact minimiser over all directions so far, without a line search, as that
of conjugate gradients with one. The error of :math:`y'` is at most :math:`e + \sum |c_i| e_i`, plus the
change of the Hessian since the older pairs. That appears as asymmetry: :math:`(s, H s_i) = (s_i, H s)`, so the part
of :math:`(s, y_i) - (y, s_i)` that exceeds the errors is the component along s of the change of :math:`y_i`. The sum

.. math::
    30 \sum_i |c_i| \max(|(s, y_i) - (y, s_i)| - |s| e_i - |s_i| e,\ 0) / |s|                            \tag{4}

estimates all of it, with a factor for the components that are not measured. If :math:`(s', y')` passes (2) with both,
it is used; if it fails by (4), :math:`(s, y)` is used, as in L-BFGS; if it fails by the noise, the step was one in
directions of earlier pairs, and no pair is added.

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
from numbers import Integral
from typing import NamedTuple

import numpy as np

__all__ = ["InverseLBFGS", "SecantPair"]

Inner = Callable[[np.ndarray, np.ndarray], float]

# Smallest cosine of the angle between s and y: bounds the norm of B times that of the curvature along s.
_MIN_COSINE = 1e-8

# The curvature has to be this multiple of its error.
_CERTAIN = 2.0

# The change of the Hessian in terms of its component that the asymmetry measures.
_UNMEASURED = 30.0


class SecantPair(NamedTuple):
    """A direction s, the product y of the Hessian with it, a bound of the error of y, and their inner products."""

    s: np.ndarray
    y: np.ndarray
    noise: float
    sy: float
    ss: float
    yy: float

    @classmethod
    def of(cls, inner: Inner, s: np.ndarray, y: np.ndarray, noise: float = 0.0) -> SecantPair:
        """The pair with its inner products; the arrays are not copied."""
        return cls(s, y, float(noise), float(inner(s, y)), float(inner(s, s)), float(inner(y, y)))


class InverseLBFGS:
    """The operator B, built from pairs one after another.

    Parameters
    ----------
    inner : callable
        ``inner(a, b)``, the inner product of two vectors, reduced over all processes.
    memory : int or None
        Most pairs stored, two vectors each; with 0 the operator is P, None means no limit.
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
        A negative or fractional memory.
    """

    def __init__(
        self,
        inner: Inner,
        *,
        memory: int | None = 10,
        conjugate: bool = False,
        preconditioner: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        if memory is not None and (isinstance(memory, bool) or not isinstance(memory, Integral) or memory < 0):
            raise ValueError(f"memory = {memory!r} is refused: give an integer >= 0")
        self.inner, self.conjugate, self.preconditioner = inner, conjugate, preconditioner
        self.gamma = 1.0
        self._pairs: deque[SecantPair] = deque(maxlen=memory)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._pairs)

    @property
    def pairs(self) -> list[SecantPair]:
        """The pairs, the newest last."""
        return list(self._pairs)

    def restore(self, pairs: Iterable[SecantPair], gamma: float) -> None:
        """Set the pairs and the scale, unchecked, to those of another operator."""
        self._pairs.clear()
        self._pairs.extend(pairs)
        self.gamma = gamma

    def update(self, s: np.ndarray, y: np.ndarray, *, noise: float = 0.0, copy: bool = True) -> bool:
        """Update B so that it maps y to s, unless the curvature along s is not certain to be positive.

        Parameters
        ----------
        s, y : ndarray, shape (n,)
            The direction and the product of the Hessian with it.
        noise : float
            Bound of the error of `y` in the norm of the inner product.
        copy : bool
            Whether the arrays may be modified afterwards, so that copies of them are stored.

        Returns
        -------
        bool
            Whether the pair was added; the oldest one is dropped where there are too many.
        """
        raw = pair = SecantPair.of(self.inner, s, y, noise)
        if self.conjugate and self._pairs and self._is_certain(raw):
            pair, change = self._conjugate(raw)
            if change > pair.noise and not self._is_certain(pair._replace(noise=pair.noise + change)):
                pair = raw
        if not self._is_certain(pair):
            bound = pair.sy + pair.noise * math.sqrt(max(pair.ss, 0.0))
            if noise > 0 and self._pairs and 0 < bound < math.inf:
                self.gamma = max(self.gamma, pair.ss / bound)
            return False
        if self._pairs.maxlen == 0:
            return False
        self._pairs.append(pair._replace(s=s.copy(), y=y.copy()) if copy and pair is raw else pair)
        Py = pair.y if self.preconditioner is None else self.preconditioner(pair.y)
        self.gamma = pair.sy / float(self.inner(pair.y, Py))
        return True

    @staticmethod
    def _is_certain(pair: SecantPair) -> bool:
        """Whether the curvature along s is certainly positive, (2); false where a product is not finite or zero."""
        if not all(0 < square < math.inf for square in (pair.sy, pair.ss, pair.yy)):
            return False
        return pair.sy >= max(_MIN_COSINE * math.sqrt(pair.yy), _CERTAIN * pair.noise) * math.sqrt(pair.ss)

    def _conjugate(self, raw: SecantPair) -> tuple[SecantPair, float]:
        """The conjugate pair (3), and the estimated change of the Hessian (4)."""
        s, y, noise, change, length = raw.s, raw.y, raw.noise, 0.0, math.sqrt(raw.ss)
        for old in self._pairs:
            cross, mirrored = float(self.inner(s, old.y)), float(self.inner(y, old.s))
            explained = length * old.noise + math.sqrt(old.ss) * raw.noise
            c = cross / old.sy
            s, y, noise = s - c * old.s, y - c * old.y, noise + abs(c) * old.noise
            change += _UNMEASURED * abs(c) * max(abs(cross - mirrored) - explained, 0.0) / length
        return SecantPair.of(self.inner, s, y, noise), change

    def apply(self, v: np.ndarray) -> np.ndarray:
        """B v by the two-loop recursion, with two inner products per pair."""
        r = v.copy()
        alphas = []
        for pair in reversed(self._pairs):
            alphas.append(float(self.inner(pair.s, r)) / pair.sy)
            r -= alphas[-1] * pair.y
        r = self.gamma * (r if self.preconditioner is None else self.preconditioner(r))
        for pair, alpha in zip(self._pairs, reversed(alphas), strict=True):
            r += (alpha - float(self.inner(pair.y, r)) / pair.sy) * pair.s
        return r

    def clear(self) -> None:
        """Remove all pairs; ``gamma`` stays."""
        self._pairs.clear()
