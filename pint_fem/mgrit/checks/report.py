"""What checks of a user's code are made of: the report, agreement between ranks, and calls that cannot escape."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pint_fem.collective import raise_collectively
from pint_fem.errors import FAILURES

__all__ = [
    "RANKS",
    "CheckReport",
    "Found",
    "Runner",
    "Space",
    "UserError",
    "bits",
    "lay",
    "marks",
    "ratio",
    "unwritten",
]

_MARK = np.uint64(0x7FF8_0000_DEAD_BEEF)
"""Bits of a NaN that no arithmetic makes: an entry that has them was not written, or made of one that was not."""

RANKS = "bits differ: results will depend on the number of ranks in the last digits"


class UserError(Exception):
    """A user's method raised, or gave what cannot be compared; the text names it."""


@dataclass
class CheckReport:
    """What :func:`pint_fem.mgrit.check` found; the same on every rank.

    Attributes
    ----------
    lines : list of str
        One a check, and a last one that counts them.
    failures : list of str
        The lines of the failed ones.
    """

    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    def raise_if_failed(self) -> None:
        """Raise.

        Raises
        ------
        ValueError
            With the lines of the failed checks, if there are any.
        """
        if self.failures:
            raise ValueError("\n".join([f"{len(self.failures)} checks failed:", *self.failures]))


@dataclass(frozen=True)
class Found:
    """What a check measured; NaN: there is no number."""

    value: float = math.nan
    note: str = ""


class Runner:
    """Run checks one after another, agree on their outcome over the ranks, and report them.

    Parameters
    ----------
    comm
        All ranks call the same checks in the same order.
    speaks
        Whether this rank prints.
    printer
        Takes a line.
    """

    def __init__(self, comm, *, speaks: bool, printer: Callable[[str], None]):
        self.comm, self.report = comm, CheckReport()
        self._print = printer if speaks else (lambda line: None)
        self.counts = dict.fromkeys(["passed", "failed", "reported", "not there", "not run"], 0)

    def say(self, where: str, name: str, status: str, text: str = "") -> None:
        """Report one line."""
        line = f"{where:10} {name:44} {status:9} {text}".rstrip()
        self.counts[status] += 1
        self.report.lines.append(line)
        if status == "failed":
            self.report.failures.append(line)
        self._print(line)

    def finish(self) -> CheckReport:
        """Count and return the report."""
        line = "check: " + ", ".join(f"{n} {status}" for status, n in self.counts.items() if n or status == "failed")
        self.report.lines.append(line)
        self._print(line)
        return self.report

    def __call__(
        self,
        where: str,
        name: str,
        measure: Callable[[], Found],
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        unit: str = "",
        after: bool = True,
    ) -> bool:
        """Measure and report.

        Parameters
        ----------
        where, name
            Of the check.
        measure
            Gives the number; whatever it raises is a failure of the check.
        at_most, at_least
            Limit of the number; without one it is only reported.
        unit
            The number is a count of these.
        after
            Whether what the check rests on is right; else it is not run. The same on every rank.

        Returns
        -------
        bool
            Whether it ran and passed, on all ranks.
        """
        if not after:
            self.say(where, name, "not run", "(see above)")
            return False
        leaves = None
        try:
            found, error = measure(), None
        except UserError as failure:
            found, error = Found(), str(failure)
        except FAILURES as failure:
            found, error = Found(), f"{type(failure).__name__}: {failure}"
            leaves = None if isinstance(failure, Exception) else failure
        raise_collectively(self.comm, leaves, name)
        reports = self.comm.allgather((found, error))
        error = next((e for _, e in reports if e), None)
        if error:
            self.say(where, name, "failed", error)
            return False
        values, note = [f.value for f, _ in reports], next((f.note for f, _ in reports if f.note), "")
        value = (np.min if at_least is not None else np.max)(values)  # NaN wins
        limit = at_least if at_least is not None else at_most
        ok = limit is None or bool(value >= limit if at_least is not None else value <= limit)
        if limit is None:
            text = "" if math.isnan(value) else f"{value:.1e}"
        elif unit:
            text = f"{value:.0f} {unit}"
        elif at_least is not None:
            text = f"{value:.2f} {'>=' if ok else '<'} {limit:g}"
        else:
            text = f"{value:.1e} {'<=' if ok else '>'} {limit:.0e}"
        status = ("passed" if math.isnan(value) else "reported") if limit is None else ("passed" if ok else "failed")
        self.say(where, name, status, "  ".join(filter(None, [text, note])))
        return ok


class Space:
    """Sums over the ranks that share a state, in rank order."""

    def __init__(self, comm):
        self.comm = comm

    def gather(self, item) -> list:
        """The ranks' items."""
        return [item] if self.comm.size == 1 else self.comm.allgather(item)

    def total(self, values):
        """Sum of numbers or arrays."""
        return values if self.comm.size == 1 else np.add.reduce(self.gather(values))

    def dots(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Inner products of the states of two blocks."""
        return self.total(np.array([np.ravel(x) @ np.ravel(y) for x, y in zip(a, b, strict=True)], dtype=float))

    def norms(self, a: np.ndarray) -> np.ndarray:
        """Norms of a block's states."""
        return np.sqrt(self.dots(a, a))

    def difference(self, a: np.ndarray, b: np.ndarray) -> float:
        """Largest norm of ``a - b`` over the largest of ``b``."""
        return ratio(self.norms(a - b).max(initial=0), self.norms(b).max(initial=0))

    def same(self, a: np.ndarray, b: np.ndarray) -> bool:
        """Whether all bits are equal."""
        return all(self.gather(np.array_equal(bits(a), bits(b))))


def ratio(gap: float, size: float) -> float:
    """A difference over what it is part of; infinite where there is no such number."""
    if gap == 0:
        return 0.0
    return float(gap / size) if size > 0 and np.isfinite(gap) else math.inf


def bits(array: np.ndarray) -> np.ndarray:
    """The bits of some numbers."""
    return np.ascontiguousarray(array).view(np.uint64)


def unwritten(shape) -> np.ndarray:
    """An array of marks, for a result to be written to."""
    return np.full(shape, _MARK).view(float)


def lay(values: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """A buffer of marks and a view of it with a stride over rows that holds a block."""
    buffer = unwritten((abs(stride) * len(values), *values.shape[1:]))
    view = buffer[::stride]
    bits_of_view = view.view(np.uint64)
    bits_of_view[...] = np.ascontiguousarray(values).view(np.uint64)
    return buffer, view


def marks(array: np.ndarray) -> np.ndarray:
    """Where an array has marks."""
    return bits(array) == _MARK
