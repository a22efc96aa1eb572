r"""Predicted reductions of the merit function, its penalty, and the accuracy that they require of linear solves.

The merit function is the augmented Lagrangian
:math:`\phi(x, \lambda; \rho) = J(x) + \langle\lambda, c(x)\rangle + \rho\,|c(x)|^2` with the multipliers of the point.
For a step :math:`s = n + t` and the change :math:`\Delta\lambda` of the multipliers the model predicts the reduction
[1]

.. math::
    \mathrm{pred}(\rho) = -\langle L_x, s\rangle - \tfrac12\langle s, H s\rangle
    - \langle\Delta\lambda, c + c_x n\rangle + \rho\,\bigl(|c|^2 - |c + c_x n|^2\bigr).

The penalty is increased where :math:`\mathrm{pred}(\rho) < \tfrac\rho2 (|c|^2 - |c + c_x n|^2)`, to twice the value for
which both are equal. The tangential step satisfies the linearised constraint up to a residual :math:`e = c_x t`, which
changes the prediction by

.. math::
    \mathrm{rpred} = -\langle\Delta\lambda, e\rangle - \rho\,|e|^2 - 2\rho\,(e, c + c_x n) .

The solve for it is accurate enough where :math:`|\mathrm{rpred}| \le \eta_0\,\mathrm{pred}`; otherwise its tolerance is
reduced by a factor of ten [1, Alg. 3].

Reference
---------
[1] M. Heinkenschloss, D. Ridzal, A matrix-free trust-region SQP method for equality constrained optimization, SIAM J.
Optim. 24 (2014) 1507-1541.
"""

from __future__ import annotations

__all__ = ["INEXACT", "Prediction"]

INEXACT = 0.5
"""The largest share of the predicted reduction that the residual of the tangential step may have."""
_LEAST_INCREASE = 1e-8
"""What the penalty is increased by at least, relative to itself."""


class Prediction:
    """The predicted reduction of the merit function as a function of the penalty.

    Parameters
    ----------
    lagrangian : float
        Reduction of the model of the Lagrangian, the first two terms.
    multipliers : float
        ``<dlam, c + c_x n>``.
    before, after : float
        Norms of ``c`` and of ``c + c_x n``.

    Attributes
    ----------
    squares : float
        The reduction of the squared norm of the linearised constraint.
    """

    def __init__(self, lagrangian: float, multipliers: float, before: float, after: float):
        self._fixed, self.after = lagrangian - multipliers, after
        self.squares = max(before**2 - after**2, 0.0)

    def __call__(self, penalty: float) -> float:
        """The predicted reduction."""
        return self._fixed + penalty * self.squares

    def updated(self, penalty: float) -> float:
        """The penalty for which the prediction is large enough."""
        if self.squares == 0 or self(penalty) >= 0.5 * penalty * self.squares:
            return penalty
        return max(-4.0 * self._fixed / self.squares, penalty * (1 + _LEAST_INCREASE))

    def error(self, penalty: float, residual: float, multiplier_change: float) -> float:
        """A bound of what a residual of the tangential step changes, from norms."""
        return residual * (multiplier_change + penalty * (residual + 2 * self.after))
