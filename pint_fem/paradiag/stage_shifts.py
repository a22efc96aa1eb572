r"""A Runge-Kutta step as a product of shifted systems of one stage's size.

For :math:`M \dot u + K u = 0` a step is a rational function of :math:`Z = \Delta t\, M^{-1} K`,

.. math::
   \Phi = R(-Z) = P(Z) / Q(Z), \qquad Q(z) = \prod_j (1 + a_{jj} z), \qquad
   P(z) = \det(I + z (A - 1 b^T)) .

With the roots :math:`z_j` of :math:`Q - \mu P` and :math:`R_\infty = R(-\infty)`

.. math::
   (I - \mu \Phi)^{-1} = \frac{1}{1 - \mu R_\infty} \prod_j (S_j - y_j M)^{-1} S_j , \qquad
   S_j = M + a_{jj} \Delta t\, K, \quad y_j = 1 + a_{jj} z_j ,

one sparse system for each stage, all with the pattern of :math:`M + K`: no system of all stages, and no power of
:math:`M^{-1} K`. For backward Euler :math:`y = \mu`, for the implicit midpoint rule :math:`y = 2 \mu / (1 + \mu)`.
"""

from __future__ import annotations

import numpy as np

__all__ = ["limit_at_infinity", "shifted_factors"]


def _numerator(A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Coefficients of ``P``, highest first, ``(s + 1,)``."""
    return np.poly(np.linalg.eigvals(np.outer(np.ones(len(b)), b) - A)).real[::-1]


def limit_at_infinity(A: np.ndarray, b: np.ndarray) -> float:
    r""":math:`R(-\infty) = 1 - b^T A^{-1} 1`, the factor by which a step multiplies boundary values."""
    A, b = np.asarray(A, dtype=float), np.asarray(b, dtype=float)
    return float(1 - b @ np.linalg.solve(A, np.ones(len(b))))


def shifted_factors(A: np.ndarray, b: np.ndarray, mu: complex) -> tuple[complex, np.ndarray]:
    r"""The scalar :math:`1/(1 - \mu R_\infty)` and the shifts :math:`y_j` of a diagonally implicit method.

    Parameters
    ----------
    A, b
        Coefficients of the method: ``A`` ``(s, s)`` lower triangular with a nonzero diagonal, ``b`` ``(s,)``.
    mu
        The number :math:`\mu_k` of a frequency.

    Returns
    -------
    complex, ndarray of complex, shape (s,)
    """
    A, b = np.asarray(A, dtype=float), np.asarray(b, dtype=float)
    diagonal = np.diag(A)
    Q = np.ones(1)
    for a in diagonal:
        Q = np.polymul(Q, [a, 1.0])
    difference = Q - mu * _numerator(A, b)
    roots = np.roots(difference)
    return 1 / (1 - mu * limit_at_infinity(A, b)), 1 + diagonal * roots
