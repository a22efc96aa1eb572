"""``pint-fem plan``: the fastest grid, levels and solver by predicted times."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpi4py import MPI

from pint_fem.cli import file_name, last_lines, positive, say, waiting
from pint_fem.collective import on_first_rank
from pint_fem.commands.common import named_object, parser_of
from pint_fem.errors import InputError

if TYPE_CHECKING:
    from pint_fem.scaling.planner import Choice

__all__ = ["demo_arguments", "plan_command"]


def plan_command(arguments: Sequence[str]) -> None:
    """Print the fastest ways to compute a gradient from a cold start, by predicted times."""
    from pint_fem.scaling.costs import bundled
    from pint_fem.scaling.network import Network
    from pint_fem.scaling.planner import describe, plan

    parser = parser_of("plan", plan_command.__doc__, petsc=False)
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
    with waiting(f"predicting times of {problem if isinstance(problem, str) else opts.problem} on {opts.ranks} ranks"):
        made = on_first_rank(MPI.COMM_WORLD, "", partial(plan, problem, opts.ranks, **given, **several))
    if opts.quiet:
        say(demo_arguments(made.best), result=True)
        return
    of = f" of {opts.experiments} experiments" if opts.experiments > 1 else ""
    say(
        f"{made.problem} on {made.ranks} ranks, one gradient{of} from cold to rtol {made.rtol:g} (all figures "
        "predicted)"
    )
    head = f"{'cycles':>7}{'seconds':>11}{'MB per rank':>13}{'busy':>6}"
    axes = "space x time" + " x experiments" * (opts.experiments > 1)
    width = len(axes) + 2
    say(f"{'solver':8}{axes:>{width}}  {'coarsening, relaxation':34}{head}")
    for choice in [made.best, *made.alternatives]:
        serial = choice.solver == "serial"
        what, cycles = ("", "") if serial else (describe(choice.options), f"{choice.cycles[0]}+{choice.cycles[1]}")
        numbers = f"{choice.seconds:>11.4g}{choice.bytes_per_rank / 1e6:>13.3g}{choice.efficiency:>6.0%}"
        say(f"{choice.solver:8}{' x '.join(map(str, choice.grid)):>{width}}  {what:34}{cycles:>7}{numbers}")
    say(f"run: {demo_arguments(made.best)}")
    found = []
    if opts.experiments == 1 and isinstance(problem, str):  # a map is not divided over groups of experiments
        with waiting("predicting times of the map from controls to readings"):
            found = on_first_rank(MPI.COMM_WORLD, "", partial(_plan_map, opts.problem, opts.ranks, given))
    for line in found:
        say(line)
    for text in made.assumptions:
        say(f"assumed: {text}")
    ranks = prod(made.best.grid)
    last_lines(next_step=f"run your program with mpiexec -n {ranks} and the arguments of the line that begins with run")


def _measured(text: str) -> Any:
    """The costs of a problem ``MODULE:NAME``, measured on the ranks of this run."""
    from pint_fem.scaling.calibrate import Case
    from pint_fem.scaling.grid_choice import measured_costs

    found = named_object(text, "problem")
    if isinstance(found, Case):
        case = found
        found = lambda st: case.pose(st, case.nsteps, {"time_solver": "serial"})
    elif not callable(found):
        raise InputError(f"{text}: give a Case or a function of a SpaceTime, not {type(found).__name__}")
    with waiting(f"measuring the steps of {text}"):
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
