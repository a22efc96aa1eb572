r"""Contraction factors of ParaDiag's alpha-circulant iteration, from the eigenvalues of a step.

An iteration multiplies the error of a mode with eigenvalue :math:`\lambda` of :math:`\Phi` by

.. math::  \frac{\alpha \lambda^N}{1 - \alpha \lambda^N}

at the last point, and from the second iteration on at all points (Gander, Halpern, Rannou, Ryan, SISC 41(5), 2019;
Liu, Wu, SIMAX 41(4), 2020). Round-off of the scaled transform adds about :math:`\epsilon / \alpha` times the
correction, so that :math:`\alpha` below :math:`10^{-8}` gains nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["block_contraction", "contraction"]


def contraction(lam: ArrayLike, alpha: float, nsteps: int) -> float:
    """Largest factor by which an iteration of ParaDiag multiplies the error of a mode.

    Parameters
    ----------
    lam
        Eigenvalues of the step ``Phi``.
    alpha
        Parameter of the circulant, between 0 and 1.
    nsteps
        Number of steps ``N``.

    Returns
    -------
    float
        At most ``alpha/(1 - alpha)`` where no ``|lam|`` exceeds one; infinite where ``alpha lam^N`` is one.
    """
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        last = alpha * np.atleast_1d(np.asarray(lam, dtype=complex)) ** nsteps
        factors = np.abs(last) / np.abs(1 - last)
    return float(np.max(np.where(np.isfinite(factors), factors, 1.0 if np.isinf(last).any() else np.inf)))


def block_contraction(blocks: ArrayLike, alpha: float, nsteps: int) -> float:
    """Largest norm by which an iteration of ParaDiag multiplies the error of a block of a block-normal system.

    Parameters
    ----------
    blocks
        Step of each block, such as one damped wave, ``(..., d, d)``.
    alpha, nsteps
        As for :func:`contraction`.

    Returns
    -------
    float
        Largest 2-norm over the blocks; infinite where a block has the eigenvalue one of ``alpha Phi^N``.
    """
    blocks = np.asarray(blocks)
    with np.errstate(over="ignore", invalid="ignore"):
        last = alpha * np.linalg.matrix_power(blocks, nsteps)
    if not np.isfinite(last).all():
        return contraction(np.linalg.eigvals(blocks), alpha, nsteps)
    eye = np.eye(blocks.shape[-1])
    try:
        return float(np.max(np.linalg.norm(np.linalg.solve(eye - last, last), 2, axis=(-2, -1))))
    except np.linalg.LinAlgError:
        return np.inf
