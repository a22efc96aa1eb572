"""ParaDiag beside sequential stepping, MGRIT, and itself on another number of ranks: heat, a cavity without losses, and
the lossy box of :mod:`problems.maxwell_source`.

``mpiexec -n 2 python -m tests.benchmarks.paradiag --out FILE.json`` measures on the ranks it is given; ``make bench``
calls that. Sequential stepping runs on the first rank alone, in turn with the parallel solves.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from firedrake import COMM_SELF, dx, inner
from mpi4py import MPI

from pint_fem.adjoint import TimeParallelReducedFunctional
from pint_fem.misfits import RunningMisfit
from pint_fem.spacetime import SpaceTime
from problems.heat_square import field, square
from problems.maxwell_source import maxwell_source
from tests.benchmarks.maxwell import COARSENING
from tests.benchmarks.rows import Row, row, write_rows
from tests.benchmarks.time_parallel import together
from tests.cavity import cavity

__all__ = ["rows"]

HEAT_STEPS, CAVITY_STEPS, LOSSY_STEPS, CELLS = 512, 256, 64, 32


class Case:
    """Sweeps of a functional at a control's coefficients, from cold."""

    def __init__(self, rf: TimeParallelReducedFunctional, z: np.ndarray):
        self.rf, self.problem, self.sweeps, self.z, self.scale = rf, rf.problem, rf.problem.sweeps, z, 1.0

    def state(self, **accuracy) -> None:
        """The state sweep."""
        self.sweeps.state(self.z, self.problem.U, cold=True, **accuracy)

    def invert(self) -> None:
        """A trust-region minimisation from zero."""
        self.problem.invalidate()
        start = self.rf.function(0 * self.z)
        self.x = self.rf.minimize_trust_region(start, gtol_rel=1e-3, preconditioner="limited-memory").x

    def gradient(self) -> None:
        """State and adjoint at a new control."""
        self.problem.invalidate()
        self.scale *= 1.01
        self.g = self.problem.derivative(self.scale * self.z)


def heat(spacetime: SpaceTime, **parameters) -> Case:
    """Heat conduction, P1 on 64 x 64, backward Euler."""
    rf = square(HEAT_STEPS, "BackwardEuler", spacetime=spacetime, **parameters)
    return Case(rf, field(rf, "control"))


def waves(spacetime: SpaceTime, **parameters) -> Case:
    """The cavity on 32 x 32, implicit midpoint rule, CFL number one."""
    ev = cavity(spacetime.space_comm, n=CELLS, steps=CAVITY_STEPS)
    misfit = RunningMisfit(inner(ev.u, ev.u) * dx)
    q = ev.control
    rf = TimeParallelReducedFunctional(
        ev, misfit, regularisation=1e-3 * inner(q, q) * dx, spacetime=spacetime, solver_parameters=parameters
    )
    return Case(rf, rf.array(rf.controls[0].control))


def lossy(spacetime: SpaceTime, **parameters) -> Case:
    """The lossy box, at its true current."""
    posed = maxwell_source(spacetime, regime="lossy", steps=LOSSY_STEPS, solver_parameters=parameters)
    return Case(posed.rf, posed.rf.array(posed.true_current))


#: Options of an iteration in single precision.
SINGLE = {"alpha": 1e-4, "precision": "single"}
#: Name, problem, steps, alpha, and options of MGRIT where it contracts.
CASES = (
    ("heat", heat, HEAT_STEPS, 1e-7, {}),
    ("cavity", waves, CAVITY_STEPS, 1e-4, None),
    ("lossy Maxwell", lossy, LOSSY_STEPS, 1e-7, COARSENING),
)


def rows(repeats: int, comm=MPI.COMM_WORLD) -> list[dict]:
    """Ratios on the ranks of ``comm``, as dictionaries of :class:`Row` (of the first rank)."""
    out, alone, grid = [], SpaceTime("1x1", comm=COMM_SELF), SpaceTime((1, comm.size), comm=comm)
    ranks, plural = comm.size, "s" * (comm.size > 1)
    for name, pose, steps, alpha, mgrit in CASES:
        options = {"alpha": alpha, "rtol": 1e-8}
        serial = pose(alone, time_solver="serial")
        many = pose(grid, time_solver="paradiag", paradiag=options)
        comm.Barrier()
        begin = time.perf_counter()
        many.state(cycles=1)  # makes the factors
        first = time.perf_counter() - begin
        fast = pose(grid, time_solver="paradiag", paradiag=SINGLE)
        fast.state(cycles=1)
        iteration, done = lambda: many.state(cycles=1), lambda: many.state()  # noqa: B023
        actions = [(serial.state, True), (iteration, False), (done, False), (lambda: fast.state(cycles=1), False)]  # noqa: B023
        if ranks > 1:
            one = pose(alone, time_solver="paradiag", paradiag=options)
            if comm.rank == 0:
                one.state(cycles=1)
            actions += [(lambda: one.state(cycles=1), True)]  # noqa: B023
        sequential, single, solved, quick, *on_one = together(comm, *actions, repeats=repeats)
        result = many.sweeps.results[-1][1]
        systems = many.sweeps.solvers.tangent._frequency_solve.__self__
        where = f"on {ranks} rank{plural} / sequential"
        for case, seconds, precision, target in (
            (fast, quick, "single", {1: 1.5, 2: 0.8}.get(ranks)),
            (many, single, "double", None),
        ):
            its = case.sweeps.solvers.tangent
            size = its._frequency_solve.__self__.bytes / 1e6
            note = f"alpha {its.options.alpha:g}, residual after it {residual(case):.0e}; factors {size:.0f} MB"
            what = f"ParaDiag, {name}, {steps} steps: an iteration in {precision} precision {where}"
            out.append(row("f", what, seconds, sequential, steps, target, True, note))
        note = f"{result.cycles} iterations"
        what = f"ParaDiag, {name}, {steps} steps: to 1e-8 {where}"
        out.append(row("f", what, solved, sequential, steps, None, True, note))
        what = f"ParaDiag, {name}, {steps} steps: factorisations (once) {where}"
        out.append(row("f", what, first - single, sequential, steps, None, True, f"{systems.factorisations} a rank"))
        if ranks > 1:
            what = f"ParaDiag, {name}, {steps} steps: an iteration on one rank / {ranks} ranks"
            out.append(row("f", what, single, on_one[0], steps, 1.7 if ranks == 2 else None, False))
            cases = {"paradiag to 1e-8": many}
            if mgrit is not None:
                cases["mgrit to 1e-8"] = pose(grid, time_solver="mgrit", mgrit={"rtol": 1e-8, **mgrit})
            out += gradients(name, comm, serial, cases, steps, repeats)
    return [vars(r) for r in out]


def residual(case: Case) -> float:
    """Relative residual after one iteration from zero."""
    case.state(cycles=1)
    result = case.sweeps.results[-1][1]
    return result.residuals[-1] / result.scale


def gradients(name: str, comm, serial: Case, cases: dict[str, Case], steps: int, repeats: int) -> list[Row]:
    """Gradient and inversion by each time solver, beside sequential stepping on one rank."""
    out = []
    for task, of, count in (("gradient", "g", repeats), ("invert", "x", 1)):
        actions = [(getattr(serial, task), True), *((getattr(case, task), False) for case in cases.values())]
        sequential, *seconds = together(comm, *actions, repeats=count)
        exact = comm.bcast(getattr(serial, of) if comm.rank == 0 else None)
        title = {"gradient": "J and gradient", "invert": "inversion"}[task]
        for (solver, case), each in zip(cases.items(), seconds, strict=True):
            note = f"differs by {np.linalg.norm(getattr(case, of) - exact) / np.linalg.norm(exact):.0e}"
            what = f"{name}, {steps} steps: {title}, {solver} on {comm.size} ranks / serial on one"
            out.append(row("f", what, each, sequential, steps, None, True, note))
    return out


if __name__ == "__main__":
    sys.exit(write_rows("tests.benchmarks.paradiag", rows))
