r"""The minimisers of scipy on a problem with its own inner product.

scipy measures gradients, steps and trust regions in the Euclidean norm of its variables. With the product :math:`(a, b)
= \sum_i w_i a_i b_i` these are :math:`y = W^{1/2} x`, in which the problem's norm is the Euclidean one, so iteration
counts are those of the problem's own geometry. From the coefficients :math:`J'(x) = \mathrm{dual}(g)` of the
derivative, :math:`(g, v) = \sum_i \mathrm{dual}(g)_i v_i`,

.. math:: \nabla_y J = W^{-1/2}\, \mathrm{dual}(g), \qquad
          \nabla_y^2 J\, p = W^{-1/2}\, \mathrm{dual}(H W^{-1/2} p).

The first process runs scipy on the global vector, the local parts gathered in rank order, and broadcasts what is to be
evaluated: evaluations are collective, decisions are those of one process. (If all ran scipy, their decisions would have
to be bitwise identical, which those of trust-krylov, for one, are not.) That suits a control of up to some million
values, and no trajectory: for large distributed controls use this package's own minimisers, which never gather.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI
from scipy.optimize import Bounds, OptimizeResult

from pint_fem.collective import any_rank, collectively, ending_all_ranks, raise_collectively, require_same
from pint_fem.errors import FAILURES
from pint_fem.optimize.argument_checks import check, check_bounds, check_choice
from pint_fem.optimize.guarded_problem import GuardedProblem
from pint_fem.optimize.protocol import NonFiniteError, Problem
from pint_fem.optimize.ranks import check_run, collective_callback
from pint_fem.optimize.records import ResultSummary
from pint_fem.optimize.scipy_methods.run import GTOL_REL, TOLERANCES, run

__all__ = ["ScipyResult", "scipy_minimize"]

_GRADIENT_METHODS = ("CG", "BFGS", "L-BFGS-B", "TNC", "SLSQP")
_HESSIAN_METHODS = ("Newton-CG", "trust-ncg", "trust-krylov", "trust-constr")
_BOUND_METHODS = ("L-BFGS-B", "TNC", "SLSQP", "trust-constr")
# Set here, or meaningless for a problem of this kind.
_REFUSED = ("args", "bounds", "constraints", "fun", "hess", "hessp", "jac", "x0")

# (g, g) and dual(g) . g are the same sum in another order, or a linear solve apart.
_DUAL_RTOL = 1e-6


class ScipyResult(ResultSummary, OptimizeResult):
    """A result of scipy's with a summary of its own; its entries are those of :class:`scipy.optimize.OptimizeResult`.

    Attributes
    ----------
    x : ndarray
        This process's part of the minimiser.
    fun : float
        J there.
    jac : ndarray
        This process's part of the Riesz gradient there.
    success : bool
        Whether the minimiser exited successfully.
    status, message : int, str
        Why it ended.
    nit, nfev, njev, nhev : int
        Iterations and evaluations of J, of its gradient and of Hessian actions; those that the method has.
    control : Function, EnsembleFunction or list of these, or None
        The controls found, one or a list of several, where a functional's method minimised; None in a pickled or deep
        copy.
    """

    def _quantities(self) -> dict[str, float]:
        counts = {"nfev": "values", "njev": "gradients", "nhev": "Hessian products"}
        return {"J": float(self.fun), **{text: self[name] for name, text in counts.items() if name in self}}

    def _entries(self) -> dict[str, object]:
        return dict(self)

    __str__, __repr__ = ResultSummary.__str__, ResultSummary.__repr__


def scipy_minimize(
    problem: Problem,
    x0: np.ndarray,
    method: str = "trust-krylov",
    *,
    comm: MPI.Comm | None = None,
    lower: np.ndarray | float | None = None,
    upper: np.ndarray | float | None = None,
    hessian: str = "newton",
    gtol_rel: float | None = None,
    callback: Callable[[np.ndarray], object] | None = None,
    **options: Any,
) -> ScipyResult:
    """Minimise by :func:`scipy.optimize.minimize` in the problem's inner product.

    With several processes call it on all of them with the same options.

    Parameters
    ----------
    problem : Problem
        ``value``, ``gradient``, for methods with second derivatives ``hessian_action``, and ``inner``; optionally

        ``weights``
            array of the shape of x, or a method that returns it: the positive w of a diagonal inner product, ones by
            default. With `dual` they may be any scaling of the variables.
        ``dual(g)``
            the coefficients of the functional ``(g, .)``; by default ``weights * g``.
        ``owned``
            Boolean array of the shape of x: the entries this process contributes to the global vector, all by default.
            The others are copies of other processes' entries. ``update_copies(x)`` has to set them in place; where it
            is absent, a process that owns nothing holds a copy of the whole global vector.
    x0 : ndarray, shape (n,)
        First guess, this process's part; not modified.
    method : str
        "CG", "BFGS", "L-BFGS-B", "TNC", "SLSQP" (gradients), "Newton-CG", "trust-ncg", "trust-krylov" or
        "trust-constr" (Hessian actions), in any case.
    comm : mpi4py communicator, optional
        The processes x is distributed over. If all time ranks hold the same control, that is the space communicator.
    lower, upper : ndarray, shape (n,), or float, optional
        Bounds on x, for "L-BFGS-B", "TNC", "SLSQP" and "trust-constr".
    hessian : {"newton", "gauss-newton"}
        Whose action: ``problem.hessian_action`` or ``problem.gauss_newton_action``.
    gtol_rel : float, optional
        The run ends when the norm of the (projected) gradient has fallen by this. By default 1e-6, as in the trust
        region, or if ``tol`` or one of the method's tolerances is among the options, by those alone.
    callback : callable, optional
        ``callback(x)`` after each iteration, on all processes that have one, with a copy of the local part of the
        iterate; a true result on any of them stops.
    **options
        Arguments ``tol`` and ``options`` of :func:`scipy.optimize.minimize`. Tolerances are in the coordinates y, and
        of J times the factor of :mod:`pint_fem.optimize.scipy_methods.run` where J or its gradient is small at the
        start.

    Returns
    -------
    ScipyResult
        scipy's result without the entries in its own coordinates (``hess``, ``hess_inv``, ``grad``, ``v`` ...), with
        ``x`` this process's part of the minimiser and ``jac`` that of the Riesz gradient there. Where a method breaks
        down at a point or in a direction that is not finite, it is the best point so far, with ``success`` false.

    Raises
    ------
    ValueError
        A method that uses no gradients or needs a matrix, bounds with a method that ignores them, an argument that is
        set here, a bad `x0`, or a derivative that contradicts ``inner``.
    NonFiniteError
        A gradient or a Hessian action is not finite, or J cannot be computed at `x0`. Where J is not finite elsewhere,
        scipy uses a number larger than all before.
    """
    ranks = MPI.COMM_SELF if comm is None else comm
    with ending_all_ranks(ranks):
        bounded = (lower is not None, upper is not None)
        require_same(ranks, method=method, hessian=hessian, bounded=bounded, gtol_rel=gtol_rel, given=options)
        collectively(ranks, "", check_run, x0, None, callback)
        callback = collective_callback(ranks, callback) if any_rank(ranks, callback is not None) else None
        guarded = GuardedProblem(problem, ranks)
        return _minimise(guarded, x0, method, ranks, lower, upper, hessian, gtol_rel, callback, options)


def _minimise(
    problem: GuardedProblem, x0: np.ndarray, method: str, comm: MPI.Comm, lower: np.ndarray | float | None,
    upper: np.ndarray | float | None, hessian: str, gtol_rel: float | None, callback: Callable | None, options: dict,
) -> ScipyResult:  # fmt: skip
    """The run, on all processes with the same arguments but for the parts of vectors."""
    methods = {name.lower(): name for name in _GRADIENT_METHODS + _HESSIAN_METHODS}
    if not isinstance(method, str) or method.lower() not in methods:
        raise ValueError(f"method = {method!r} is refused: give one of {', '.join(methods.values())}")
    method = methods[method.lower()]
    for name in _REFUSED:
        if name in options:
            instead = {"bounds": "lower and upper", "constraints": "AffineConstraints(problem, ...)"}.get(name)
            raise ValueError(f"{name} is set by the problem" if instead is None else f"{name}: give {instead} instead")
    if (lower is not None or upper is not None) and method not in _BOUND_METHODS:
        raise ValueError(f"method {method} has no bounds: give one of {', '.join(_BOUND_METHODS)}")
    check_choice("hessian", hessian, ("newton", "gauss-newton"))
    action = "hessian_action" if hessian == "newton" else "gauss_newton_action"
    if method in _HESSIAN_METHODS and not callable(getattr(problem, action, None)):
        raise ValueError(f"{method} needs {action}: give the problem one, or one of {', '.join(_GRADIENT_METHODS)}")
    if gtol_rel is not None:
        check("gtol_rel", gtol_rel, "a number in (0, 1), or None", lambda v: 0 < v < 1)
    gtol_rel, options = _tolerances(method, gtol_rel, options)

    x0 = np.array(x0, dtype=np.float64)
    view = _EuclideanView(problem, x0, comm, action, callback)
    if lower is not None or upper is not None:
        options["bounds"] = view.bounds(lower, upper)
    y0 = view.coordinates(x0)
    if not math.isfinite(view.value(y0)) and problem.failure is not None:
        raise NonFiniteError(f"no J at the first guess: {problem.failure}", x0) from problem.failure
    processes = _Processes(view)
    if processes.first:
        own = processes.lead(lambda: run(processes.evaluate, y0, method, callback is not None, gtol_rel, options))
    else:
        own = processes.follow()
    y = own.pop("y")
    own["success"] = bool(own["success"])
    return ScipyResult(x=view.point(y), jac=view.riesz_gradient(y), control=None, **own)


def _tolerances(method: str, gtol_rel: float | None, options: dict) -> tuple[float | None, dict]:
    """The reduction of the gradient that ends the run, if any, and scipy's options with tolerances that do not end it
    before.
    """
    given, own = dict(options.get("options") or {}), TOLERANCES[method]
    if gtol_rel is None and (options.get("tol") is not None or set(given) & {*own, "gtol", "ftol", "xtol"}):
        return None, {**options, "options": given}
    return gtol_rel or GTOL_REL, {**options, "options": {**own, **given}}


class _Processes:
    """Collective evaluations that the first process directs; the view's methods fail on all where they fail on one."""

    def __init__(self, view: _EuclideanView):
        self.view, self.comm = view, view.layout.comm
        self.first = self.comm is None or self.comm.rank == 0
        self._evaluating = False  # an evaluation has begun and not ended

    def evaluate(self, name: str, *arguments: object) -> Any:
        """Call a method of the view on all processes, from the first one."""
        self._evaluating = True
        self._send(name, arguments)
        answer = getattr(self.view, name)(*arguments)
        self._evaluating = False
        return answer

    def lead(self, run: Callable[[], dict]) -> dict:
        """The result of `run` on the first process, which all others get; what it raises is raised on all."""
        try:
            result = run()
        except FAILURES as error:
            if not self._evaluating and self.comm is not None:  # else it was raised on all processes
                self._send("raise", ())
                raise_collectively(self.comm, error, "scipy")
            raise
        self._send("end", (result,))
        return dict(result)

    def follow(self) -> dict:
        """Evaluate what the first process requires, until it sends the result."""
        while True:
            name, arguments = self.comm.bcast(None)
            if name == "end":
                return arguments[0]
            if name == "raise":
                raise_collectively(self.comm, None, "scipy")
            getattr(self.view, name)(*arguments)

    def _send(self, name: str, arguments: tuple) -> None:
        if self.comm is not None:
            self.comm.bcast((name, arguments))


class _EuclideanView:
    """J as a function of the global y, with the results at the last y stored; its calls are collective."""

    def __init__(self, problem: GuardedProblem, x0: np.ndarray, comm: MPI.Comm, action: str, callback: Callable | None):
        self.problem, self.callback = problem, callback
        self.layout = _Layout(problem, x0, comm)
        weights = getattr(problem, "weights", None)
        w = np.array(weights() if callable(weights) else np.ones_like(x0) if weights is None else weights, dtype=float)
        bad = w.shape != x0.shape or not (np.isfinite(w).all() and (w > 0).all())
        if self.layout.on_any(bad):
            raise ValueError(f"weights of shape {w.shape}: give finite positive numbers of the shape of x, {x0.shape}")
        self.root = np.sqrt(w)
        self.box: tuple[np.ndarray | float, np.ndarray | float] = (-math.inf, math.inf)
        self._dual = getattr(problem, "dual", lambda g: w * g)
        self._action = getattr(problem, action, None)
        self._y = np.full(0, math.nan)
        self._results: dict[str, Any] = {}
        self._checked = False

    # -- coordinates --------------------------------------------------------------------------------------------------
    def coordinates(self, x: np.ndarray) -> np.ndarray:
        """The global y of local parts x."""
        return self.layout.gather(self.root * x)

    def direction(self, p: np.ndarray) -> np.ndarray:
        """The local part of a global direction p."""
        return self.layout.scatter(p, 1 / self.root)

    def point(self, y: np.ndarray) -> np.ndarray:
        """The local part x of a global y, within the bounds in spite of the round-off of the scaling."""
        return np.clip(self.direction(y), *self.box)

    def bounds(self, lower: np.ndarray | float | None, upper: np.ndarray | float | None) -> Bounds:
        """The bounds in y."""
        sides = [-math.inf if lower is None else lower, math.inf if upper is None else upper]
        collectively(self.problem.comm, "", check_bounds, *sides)
        if self.layout.on_any(any(np.shape(side) not in ((), self.root.shape) for side in sides)):
            raise ValueError(
                f"bounds of shapes {[np.shape(s) for s in sides]}: give numbers or shape {self.root.shape}"
            )
        local = [np.broadcast_to(np.asarray(side, dtype=float), self.root.shape) for side in sides]
        low, high = (self.coordinates(side) for side in local)
        if not (low <= high).all():
            raise ValueError("lower exceeds upper, or is not a number: give lower <= upper everywhere")
        self.box = local[0], local[1]
        return Bounds(low, high)

    # -- the functions scipy calls ------------------------------------------------------------------------------------
    def _once(self, y: np.ndarray, name: str, compute: Callable[[np.ndarray], object]) -> Any:
        """The result of `compute` at the local part of y, stored until y changes (the same on all processes)."""
        if not np.array_equal(y, self._y):
            self._y, self._results = np.array(y), {"x": self.point(y)}
        if name not in self._results:
            self._results[name] = compute(self._results["x"])
        return self._results[name]

    def value(self, y: np.ndarray) -> float:
        """J at the global y."""
        return self._once(y, "value", lambda x: float(self.problem.value(x)))

    def riesz_gradient(self, y: np.ndarray) -> np.ndarray:
        """This process's part of the Riesz gradient g."""
        return self._once(y, "riesz", lambda x: np.array(self.problem.gradient(x), dtype=float))

    def gradient(self, y: np.ndarray) -> np.ndarray:
        """The global gradient with respect to y."""
        return self._once(y, "gradient", lambda x: self._gradient(x, self.riesz_gradient(y)))

    def _gradient(self, x: np.ndarray, g: np.ndarray) -> np.ndarray:
        out = self._global_functional(x, g, "gradient")
        if not self._checked:
            square, product = float(self.problem.inner(g, g)), float(out @ self.coordinates(g))
            if not math.isclose(square, product, rel_tol=_DUAL_RTOL, abs_tol=1e-300):
                raise ValueError(
                    f"(g, g) = {square} but dual(g) . g = {product}: give the problem dual(g) or, if its inner product "
                    "is diagonal, weights; and owned, if some entries of x are copies"
                )
            self._checked = True
        return out

    def hessian_action(self, y: np.ndarray, p: np.ndarray) -> np.ndarray:
        """The global Hessian with respect to y times p."""
        x = self._once(y, "x", lambda x: x)
        action = np.array(self._action(x, self.direction(p)), dtype=float)
        return self._global_functional(x, action, "Hessian action")

    def call_back(self, y: np.ndarray) -> bool:
        """Whether the callback of any process stops."""
        return self.callback(self.point(y))

    def _global_functional(self, x: np.ndarray, v: np.ndarray, name: str) -> np.ndarray:
        """W^{-1/2} dual(v), global."""
        if self.layout.on_any(v.shape != x.shape):
            raise ValueError(f"{name} of shape {v.shape}: give one of the shape of x, {x.shape}")
        out = self.layout.gather(self._dual(v) / self.root)
        if not np.isfinite(out).all():
            raise NonFiniteError(f"the {name} is not finite", x)
        return out


class _Layout:
    """The entries of the global vector that this process has."""

    def __init__(self, problem: GuardedProblem, x0: np.ndarray, comm: MPI.Comm):
        self.comm = comm if comm is not None and comm.size > 1 else None
        owned = getattr(problem, "owned", None)
        self.owned = np.ones(x0.shape, dtype=bool) if owned is None else np.asarray(owned)
        if self.on_any(self.owned.shape != x0.shape or self.owned.dtype != bool):
            raise ValueError(f"owned of shape {self.owned.shape}: give a boolean array of the shape of x, {x0.shape}")
        count = int(self.owned.sum())
        self.counts = [count] if self.comm is None else self.comm.allgather(count)
        start = sum(self.counts[: 0 if self.comm is None else self.comm.rank])
        self.part = slice(start, start + count)
        self.update_copies = getattr(problem, "update_copies", None)
        self.whole = count == 0 and x0.size == sum(self.counts)
        if self.on_any(self.update_copies is None and count < x0.size and not self.whole):
            raise ValueError(
                f"{x0.size - count} of {x0.size} entries are not owned: give the problem update_copies(x), or the "
                "communicator over which x is distributed without copies"
            )

    def on_any(self, condition: bool) -> bool:
        """Whether a condition holds on any process, so that all of them refuse."""
        return bool(condition) if self.comm is None else any_rank(self.comm, condition)

    def gather(self, x: np.ndarray) -> np.ndarray:
        """The owned entries of all processes in rank order."""
        own = np.ascontiguousarray(x[self.owned])
        if self.comm is None:
            return own
        out = np.empty(sum(self.counts))
        self.comm.Allgatherv(own, (out, self.counts))
        return out

    def scatter(self, y: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """The local entries of a global vector, times `scale`."""
        x = np.zeros(self.owned.shape)
        if self.whole:
            x[:] = y
        else:
            x[self.owned] = y[self.part]
        x *= scale
        if self.update_copies is not None:
            self.update_copies(x)
        return x
