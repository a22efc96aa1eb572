"""A ratio measured side by side, how it is timed and shown: what the benchmarks share."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.table import Table

__all__ = ["Row", "Stopwatch", "row", "table", "timed"]


@dataclass
class Row:
    """One ratio.

    Attributes
    ----------
    section, what : str
    ours, theirs : float
        Milliseconds a step (of the fine time grid).
    ratio : float
    target : float or None
    at_most : bool
        Whether the target is an upper bound.
    note : str
    """

    section: str
    what: str
    ours: float
    theirs: float
    ratio: float
    target: float | None
    at_most: bool
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the ratio meets the target; ``None`` without one."""
        if self.target is None:
            return None
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target


def timed(*actions: Callable[[], object], repeats: int) -> list[float]:
    """Median seconds of each action; they take turns."""
    seconds = [[] for _ in actions]
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for action, row in zip(actions, seconds, strict=True):
                start = time.perf_counter()
                action()
                row.append(time.perf_counter() - start)
    finally:
        gc.enable()
    return [statistics.median(row) for row in seconds]


def row(section, what, ours, theirs, steps, target, at_most, note="") -> Row:
    """A row of ours over theirs (``at_most``), or theirs over ours; times are in seconds for all steps."""
    ratio = ours / theirs if at_most else theirs / ours
    return Row(section, what, 1e3 * ours / steps, 1e3 * theirs / steps, ratio, target, at_most, note)


class Stopwatch:
    """Seconds spent in the functions it wraps."""

    def __init__(self):
        self.seconds = 0.0

    def wrap(self, function: Callable) -> Callable:
        """The function, timed."""

        def wrapped(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return wrapped


def table(rows: list[Row]) -> Table:
    """What is printed."""
    out = Table(title="ratios; ms are per time step", expand=False)
    for name in ("", "what", "ours ms", "other ms", "ratio", "target", "met", ""):
        out.add_column(
            name, justify="right" if name in ("ours ms", "other ms", "ratio", "target") else "left", overflow="fold"
        )
    for r in rows:
        target = "" if r.target is None else f"{'<=' if r.at_most else '>='} {r.target:g}"
        met = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[r.met]
        out.add_row(r.section, r.what, f"{r.ours:.3g}", f"{r.theirs:.3g}", f"{r.ratio:.3g}", target, met, r.note)
    return out
