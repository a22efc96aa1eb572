r"""Convergence of ParaDiag before it runs.

Of a mode with eigenvalue :math:`\lambda` of :math:`\Phi`, an iteration multiplies the error at the last point, and from
the second one on at all points, by

.. math::  \frac{\alpha \lambda^N}{1 - \alpha \lambda^N} .

(Gander, Halpern, Rannou, Ryan, SISC 41(5), 2019; Liu, Wu, SIMAX 41(4), 2020.) Round-off of the scaled transform adds
about :math:`\epsilon / \alpha` times the correction, so that :math:`\alpha` below :math:`10^{-8}` gains nothing.
"""

from __future__ import annotations

import numpy as np

__all__ = ["contraction"]


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
