r"""A run of one of scipy's minimisers on plain arrays, with a scaling of J and a stopping test of its own.

scipy's tolerances are absolute: L-BFGS-B ends at :math:`\max_i |\partial_i J| \le 10^{-5}` and where J falls by less
than :math:`2 \cdot 10^{-9} \max(|J|, 1)`, trust-krylov at :math:`|\nabla J| \le 10^{-4}`. A J that is small in its unit
then counts as minimal at any start. Therefore scipy minimises :math:`c J` with

.. math::  c = \max\left(1,\ \frac{1}{|g_0|},\ \min\left(\frac{1}{|J_0|}, \frac{10^8}{|g_0|}\right)\right)

of the start, rounded up to a power of 2, which changes no digit: the gradient has at least the norm 1 at the start, as
has J unless that made the gradient huge. Where no tolerance is given the run ends as the trust region's does, when the
norm of the (projected) gradient has fallen by ``gtol_rel``, and scipy's own tolerances are set to round-off.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize

__all__ = ["ACTIONS_NBYTES", "GTOL_REL", "TOLERANCES", "HessianActions", "run", "unit_factor"]

ACTIONS_NBYTES = 1 << 26
"""Most bytes of Hessian actions that are stored at an iterate."""

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
"""scipy's own tolerances by method, where the run ends by the gradient's norm; interior points never reach a bound, so
trust-constr has a positive tolerance."""

_HESSIAN = ("Newton-CG", "trust-ncg", "trust-krylov", "trust-constr")
# Entries of scipy's result that do not depend on its coordinates.
_INVARIANT = ("fun", "message", "nfev", "nhev", "nit", "njev", "status", "success")
# Largest norm of the scaled gradient at the start.
_LARGEST = 1e8
# A J that is not finite is replaced by this multiple of the largest |J| so far: scipy's line searches interpolate.
_WORSE = 10.0


def unit_factor(value: float, norm: float) -> float:
    """The factor of J, from its value and the norm of its gradient at the start; 1 where these are zero or not finite.

    Parameters
    ----------
    value, norm : float
        J and the norm of its gradient at the start.

    Returns
    -------
    float
        A power of 2.
    """
    if not (math.isfinite(value) and 0 < norm < math.inf):
        return 1.0
    factor = max(1 / norm, min(1 / abs(value) if value else math.inf, _LARGEST / norm), 1.0)
    return 2.0 ** math.ceil(math.log2(factor)) if factor < 1e300 else 1.0


class HessianActions:
    """Hessian actions at the last iterate, up to :data:`ACTIONS_NBYTES` bytes of them.

    A trust region that shrinks begins with the same directions again, in the same order. So the first actions are
    stored, and those beyond the limit are computed again.
    """

    def __init__(self) -> None:
        self._y = np.full(0, math.nan)
        self._stored: dict[bytes, np.ndarray] = {}

    def at(self, y: np.ndarray, p: np.ndarray, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The action at ``y`` in a direction ``p``, from ``compute()`` where it is not stored."""
        if not np.array_equal(y, self._y):
            self._y, self._stored = np.array(y), {}
        key = hashlib.blake2b(np.ascontiguousarray(p, dtype=float), digest_size=16).digest()
        if key in self._stored:
            return self._stored[key].copy()
        action = compute()
        if (len(self._stored) + 1) * action.nbytes <= ACTIONS_NBYTES:
            self._stored[key] = action.copy()
        return action


class _BreakdownError(Exception):
    """scipy requires a value at a point, or a product with a direction, that is not finite."""


class _ConvergedError(Exception):
    """The gradient is small enough."""


class _Functions:
    """The functions that scipy calls; they store the best point.

    Parameters are those of :func:`run`, and the bounds among its options.
    """

    def __init__(
        self, evaluate: Callable, y0: np.ndarray, method: str, bounds, gtol_rel: float | None, calls_back: bool
    ):
        self.evaluate, self.method, self.bounds, self.calls_back = evaluate, method, bounds, calls_back
        self.iterate, self.iterations, self.counts = np.array(y0), 0, {"nfev": 0, "njev": 0, "nhev": 0}
        self._actions, self.factor, self._tolerance, self._largest = HessianActions(), 1.0, -1.0, 0.0
        self.last, self._flat = (np.full(0, math.nan), math.inf), np.full(0, math.nan)
        self.best = math.inf, np.array(y0)
        J = evaluate("value", y0)
        if math.isfinite(J):
            norm = self._norm(y0, evaluate("gradient", y0))
            self.factor = unit_factor(J, norm)
            if gtol_rel is not None:
                self._tolerance = gtol_rel * norm

    def _norm(self, y: np.ndarray, g: np.ndarray) -> float:
        """The norm of the gradient, projected where y is on bounds."""
        if self.bounds is not None:
            g = np.where(((y <= self.bounds.lb) & (g > 0)) | ((y >= self.bounds.ub) & (g < 0)), 0.0, g)
        return float(np.linalg.norm(g))

    def value(self, y: np.ndarray) -> float:
        """c J, or a number larger than all others where J is not finite."""
        if not np.isfinite(y).all():
            return math.inf
        self.counts["nfev"] += 1
        J = self.evaluate("value", y)
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

    def gradient(self, y: np.ndarray) -> np.ndarray:
        """The gradient of c J, zero where J is not finite; the run ends here if it is small."""
        if not np.isfinite(y).all():
            raise _BreakdownError(f"{self.method} evaluates a gradient at a point that is not finite")
        self.counts["njev"] += 1
        has_value = np.array_equal(self.last[0], y)
        if has_value and not math.isfinite(self.last[1]):
            return np.zeros_like(y)
        g = self.evaluate("gradient", y)
        if self._norm(y, g) <= self._tolerance:
            self._flat = np.array(y)  # trust-krylov evaluates the gradient before the value
            if has_value:
                self._end(y)
        return self.factor * g

    def _end(self, y: np.ndarray) -> None:
        """End the run at a point with a small gradient, if there is no better one."""
        if self.last[1] > self.best[0]:
            return
        if not np.array_equal(y, self.iterate):
            self.after_iteration(y)
        raise _ConvergedError

    def hessian_action(self, y: np.ndarray, p: np.ndarray) -> np.ndarray:
        """The Hessian of c J times p."""
        if not np.isfinite(p).all():
            raise _BreakdownError(f"{self.method} evaluates a Hessian action in a direction that is not finite")
        self.counts["nhev"] += 1
        return self.factor * self._actions.at(y, p, lambda: self.evaluate("hessian_action", y, p))

    def after_iteration(self, y: np.ndarray, *_) -> None:
        """Count iterations, and call the callback."""
        self.iterate, self.iterations = np.array(y), self.iterations + 1
        if self.calls_back and self.evaluate("call_back", y):
            raise StopIteration


def run(
    evaluate: Callable, y0: np.ndarray, method: str, calls_back: bool, gtol_rel: float | None, options: dict
) -> dict[str, object]:
    """Run one of scipy's minimisers.

    Parameters
    ----------
    evaluate : callable
        ``evaluate(name, *arguments)``: ``"value"``, ``"gradient"``, ``"hessian_action"`` and ``"call_back"``.
    y0 : ndarray, shape (n,)
        Start.
    method : str
        scipy's name of the method.
    calls_back : bool
        Whether there is a callback.
    gtol_rel : float or None
        Reduction of the gradient's norm that ends the run; with ``None`` scipy's tolerances do.
    options : dict
        Other arguments of ``scipy.optimize.minimize``.

    Returns
    -------
    dict
        The entries of scipy's result that do not depend on its coordinates, and the point ``y``.
    """
    functions = _Functions(evaluate, y0, method, options.get("bounds"), gtol_rel, calls_back)
    if method in _HESSIAN:
        options["hessp"] = functions.hessian_action
    try:
        result = minimize(
            functions.value, y0, method=method, jac=functions.gradient, callback=functions.after_iteration, **options
        )
        result.fun = result.fun / functions.factor
        if not np.isfinite(result.fun) and math.isfinite(functions.best[0]):
            result.x, result.fun = functions.best[1], functions.best[0]
        return {"y": np.array(result.x), **{name: result[name] for name in _INVARIANT if name in result}}
    except StopIteration:  # most methods return a result instead, TNC does not
        y = functions.iterate
        made = dict(fun=evaluate("value", y), success=False, status=99, message="stopped by callback")
    except _ConvergedError:
        y, text = functions.iterate, f"the gradient's norm has fallen by gtol_rel = {gtol_rel:g}"
        made = dict(fun=functions.last[1], success=True, status=0, message=text)
    except _BreakdownError as breakdown:
        value, y = functions.best
        made = dict(fun=value, success=False, status=98, message=str(breakdown))
    return {"y": y, "nit": functions.iterations, **functions.counts, **made}
