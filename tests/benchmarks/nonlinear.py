"""Nonlinear evolutions beside a serial pyadjoint tape, on one core: ``python -m tests.benchmarks.nonlinear``.

Conductivity 1 + u^2 and viscous Burgers of :mod:`tests.nonlinear`, P1 on a 64 x 64 square, backward Euler and SDIRK2.
The tape has one ``NonlinearVariationalSolver`` a stage, made once and replayed with the fastest of the direct solvers
and Newton tolerances tried (see ``TAPE``). Ours: sequential stepping, MGRIT to two tolerances, and the tape propagator
on a few steps. All are timed at new controls, one after the other, with the factors of the last one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from firedrake import Function
from rich.console import Console

from pint_fem.kernels.arrays import get
from pint_fem.propagators.tape import TapePropagator
from tests.benchmarks.derivatives import MORE, Derivatives, difference, on_tape
from tests.benchmarks.rows import Row, row, table
from tests.nonlinear import NEWTON, PROBLEMS, functional, tape_functional

__all__ = ["main", "nonlinear_rows"]

SIZE, TAPED_STEPS = 64, 4
TABLEAUX = ("BackwardEuler", "SDIRK2")
TARGETS = {"gradient": 3, "hessian": 20}
TAPE = NEWTON
"""Newton and direct solver of the tape."""
SOLVERS = {
    "serial": {"time_solver": "serial"},
    "MGRIT to 1e-10": {"mgrit": {"rtol": 1e-10}},
    "MGRIT to 1e-6": {"mgrit": {"rtol": 1e-6}},
}


def nonlinear_rows(
    name: str, tableau: str, steps: int, say: Callable[[str], None], *, size: int = SIZE, repeats: int = 2
) -> list[Row]:
    """The tape over ours, for one problem and integrator."""

    def pose(count=steps):
        posed = PROBLEMS[name](size, count, tableau=tableau, degree=1, final_time=0.2 * count / steps)
        V = posed.evolution.control.function_space()
        return posed, *(get(Function(V).interpolate(f)) for f in (posed.control, posed.direction))

    where = f"{name}, {tableau}"
    posed, z, dz = pose()
    tape = on_tape(
        tape_functional(posed, TAPE), z, dz, repeats=repeats, hessians=2, say=lambda text: say(f"{where}, tape: {text}")
    )
    out = []
    for solver, parameters in SOLVERS.items():
        posed, z, dz = pose()
        ours = Derivatives(functional(posed, **parameters), z, dz).measure(repeats, more=True)
        for what, target in (("value", None), ("gradient", TARGETS["gradient"]), ("hessian", TARGETS["hessian"])):
            note = f"differs by {difference(ours.values[what], tape.values[what]):.0e}"
            out.append(
                row("f", f"{where}: pyadjoint / {solver}: {what}", ours.seconds[what], tape.seconds[what], steps,
                    target if solver == "serial" else None, False, note)
            )  # fmt: skip
        # conjugate gradients take several at a control, which pay for its factors
        out.append(
            row("f", f"{where}: pyadjoint / {solver}: hessian, mean of {MORE} more", ours.seconds["more"],
                tape.seconds["hessian"], steps, TARGETS["hessian"] if solver == "serial" else None, False)
        )  # fmt: skip
        say(f"{where}, {solver}: " + ", ".join(f"{1e3 * s / steps:.2f}" for s in ours.seconds.values()) + " ms a step")
    posed, z, dz = pose(TAPED_STEPS)
    slow = Derivatives(functional(posed, propagator=TapePropagator, time_solver="serial"), z, dz).measure(1)
    for what, seconds in slow.seconds.items():
        theirs = tape.seconds[what] / steps * TAPED_STEPS
        out.append(row("f", f"{where}: pyadjoint / tape propagator, serial: {what}", seconds, theirs, TAPED_STEPS, None,
                       False))  # fmt: skip
    return out


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.nonlinear", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--size", type=int, default=SIZE, help="cells a side")
    parser.add_argument("--problem", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--tableau", nargs="+", default=list(TABLEAUX), choices=TABLEAUX)
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 150)
    say, rows = lambda text: console.print(f"  {text}"), []
    for name in args.problem:
        for tableau in args.tableau:
            rows += nonlinear_rows(name, tableau, args.steps, say, size=args.size)
    console.print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
