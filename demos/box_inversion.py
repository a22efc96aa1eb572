"""The program that the source inversions in a box share: options, memory, run and report.

A demo names its problem: what poses it (:class:`problems.box.BoxSource`), what records the same with plain Firedrake
and pyadjoint, its own options and settings.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from demos.inversion import add_method, add_trust_region, settle_method
from pint_fem.cli import ProgramParser, file_name, positive, say, waiting

__all__ = ["Shown", "add_box", "invert_box", "settle_box"]

FEW_STEPS = {2: 16, 3: 8, 4: 4}
"""Steps of ``--compare-serial`` by the number of refinements; all on coarser meshes."""


class Shown(NamedTuple):
    """What of a problem is drawn and printed.

    Attributes
    ----------
    quantity : str
        The source, in words, such as ``"source"``.
    label, reading : str
        Of the colour bar, and what sensors read, each with its unit.
    names : tuple of str
        Of the quantities of a sensor.
    planes : sequence of (int, float)
        Constant coordinate and value of each section.
    scalar : callable
        The scalar that is drawn, of the control.
    vectors : bool
        Whether the control is a vector, whose arrows are drawn, too.
    """

    quantity: str
    label: str
    reading: str
    names: tuple[str, ...]
    planes: Sequence[tuple[int, float]]
    scalar: Callable = lambda f: f
    vectors: bool = False


# -- options -----------------------------------------------------------------------------------------------------------
def add_box(parser: ProgramParser, *, out: str, most: int, columns: Sequence[str], steps: int, integrator: str) -> None:
    """Add the options that both demos have.

    Parameters
    ----------
    parser
        Of the program.
    out, steps, integrator
        Default folder of the results, number of steps and integrator.
    most
        Largest number of refinements.
    columns
        Of the readings.
    """
    add = parser.add_argument
    add("--refine", type=int, default=2, metavar=f"0..{most}", choices=range(most + 1),
        help="refinements of the coarsest mesh, each of which has eight times as many cells (2)")  # fmt: skip
    add_method(add, default="auto")
    add("--grid", default="auto", metavar="SxT", help="ranks in space x ranks in time (default: all ranks in time)")
    add("--sensors", type=file_name, metavar="FILE.csv", help=f"readings: {','.join(columns)} (default: the shipped)")
    add("--steps", type=positive(int), default=steps, help=f"time steps ({steps})")
    add("--integrator", default=integrator, help=f"BackwardEuler, SDIRK2, ImplicitMidpoint... ({integrator})")
    add("--alpha", type=positive(float, zero=True), help="weight of the source's gradient in the regularisation")
    add("--beta", type=positive(float), help="weight of the source's size in the regularisation")
    add("--noise", type=positive(float), help="noise of the readings relative to the largest")
    add("--time-solver", choices=["auto", "mgrit", "paradiag", "serial"],
        help="auto (the fastest by measured times of a step), mgrit, paradiag, serial (sequential stepping); default: "
        "serial with --method map, else auto")  # fmt: skip
    add("--storage", choices=["all", "C"],
        help=f"states that are stored: all, or C-points only, between which steps are taken again (C with --refine "
        f"{most}, else all)")  # fmt: skip
    add("--out", type=Path, default=Path(out), help=f"folder of the results ({out})")
    add("--no-fields", action="store_true", help="write no ParaView files")
    add("--compare-serial", nargs="?", type=positive(int), const=0, metavar="STEPS",
        help="evaluate J, gradient and a Hessian action with plain Firedrake + pyadjoint, too, on all ranks in space, "
        "for so many steps, and extrapolate (all steps with --refine 0 and 1, then 16, 8, 4)")  # fmt: skip
    add_trust_region(parser, gtol=f"1e-6, with --refine {most} 1e-4", checkpoints=True)


def settle_box(opts, *, most: int) -> None:
    """Give the options of the trust region and the storage their defaults; the largest meshes have no map."""
    if opts.method == "auto" and opts.refine == most:
        opts.method = "trust-region"  # rows of the map are as large as states, one for each reading
    settle_method(opts, gtol=1e-4 if opts.refine == most else 1e-6, max_iterations=100)
    if opts.storage is None:
        opts.storage = "C" if opts.refine == most and opts.time_solver != "paradiag" else "all"
    if opts.compare_serial == 0:
        opts.compare_serial = FEW_STEPS.get(opts.refine, opts.steps)
    if opts.compare_serial is not None:
        opts.compare_serial = min(opts.compare_serial, opts.steps)


# -- the run -----------------------------------------------------------------------------------------------------------
def invert_box(
    title: str, opts, *, pose: Callable, record: Callable, settings: Mapping[str, Any], shipped: bool, shown: Shown
) -> None:
    """Pose the problem, minimise it and write the results (collective).

    Parameters
    ----------
    title
        Of the inversion, for sentences.
    opts
        Options of the command line, settled.
    pose
        ``pose(spacetime, **settings, first_steps=..., solver_parameters=...)`` returns a
        :class:`~problems.box.BoxSource`.
    record
        ``record(spacetime, **settings, first_steps=...)`` records the same on a tape, on a grid without ranks in time.
    settings
        Arguments of both.
    shipped
        Whether the readings are the shipped ones, whose source is known.
    shown
        What is drawn.
    """
    from demos.box_report import report
    from demos.inversion import invert, summary_of
    from demos.outputs import Outputs, output_folder
    from pint_fem.spacetime import SpaceTime

    spacetime, outputs = SpaceTime(opts.grid), Outputs()
    output_folder(opts.out)
    if opts.time_solver == "auto" and opts.storage == "C" and spacetime.time_size == 1:
        opts.time_solver = "serial"  # cycles pay on several ranks in time
    solver: dict[str, Any] = {"time_solver": opts.time_solver, "mgrit": {"rtol": opts.rtol}}
    if opts.time_solver == "paradiag":
        solver["paradiag"] = {"rtol": opts.rtol}
    if opts.storage == "C":
        solver["mgrit"]["storage"] = "C"
    if not opts.exact and opts.method != "map":
        solver["typical_rtol"] = 1e-2  # of products with the Hessian, which are most of the solves

    say(f"{title} on {spacetime.space_size} x {spacetime.time_size} ranks (space x time)")
    start = time.perf_counter()
    with waiting("set-up: meshes, forms, kernels, factors"):
        problem = pose(spacetime, **settings, solver_parameters=solver)
    times, rf = {"set-up": time.perf_counter() - start}, problem.rf
    V, control = problem.evolution.V, problem.evolution.control.function_space()
    sizes = " + ".join(str(part.dim()) for part in V)
    say(
        f"{sizes} unknowns in space, {opts.steps} steps of {opts.integrator}, {control.dim()} values of the control, "
        f"{problem.readings.values.size} readings"
    )
    solvers = rf.problem.sweeps.solvers
    say(solvers.view())
    memory = stated_memory(problem, opts, say)
    result, posterior = invert(rf, opts, say, outputs, times)
    measured_memory(spacetime, memory, say, by_map=posterior is not None)
    summary = summary_of(title, dict(settings), spacetime, V.dim(), times)
    summary |= {"controls": control.dim(), "memory": memory}
    summary["solvers"] = {"time_solver": solvers.kind, "view": solvers.view().splitlines()}
    compare = None
    if opts.compare_serial:
        from problems.compare_box import compare_box

        calls = tuple(getattr(result, f"{name}_calls", None) for name in ("value", "gradient", "hessian"))
        compare = lambda: compare_box(
            problem,
            pose=lambda **given: pose(spacetime, **settings, solver_parameters=solver, **given),
            record=lambda grid, **given: record(grid, **settings, **given),
            first_steps=opts.compare_serial,
            calls=None if None in calls else calls,
            result=result,
            seconds=times["set-up"] + times["inversion"],
            say=say,
        )
    report(problem, result, posterior, opts, summary, say, outputs, shipped=shipped, shown=shown, compare=compare)


# -- memory ------------------------------------------------------------------------------------------------------------
def stated_memory(problem, opts, say: Callable) -> dict:
    """Print and return the bytes of the inversion, before it is run: those of ``J.memory()`` and of the minimiser's
    vectors beside what the process has already (collective).
    """
    from pint_fem.adjoint.minimisation.method_choice import MapWork

    rf, comm = problem.rf, problem.spacetime.comm
    estimate = rf.memory()
    vectors = 8 * rf.layout.size * (2 * 40 + 12)  # pairs of the limited-memory preconditioner, and of iterations
    by_map = MapWork.of(rf.problem).nbytes
    most = lambda n: max(comm.allgather(int(n)))
    now, arrays, petsc = most(_resident()), most(estimate.arrays()), most(sum(estimate.petsc.values()))
    stated = {
        "process_after_set_up": now,
        "arrays_of_sweeps": arrays,
        "petsc_operators": petsc,
        "vectors_of_minimiser": most(vectors),
        "rows_of_map": most(by_map),
        "stated_peak": now + arrays + most(vectors),
        "stated_peak_of_map": now + arrays + most(by_map),
        "by_part": str(estimate),
    }
    say(str(estimate))
    size = lambda name: f"{stated[name] / 2**20:.0f} MB"
    say(
        f"memory stated before the run, per rank: {size('stated_peak')} at the peak of the trust region, of which "
        f"{size('process_after_set_up')} now (mesh, operators), {size('arrays_of_sweeps')} sweeps, "
        f"{size('vectors_of_minimiser')} vectors of the minimiser"
        + ("" if opts.method == "trust-region" else f"; with the map in their place {size('stated_peak_of_map')}")
    )
    return stated


def measured_memory(spacetime, memory: dict, say: Callable, *, by_map: bool) -> None:
    """Print and add the largest resident set of a rank's process until now, beside what was stated for the method that
    was taken (collective).
    """
    peaks = spacetime.comm.allgather(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    memory |= {"measured_peak": max(peaks), "measured_peak_of_all_ranks": sum(peaks)}
    stated = memory["stated_peak_of_map" if by_map else "stated_peak"]
    say(
        f"memory measured, per rank: {max(peaks) / 2**20:.0f} MB at the peak (stated: "
        f"{stated / 2**20:.0f} MB), {sum(peaks) / 2**20:.0f} MB on all ranks"
    )


def _resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
