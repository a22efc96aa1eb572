"""Ratios measured side by side, on one rank: ``python -m tests.benchmarks.bench [--quick] [--out results/bench]``.

Heat conduction, P1 on a 64 x 64 unit square, 256 backward Euler steps. Two things that make up a ratio are timed in
turn in the same process, so that a busy machine slows both; each time is the median of its repeats. A missed target
is reported and is no error.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from firedrake import COMM_SELF, DirichletBC, Function, FunctionSpace, TestFunction, UnitSquareMesh, dx, grad, inner
from irksome import Dt
from rich.console import Console
from rich.table import Table

from pint_fem.adjoint import RunningMisfit, TimeParallelReducedFunctional
from pint_fem.propagators import Evolution, LinearPropagator, named_tableau
from pint_fem.spacetime import SpaceTime
from problems.serial_pyadjoint import SQUARE_TIME, serial_square, square_functionals

__all__ = ["Row", "main"]

SIZE, STEPS, QUICK_STEPS = 64, 256, 64


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


def square(steps: int, integrator: str = "BackwardEuler", **solver_parameters) -> TimeParallelReducedFunctional:
    """The time-parallel twin of :func:`problems.serial_pyadjoint.serial_square`."""
    mesh = UnitSquareMesh(SIZE, SIZE, comm=COMM_SELF)
    V = FunctionSpace(mesh, "CG", 1)
    forms = square_functionals(V)
    u, q, v = Function(V), Function(V), TestFunction(V)
    evolution = Evolution(
        Dt(u) * v * dx + inner(grad(u), grad(v)) * dx - q * v * dx,
        u,
        tableau=named_tableau(integrator),
        dt=SQUARE_TIME / steps,
        nsteps=steps,
        control=q,
        bcs=DirichletBC(V, 0, "on_boundary"),
    )
    return TimeParallelReducedFunctional(
        evolution,
        RunningMisfit(forms["misfit"](u)),
        regularisation=forms["regularisation"](q),
        spacetime=SpaceTime("1x1", comm=COMM_SELF),
        solver_parameters=solver_parameters,
    )


def field(rf, name: str, scale: float = 1.0) -> np.ndarray:
    """Coefficients of the control or the direction of :func:`~problems.serial_pyadjoint.square_functionals`."""
    V = rf.controls[0].control.function_space()
    return scale * Function(V).interpolate(square_functionals(V)[name]()).dat.data_ro


def per_step(steps: int, integrator: str, repeats: int) -> list[Row]:
    """(a) Our sequential step against PETSc alone, and (d) blocks against one state at a time."""
    evolution = square(steps, integrator, time_solver="serial").evolution
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
                None,
                False,
            )
        )
    return rows


def p_last(p: LinearPropagator, U: np.ndarray) -> np.ndarray:
    """Last state of the plain sweep from ``U[0]``."""
    p.sweep(U, None)
    return U[-1]


def row(section, what, ours, theirs, steps, target, at_most, note="") -> Row:
    """A row of ours over theirs (``at_most``), or theirs over ours; times are in seconds for all steps."""
    ratio = ours / theirs if at_most else theirs / ours
    return Row(section, what, 1e3 * ours / steps, 1e3 * theirs / steps, ratio, target, at_most, note)


def cold(rf: TimeParallelReducedFunctional) -> None:
    """Forget trajectories: MGRIT would start from the last ones."""
    rf.problem.U[:] = rf.problem.sweeps.initial
    rf.problem.L[:] = 0


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


def cycle(steps: int, integrator: str, repeats: int) -> list[Row]:
    """(c) Bookkeeping of a cycle, and (d) MGRIT against sequential stepping."""
    serial, rows = Derivatives(square(steps, integrator, time_solver="serial")), []
    for rtol in (1e-6, 1e-10):
        parallel = Derivatives(square(steps, integrator, mgrit={"rtol": rtol}))
        solver = parallel.rf.problem.sweeps._state
        for it in (serial, parallel):
            it.move(), it.value()
        sequential, mgrit = timed(serial.state, parallel.state, repeats=repeats)
        U, exact = parallel.rf.problem.U * (serial.scale / parallel.scale), serial.rf.problem.U
        difference = np.abs(U - exact).max() / np.abs(exact).max()
        result = parallel.rf.problem.sweeps.results[-1][1]
        note = f"{result.cycles} cycles, factor {result.factor:.3f}, error {difference:.0e}"
        rows.append(
            row(
                "d",
                f"{integrator}: MGRIT rtol {rtol:g} / sequential, from zero",
                mgrit,
                sequential,
                steps,
                None,
                True,
                note,
            )
        )
    inside = Stopwatch()
    for level in solver.levels:
        level.propagator.step = inside.wrap(level.propagator.step)
        level.propagator.sweep = inside.wrap(level.propagator.sweep)
    G = parallel.rf.problem.sweeps.propagators[0].forcing(parallel.rf.problem.sweeps.data(parallel.z), 0)
    parts = []
    for _ in range(repeats):
        cold(parallel.rf)
        inside.seconds = 0.0
        start = time.perf_counter()
        solver.solve(parallel.rf.problem.U, G)
        total = time.perf_counter() - start
        parts.append((total - inside.seconds, total))
    outside, total = (statistics.median(part) for part in zip(*parts, strict=True))
    return [
        row("c", f"{integrator}: time of MGRIT outside the propagators / all of it", outside, total, steps, 0.15, True),
        *rows,
    ]


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
    out = Table(title="ratios, one rank; ms are per time step", expand=False)
    for name in ("", "what", "ours ms", "other ms", "ratio", "target", "met", ""):
        out.add_column(
            name, justify="right" if name in ("ours ms", "other ms", "ratio", "target") else "left", overflow="fold"
        )
    for r in rows:
        target = "" if r.target is None else f"{'<=' if r.at_most else '>='} {r.target:g}"
        met = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[r.met]
        out.add_row(r.section, r.what, f"{r.ours:.3g}", f"{r.theirs:.3g}", f"{r.ratio:.3g}", target, met, r.note)
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
        ("cycles", lambda: cycle(steps, "BackwardEuler", repeats) + cycle(steps, "SDIRK2", repeats)),
        (
            "against pyadjoint",
            lambda: against_pyadjoint(steps, repeats, hessians, lambda text: console.print(f"  {text}")),
        ),
    ):
        console.print(f"{what} ...")
        rows += part()
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
