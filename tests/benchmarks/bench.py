"""Ratios measured side by side: ``python -m tests.benchmarks.bench [--quick] [--out results/bench]``.

Heat conduction, P1 on a 64 x 64 unit square: (a, b, d) 256 steps, medians of the repeats; (c, e) 512 and 4,096 steps,
on one rank and on two, see ``time_parallel``; (f) ParaDiag on heat and waves, see ``paradiag``, and nonlinear
evolutions, see ``nonlinear``; (k) solves on lanes, see ``lanes``; (n) linear inverse problems by the map from
controls to readings, see ``linear_inverse`` (milliseconds of a whole inversion); (p) a log-conductivity beside a
source and several experiments beside one, see ``coefficients``; (q) optimal control by KKT systems, see
``optimal_control``; (r) ranks in space, see ``space``; then PyMGRIT and XBraid's ex-02, see ``compare``; (l) training
steps of residual networks, see ``layers``; and the table of optimisers, see ``optimisers`` (serial pyadjoint with
TAO's LMVM). Two things that make up a ratio are timed in turn, so that a busy machine slows both. ``--quick``
shortens all but (c, e) and ParaDiag. A missed target is reported and is no error.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
from firedrake import COMM_SELF, Function
from rich.console import Console

from pint_fem.cli import last_lines
from pint_fem.kernels.arrays import get
from pint_fem.propagators import LinearPropagator
from pint_fem.spacetime import SpaceTime
from problems.heat_square import SIZE, field, square
from problems.serial_pyadjoint import serial_square, square_functionals
from tests.benchmarks.compare import compare_rows
from tests.benchmarks.derivatives import MORE, Derivatives, difference, on_tape
from tests.benchmarks.lanes import lane_rows
from tests.benchmarks.maxwell import SOLVERS, maxwell_rows
from tests.benchmarks.maxwell import STEPS as MAXWELL_STEPS
from tests.benchmarks.nonlinear import TABLEAUX, nonlinear_rows
from tests.benchmarks.optimisers import outcomes, outcomes_table
from tests.benchmarks.rows import Row, on_ranks, row, table, timed
from tests.nonlinear import PROBLEMS

__all__ = ["main"]

STEPS, QUICK_STEPS = 256, 64
NONLINEAR_STEPS, OPTIMISER_STEPS = 64, 64


def per_step(steps: int, integrator: str, repeats: int) -> list[Row]:
    """(a) Our sequential step against PETSc alone, and (d) blocks against one state at a time."""
    rf = square(steps, integrator, time_solver="serial")  # its communicators live as long as it does
    evolution = rf.evolution
    p = LinearPropagator(evolution)
    U = np.empty((steps + 1, evolution.state_size))
    U[0] = np.random.default_rng(0).standard_normal(evolution.state_size)
    U[0, p.bc_rows] = 0
    G = np.zeros((steps, evolution.state_size))
    out = np.empty_like(G)
    rows = []
    if integrator == "BackwardEuler":
        b, x = p.M.createVecs()
        (factor,) = p.factors.values()

        def bare():
            x.array[:] = U[0]
            for _ in range(steps):
                p.M.mult(x, b)
                factor.ksp.solve(b, x)

        ours, forced, transposed, petsc = timed(
            lambda: p.sweep(U, None),
            lambda: p.sweep(U, G),
            lambda: p.sweep(U, G, transposed=True),
            bare,
            repeats=repeats,
        )
        error = np.abs(p_last(p, U) - x.array_r).max()
        for what, seconds in (
            ("plain", ours),
            ("with a right-hand side", forced),
            ("transposed, with a right-hand side", transposed),
        ):
            note = f"difference of the last state {error:.0e}" if what == "plain" else ""
            rows.append(
                row("a", f"sequential step, {what} / bare PETSc matvec + solve", seconds, petsc, steps, 1.5, True, note)
            )
    sweep, block, block_transposed = timed(
        lambda: p.sweep(U, None),
        lambda: p.apply(U[:-1], out),
        lambda: p.apply_transposed(U[:-1], out),
        repeats=repeats,
    )
    for what, seconds in (("step", block), ("transposed step", block_transposed)):
        rows.append(
            Row(
                "d",
                f"{integrator}: one state at a time / {what} in lock-step blocks",
                1e3 * seconds / steps,
                1e3 * sweep / steps,
                sweep / seconds,
                1.8,
                False,
            )
        )
    return rows


def p_last(p: LinearPropagator, U: np.ndarray) -> np.ndarray:
    """Last state of the plain sweep from ``U[0]``."""
    p.sweep(U, None)
    return U[-1]


def against_pyadjoint(steps: int, repeats: int, hessians: int, say: Callable[[str], None]) -> list[Row]:
    """(b) Value, gradient and Hessian action against the tape."""
    tape = serial_square(n=SIZE, steps=steps)
    say(f"pyadjoint: recorded in {tape.seconds:.1f} s")
    V = tape.q.function_space()
    z, dz = (get(Function(V).interpolate(square_functionals(V)[name]())) for name in ("control", "direction"))
    theirs = on_tape(tape.rf, z, dz, repeats=repeats, hessians=hessians, say=lambda text: say(f"pyadjoint: {text}"))
    out = []
    for name, parameters, (first, second) in (
        ("serial", {"time_solver": "serial"}, (80, 400)),
        ("mgrit rtol 1e-10", {"mgrit": {"rtol": 1e-10}}, (15, 60)),
        ("mgrit rtol 1e-6", {"mgrit": {"rtol": 1e-6}}, (15, 60)),
    ):
        rf = square(steps, **parameters)
        ours = Derivatives(rf, field(rf, "control"), field(rf, "direction")).measure(repeats, more=True)
        seconds = [(m.seconds["value"], m.seconds["gradient"], m.seconds["hessian"]) for m in (ours, theirs)]
        differ = {key: f"differs by {difference(ours.values[key], theirs.values[key]):.0e}" for key in ours.values}
        (value, gradient, hessian), (their_value, their_gradient, their_hessian) = seconds
        pairs = (
            ("value", value, their_value, None, differ["value"]),
            ("gradient alone", gradient, their_gradient, first, differ["gradient"]),
            ("value + gradient", value + gradient, their_value + their_gradient, 15, ""),
            ("Hessian action", hessian, their_hessian, second, differ["hessian"]),
            (f"Hessian action in a batch of {MORE}", ours.seconds["batch"], their_hessian, None, ""),
        )
        out += [
            row("b", f"pyadjoint / {name}: {what}", a, b, steps, target, False, note)
            for what, a, b, target, note in pairs
        ]
    return out


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write ``bench.json``; 0 whatever the ratios are."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps and fewer repeats")
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="folder for bench.json")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 150)
    steps = QUICK_STEPS if args.quick else STEPS
    repeats, hessians = (3, 1) if args.quick else (5, 2)
    say = lambda text: console.print(f"  {text}")
    both = lambda module, count, *more: on_ranks(module, 1, count, *more) + on_ranks(module, 2, count, *more)
    start, rows, shorter = time.perf_counter(), [], 4 if args.quick else 1
    parts = (
        (
            "single steps and blocks",
            lambda: per_step(steps, "BackwardEuler", 2 * repeats) + per_step(steps, "SDIRK2", 2 * repeats),
        ),
        ("kernels on lanes", lambda: lane_rows(2 * repeats, args.quick, say)),
        ("MGRIT on one time rank and on two", lambda: both("tests.benchmarks.time_parallel", 2 * repeats)),
        ("against pyadjoint", lambda: against_pyadjoint(steps, repeats, hessians, say)),
        ("ParaDiag on one time rank and on two", lambda: both("tests.benchmarks.paradiag", repeats)),
        (
            "nonlinear evolutions",
            lambda: [
                r
                for case in product(PROBLEMS, TABLEAUX)
                for r in nonlinear_rows(*case, NONLINEAR_STEPS // shorter, say)
            ],
        ),
        (
            "Maxwell",
            lambda: [r for regime in SOLVERS for r in maxwell_rows(regime, MAXWELL_STEPS // shorter, say)],
        ),
        (
            "linear inverse problems by the map, on one rank and on two",
            lambda: both("tests.benchmarks.linear_inverse", 2 if args.quick else 3),
        ),
        (
            "coefficients and experiments, on one rank and on two",
            lambda: both("tests.benchmarks.coefficients", repeats, *["--quick"] * args.quick),
        ),
        (
            "optimal control by KKT systems, on one rank and on two",
            lambda: both("tests.benchmarks.optimal_control", 2 if args.quick else 3, *["--quick"] * args.quick),
        ),
        (
            "large problems on two ranks in space",
            lambda: on_ranks("tests.benchmarks.space", 2, 3, *["--quick"] * args.quick),
        ),
        ("PyMGRIT and XBraid's ex-02", lambda: compare_rows(args.quick, say)),
    )
    if importlib.util.find_spec("torch"):
        layers = lambda: on_ranks("tests.benchmarks.layers", 2, 2 * repeats, *["--quick"] * args.quick)
        parts = (*parts, ("layers of a residual network on two ranks", layers))
    every = len(parts) + 1
    for number, (what, part) in enumerate(parts, start=1):
        console.print(f"{number} of {every}: {what} ...", highlight=False)
        rows += part()
    rows.sort(key=lambda r: r.section)
    console.print(table(rows))
    console.print(f"{every} of {every}: optimisers ...", highlight=False)
    count = OPTIMISER_STEPS // shorter
    found = outcomes(SpaceTime("1x1", comm=COMM_SELF), count, say=say)
    console.print(outcomes_table(found, f"heat source inversion, {count} SDIRK2 steps, one rank"))
    missed = sum(r.met is False for r in rows)
    console.print(
        f"{missed} of {sum(r.target is not None for r in rows)} targets missed, {time.perf_counter() - start:.0f} s"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    machine = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
    summary = {"steps": steps, "cells": SIZE**2 * 2, **machine, "rows": [{**asdict(r), "met": r.met} for r in rows]}
    summary["optimisers"] = {"steps": count, "rows": [asdict(o) for o in found]}
    (args.out / "bench.json").write_text(json.dumps(summary, indent=1, default=float) + "\n", encoding="utf-8")
    last_lines(args.out / "bench.json", next_step="compare the ratios with those of tests/benchmarks/*.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
