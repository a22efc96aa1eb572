r"""A run of one of scipy's minimisers on plain arrays: in which unit J is handed to it, and when the run ends.

Tolerances of scipy's are absolute: L-BFGS-B ends at :math:`\max_i |\partial_i J| \le 10^{-5}` and where J falls by less
than :math:`2 \cdot 10^{-9} \max(|J|, 1)`, trust-krylov at :math:`|\nabla J| \le 10^{-4}`. A J whose unit makes it small
is at its minimum then wherever it starts. So scipy gets :math:`c J` with

.. math::  c = \max\left(1,\ \frac{1}{|g_0|},\ \min\left(\frac{1}{|J_0|}, \frac{10^8}{|g_0|}\right)\right)

of the start, rounded up to a power of 2, which changes no digit: the gradient has at least the norm 1 at the start, as
has J unless that made the gradient huge. Where no tolerance is given the run ends as the trust region's does, when the
norm of the (projected) gradient has fallen by ``gtol_rel``, and scipy's own tolerances are set to round-off.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize

from pint_fem.optimize.scipy_methods.hessian_actions import HessianActions

__all__ = ["GTOL_REL", "TOLERANCES", "run", "unit_factor"]

GTOL_REL = 1e-6
"""Fall of the gradient's norm at which a run ends where the caller gives no tolerance."""

TOLERANCES = {
    "CG": {"gtol": 0.0},
    "BFGS": {"gtol": 0.0},
    "L-BFGS-B": {"ftol": 1e-15, "gtol": 0.0},
    "TNC": {"ftol": 0.0, "xtol": 0.0, "gtol": 0.0},
    "SLSQP": {"ftol": 1e-16},
    "Newton-CG": {"xtol": 1e-15},
    "trust-ncg": {"gtol": 0.0},
    "trust-krylov": {"gtol": 0.0},
    "trust-constr": {"gtol": 1e-8, "xtol": 1e-12},
}
"""scipy's own tolerances by method, where the run ends by the gradient's norm; interior points never get all of the way
to a bound, so trust-constr keeps one."""

_HESSIAN = ("Newton-CG", "trust-ncg", "trust-krylov", "trust-constr")
# What of scipy's result does not depend on its coordinates.
_KEPT = ("fun", "message", "nfev", "nhev", "nit", "njev", "status", "success")
# Largest norm of the scaled gradient at the start.
_LARGEST = 1e8
# What stands for a J that is not finite, in terms of the largest size of J so far: scipy's line searches interpolate.
_WORSE = 10.0


def unit_factor(value: float, norm: float) -> float:
    """What J is multiplied by, for its value and the norm of its gradient at the start; 1 where these say nothing."""
    if not (math.isfinite(value) and 0 < norm < math.inf):
        return 1.0
    factor = max(1 / norm, min(1 / abs(value) if value else math.inf, _LARGEST / norm), 1.0)
    return 2.0 ** math.ceil(math.log2(factor)) if factor < 1e300 else 1.0


class _BreakdownError(Exception):
    """scipy asked for something that is not finite."""


class _ConvergedError(Exception):
    """The gradient is small enough."""


class _Functions:
    """What scipy calls; it keeps the best point.

    Parameters
    ----------
    ask
        ``ask(name, *arguments)`` on all processes.
    y0, bounds, gtol_rel
        Of the run.
    """

    def __init__(self, ask: Callable, y0: np.ndarray, method: str, bounds, gtol_rel: float | None, calls_back: bool):
        self.ask, self.method, self.bounds, self.calls_back = ask, method, bounds, calls_back
        self.iterate, self.iterations, self.counts = np.array(y0), 0, {"nfev": 0, "njev": 0, "nhev": 0}
        self._actions, self.factor, self._tolerance, self._largest = HessianActions(), 1.0, -1.0, 0.0
        self.last, self._flat = (np.full(0, math.nan), math.inf), np.full(0, math.nan)
        self.best = math.inf, np.array(y0)
        J = ask("value", y0)
        if math.isfinite(J):
            norm = self._norm(y0, ask("gradient", y0))
            self.factor = unit_factor(J, norm)
            if gtol_rel is not None:
                self._tolerance = gtol_rel * norm

    def _norm(self, y: np.ndarray, g: np.ndarray) -> float:
        """Of the gradient, projected where y is on bounds."""
        if self.bounds is not None:
            g = np.where(((y <= self.bounds.lb) & (g > 0)) | ((y >= self.bounds.ub) & (g < 0)), 0.0, g)
        return float(np.linalg.norm(g))

    def value(self, y):
        """c J, or a number beyond all others where J is not finite."""
        if not np.isfinite(y).all():
            return math.inf
        self.counts["nfev"] += 1
        J = self.ask("value", y)
        self.last = np.array(y), J
        if self.best[0] > J:
            self.best = J, np.array(y)
        if math.isfinite(J):
            self._largest = max(self._largest, abs(J))
            if np.array_equal(y, self._flat):
                self._end(y)
        elif self._largest > 0:
            J = _WORSE * self._largest
        return self.factor * J

    def gradient(self, y):
        """Its gradient, zero where J is not finite; the run ends here if it is small."""
        if not np.isfinite(y).all():
            raise _BreakdownError(f"{self.method} asked for a gradient at a point that is not finite")
        self.counts["njev"] += 1
        known = np.array_equal(self.last[0], y)
        if known and not math.isfinite(self.last[1]):
            return np.zeros_like(y)
        g = self.ask("gradient", y)
        if self._norm(y, g) <= self._tolerance:
            self._flat = np.array(y)  # trust-krylov asks for the gradient before the value
            if known:
                self._end(y)
        return self.factor * g

    def _end(self, y: np.ndarray) -> None:
        """End the run at a point with a small gradient, if there is no better one."""
        if self.last[1] > self.best[0]:
            return
        if not np.array_equal(y, self.iterate):
            self.after_iteration(y)
        raise _ConvergedError

    def hessian_action(self, y, p):
        """Its Hessian's action."""
        if not np.isfinite(p).all():
            raise _BreakdownError(f"{self.method} asked for a Hessian action in a direction that is not finite")
        self.counts["nhev"] += 1
        return self.factor * self._actions.at(y, p, lambda: self.ask("hessian_action", y, p))

    def after_iteration(self, y, *_):
        """Count, and call back."""
        self.iterate, self.iterations = np.array(y), self.iterations + 1
        if self.calls_back and self.ask("call_back", y):
            raise StopIteration


def run(
    ask: Callable, y0: np.ndarray, method: str, calls_back: bool, gtol_rel: float | None, options: dict
) -> dict[str, object]:
    """Run scipy; what of its result does not depend on its coordinates, and the point ``y``.

    Parameters
    ----------
    ask
        ``ask(name, *arguments)``: ``"value"``, ``"gradient"``, ``"hessian_action"`` and ``"call_back"``.
    y0
        Start.
    method
        scipy's.
    calls_back
        Whether there is a callback.
    gtol_rel
        Fall of the gradient's norm that ends the run; ``None``: scipy's tolerances do.
    options
        Of ``scipy.optimize.minimize``.
    """
    functions = _Functions(ask, y0, method, options.get("bounds"), gtol_rel, calls_back)
    if method in _HESSIAN:
        options["hessp"] = functions.hessian_action
    try:
        result = minimize(
            functions.value, y0, method=method, jac=functions.gradient, callback=functions.after_iteration, **options
        )
        result.fun = result.fun / functions.factor
        if not np.isfinite(result.fun) and math.isfinite(functions.best[0]):
            result.x, result.fun = functions.best[1], functions.best[0]
        return {"y": np.array(result.x), **{name: result[name] for name in _KEPT if name in result}}
    except StopIteration:  # most methods return a result instead, TNC does not
        y = functions.iterate
        made = dict(fun=ask("value", y), success=False, status=99, message="stopped by callback")
    except _ConvergedError:
        y, text = functions.iterate, f"the gradient's norm has fallen by gtol_rel = {gtol_rel:g}"
        made = dict(fun=functions.last[1], success=True, status=0, message=text)
    except _BreakdownError as breakdown:
        value, y = functions.best
        made = dict(fun=value, success=False, status=98, message=str(breakdown))
    return {"y": y, "nit": functions.iterations, **functions.counts, **made}
