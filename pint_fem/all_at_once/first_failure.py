"""The first failure on a rank, and checks of values on a device that are decided when values are read anyway.

A check of a numpy array is decided at once. One of a tensor would make the host wait for the device; its numbers stay
there until the next norm is read, and all of them come with it in one copy. Failures are then recorded with the cycle
and the call in which the checks were made, in their order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pint_fem.all_at_once.arrays import Array, no_values, to_host
from pint_fem.errors import is_numerical, release

__all__ = ["FirstFailure"]

_MOST_CHECKS = 1024
"""Checks that are kept; more are decided without waiting for a norm."""


class FirstFailure:
    """The first failure on a rank, on any level.

    Attributes
    ----------
    text : str or None
        Where and what.
    error : BaseException or None
        What was raised, if anything was.
    cycle : int
        The cycle that it was in.
    now : int
        The present cycle.
    call : int
        Number of the propagator's call: ranks that share states in space make the same calls, so the first of them
        has the cause.
    calls : int
        The present one.
    checks : list
        Tensors that have not been read, what decides on their values, and the cycle and call that they are from.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Remove the failure, and the checks that have not been decided."""
        self.checks: list[tuple[tuple[Array, ...], Callable[..., None], tuple[int, int]]] = []
        self.text: str | None = None
        self.error: BaseException | None = None
        self.cycle = self.now = self.call = self.calls = 0

    def note(self, text: str, error: BaseException | None = None) -> None:
        """Record a failure, unless there is an earlier one; a mistake of the program replaces a numerical failure."""
        self.read()
        mistake = error is not None and not is_numerical(error)
        if self.text is None or (mistake and (self.error is None or is_numerical(self.error))):
            self.text, self.error, self.cycle, self.call = text, error, self.now, self.calls
            if error is not None and not mistake:
                release(error)  # it is stored while the solve continues

    def decide_later(self, decide: Callable[..., None], *values: Array) -> None:
        """Call ``decide`` with the values of tensors, as arrays on the host, when the next ones are read."""
        if no_values(values[0]):
            return
        self.checks.append((values, decide, (self.now, self.calls)))
        if len(self.checks) > _MOST_CHECKS:
            self.read()

    def read(self, *arrays: Array) -> list[np.ndarray]:
        """Values of arrays in float64 on the host; with those of all checks, which are decided, in one copy."""
        if not self.checks:
            return to_host(*arrays)
        checks, self.checks = self.checks, []
        host = iter(to_host(*arrays, *(one for values, *_ in checks for one in values)))
        out, present = [next(host) for _ in arrays], (self.now, self.calls)
        for values, decide, when in checks:
            self.now, self.calls = when
            decide(*(next(host) for _ in values))
        self.now, self.calls = present
        return out
