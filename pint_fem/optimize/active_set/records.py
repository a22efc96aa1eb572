"""Records of active-set steps: those of the trust region, and how many components are in which set."""

from __future__ import annotations

from dataclasses import dataclass

from pint_fem.optimize.records import IterationRecord, header

__all__ = ["ActiveSetRecord", "active_set_header"]


@dataclass(frozen=True)
class ActiveSetRecord(IterationRecord):
    """One iteration; record 0 is the first guess. Numbers count components of all processes.

    The sets are those for which the step was computed, in record 0 those at the first guess.

    Attributes
    ----------
    at_lower, at_upper, at_zero, free : int
        Components that are held at a bound, or at zero for the sake of sparsity, and all others.
    changed : int
        Components whose set is another one at the iterate the iteration ends with; where none is, and conjugate
        gradients are exact, an iterate of the primal-dual method is the minimiser of a quadratic function.
    globalised : bool
        Whether the step is one of the trust region.
    """

    at_lower: int = 0
    at_upper: int = 0
    at_zero: int = 0
    free: int = 0
    changed: int = 0
    globalised: bool = False

    def __str__(self) -> str:
        """The monitor line: that of the trust region and the sizes of the sets."""
        counts = f"{self.at_lower:8d} {self.at_upper:8d} {self.at_zero:8d} {self.free:8d} {self.changed:8d}"
        return f"{super().__str__():<99} {counts}"


def active_set_header() -> str:
    """The line above the monitor's."""
    return f"{header():<99} {'lower':>8} {'upper':>8} {'zero':>8} {'free':>8} {'changed':>8}"
