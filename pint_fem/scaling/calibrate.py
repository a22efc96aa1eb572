"""Measurement of the costs of a problem's arithmetic on a machine, for :class:`~pint_fem.scaling.costs.Calibration`.

One process measures all costs but those of the network and of space ranks, two or more measure these, too. All actions
are timed in turn, at the machine's full speed (:mod:`~pint_fem.scaling.timing`), and medians are used. Kernels are
timed through the solver's own levels, as relaxation calls them: on strided rows of a slab, one group of intervals after
another, with the right-hand side added.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np
import scipy.fft
from mpi4py import MPI

from pint_fem.cli import wait_quietly
from pint_fem.paradiag.circulant import shifts
from pint_fem.paradiag.distribution import TimeTransposes
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.paradiag.stage_shifts import shifted_factors
from pint_fem.scaling.costs import Calibration, Kernel
from pint_fem.scaling.counting import solver_parameters
from pint_fem.scaling.model import Model, Solve
from pint_fem.scaling.network import Network
from pint_fem.scaling.paradiag import FEW
from pint_fem.scaling.timing import Measured, rounds
from pint_fem.spacetime import SpaceTime
from pint_fem.sweeps.frequency_systems import frequency_systems

__all__ = [
    "SMALL", "Action", "Case", "Stopwatch", "calibrate", "kernel_actions", "kernel_tables", "machine",
    "measure_network", "measure_space", "measure_together", "paradiag_actions",
]  # fmt: skip

PARADIAG = {"time_solver": "paradiag", "alpha": 1e-4}
MGRIT = {"coarsening": (8, 4)}
"""Options of the whole solves that the overhead is determined from."""
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 16, 64)
STRIDE = 8
SMALL = 128
"""Steps of the solves that kernels and overhead are timed with."""
LARGE = 5000
"""Unknowns beyond which ParaDiag's factors of many steps take gigabytes."""

Action = tuple[Callable[[], object], float]
"""An action that is timed, and the number by which its seconds are divided."""


@dataclass(frozen=True)
class Case:
    """A problem to calibrate.

    Attributes
    ----------
    name : str
        Name of the calibration.
    pose : callable
        ``(spacetime, steps, solver_parameters)`` to the reduced functional, of a linear evolution.
    nsteps : int
        Time steps that the model has by default.
    menu : sequence of mappings
        Options of MGRIT and ParaDiag that the planner chooses from, as those of
        :class:`~pint_fem.scaling.model.Model`. ParaDiag is measured where it is among them.
    rtol : sequence of float
        Relative tolerances of the solves whose cycles are counted.
    solver : mapping
        Options of the solves that are validated.
    smaller : callable or None
        As ``pose``, on a coarser mesh, for the counts of cycles; default: ``pose``.
    """

    name: str
    pose: Callable
    nsteps: int
    menu: Sequence[Mapping] = ()
    rtol: Sequence[float] = (1e-6, 1e-9)
    solver: Mapping = field(default_factory=lambda: {"levels": 3, "coarsening": [8, 4], "relax": "FCF"})
    smaller: Callable | None = None

    @property
    def has_paradiag(self) -> bool:
        """Whether ParaDiag is on the menu."""
        return any("time_solver" in options for options in self.menu)


def machine() -> str:
    """Number and kind of the cores, for reports."""
    return f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"


class Stopwatch:
    """Measures actions, and describes how.

    Parameters
    ----------
    repeats
        Repeats of each measurement, of which the medians are used.
    """

    def __init__(self, repeats: int):
        self.repeats = repeats
        self._all: list[Measured] = []

    def __call__(self, actions: Mapping[object, Action], comm=MPI.COMM_SELF) -> dict:
        """Median seconds at full speed, by name (collective over ``comm``)."""
        found = rounds({name: do for name, (do, _) in actions.items()}, self.repeats, comm=comm)
        self._all += found.values()
        return {name: found[name].seconds / count for name, (_, count) in actions.items()}

    @property
    def about(self) -> str:
        """Date and method of the measurements so far, as a text."""
        speed = sum(m.seconds for m in self._all) / sum(m.clock for m in self._all)
        return (
            f"{time.strftime('%Y-%m-%d')}, kernels: median of {self.repeats} at the machine's full speed (it ran at "
            f"{speed:.0%} of it)"
        )


# -- actions -----------------------------------------------------------------------------------------------------------
def _block_actions(level, state_size: int, sizes: Sequence[int]) -> dict[int, Action]:
    """``level.phi`` on blocks by their size, right-hand side included, each time on another part of the slab."""
    rng, rows = np.random.default_rng(0), STRIDE * max(sizes)
    U, G = rng.standard_normal((rows + 1, state_size)), rng.standard_normal((rows, state_size))

    def action(size: int) -> Callable[[], None]:
        span = STRIDE * size
        groups = cycle(range(0, rows, span))

        def run():
            first = next(groups)
            for row in range(first, first + STRIDE - 1):
                source = slice(row, row + span - STRIDE + 1, STRIDE)
                target = slice(source.start + 1, source.stop + 1, STRIDE)
                # the first lane is that of step 0: sizes up to a block's width are one piece
                level.phi(range(0, span, STRIDE), U[source], U[target])
                U[target] += G[source]

        return run

    return {size: (action(size), STRIDE - 1) for size in sizes}


def _sweep_action(level, state_size: int, steps: int = 64) -> Action:
    """A step of ``level.sweep_steps``, each time on another part of the slab."""
    rng, rows = np.random.default_rng(0), STRIDE * steps
    U, G = rng.standard_normal((rows + 1, state_size)), rng.standard_normal((rows, state_size))
    parts = cycle(range(0, rows, steps))

    def run():
        first = next(parts)
        level.sweep_steps(range(steps), U[first : first + steps + 1], G[first : first + steps])

    return run, steps


def kernel_actions(rf, sizes: Sequence[int] = SIZES) -> dict[tuple, Action]:
    """Kernels of a functional's sweeps.

    Parameters
    ----------
    rf
        Reduced functional of a linear evolution.
    sizes
        Numbers of states per call.

    Returns
    -------
    dict
        Actions by kind, level and size; one level stands for all those with states of the same size.
    """
    sweeps, out, size = rf.problem.sweeps, {}, None
    levels = zip(sweeps.solvers.tangent.levels, sweeps.solvers.adjoint.levels, sweeps.propagators, strict=True)
    for ahead, back, propagator in levels:
        if propagator.evolution.state_size == size:
            break
        size, index = propagator.evolution.state_size, ahead.index
        for kind, level in (("step", ahead), ("adjoint", back)):
            out |= {(kind, index, n): action for n, action in _block_actions(level, size, sizes).items()}
        out["sweep", index, 1] = _sweep_action(ahead, size)
        out["adjoint sweep", index, 1] = _sweep_action(back, size)
    return out


def kernel_tables(
    seconds: Mapping[tuple, float], width: int = 0, *, increasing: bool = False
) -> dict[str, list[Kernel]]:
    """Tables of kernels from seconds by kind, level and size; ``increasing``: more states never take less."""
    tables: dict[tuple, dict[int, float]] = {}
    for (kind, index, size), value in seconds.items():
        tables.setdefault((kind, index), {})[size] = value
    out: dict[str, list[Kernel]] = {}
    for (kind, _), table in tables.items():
        values = np.maximum.accumulate(list(table.values())).tolist() if increasing else table.values()
        made = Kernel.constant(table[1]) if "sweep" in kind else Kernel(tuple(table), tuple(values), width)
        out.setdefault(kind, []).append(made)
    return out


def _extra_actions(rf) -> dict[str, Action]:
    """Work around the sweeps; ``"all steps"`` is for the cost of summing adjoints."""
    problem, sweeps = rf.problem, rf.problem.sweeps
    k, z = sweeps.slab.k, rf.array([c.control for c in rf.controls])
    U = np.random.default_rng(1).standard_normal((k + 1, sweeps.evolution.state_size))
    steps, fine, misfits = problem.layout.steps(z), sweeps.propagators[0], problem.misfits
    transpose = lambda count: lambda: fine.control_adjoint(sweeps.data(steps, U), U[1 : count + 1])
    out = {
        "misfit value": (lambda: [m.values(U) for m in misfits], k),
        "misfit gradient": (lambda: sum(m.gradient(U) for m in misfits), k),
        "forcing": (lambda: fine.forcing(sweeps.data(steps), sweeps.slab.lo), 1),
        "control gradient": (transpose(1), 1),
        "all steps": (transpose(k), 1),
        "optimiser": (lambda: rf.inner.primal(rf.inner.dual(z)), 1),
    }
    if problem.regularisation is not None:
        out["regularisation"] = (lambda: problem.regularisation.gradient(z), 1)
    slab = np.random.default_rng(1).standard_normal((64, sweeps.evolution.state_size))
    out["norm"] = (lambda: rf.spacetime.point_norms(slab), 64)
    return out


def _solve_actions(rf, cycles: int = 2) -> dict[str, Action]:
    """Cold sweeps of the functional with a fixed number of cycles."""
    problem, sweeps = rf.problem, rf.problem.sweeps
    z = problem.layout.steps(rf.array([c.control for c in rf.controls]))
    accuracy, g = {} if sweeps.is_sequential else {"cycles": cycles}, np.ones_like(problem.L)

    def state():
        problem.U[:] = sweeps.initial
        sweeps.state(z, problem.U, cold=True, **accuracy)

    def adjoint():
        problem.L[:] = 0
        sweeps.adjoint(z, problem.U, g, problem.L, cold=True, **accuracy)

    return {"state": (state, 1), "adjoint": (adjoint, 1)}


def _overhead(seconds: Mapping[str, float], calibration: Calibration, options: dict, steps: int) -> dict[str, float]:
    """Seconds per state stepped of the solves of :func:`_solve_actions` beside kernels and norms."""
    out, model = {}, Model(calibration, options, nsteps=steps)
    for kind, counted in (("state", "step"), ("adjoint", "adjoint")):
        task = ("solves", [Solve(kind, "nested", 2)])
        found = model.run_all([task, task])  # the first one makes factors
        states = sum(n for (what, _), n in found.counts.items() if what == counted) / 2
        out[kind] = max(seconds[kind] - found.task_seconds[1], 0.0) / states
    return out


def paradiag_actions(pose: Callable, nsteps: int, small: int) -> tuple[dict[str, Action], dict[str, float]]:
    """Parts of ParaDiag on one process.

    Parameters
    ----------
    pose, nsteps
        See :class:`Case`.
    small
        Steps of the problem that frequencies are solved for.

    Returns
    -------
    actions, sizes : dict
        By the names in ``paradiag`` of :class:`~pint_fem.scaling.costs.Calibration`.
    """
    rf = pose(SpaceTime("1x1", comm=MPI.COMM_SELF), small, solver_parameters(PARADIAG))
    size, mu, rng = rf.evolution.state_size, shifts(small, PARADIAG["alpha"]), np.random.default_rng(2)
    systems = frequency_systems(rf.problem.sweeps.propagators[0], ParaDiagOptions(), {})
    r = rng.standard_normal(size) + 1j * rng.standard_normal(size)
    systems.solve(0, complex(mu[0]), r)
    nbytes = systems.bytes / systems.kept
    # so many factors that they are read from memory, as in a solve
    some = range(int(np.clip(5e8 / (nbytes * len(systems.b)), 4, min(24, len(mu)))))
    once = lambda solve: lambda: [solve(k, complex(mu[k]), r) for k in some]
    y = shifted_factors(systems.A, systems.b, complex(mu[1]))[1][0]
    actions = {
        "solve": (once(systems.solve), len(some)),
        "solve transposed": (once(systems.solve_transposed), len(some)),
        "factor": (lambda: systems.systems[0].factor(y), 1),
    }
    # of all unknowns of a rank at once, in memory, or of few, in the caches
    most = max(min(size, 2**23 // nsteps), FEW + 1)
    for name, count in (("few ", FEW), ("", most)):
        columns = rng.standard_normal((nsteps, count))
        spectrum = scipy.fft.rfft(columns, axis=0)
        actions[f"{name}fft"] = (lambda columns=columns: scipy.fft.rfft(columns, axis=0), count)
        actions[f"{name}ifft"] = (lambda spectrum=spectrum: scipy.fft.irfft(spectrum, nsteps, axis=0), count)
    maps = TimeTransposes(MPI.COMM_SELF, [0, small], len(mu), size)
    slab = rng.standard_normal((small, size))
    actions["pack"] = (lambda: maps.collect(maps.spread(slab, maps.rows), maps.rows), 4 * slab.nbytes)
    return actions, {"factor bytes": nbytes, "fft steps": nsteps, "fft columns": most}


# -- measurements ------------------------------------------------------------------------------------------------------
def calibrate(
    case: Case,
    *,
    comm=MPI.COMM_WORLD,
    repeats: int = 15,
    small: int = SMALL,
    progress: Callable[[str], None] = lambda text: None,
) -> Calibration | None:
    """Measure the costs of a problem (collective).

    Parameters
    ----------
    case
        The problem.
    comm
        Processes that measure.
    repeats
        Repeats of each measurement, of which the medians are used.
    small
        Steps of the solves that kernels and overhead are timed with.
    progress
        Called with a text before each part.

    Returns
    -------
    Calibration or None
        ``None`` on all ranks but the first. Cycles are not counted, see
        :func:`~pint_fem.scaling.counting.count_cycles`.
    """
    rf = case.pose(SpaceTime("1x1", comm=MPI.COMM_SELF), small, {"mgrit": MGRIT})
    made, watch = None, Stopwatch(repeats)
    if comm.rank == 0:
        progress("kernels, work around sweeps and whole solves on one process")
        made = _measure_alone(case, rf, watch, small, progress)
    wait_quietly(comm)
    if comm.size == 1:
        return made.with_changes(notes=[*made.notes, "one process: network assumed, space ranks not measured"])
    progress("all processes at once, network")
    actions = {key: do for key, do in kernel_actions(rf).items() if key[1] == 0 and key[2] in (1, 8, 64)}
    made = measure_together(made, actions, watch, comm)
    progress("kernels on two space ranks")
    found = measure_space(case.pose, comm, watch, small)
    if comm.rank:
        return None
    kernels, iterations = found
    notes = [*made.notes[:-1], made.notes[-1] + "; space ranks: kernels on 2"]
    return made.with_changes(kernels={**made.kernels, 2: kernels}, space_iterations=float(iterations), notes=notes)


def _measure_alone(case: Case, rf, watch: Stopwatch, small: int, progress: Callable[[str], None]) -> Calibration:
    """All costs that one process measures."""
    sweeps, work = rf.problem.sweeps, kernel_actions(rf)
    groups = {"extras": _extra_actions(rf), "solves": _solve_actions(rf)}
    seconds = watch(work | {(group, name): do for group, some in groups.items() for name, do in some.items()})
    extras, solves = ({name: seconds[group, name] for name in some} for group, some in groups.items())
    extras["adjoint sum"] = max(extras.pop("all steps") - extras["control gradient"], 0.0) / max(sweeps.slab.k - 1, 1)
    made = Calibration(
        case.name, machine(), rf.evolution.V.dim(), case.nsteps,
        {1: kernel_tables({key: seconds[key] for key in work}, sweeps.levels[0].block)},
        norm=extras.pop("norm"),
        extras=extras,
        control_bytes=8.0 * rf.layout.size,
        stages=sweeps.propagators[0].dirk.stages,
        sensor_bytes=8.0 * sum(len(getattr(m, "local", ())) for m in rf.problem.misfits),
    )  # fmt: skip
    made = made.with_changes(overhead=_overhead(solves, made, MGRIT, small))
    if case.has_paradiag:
        progress("ParaDiag")
        parts, sizes = paradiag_actions(case.pose, case.nsteps, small)
        made = made.with_changes(paradiag=watch(parts) | sizes)
        few = small if made.unknowns < LARGE else min(small, 32)
        diagonal = case.pose(SpaceTime("1x1", comm=MPI.COMM_SELF), few, solver_parameters(PARADIAG))
        overhead = _overhead(watch(_solve_actions(diagonal)), made, PARADIAG, few)
        made = made.with_changes(paradiag={**made.paradiag, **overhead})
    return made.with_changes(notes=[f"{watch.about}, one process at work"])


def measure_together(
    made: Calibration | None, actions: Mapping[tuple, Action], watch: Stopwatch, comm
) -> Calibration | None:
    """Complete the first rank's calibration by the slowdown of kernels on all processes at once, and the network
    (collective).
    """
    seconds, network = watch(actions, comm), measure_network(comm)
    if comm.rank:
        return None
    tables = made.kernels[1]
    slower = []
    for (kind, level, size), found in seconds.items():
        slower.append(found / dict(zip(tables[kind][level].sizes, tables[kind][level].seconds, strict=True))[size])
    note = f"slowdown: the same kernels on {comm.size} processes at once, {min(slower):.2f} to {max(slower):.2f} times "
    slowdown = {1: 1.0, comm.size: max(statistics.median(slower), 1.0)}
    return made.with_changes(slowdown=slowdown, network=network, notes=[*made.notes, f"{note}as long, median"])


def measure_network(comm, repeats: int = 200) -> Network:
    """Latency and bandwidth between the first two ranks: half a round trip of 8 bytes, and of 4 MB (collective)."""

    def trips(nbytes: int, count: int) -> Callable[[], None]:
        buffer = np.zeros(nbytes // 8)

        def run():
            for _ in range(count):
                if comm.rank == 0:
                    comm.Send(buffer, 1)
                    comm.Recv(buffer, 1)
                elif comm.rank == 1:
                    comm.Recv(buffer, 0)
                    comm.Send(buffer, 0)

        return run

    few = max(repeats // 10, 3)
    found = rounds({"short": trips(8, repeats), "long": trips(1 << 22, few)}, 9, comm=comm)
    latency, long = found["short"].seconds / (2 * repeats), found["long"].seconds / (2 * few)
    return Network(latency, (1 << 22) / max(long - latency, 1e-9), "measured: ping-pong on the calibrating machine")


def measure_space(pose: Callable, comm, watch: Stopwatch, small: int = SMALL) -> tuple[dict, int] | None:
    """Measure kernels on two space ranks (collective).

    Returns
    -------
    kernels : dict
        Tables by kind and level.
    iterations : int
        Krylov iterations of a solve, 0 for a direct one. ``None`` instead of both on all ranks but the first two.
    """
    pair = comm.Split(0 if comm.rank < 2 else 1, comm.rank)
    if comm.rank > 1:
        return None
    rf = pose(SpaceTime((2, 1), comm=pair), small, {"mgrit": MGRIT})
    sweeps = rf.problem.sweeps
    seconds = watch(kernel_actions(rf), pair)
    factor = next(iter(sweeps.propagators[0].factors.values()))
    whole = factor.ksp.getPC().getType() == "redundant"
    return kernel_tables(seconds, sweeps.levels[0].block), 0 if whole else max(factor.ksp.getIterationNumber(), 1)
