"""The program that the demos of optimal control share: options, run and progress.

A demo names its problem: the settings (:class:`problems.heat_control.HeatControl` or one like it), what poses it, the
forms of the serial tape, and what its pictures are called (:class:`demos.control_report.Labels`).
"""

from __future__ import annotations

import logging
import time
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demos.inversion import add_trust_region, settle_method, sum_of_counts, summary_of
from demos.outputs import Outputs, output_folder
from demos.planned_grid import GRID_HELP, measured_grid
from pint_fem.cli import ProgramParser, positive, say, waiting

if TYPE_CHECKING:
    from demos.control_report import Labels
    from problems.control import ControlForms, ControlProblem

__all__ = ["add_control_options", "bounds", "control", "read_control_options", "settings_of"]

METHODS = ("auto", "kkt", "trust-region")


# -- options -----------------------------------------------------------------------------------------------------------
def bounds(text: str) -> tuple[float | None, float | None] | None:
    """Return bounds of the controls, given as ``LOW,HIGH``, each of which may be left out, or ``none``."""
    if text == "none":
        return None
    try:
        low, high = (float(part) if part.strip() else None for part in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"{text!r}: give two numbers, such as 0,0.8, one of them as 0, or none") from None
    if low is not None and high is not None and not low < high:
        raise ArgumentTypeError(f"{text!r}: give a lower bound below the upper one")
    return low, high


def add_control_options(parser: ProgramParser, defaults: Any, *, out: str, gtol: str = "1e-6") -> None:
    """Add the options that all demos of optimal control have.

    Parameters
    ----------
    parser
        Of the program.
    defaults
        Settings of the problem with its defaults.
    out, gtol
        Default folder of the results, and the default tolerance of the gradient in words.
    """
    add = parser.add_argument
    low, high = defaults.bounds or (None, None)
    shown = "none" if defaults.bounds is None else f"{'' if low is None else f'{low:g}'},{high:g}"
    add(
        "--method",
        default="auto",
        choices=METHODS,
        help="kkt (state, adjoint and control of all steps at once), trust-region (sweeps in each iteration), auto (as "
        "the problem allows; it prints why) (auto)",
    )
    add("--grid", metavar="SxT", help=f"ranks in space x ranks in time; {GRID_HELP} all ranks in time")
    add("--cells", type=positive(int), help=f"squares along a side ({defaults.cells})")
    add("--steps", type=positive(int), help=f"time steps ({defaults.steps})")
    add("--integrator", help=f"BackwardEuler, SDIRK2 or ImplicitMidpoint ({defaults.integrator})")
    add("--regularisation", type=positive(float), help=f"weight of the control's square ({defaults.regularisation:g})")
    add(
        "--bounds",
        type=bounds,
        metavar="LOW,HIGH",
        default=defaults.bounds,
        help=f"bounds of the control, or none; with a negative number --bounds=-1,1 ({shown})",
    )
    add(
        "--time-solver",
        default="auto",
        choices=["auto", "mgrit", "paradiag", "serial"],
        help="of sweeps: auto (the fastest by measured times of a step), mgrit, paradiag, serial (sequential stepping) "
        "(auto)",
    )
    add("--out", type=Path, default=Path(out), help=f"folder of the results ({out})")
    add("--no-fields", action="store_true", help="write no ParaView files")
    add(
        "--compare-serial",
        action="store_true",
        help="evaluate the same on a plain serial tape of Firedrake + pyadjoint too, and extrapolate (tens of minutes "
        "with the default steps)",
    )
    add_trust_region(parser, gtol=gtol, checkpoints=True, heading="options of the minimisation")


def read_control_options(parser: ProgramParser, *, gtol: float = 1e-6, max_iterations: int = 50):
    """Return the options of the command line, with the defaults of the minimisation."""
    opts = parser.read()
    settle_method(opts, gtol=gtol, max_iterations=max_iterations)
    return opts


def settings_of(kind: type, opts) -> Any:
    """Return settings of a problem, a frozen dataclass, from the options that have the names of its fields and are
    given.

    Raises
    ------
    InputError
        If a value is out of range.
    """
    given = {f.name: getattr(opts, f.name) for f in fields(kind)}
    return kind(**{name: value for name, value in given.items() if value is not None or name == "bounds"})


# -- the run -----------------------------------------------------------------------------------------------------------
def control(
    title: str,
    opts,
    settings: Any,
    *,
    pose: Callable[..., ControlProblem],
    forms: Callable[..., ControlForms],
    labels: Labels,
) -> None:
    """Pose the problem, minimise it and write the results (collective).

    Parameters
    ----------
    title
        Of the problem, for sentences.
    opts
        Options of the command line.
    settings
        Of the problem.
    pose
        ``pose(spacetime, settings, solver_parameters=...)``.
    forms
        ``forms(settings, spacetime)``, from which the serial tape is made.
    labels
        Names in pictures.
    """
    from demos.control_report import report
    from pint_fem.spacetime import SpaceTime

    outputs, times = Outputs(), {}
    output_folder(opts.out)
    solver: dict = {"time_solver": opts.time_solver, "mgrit": {"rtol": opts.rtol}, "paradiag": {"rtol": opts.rtol}}
    if opts.method == "trust-region" and not opts.exact and settings.bounds is None:
        solver["typical_rtol"] = 1e-2  # of products with the Hessian, which are most of the solves

    measure = lambda st: pose(st, settings, solver_parameters={"time_solver": "serial"})
    grid, about = measured_grid(opts.grid, measure, solver=solver)
    spacetime = SpaceTime(grid)

    if about:
        say(about)
    say(f"{title} on {spacetime.space_size} x {spacetime.time_size} ranks (space x time)")
    start = time.perf_counter()
    with waiting("set-up: forms, kernels, factors"):
        problem = pose(spacetime, settings, solver_parameters=solver)
    times["set-up"] = time.perf_counter() - start
    ev, limits = problem.evolution, "no bounds" if problem.bounds is None else f"bounds {_shown(problem.bounds)}"
    values = sum(q.function_space().dim() for q in ev.controls) * ev.nsteps
    say(f"{ev.V.dim()} unknowns in space, {ev.nsteps} steps of {settings.integrator}, {values} values of the control")
    say(f"weight of the control {settings.regularisation:g}, {limits}")
    say(problem.rf.problem.sweeps.solvers.view())
    start = time.perf_counter()
    result = _minimised(problem, opts, say)
    times["minimisation"] = time.perf_counter() - start
    outputs("trace", problem.rf.problem.sweeps.solvers.write_trace)
    took = f"{result.iterations} iterations, {times['minimisation']:.1f} s"
    say(f"{result.reason.value} after {took}: J {result.value:.9g}")
    if result.choice:
        say(f"method: {result.choice}")
    summary = summary_of(title, asdict(settings), spacetime, ev.V.dim(), times)
    summary["values_of_the_control"] = values
    compare = None
    if opts.compare_serial:
        from problems.compare_control import compare_control

        compare = lambda: compare_control(problem, result, settings, forms=forms, seconds=sum(times.values()), say=say)
    report(problem, result, opts, summary, say, outputs, labels=labels, compare=compare)


def _shown(pair: tuple[float | None, float | None]) -> str:
    """Bounds in words."""
    low, high = pair
    return " and ".join([*([] if low is None else [f"{low:g} below"]), *([] if high is None else [f"{high:g} above"])])


def _minimised(problem: ControlProblem, opts, say: Callable):
    """The result of ``rf.minimize``, with a line on the terminal for each sweep."""
    rf, sweeps = problem.rf, problem.rf.problem.sweeps
    options: dict[str, Any] = dict(monitor=say, gtol_rel=opts.gtol, max_it=opts.max_iterations)
    if problem.bounds is not None:
        options["bounds"] = problem.bounds
    if opts.exact and opts.method == "trust-region":
        options["inexact"] = False
    if opts.checkpoint is not None:
        options |= dict(checkpoint=opts.checkpoint, if_save_fails=opts.if_save_fails)
    logger = logging.getLogger("pint_fem")  # prints the choice of "auto"
    with waiting("minimisation") as progress:
        sweeps.on_sweep = lambda kind, result: progress(
            f"{kind} sweep: {result.cycles} cycles; so far "
            + ", ".join(f"{n} {k}" for k, n in sum_of_counts([sweeps]).items())
        )
        logger.info("minimisation by %s", opts.method)
        return rf.minimize(opts.method, **options)
