r"""Two-level bounds of systems that are normal only in blocks: each mode is a small matrix.

The damped wave equation :math:`\dot a + s a - \omega b = 0, \dot b + \omega a = 0` is not normal, so that the bound of
:mod:`~pint_fem.theory.two_level` over its eigenvalues :math:`s/2 \pm \sqrt{s^2/4 - \omega^2}` does not hold and is far
too small near :math:`\omega = s/2`. But an orthogonal change of variables (the singular value decomposition of the
coupling) splits the whole system into such pairs, and with matrices :math:`\Lambda, M` in the place of
:math:`\lambda, \mu` all formulas remain: functions of one matrix commute. Norms of coefficients take the place of their
moduli,

.. math::
   \| E \| \le \sum_{j < N_c} \| (\Lambda^m - M)\, C_j \| , \qquad
   C_j = M C_{j-1} + \tbinom{\nu}{j} (1 - \omega_C)^{\nu-j} (\omega_C \Lambda^m)^j ,

and, as for numbers, the maximum of the symbol's norm over the unit circle where ``M`` has a spectral radius below one.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["block_factors", "block_norms", "damped_wave"]

_CIRCLE = 64
"""Points on the upper half of the unit circle at which a symbol is evaluated."""


def damped_wave(s: ArrayLike, w: ArrayLike) -> np.ndarray:
    """Matrices ``[[s, -w], [w, 0]]`` of damped waves, ``(..., 2, 2)``.

    Parameters
    ----------
    s, w
        Damping and frequency, of shapes that broadcast.
    """
    s, w = np.broadcast_arrays(np.asarray(s, dtype=float), np.asarray(w, dtype=float))
    return np.stack([np.stack([s, -w], -1), np.stack([w, np.zeros_like(w)], -1)], -2)


def block_norms(X: np.ndarray) -> np.ndarray:
    """2-norms of a stack of square matrices ``(..., d, d)``; in closed form for ``d = 2``."""
    if X.shape[-1] != 2:
        return np.linalg.norm(X, 2, axis=(-2, -1))
    square = (np.abs(X) ** 2).sum(axis=(-2, -1))
    determinant = np.abs(X[..., 0, 0] * X[..., 1, 1] - X[..., 0, 1] * X[..., 1, 0])
    return np.sqrt((square + np.sqrt(np.maximum(square**2 - 4 * determinant**2, 0))) / 2)


def block_factors(
    fine: np.ndarray, coarse: np.ndarray, m: int, coarse_steps: int, relax: str = "F", weight: float = 1.0
) -> np.ndarray:
    """Bound of the two-level factor of each block, by norms of matrices.

    Parameters
    ----------
    fine, coarse
        Fine and coarse propagator of each block, ``(..., d, d)``, functions of one matrix, of norm at most one.
    m, coarse_steps, relax, weight
        As for :func:`~pint_fem.theory.two_level.two_level_factors`; the number of coarse steps is finite.

    Returns
    -------
    ndarray
        Bounds ``(...)``.
    """
    nu = str(relax).count("C")
    power = np.linalg.matrix_power(fine, m)
    gap, eye = power - coarse, np.eye(power.shape[-1])
    total, C = np.zeros(power.shape[:-2]), np.zeros_like(power)
    for j in range(coarse_steps):
        C = coarse @ C
        if j <= nu:
            C = C + math.comb(nu, j) * (1 - weight) ** (nu - j) * np.linalg.matrix_power(weight * power, j)
        size = block_norms(gap @ C)
        total = total + size
        if j > nu and (size <= 1e-6 * total).all():
            total = total + (coarse_steps - 1 - j) * size  # norms do not grow
            break
    radius = np.abs(np.linalg.eigvals(coarse)).max(axis=-1)
    symbol = np.zeros_like(total)
    for angle in np.linspace(0, np.pi, _CIRCLE):
        zeta = np.exp(1j * angle)
        relaxed = np.linalg.matrix_power((1 - weight) * eye + weight * zeta * power, nu)
        with np.errstate(all="ignore"):
            resolvent = np.linalg.inv(eye - np.where(radius < 1 - 1e-9, zeta, 0.5)[..., None, None] * coarse)
        symbol = np.maximum(symbol, block_norms(gap @ relaxed @ resolvent))
    return np.where(radius < 1 - 1e-9, np.minimum(total, 1.02 * symbol), total)
