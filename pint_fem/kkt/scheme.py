r"""A Runge-Kutta step of a linear evolution as one set of equations for stages and end, for one frequency in time.

With the stage values :math:`U_i` and the end :math:`v` of a step from :math:`u_0`
(:class:`~pint_fem.evolution.tableaux.DIRK`),

.. math::
   S_i U_i = M W_i + h_i F z , \quad W_i = w_{i0} u_0 + \sum_{j<i} w_{ij} U_j , \qquad
   v = e_0 u_0 + \sum_j e_j U_j .
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pint_fem.evolution.tableaux import DIRK

__all__ = ["StageCoefficients"]


class StageCoefficients(NamedTuple):
    """The coefficients of the equations of a step.

    Attributes
    ----------
    w0, w : ndarray, shape (s,) and (s, s)
        Of :math:`W_i`, strictly lower triangular.
    e0, e : float, ndarray, shape (s,)
        Of the end.
    """

    w0: np.ndarray
    w: np.ndarray
    e0: float
    e: np.ndarray

    @classmethod
    def of(cls, dirk: DIRK) -> StageCoefficients:
        """The coefficients of a method."""
        s = dirk.stages
        w0, w, identity = np.ones(s), np.zeros((s, s)), np.eye(s)
        for i in range(s):
            for j in range(i):
                w0[i] -= dirk.alpha[i, j] * w0[j]
                w[i] += dirk.alpha[i, j] * (identity[j] - w[j])
        if dirk.stiffly_accurate:
            return cls(w0, w, 0.0, identity[-1])
        return cls(w0, w, float(1 - dirk.beta @ w0), dirk.beta @ (identity - w))
