"""Linear inverse problems by the map from controls to readings, beside the inexact trust region by sequential sweeps.

``mpiexec -n 2 python -m tests.benchmarks.linear_inverse --out FILE.json`` measures the plate and both Maxwell boxes of
the demos on the ranks it is given; ``make bench`` calls that on one rank and on two. The trust region, with its learned
preconditioner, runs on the first rank alone while the others wait, once, as does one gradient of serial pyadjoint. By
the map: map, posterior, its mean and the standard deviation of every coefficient, from cold in the first repeat.

``mpiexec -n 4 python -m tests.benchmarks.linear_inverse --box`` inverts for the source in a three-dimensional box on 2
ranks in space and 2 in time, and prints the memory that is stated before the run beside the memory that is used.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
from firedrake import (
    COMM_SELF,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    UnitCubeMesh,
    dot,
    dx,
    exp,
    grad,
    inner,
)
from firedrake.petsc import PETSc
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from problems.heat_source import heat_source
from problems.maxwell_source import maxwell_source
from problems.serial_pyadjoint import serial_heat_source
from tests.benchmarks.optimisers import LEARNED
from tests.benchmarks.rows import Row, write_rows

__all__ = ["box", "rows"]

SERIAL = {"time_solver": "serial", "mgrit": {"rtol": 1e-9}}
PROBLEMS = {
    "plate": lambda grid: heat_source(grid, solver_parameters=SERIAL),
    "lossy box": lambda grid: maxwell_source(grid, regime="lossy", solver_parameters=SERIAL),
    "cavity": lambda grid: maxwell_source(grid, regime="cavity", solver_parameters=SERIAL),
}
TARGET, TWO_RANKS, NEW_READINGS = 0.25, 1.8, 10e-3


def by_map(rf) -> object:
    """The posterior with the standard deviation, from nothing but the functional."""
    posterior = rf.parameter_to_observable().posterior()
    posterior.variance()
    return posterior


def seconds(comm, action: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of an action on all ranks of a communicator."""
    out = []
    for _ in range(repeats):
        comm.Barrier()
        start = time.perf_counter()
        action()
        comm.Barrier()
        out.append(time.perf_counter() - start)
    return out


def rows(repeats: int, comm=MPI.COMM_WORLD) -> list[dict]:
    """Ratios on the ranks of ``comm``, as dictionaries of :class:`Row` (of the first rank)."""
    return [vars(r) for name in PROBLEMS for r in _problem_rows(name, repeats, comm)]


def _problem_rows(name: str, repeats: int, comm) -> list[Row]:
    """The rows of a problem."""
    pose, out = PROBLEMS[name], []
    many = pose(pf.SpaceTime((1, comm.size), comm=comm)).rf
    first, *warm = seconds(comm, lambda: by_map(many), repeats + 1)
    where = f"{name}, {comm.size} rank{'s' * (comm.size > 1)}"
    one = alone = None
    if comm.rank == 0:
        one = pose(pf.SpaceTime("1x1", comm=COMM_SELF)).rf
        if comm.size > 1:
            alone = seconds(COMM_SELF, lambda: by_map(one), repeats + 1)[1:]
    comm.Barrier()
    if comm.size > 1:
        ratio = statistics.median(alone) / statistics.median(warm) if comm.rank == 0 else 0.0
        times = [1e3 * statistics.median(t or [0.0]) for t in (warm, alone)]
        what = f"{name}: map and posterior, one rank / {comm.size} ranks"
        out.append(Row("n", what, *times, ratio, TWO_RANKS, False))
    posterior = by_map(many)
    new = statistics.median(seconds(comm, lambda: posterior.with_data(1.01 * posterior.data), 5))
    trust = tape = 0.0
    if comm.rank == 0:
        start = time.perf_counter()
        result = one.minimize_trust_region(inexact=True, gtol_rel=1e-8, max_it=30, **LEARNED)
        trust = time.perf_counter() - start
        both = one.parameter_to_observable().posterior()
        error = np.linalg.norm(result.x - both.x) / np.linalg.norm(both.x)
        sweeps = sum(n for kind, n in one.problem.sweeps.counts.items() if kind != "cycles")
        value = one.problem.value(both.x)
        note = f"J {value:.11g}, trust region {result.value:.11g} by {sweeps} sweeps, source differs by {error:.0e}"
        for what, ours in (("", statistics.median(warm)), (", from cold", first)):
            text = f"{where}: map, mean and standard deviation{what} / inexact trust region, one rank"
            out.append(Row("n", text, 1e3 * ours, 1e3 * trust, ours / trust, TARGET, True, note))
        text = f"{where}: mean for new readings / 10 ms"
        out.append(Row("n", text, 1e3 * new, 1e3 * NEW_READINGS, new / NEW_READINGS, 1.0, True))
        if name == "plate" and comm.size == 1:
            tape = _pyadjoint_gradient()
            text = f"{where}: one value and gradient by serial pyadjoint / the whole inversion by the map"
            ours = statistics.median(warm)
            out.append(Row("n", text, 1e3 * ours, 1e3 * tape, tape / ours, None, False))
    comm.Barrier()
    return out


def _pyadjoint_gradient() -> float:
    """Seconds of a value and a gradient on serial pyadjoint's tape of the same steps."""
    tape = serial_heat_source()
    q = Function(tape.q.function_space()).assign(1.0)
    tape.rf(q)
    start = time.perf_counter()
    tape.rf(q)
    tape.rf.derivative()
    return time.perf_counter() - start


def box(cells: int = 40, steps: int = 16, count: int = 60) -> dict:
    """Invert for the source in a box, and return seconds and memory (of the first rank). Steps and prior are solved by
    conjugate gradients with algebraic multigrid.
    """
    comm = MPI.COMM_WORLD
    iterative = {"ksp_type": "cg", "ksp_rtol": 1e-10, "pc_type": "gamg"}
    for name, value in iterative.items():
        PETSc.Options()[f"pint_prior_{name}"] = value
    grid = pf.SpaceTime("2x2" if comm.size == 4 else "1x1")
    mesh = grid.mesh(UnitCubeMesh, cells, cells, cells)
    V = FunctionSpace(mesh, "CG", 1)
    u, v, q = Function(V), TestFunction(V), Function(V, name="source")
    form = Dt(u) * v * dx + 0.1 * dot(grad(u), grad(v)) * dx + u * v * dx - q * v * dx
    ev = pf.Evolution(
        form, u, tableau=pf.BackwardEuler(), dt=1 / steps, nsteps=steps, control=q, solver_parameters=iterative
    )
    points = 0.1 + 0.8 * np.random.default_rng(0).random((count, 3))
    times = np.linspace(1 / 8, 1, 8)
    x = SpatialCoordinate(mesh)
    truth = exp(-30 * sum((x[i] - c) ** 2 for i, c in enumerate((0.4, 0.6, 0.5))))
    sensors = pf.PointSensors(points, times, np.zeros((len(times), count)), weight=1e4)
    J = pf.TimeParallelReducedFunctional(
        ev, sensors, regularisation=0.5 * (inner(q, q) + 1e-2 * inner(grad(q), grad(q))) * dx, spacetime=grid,
        riesz_map="lumped",
        solver_parameters={"time_solver": "serial", "mgrit": {"view": True}},
    )  # fmt: skip
    base = _resident()
    clock = [time.perf_counter()]
    F = J.parameter_to_observable()
    clock.append(time.perf_counter())
    data = F @ J.problem.layout.join([_values(V, truth)])
    posterior = F.posterior().with_data(data + 1e-2 * np.random.default_rng(1).standard_normal(len(data)))
    clock.append(time.perf_counter())
    deviation = np.sqrt(np.maximum(posterior.prior.variance(samples=64) - _reduction(posterior), 0.0))
    clock.append(time.perf_counter())
    used = comm.gather(_resident() - base)
    return {
        "unknowns": V.dim(), "readings": F.shape[0], "reduced": F.reduced.size,
        "grid": [grid.space_size, grid.time_size],
        "seconds": dict(zip(("map", "posterior", "deviation"), np.diff(clock).tolist(), strict=True)),
        "stated": comm.gather(_stated(F)), "used": used, "mean deviation": float(deviation.mean()),
        "misfit per reading": float(posterior.misfit() / F.shape[0]),
    }  # fmt: skip


def _reduction(posterior) -> np.ndarray:
    """What the readings reduce the variance by."""
    spectrum = posterior.spectrum
    return spectrum.squares(spectrum.scale / (posterior.alpha + spectrum.lam))


def _values(V, expression) -> np.ndarray:
    return Function(V).interpolate(expression).dat.data_ro.copy()


def _resident() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _stated(F) -> int:
    """Bytes of a rank that are stated before the map and its posterior are computed."""
    from pint_fem.inverse.impulse_responses import GROUP, lags_of_block
    from pint_fem.inverse.memory import map_bytes, posterior_bytes

    ev = F.propagator.evolution
    parts = map_bytes(F, GROUP, lags_of_block(ev.V.mesh().comm, ev.state_size))
    return sum(parts.values()) + sum(posterior_bytes(F, F.reduced.size, data_space=True).values())


if __name__ == "__main__":
    if "--box" in sys.argv:
        found = box()
        if MPI.COMM_WORLD.rank == 0:
            print(found)
    else:
        sys.exit(write_rows("tests.benchmarks.linear_inverse", rows))
