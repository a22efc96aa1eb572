"""Command line of the package: plans, measurements, the check of a user's evolution, and what is installed.

pint-fem plan PROBLEM --ranks P    the fastest grid, levels and solver by predicted times, and alternatives; a whole
                                   linear inversion by the map from controls to readings
pint-fem scaling calibrate --case MODULE:NAME    measure a problem's costs (mpiexec -n 2: network and space ranks, too)
pint-fem scaling validate --case MODULE:NAME     time solves on the available ranks, beside the predictions
pint-fem check MODULE:FUNCTION     check steps, derivatives and transfers of an evolution or a reduced functional
pint-fem info                      versions of the libraries, and what PETSc is built with
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpi4py import MPI

from pint_fem.cli import ProgramParser, file_name, positive, run
from pint_fem.collective import on_first_rank
from pint_fem.errors import InputError
from pint_fem.files import as_input_error, require_output, write_whole

if TYPE_CHECKING:
    from pint_fem.scaling.planner import Choice

__all__ = ["command", "demo_arguments", "main"]

LIBRARIES = ("pint_fem", "firedrake", "petsc4py", "irksome", "mpi4py", "numpy", "scipy", "torch", "greenlet")
PACKAGES = {"MUMPS": "mumps", "CHOLMOD": "cholmod", "UMFPACK": "umfpack", "hypre": "hypre", "PT-Scotch": "ptscotch"}
"""What PETSc may be built with, by name and PETSc's own name."""
PARTS = ("costs", "cycles", "map")


def main() -> None:
    """Run ``pint-fem`` with the program's arguments, and exit: status 2 on bad input, with one line on stderr."""
    run(partial(command, sys.argv[1:]))


def command(arguments: Sequence[str]) -> None:
    """Run one command (collective).

    Parameters
    ----------
    arguments
        Words of the command line, beginning with the command.

    Raises
    ------
    InputError
        On every rank, on an unknown command, option or value.
    SystemExit
        With status 1 where a check has failed.
    """
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        _print(__doc__.strip())
        return
    _choose(name, {"plan": _plan, "scaling": _scaling, "check": _check, "info": _info}, "command")(rest)


def _choose(name: str, commands: dict[str, Callable], what: str) -> Callable:
    if name not in commands:
        raise InputError(f"{what} {name!r}: give one of {', '.join(commands)}")
    return commands[name]


def _print(text: str) -> None:
    """Print on the first rank."""
    if MPI.COMM_WORLD.rank == 0:
        print(text, flush=True)


def _parser(name: str, about: str | None, **options: Any) -> ProgramParser:
    return ProgramParser(prog=f"pint-fem {name}", description=about, **options)


def _named_object(text: str, what: str) -> Any:
    """The object ``MODULE:NAME`` of a user's module, which may be in the current folder."""
    module, _, name = text.partition(":")
    if not module or not name:
        raise InputError(f"{what} {text!r}: give module:name, such as my_problem:{what}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a module that the user's imports
        raise InputError(f"{what} {text!r}: there is no module {error.name}") from None
    if not hasattr(found, name):
        raise InputError(f"{what} {text!r}: module {module} has no {name}")
    return getattr(found, name)


def _require_output(path: Path) -> None:
    """Raise on every rank, before any measurement, where the file of the results cannot be written."""
    on_first_rank(MPI.COMM_WORLD, "", partial(require_output, path, "--out", makes_folder=True))


def _write(path: Path, text: str) -> None:
    """Write a result on the first rank, whole, or raise ``InputError`` on every rank and leave the last one."""

    def write() -> None:
        with as_input_error(f"--out {path} cannot be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text.encode())

    on_first_rank(MPI.COMM_WORLD, "", write)


# -- plan ------------------------------------------------------------------------------------------------------------
def _plan(arguments: Sequence[str]) -> None:
    """Print the fastest ways to compute a gradient from a cold start, by predicted times."""
    from pint_fem.scaling.costs import bundled
    from pint_fem.scaling.network import Network
    from pint_fem.scaling.planner import describe, plan

    parser = _parser("plan", _plan.__doc__, petsc=False)
    add = parser.add_argument
    about = "a file of pint-fem scaling calibrate, or module:name of a Case or a function of a SpaceTime that returns"
    add("problem", type=file_name, help=f"{', '.join(bundled())}, {about} an Evolution, whose steps are measured here")
    add("--ranks", type=positive(int), default=256, help="most processes (256)")
    add("--experiments", type=positive(int), default=1, help="experiments of which J is the sum (1)")
    add("--steps", type=positive(int), help="time steps (default: the problem's)")
    add("--rtol", type=positive(float), help="relative tolerance of the solves (default: the smallest counted)")
    add("--network", help="latency and bandwidth, such as 2us,12GB/s (default: as measured)")
    opts = parser.read(arguments)
    network = None if opts.network is None else Network.parse(opts.network)
    given = dict(nsteps=opts.steps, rtol=opts.rtol, network=network)
    problem = opts.problem
    if ":" in problem and not Path(problem).is_file():
        problem = _measured(problem)
    several = dict(experiments=opts.experiments)
    made = on_first_rank(MPI.COMM_WORLD, "", partial(plan, problem, opts.ranks, **given, **several))
    of = f" of {opts.experiments} experiments" if opts.experiments > 1 else ""
    _print(
        f"{made.problem} on {made.ranks} ranks, one gradient{of} from cold to rtol {made.rtol:g} (all figures "
        "predicted)"
    )
    head = f"{'cycles':>7}{'seconds':>11}{'MB per rank':>13}{'busy':>6}"
    axes = "space x time" + " x experiments" * (opts.experiments > 1)
    width = len(axes) + 2
    _print(f"{'solver':8}{axes:>{width}}  {'coarsening, relaxation':34}{head}")
    for choice in [made.best, *made.alternatives]:
        serial = choice.solver == "serial"
        what, cycles = ("", "") if serial else (describe(choice.options), f"{choice.cycles[0]}+{choice.cycles[1]}")
        numbers = f"{choice.seconds:>11.4g}{choice.bytes_per_rank / 1e6:>13.3g}{choice.efficiency:>6.0%}"
        _print(f"{choice.solver:8}{' x '.join(map(str, choice.grid)):>{width}}  {what:34}{cycles:>7}{numbers}")
    _print(f"run: {demo_arguments(made.best)}")
    found = []
    if opts.experiments == 1 and isinstance(problem, str):  # a map is not divided over groups of experiments
        found = on_first_rank(MPI.COMM_WORLD, "", partial(_plan_map, opts.problem, opts.ranks, given))
    for line in found:
        _print(line)
    for text in made.assumptions:
        _print(f"assumed: {text}")


def _measured(text: str) -> Any:
    """The costs of a problem ``MODULE:NAME``, measured on the ranks of this run."""
    from pint_fem.scaling.calibrate import Case
    from pint_fem.scaling.grid_choice import measured_costs

    found = _named_object(text, "problem")
    if isinstance(found, Case):
        case = found
        found = lambda st: case.pose(st, case.nsteps, {"time_solver": "serial"})
    elif not callable(found):
        raise InputError(f"{text}: give a Case or a function of a SpaceTime, not {type(found).__name__}")
    made = measured_costs(found, solver_parameters={"time_solver": "auto"})
    return made.with_changes(problem=text)


def _plan_map(problem: Path, ranks: int, given: dict) -> list[str]:
    """Lines on an inversion by the map from controls to readings, none where the calibration has no costs of it."""
    from pint_fem.scaling.costs import load
    from pint_fem.scaling.planner import describe, plan_map

    calibration = load(problem)
    costs = calibration.linear_inverse
    if not costs:
        return []
    found = plan_map(calibration, ranks, **given)
    (space, time, groups, each), how = found.division, "sequential steps"
    if each > 1:
        how = describe(found.options)
    parts = ", ".join(f"{part} {seconds:.3g}" for part, seconds in found.parts.items())
    return [
        f"map from controls to readings, {costs['sensors']:.0f} sensors: the whole inversion in {found.seconds:.3g} s, "
        f"{found.with_deviation:.3g} s with the standard deviation, on {found.division.ranks} of {ranks} ranks",
        f"  {groups} groups of sensors x {each} in time x {space} in space ({space} x {time}), {how}; "
        f"{found.bytes_per_rank / 1e6:.3g} MB per rank",
        f"  seconds: {parts}",
    ]


def demo_arguments(choice: Choice) -> str:
    """Arguments of the demos for a choice of :func:`pint_fem.scaling.planner.plan`."""
    grid, solver = "x".join(map(str, choice.grid)), choice.solver
    text = lambda value: ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    own = {} if solver == "serial" else {k: v for k, v in choice.options.items() if k != "time_solver"}
    return " ".join([f"--grid {grid} --time-solver {solver}", *(f"-{solver}_{k} {text(v)}" for k, v in own.items())])


# -- scaling ---------------------------------------------------------------------------------------------------------
def _scaling(arguments: Sequence[str]) -> None:
    """Measure the costs of a problem, or validate predictions from them."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        _print(__doc__.strip())
        return
    _choose(name, {"calibrate": _calibrate, "validate": _validate}, "scaling command")(rest)


def _case(text: str | None) -> Any:
    """The problem ``MODULE:NAME``, a ``Case`` or a function without arguments that returns one."""
    from pint_fem.scaling.calibrate import Case

    if text is None:
        raise InputError("--case: give the problem, module:name of a pint_fem.scaling.calibrate.Case")
    found = _named_object(text, "case")
    found = found() if not isinstance(found, Case) and callable(found) else found
    if not isinstance(found, Case):
        raise InputError(f"--case {text}: give a pint_fem.scaling.calibrate.Case, not {type(found).__name__}")
    return found


def _calibrate(arguments: Sequence[str]) -> None:
    """Measure the costs of a problem's arithmetic and count cycles; write a calibration."""
    from pint_fem.scaling import calibrate as measure
    from pint_fem.scaling.costs import load

    parser = _parser("scaling calibrate", _calibrate.__doc__)
    add = parser.add_argument
    add("--case", help="the problem, module:name of a pint_fem.scaling.calibrate.Case")
    add("--only", default="", help=f"a part ({', '.join(PARTS)}); the others of the file are left as they are")
    add("--repeats", type=positive(int), default=15, help="of each measurement; medians are used (15)")
    add("--out", type=Path, help="file (default: NAME.json)")
    opts, comm = parser.read(arguments), MPI.COMM_WORLD
    if opts.only not in ("", *PARTS):
        raise InputError(f"--only {opts.only}: give {', '.join(PARTS)}")
    case = _case(opts.case)
    path = opts.out or Path(f"{case.name}.json")
    made = on_first_rank(comm, "", lambda: load(path) if path.is_file() else None)
    if opts.only not in ("", "costs") and made is None:
        raise InputError(f"--only {opts.only}: there is no {path} to complete; measure the costs first")
    _require_output(path)
    if opts.only in ("", "costs"):
        progress, cycles = lambda text: _print(f"measuring: {text}"), () if made is None else made.cycles
        made = measure.calibrate(case, comm=comm, repeats=opts.repeats, progress=progress)
        made = made and made.with_changes(cycles=cycles)
    if opts.only in ("", "cycles") and case.menu:
        cycles = on_first_rank(comm, "", measure.count_cycles, case)
        made = made and made.with_changes(cycles=cycles)
    if opts.only == "map":
        made = on_first_rank(comm, "", partial(measure.measure_map, case, made, repeats=opts.repeats))
    _write(path, "" if made is None else made.to_json())
    _print(f"written: {path}")


def _validate(arguments: Sequence[str]) -> None:
    """Time solves on all ranks, and compare the times with the predicted ones."""
    from pint_fem.scaling.costs import load
    from pint_fem.scaling.validation import compare

    parser = _parser("scaling validate", _validate.__doc__)
    add = parser.add_argument
    add("--case", help="the problem, module:name of a pint_fem.scaling.calibrate.Case")
    add("--calibration", help="file, or name of a bundled one (default: NAME.json, else the bundled one)")
    add("--steps", type=positive(int), default=256, help="time steps (256)")
    add("--rtol", type=positive(float), default=1e-6, help="relative tolerance of the solves (1e-6)")
    add("--options", default="{}", help='of the solver, as JSON such as {"levels": 2, "coarsening": 16}')
    add("--grid", metavar="SxT", help="ranks in space x in time; auto: by steps that are measured (all in time)")
    add("--repeats", type=positive(int), default=5, help="of each measurement; medians are used (5)")
    add("--out", type=Path, help="file")
    opts = parser.read(arguments)
    try:
        options = json.loads(opts.options)
    except ValueError as error:
        raise InputError(f"--options {opts.options}: no JSON ({error})") from None
    case = _case(opts.case)
    own = Path(f"{case.name}.json")
    calibration = load(opts.calibration or (own if own.is_file() else case.name))
    if opts.out:
        _require_output(opts.out)
    grid = opts.grid
    if grid == "auto":
        from pint_fem.scaling.grid_choice import choose_grid

        measure = lambda st: case.pose(st, opts.steps, {"time_solver": "serial"})
        made = choose_grid(measure, solver_parameters={"mgrit": dict(options or case.solver)})
        grid = made.grid
        _print(made.why)
    given = dict(rtol=opts.rtol, grid=grid, repeats=opts.repeats)
    for row in (rows := compare(calibration, case.pose, options or case.solver, opts.steps, **given)):
        _print(
            f"{case.name}, {row.steps} steps, {row.space}x{row.ranks} ranks, {row.task}: measured {row.measured:.4g} "
            f"s, predicted {row.predicted:.4g} s, error {row.error:+.1%} (kernels, timed in turn with it, took "
            f"{row.slower:.2f} times as long as calibrated)"
        )
    if opts.out:
        _write(opts.out, json.dumps([{**asdict(row), "error": row.error} for row in rows], indent=1))


# -- check -----------------------------------------------------------------------------------------------------------
def _check(arguments: Sequence[str]) -> None:
    """Check the steps, derivatives and transfers of an evolution or a reduced functional (a small one)."""
    parser = _parser("check", _check.__doc__)
    parser.add_argument("problem", help="module:function of an evolution or reduced functional")
    parser.add_argument("--rtol", type=positive(float), default=1e-10, help="relative accuracy (1e-10)")
    parser.add_argument("--seed", type=positive(int, zero=True), default=0, help="of states and directions (0)")
    opts = parser.read(arguments)
    made = _named_object(opts.problem, "problem")
    from pint_fem.evolution.evolution import Evolution
    from pint_fem.sweeps.checking import check_sweeps
    from pint_fem.sweeps.selection import mgrit_options
    from pint_fem.sweeps.sweeps import Sweeps

    made = made() if callable(made) and not isinstance(made, Evolution) and not hasattr(made, "problem") else made
    if isinstance(made, Evolution):
        from pint_fem.spacetime import SpaceTime

        world, space = MPI.COMM_WORLD, made.V.mesh().comm.size
        if world.size % space:
            raise InputError(f"{opts.problem}: a mesh on {space} of {world.size} ranks; give it SpaceTime().space_comm")
        sweeps = Sweeps(made, SpaceTime((space, world.size // space)), options=mgrit_options(None))
    else:
        sweeps = getattr(getattr(made, "problem", None), "sweeps", None)  # type: ignore[assignment]
        if not isinstance(sweeps, Sweeps):
            kind = type(made).__name__
            raise InputError(f"{opts.problem}: give an Evolution or TimeParallelReducedFunctional, not {kind}")
    if not check_sweeps(sweeps, seed=opts.seed, rtol=opts.rtol).passed:
        raise SystemExit(1)


# -- info ------------------------------------------------------------------------------------------------------------
def _info(arguments: Sequence[str]) -> None:
    """Print versions of the libraries, and what PETSc is built with."""
    _parser("info", _info.__doc__, petsc=False).read(arguments)
    lines = [("Python", platform.python_version()), ("MPI", MPI.Get_library_version().split("\n")[0].split(",")[0])]
    lines += [(name, _version(name)) for name in LIBRARIES]
    try:
        from petsc4py import PETSc
    except ImportError:
        lines.append(("PETSc", "not installed"))
    else:
        lines.append(("PETSc", ".".join(map(str, PETSc.Sys.getVersion()))))
        lines += [(f"PETSc: {what}", _built_in(PETSc, name)) for what, name in PACKAGES.items()]
    for name, value in lines:
        _print(f"{name:36}{value}")


def _built_in(PETSc: Any, package: str) -> str:
    return "yes" if PETSc.Sys.hasExternalPackage(package) else "no"


def _version(name: str) -> str:
    """Version of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
