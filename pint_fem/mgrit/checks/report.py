"""The report of checks of a user's code, agreement on their outcome between ranks, and comparisons of blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from mpi4py import MPI

from pint_fem.collective import collectively, raise_collectively
from pint_fem.errors import FAILURES
from pint_fem.logs import logger

__all__ = ["RANKS", "CheckReport", "Found", "Runner", "Space", "UserError", "patterns", "raise_first", "ratio"]

RANKS = "not bitwise identical: results will depend on the number of ranks in the last digits"


class UserError(Exception):
    """A user's method raised, or gave what cannot be compared; the text names it."""


@dataclass
class CheckReport:
    """The outcome of :func:`pint_fem.mgrit.check`, the same on every rank.

    Attributes
    ----------
    lines : list of str
        One per check, and a last one that counts them.
    failures : list of str
        The lines of the failed ones.
    """

    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(self.lines)

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    def raise_if_failed(self) -> None:
        """Raise ``ValueError`` with the lines of the failed checks, if there are any."""
        if self.failures:
            raise ValueError("\n".join([f"{len(self.failures)} checks failed:", *self.failures]))


@dataclass(frozen=True)
class Found:
    """The result of a measurement and a note; NaN: there is no number."""

    value: float = math.nan
    note: str = ""


class Runner:
    """Runs checks one after another, agrees on their outcome over the ranks, and reports them.

    Parameters
    ----------
    comm, space_comm
        Communicators of the ranks in time and in space; all of them call the same checks in the same order. The first
        rank of both prints.
    """

    def __init__(self, comm: MPI.Comm, space_comm: MPI.Comm):
        self.comm, self._space_comm, self.report = comm, space_comm, CheckReport()
        self.counts = dict.fromkeys(["passed", "failed", "reported", "not there", "not run"], 0)

    def _print(self, line: str) -> None:
        log = logger.info if self.comm.rank == 0 and self._space_comm.rank == 0 else (lambda line: None)
        collectively(self._space_comm, "", collectively, self.comm, "logging", log, line)

    def add(self, where: str, name: str, status: str, text: str = "") -> None:
        """Add a line to the report and print it (collective)."""
        line = f"{where:10} {name:44} {status:9} {text}".rstrip()
        self.counts[status] += 1
        self.report.lines.append(line)
        if status == "failed":
            self.report.failures.append(line)
        self._print(line)

    def finish(self) -> CheckReport:
        """Count the lines and return the report."""
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
        """Measure and report (collective).

        Parameters
        ----------
        where, name
            Place and name of the check.
        measure
            Returns the number; whatever it raises is a failure of the check.
        at_most, at_least
            Limit of the number; without one it is only reported.
        unit
            What the number counts, if it is a count.
        after
            Whether the checks that this one rests on have passed; otherwise it is not run. The same on every rank.

        Returns
        -------
        bool
            Whether it ran and passed, on all ranks.
        """
        if not after:
            self.add(where, name, "not run", "(see above)")
            return False
        leaves, found, error = None, Found(), None
        try:
            found = measure()
        except UserError as failure:
            error = str(failure)
        except FAILURES as failure:
            error = f"{type(failure).__name__}: {failure}"
            leaves = None if isinstance(failure, Exception) else failure
        raise_collectively(self.comm, leaves, name)
        reports = self.comm.allgather((found, error))
        error = next((e for _, e in reports if e), None)
        if error:
            self.add(where, name, "failed", error)
            return False
        values, note = [f.value for f, _ in reports], next((f.note for f, _ in reports if f.note), "")
        lower = at_least is not None
        limit = at_least if lower else at_most
        value = (np.min if lower else np.max)(values)  # NaN if any is
        if limit is None:
            nothing = math.isnan(value)
            text, status = ("", "passed") if nothing else (f"{value:.1e}", "reported")
            ok = True
        else:
            ok = bool(value >= limit if lower else value <= limit)
            status = "passed" if ok else "failed"
            if unit:
                text = f"{value:.0f} {unit}"
            elif lower:
                text = f"{value:.2f} {'>=' if ok else '<'} {limit:g}"
            else:
                text = f"{value:.1e} {'<=' if ok else '>'} {limit:.0e}"
        self.add(where, name, status, "  ".join(filter(None, [text, note])))
        return ok


class Space:
    """Sums over the ranks that share a state, in rank order, and comparisons of blocks by them (collective)."""

    def __init__(self, comm: MPI.Comm):
        self.comm = comm

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sum of numbers or arrays over the ranks."""
        return values if self.comm.size == 1 else np.add.reduce(self.comm.allgather(values))

    def dots(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Inner products of the states of two blocks, ``(k,)``."""
        return self.total(np.array([np.ravel(x) @ np.ravel(y) for x, y in zip(a, b, strict=True)], dtype=float))

    def norms(self, a: np.ndarray) -> np.ndarray:
        """Norms of a block's states, ``(k,)``."""
        return np.sqrt(self.dots(a, a))

    def difference(self, a: np.ndarray, b: np.ndarray) -> float:
        """Largest norm of ``a - b`` over the largest of ``b``."""
        return ratio(self.norms(a - b).max(initial=0), self.norms(b).max(initial=0))

    def same(self, a: np.ndarray, b: np.ndarray) -> bool:
        """Whether two blocks are bitwise identical on all ranks."""
        return all(self.comm.allgather(np.array_equal(patterns(a), patterns(b))))

    def compare(self, block: np.ndarray, *others: np.ndarray) -> Found:
        """Largest difference of other blocks from one, with a note where they are not bitwise identical."""
        worst = max(self.difference(other, block) for other in others)
        return Found(worst, "" if all([self.same(other, block) for other in others]) else RANKS)

    def linearity(self, apply: Callable[[np.ndarray], np.ndarray], a: np.ndarray, b: np.ndarray) -> float:
        """``apply(2 a - 3 b)`` against ``2 apply(a) - 3 apply(b)``, relative."""
        A, B, both = (apply(x) for x in (a, b, 2 * a - 3 * b))
        size = 2 * self.norms(A).max() + 3 * self.norms(B).max()
        return ratio(self.norms(both - (2 * A - 3 * B)).max(), size)

    def transposition(self, a: np.ndarray, Ta: np.ndarray, b: np.ndarray, Tb: np.ndarray) -> float:
        """``<T a, b>`` against ``<a, T^T b>`` for the states of blocks, relative."""
        gap = np.abs(self.dots(Ta, b) - self.dots(a, Tb))
        size = self.norms(Ta) * self.norms(b) + self.norms(a) * self.norms(Tb)
        return max(map(ratio, gap, size))


def raise_first(comm: MPI.Comm, error: str | None) -> None:
    """Raise ``UserError`` on all ranks of a communicator if one has an error: they all continue or none does."""
    error = next((e for e in comm.allgather(error) if e), None)
    if error:
        raise UserError(error)


def ratio(gap: float, size: float) -> float:
    """A difference over the size of its parts; infinite where there is no such number."""
    if gap == 0:
        return 0.0
    return float(gap / size) if size > 0 and np.isfinite(gap) else math.inf


def patterns(array: np.ndarray) -> np.ndarray:
    """Floating-point numbers as whole numbers of the same representation, which distinguish zeros and NaNs."""
    return np.ascontiguousarray(array).view(np.uint64)
