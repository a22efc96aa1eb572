"""Log-conductivity beside a source, many experiments beside one, and serial pyadjoint, measured in one run.

``python -m tests.benchmarks.coefficients`` prints the table of one rank: the evolution of
:mod:`problems.conductivity_square` beside that of :mod:`problems.heat_square`, with the propagator that assembles the
operators once for each control and with the form propagator; then serial pyadjoint on a few steps of the same
evolution, and eight experiments beside eight runs with one. ``mpiexec -n 2 python -m tests.benchmarks.coefficients``
measures two ranks over one. ``make bench`` calls both with ``--out FILE.json``.

Cases that are compared take turns at new controls, each from cold; figures are medians. On one rank times are the
processor's of the process, on two ranks those of a clock, the least of the repeats.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from firedrake import COMM_SELF
from mpi4py import MPI
from rich.console import Console

from pint_fem.errors import InputError
from pint_fem.propagators import FormPropagator
from pint_fem.spacetime import SpaceTime
from problems.conductivity_square import conductivity_square, serial_conductivity_square
from problems.heat_square import SIZE, field, square
from tests.benchmarks.derivatives import Derivatives, Measured, difference, in_turn, on_tape
from tests.benchmarks.rows import Row, row, table, timed

__all__ = ["EXPERIMENTS", "STEPS", "TAPE_STEPS", "main", "rows"]

STEPS, QUICK_STEPS, TAPE_STEPS, EXPERIMENTS = 256, 64, 16, 8
SERIAL = {"time_solver": "serial"}
MGRIT = {"mgrit": {"rtol": 1e-8}}
SOLVERS = (
    ("BackwardEuler", "sequential", SERIAL),
    ("SDIRK2", "sequential", SERIAL),
    ("SDIRK2", "MGRIT to 1e-8", MGRIT),
)
"""Integrator, name and options of each row of the table."""
OVER_SOURCE = {"value": None, "gradient": 2.5, "hessian": 2.5}
OVER_TAPE = {"value": None, "gradient": 30, "hessian": 100}
AS_LANES, TWO_RANKS = 0.5, 1.8
CONTROL = 0.1
"""Factor of the control of :mod:`problems.heat_square`: the conductivity is between exp(-1) and exp(1)."""
WORDS = {"value": "J", "gradient": "gradient, given J", "hessian": "Hessian action"}


def derivatives(rf, scale: float = CONTROL) -> Derivatives:
    """The functional's value, gradient and Hessian action at the benchmark's control."""
    return Derivatives(rf, field(rf, "control", scale), field(rf, "direction"))


# -- one rank ----------------------------------------------------------------------------------------------------------
def over_source(steps: int, repeats: int, size: int) -> list[Row]:
    """The coefficient over the source, for each integrator and time solver."""
    out = []
    for integrator, name, parameters in SOLVERS:
        make = lambda **given: conductivity_square(steps, integrator, size=size, **given, **parameters)  # noqa: B023
        cases = {
            "source": derivatives(square(steps, integrator, size=size, **parameters), 1.0),
            "coefficient": derivatives(make()),
            "form": derivatives(make(propagator=FormPropagator)),
        }
        found = in_turn(cases, repeats, seldom=["form"])
        for what, target in OVER_SOURCE.items():
            form = found["form"]
            apart = difference(found["coefficient"].values[what], form.values[what])
            note = f"form propagator {1e3 * form.seconds[what] / steps:.3g} ms, differs by {apart:.0e}"
            text = f"{integrator}, {name}, {steps} steps, {WORDS[what]}: log-conductivity / source"
            seconds = [found[case].seconds[what] for case in ("coefficient", "source")]
            out.append(row("p", text, *seconds, steps, target, True, note))
        out.append(_update(cases["coefficient"], found["coefficient"], f"{integrator}, {name}", steps, repeats))
    return out


def _update(case: Derivatives, found: Measured, name: str, steps: int, repeats: int) -> Row:
    """The assembly and factorisation of all levels at a new control, over J with them."""
    propagators = case.rf.problem.sweeps.propagators
    seconds = 0.0
    if hasattr(propagators[0], "update"):

        def update():
            case.scale *= 1.01
            for p in propagators:
                p.update(case.scale * case.z)

        (seconds,) = timed(update, repeats=repeats, clock=time.process_time)
    text = f"{name}, {steps} steps, assembly and factorisation of all levels / J"
    note = f"{1e3 * seconds:.3g} ms for each control, type {type(propagators[0]).__name__}"
    return row("p", text, seconds, found.seconds["value"], steps, None, True, note)


def over_tape(steps: int, tape_steps: int, repeats: int, size: int, say: Callable[[str], None]) -> list[Row]:
    """Serial pyadjoint over ours, sequential: its tape has few steps, ours as many as the table; values are compared
    for the few.
    """
    out = []
    for integrator in ("BackwardEuler", "SDIRK2"):
        tape = serial_conductivity_square(tape_steps, integrator, size=size)
        few = derivatives(conductivity_square(tape_steps, integrator, size=size, **SERIAL))
        values = few.first()
        theirs = on_tape(tape.rf, few.z, few.dz, repeats=max(1, repeats // 2), hessians=2, say=say)
        many = derivatives(conductivity_square(steps, integrator, size=size, **SERIAL))
        ours = many.measure(repeats)
        for what, target in OVER_TAPE.items():
            note = f"pyadjoint: {tape_steps} steps, differs by {difference(values[what], theirs.values[what]):.0e}"
            text = f"{integrator}, sequential, {steps} steps, {WORDS[what]}: pyadjoint / log-conductivity"
            seconds = ours.seconds[what], theirs.seconds[what] * steps / tape_steps
            out.append(row("p", text, *seconds, steps, target, False, note))
    return out


class Runs:
    """Several functionals, evaluated one after another as one case of :func:`in_turn`."""

    def __init__(self, cases: list[Derivatives]):
        self.cases = cases

    def first(self) -> dict[str, object]:
        """The sums of their values."""
        parts = [case.first() for case in self.cases]
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    def once(self) -> dict[str, float]:
        """The sums of their seconds."""
        parts = [case.once() for case in self.cases]
        return {name: sum(part[name] for part in parts) for name in parts[0]}


def many_experiments(steps: int, repeats: int, size: int) -> list[Row]:
    """Several experiments in one functional over as many functionals of one."""
    out = []
    for integrator, name, parameters in SOLVERS:
        make = lambda numbers: derivatives(
            conductivity_square(
                steps, integrator, size=size, experiments=numbers, weight=len(numbers) / EXPERIMENTS,  # noqa: B023
                **parameters,  # noqa: B023
            )
        )
        numbers = range(EXPERIMENTS)
        found = in_turn({"together": make(numbers), "alone": Runs([make([e]) for e in numbers])}, repeats)
        seconds = {case: dict(found[case].seconds) for case in found}
        for case in seconds.values():
            case["all"] = sum(case.values())
        apart = difference(found["together"].values["hessian"], found["alone"].values["hessian"])
        for what in (*OVER_SOURCE, "all"):
            words = WORDS.get(what, "J, gradient and Hessian action")
            text = f"{integrator}, {name}, {steps} steps, {words}: "
            text += f"{EXPERIMENTS} experiments / {EXPERIMENTS} runs with one"
            note = f"Hessian actions differ by {apart:.0e}" if what == "all" else ""
            target = AS_LANES if what == "all" else None
            out.append(row("p", text, seconds["together"][what], seconds["alone"][what], steps, target, True, note))
    return out


# -- several ranks -----------------------------------------------------------------------------------------------------
def over_one_rank(steps: int, repeats: int, size: int, comm) -> list[Row]:
    """All ranks over the first one alone, for the experiments' axis of the grid and for its time axis."""
    out, alone = [], SpaceTime("1x1", comm=COMM_SELF)
    grids = ((f"1x1x{comm.size}", "sequential", SERIAL), (f"1x{comm.size}", "MGRIT to 1e-8", MGRIT))
    for integrator in ("BackwardEuler", "SDIRK2"):
        for grid, name, parameters in grids:
            try:
                shared = SpaceTime(grid, comm=comm)
            except InputError as error:
                if comm.rank == 0:
                    print(f"grid {grid}: {error}", file=sys.stderr)
                continue
            pose = lambda st: derivatives(
                conductivity_square(
                    steps, integrator, size=size, experiments=range(EXPERIMENTS), spacetime=st,  # noqa: B023
                    **parameters,  # noqa: B023
                )
            )
            cases = {"one": pose(alone), "all": pose(shared)}
            apart = _difference(cases, comm)
            parts = _least(cases, comm, repeats)
            for what in (*OVER_SOURCE, "all"):
                words = WORDS.get(what, "J, gradient and Hessian action")
                text = f"{integrator}, {name}, {steps} steps, {EXPERIMENTS} experiments, {words}: 1x1 / {grid}"
                note = f"gradients differ by {apart:.0e}" if what == "all" else ""
                target = TWO_RANKS if what == "all" and comm.size == 2 else None
                out.append(row("p", text, parts["all"][what], parts["one"][what], steps, target, False, note))
    return out


def _difference(cases: dict[str, Derivatives], comm) -> float:
    """The relative difference of the gradients, on the first rank."""
    one = cases["one"].first()["gradient"] if comm.rank == 0 else None
    shared = cases["all"].first()["gradient"]
    comm.Barrier()
    return difference(shared, one) if comm.rank == 0 else 0.0


def _least(cases: dict[str, Derivatives], comm, repeats: int) -> dict[str, dict[str, float]]:
    """Least seconds of each part of :meth:`Derivatives.once` by a clock, and of all parts, of cases that take turns:
    ``"one"`` on the first rank while the others wait, ``"all"`` on all ranks.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for repeat in range(repeats + 1):
        for name, case in cases.items():
            comm.Barrier()
            works = comm.rank == 0 or name == "all"
            seconds = case.once(time.perf_counter) if works else dict.fromkeys(OVER_SOURCE, 0.0)
            if repeat:  # the first one warms up
                found[name].append(seconds | {"all": sum(seconds.values())})
    comm.Barrier()
    return {name: {what: min(part[what] for part in parts) for what in parts[0]} for name, parts in found.items()}


def rows(
    repeats: int,
    comm=MPI.COMM_WORLD,
    *,
    steps: int = STEPS,
    tape_steps: int = TAPE_STEPS,
    size: int = SIZE,
    parts: str = "source tape experiments",
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Ratios on the ranks of ``comm``, those of the first rank.

    Parameters
    ----------
    repeats
        Number of new controls of each case.
    comm
        One rank: the table, serial pyadjoint and the experiments; several: these over one rank.
    steps, tape_steps, size
        Number of steps, of those on pyadjoint's tape, and of squares along a side.
    parts
        Names of the parts that are measured on one rank.
    say
        Prints a line on the progress.
    """
    if comm.size > 1:
        return over_one_rank(steps, repeats, size, comm)
    out = []
    if "source" in parts:
        out += over_source(steps, repeats, size)
    if "tape" in parts:
        out += over_tape(steps, tape_steps, repeats, size, say)
    if "experiments" in parts:
        out += many_experiments(steps, repeats, size)
    return out


def main(argv: list[str] | None = None) -> int:
    """Measure and print a table, or write JSON."""
    name = "python -m tests.benchmarks.coefficients"
    parser = argparse.ArgumentParser(prog=name, description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file (default: a table is printed)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps, {QUICK_STEPS // 8} on the tape")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--tape-steps", type=int)
    parser.add_argument("--size", type=int, default=SIZE, help="squares along a side")
    parser.add_argument("--parts", default="source tape experiments", help="what is measured on one rank")
    args = parser.parse_args(argv)
    steps = args.steps or (QUICK_STEPS if args.quick else STEPS)
    console = Console(width=None if sys.stdout.isatty() else 200)
    found = rows(
        args.repeats, steps=steps, tape_steps=args.tape_steps or (QUICK_STEPS // 8 if args.quick else TAPE_STEPS),
        size=args.size, parts=args.parts,
        say=lambda text: None if args.out else console.print(f"  pyadjoint: {text}"),
    )  # fmt: skip
    if MPI.COMM_WORLD.rank == 0:
        if args.out:
            args.out.write_text(json.dumps([vars(r) for r in found], indent=1))
        else:
            console.print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
