r"""Convergence theory where a mode is a small matrix: systems that are normal only in blocks.

The damped wave equation :math:`\dot a + s a - \omega b = 0, \dot b + \omega a = 0` is not normal, so that the bound of
:mod:`~pint_fem.theory.two_level` over its eigenvalues :math:`s/2 \pm \sqrt{s^2/4 - \omega^2}` does not hold; near
:math:`\omega = s/2` it misses a lot. But an orthogonal change of variables (the singular value decomposition of the
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
from collections.abc import Sequence

import numpy as np

__all__ = ["block_factors", "damped_wave", "runge_kutta_matrix", "v_cycle_norm"]


def damped_wave(s, w) -> np.ndarray:
    """The matrix of the pair, ``(..., 2, 2)``, for damping ``s`` and frequency ``w``."""
    s, w = np.broadcast_arrays(np.asarray(s, dtype=float), np.asarray(w, dtype=float))
    return np.stack([np.stack([s, -w], -1), np.stack([w, np.zeros_like(w)], -1)], -2)


def runge_kutta_matrix(A, b, Z) -> np.ndarray:
    """Stability function of a Runge-Kutta method at matrices ``Z``, ``(..., d, d)``.

    Parameters
    ----------
    A, b
        Butcher tableau, ``(s, s)`` and ``(s,)``.
    Z
        Stack of square matrices.
    """
    A, b, Z = np.asarray(A, dtype=float), np.asarray(b, dtype=float), np.asarray(Z)
    s, d = len(b), Z.shape[-1]
    coupling = np.einsum("ij,...kl->...ikjl", A, Z).reshape(*Z.shape[:-2], s * d, s * d)
    right = np.broadcast_to(np.tile(np.eye(d), (s, 1)), (*Z.shape[:-2], s * d, d))
    stages = np.linalg.solve(np.eye(s * d) - coupling, right).reshape(*Z.shape[:-2], s, d, d)
    return np.eye(d) + Z @ np.einsum("i,...ikl->...kl", b, stages)


def _norm(X: np.ndarray) -> np.ndarray:
    """2-norms of a stack of matrices."""
    if X.shape[-1] != 2:
        return np.linalg.norm(X, 2, axis=(-2, -1))
    square = (np.abs(X) ** 2).sum(axis=(-2, -1))
    determinant = np.abs(X[..., 0, 0] * X[..., 1, 1] - X[..., 0, 1] * X[..., 1, 0])
    return np.sqrt((square + np.sqrt(np.maximum(square**2 - 4 * determinant**2, 0))) / 2)


def block_factors(fine, coarse, m: int, coarse_steps: int, relax: str = "F", weight: float = 1.0, circle: int = 64):
    """Bounds of the two-level factor of blocks, like those of :func:`~pint_fem.theory.two_level.two_level_factors`.

    Parameters
    ----------
    fine, coarse
        Propagators ``(..., d, d)``, functions of the same matrix in each block, of norm at most one.
    m, coarse_steps, relax, weight
        As there; a finite number of steps.
    circle
        Points on the upper half of the unit circle.

    Returns
    -------
    ndarray
        ``(...)``.
    """
    nu = str(relax).count("C")
    power = np.linalg.matrix_power(fine, m)
    gap, eye = power - coarse, np.eye(power.shape[-1])
    total, C = np.zeros(power.shape[:-2]), np.zeros_like(power)
    for j in range(coarse_steps):
        C = coarse @ C
        if j <= nu:
            C = C + math.comb(nu, j) * (1 - weight) ** (nu - j) * np.linalg.matrix_power(weight * power, j)
        size = _norm(gap @ C)
        total = total + size
        if j > nu and (size <= 1e-6 * total).all():
            total = total + (coarse_steps - 1 - j) * size  # norms do not grow
            break
    radius = np.abs(np.linalg.eigvals(coarse)).max(axis=-1)
    symbol = np.zeros_like(total)
    for angle in np.linspace(0, np.pi, circle):
        zeta = np.exp(1j * angle)
        relaxed = np.linalg.matrix_power((1 - weight) * eye + weight * zeta * power, nu)
        with np.errstate(all="ignore"):
            resolvent = np.linalg.inv(eye - np.where(radius < 1 - 1e-9, zeta, 0.5)[..., None, None] * coarse)
        symbol = np.maximum(symbol, _norm(gap @ relaxed @ resolvent))
    return np.where(radius < 1 - 1e-9, np.minimum(total, 1.02 * symbol), total)


def v_cycle_norm(propagators: Sequence[np.ndarray], coarsening: Sequence[int], steps: int, nu: int = 1) -> np.ndarray:
    """Bound of the norm of a V-cycle's error propagation at the C-points, for each block.

    The cycle is applied to unit errors at as many C-points as one step of the coarsest level holds: it is invariant
    under shifts by those. The bound is the geometric mean of the 1- and the infinity-norm of what comes out.

    Parameters
    ----------
    propagators
        ``(k, d, d)`` of each level.
    coarsening
        Factors between levels; their product divides ``steps``.
    steps
        Of the finest level.
    nu
        C-relaxations on each level but the coarsest.

    Returns
    -------
    ndarray
        ``(k,)``.
    """
    k, d = propagators[0].shape[:2]
    period, points = math.prod(coarsening[1:]), steps // coarsening[0]
    e = np.zeros((steps + 1, period, k, d, d))
    for j in range(min(period, points)):
        e[(j + 1) * coarsening[0], j] = np.eye(d)
    _cycle(e, None, list(propagators), list(coarsening), nu)
    sizes = _norm(e[coarsening[0] :: coarsening[0]])  # (points, period, k)
    columns = sizes.sum(axis=0).max(axis=0)
    rows = np.zeros((period, k))
    for i in range(points - 1, max(points - 1 - period, -1), -1):
        rows[points - 1 - i] = sum(sizes[r].sum(axis=0) for r in range(i, -1, -period))
    return np.sqrt(columns * rows.max(axis=0))


def _cycle(e: np.ndarray, g: np.ndarray | None, propagators: list, coarsening: list, nu: int) -> None:
    """One V-cycle for ``e[i] = Phi e[i-1] + g[i]`` with ``e[0]`` given, in place."""
    phi = propagators[0]
    if not coarsening:
        for i in range(1, len(e)):
            e[i] = phi @ e[i - 1] + g[i]
        return
    m, add = coarsening[0], (lambda i: 0.0) if g is None else (lambda i: g[i])

    def relax_f():
        for j in range(1, m):
            rows = slice(j, None, m)
            e[rows] = phi @ e[j - 1 : -1 : m] + add(rows)

    relax_f()
    for _ in range(nu):
        e[m::m] = phi @ e[m - 1 :: m] + add(slice(m, None, m))
        relax_f()
    residual = np.zeros_like(e[::m])
    residual[1:] = phi @ e[m - 1 :: m] + add(slice(m, None, m)) - e[m::m]
    correction = np.zeros_like(residual)
    _cycle(correction, residual, propagators[1:], coarsening[1:], nu)
    e[::m] += correction
    relax_f()
