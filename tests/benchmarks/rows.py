"""A ratio measured side by side, how it is timed and shown: what the benchmarks share."""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mpi4py import MPI
from rich.table import Table

__all__ = ["Row", "Stopwatch", "on_ranks", "row", "table", "timed", "write_rows"]


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


def timed(*actions: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Median seconds of each action by a clock; they take turns."""
    seconds = [[] for _ in actions]
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for action, row in zip(actions, seconds, strict=True):
                start = clock()
                action()
                row.append(clock() - start)
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


def on_ranks(module: str, ranks: int, repeats: int, *more: str) -> list[Row]:
    """Run a module that writes its rows, on ``ranks`` processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", module, "--out", out, "--repeats", repeats, *more]
        environment = os.environ | {"OMPI_MCA_mpi_yield_when_idle": "1"}
        environment = {k: v for k, v in environment.items() if not k.startswith(("OMPI_COMM_", "PMIX_", "PMI_"))}
        subprocess.run(["mpiexec", "-n", str(ranks), *map(str, command)], check=True, env=environment)
        return [Row(**r) for r in json.loads(out.read_text())]


def write_rows(module: str, rows: Callable[[int], list[dict]]) -> int:
    """The program of such a module: measure on the ranks given and write JSON."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("--out", type=Path, help="JSON file (default: print)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    result = rows(args.repeats)
    if MPI.COMM_WORLD.rank == 0:
        text = json.dumps(result, indent=1)
        args.out.write_text(text) if args.out else print(text)
    return 0
