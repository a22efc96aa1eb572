"""Ratios measured side by side: ``python -m tests.benchmarks.bench [--quick] [--out results/bench]``.

Heat conduction, P1 on a 64 x 64 unit square: (a, b, d) 256 steps, medians of the repeats; (c, e) 512 steps, on one
rank and on two, see ``time_parallel``; then PyMGRIT and XBraid's ex-02, see ``compare``. Two things that make up a
ratio are timed in turn, so that a busy machine slows both. ``--quick`` shortens all but (c, e). A missed target is
reported and is no error.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from firedrake import Function
from rich.console import Console

from pint_fem.adjoint import TimeParallelReducedFunctional
from pint_fem.propagators import LinearPropagator
from problems.heat_square import SIZE, field, square
from problems.serial_pyadjoint import serial_square, square_functionals
from tests.benchmarks.compare import compare_rows
from tests.benchmarks.rows import Row, row, table, timed
from tests.benchmarks.time_parallel import on_ranks

__all__ = ["main"]

STEPS, QUICK_STEPS = 256, 64


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
        lambda: p.apply(U[:-1], out, 0),
        lambda: p.apply_transposed(U[:-1], out, 0),
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


def cold(rf: TimeParallelReducedFunctional) -> None:
    """Forget trajectories: MGRIT would start from the last ones."""
    rf.problem.forget()


class Derivatives:
    """Times and values of ours: each repeat at a new control, from cold."""

    def __init__(self, rf: TimeParallelReducedFunctional):
        self.rf, self.scale = rf, 1.0
        self.z, self.dz = field(rf, "control"), field(rf, "direction")

    def move(self) -> None:
        """Go to a new control with its state; not timed."""
        self.scale *= 1.01
        cold(self.rf)

    def value(self):
        """``J``, with the state."""
        self.J = self.rf.problem.value(self.scale * self.z)

    def gradient(self):
        """``J'``, with the adjoint."""
        self.g = self.rf.problem.derivative(self.scale * self.z)

    def hessian(self):
        """``J'' dz``, with a tangent and an adjoint."""
        self.h = self.rf.problem.hessian_action(self.scale * self.z, self.dz)

    def state(self):
        """A state sweep at a new control."""
        self.move()
        self.rf.problem.sweeps.state(self.scale * self.z, self.rf.problem.U)

    def times(self, repeats: int) -> tuple[float, float, float]:
        """Seconds of value, derivative and Hessian action."""
        parts = []
        for _ in range(repeats + 1):  # the first one warms up
            self.move()
            parts.append([timed(f, repeats=1)[0] for f in (self.value, self.gradient, self.hessian)])
        return tuple(statistics.median(part) for part in zip(*parts[1:], strict=True))

    def at(self, scale: float) -> tuple[float, np.ndarray, np.ndarray]:
        """Value, derivative and Hessian action at a multiple of the control."""
        self.scale = scale
        cold(self.rf)
        self.value(), self.gradient(), self.hessian()
        return self.J, self.g, self.h


def against_pyadjoint(steps: int, repeats: int, hessians: int, say: Callable[[str], None]) -> list[Row]:
    """(b) Value, gradient and Hessian action against the tape."""
    tape = serial_square(n=SIZE, steps=steps)
    say(f"pyadjoint: recorded in {tape.seconds:.1f} s")
    V = tape.q.function_space()
    control, direction = (Function(V).interpolate(square_functionals(V)[name]()) for name in ("control", "direction"))
    z, values, times = control.dat.data_ro.copy(), {}, {"value": [], "gradient": [], "hessian": []}
    for i in range(repeats + 1):
        control.dat.data_wo[:] = (1 + i) * z
        results = {}
        actions = {
            "value": lambda: tape.rf(control),
            "gradient": tape.rf.derivative,
            "hessian": lambda: tape.rf.hessian(direction),
        }
        for name, action in actions.items():
            if name == "hessian" and i >= hessians:
                continue
            start = time.perf_counter()
            result = action()
            times[name].append(time.perf_counter() - start)
            results[name] = float(result) if name == "value" else result.dat.data_ro.copy()
        if i == 0:
            values = results
        say("pyadjoint: " + ", ".join(f"{name} {1e3 * times[name][-1] / steps:.1f}" for name in results) + " ms/step")
    theirs = {name: statistics.median(t[1:] or t) for name, t in times.items()}
    out = []
    for name, parameters in (
        ("serial", {"time_solver": "serial"}),
        ("mgrit rtol 1e-10", {"mgrit": {"rtol": 1e-10}}),
        ("mgrit rtol 1e-6", {"mgrit": {"rtol": 1e-6}}),
    ):
        ours = Derivatives(square(steps, **parameters))
        value, gradient, hessian = ours.times(repeats)
        J, g, h = ours.at(1.0)
        differ = lambda a, b: f"{np.linalg.norm(a - b) / np.linalg.norm(b):.0e}"
        pairs = (
            ("value", value, theirs["value"], None, f"J differs by {abs(J / values['value'] - 1):.0e}"),
            ("gradient alone", gradient, theirs["gradient"], 15, f"differs by {differ(g, values['gradient'])}"),
            ("value + gradient", value + gradient, theirs["value"] + theirs["gradient"], 15, ""),
            ("Hessian action", hessian, theirs["hessian"], 60, f"differs by {differ(h, values['hessian'])}"),
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
    start, rows = time.perf_counter(), []
    for what, part in (
        (
            "single steps and blocks",
            lambda: per_step(steps, "BackwardEuler", 2 * repeats) + per_step(steps, "SDIRK2", 2 * repeats),
        ),
        ("MGRIT on one time rank and on two", lambda: on_ranks(1, 2 * repeats) + on_ranks(2, 2 * repeats)),
        (
            "against pyadjoint",
            lambda: against_pyadjoint(steps, repeats, hessians, lambda text: console.print(f"  {text}")),
        ),
    ):
        console.print(f"{what} ...")
        rows += part()
    console.print("PyMGRIT and XBraid's ex-02 ...")
    rows += compare_rows(args.quick, lambda text: console.print(f"  {text}"))
    rows.sort(key=lambda r: r.section)
    console.print(table(rows))
    missed = sum(r.met is False for r in rows)
    console.print(
        f"{missed} of {sum(r.target is not None for r in rows)} targets missed, {time.perf_counter() - start:.0f} s"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    machine = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
    summary = {"steps": steps, "cells": SIZE**2 * 2, **machine, "rows": [{**asdict(r), "met": r.met} for r in rows]}
    (args.out / "bench.json").write_text(json.dumps(summary, indent=1, default=float) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
