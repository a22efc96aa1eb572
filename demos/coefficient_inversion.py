"""The program that the demos of coefficients from several experiments share: options, run, progress and report.

A demo names its problem: what poses it (:class:`problems.experiments.CoefficientProblem`), what records the same on a
serial tape, its own options and settings. One or several stages are minimised one after another, each from the
controls of the one before, as in frequency continuation.
"""

from __future__ import annotations

import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from demos.inversion import add_trust_region, settle_method
from demos.planned_grid import GRID_HELP, measured_grid
from pint_fem.cli import ProgramParser, positive, say, waiting

__all__ = ["add_coefficients", "factors", "invert_coefficients", "settle_coefficients"]


# -- options -----------------------------------------------------------------------------------------------------------
def factors(text: str) -> tuple[float, float]:
    """Return the bounds of a coefficient over its background, given as ``LOW,HIGH``."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"{text!r}: give two numbers, such as 0.2,5") from None
    if not 0 < low <= 1 <= high < float("inf"):
        raise ArgumentTypeError(f"{text!r}: give 0 < LOW <= 1 <= HIGH, factors of the background, such as 0.2,5")
    return low, high


def add_coefficients(parser: ProgramParser, *, out: str, gtol: str = "1e-4", taped: int = 1) -> None:
    """Add the options that all demos of coefficients have.

    Parameters
    ----------
    parser
        Of the program.
    out, gtol
        Default folder of the results, and the default tolerance of the gradient in words.
    taped
        Default number of experiments of ``--compare-serial``.
    """
    add = parser.add_argument
    add(
        "--grid",
        metavar="SxT[xE]",
        help=f"ranks in space x ranks in time x groups of experiments; {GRID_HELP} all ranks in time",
    )
    add("--alpha", type=positive(float, zero=True), help="weight of the coefficient's gradient in the regularisation")
    add("--beta", type=positive(float), help="weight of the coefficient's size in the regularisation")
    add("--noise", type=positive(float), help="noise of the readings relative to the largest")
    add("--bounds", type=factors, metavar="LOW,HIGH", help="bounds of the coefficient over its background, as 0.2,5")
    add(
        "--time-solver",
        default="auto",
        choices=["auto", "mgrit", "paradiag", "serial"],
        help="auto (the fastest by measured times of a step), mgrit, paradiag, serial (sequential stepping) (auto)",
    )
    add("--out", type=Path, default=Path(out), help=f"folder of the results ({out})")
    add("--no-fields", action="store_true", help="write no ParaView files")
    add(
        "--compare-serial",
        nargs="?",
        type=positive(int),
        const=taped,
        metavar="EXPERIMENTS",
        help=f"evaluate so many experiments ({taped}) with plain serial Firedrake + pyadjoint too, and extrapolate",
    )
    add_trust_region(parser, gtol=gtol, checkpoints=True, heading="options of the minimisation")


def settle_coefficients(opts, *, gtol: float = 1e-4, max_iterations: int = 50) -> None:
    """Give the options of the minimisation their defaults."""
    opts.method = "trust-region"
    settle_method(opts, gtol=gtol, max_iterations=max_iterations)


# -- the run -----------------------------------------------------------------------------------------------------------
def invert_coefficients(
    title: str,
    opts,
    *,
    pose: Callable,
    record: Callable,
    settings: Mapping[str, Any],
    shipped: bool,
    count: int,
    quantity: str,
    sources: str,
    stages: Sequence[tuple[str, Mapping[str, Any]]] = (("", {}),),
    minimisation: Mapping[str, Any] | None = None,
    further: Callable | None = None,
) -> None:
    """Pose the problem, minimise it and write the results (collective).

    Parameters
    ----------
    title
        Of the inversion, for sentences.
    opts
        Options of the command line, settled.
    pose
        ``pose(spacetime, **settings, solver_parameters=..., experiments=...)`` returns a
        :class:`~problems.experiments.CoefficientProblem`; ``experiments`` are the numbers of those that are in the
        functional, ``None`` for all.
    record
        ``record(**settings, experiments=..., comm=...)`` records the same on a serial tape.
    settings
        Arguments of both.
    shipped
        Whether the readings are the shipped ones, whose coefficients are known.
    count
        Number of experiments.
    quantity, sources
        What is read, with its unit, and what the experiments' sources are called, for pictures.
    stages
        Labels and further settings of the minimisations, of which each starts where the one before ended.
    minimisation
        Further options of the minimisation.
    further
        ``further(problem, result, out, summary, say, shipped=...)`` adds to the summary and returns what draws further
        pictures on the first rank (collective).
    """
    from demos.coefficient_report import coefficient_summary, report
    from demos.inversion import invert, summary_of
    from demos.outputs import Outputs, output_folder
    from pint_fem.spacetime import SpaceTime

    outputs, times = Outputs(), {"set-up": 0.0, "inversion": 0.0}
    output_folder(opts.out)
    solver = {"time_solver": opts.time_solver, "mgrit": {"rtol": opts.rtol}, "paradiag": {"rtol": opts.rtol}}
    if not opts.exact:
        solver["typical_rtol"] = 1e-2  # of products with the Hessian, which are most of the solves

    last, serial = {**settings, **stages[-1][1]}, {"time_solver": "serial"}
    measure = lambda st: pose(st, **last, experiments=[0], solver_parameters=serial)
    grid, about = measured_grid(opts.grid, measure, solver=solver, experiments=count)
    spacetime = SpaceTime(grid)

    def posed(own: Mapping[str, Any], experiments: Sequence[int] | None = None):
        return pose(spacetime, **{**settings, **own}, experiments=experiments, solver_parameters=solver)

    if about:
        say(about)
    say(f"{title} on {' x '.join(map(str, spacetime.shape))} ranks (space x time x experiments)")
    start, history, calls, finished = None, [], [0, 0, 0], []
    for number, (label, own) in enumerate(stages):
        clock = time.perf_counter()
        with waiting("set-up: forms, kernels, factors"):
            problem = posed(own)
        times["set-up"] += time.perf_counter() - clock
        if not number:
            say(_sizes(problem))
            say(problem.rf.problem.leaves[0].sweeps.solvers.view())
        if label:
            say(f"stage {number + 1} of {len(stages)}: {label}")
        given = dict(minimisation or {})
        if start is not None:
            given["start"] = problem.rf.function(start)  # on the mesh of this stage, which is divided alike
        if problem.bounds is not None:
            given["bounds"] = problem.bounds
        if opts.checkpoint is not None and len(stages) > 1:
            given["checkpoint"] = opts.checkpoint.with_stem(f"{opts.checkpoint.stem}_stage{number + 1}")
        seconds: dict[str, float] = {}
        result, _ = invert(problem.rf, opts, say, outputs, seconds, **given)
        times["inversion"] += seconds["inversion"]
        start, history = result.x, [*history, *result.history]
        own_calls = result.value_calls, result.gradient_calls, result.hessian_calls
        calls = [a + b for a, b in zip(calls, own_calls, strict=True)]
        if len(stages) > 1:
            finished.append(_stage(label, own, problem, result, seconds["inversion"]))
            found = problem.rf.function(result.x)
            found = found if isinstance(found, list) else [found]
            finished[-1]["coefficients"] = coefficient_summary(problem, found, shipped, say)
    summary = summary_of(title, {**settings}, spacetime, problem.evolutions[0].V.dim(), times)
    summary["experiments"] = len(problem.evolutions)
    if finished:
        summary["stages"] = finished
    compare = None
    if opts.compare_serial:
        from problems.compare_experiments import compare_experiments

        own = stages[-1][1]
        few = range(min(max(opts.compare_serial, spacetime.experiments_size), len(problem.evolutions)))
        compare = lambda: compare_experiments(
            problem,
            result,
            calls=calls,
            pose=lambda experiments: posed(own, experiments),
            record=lambda experiments, comm: record(**{**settings, **own}, experiments=experiments, comm=comm),
            experiments=list(few),
            seconds=times["set-up"] + times["inversion"],
            say=say,
        )
    report(
        problem, result, opts, summary, say, outputs,
        shipped=shipped, quantity=quantity, sources=sources, compare=compare, further=further,
    )  # fmt: skip


def _stage(label: str, settings: Mapping[str, Any], problem, result, seconds: float) -> dict:
    """The minimisation of a stage in plain values."""
    return {
        "stage": label,
        **settings,
        "J": result.value,
        **problem.rf.problem.parts,
        "iterations": result.nit,
        "evaluations": result.value_calls,
        "gradients": result.gradient_calls,
        "hessian_actions": result.hessian_calls,
        "converged": result.converged,
        "seconds": seconds,
    }


def _sizes(problem) -> str:
    """One line: experiments, unknowns, steps, readings, controls."""
    ev, rf = problem.evolutions[0], problem.rf
    controls = " + ".join(str(c.function_space().dim()) for c in rf.evolution.controls)
    return (
        f"{len(problem.evolutions)} experiments of {ev.V.dim()} unknowns and {ev.nsteps} steps, "
        f"{problem.data.count} readings, {controls} values of controls"
    )
