r"""Two-level convergence bounds for linear problems.

With eigenvalues :math:`\lambda` of the fine and :math:`\mu` of the coarse propagator, coarsening ``m`` and
:math:`N_c` coarse steps, the error at the C-points contracts at least by (Dobrev, Kolev, Petersson, Schroder, SISC
39(5), 2017)

.. math::
   \text{F:}\quad |\lambda^m - \mu| \frac{1 - |\mu|^{N_c}}{1 - |\mu|}, \qquad
   \text{FCF:}\quad |\lambda|^m |\lambda^m - \mu| \frac{1 - |\mu|^{N_c - 1}}{1 - |\mu|}.
"""

from __future__ import annotations

import numpy as np

__all__ = ["dirk_stability", "two_level_bound"]


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


def two_level_bound(fine, coarse, m: int, coarse_steps: float = np.inf, relax: str = "F") -> float:
    """Largest two-level factor over the spectrum.

    Parameters
    ----------
    fine, coarse
        Eigenvalues of the fine and the coarse propagator, in the same order.
    m
        Coarsening factor.
    coarse_steps
        ``Nc``; may be infinite where ``|coarse| < 1``.
    relax
        ``"F"``, ``"FCF"`` or ``F(CF)^nu`` written out: each C-relaxation is a factor ``|fine|^m`` and one coarse step
        less.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        On another relaxation.
    """
    sweeps = str(relax).count("C")
    if relax != "F" + sweeps * "CF":
        raise ValueError(f"no bound for relaxation {relax!r}: give 'F', 'FCF', 'FCFCF' ...")
    fine, mu = np.asarray(fine), np.abs(np.asarray(coarse))
    count = max(coarse_steps - sweeps, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        geometric = np.where(mu == 1, count, (1 - mu**count) / (1 - mu))
        gap = np.abs(fine**m - np.asarray(coarse))
        bound = np.where(gap == 0, 0, gap * geometric)  # a mode that both keep (lam = mu = 1) has no error
    bound = bound * np.abs(fine) ** (sweeps * m)
    return float(np.max(bound))
