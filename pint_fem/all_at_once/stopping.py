"""The stopping criterion of an iteration on all time steps, and the result that a solve returns."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pint_fem.all_at_once.options import SolverOptions
from pint_fem.errors import SolverFailure

__all__ = ["DivergedError", "SolveResult", "SolverFailure", "Stopping"]

RECENT = 5
"""Cycles whose mean factor decides about stagnation."""


class DivergedError(SolverFailure):
    """The residual grew or stagnated, or the tolerance was not reached in ``max_it`` cycles."""


@dataclass(repr=False)
class SolveResult:
    """The outcome of a solve, the same on every rank.

    Attributes
    ----------
    converged : bool
    reason : str
        ``"rtol"``, ``"atol"``, ``"its"`` (a fixed number of cycles), ``"exact"`` (sequential), ``"serial"`` (cycles
        failed, stepped sequentially instead), ``"max_it"``, ``"diverged"`` or ``"stagnated"``.
    residuals : list of float
        Residual norm before each correction, the last one included. Empty where none was computed: with the option
        ``residual="none"``, or where cycles failed before the first and the sweep was stepped sequentially.
    cycles : int
        Coarse-grid corrections done.
    scale : float
        Norm of the trajectory at the C-points when the last residual was computed.
    message : str
        Why it did not converge by cycles.
    members : list of SolveResult
        For a batch the result of each right-hand side; ``residuals`` and ``scale`` of the batch are those of the member
        that is furthest from its tolerance, so that no other one has a larger relative residual. Empty where no
        residual was computed, and without a batch.
    """

    converged: bool = False
    reason: str = ""
    residuals: list[float] = field(default_factory=list)
    cycles: int = 0
    scale: float = math.nan
    message: str = ""
    members: list[SolveResult] = field(default_factory=list)

    def __str__(self) -> str:
        outcome = "Converged" if self.converged else "Not converged"
        cycles = f"{self.cycles} cycle" + "s" * (self.cycles != 1)
        text = f"{outcome} after {cycles} ({self.reason or 'running'})"
        if self.residuals:
            text += f": residual {self.residuals[-1]:.3e}, relative {self.relative_residual:.3e}"
        return text + (f"; {self.message}." if self.message else ".")

    def __repr__(self) -> str:
        text = str(self)
        return f"<SolveResult: {text[0].lower()}{text[1:-1]}>"

    def monitor_line(self) -> str:
        """The present cycle, its residual and the last contraction, as the monitor prints them."""
        r = self.residuals
        ratio = f"  factor {_digits(r[-1] / r[-2])}" if len(r) > 1 and r[-2] > 0 else ""
        relative = f" relative {r[-1] / self.scale:.3e}" if self.scale > 0 else ""
        return f"{self.cycles:3d} residual {r[-1]:.6e}{relative}{ratio}" if r else f"{self.cycles:3d}"

    @property
    def relative_residual(self) -> float:
        """The last residual relative to the trajectory; 0 for sequential stepping, NaN where none was computed."""
        if self.reason in ("exact", "serial"):
            return 0.0
        if not self.residuals:
            return math.nan
        if self.residuals[-1] == 0:
            return 0.0
        return self.residuals[-1] / self.scale if self.scale > 0 else math.inf

    @property
    def factor(self) -> float:
        """Geometric mean of the residual's reduction per cycle; NaN without two positive residuals."""
        return self._mean_factor(len(self.residuals))

    @property
    def last_factor(self) -> float:
        """Geometric mean over the last cycles (up to five): the present rate of convergence."""
        return self._mean_factor(RECENT)

    def _mean_factor(self, cycles: int) -> float:
        r = [x for x in self.residuals if x > 0][-cycles - 1 :]
        return (r[-1] / r[0]) ** (1 / (len(r) - 1)) if len(r) > 1 else math.nan


def _digits(factor: float) -> str:
    """Three decimals, or for small factors two digits."""
    return f"{factor:.3f}" if factor >= 5e-4 or factor == 0 else f"{factor:.1e}"


class Stopping:
    """The stopping criterion.

    Parameters
    ----------
    options
        Tolerances.
    exact_after
        Cycles after which the iteration is exact whatever the propagators, or infinity.
    """

    def __init__(self, options: SolverOptions, exact_after: float):
        self.options, self.exact_after = options, exact_after
        self._rtol = options.rtol
        #: Cycles to take whatever the residual, or ``None``.
        self.cycles: int | None = None

    def set(self, *, rtol: float | None, cycles: int | None) -> None:
        """Set the tolerance or the number of cycles of the next solve; ``None``: those of the options.

        Raises
        ------
        ValueError
            On both, or a value out of range.
        """
        if rtol is not None and cycles is not None:
            raise ValueError("give rtol or cycles for a solve, not both")
        if rtol is not None and not 0 <= rtol < math.inf:
            raise ValueError(f"rtol = {rtol!r}: give a finite number that is not negative")
        if cycles is not None and (not hasattr(cycles, "__index__") or cycles < 0):
            raise ValueError(f"cycles = {cycles!r}: give a whole number that is not negative")
        self._rtol, self.cycles = self.options.rtol if rtol is None else rtol, cycles

    def __call__(self, result: SolveResult) -> bool:
        """Set ``reason``, ``converged`` and ``message`` of the result; return whether to stop.

        A batch has converged when each of its members has, and has failed as soon as one of them has.
        """
        return self._of_members(result) if result.members else self._of_one(result)

    def _of_members(self, result: SolveResult) -> bool:
        """The criterion for each member of a batch by itself; the batch takes the residuals of the worst one."""
        members = result.members
        for number, member in enumerate(members):
            member.cycles, member.converged, member.reason, member.message = result.cycles, False, "", ""
            self._of_one(member)
            if member.message:
                member.message = f"right-hand side {number} of {len(members)}: {member.message}"
        failed = [member for member in members if member.reason and not member.converged]
        worst = max(failed or members, key=lambda member: (not member.converged, member.relative_residual))
        result.residuals, result.scale = list(worst.residuals), worst.scale
        if not failed and not worst.converged:
            return False
        result.converged, result.reason, result.message = worst.converged, worst.reason, worst.message
        return True

    def _of_one(self, result: SolveResult) -> bool:
        """The criterion for one right-hand side."""
        options, r, norm = self.options, result.residuals, result.residuals[-1]
        if self.cycles is not None:
            result.converged = result.cycles >= self.cycles
            result.reason = "its" if result.converged else ""
            return result.converged
        relative = self._rtol * (result.scale if options.rtol_of == "trajectory" else r[0])
        if norm <= options.atol or norm <= relative:
            result.converged, result.reason = True, "atol" if norm <= options.atol else "rtol"
            return True
        if norm > options.dtol * r[0]:
            result.reason = "diverged"
            result.message = f"the residual grew by {norm / r[0]:.2g} in {result.cycles} cycles"
        elif self._stagnates(result, max(options.atol, relative)):
            result.reason = "stagnated"
            result.message = (
                f"the residual changes by a factor {result.last_factor:.3f} a cycle only: the tolerance is out of "
                f"reach in max_it = {options.max_it} cycles"
            )
        elif result.cycles >= options.max_it and options.is_fixed:
            result.converged, result.reason = True, "its"
        elif result.cycles >= options.max_it:
            result.reason = "max_it"
            result.message = f"tolerance not reached in {result.cycles} cycles, last factor {result.last_factor:.3f}"
        return bool(result.reason)

    def _stagnates(self, result: SolveResult, tolerance: float) -> bool:
        options, left = self.options, self.options.max_it - result.cycles
        if options.stagnation is None or options.is_fixed or len(result.residuals) <= RECENT or left < 1:
            return False
        if self.exact_after <= options.max_it or result.last_factor <= options.stagnation:
            return False
        if result.last_factor >= 1 or tolerance == 0:
            return True
        return math.log(tolerance / result.residuals[-1]) / math.log(result.last_factor) > left
