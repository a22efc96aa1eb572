"""Optimal control by the KKT system of all steps at once, beside reduced methods and serial pyadjoint, in one run.

``python -m tests.benchmarks.optimal_control`` measures ``J.minimize("kkt")`` for heat with a source in each step over
the inexact reduced trust region with its fastest time solver and preconditioner, over serial pyadjoint with TAO's
optimisers, and within bounds; ``--parts iterations`` prints the table of iterations, which takes hours unless some of
its rows are chosen. ``mpiexec -n 2 python -m tests.benchmarks.optimal_control`` measures two ranks over one.
``make bench`` calls both with ``--out FILE.json``.

Each run begins with a functional that has been neither evaluated nor solved: structure, factorisations and sweeps are
in the time. Runs that are compared take turns; figures are medians by a clock. Where a reduced method would take longer
than ``--limit`` seconds, its time is predicted: its steps of conjugate gradients are counted on a mesh with fewer
cells, a run with few steps is timed on the mesh itself, and the note says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from firedrake import COMM_SELF
from mpi4py import MPI
from rich.console import Console

import pint_fem as pf
from pint_fem.adjoint.minimisation.kkt.preconditioner import KKTPreconditioner
from problems.compare_control import compare_control
from problems.control import ControlProblem
from tests.benchmarks.optimal_control_bounds import bound_rows
from tests.benchmarks.optimal_control_iterations import CELLS, KINDS, WEIGHTS, counted, markdown, settings
from tests.benchmarks.optimal_control_iterations import STEPS as COUNTED_STEPS
from tests.benchmarks.optimal_control_problems import heat, problem
from tests.benchmarks.rows import Row, row, table, timed

__all__ = ["PARTS", "main", "rows"]

PARTS = ("iterations", "times", "serial", "bounds")
DEFAULT = "times serial bounds"
INTEGRATORS = ("BackwardEuler", "SDIRK2")
TARGETS = {1e-4: 1.0, 1e-6: 8.0, 1e-8: 50.0}
"""Wanted ratios of the strongest reduced method to the KKT system by the weight of the control."""
TWO_RANKS, OVER_TAPE, GTOL = 1.7, 200.0, 1e-6
SERIAL: dict[str, Any] = {"time_solver": "serial"}
PARADIAG: dict[str, Any] = {"time_solver": "paradiag"}
TIME_SOLVERS = {"sequential": SERIAL, "ParaDiag": PARADIAG}
PRECONDITIONERS = ("none", "limited-memory")
"""Of the reduced method. That of the regularisation is a multiple of the identity, as controls have the inner product
of L2; the low-rank one, ``"low-rank"``, takes more directions here than the others take steps.
"""
MOST_CG, SAMPLE = 5000, 11


class Size(NamedTuple):
    """Size of the problem of the times.

    Attributes
    ----------
    cells, steps : int
        Squares along a side, and time steps.
    """

    cells: int
    steps: int


USUAL, QUICK = Size(64, 256), Size(32, 128)


def pose(size: Size, integrator: str, weight: float, parameters: dict, spacetime=None) -> ControlProblem:
    """A functional from cold: heat, P1."""
    return problem(
        "heat", cells=size.cells, degree=1, weight=weight, steps=size.steps, integrator=integrator,
        spacetime=spacetime, **parameters,
    )  # fmt: skip


# -- the KKT system ----------------------------------------------------------------------------------------------------
def by_kkt(posed: ControlProblem):
    """Minimise by the KKT system."""
    return posed.rf.minimize("kkt", gtol_rel=GTOL)


def phases(size: Size, integrator: str, weight: float, parameters: dict) -> str:
    """Seconds of the parts of a run."""
    J = pose(size, integrator, weight, parameters).rf
    zero, found = np.zeros(J.layout.size), []

    def clocked(call: Callable):
        start = time.perf_counter()
        out = call()
        found.append(time.perf_counter() - start)
        return out

    clocked(lambda: J.problem.value(zero))
    g = clocked(lambda: J.problem.derivative(zero))
    kkt = clocked(lambda: KKTPreconditioner(J))
    c = -np.ascontiguousarray(J.layout.steps(g))
    iterations = clocked(lambda: kkt.kkt.solve(c=c)).iterations
    clocked(lambda: kkt.kkt.solve(c=c))
    clocked(lambda: J.problem.hessian_action(zero, g))
    kkt.release()
    names = "J", "gradient", "structure", "factorisations and first KKT solve", "another KKT solve", "Hessian action"
    text = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in zip(names, found, strict=True))
    return f"{text}; {iterations} iterations"


# -- the reduced method ------------------------------------------------------------------------------------------------
class Reduced(NamedTuple):
    """The time of a reduced method.

    Attributes
    ----------
    name : str
    seconds : float
    steps : int
        Of conjugate gradients.
    predicted : bool
    ended : str
        Why the run ended, where it has not converged.
    value : float
        J in the end; nan where it is predicted.
    """

    name: str
    seconds: float
    steps: int
    predicted: bool
    ended: str
    value: float

    def __str__(self) -> str:
        kind = "predicted" if self.predicted else "measured"
        return f"{self.name}: {self.seconds:.3g} s {kind}, {self.steps} CG steps{self.ended}"


def _reduced(posed: ControlProblem, preconditioner: str, **options):
    """Minimise by the inexact reduced trust region."""
    chosen = {"cg_max_it": MOST_CG, "max_it": 100} | options
    return posed.rf.minimize_trust_region(inexact=True, preconditioner=preconditioner, gtol_rel=GTOL, **chosen)


def _steps(result) -> int:
    return sum(record.cg_iterations for record in result.history)


def _seconds(posed: ControlProblem, preconditioner: str, steps: int) -> float:
    """Time of one iteration with some steps of conjugate gradients, from cold."""
    start = time.perf_counter()
    _reduced(posed, preconditioner, max_it=1, cg_max_it=steps)
    return time.perf_counter() - start


def reduced(size: Size, coarse: Size, integrator: str, weight: float, limit: float, say: Callable) -> list[Reduced]:
    """All combinations of time solver and preconditioner, the fastest first."""
    out = []
    for preconditioner in PRECONDITIONERS:
        counted_run = _reduced(pose(coarse, integrator, weight, SERIAL), preconditioner)
        ended = "" if counted_run.converged else f" ({counted_run.reason.value})"
        for solver, parameters in TIME_SOLVERS.items():
            name, pair = f"{solver}, {preconditioner}", [pose(size, integrator, weight, parameters) for _ in range(2)]
            first, more = (_seconds(posed, preconditioner, most) for posed, most in zip(pair, (1, SAMPLE), strict=True))
            each = max(more - first, 0.0) / (SAMPLE - 1)
            # a later iteration has a value and a gradient, which together take as long as a step
            predicted = first + each * (counted_run.iterations + _steps(counted_run) - 2)
            if predicted > limit:
                out.append(Reduced(name, predicted, _steps(counted_run), True, ended, np.nan))
            else:
                posed = pose(size, integrator, weight, parameters)
                start = time.perf_counter()
                result = _reduced(posed, preconditioner)
                seconds = time.perf_counter() - start
                stopped = "" if result.converged else f" ({result.reason.value})"
                out.append(Reduced(name, seconds, _steps(result), False, stopped, result.value))
            say(f"{integrator}, weight {weight:g}: {out[-1]}")
    return sorted(out, key=lambda r: (bool(r.ended), r.seconds))


def over_reduced(
    size: Size, repeats: int, limit: float, weights: Sequence[float], say: Callable[[str], object]
) -> list[Row]:
    """The strongest reduced method over the KKT system, for each integrator and weight."""
    out = []
    coarse = Size(max(size.cells // 4, 4), size.steps)
    for integrator in INTEGRATORS:
        by_kkt(pose(size, integrator, weights[0], SERIAL))  # kernels are compiled
        for weight in weights:
            best = reduced(size, coarse, integrator, weight, limit, say)[0]
            seconds, values, choices = [], [], []
            for repeat in range(repeats):
                for solver, parameters in TIME_SOLVERS.items():
                    posed = pose(size, integrator, weight, parameters)
                    start = time.perf_counter()
                    result = by_kkt(posed)
                    seconds.append((time.perf_counter() - start, solver))
                    values.append(result.value)
                    choices.append(result.choice)
                if not best.predicted and repeat:
                    again = best.name.split(", ")
                    posed = pose(size, integrator, weight, TIME_SOLVERS[again[0]])
                    start = time.perf_counter()
                    _reduced(posed, again[1])
                    best = best._replace(seconds=statistics.median([best.seconds, time.perf_counter() - start]))
            ours = {name: statistics.median(s for s, of in seconds if of == name) for name in TIME_SOLVERS}
            fastest = min(ours, key=lambda name: ours[name])
            apart = f", values differ by {abs(best.value - values[-1]) / abs(values[-1]):.0e}"
            note = f"{best}{'' if best.predicted else apart}; {choices[-1].split('; ', 2)[-1]}"
            text = f"{integrator}, {size.steps} steps, weight {weight:g}: inexact trust region / KKT, {fastest}"
            out.append(row("q", text, ours[fastest], best.seconds, size.steps, TARGETS.get(weight), False, note))
            say(f"{integrator}, weight {weight:g}, KKT: {phases(size, integrator, weight, TIME_SOLVERS[fastest])}")
    return out


# -- several ranks -----------------------------------------------------------------------------------------------------
def over_one_rank(size: Size, repeats: int, weights: Sequence[float], comm) -> list[Row]:
    """All ranks, in time, over the first one alone; the least times, with ParaDiag."""
    out, grids = [], {"one": pf.SpaceTime("1x1", comm=COMM_SELF), "all": pf.SpaceTime(f"1x{comm.size}", comm=comm)}
    for integrator in INTEGRATORS:
        for weight in weights:
            seconds: dict[str, list[float]] = {name: [] for name in grids}
            values: dict[str, float] = {}
            for _ in range(repeats + 1):
                for name, spacetime in grids.items():
                    comm.Barrier()
                    if comm.rank and name == "one":
                        continue
                    posed = pose(size, integrator, weight, PARADIAG, spacetime)
                    spacetime.comm.Barrier()
                    start = time.perf_counter()
                    values[name] = by_kkt(posed).value
                    seconds[name].append(time.perf_counter() - start)
            comm.Barrier()
            if comm.rank:
                continue
            # the first one warms up
            ours, theirs = (min(seconds[name][1:]) for name in ("all", "one"))
            text = f"{integrator}, {size.steps} steps, weight {weight:g}, KKT, ParaDiag: 1x1 / 1x{comm.size}"
            note = f"values differ by {abs(values['all'] - values['one']) / abs(values['one']):.0e}"
            out.append(row("q", text, ours, theirs, size.steps, TWO_RANKS if comm.size == 2 else None, False, note))
    return out


# -- serial pyadjoint --------------------------------------------------------------------------------------------------
def over_tape(size: Size, repeats: int, say: Callable[[str], object], weight: float = 1e-4) -> list[Row]:
    """Serial pyadjoint with the best of TAO's optimisers, extrapolated by its time per call, over ours."""
    out = []
    for integrator in INTEGRATORS:
        runs = [lambda integrator=integrator: by_kkt(pose(size, integrator, weight, SERIAL))]
        runs[0]()  # kernels are compiled
        (ours,) = timed(*runs, repeats=repeats)
        posed = pose(size, integrator, weight, SERIAL)
        result = by_kkt(posed)
        # TAO stops at the tolerance, not at the gradient that the KKT system happens to reach
        result = replace(result, gradient_norm=GTOL * result.history[0].gradient_norm)
        forms = lambda given, spacetime: heat(given.cells, 1, weight, spacetime.space_comm)
        given = argparse.Namespace(cells=size.cells, steps=size.steps, integrator=integrator)
        found = compare_control(posed, result, given, forms=forms, seconds=ours, say=say)
        where = f"{integrator}, {size.steps} steps, weight {weight:g}"
        for name in ("J", "gradient", "Hessian action"):
            note = f"differs by {found[name]['relative_difference']:.0e}"
            pair = found[name]["seconds"], found[name]["serial_seconds"]
            out.append(row("q", f"{where}, {name}: pyadjoint / ours", *pair, size.steps, None, False, note))
        optimiser, best = min(found["end_to_end"].items(), key=lambda item: item[1]["serial_seconds"])
        text = f"{where}: pyadjoint with TAO's {optimiser} / KKT"
        note = f"{best['evaluations']} evaluations, {best['hessian_actions']} Hessian actions"
        note += "" if best["converged"] else ", not converged"
        out.append(row("q", text, ours, best["serial_seconds"], size.steps, OVER_TAPE, False, note))
    return out


def rows(
    repeats: int,
    comm=MPI.COMM_WORLD,
    *,
    size: Size = USUAL,
    parts: str = DEFAULT,
    weights: Sequence[float] = tuple(TARGETS),
    limit: float = 120.0,
    say: Callable[[str], object] = lambda text: None,
) -> list[Row]:
    """Ratios on the ranks of ``comm``, those of the first rank.

    Parameters
    ----------
    repeats
        Number of runs of each case.
    comm
        One rank: the parts; several: these over one rank.
    size
        Of the problem.
    parts
        Names of the parts that are measured on one rank, of ``times serial bounds``.
    weights
        Of the control, for the times.
    limit
        Seconds of a reduced method beyond which its time is predicted.
    say
        Prints a line on the progress.
    """
    if comm.size > 1:
        return over_one_rank(size, repeats, weights, comm)
    out = []
    if "times" in parts:
        out += over_reduced(size, repeats, limit, weights, say)
    if "serial" in parts:
        out += over_tape(size, repeats, say)
    if "bounds" in parts:
        out += bound_rows(Size(max(size.cells // 4, 4), max(size.steps // 4, 4)), say)
    return out


def main(argv: list[str] | None = None) -> int:
    """Measure and print tables, or write JSON."""
    name = "python -m tests.benchmarks.optimal_control"
    parser = argparse.ArgumentParser(prog=name, description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file (default: a table is printed)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK.cells} squares along a side, {QUICK.steps} steps")
    parser.add_argument("--cells", type=int, nargs="+", help="squares along a side")
    parser.add_argument("--steps", type=int, nargs="+")
    parser.add_argument("--weights", type=float, nargs="+", help="of the control")
    parser.add_argument("--parts", default=DEFAULT, help=f"what is measured on one rank, of {', '.join(PARTS)}")
    parser.add_argument("--limit", type=float, help="seconds beyond which times are predicted (120; quick: 20)")
    parser.add_argument("--problems", nargs="+", choices=tuple(KINDS), default=tuple(KINDS), help="of the iterations")
    parser.add_argument("--integrators", nargs="+", default=(), help="of the iterations")
    parser.add_argument("--degrees", type=int, nargs="+", default=(), help="of the elements, of the iterations")
    parser.add_argument("--cg-seconds", type=float, default=30.0, help="most time for plain conjugate gradients")
    args = parser.parse_args(argv)
    if unknown := set(args.parts.split()) - set(PARTS):
        parser.error(f"--parts {' '.join(sorted(unknown))}: give some of {', '.join(PARTS)}")
    comm = MPI.COMM_WORLD
    console = Console(width=None if sys.stdout.isatty() else 200, quiet=comm.rank > 0)
    say = lambda text: None if args.out else console.print(f"  {text}", highlight=False)
    if "iterations" in args.parts and comm.rank == 0:
        quick = {"cells": CELLS[:1], "steps": COUNTED_STEPS[:1]} if args.quick else {}
        chosen = quick | {key: vars(args)[key] for key in ("cells", "steps") if vars(args)[key]}
        weights = args.weights or WEIGHTS
        of = settings(args.problems, integrators=args.integrators, degrees=args.degrees, **chosen)
        found = {s: counted(s, weights, seconds=args.cg_seconds, say=say) for s in of}
        print(markdown(found, weights))
    if args.parts.strip() == "iterations":
        return 0
    usual = QUICK if args.quick else USUAL
    size = Size(*(given[-1] if given else n for given, n in zip((args.cells, args.steps), usual, strict=True)))
    limit = args.limit or (20.0 if args.quick else 120.0)
    weights = args.weights or tuple(TARGETS)
    measured = rows(args.repeats, size=size, parts=args.parts, weights=weights, limit=limit, say=say)
    if comm.rank == 0:
        if args.out:
            args.out.write_text(json.dumps([vars(r) for r in measured], indent=1, default=float))
        else:
            console.print(table(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
