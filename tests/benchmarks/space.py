"""Two ranks in space over one: set-up, state and gradient of heat conduction at sizes where one rank is outgrown.

``mpiexec -n 2 python -m tests.benchmarks.space [--cases small]`` poses each problem on one rank (the other waits
without load) and then on all ranks in space, each with the package's default solvers, in the same run. Times are
medians.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import numpy as np
from firedrake import (
    DirichletBC,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    UnitCubeMesh,
    UnitSquareMesh,
    dx,
    grad,
    inner,
    sin,
)
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from tests.benchmarks.rows import row

CASES = {
    "cube 32": (UnitCubeMesh, 3, 32),
    "cube 48": (UnitCubeMesh, 3, 48),
    "square 512": (UnitSquareMesh, 2, 512),
}
SMALL = {"cube 8": (UnitCubeMesh, 3, 8), "square 16": (UnitSquareMesh, 2, 16)}
GOALS = {"cube 32": 1.2, "cube 48": 1.5, "square 512": 1.5}
"""Least ratios of one rank's time over that of two that the project aims at."""
DT = 1e-3


def posed(spacetime, make, dim, cells, steps):
    """The functional, a control, and the seconds that posing took without the mesh."""
    mesh = spacetime.mesh(make, *[cells] * dim)
    V = FunctionSpace(mesh, "CG", 1)
    u, v, q, x = Function(V), TestFunction(V), Function(V), SpatialCoordinate(mesh)
    F = Dt(u) * v * dx + inner(grad(u), grad(v)) * dx - q * v * dx
    begin = time.perf_counter()
    heat = pf.Evolution(F, u, tableau=pf.BackwardEuler(), dt=DT, nsteps=steps, control=q, bcs=DirichletBC(V, 0, 1))
    misfit = pf.RunningMisfit(inner(u - x[0], u - x[0]) * dx)
    given = dict(regularisation=1e-4 * q**2 * dx, spacetime=spacetime, solver_parameters={"time_solver": "serial"})
    J = pf.TimeParallelReducedFunctional(heat, misfit, **given)
    spacetime.comm.Barrier()
    return J, Function(V).interpolate(sin(3 * x[0]) * x[1]), time.perf_counter() - begin


def measured(spacetime, case, steps, repeats):
    """Seconds of posing, and of a state and a gradient; J and the squared norm of the gradient's coefficients."""
    posed(spacetime, *case, steps)  # compiles
    J, q, setup = posed(spacetime, *case, steps)
    states, gradients = [], []
    for k in range(repeats + 1):
        control = Function(q.function_space()).assign((1 + 0.1 * k) * q)
        a = time.perf_counter()
        value = J(control)
        b = time.perf_counter()
        derivative = J.derivative()
        c = time.perf_counter()
        states.append(b - a)
        gradients.append(c - b)
    own = float(np.sum(derivative.dat.data_ro ** 2))
    norm = spacetime.space_comm.allreduce(own)
    solver = next(iter(J.problem.sweeps.propagators[0].factors.values())).description
    return {
        "setup": setup, "state": median(states[1:]), "gradient": median(gradients[1:]), "J": value, "norm": norm,
        "unknowns": q.function_space().dim(), "solver": solver,
    }  # fmt: skip


def alone(comm, work):
    """What the first rank returns for ``work``, while the others wait without load."""
    found = work() if comm.rank == 0 else None
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.05)
    return comm.bcast(found)


def compared(name, case, steps, repeats, out):
    """Measure a case on one rank and on all of them."""
    comm = MPI.COMM_WORLD
    one = alone(comm, lambda: measured(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), case, steps, repeats))
    many = measured(pf.SpaceTime(space=comm.size, time=1), case, steps, repeats)
    ratios = {key: one[key] / many[key] for key in ("setup", "state", "gradient")}
    if comm.rank == 0:
        print(f"{name}: {one['unknowns']} unknowns, backward Euler, {steps} steps, ranks in space 1 and {comm.size}")
        for key in ("setup", "state", "gradient"):
            scale, unit = (1, "s") if key == "setup" else (1e3 / steps, "ms a step")
            print(f"  {key}: {one[key] * scale:.3g} and {many[key] * scale:.3g} {unit}: {ratios[key]:.2f}", flush=True)
        apart = [abs(many[key] / one[key] - 1) for key in ("J", "norm")]
        print(f"  J differs by {apart[0]:.1e}, the squared norm of the gradient by {apart[1]:.1e}")
        print(f"  one rank: {one['solver']}\n  {comm.size} ranks: {many['solver']}", flush=True)
    out[name] = {"one": one, "many": many, "ratios": ratios, "goal": GOALS.get(name)}


def rows_of(name, found, steps):
    """The ratios of a case, two ranks beside one."""
    one, many = found["one"], found["many"]
    return [
        row("r", f"{name}, {key}: ranks in space over one", many[key], one[key], steps, found["goal"], at_most=False)
        for key in ("state", "gradient")
    ]


def main():
    """Measure the cases and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="all", help="'all', 'small' (for tests), or names separated by commas")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the smallest case only")
    parser.add_argument("--details", type=Path, help="JSON file of all figures")
    parser.add_argument("--out", type=Path, help="JSON file of the ratios, for the table of all benchmarks")
    args = parser.parse_args()
    every = CASES | SMALL
    largest = list(CASES)[: 1 if args.quick else None]
    names = {"all": largest, "small": list(SMALL)}.get(args.cases, args.cases.split(","))
    if unknown := [name for name in names if name not in every]:
        parser.error(f"cases {', '.join(unknown)}: give some of {', '.join(every)}")
    out = {}
    for name in names:
        compared(name, every[name], args.steps, args.repeats, out)
    if MPI.COMM_WORLD.rank == 0:
        if args.details:
            args.details.write_text(json.dumps(out, indent=1))
        if args.out:
            args.out.write_text(json.dumps([vars(r) for name in names for r in rows_of(name, out[name], args.steps)]))


if __name__ == "__main__":
    main()
