"""Measure what a problem's work costs, on this machine, for :class:`~pint_fem.scaling.costs.Calibration`.

On one process all but the network and the space ranks; on two or more, all. Everything is timed in turn, at the
machine's full speed (:mod:`~pint_fem.scaling.metronome`), by medians, as :mod:`~pint_fem.scaling.validation` times what
is predicted. Kernels are timed through the solver's own levels, as relaxation calls them: strided rows of a slab, group
after group of intervals, with the right-hand side added.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle

import numpy as np
import scipy.fft
from mpi4py import MPI

from pint_fem.cli import wait_quietly
from pint_fem.paradiag.circulant import shifts
from pint_fem.paradiag.distribution import TimeTransposes
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.scaling.costs import Calibration, Kernel
from pint_fem.scaling.counting import solver_parameters
from pint_fem.scaling.metronome import Measured, rounds
from pint_fem.scaling.model import Model, Solve
from pint_fem.scaling.network import Network
from pint_fem.scaling.paradiag import FEW
from pint_fem.spacetime import SpaceTime

__all__ = [
    "SMALL", "Action", "Stopwatch", "calibrate", "kernel_actions", "machine", "opponent_seconds", "paradiag_actions",
    "ping_pong", "space_kernels",
]  # fmt: skip

PARADIAG = {"time_solver": "paradiag", "alpha": 1e-4}
MGRIT = {"coarsening": (8, 4)}
"""Options of the whole solves that bookkeeping is taken from."""
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 16, 64)
STRIDE = 8
SMALL = 128
"""Steps of solves that kernels and bookkeeping are timed with."""
LARGE = 5000
"""Unknowns beyond which ParaDiag's factors of many steps take gigabytes."""

Action = tuple[Callable[[], object], float]
"""What is timed, and by how much its seconds are divided."""


def machine() -> str:
    """Its kind, for reports."""
    return f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"


class Stopwatch:
    """Seconds of actions, and what is to be said of them."""

    def __init__(self, repeats: int):
        self.repeats = repeats
        self._all: list[Measured] = []

    def __call__(self, actions: Mapping[object, Action], repeats: int | None = None, comm=MPI.COMM_SELF) -> dict:
        """Medians at full speed, by name (collective over ``comm``)."""
        found = rounds({name: do for name, (do, _) in actions.items()}, repeats or self.repeats, comm=comm)
        self._all += found.values()
        return {name: found[name].seconds / count for name, (_, count) in actions.items()}

    @property
    def about(self) -> str:
        """How it was measured, in words."""
        speed = sum(m.seconds for m in self._all) / sum(m.clock for m in self._all)
        return (
            f"{time.strftime('%Y-%m-%d')}, kernels: median of {self.repeats} at the machine's full speed (it ran at "
            f"{speed:.0%} of it)"
        )


def block_actions(level, state_size: int, sizes: Sequence[int] = SIZES) -> dict[int, Action]:
    """``level.phi`` on blocks by their size, right-hand side included: each time on another part of the slab."""
    rng = np.random.default_rng(0)
    rows = STRIDE * max(sizes)
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


def sweep_action(level, state_size: int, steps: int = 64) -> Action:
    """``level.sweep_steps``, a step: each time on another part of the slab."""
    rng = np.random.default_rng(0)
    rows = STRIDE * steps
    U, G = rng.standard_normal((rows + 1, state_size)), rng.standard_normal((rows, state_size))
    parts = cycle(range(0, rows, steps))

    def run():
        first = next(parts)
        level.sweep_steps(range(steps), U[first : first + steps + 1], G[first : first + steps])

    return run, steps


def kernel_actions(rf, sizes: Sequence[int] = SIZES) -> dict[tuple, Action]:
    """All kernels of a functional by kind, level and size; one level stands for all that step states of the same
    size.
    """
    sweeps, out, size = rf.problem.sweeps, {}, None
    for forward, backward, propagator in zip(
        sweeps.solvers.tangent.levels, sweeps.solvers.adjoint.levels, sweeps.propagators, strict=True
    ):
        if propagator.evolution.state_size == size:
            break
        size, index = propagator.evolution.state_size, forward.index
        for kind, level in (("step", forward), ("adjoint", backward)):
            out |= {(kind, index, n): action for n, action in block_actions(level, size, sizes).items()}
        out["sweep", index, 1] = sweep_action(forward, size)
        out["adjoint sweep", index, 1] = sweep_action(backward, size)
    return out


def kernels(seconds: Mapping[tuple, float], width: int = 0, *, growing: bool = False) -> dict[str, list[Kernel]]:
    """Tables of what kernels took, by kind, level and size; ``growing``: more states never take less."""
    tables: dict[tuple, dict[int, float]] = {}
    for (kind, index, size), value in seconds.items():
        tables.setdefault((kind, index), {})[size] = value
    work: dict[str, list[Kernel]] = {}
    for (kind, _), table in tables.items():
        values = np.maximum.accumulate(list(table.values())).tolist() if growing else table.values()
        made = Kernel.constant(table[1]) if "sweep" in kind else Kernel(tuple(table), tuple(values), width)
        work.setdefault(kind, []).append(made)
    return work


def ping_pong(comm, repeats: int = 200) -> Network:
    """Latency and bandwidth between the first two ranks (collective): half a round trip of 8 bytes, and of 4 MB."""

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


def _extras(rf) -> dict[str, Action]:
    """What surrounds sweeps; ``"all pulled"`` is for the cost of summing adjoints."""
    problem, sweeps = rf.problem, rf.problem.sweeps
    k, z = sweeps.slab.k, rf.array([c.control for c in rf.controls])
    rng = np.random.default_rng(1)
    U = rng.standard_normal((k + 1, sweeps.evolution.state_size))
    steps, fine = problem.layout.steps(z), sweeps.propagators[0]
    misfits = problem.misfits
    pull = lambda count: lambda: fine.control_adjoint(sweeps.data(steps, U), U[1 : count + 1])
    out = {
        "misfit value": (lambda: [m.values(U) for m in misfits], k),
        "misfit gradient": (lambda: sum(m.gradient(U) for m in misfits), k),
        "forcing": (lambda: fine.forcing(sweeps.data(steps), sweeps.slab.lo), 1),
        "control gradient": (pull(1), 1),
        "all pulled": (pull(k), 1),
        "optimiser": (lambda: rf.inner.primal(rf.inner.dual(z)), 1),
    }
    if problem.regularisation is not None:
        out["regularisation"] = (lambda: problem.regularisation.gradient(z), 1)
    slab, norms = rng.standard_normal((64, sweeps.evolution.state_size)), rf.spacetime.point_norms
    out["norm"] = (lambda: norms(slab), 64)
    return out


def _solves(rf, cycles: int = 2) -> dict[str, Action]:
    """Cold sweeps of the functional with a fixed number of cycles."""
    problem, sweeps = rf.problem, rf.problem.sweeps
    z = problem.layout.steps(rf.array([c.control for c in rf.controls]))
    iterates = len(sweeps.propagators) > 1 or isinstance(sweeps.options, ParaDiagOptions)
    accuracy = {"cycles": cycles} if iterates else {}
    g = np.ones_like(problem.L)

    def state():
        problem.U[:] = sweeps.initial
        sweeps.state(z, problem.U, cold=True, **accuracy)

    def adjoint():
        problem.L[:] = 0
        sweeps.adjoint(z, problem.U, g, problem.L, cold=True, **accuracy)

    return {"state": (state, 1), "adjoint": (adjoint, 1)}


def _bookkeeping(seconds: Mapping[str, float], calibration: Calibration, options: dict, steps: int) -> dict[str, float]:
    """Seconds a state stepped of the solves of :func:`_solves` that kernels and norms do not explain."""
    out, model = {}, Model(calibration, options, nsteps=steps)
    for kind in ("state", "adjoint"):
        task = ("solves", [Solve(kind, "nested", 2)])
        said = model.run_all([task, task])  # the first one makes factors
        states = sum(n for (what, _), n in said.counts.items() if what == {"state": "step"}.get(kind, kind)) / 2
        out[kind] = max(seconds[kind] - said.task_seconds[1], 0.0) / states
    return out


def paradiag_actions(pose: Callable, nsteps: int, small: int) -> tuple[dict[str, Action], dict[str, float]]:
    """ParaDiag's parts on one process, and what is to be known of them, see
    :class:`~pint_fem.scaling.costs.Calibration`.
    """
    rf = pose(SpaceTime("1x1", comm=MPI.COMM_SELF), small, solver_parameters(PARADIAG))
    sweeps, size = rf.problem.sweeps, rf.evolution.state_size
    systems = sweeps.solvers.tangent._frequency_solve.__self__
    mu, rng = shifts(small, PARADIAG["alpha"]), np.random.default_rng(2)
    r = rng.standard_normal(size) + 1j * rng.standard_normal(size)
    systems.solve(0, complex(mu[0]), r)
    nbytes = systems.bytes / systems.kept
    # so many factors that they come from memory, as in a solve
    some = range(int(np.clip(5e8 / (nbytes * len(systems.b)), 4, min(24, len(mu)))))
    once = lambda solve: lambda: [solve(k, complex(mu[k]), r) for k in some]
    first, y = systems._systems[0], systems._at(1, complex(mu[1]))[1][0]
    actions = {
        "solve": (once(systems.solve), len(some)),
        "solve transposed": (once(systems.solve_transposed), len(some)),
        "factor": (lambda: first.factor(y), 1),
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
    actions["pack"] = (lambda: maps._collect(maps._spread(slab, maps._rows), maps._rows), 4 * slab.nbytes)
    return actions, {"factor bytes": nbytes, "fft steps": nsteps, "fft columns": most}


def opponent_seconds(serial: Callable, repeats: int = 2, few: int = 4, many: int = 20) -> dict[str, float]:
    """Seconds a step of pyadjoint on the serial tape, and those that do not depend on the steps (readings), from tapes
    of two lengths.
    """

    def actions(steps: int) -> dict[tuple, Callable]:
        tape = serial(steps)
        direction = tape.q.copy(deepcopy=True).assign(1.0)
        return {
            ("value", steps): lambda: tape.rf(tape.q),
            ("gradient", steps): tape.rf.derivative,
            ("hessian", steps): lambda: tape.rf.hessian(direction),
        }

    found = {name: m.seconds for name, m in rounds(actions(few) | actions(many), repeats).items()}
    out: dict[str, float] = {"steps": many}
    for task in ("value", "gradient", "hessian"):
        short, long = found[task, few], found[task, many]
        out[task] = (long - short) / (many - few) if long > short else long / many
        out[f"{task} fixed"] = max(short - few * out[task], 0.0)
    return out


def calibrate(
    name: str,
    pose: Callable,
    nsteps: int,
    *,
    comm=MPI.COMM_WORLD,
    repeats: int = 15,
    small: int = SMALL,
    paradiag: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Calibration | None:
    """Measure a problem (collective).

    Parameters
    ----------
    name, pose, nsteps
        See ``problems.scaling_cases.Case``.
    repeats
        Of each measurement; medians are kept.
    small
        Steps of the solve that bookkeeping is taken from.
    paradiag
        Whether ParaDiag is measured as well.
    progress
        Gets a line a part.

    Returns
    -------
    Calibration or None
        ``None`` on all ranks but the first. Cycles, the inversion and pyadjoint are not in it.
    """
    alone = pose(SpaceTime("1x1", comm=MPI.COMM_SELF), small, {"mgrit": MGRIT})
    made, notes, watch = None, [], Stopwatch(repeats)
    if comm.rank == 0:
        progress("kernels, what surrounds sweeps and whole solves on one process")
        work = kernel_actions(alone)
        given = {"extras": _extras(alone), "solves": _solves(alone)}
        actions = work | {(group, kind): do for group, some in given.items() for kind, do in some.items()}
        seconds = watch(actions)
        extras = {kind: seconds["extras", kind] for kind in given["extras"]}
        k = alone.problem.sweeps.slab.k
        extras["adjoint sum"] = max(extras.pop("all pulled") - extras["control gradient"], 0.0) / max(k - 1, 1)
        made = Calibration(
            name, machine(), alone.evolution.V.dim(), nsteps,
            {1: kernels({key: seconds[key] for key in work}, alone.problem.sweeps.solvers.tangent.levels[0].block)},
            norm=extras.pop("norm"),
            extras=extras,
            control_bytes=8.0 * alone.layout.size,
            stages=alone.problem.sweeps.propagators[0].dirk.stages,
            sensor_bytes=8.0 * sum(len(getattr(m, "local", ())) for m in alone.problem.misfits),
        )  # fmt: skip
        whole = {kind: seconds["solves", kind] for kind in given["solves"]}
        made = made.with_changes(bookkeeping=_bookkeeping(whole, made, MGRIT, small))
        if paradiag:
            progress("ParaDiag")
            parts, facts = paradiag_actions(pose, nsteps, small)
            made = made.with_changes(paradiag=watch(parts) | facts)
            few = small if made.unknowns < LARGE else min(small, 32)
            diagonal = pose(SpaceTime("1x1", comm=MPI.COMM_SELF), few, solver_parameters(PARADIAG))
            more = _bookkeeping(watch(_solves(diagonal)), made, PARADIAG, few)
            made = made.with_changes(paradiag={**made.paradiag, **more})
        notes.append(f"{watch.about}, one process at work")
    wait_quietly(comm)
    if comm.size > 1:
        made = _with_others(made, pose, alone, comm, watch, small, progress, notes)
    else:
        notes.append("one process: network assumed, space ranks not measured")
    return made.with_changes(notes=notes) if comm.rank == 0 else None


def _with_others(made, pose, alone, comm, watch: Stopwatch, small: int, progress, notes: list) -> Calibration | None:
    """What is measured on several processes: what they take from each other, network, two space ranks."""
    progress("all processes at once, network")
    some = {key: do for key, do in kernel_actions(alone).items() if key[1] == 0 and key[2] in (1, 8, 64)}
    together = watch(some, comm=comm)
    network = ping_pong(comm)
    spread = space_kernels(pose, comm, watch, small, progress)
    if comm.rank:
        return None
    known = {(kind, 0, n): t for kind, (k, *_) in made.work[1].items() for n, t in zip(k.sizes, k.seconds, strict=True)}
    slower = {key: together[key] / known[key] for key in some}
    notes.append(
        f"busy: the same kernels on {comm.size} processes at once, {min(slower.values()):.2f} to "
        f"{max(slower.values()):.2f} times as long, median; space ranks: kernels on 2"
    )
    busy = {1: 1.0, comm.size: max(statistics.median(slower.values()), 1.0)}
    work, iterations = spread
    return made.with_changes(
        busy=busy, network=network, work={**made.work, 2: work}, space_iterations=float(iterations)
    )


def space_kernels(
    pose: Callable, comm, watch: Stopwatch, small: int, progress: Callable[[str], None]
) -> tuple[dict[str, list[Kernel]], int] | None:
    """Kernels on two space ranks, and the Krylov iterations of a solve there, 0 for a direct one; ``None`` on other
    ranks (collective).
    """
    pair = comm.Split(0 if comm.rank < 2 else 1, comm.rank)
    progress("kernels on two space ranks")
    if comm.rank > 1:
        return None
    both = pose(SpaceTime((2, 1), comm=pair), small, {"mgrit": MGRIT})
    sweeps = both.problem.sweeps
    seconds = watch(kernel_actions(both), comm=pair)
    factor = next(iter(sweeps.propagators[0].factors.values()))
    whole = factor.ksp.getPC().getType() == "redundant"
    return kernels(seconds, sweeps.solvers.tangent.levels[0].block), 0 if whole else max(
        factor.ksp.getIterationNumber(), 1
    )
