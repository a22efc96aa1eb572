"""Records of the iterations of a minimisation, their lines on a monitor, and the results."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

__all__ = ["UNLIMITED", "CGStop", "IterationRecord", "ResultSummary", "StopReason", "TrustRegionResult", "header"]

UNLIMITED = 1e99
"""A first radius that bounds no step; its square is finite. The monitor prints it as infinite."""

# Columns of a line without accuracies: the longest reason why CG stopped fits in.
_WIDTH = 99


class CGStop(str, Enum):
    """Why the conjugate gradient path of one iteration ended; compares equal to its text."""

    NONE = ""
    RESIDUAL = "residual"
    BOUNDARY = "boundary"
    NEGATIVE_CURVATURE = "negative curvature"
    MAX_IT = "maximum iterations"
    INEXACT = "inexact products"


class StopReason(str, Enum):
    """Why a minimisation ended; compares equal to its text.

    "round-off" and "radius too small" far from a small gradient point to a derivative that is not that of J, or to a
    J less accurate than `value_rtol` or its own error estimate. "accuracy not reached": the estimated error of the
    gradient is more than half its norm, although a smaller one was requested.
    """

    GRADIENT = "gradient tolerance"
    MAX_IT = "maximum iterations"
    RADIUS = "radius too small"
    ROUND_OFF = "round-off"
    ACCURACY = "accuracy not reached"
    CALLBACK = "stopped by callback"
    CONSTRAINTS = "constraints not met"
    BREAKDOWN = "composite steps broke down"


def header(inexact: bool = False) -> str:
    """The line above the monitor's, with the columns of the accuracies on request."""
    line = f"{'it':>4} {'J':>16} {'|g|':>10} {'radius':>10} {'|step|':>10} {'ratio':>9} {'':>8} {'CG':>4}  CG stop"
    if inexact:
        line = f"{line:<{_WIDTH}}{'J tol':>9} {'J error':>8} {'g tol':>8} {'g error':>8} {'H rtol':>8}"
    return line


@dataclass(frozen=True)
class IterationRecord:
    """One iteration; record 0 is the first guess.

    Attributes
    ----------
    iteration : int
    value, gradient_norm : float
        J and the norm of its gradient at the iterate the iteration ends with (unchanged by a rejected step, unless an
        inexact problem has computed more accurate ones).
    radius, step_norm : float
        Radius the step was computed with and norm of the step, accepted or not; nan and 0 in record 0.
    ratio : float
        Actual over predicted reduction; 1 below the accuracy of J, nan where J was not finite and in record 0.
    accepted : bool
    cg_iterations : int
        Conjugate gradient directions the step is made of. After a rejected step they are not computed again.
    cg_stop : CGStop
    value_tolerance, value_error : float
        Absolute error last allowed for `value`, and its estimate; 0 where J is exact.
    gradient_tolerance, gradient_error : float
        The same for the gradient, in the problem's norm.
    hessian_rtol : float
        Smallest relative error allowed for the Hessian products of the step; 0 where they are exact.
    """

    iteration: int
    value: float
    gradient_norm: float
    radius: float
    step_norm: float
    ratio: float
    accepted: bool
    cg_iterations: int
    cg_stop: CGStop
    value_tolerance: float = 0.0
    value_error: float = 0.0
    gradient_tolerance: float = 0.0
    gradient_error: float = 0.0
    hessian_rtol: float = 0.0

    def __str__(self) -> str:
        """The monitor line; the accuracies follow where anything is inexact."""
        radius = math.inf if self.radius >= UNLIMITED else self.radius
        line = (
            f"{self.iteration:4d} {self.value:16.9e} {self.gradient_norm:10.3e} {radius:10.3e} "
            f"{self.step_norm:10.3e} {self.ratio:9.2e} {'' if self.accepted else 'rejected':>8} "
            f"{self.cg_iterations:4d}  {self.cg_stop.value}"
        ).rstrip()
        if self.value_tolerance or self.gradient_tolerance or self.hessian_rtol:
            line = (
                f"{line:<{_WIDTH}}{self.value_tolerance:9.1e} {self.value_error:8.1e} "
                f"{self.gradient_tolerance:8.1e} {self.gradient_error:8.1e} {self.hessian_rtol:8.1e}"
            )
        return line


class ResultSummary:
    """A summary of a result as a paragraph, a short representation and a table for notebooks.

    A result has ``success``, ``message`` and ``nit``, and names its other entries in :meth:`_quantities`.
    """

    if TYPE_CHECKING:  # entries or properties of the results

        @property
        def success(self) -> bool:
            """Whether the minimiser exited successfully."""

        @property
        def message(self) -> str:
            """Why the run ended."""

        @property
        def nit(self) -> int:
            """Number of iterations."""

    def _quantities(self) -> dict[str, float]:
        """Numbers of the summary by their names: J, the norm of the gradient, counts of evaluations."""
        raise NotImplementedError

    def _entries(self) -> dict[str, object]:
        """All entries by name, those that the class is constructed with."""
        return vars(self)

    def __copy__(self) -> ResultSummary:
        return type(self)(**self._entries())

    def __reduce__(self) -> tuple:
        """Pickle and deep-copy without `control`: Firedrake's functions cannot be pickled, and `x` has their values."""
        return _with_entries, (type(self), {**self._entries(), "control": None})

    def _outcome(self) -> str:
        steps = "1 iteration" if self.nit == 1 else f"{self.nit} iterations"
        return f"{'converged' if self.success else 'not converged'} after {steps} ({self.message})"

    def __str__(self) -> str:
        """One paragraph: the outcome, J, the norm of its gradient and the numbers of evaluations."""
        return f"Minimisation {self._outcome()}: {', '.join(_formatted(self._quantities()))}."

    def __repr__(self) -> str:
        """The class, the outcome and J."""
        return f"<{type(self).__name__}: {self._outcome()}, {_formatted(self._quantities())[0]}>"

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        entries = {"success": self.success, "message": self.message, "iterations": self.nit, **self._quantities()}
        rows = (f"<tr><th>{html.escape(name)}</th><td>{_text(value)}</td></tr>" for name, value in entries.items())
        return f"<table>{''.join(rows)}</table>"


def _with_entries(kind: type, entries: dict[str, object]) -> object:
    return kind(**entries)


def _text(value: object) -> str:
    return f"{value:.9g}" if isinstance(value, float) else html.escape(str(value))


def _formatted(quantities: dict[str, float]) -> list[str]:
    """Floats as ``name = value``, counts as ``count name``."""
    return [f"{name} = {v:.9g}" if isinstance(v, float) else f"{v} {name}" for name, v in quantities.items()]


@dataclass(frozen=True, repr=False)
class ReasonedResult(ResultSummary):
    """What all methods of this package return, also in the terms of scipy's results.

    Attributes
    ----------
    x : ndarray
        The last accepted iterate.
    value, gradient_norm : float
        J and the norm of its gradient at `x`.
    iterations, nit : int
        Number of iterations.
    converged, success : bool
        Whether `reason` is the gradient tolerance.
    reason : StopReason
        Why the run ended; its text is `message`.
    history : list
        Records of the first guess and every iteration: ``iterations + 1`` records.
    control : Function, EnsembleFunction or list of these, or None
        The controls found, one or a list of several, where a functional's method minimised; None in a pickled or deep
        copy.
    choice : str
        The method and why it was chosen, where a functional's ``minimize`` chose it.
    preconditioner : str
        The report of a preconditioner that a functional's method computed by sweeps.
    """

    x: np.ndarray
    value: float
    gradient_norm: float
    iterations: int
    converged: bool
    reason: StopReason
    history: list
    control: object = field(default=None, kw_only=True)
    choice: str = field(default="", kw_only=True)
    preconditioner: str = field(default="", kw_only=True)

    @property
    def success(self) -> bool:
        """Whether the minimiser exited successfully: `converged`."""
        return bool(self.converged)

    @property
    def nit(self) -> int:
        """Number of iterations: `iterations`."""
        return self.iterations

    @property
    def message(self) -> str:
        """Why the minimisation ended, the text of `reason`."""
        return self.reason.value


@dataclass(frozen=True, repr=False)
class TrustRegionResult(ReasonedResult):
    """The last iterate of a trust-region minimisation, and the history of the run.

    No evaluated point has a lower J than `x` by more than the accuracy of J; iterations are steps tried, accepted or
    not. Other attributes are those of :class:`ReasonedResult`, its records :class:`IterationRecord`.

    Attributes
    ----------
    value_calls, gradient_calls, hessian_calls : int
        ``1 + iterations`` values; ``1 + accepted steps`` gradients, and one more if `reason` is round-off; the
        conjugate gradient iterations of every step not preceded by a rejected one. An inexact problem is evaluated
        more often. A continued run counts what was saved and what it did itself: directions computed again after a
        rejected step count twice.
    value_error, gradient_error : float
        Estimated errors of `value` and `gradient_norm`; 0 where they are exact.
    """

    value_calls: int
    gradient_calls: int
    hessian_calls: int
    value_error: float = 0.0
    gradient_error: float = 0.0

    def _quantities(self) -> dict[str, float]:
        return {
            "J": float(self.value),
            "|g|": float(self.gradient_norm),
            "values": self.value_calls,
            "gradients": self.gradient_calls,
            "Hessian products": self.hessian_calls,
        }
