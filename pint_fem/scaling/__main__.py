"""What P ranks would do: ``python -m pint_fem.scaling plan heat-source --ranks 256``.

plan PROBLEM --ranks P        the fastest grid, levels and solver by the model, and alternatives
report                        strong and weak scaling, XBraid's experiment, a Gantt chart: tables and plots
calibrate PROBLEM             measure the costs of a problem (mpiexec -n 2 for the network and space ranks)
validate PROBLEM              time solves on the ranks there are beside the model (mpiexec -n 1, 2)
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from mpi4py import MPI

from pint_fem.cli import ProgramParser, positive, run
from pint_fem.collective import collectively
from pint_fem.errors import InputError
from pint_fem.files import as_input_error, require_output, write_whole

COMMANDS = ("plan", "report", "calibrate", "validate")


def arguments(argv=None):
    """Options of the program."""
    parser = ProgramParser(prog="python -m pint_fem.scaling", description=__doc__)
    add = parser.add_argument
    add("command", nargs="?", help=", ".join(COMMANDS))
    add(
        "problem",
        nargs="?",
        default="heat-square",
        help="heat-source, heat-square, maxwell-lossy, maxwell-cavity, resnet-1024, resnet-4096, or a file",
    )
    add("--ranks", type=positive(int), default=256, help="plan: processes (256); report: the largest number")
    add("--steps", type=positive(int), help="time steps (default: the problem's)")
    add("--rtol", type=positive(float), help="relative tolerance of the solves (default: the smallest counted)")
    add("--network", help="latency and bandwidth, such as 2us,12GB/s (default: as measured)")
    add("--calibration", type=Path, help="validate: a file instead of the bundled one")
    add(
        "--only", default="", help="calibrate: a part (costs, space, opponent, cycles, inversions), the others are kept"
    )
    add("--options", default="{}", help='validate: of the solver, as JSON such as {"levels": 2, "coarsening": 16}')
    add(
        "--repeats",
        type=positive(int),
        help="of each measurement; medians are kept (calibrate 15, validate 5, of networks 25)",
    )
    add("--out", type=Path, help="file (calibrate, validate) or folder (report, default results/scaling)")
    return parser.read(argv)


def case(name: str):
    """How a problem is posed."""
    try:
        module = importlib.import_module("problems.scaling_cases")
    except ImportError as error:
        raise InputError(f"{error}: start this in the project's folder, with Firedrake and torch") from error
    cases = {**module.CASES, **module.LAYERS}
    if name not in cases:
        raise InputError(f"problem {name!r}: known are {', '.join(cases)}")
    return cases[name]


def main(argv=None) -> None:
    """Run a command."""
    opts = arguments(argv)
    if opts.command not in COMMANDS:
        raise InputError(f"command {opts.command!r}: give one of {', '.join(COMMANDS)}")
    from pint_fem.scaling.network import Network

    opts.network = None if opts.network is None else Network.parse(opts.network)
    globals()[f"_{opts.command}"](opts)


def _plan(opts) -> None:
    if MPI.COMM_WORLD.rank:
        return
    from pint_fem.scaling.costs import load
    from pint_fem.scaling.planner import plan

    say = (
        (lambda text: print(f"\r  {text:<76}", end="", file=sys.stderr)) if sys.stderr.isatty() else (lambda text: None)
    )
    calibration = load(opts.problem)
    if calibration.kind == "layers":
        return _plan_training(calibration, opts, say)
    made = plan(calibration, opts.ranks, nsteps=opts.steps, rtol=opts.rtol, network=opts.network, progress=say)
    say("")
    print(f"{made.problem} on {made.ranks} ranks, one gradient from cold to rtol {made.rtol:g} (all figures predicted)")
    head = f"{'cycles':>7}{'seconds':>11}{'MB a rank':>11}{'busy':>6}"
    print(f"{'solver':8}{'space x time':>14}  {'coarsening, relaxation':34}{head}")
    for choice in [made.best, *made.alternatives]:
        what = "" if choice.solver == "serial" else choice.words
        cycles = "" if choice.solver == "serial" else f"{choice.cycles[0]}+{choice.cycles[1]}"
        grid = f"{choice.grid[0]} x {choice.grid[1]}"
        numbers = f"{choice.seconds:>11.4g}{choice.bytes_a_rank / 1e6:>11.3g}{choice.efficiency:>6.0%}"
        print(f"{choice.solver:8}{grid:>14}  {what:34}{cycles:>7}{numbers}")
    print(f"run: {made.best.arguments}")
    for text in made.assumptions:
        print(f"assumed: {text}")
    return None


def _plan_training(calibration, opts, say) -> None:
    from pint_fem.scaling.planner import describe
    from pint_fem.scaling.training import plan_training

    found = plan_training(calibration, opts.ranks, network=opts.network, progress=say)
    say("")
    print(
        f"{calibration.problem} on at most {opts.ranks} ranks, one training step (seconds predicted; serial torch "
        f"measured: {calibration.opponent['step']:.4g} s; gradient errors counted by real runs)"
    )
    print(
        f"{'ranks':>6}  {'coarsening, relaxation':26}{'its':>5}{'seconds':>11}{'speed-up':>10}{'error':>9}{'busy':>6}"
    )
    for x in found:
        its = f"{x.iterations[0]}+{x.iterations[1]}"
        numbers = f"{x.seconds:>11.4g}{x.speedup:>10.3g}{x.error:>9.1e}{x.efficiency:>6.0%}"
        print(f"{x.ranks:>6}  {describe(x.options):26}{its:>5}{numbers}")
    for text in calibration.notes:
        print(f"assumed: {text}")


def _require_output(path: Path) -> None:
    """Find out before measurements whether their file can be written, on every rank."""
    comm = MPI.COMM_WORLD
    check = partial(require_output, path, "--out", makes_folder=True) if comm.rank == 0 else lambda: None
    collectively(comm, "", check)


def _write(path: Path, text: str) -> None:
    """Write a result whole, or raise ``InputError`` and leave the last one."""
    with as_input_error(f"--out {path} cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())


def _report(opts) -> None:
    if MPI.COMM_WORLD.rank == 0:
        from pint_fem.scaling.report import report

        report(opts.out or Path("results/scaling"), largest=opts.ranks, network=opts.network, rtol=opts.rtol)


def _calibrate(opts) -> None:
    from pint_fem.scaling import calibrate as measure
    from pint_fem.scaling.calibrate_layers import calibrate_layers, count_errors, serial_seconds
    from pint_fem.scaling.costs import BUNDLED, Calibration
    from pint_fem.scaling.counting import count_cycles, count_inversion

    posed, comm = case(opts.problem), MPI.COMM_WORLD
    layers = not hasattr(posed, "pose")
    parts = ("costs", "opponent", "cycles", *(() if layers else ("space", "inversions")))
    path = opts.out or BUNDLED / f"{opts.problem}.json"
    old = Calibration.from_json(path.read_text()) if path.is_file() else None
    if opts.only not in ("", *parts):
        raise InputError(f"--only {opts.only}: give {', '.join(parts)}")
    if opts.only not in ("", "costs") and old is None:
        raise InputError(f"--only {opts.only}: there is no {path} to complete; measure the costs first")
    _require_output(path)
    made, wants = old, lambda part: opts.only in ("", part)
    if wants("costs"):
        say = lambda text: print(f"measuring: {text}", flush=True) if comm.rank == 0 else None
        common = dict(comm=comm, repeats=opts.repeats or 15, progress=say)
        if layers:
            made = calibrate_layers(opts.problem, posed, **common)
        else:
            made = measure.calibrate(opts.problem, posed.pose, posed.nsteps, paradiag=posed.paradiag, **common)
        if comm.rank == 0 and old is not None:
            made = made.with_changes(cycles=old.cycles, inversions=old.inversions, opponent=old.opponent)
    if opts.only == "space":
        made = _space(made, posed, opts, measure)
    if comm.rank == 0:
        if wants("opponent") and (layers or posed.serial):
            opponent = serial_seconds(posed) if layers else measure.opponent_seconds(posed.serial)
            made = made.with_changes(opponent=opponent)
        if layers and wants("cycles"):
            made = made.with_changes(cycles=count_errors(posed, posed.menu))
        elif wants("cycles"):
            smaller = posed.smaller or posed.pose
            made = made.with_changes(cycles=count_cycles(smaller, posed.nsteps, posed.menu, posed.rtol))
        if not layers and wants("inversions"):
            for options in posed.inversions:
                print(f"counting an inversion: {options}", flush=True)
                given = dict(gtol=posed.gtol, rtol=min(posed.rtol))
                found = count_inversion(posed.smaller or posed.pose, posed.inversion_steps, options, **given)
                made = made.with_changes(
                    inversions=[*(c for c in made.inversions if c["options"] != found["options"]), found]
                )
        _write(path, made.to_json())
        print(f"written: {path}")


def _space(made, posed, opts, measure):
    """A calibration with kernels on two space ranks measured anew."""
    comm = MPI.COMM_WORLD
    if comm.size < 2:
        raise InputError("--only space: start this on two processes")
    watch = measure.Stopwatch(opts.repeats or 15)
    found = measure.space_kernels(posed.pose, comm, watch, measure.SMALL, lambda text: None)
    if comm.rank:
        return None
    notes = [note for note in made.notes if not note.startswith("space ranks:")]
    notes.append(f"space ranks: kernels on 2, {watch.about}")
    work, iterations = found
    return made.with_changes(work={**made.work, 2: work}, space_iterations=float(iterations), notes=notes)


def _validate(opts) -> None:
    from pint_fem.scaling.costs import load
    from pint_fem.scaling.validation import compare

    posed, comm = case(opts.problem), MPI.COMM_WORLD
    if opts.out:
        _require_output(opts.out)
    calibration = load(opts.calibration or opts.problem)
    if calibration.kind == "layers":
        from pint_fem.scaling.calibrate_layers import compare_layers

        rows = compare_layers(calibration, posed, nlayers=opts.steps, repeats=opts.repeats or 25)
    else:
        given = dict(rtol=opts.rtol or 1e-6, repeats=opts.repeats or 5)
        rows = compare(calibration, posed.pose, json.loads(opts.options) or posed.solver, opts.steps or 256, **given)
    words = "layers" if calibration.kind == "layers" else "steps"
    if comm.rank == 0:
        for row in rows:
            print(
                f"{opts.problem}, {row.steps} {words}, {row.ranks} ranks, {row.task}: "
                f"measured {row.measured:.4g} s, predicted {row.predicted:.4g} s, error {row.error:+.1%} "
                f"(kernels, timed in turn with it, took {row.slower:.2f} times as long as calibrated)"
            )
        if opts.out:
            _write(opts.out, json.dumps([{**asdict(row), "error": row.error} for row in rows], indent=1))


if __name__ == "__main__":
    run(main)
