"""MGRIT beside sequential stepping with the same factorisations, on one time rank and on two.

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
DISCRETISATION = 4  # times as many steps make the reference of the time discretisation's error


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
    alone = SpaceTime("1x1", comm=COMM_SELF)
    ranks, grid = comm.size, SpaceTime((1, comm.size), comm=comm)
    serial = Case(STEPS, alone, time_solver="serial")
    one = Case(STEPS, alone, mgrit={"rtol": 1e-6})
    many = Case(STEPS, grid, mgrit={"rtol": 1e-6})
    # what the time discretisation itself is wrong by, over all points
    fine = Case(DISCRETISATION * STEPS, alone, time_solver="serial")
    fine.state()
    serial.state()
    norm = np.linalg.norm
    reference = fine.problem.U[::DISCRETISATION]
    error = norm(serial.problem.U - reference) / norm(reference)
    del fine, reference
    rough = Case(STEPS, grid, mgrit={"coarsening": 16, "levels": 2, "residual": "none", "max_it": 1})
    out, plural = [], "s" * (ranks > 1)
    lo, hi = many.sweeps.slab.lo, many.sweeps.slab.hi
    for kind in ("state", "adjoint"):
        actions = [(getattr(serial, kind), True), (getattr(many, kind), False), (getattr(rough, kind), False)]
        if ranks > 1:
            actions.append((getattr(one, kind), True))
        sequential, parallel, at_discretisation, *on_one = together(comm, *actions, repeats=repeats)
        name = "U" if kind == "state" else "L"
        own = slice(lo, hi + 1)
        exact = comm.bcast(getattr(serial.problem, name))
        differ = lambda case: _norm(comm, getattr(case.problem, name)[1:] - exact[own][1:]) / norm(exact)  # noqa: B023
        done = many.last
        note = f"{done.cycles} cycles, factor {done.factor:.3f}, error {differ(many):.0e}"
        target = {1: 3.0, 2: 1.7}.get(ranks)
        what = f"SDIRK2, {STEPS} steps, {kind}: MGRIT to 1e-6 on {ranks} rank{plural} / sequential"
        out.append(row("e", what, parallel, sequential, STEPS, target, True, note))
        reached = differ(rough)
        note = f"{rough.last.cycles} cycle, error {reached:.0e}, the state's time discretisation {error:.0e}: "
        note += f"ratio {reached / error:.2f}" + ("" if reached < error else ", NOT at that accuracy")
        what = f"SDIRK2, {STEPS} steps, {kind}: to the discretisation's accuracy on {ranks} rank{plural} / sequential"
        target = 1.0 if ranks > 1 else None
        out.append(row("e", what, at_discretisation, sequential, STEPS, target, True, note))
        if ranks > 1:
            same = f"{done.cycles} cycles each" if comm.rank or one.last.cycles == done.cycles else "OTHER cycles"
            what = f"SDIRK2, {STEPS} steps, {kind}: one rank / {ranks} ranks"
            out.append(row("e", what, parallel, on_one[0], STEPS, 1.8 if ranks == 2 else None, False, same))
    if ranks == 1:
        out += [_bookkeeping(integrator, repeats) for integrator in ("BackwardEuler", "SDIRK2")]
    return [vars(r) for r in out]


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
