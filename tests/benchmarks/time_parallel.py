"""MGRIT beside sequential stepping with the same kernels, on one time rank and on two.

``mpiexec -n 2 python -m tests.benchmarks.time_parallel --out FILE.json`` measures on the ranks it is given; ``make
bench`` calls that. Sequential stepping runs on the first rank alone, in turn with the parallel solves, while the
others wait; all solves start cold. Times are the best of the repeats: two processes that work at once are slowed by
whatever else the machine does at any moment of either.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from firedrake import COMM_SELF
from mpi4py import MPI

from pint_fem.adjoint import TimeParallelReducedFunctional
from pint_fem.spacetime import SpaceTime
from problems.heat_square import field, square
from tests.benchmarks.rows import Row, Stopwatch, row, write_rows

__all__ = ["rows", "together"]

STEPS = 512
DISCRETISATION = 2
"""So many times as many steps make the reference of the time discretisation's error."""
TWO_LEVELS = {"levels": 2, "relax": "F"}
ONE_CYCLE = {"residual": "none", "max_it": 1}


@dataclass(frozen=True)
class Setting:
    """Steps with options and the ratios that are required, on one rank and on two."""

    steps: int
    accurate: dict
    rough: dict
    targets: tuple[float, float]
    rough_targets: tuple[float, float] = (0.5, 0.3)


SETTINGS = (
    Setting(STEPS, TWO_LEVELS | {"coarsening": 32, "coarse_steps": 3},
            TWO_LEVELS | ONE_CYCLE | {"coarsening": 32, "coarse_steps": 2}, (0.75, 0.45)),
    Setting(4096, TWO_LEVELS | {"coarsening": 64, "coarse_steps": 2},
            TWO_LEVELS | ONE_CYCLE | {"coarsening": 128, "coarse_steps": 3}, (0.55, 0.3)),
)  # fmt: skip
"""Options of solves to 1e-6 and of solves to the accuracy of the time discretisation."""


class Case:
    """State and adjoint sweeps of the benchmark problem at a control, from cold."""

    def __init__(self, steps: int, spacetime: SpaceTime, integrator: str = "SDIRK2", **parameters):
        self.rf: TimeParallelReducedFunctional = square(steps, integrator, spacetime=spacetime, **parameters)
        self.problem, self.sweeps = self.rf.problem, self.rf.problem.sweeps
        self.z = field(self.rf, "control")

    def state(self) -> None:
        """The state sweep."""
        self.problem.U[:] = self.sweeps.initial
        self.sweeps.state(self.z, self.problem.U, cold=True)

    @cached_property
    def gradient(self) -> np.ndarray:
        """The adjoint's right-hand side, of the state that is there when it is first asked for."""
        return self.problem.misfits[0].gradient(self.problem.U)

    def adjoint(self) -> None:
        """The adjoint sweep, given the misfit's gradient."""
        self.problem.L[:] = 0
        self.sweeps.adjoint(self.z, self.problem.U, self.gradient, self.problem.L, cold=True)

    @property
    def last(self):
        """Result of the last sweep."""
        return self.sweeps.results[-1][1]


def together(comm, *actions: tuple[Callable[[], None], bool], repeats: int) -> list[float]:
    """Least seconds of actions that take turns; ``(action, alone)``: on the first rank only, or on all."""
    seconds = [[] for _ in actions]
    for repeat in range(repeats + 1):
        for (action, alone), out in zip(actions, seconds, strict=True):
            comm.Barrier()
            start = time.perf_counter()
            if comm.rank == 0 or not alone:
                action()
            comm.Barrier()
            if repeat:  # the first one warms up
                out.append(time.perf_counter() - start)
    return [min(out) for out in seconds]


def rows(repeats: int, comm=MPI.COMM_WORLD) -> list[dict]:
    """Ratios on the ranks of ``comm``, as dictionaries of :class:`Row` (of the first rank)."""
    out = [r for setting in SETTINGS for r in _setting_rows(setting, repeats, comm)]
    if comm.size == 1:
        out += [_bookkeeping(integrator, repeats) for integrator in ("BackwardEuler", "SDIRK2")]
    return [vars(r) for r in out]


def _setting_rows(setting: Setting, repeats: int, comm) -> list[Row]:
    """State and adjoint of one number of steps."""
    alone, grid = SpaceTime("1x1", comm=COMM_SELF), SpaceTime((1, comm.size), comm=comm)
    steps, ranks, out = setting.steps, comm.size, []
    serial = Case(steps, alone, time_solver="serial")
    one = Case(steps, alone, mgrit={"rtol": 1e-6, **setting.accurate})
    many = Case(steps, grid, mgrit={"rtol": 1e-6, **setting.accurate})
    rough = Case(steps, grid, mgrit=setting.rough)
    serial.state()
    error = _discretisation_error(serial, alone)
    lo, hi = many.sweeps.slab.lo, many.sweeps.slab.hi
    for kind in ("state", "adjoint"):
        actions = [(getattr(serial, kind), True), (getattr(many, kind), False), (getattr(rough, kind), False)]
        if ranks > 1:
            actions.append((getattr(one, kind), True))
        sequential, parallel, at_discretisation, *on_one = together(comm, *actions, repeats=repeats)
        name = "U" if kind == "state" else "L"
        exact = getattr(serial.problem, name)
        comm.Bcast(exact)
        own, norm = exact[lo : hi + 1], np.linalg.norm
        differ = lambda case: _norm(comm, getattr(case.problem, name)[1:] - own[1:]) / norm(exact)  # noqa: B023
        done, where = many.last, f"on {ranks} rank{'s' * (ranks > 1)} / sequential"
        say = lambda options: f"m = {options['coarsening']}, {options['coarse_steps']} coarse steps"
        note = f"{say(setting.accurate)}: {done.cycles} cycles, error {differ(many):.0e}"
        target = dict(enumerate(setting.targets, 1)).get(ranks)
        what = f"SDIRK2, {steps} steps, {kind}: MGRIT to 1e-6 {where}"
        out.append(row("e", what, parallel, sequential, steps, target, True, note))
        reached = differ(rough)
        note = f"{say(setting.rough)}: {rough.last.cycles} cycle, error {reached:.0e}, the state's time discretisation "
        note += f"{error:.0e}: ratio {reached / error:.2f}" + ("" if reached < error else ", NOT at that accuracy")
        what = f"SDIRK2, {steps} steps, {kind}: to the discretisation's accuracy {where}"
        target = dict(enumerate(setting.rough_targets, 1)).get(ranks)
        out.append(row("e", what, at_discretisation, sequential, steps, target, True, note))
        if ranks > 1:
            same = f"{done.cycles} cycles each" if comm.rank or one.last.cycles == done.cycles else "OTHER cycles"
            what = f"SDIRK2, {steps} steps, {kind}: one rank / {ranks} ranks"
            out.append(row("e", what, parallel, on_one[0], steps, None, False, same))
    return out


def _discretisation_error(case: Case, alone: SpaceTime) -> float:
    """What the time discretisation of a solved state is wrong by, relative, over all points."""
    fine = Case(DISCRETISATION * (len(case.problem.U) - 1), alone, time_solver="serial")
    fine.state()
    reference = fine.problem.U[::DISCRETISATION]
    return float(np.linalg.norm(case.problem.U - reference) / np.linalg.norm(reference))


def _norm(comm, block: np.ndarray) -> float:
    return float(np.sqrt(comm.allreduce(float(np.vdot(block, block)))))


def _bookkeeping(integrator: str, repeats: int) -> Row:
    """Time of the cycles over the time of their propagator calls."""
    case = Case(STEPS, SpaceTime("1x1", comm=COMM_SELF), integrator, mgrit={"rtol": 1e-10})
    solver, inside = case.sweeps.solvers.state, Stopwatch()
    for level in solver.levels:
        for name in ("step", "advance", "sweep"):
            setattr(level.propagator, name, inside.wrap(getattr(level.propagator, name)))
    G = case.sweeps.propagators[0].forcing(case.sweeps.data(case.z))
    parts = []
    for _ in range(repeats + 1):
        U = np.zeros_like(case.problem.U)
        inside.seconds = 0.0
        start = time.perf_counter()
        solver.solve(U, G, start="guess")
        parts.append((time.perf_counter() - start, inside.seconds))
    total, calls = (statistics.median(p) for p in zip(*parts[1:], strict=True))
    note = f"{integrator}, {STEPS} steps: V-cycles / their propagator calls"
    return row("c", note, total, calls, STEPS, 1.10, True)


if __name__ == "__main__":
    sys.exit(write_rows("tests.benchmarks.time_parallel", rows))
