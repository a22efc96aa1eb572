r"""The forcing terms of a truncated Newton method: the residual at which conjugate gradients stop.

Conjugate gradients at iterate :math:`k` stop at :math:`|g_k + H_k s| \le \eta_k |g_k|`. The choices are

* "superlinear": :math:`\eta_k = \min(1/2, \sqrt{|g_k|/|g_0|})`;
* a number: :math:`\eta_k` is that number, and :math:`|g_k|` converges linearly at best;
* "eisenstat-walker-1": :math:`\eta_k = \big||g_k| - |g_{k-1} + H_{k-1} s_{k-1}|\big| / |g_{k-1}|`, the error of
  the gradient that the model predicted; here :math:`s_{k-1}` is the accepted step, ended by the trust region or not;
* "eisenstat-walker-2": :math:`\eta_k = \gamma\,(|g_k|/|g_{k-1}|)^\alpha`, :math:`\gamma = 0.9`, :math:`\alpha = 2`.

:math:`\eta_0 = 1/2`. The last two are the choices of Eisenstat and Walker [1] with their safeguards: :math:`\eta_k` is
no smaller than :math:`\eta_{k-1}^{(1+\sqrt 5)/2}`, or :math:`\gamma\,\eta_{k-1}^2`, as long as that exceeds 0.1, and no
larger than :math:`1/2`. Near a minimum with definite Hessian :math:`|g_k|` then converges superlinearly. A model that
predicts the gradient exactly, as it does for a quadratic, would require an exact solution: :math:`\eta_k` is no
smaller than :math:`\tfrac12 \epsilon/|g_k|` for a run that ends at :math:`|g_k| \le \epsilon` [2], nor than
:math:`10^{-6}`.

References
----------
[1] S. C. Eisenstat, H. F. Walker, Choosing the forcing terms in an inexact Newton method, SISC 17 (1996) 16-32.
[2] C. T. Kelley, Iterative Methods for Linear and Nonlinear Equations, SIAM 1995.
"""

from __future__ import annotations

import math
from numbers import Real

__all__ = ["CHOICES", "first_forcing_term", "next_forcing_term"]

CHOICES = ("superlinear", "eisenstat-walker-1", "eisenstat-walker-2")

_LARGEST, _SMALLEST = 0.5, 1e-6
_GOLDEN = (1 + math.sqrt(5)) / 2
_GAMMA, _ALPHA = 0.9, 2.0
# The safeguard acts while the last term, raised to its power, exceeds this.
_SAFEGUARD = 0.1


def first_forcing_term(choice: str | float) -> float:
    """The forcing term at the first guess."""
    return float(choice) if isinstance(choice, Real) else _LARGEST


def next_forcing_term(
    choice: str | float,
    *,
    last: float,
    norm: float,
    norm_before: float,
    model_norm: float,
    first_norm: float,
    final_norm: float,
) -> float:
    """The forcing term after an accepted step.

    Parameters
    ----------
    choice : str or float
        One of `CHOICES` or a number.
    last : float
        The forcing term before the step.
    norm, norm_before, first_norm : float
        Norms of the gradient after and before the step and at the first guess.
    model_norm : float
        Norm of the model's gradient at the end of the step.
    final_norm : float
        Norm of the gradient at which the run ends.

    Returns
    -------
    float
    """
    if isinstance(choice, Real):
        return float(choice)
    if choice == "superlinear":
        return min(_LARGEST, math.sqrt(norm / first_norm))
    if choice == "eisenstat-walker-1":
        term, safeguard = abs(norm - model_norm) / norm_before, last**_GOLDEN
    else:
        term, safeguard = _GAMMA * (norm / norm_before) ** _ALPHA, _GAMMA * last**_ALPHA
    # A zero gradient ends the run, whatever its forcing term.
    least = 0.5 * final_norm / norm if norm > 0 else _LARGEST
    return min(_LARGEST, max(term, safeguard if safeguard > _SAFEGUARD else 0.0, least, _SMALLEST))
