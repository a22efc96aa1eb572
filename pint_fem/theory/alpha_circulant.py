r"""Convergence of ParaDiag before it runs.

Of a mode with eigenvalue :math:`\lambda` of :math:`\Phi`, an iteration multiplies the error at the last point, and from
the second one on at all points, by

.. math::  \frac{\alpha \lambda^N}{1 - \alpha \lambda^N} .

(Gander, Halpern, Rannou, Ryan, SISC 41(5), 2019; Liu, Wu, SIMAX 41(4), 2020.) Round-off of the scaled transform adds
about :math:`\epsilon / \alpha` times the correction, so that :math:`\alpha` below :math:`10^{-8}` gains nothing.
"""

from __future__ import annotations

import numpy as np

__all__ = ["block_contraction", "contraction"]


def contraction(lam, alpha: float, nsteps: int) -> float:
    """Largest factor by which an iteration multiplies the error of a mode.

    Parameters
    ----------
    lam
        Eigenvalues of the step.
    alpha, nsteps
        Between 0 and 1; ``N``.

    Returns
    -------
    float
        At most ``alpha/(1 - alpha)`` where no ``|lam|`` exceeds one; infinite where ``alpha lam^N`` is one.
    """
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        last = alpha * np.atleast_1d(np.asarray(lam, dtype=complex)) ** nsteps
        factors = np.abs(last) / np.abs(1 - last)
    return float(np.max(np.where(np.isfinite(factors), factors, 1.0 if np.isinf(last).any() else np.inf)))


def block_contraction(blocks, alpha: float, nsteps: int) -> float:
    """The same for systems that are normal only in blocks, such as damped waves: the largest norm.

    Parameters
    ----------
    blocks
        Step of each block, ``(..., d, d)``.
    alpha, nsteps
        See :func:`contraction`.
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
