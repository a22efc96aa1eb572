"""Optimisers on the heat source inversion, side by side: cycles, seconds, J and the gradient's norm; and how Newton and
conjugate gradient iterations depend on the mesh, the steps and the regularisation.

    python -m tests.benchmarks.optimisers [--steps 64] [--tape "TAO lmvm" L-BFGS-B] [--scaling]
    mpiexec -n 2 python -m tests.benchmarks.optimisers           (without serial pyadjoint)
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from firedrake import (
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    UnitSquareMesh,
    dot,
    dx,
    exp,
    grad,
    inner,
)
from firedrake.adjoint import Control, MinimizationProblem, ReducedFunctional, TAOSolver, minimize
from irksome import Dt
from pyadjoint.optimization.optimization import SciPyConvergenceError
from pyadjoint.optimization.tao_solver import TAOConvergenceError
from rich.console import Console
from rich.table import Table

import pint_fem as pf
from pint_fem.kernels.arrays import get
from problems.heat_source import heat_source
from problems.serial_minimise import minimise
from problems.serial_pyadjoint import serial_heat_source

__all__ = ["LEARNED", "TAPE", "Outcome", "iterations_table", "outcomes", "outcomes_table"]

RTOL, GTOL = 1e-9, 1e-8
LBFGS = {"maxiter": 200, "ftol": 1e-15, "gtol": 1e-7, "maxcor": 40}
LEARNED = {"preconditioner": "limited-memory", "preconditioner_memory": 40}
"""Preconditioner of the demo's inversion."""
LOW_RANK = {"preconditioner": "low-rank"}


@dataclass
class Outcome:
    """What an optimiser did.

    Attributes
    ----------
    name : str
    J, gradient_norm : float
        At the point found, solved to ``RTOL``; the norm is that of the regularisation's inner product.
    cycles, solves : int
        MGRIT cycles; sweeps of any kind.
    iterations : str
    seconds : float
    """

    name: str
    J: float
    gradient_norm: float
    cycles: int
    solves: int
    iterations: str
    seconds: float


def _with_tao(rf, kind: str, **options):
    """TAO through pyadjoint; the number of its iterations."""
    parameters = {"tao_type": kind, "tao_gatol": 0.0, "tao_grtol": 0.0, "tao_gttol": GTOL, "tao_max_it": 300, **options}
    solver = TAOSolver(MinimizationProblem(rf), parameters, comm=rf.spacetime.space_comm)
    try:
        solution = solver.solve()
    except (TAOConvergenceError, AttributeError):  # this pyadjoint does not find petsc4py's names of reasons
        solution = Function(rf.evolution.V)
        solution._ad_from_petsc(solver.x)
    return rf.array(solution), f"{solver.tao.getIterationNumber()}"


def _trust_region(rf, **options):
    result = rf.minimize_trust_region(gtol_rel=GTOL, max_it=40, **options)
    return result.x, f"{result.iterations} ({sum(r.cg_iterations for r in result.history)} CG)"


def _one_shot(rf):
    result = rf.minimize_one_shot(gtol_rel=GTOL, max_it=600, residual_tol=1e-6, memory=40)
    return result.x, f"{result.iterations}"


def _lbfgs(rf):
    result = rf.minimize_scipy(method="L-BFGS-B", options=LBFGS)
    return result.x, f"{result.nit}"


TAPE = ("TAO lmvm", "L-BFGS-B")
"""Optimisers of serial pyadjoint, on one rank: minutes, and a quarter of an hour."""


def outcomes(spacetime, steps: int, *, say: Callable[[str], None], tape: Sequence[str] = TAPE[:1]) -> list[Outcome]:
    """All optimisers from zero on the shipped plate and readings, and those of :data:`TAPE` that are asked for."""
    stcg = {"tao_bnk_ksp_type": "stcg"}
    runs = [
        ("trust region, exact", _trust_region, {}),
        ("  with learned preconditioner", partial(_trust_region, **LEARNED), {}),
        ("trust region, inexact", partial(_trust_region, inexact=True), {}),
        ("  with learned preconditioner", partial(_trust_region, inexact=True, **LEARNED), {}),
        ("trust region, exact, low-rank", partial(_trust_region, **LOW_RANK), {}),
        ("one-shot", _one_shot, {}),
        ("L-BFGS-B (scipy)", _lbfgs, {}),
        ("TAO bntr", lambda rf: _with_tao(rf, "bntr", **stcg), {}),
        ("learned, time_solver serial", partial(_trust_region, **LEARNED), {"time_solver": "serial"}),
    ]
    judge = heat_source(spacetime, steps=steps, solver_parameters={"time_solver": "serial"}).rf
    found = []
    for name, run, solver in runs:
        rf = heat_source(spacetime, steps=steps, solver_parameters={"mgrit": {"rtol": RTOL}, **solver}).rf
        start = time.perf_counter()
        z, iterations = run(rf)
        seconds, counts = time.perf_counter() - start, rf.problem.sweeps.counts
        solves = sum(counts[kind] for kind in ("state", "adjoint", "tangent"))
        found.append(Outcome(name, *_at(judge, z), counts["cycles"], solves, iterations, seconds))
        say(f"{name.strip()}: {seconds:.1f} s")
    if tape:
        found += _on_tape(judge, steps, tape, say)
    return found


def _at(judge, z: np.ndarray) -> tuple[float, float]:
    """J and the gradient's norm at a point, solved sequentially."""
    g = judge.inner.primal(judge.problem.derivative(z))
    return judge.problem.value(z), float(np.sqrt(judge.inner.inner(g, g)))


def _on_tape(judge, steps: int, optimisers: Sequence[str], say) -> list[Outcome]:
    """pyadjoint's own optimisers on a tape, serial in time: TAO's LMVM in the prior's inner product, and scipy's
    L-BFGS-B, which knows no inner product.
    """
    serial, runs = serial_heat_source(steps=steps, integrator="SDIRK2"), []
    if "TAO lmvm" in optimisers:
        result = minimise(serial, gttol=GTOL, printer=None)
        runs.append(("TAO lmvm", get(result.control), result.iterations, result.seconds))
    if "L-BFGS-B" in optimisers:
        rf = ReducedFunctional(serial.rf.functional, Control(serial.q, riesz_map="l2"), tape=serial.rf.tape)
        rf(Function(serial.q.function_space()))  # from zero
        start, seen = time.perf_counter(), []
        try:
            minimize(rf, method="L-BFGS-B", options=LBFGS, callback=lambda y: seen.append(y.copy()))
        except SciPyConvergenceError:  # most iterations done: the last iterate counts
            pass
        runs.append(("L-BFGS-B", seen[-1], len(seen), time.perf_counter() - start))
    out = []
    for name, z, iterations, seconds in runs:
        say(f"serial pyadjoint, {name}: {seconds:.1f} s")
        out.append(Outcome(f"serial pyadjoint + {name}", *_at(judge, z), 0, 0, f"{iterations}", seconds))
    return out


def outcomes_table(found: list[Outcome], title: str) -> Table:
    """What is printed; "fewer" is the cycles of the first row over a row's own."""
    out = Table(title=title)
    for name in ("", "iterations", "sweeps", "cycles", "fewer", "seconds", "J", "J - best", "|g|"):
        out.add_column(name, justify="left" if not name else "right")
    best = min(o.J for o in found)
    for o in found:
        fewer = f"{found[0].cycles / o.cycles:.1f}" if o.cycles else ""
        work = (str(o.solves), str(o.cycles or ""), fewer) if o.solves else ("", "", "")
        out.add_row(o.name, o.iterations, *work, f"{o.seconds:.1f}", f"{o.J:.9f}", f"{o.J - best:.0e}",
                    f"{o.gradient_norm:.1e}")  # fmt: skip
    return out


# -- iterations over mesh, steps and regularisation ------------------------------------------------------------------
def _inversion(n: int, steps: int, alpha: float, *, linear: bool) -> pf.TimeParallelReducedFunctional:
    """Source from the temperature in the square; not linear: conductivity 1 + u^2."""
    st = pf.SpaceTime("1x1")
    mesh = st.mesh(UnitSquareMesh, n, n)
    V = FunctionSpace(mesh, "CG", 1)
    u, v, q, (x, y) = Function(V), TestFunction(V), Function(V), SpatialCoordinate(mesh)
    kappa = 1 if linear else 1 + u**2
    F = Dt(u) * v * dx + kappa * dot(grad(u), grad(v)) * dx + u * v * dx - 20 * q * v * dx
    ev = pf.Evolution(F, u, tableau=pf.SDIRK2(), dt=0.2 / steps, nsteps=steps, control=q)
    target = exp(-20 * ((x - 0.3) ** 2 + (y - 0.6) ** 2)) - 0.5 * exp(-30 * ((x - 0.7) ** 2 + (y - 0.4) ** 2))
    return pf.TimeParallelReducedFunctional(
        ev, pf.RunningMisfit((u - target) ** 2 * dx),
        regularisation=0.5 * alpha * (inner(grad(q), grad(q)) + q * q) * dx,
        spacetime=st, riesz_map="H1", solver_parameters={"time_solver": "serial"},
    )  # fmt: skip


def _count(rf, **options) -> str:
    start = time.perf_counter()
    result = rf.minimize_trust_region(gtol_rel=1e-8, max_it=60, cg_max_it=300, **options)
    seconds, cg = time.perf_counter() - start, sum(r.cg_iterations for r in result.history)
    probed = re.search(r"by (\d+) directions", result.preconditioner)
    directions = f", {probed[1]} directions" if probed else ""
    ended = "" if result.converged else f" ({result.reason.value})"
    return f"{result.iterations} + {cg}{directions}, {seconds:.1f} s{ended}"


def iterations_table(say: Callable[[str], None]) -> Table:
    """Newton + CG iterations to a gradient smaller by 1e-8; directions whose products the low-rank preconditioner took
    beside these, and seconds.
    """
    out = Table(title="Newton + CG iterations; alpha 1e-4, 16 x 16 cells, 16 steps where not said")
    names = ("", "linear", "  low-rank", "conductivity 1 + u^2", "  with learned preconditioner", "  low-rank")
    for name in names:
        out.add_column(name)
    cases = [(f"{n} x {n} cells", n, 16, 1e-4) for n in (8, 16, 32)]
    cases += [(f"{steps} steps", 16, steps, 1e-4) for steps in (16, 32, 64)]
    cases += [(f"alpha {alpha:.0e}", 16, 16, alpha) for alpha in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)]
    for name, n, steps, alpha in cases:
        counts = []
        for linear, options in ((True, ({}, LOW_RANK)), (False, ({}, LEARNED, LOW_RANK))):
            counts += [_count(_inversion(n, steps, alpha, linear=linear), **chosen) for chosen in options]
        out.add_row(name, *counts)
        say(f"{name}: " + ", ".join(counts))
    return out


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.optimisers", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--tape", nargs="*", choices=TAPE, default=TAPE[:1], help="optimisers of serial pyadjoint")
    parser.add_argument("--scaling", action="store_true", help="the table of iterations instead")
    args = parser.parse_args(argv)
    spacetime = pf.SpaceTime()
    console = Console(width=None if sys.stdout.isatty() else 150, quiet=not spacetime.is_root)
    say = lambda text: console.print(f"  {text}")
    if args.scaling:
        console.print(iterations_table(say))
        return 0
    found = outcomes(spacetime, args.steps, tape=args.tape if spacetime.comm.size == 1 else (), say=say)
    ranks = "one rank" if spacetime.comm.size == 1 else f"{spacetime.comm.size} ranks in time"
    console.print(outcomes_table(found, f"heat source inversion, {args.steps} SDIRK2 steps, {ranks}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
