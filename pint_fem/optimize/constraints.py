r"""Minimisation under linear equality constraints, as a problem on their null space.

Minimise :math:`J(x)` subject to :math:`(c_i, x) = b_i`, :math:`i = 1 \dots k`, in the problem's inner product: the mean
of a source, the total dose of a control. Gram-Schmidt gives an orthonormal basis :math:`q_1, \dots, q_k` of the
normals, :math:`c_j = \sum_i R_{ij} q_i`, so with :math:`R^T \beta = b` the constraints read :math:`(q_i, x) = \beta_i`
and the orthogonal projection on their null space is

.. math:: P v = v - \sum_i (q_i, v) q_i.

Every feasible x is :math:`x_0 + z`, z in that null space, a Hilbert space with the same inner product. There the Riesz
gradient of J is :math:`P g` and its Hessian is :math:`P H P` [1, Ch. 15]: a smaller unconstrained problem, which a
minimiser started from a feasible point solves without change: all its steps are combinations of projected vectors.
Round-off leaves in them a part off the null space. There :math:`P H P` is zero, so conjugate gradients of many
iterations would treat it as a direction without curvature and follow it far. With :math:`\mu\,(v - P v)` added,
:math:`\mu = |(Pv, H Pv)|/|Pv|^2`, every CG step shortens the residual's part there instead, as
:math:`0 \le \alpha_j \mu \le 1`.

At a minimiser :math:`P g = 0`, that is :math:`g = \sum_i \lambda_i c_i`: the multiplier is the price of the constraint,
:math:`\lambda_i = \partial J_{\min} / \partial b_i` [1, Ch. 12].

References
----------
[1] J. Nocedal, S. J. Wright, Numerical Optimization, 2nd ed., Springer 2006.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from pint_fem.optimize.protocol import RETURNS

__all__ = ["AffineConstraints"]

# A normal is dependent on those before it if less than this part of it is left outside their span.
_DEPENDENT = 1e-10

# (q_i, x) may differ from beta_i by this much of |x| + |beta|: far above round-off, far below deliberate differences.
_FEASIBLE = 1e-8


class AffineConstraints:
    """A problem on the null space of linear constraints; a problem itself.

    Pass it to a minimiser with a feasible first guess:
    ``minimize_trust_region(constrained, constrained.feasible(x0))``. It has ``value``, ``gradient`` (P g),
    ``hessian_action`` (P H P v, and a multiple of v - P v) and the optional methods of the problem, all with their
    vectors projected (:data:`pint_fem.optimize.protocol.RETURNS`).

    Parameters
    ----------
    problem : Problem
        The objective J and the inner product.
    normals : sequence of ndarray, shape (n,)
        The Riesz representers c_i, this process's parts: for the integral of x in L2 the function 1.
    values : sequence of float
        The b_i, one for each normal and the same on every process.

    Attributes
    ----------
    problem : Problem
        The given problem.

    Raises
    ------
    ValueError
        No normals, a normal that is zero, not finite, of another shape or dependent on those before it, values that
        are not finite or not as many; ``value``, ``gradient`` and ``advance`` if x does not meet the constraints.
    """

    def __init__(self, problem: Any, normals: Sequence[np.ndarray], values: Sequence[float]):
        self.problem = problem
        self._Q, self._R = _orthonormal(problem.inner, [np.array(c, dtype=np.float64) for c in normals])
        b = np.atleast_1d(np.asarray(values, dtype=np.float64))
        if b.shape != (len(self._Q),) or not np.isfinite(b).all():
            raise ValueError(f"values = {values!r} is refused: give {len(self._Q)} finite numbers, one for each normal")
        self._beta = np.linalg.solve(self._R.T, b)

    # -- the problem on the null space --------------------------------------------------------------------------------
    def inner(self, a: np.ndarray, b: np.ndarray) -> float:
        """The problem's inner product (a, b)."""
        return self.problem.inner(a, b)

    @property
    def comm(self) -> object | None:
        """The processes that evaluate collectively, None if the problem has no communicator."""
        return getattr(self.problem, "comm", None)

    @property
    def failure(self) -> Exception | None:
        """Why the problem's last value was not finite, if it reports that."""
        return getattr(self.problem, "failure", None)

    def __getattr__(self, name: str) -> Callable:
        """A method of the problem on the null space; absent where the problem lacks it."""
        if name not in RETURNS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        method = getattr(self.problem, name)
        if name == "hessian_actions":
            return partial(self._actions_on_null_space, method)
        if "_action" in name:
            return lambda x, v, *args: self._on_null_space(v, lambda pv: method(x, pv, *args))
        return partial(self._at_feasible, name, method)

    def _at_feasible(self, name: str, method, x: np.ndarray, *args: Any):
        """The result of a method at a feasible x, its vectors projected (an error does not grow: ``|P e| <= |e|``)."""
        if RETURNS[name] == ("operator",):
            model = method(x, *args)
            return lambda v: self._on_null_space(v, model)
        self._require_feasible(x)
        out, kinds = method(x, *args), RETURNS[name]
        parts = zip(out if len(kinds) > 1 else (out,), kinds, strict=True)
        projected = tuple(self.project(part) if kind == "vector" else part for part, kind in parts)
        return projected if len(kinds) > 1 else projected[0]

    def _on_null_space(self, v: np.ndarray, action) -> np.ndarray:
        """P H P v, with the Rayleigh quotient of P v for all that is off the null space."""
        pv = self.project(v)
        h = self.project(action(pv))
        square = float(self.problem.inner(pv, pv))
        quotient = abs(float(self.problem.inner(pv, h))) / square if square > 0 else 1.0
        return h + quotient * (v - pv)

    def _actions_on_null_space(self, method, x: np.ndarray, vs: list[np.ndarray]) -> list[np.ndarray]:
        """P H P v for each of several directions."""
        actions = method(x, [self.project(v) for v in vs])
        return [self._on_null_space(v, lambda _, h=h: h) for v, h in zip(vs, actions, strict=True)]

    # -- the constraints ----------------------------------------------------------------------------------------------
    def project(self, v: np.ndarray) -> np.ndarray:
        """P v, the part of v on the null space; a new array."""
        return self._minus(v, self.components(v))

    def feasible(self, x: np.ndarray) -> np.ndarray:
        """The point nearest to x, in the problem's norm, that meets the constraints; a new array."""
        for _ in range(2):  # the second pass removes the round-off of a far x
            x = self._minus(x, self.offsets(x))
        return x

    def violation(self, x: np.ndarray) -> np.ndarray:
        """``(c_i, x) - b_i``, shape (k,)."""
        return self._R.T @ self.offsets(x)

    def multipliers(self, x: np.ndarray) -> np.ndarray:
        """The lambda, shape (k,), that make ``|g(x) - sum lambda_i c_i|`` least: one gradient of the problem.

        At a minimiser ``lambda_i`` is the derivative of the least J with respect to ``b_i``.
        """
        return np.linalg.solve(self._R, self.components(self.problem.gradient(x)))

    def offsets(self, x: np.ndarray) -> np.ndarray:
        """``(q_i, x) - beta_i``, shape (k,), in the orthonormal basis of the normals."""
        return self.components(x) - self._beta

    def distance(self, x: np.ndarray) -> tuple[float, float]:
        """Distance of x from the constraints, and the scale of it: the sum of the norms of x and of the values."""
        size = math.sqrt(max(float(self.problem.inner(x, x)), 0.0)) + float(np.linalg.norm(self._beta))
        return float(np.linalg.norm(self.offsets(x))), size

    def curvatures(self, x: np.ndarray) -> list[float]:
        """``|(q_i, H q_i)|`` of J at x."""
        one_by_one = lambda x, vs: [self.problem.hessian_action(x, v) for v in vs]
        actions = getattr(self.problem, "hessian_actions", one_by_one)(x, list(self._Q))
        return [abs(float(self.problem.inner(q, h))) for q, h in zip(self._Q, actions, strict=True)]

    def combined(self, coefficients: np.ndarray, v: np.ndarray) -> np.ndarray:
        """``v + sum_i coefficients_i q_i``, a new array."""
        return self._minus(v, -coefficients)

    def components(self, v: np.ndarray) -> np.ndarray:
        """``(q_i, v)``, shape (k,)."""
        return np.array([float(self.problem.inner(q, v)) for q in self._Q])

    def _minus(self, v: np.ndarray, components: np.ndarray) -> np.ndarray:
        """``v - sum_i components_i q_i``, a new array."""
        out = np.array(v, dtype=np.float64)
        for q, component in zip(self._Q, components, strict=True):
            out -= component * q
        return out

    def _require_feasible(self, x: np.ndarray) -> None:
        """Refuse an x off the constraints, as a minimiser started there would leave (c_i, x) at the wrong value."""
        gap, size = self.distance(x)
        if gap > _FEASIBLE * size:  # false for an x that is not finite, at which J is not finite either
            raise ValueError(
                f"x misses the constraints: (c, x) - b = {self.violation(x)}; start from feasible(x), not from x"
            )


def _orthonormal(inner, normals: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Gram-Schmidt, every vector orthogonalised twice: orthonormal to round-off however close to dependent."""
    if not normals:
        raise ValueError("normals is empty: give at least one representer, or minimise the problem itself")
    Q: list[np.ndarray] = []
    R = np.zeros((len(normals), len(normals)))
    for j, c in enumerate(normals):
        if c.ndim != 1 or c.shape != normals[0].shape:
            raise ValueError(f"normal {j} has shape {c.shape}: give 1-D arrays, all of the shape of x")
        length = math.sqrt(float(inner(c, c)))
        if not 0 < length < math.inf:
            raise ValueError(f"normal {j} has norm {length}: give a representer that is finite and not zero")
        for _ in range(2):
            for i, q in enumerate(Q):
                component = float(inner(q, c))
                R[i, j] += component
                c = c - component * q
        R[j, j] = math.sqrt(float(inner(c, c)))
        if R[j, j] <= _DEPENDENT * length:
            raise ValueError(
                f"normal {j} is a combination of those before it (all but {R[j, j] / length:.1e} of it): leave it out"
            )
        Q.append(c / R[j, j])
    return Q, R
