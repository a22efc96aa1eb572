"""Maxwell source inversions beside a serial pyadjoint tape, on one core: ``python -m tests.benchmarks.maxwell``.

The lossy box and the cavity of :mod:`problems.maxwell_source` at their true current, 64 readings of the field in time.
The tape solves for (E, B) in each stage with UMFPACK, factored once. Ours: sequential stepping, and the time-parallel
solver of the regime on one rank.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from firedrake import COMM_SELF, Function
from rich.console import Console

from pint_fem.kernels.arrays import get
from pint_fem.spacetime import SpaceTime
from problems.maxwell_source import maxwell_source
from problems.serial_maxwell import serial_maxwell_source
from tests.benchmarks.derivatives import Derivatives, difference, on_tape
from tests.benchmarks.rows import Row, row, table

__all__ = ["COARSENING", "SOLVERS", "maxwell_rows"]

STEPS = 64
TARGET = 10
COARSENING = {"levels": 2, "coarsening": 4}
"""Of the demo."""
SOLVERS = {
    "lossy": {"serial": {"time_solver": "serial"}, "MGRIT to 1e-9": {"mgrit": {"rtol": 1e-9, **COARSENING}}},
    "cavity": {
        "serial": {"time_solver": "serial"},
        "ParaDiag to 1e-9": {"time_solver": "paradiag", "paradiag": {"rtol": 1e-9}},
    },
}


def maxwell_rows(regime: str, steps: int, say: Callable[[str], None], *, repeats: int = 2) -> list[Row]:
    """The tape over ours, for one regime."""
    pose = lambda parameters: maxwell_source(
        SpaceTime("1x1", comm=COMM_SELF), regime=regime, steps=steps, solver_parameters=parameters
    )
    posed = pose(SOLVERS[regime]["serial"])
    z = get(posed.true_current)
    dz = get(Function(posed.true_current.function_space()).assign(1.0))
    tape = serial_maxwell_source(regime=regime, steps=steps)
    say(f"{regime}: recorded in {tape.seconds:.1f} s")
    theirs = on_tape(tape.rf, z, dz, repeats=repeats, hessians=2, say=lambda text: say(f"{regime}, tape: {text}"))
    out = []
    for solver, parameters in SOLVERS[regime].items():
        ours = Derivatives(pose(parameters).rf, z, dz).measure(2 * repeats)
        for what, target in (("value", None), ("gradient", TARGET), ("hessian", None)):
            note = f"differs by {difference(ours.values[what], theirs.values[what]):.0e}"
            out.append(row("m", f"Maxwell, {regime}, {steps} steps: pyadjoint / {solver}: {what}", ours.seconds[what],
                           theirs.seconds[what], steps, target, False, note))  # fmt: skip
    return out


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.maxwell", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--regime", nargs="+", default=list(SOLVERS), choices=list(SOLVERS))
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 150)
    say = lambda text: console.print(f"  {text}")
    console.print(table([r for regime in args.regime for r in maxwell_rows(regime, args.steps, say)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
