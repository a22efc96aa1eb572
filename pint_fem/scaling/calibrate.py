"""Measurement of the costs of a problem's arithmetic on a machine, for :class:`~pint_fem.scaling.costs.Calibration`.

One process measures all costs but those of the network and of space ranks, two or more measure these, too. All actions
are timed in turn, at the machine's full speed (:mod:`~pint_fem.scaling.timing`), and medians are used. Cycles of solves
are counted in real runs, as they depend on the problem and the options only.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from mpi4py import MPI

from pint_fem.adjoint.reduced_functional import TimeParallelReducedFunctional
from pint_fem.cli import wait_quietly
from pint_fem.errors import SolverFailure
from pint_fem.inverse.readings import ReadingTable
from pint_fem.scaling.actions import (
    PARADIAG,
    SMALL,
    Action,
    extra_actions,
    factor_entries,
    kernel_actions,
    paradiag_actions,
    solve_actions,
    solver_in_space,
    solver_parameters,
)
from pint_fem.scaling.costs import Calibration, Kernel
from pint_fem.scaling.inverse_costs import inverse_costs
from pint_fem.scaling.model import Model, Solve
from pint_fem.scaling.network import Network
from pint_fem.scaling.timing import Measured, rounds
from pint_fem.spacetime import SpaceTime

__all__ = [
    "Case", "Stopwatch", "calibrate", "count_cycles", "count_impulses", "kernel_tables", "machine",
    "measure_all_processes", "measure_map",
]  # fmt: skip

MGRIT = {"coarsening": (8, 4)}
"""Options of the whole solves that the overhead is determined from."""
LARGE = 5000
"""Unknowns beyond which ParaDiag's factors of many steps take gigabytes."""
Progress = Callable[[str], None]
MAP_STEPS = 1024
"""Most steps of the map whose parts are timed."""
PARADIAG_STEPS = 512
"""Most steps for the counts of ParaDiag's iterations, whose number does not depend on the steps."""


@dataclass(frozen=True)
class Case:
    """A problem to calibrate.

    Attributes
    ----------
    name, nsteps : str, int
        Name of the calibration; time steps that the model has by default.
    pose : callable
        ``(spacetime, steps, solver_parameters)`` to the reduced functional, of a linear evolution.
    menu : sequence of mappings
        Options of MGRIT and ParaDiag that the planner chooses from, as those of
        :class:`~pint_fem.scaling.model.Model`. ParaDiag is measured where it is among them.
    rtol, solver : sequence of float, mapping
        Relative tolerances of the solves whose cycles are counted; options of the solves that are validated.
    smaller : callable or None
        As ``pose``, on a coarser mesh, for the counts of cycles; default: ``pose``.
    with_sensors : callable or None
        As ``pose``, with sensors in the place of a misfit that observes the state everywhere, for the costs of the map
        from controls to readings; default: ``pose``.
    small
        Steps of the solves that kernels and overhead are timed with.
    """

    name: str
    pose: Callable
    nsteps: int
    menu: Sequence[Mapping] = ()
    rtol: Sequence[float] = (1e-6, 1e-9)
    solver: Mapping = field(default_factory=lambda: {"levels": 3, "coarsening": [8, 4], "relax": "FCF"})
    smaller: Callable | None = None
    with_sensors: Callable | None = None
    small: int = SMALL


def machine() -> str:
    """Number and kind of the cores, for reports."""
    return f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"


class Stopwatch:
    """Measures actions by the medians of a number of repeats, and describes how."""

    def __init__(self, repeats: int):
        self.repeats = repeats
        self._all: list[Measured] = []

    def __call__(self, actions: Mapping[object, Action], comm: MPI.Comm = MPI.COMM_SELF) -> dict:
        """Median seconds at full speed, by name (collective over ``comm``)."""
        found = rounds({name: do for name, (do, _) in actions.items()}, self.repeats, comm=comm)
        self._all += found.values()
        return {name: found[name].seconds / count for name, (_, count) in actions.items()}

    @property
    def about(self) -> str:
        """Date and method of the measurements so far, as a text."""
        speed = sum(m.seconds for m in self._all) / sum(m.clock for m in self._all)
        full = f"the machine's full speed (it ran at {speed:.0%} of it)"
        return f"{time.strftime('%Y-%m-%d')}, kernels: median of {self.repeats} at {full}"


def kernel_tables(seconds: Mapping[tuple, float], *, lanes: bool = True) -> dict[str, list[Kernel]]:
    """Tables of kernels by kind and level, from seconds by kind, level and size; ``lanes`` as for
    :class:`~pint_fem.scaling.costs.Kernel`.
    """
    out: dict[str, list[Kernel]] = {}
    for kind, level in dict.fromkeys(key[:2] for key in seconds):
        table = {size: value for (*key, size), value in seconds.items() if key == [kind, level]}
        out.setdefault(kind, []).append(Kernel(tuple(table), tuple(table.values()), lanes))
    return out


def _cold_solves(rf: TimeParallelReducedFunctional) -> dict[str, Action]:
    """Cold sweeps of two cycles."""
    return solve_actions(rf, rf.array([c.control for c in rf.controls]), np.ones_like(rf.problem.L), cycles=2)


def _overhead(seconds: Mapping[str, float], calibration: Calibration, options: dict, steps: int) -> dict[str, float]:
    """Seconds per state stepped of the solves of :func:`_cold_solves` beside kernels and norms."""
    out, model = {}, Model(calibration, options, nsteps=steps)
    for kind, counted in (("state", "step"), ("adjoint", "adjoint")):
        task = ("solves", [Solve(kind, "nested", 2)])
        found = model.run_all([task, task])  # the first one makes factors
        states = sum(n for (what, _), n in found.counts.items() if what == counted) / 2
        out[kind] = max(seconds[kind] - found.task_seconds[1], 0.0) / states
    return out


def calibrate(
    case: Case,
    *,
    comm: MPI.Comm = MPI.COMM_WORLD,
    repeats: int = 15,
    small: int | None = None,
    progress: Progress = lambda text: None,
) -> Calibration | None:
    """Measure the costs of a problem (collective).

    Parameters
    ----------
    case, comm
        The problem, and the processes that measure.
    repeats, small, progress
        Repeats of each measurement, of which the medians are used; steps of the solves that are timed (default: the
        case's); called with a text before each part.

    Returns
    -------
    Calibration or None
        ``None`` on all ranks but the first; without cycles, see :func:`count_cycles`.
    """
    small = small or case.small
    rf = case.pose(SpaceTime("1x1", comm=MPI.COMM_SELF), small, {"mgrit": MGRIT})
    made, watch = None, Stopwatch(repeats)
    if comm.rank == 0:
        progress("kernels, work around sweeps and whole solves on one process")
        made = _measure_alone(case, rf, watch, small, progress)
    wait_quietly(comm)
    if comm.size == 1:
        return made.with_changes(notes=[*made.notes, "one process: network assumed, space ranks not measured"])
    progress("all processes at once, network")
    actions = {key: do for key, do in kernel_actions(rf).items() if key[1] == 0}
    made = measure_all_processes(made, actions, watch, comm)
    progress("kernels on two space ranks")
    found = _space_kernels(case.pose, comm, watch, small)
    if comm.rank:
        return None
    kernels, kind, sizes = found
    notes = [*made.notes[:-1], made.notes[-1] + f"; space ranks: kernels on 2, {kind}"]
    return made.with_changes(
        kernels={**made.kernels, 2: kernels}, space_solver=kind, space_iterations=float(sizes.pop("iterations", 0)),
        space={**made.space, **sizes}, notes=notes,
    )  # fmt: skip


def _measure_alone(
    case: Case, rf: TimeParallelReducedFunctional, watch: Stopwatch, small: int, progress: Progress
) -> Calibration:
    """All costs that one process measures."""
    sweeps, work = rf.problem.sweeps, kernel_actions(rf)
    groups = {"extras": extra_actions(rf), "solves": _cold_solves(rf)}
    seconds = watch(work | {(group, name): do for group, some in groups.items() for name, do in some.items()})
    extras, solves = ({name: seconds[group, name] for name in some} for group, some in groups.items())
    extras["adjoint sum"] = max(extras.pop("all steps") - extras["control gradient"], 0.0) / max(sweeps.slab.k - 1, 1)
    made = Calibration(
        case.name, machine(), rf.evolution.V.dim(), case.nsteps,
        {1: kernel_tables({key: seconds[key] for key in work})},
        norm=extras.pop("norm"),
        extras=extras,
        control_bytes=8.0 * rf.layout.size,
        stages=sweeps.propagators[0].dirk.stages,
        dimension=rf.evolution.V.mesh().unique().topological_dimension,
        space={"factor entries": factor_entries(next(iter(sweeps.propagators[0].factors.values())))},
        sensor_bytes=8.0 * sum(len(getattr(m, "local", ())) for m in rf.problem.misfits),
    )  # fmt: skip
    made = made.with_changes(overhead=_overhead(solves, made, MGRIT, small))
    if any("time_solver" in options for options in case.menu):
        progress("ParaDiag")
        parts, sizes = paradiag_actions(case.pose, case.nsteps, small)
        found = watch(parts)
        if "single solve" in found:
            found["single"] = found.pop("single solve") / found["solve"]
        made = made.with_changes(paradiag=found | sizes)
        few = small if made.unknowns < LARGE else min(small, 32)
        diagonal = case.pose(SpaceTime("1x1", comm=MPI.COMM_SELF), few, solver_parameters(PARADIAG))
        overhead = _overhead(watch(_cold_solves(diagonal)), made, PARADIAG, few)
        made = made.with_changes(paradiag={**made.paradiag, **overhead})
    progress("map from controls to readings")
    made = made.with_changes(linear_inverse=_map_costs(case, watch, None))
    return made.with_changes(notes=[f"{watch.about}, one process at work"])


def _map_costs(case: Case, watch: Stopwatch, made: Calibration | None) -> dict[str, float]:
    pose, steps = case.with_sensors or case.pose, min(case.nsteps, MAP_STEPS)
    rf = pose(SpaceTime("1x1", comm=MPI.COMM_SELF), steps, {"mgrit": {"levels": 1}})
    return inverse_costs(rf, watch, None if made is None else made.kernels[1]["adjoint"][0])


def measure_map(case: Case, made: Calibration, *, repeats: int = 15) -> Calibration:
    """Complete a calibration by the costs of an inversion by the map from controls to readings, measured on this
    process and scaled by the ratio of the calibrated seconds of a step to the present ones.
    """
    watch, kept = Stopwatch(repeats), [note for note in made.notes if not note.startswith(_MAP)]
    found = _map_costs(case, watch, made)
    note = f"{_MAP}: {watch.about}, relative to a step of the adjoint, which is calibrated"
    return made.with_changes(linear_inverse=found, notes=[*kept, note] if found else kept)


_MAP = "map from controls to readings"


def measure_all_processes(
    made: Calibration | None, actions: Mapping[tuple, Action], watch: Stopwatch, comm: MPI.Comm
) -> Calibration | None:
    """Complete the first rank's calibration by the slowdown of kernels on all processes at once, and the network
    (collective).
    """
    seconds, network = watch(actions, comm), _measure_network(comm)
    if comm.rank:
        return None
    tables = made.kernels[1]
    slower = []
    for (kind, level, size), found in seconds.items():
        slower.append(found / dict(zip(tables[kind][level].sizes, tables[kind][level].seconds, strict=True))[size])
    note = f"slowdown: the same kernels on {comm.size} processes at once, {min(slower):.2f} to {max(slower):.2f} times "
    slowdown = {1: 1.0, comm.size: max(statistics.median(slower), 1.0)}
    return made.with_changes(slowdown=slowdown, network=network, notes=[*made.notes, f"{note}as long, median"])


def _measure_network(comm: MPI.Comm) -> Network:
    """Latency and bandwidth between the first two ranks: half a round trip of 8 bytes, and of 4 MB (collective)."""

    def round_trip(nbytes: int) -> Callable[[], None]:
        buffer = np.zeros(nbytes // 8)

        def run():
            for sender in (0, 1):
                if comm.rank < 2:
                    (comm.Send if comm.rank == sender else comm.Recv)(buffer, 1 - comm.rank)

        return run

    large = 1 << 22
    found = rounds({n: round_trip(n) for n in (8, large)}, 9, comm=comm)
    latency, long = found[8].seconds / 2, found[large].seconds / 2
    return Network(latency, large / max(long - latency, 1e-9), "measured: ping-pong on the calibrating machine")


def _space_kernels(pose: Callable, comm: MPI.Comm, watch: Stopwatch, small: int) -> tuple[dict, str, dict] | None:
    """Kernels on two space ranks, and the solver with its sizes of :func:`solver_in_space`; ``None`` on all ranks but
    these two (collective).
    """
    pair = comm.Split(0 if comm.rank < 2 else 1, comm.rank)
    if comm.rank > 1:
        return None
    rf = pose(SpaceTime((2, 1), comm=pair), small, {"mgrit": MGRIT})
    sweeps = rf.problem.sweeps
    seconds = watch(kernel_actions(rf), pair)
    return kernel_tables(seconds), *solver_in_space(next(iter(sweeps.propagators[0].factors.values())))


def count_impulses(pose: Callable, steps: int, cycles: Sequence[Mapping]) -> list[dict]:
    """Complete counted cycles by those of the adjoint of one sensor's reading, from a cold start, in real runs.

    Its source is a point in space and in time, so that it may take more cycles than a misfit's. They are counted for
    the smallest tolerance, under ``impulse``, which is ``None`` where a configuration does not converge.

    Parameters
    ----------
    pose, steps
        As for :class:`Case`, of a problem with sensors.
    cycles
        ``cycles`` of :class:`~pint_fem.scaling.costs.Calibration`.
    """
    rtol, out = min(entry["rtol"] for entry in cycles), []
    for entry in cycles:
        out.append(dict(entry))
        if entry["rtol"] != rtol:
            continue
        count = min(steps, PARADIAG_STEPS) if "time_solver" in entry["options"] else steps
        rf = pose(SpaceTime("1x1", comm=MPI.COMM_SELF), count, solver_parameters(entry["options"], rtol=rtol))
        problem, table = rf.problem, ReadingTable(rf.problem.misfits)
        source = np.zeros_like(problem.L)
        source[-1] = table.impulses(np.array([table.sensors // 2]))[0]
        try:
            solve_actions(rf, np.zeros(problem.layout.size), source)["adjoint"][0]()
            out[-1]["impulse"] = problem.sweeps.results[-1][1].cycles
        except SolverFailure:
            out[-1]["impulse"] = None
    return out


def count_cycles(case: Case) -> list[dict]:
    """Count the cycles of cold state and adjoint solves in real runs on this process.

    Each configuration of the menu is solved once, to the smallest tolerance; its residuals determine the cycles for the
    others. Configurations that do not converge are left out.

    Returns
    -------
    list of dict
        ``cycles`` of :class:`~pint_fem.scaling.costs.Calibration`.
    """
    out, pose = [], case.smaller or case.pose
    for options in case.menu:
        count = min(case.nsteps, PARADIAG_STEPS) if "time_solver" in options else case.nsteps
        rf = pose(SpaceTime("1x1", comm=MPI.COMM_SELF), count, solver_parameters(options, rtol=min(case.rtol)))
        problem = rf.problem
        problem.invalidate()
        try:
            problem.derivative(rf.array([c.control for c in rf.controls]) + 1.0)
        except SolverFailure:
            continue
        evaluation = problem.evaluations[0]
        for rtol in case.rtol:
            met = lambda result, rtol=rtol: next(i for i, r in enumerate(result.residuals) if r <= rtol * result.scale)
            entry = {"state": met(evaluation.state), "adjoint": met(evaluation.adjoint)}
            out.append({"options": dict(options), "rtol": rtol, **entry})
    return out
