"""Measure what a problem's work costs, on this machine, for :class:`~pint_fem.scaling.costs.Calibration`.

On one process all but the network and the space ranks; on two or more, all. Kernels are timed through the solver's own
levels, as relaxation calls them: strided rows of a slab larger than the caches, with the right-hand side added.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import scipy.fft
from mpi4py import MPI

from pint_fem.cli import wait_quietly
from pint_fem.paradiag import ParaDiagOptions
from pint_fem.paradiag.circulant import shifts
from pint_fem.paradiag.transposes import TimeTransposes
from pint_fem.scaling.costs import Calibration, Kernel
from pint_fem.scaling.counting import solver_parameters
from pint_fem.scaling.model import Model, Solve
from pint_fem.scaling.network import Network
from pint_fem.scaling.paradiag import FEW
from pint_fem.spacetime import SpaceTime

__all__ = ["best", "calibrate", "ping_pong"]

PARADIAG = {"time_solver": "paradiag", "alpha": 1e-4}
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 16, 64)
STRIDE = 8
LARGE = 5000
"""Unknowns beyond which ParaDiag's factors of many steps take gigabytes."""


def best(action: Callable[[], object], repeats: int = 9) -> float:
    """Least seconds: what else the machine does only adds to them. The first call warms up."""
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def block_kernel(level, state_size: int, sizes: Sequence[int] = SIZES, repeats: int = 9, calls: int = 7) -> Kernel:
    """Time of ``level.phi`` on blocks, right-hand side included."""
    rng = np.random.default_rng(0)
    rows = STRIDE * max(sizes)
    U, G = rng.standard_normal((rows + 1, state_size)), rng.standard_normal((rows, state_size))
    seconds = []
    for size in sizes:
        span = STRIDE * size
        parts = [slice(j, j + span - STRIDE + 1, STRIDE) for j in range(calls)]
        if size < 8:  # at other places each time, as in a long slab
            parts = [
                slice(j * span + j % STRIDE, j * span + j % STRIDE + span - STRIDE + 1, STRIDE) for j in range(calls)
            ]
        parts = [p for p in parts if p.stop <= rows]

        def run(parts=parts):
            for p in parts:
                target = slice(p.start + 1, p.stop + 1, STRIDE)
                # the first lane is that of step 0: sizes up to a block's width are one piece
                level.phi(range(0, span, STRIDE), U[p], U[target])  # noqa: B023
                U[target] += G[p]

        seconds.append(best(run, repeats) / len(parts))
    return Kernel(tuple(sizes), tuple(seconds), int(level.block))


def sweep_kernel(level, state_size: int, steps: int = 64, repeats: int = 9) -> Kernel:
    """Time of ``level.sweep_steps``, a step."""
    rng = np.random.default_rng(0)
    U, G = rng.standard_normal((steps + 1, state_size)), rng.standard_normal((steps, state_size))
    return Kernel.constant(best(lambda: level.sweep_steps(range(steps), U, G), repeats) / steps)


def kernels_of(rf, repeats: int = 9) -> dict[str, list[Kernel]]:
    """All kernels of a functional; one level stands for all that step states of the same size."""
    sweeps = rf.problem.sweeps
    work: dict[str, list[Kernel]] = {"step": [], "adjoint": [], "sweep": [], "adjoint sweep": []}
    size = None
    for forward, backward, propagator in zip(
        sweeps._tangent.levels, sweeps._adjoint.levels, sweeps.propagators, strict=True
    ):
        if propagator.evolution.state_size == size:
            break
        size = propagator.evolution.state_size
        work["step"].append(block_kernel(forward, size, repeats=repeats))
        work["adjoint"].append(block_kernel(backward, size, repeats=repeats))
        work["sweep"].append(sweep_kernel(forward, size, repeats=repeats))
        work["adjoint sweep"].append(sweep_kernel(backward, size, repeats=repeats))
    return work


def ping_pong(comm, repeats: int = 200) -> Network:
    """Latency and bandwidth between the first two ranks (collective): half a round trip of 8 bytes, and of 4 MB."""
    times = []
    for nbytes, n in ((8, repeats), (1 << 22, max(repeats // 10, 3))):
        buffer, seconds = np.zeros(nbytes // 8), []
        for _ in range(5):
            comm.Barrier()
            start = time.perf_counter()
            for _ in range(n):
                if comm.rank == 0:
                    comm.Send(buffer, 1)
                    comm.Recv(buffer, 1)
                elif comm.rank == 1:
                    comm.Recv(buffer, 0)
                    comm.Send(buffer, 0)
            seconds.append((time.perf_counter() - start) / (2 * n))
        times.append(statistics.median(seconds))
    latency, long = comm.bcast(times)
    return Network(latency, (1 << 22) / max(long - latency, 1e-9), "measured: ping-pong on this machine")


def _extras(rf, repeats: int) -> dict[str, float]:
    """Seconds of what surrounds sweeps."""
    problem, sweeps = rf.problem, rf.problem.sweeps
    k, z = sweeps.slab.k, rf.array([c.control for c in rf.controls])
    rng = np.random.default_rng(1)
    U = rng.standard_normal((k + 1, sweeps.evolution.state_size))
    steps, fine = problem.layout.steps(z), sweeps.propagators[0]
    misfits = problem.misfits
    pull = lambda count: best(lambda: fine.control_adjoint(sweeps.data(steps, U), U[1 : count + 1]), repeats)
    few, many = pull(1), pull(k)
    out = {
        "misfit value": best(lambda: [m.values(U) for m in misfits], repeats) / k,
        "misfit gradient": best(lambda: sum(m.gradient(U) for m in misfits), repeats) / k,
        "forcing": best(lambda: fine.forcing(sweeps.data(steps), sweeps.slab.lo), repeats),
        "adjoint sum": max(many - few, 0.0) / max(k - 1, 1),
        "control gradient": few,
        "optimiser": best(lambda: rf.inner.primal(rf.inner.dual(z)), repeats),
    }
    if problem.regularisation is not None:
        out["regularisation"] = best(lambda: problem.regularisation.gradient(z), repeats)
    return out


def _solve(rf, kind: str, cycles: int) -> None:
    """A cold sweep of the functional with a fixed number of cycles."""
    problem, sweeps = rf.problem, rf.problem.sweeps
    z = problem.layout.steps(rf.array([c.control for c in rf.controls]))
    if kind == "state":
        problem.U[:] = sweeps.initial
        sweeps.state(z, problem.U, cold=True, **_accuracy(sweeps, cycles))
    else:
        problem.L[:] = 0
        g = np.ones_like(problem.L)
        sweeps.adjoint(z, problem.U, g, problem.L, cold=True, **_accuracy(sweeps, cycles))


def _accuracy(sweeps, cycles: int) -> dict:
    return {"cycles": cycles} if len(sweeps.propagators) > 1 or isinstance(sweeps.options, ParaDiagOptions) else {}


def _paradiag(pose: Callable, nsteps: int, small: int, repeats: int) -> dict[str, float]:
    """Costs of ParaDiag's parts on one process, see :class:`~pint_fem.scaling.costs.Calibration`."""
    rf = pose(SpaceTime("1x1", comm=MPI.COMM_SELF), small, solver_parameters(PARADIAG))
    sweeps, size = rf.problem.sweeps, rf.evolution.state_size
    systems = sweeps._tangent._frequency_solve.__self__
    mu, rng = shifts(small, PARADIAG["alpha"]), np.random.default_rng(2)
    r = rng.standard_normal(size) + 1j * rng.standard_normal(size)
    systems.solve(0, complex(mu[0]), r)
    nbytes = systems.bytes / systems.kept
    # so many factors that they come from memory, as in a solve
    some = range(int(np.clip(5e8 / (nbytes * len(systems.b)), 4, min(24, len(mu)))))
    once = lambda solve: [solve(k, complex(mu[k]), r) for k in some]
    first, y = systems._systems[0], systems._at(1, complex(mu[1]))[1][0]
    out = {
        "solve": best(lambda: once(systems.solve), repeats) / len(some),
        "solve transposed": best(lambda: once(systems.solve_transposed), repeats) / len(some),
        "factor": best(lambda: first.factor(y), min(repeats, 5)),
        "factor bytes": nbytes,
        "fft steps": nsteps,
    }
    # of all unknowns of a rank at once, in memory, or of few, in the caches
    for name, count in (("few ", FEW), ("", max(min(size, 2**23 // nsteps), FEW + 1))):
        columns = rng.standard_normal((nsteps, count))
        spectrum = scipy.fft.rfft(columns, axis=0)
        back = lambda spectrum=spectrum: scipy.fft.irfft(spectrum, nsteps, axis=0)
        out[f"{name}fft"] = best(lambda columns=columns: scipy.fft.rfft(columns, axis=0), repeats) / count
        out[f"{name}ifft"] = best(back, repeats) / count
        out["fft columns"] = count
    maps = TimeTransposes(MPI.COMM_SELF, [0, small], len(mu), size)
    slab = rng.standard_normal((small, size))
    both = lambda: maps._collect(maps._spread(slab, maps._rows), maps._rows)
    out["pack"] = best(both, repeats) / (4 * slab.nbytes)
    return out


def _opponent(serial: Callable, few: int = 8, many: int = 40) -> dict[str, float]:
    """Seconds a step of pyadjoint on the serial tape, and those that do not depend on the steps (readings), from tapes
    of two lengths.
    """

    def times(steps: int) -> dict[str, float]:
        tape = serial(steps)
        direction = tape.q.copy(deepcopy=True).assign(1.0)
        return {
            "value": best(lambda: tape.rf(tape.q), 2),
            "gradient": best(tape.rf.derivative, 2),
            "hessian": best(lambda: tape.rf.hessian(direction), 1),
        }

    short, long = times(few), times(many)
    slope = {task: (long[task] - short[task]) / (many - few) for task in short}
    slope = {task: s if s > 0 else long[task] / many for task, s in slope.items()}  # lost in the noise
    fixed = {f"{task} fixed": max(short[task] - few * slope[task], 0.0) for task in short}
    return {**slope, **fixed, "steps": many}


def calibrate(
    name: str,
    pose: Callable,
    nsteps: int,
    *,
    comm=MPI.COMM_WORLD,
    serial=None,
    repeats: int = 9,
    small: int = 128,
    paradiag: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Calibration | None:
    """Measure a problem (collective).

    Parameters
    ----------
    name, pose, nsteps, serial
        See ``problems.scaling_cases.Case``.
    repeats
        Of each measurement; the least are kept.
    small
        Steps of the solve that bookkeeping is taken from.
    paradiag
        Whether ParaDiag is measured as well.
    progress
        Gets a line a part.

    Returns
    -------
    Calibration or None
        ``None`` on all ranks but the first. Cycles and the inversion are not in it.
    """
    alone = pose(SpaceTime("1x1", comm=MPI.COMM_SELF), small, {"mgrit": {"coarsening": (8, 4)}})
    made, notes = None, [f"kernels: least of {repeats}, one process at work"]
    progress("kernels on one process")
    level = alone.problem.sweeps._tangent.levels[0]
    size = alone.evolution.state_size
    if comm.rank == 0:
        work = {1: kernels_of(alone, repeats)}
        progress("what surrounds sweeps, pyadjoint")
        norms = alone.spacetime.point_norms
        slab = np.random.default_rng(0).standard_normal((64, size))
        made = Calibration(
            name, platform.processor() or platform.machine(), alone.evolution.V.dim(), nsteps, work,
            norm=best(lambda: norms(slab), repeats) / 64,
            extras=_extras(alone, repeats),
            control_bytes=8.0 * alone.layout.size,
            stages=alone.problem.sweeps.propagators[0].dirk.stages,
            sensor_bytes=8.0 * sum(len(getattr(m, "local", ())) for m in alone.problem.misfits),
            opponent={} if serial is None else _opponent(serial),
        )  # fmt: skip
        progress("a whole solve")
        made = made.with_changes(bookkeeping=_bookkeeping(alone, made, {"coarsening": (8, 4)}, repeats))
        if paradiag:
            progress("ParaDiag")
            made = made.with_changes(paradiag=_paradiag(pose, nsteps, small, repeats))
            few = small if size < LARGE else min(small, 32)
            diagonal = pose(SpaceTime("1x1", comm=MPI.COMM_SELF), few, solver_parameters(PARADIAG))
            more = _bookkeeping(diagonal, made, PARADIAG, min(repeats, 3))
            made = made.with_changes(paradiag={**made.paradiag, **more})
    wait_quietly(comm)
    if comm.size > 1:
        progress("all processes at once, network")
        # all at work at once, each on its own: what they take from each other
        together = block_kernel(level, size, (8, 64), repeats).seconds
        together = comm.gather(together)
        network = ping_pong(comm)
        pair = comm.Split(0 if comm.rank < 2 else 1, comm.rank)
        progress("kernels on two space ranks")
        if comm.rank < 2:
            both = pose(SpaceTime((2, 1), comm=pair), small, {"mgrit": {"coarsening": (8, 4)}})
            spread = kernels_of(both, repeats)
            factor = next(iter(both.problem.sweeps.propagators[0].factors.values()))
            iterations = 0 if factor.ksp.getType() == "preonly" else factor.ksp.getIterationNumber()
        if comm.rank == 0:
            lone = made.work[1]["step"][0]
            ratio = min(
                max(t / lone.seconds[lone.sizes.index(n)] for t in times)
                for n, times in zip((8, 64), zip(*together, strict=True), strict=True)
            )
            made = made.with_changes(
                busy={1: 1.0, comm.size: max(ratio, 1.0)},
                network=network,
                work={**made.work, 2: spread},
                space_iterations=float(iterations),
            )
            notes.append(f"busy: the same kernels on {comm.size} processes at once")
            notes.append("space ranks: kernels on 2")
    else:
        notes.append("one process: network assumed, space ranks not measured")
    return made.with_changes(notes=notes) if comm.rank == 0 else None


def _bookkeeping(rf, calibration: Calibration, options: dict, repeats: int) -> dict[str, float]:
    """Seconds a state stepped of a real solve that kernels and norms do not explain."""
    out = {}
    model = Model(calibration, options, nsteps=rf.evolution.nsteps)
    for kind in ("state", "adjoint"):
        seconds = best(lambda kind=kind: _solve(rf, kind, 2), repeats)
        task = ("solves", [Solve(kind, "nested", 2)])
        said = model.run_all([task, task])  # the first one makes factors
        states = sum(n for (what, _), n in said.counts.items() if what == {"state": "step"}.get(kind, kind)) / 2
        out[kind] = max(seconds - said.task_seconds[1], 0.0) / states
    return out
