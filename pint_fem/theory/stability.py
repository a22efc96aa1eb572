"""Stability functions of Runge-Kutta methods."""

from __future__ import annotations

import numpy as np

__all__ = ["dirk_stability"]


def dirk_stability(A, b, z):
    """Stability function ``R(z) = 1 + z b^T (I - z A)^{-1} 1`` of a Runge-Kutta method.

    Parameters
    ----------
    A, b
        Butcher tableau, ``(s, s)`` and ``(s,)``.
    z
        Scalar or array.

    Returns
    -------
    ndarray
        Of the shape of ``z``.
    """
    A, b, z = np.asarray(A, dtype=float), np.asarray(b, dtype=float), np.asarray(z)
    system = np.eye(len(b)) - z[..., None, None] * A
    stages = np.linalg.solve(system, np.ones((*z.shape, len(b), 1)))[..., 0]
    return 1 + z * (stages @ b)
