r"""Stability functions of Runge-Kutta methods, at numbers and at matrices.

For the tableau :math:`(A, b)` and :math:`\dot u = \kappa u`, a step of size :math:`\Delta t` multiplies ``u`` by

.. math::  R(z) = 1 + z\, b^T (I - z A)^{-1} \mathbf{1} , \qquad z = \Delta t\, \kappa .

For a system of equations ``z`` is a matrix, and products with it are Kronecker products.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["dirk_stability", "runge_kutta_matrix"]


def dirk_stability(A: ArrayLike, b: ArrayLike, z: ArrayLike) -> np.ndarray:
    """Stability function ``R(z)`` of a Runge-Kutta method at numbers.

    Parameters
    ----------
    A, b
        Butcher tableau, ``(s, s)`` and ``(s,)``.
    z
        Scalar or array, real or complex.

    Returns
    -------
    ndarray
        Values of ``R``, with the shape of ``z``.
    """
    A, b, z = np.asarray(A, dtype=float), np.asarray(b, dtype=float), np.asarray(z)
    system = np.eye(len(b)) - z[..., None, None] * A
    stages = np.linalg.solve(system, np.ones((*z.shape, len(b), 1)))[..., 0]
    return 1 + z * (stages @ b)


def runge_kutta_matrix(A: ArrayLike, b: ArrayLike, Z: ArrayLike) -> np.ndarray:
    """Stability function ``R(Z)`` of a Runge-Kutta method at square matrices.

    Parameters
    ----------
    A, b
        Butcher tableau, ``(s, s)`` and ``(s,)``.
    Z
        Stack of matrices, ``(..., d, d)``.

    Returns
    -------
    ndarray
        Stack of matrices, ``(..., d, d)``.
    """
    A, b, Z = np.asarray(A, dtype=float), np.asarray(b, dtype=float), np.asarray(Z)
    s, d = len(b), Z.shape[-1]
    coupling = np.einsum("ij,...kl->...ikjl", A, Z).reshape(*Z.shape[:-2], s * d, s * d)
    right = np.broadcast_to(np.tile(np.eye(d), (s, 1)), (*Z.shape[:-2], s * d, d))
    stages = np.linalg.solve(np.eye(s * d) - coupling, right).reshape(*Z.shape[:-2], s, d, d)
    return np.eye(d) + Z @ np.einsum("i,...ikl->...kl", b, stages)
