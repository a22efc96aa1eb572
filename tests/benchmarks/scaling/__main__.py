"""Predicted scaling of this project's problems: ``python -m tests.benchmarks.scaling report [--ranks 1024]``.

report                 strong and weak scaling, XBraid's experiment, a Gantt chart: tables and plots
plan NETWORK           the fastest options of a network's training step, its speed-up by ranks, its crossover
calibrate NETWORK      measure the costs of a network (mpiexec -n 2 for MPI's), serial torch and gradient errors
serial NETWORK         measure serial torch alone, in its fastest form
validate NETWORK       time training steps on all ranks beside the predictions (mpiexec -n 1, 2)
validate-map PROBLEM   time whole inversions by the map on all ranks beside the predictions (mpiexec -n 1, 2)
count PROBLEM          count whole inversions by real runs
pyadjoint PROBLEM      time serial pyadjoint

Problems of finite elements are calibrated by ``pint-fem scaling calibrate --case tests.benchmarks.scaling.cases:NAME``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mpi4py import MPI

from pint_fem.cli import ProgramParser, last_lines, positive, run, say
from pint_fem.errors import InputError
from pint_fem.scaling.network import Network
from pint_fem.scaling.planner import describe
from tests.benchmarks.scaling import records


def arguments(argv=None):
    """Options of the program."""
    parser = ProgramParser(prog="python -m tests.benchmarks.scaling", description=__doc__)
    add = parser.add_argument
    add("command", nargs="?", help=", ".join(COMMANDS))
    add("problem", nargs="?", default="resnet-4096", help=", ".join(records.names()))
    add("--ranks", type=positive(int), default=256, help="the largest number of processes (256)")
    add("--steps", type=positive(int), help="validate: layers (default: the network's)")
    add("--rtol", type=positive(float), help="report: tolerance of the solves (default: the largest counted)")
    add("--network", help="latency and bandwidth, such as 2us,12GB/s (default: as measured)")
    add("--repeats", type=positive(int), help="of each measurement; medians are used (calibrate 15, validate 25)")
    add("--out", type=Path, default=Path("results/scaling"), help="report: folder")
    return parser.read(argv)


def main(argv=None) -> None:
    """Run a command."""
    opts = arguments(argv)
    if opts.command not in COMMANDS:
        raise InputError(f"command {opts.command!r}: give one of {', '.join(COMMANDS)}")
    opts.network = None if opts.network is None else Network.parse(opts.network)
    COMMANDS[opts.command](opts)


def _report(opts) -> None:
    from tests.benchmarks.scaling.report import report

    if MPI.COMM_WORLD.rank == 0:
        report(opts.out, largest=opts.ranks, network=opts.network, rtol=opts.rtol)
        last_lines(opts.out, next_step="read report.txt; a problem of your own: pint-fem scaling calibrate --help")


def _case(name: str, layers: bool):
    from tests.benchmarks.scaling.cases import LAYERS, STUDIES

    if layers:
        from tests.benchmarks.scaling.block_costs import BLOCKS

    cases = {**LAYERS, **BLOCKS} if layers else STUDIES
    if name not in cases:
        raise InputError(f"problem {name!r}: give one of {', '.join(cases)}")
    return cases[name]


def _plan(opts) -> None:
    from tests.benchmarks.scaling.tables import powers
    from tests.benchmarks.scaling.training import crossover, plan_training, strong_training

    _case(opts.problem, True)
    if MPI.COMM_WORLD.rank:
        return
    record = records.load(opts.problem)
    found = plan_training(record, opts.ranks, network=opts.network)
    say(
        f"{record.problem} on at most {opts.ranks} ranks, one training step (seconds predicted; serial torch "
        f"measured: {record.baseline['step']:.4g} s; gradient errors counted by real runs)"
    )
    head = f"{'seconds':>11}{'speed-up':>10}{'error':>9}{'busy':>6}"
    say(f"{'ranks':>6}  {'coarsening, relaxation':26}{'its':>5}{head}")
    for x in found:
        its = f"{x.iterations[0]}+{x.iterations[1]}"
        numbers = f"{x.seconds:>11.4g}{x.speedup:>10.3g}{x.error:>9.1e}{x.efficiency:>6.0%}"
        say(f"{x.ranks:>6}  {describe(x.options):26}{its:>5}{numbers}")
    curve = strong_training(record, powers(opts.ranks), network=opts.network)
    say("predicted speed-up over serial torch: " + ", ".join(f"{x.ranks} ranks {x.speedup:.3g}" for x in curve.best))
    pays = crossover(record, curve, network=opts.network)
    say(f"predicted to pay from {pays.ranks} ranks on" if pays else f"predicted not to pay on {opts.ranks} ranks")
    for text in record.notes:
        say(f"measured: {text}")


def _calibrate(opts) -> None:
    from tests.benchmarks.scaling.network_costs import calibrate_layers, count_errors, serial_seconds

    case, progress = _case(opts.problem, True), lambda text: say(f"measuring: {text}")
    quiet = lambda text: None
    root = MPI.COMM_WORLD.rank == 0
    if not hasattr(case, "training"):  # blocks that take milliseconds, measured one by one
        if root:
            _calibrate_blocks(opts, case, progress)
        return
    made = calibrate_layers(opts.problem, case, repeats=opts.repeats or 15, progress=progress if root else quiet)
    if root:
        made = made.with_changes(baseline=serial_seconds(case), gradient_errors=count_errors(case, case.menu))
        say(f"written: {records.save(made)}")


def _serial(opts) -> None:
    from tests.benchmarks.scaling.network_costs import serial_seconds

    case, record = _case(opts.problem, True), records.load(opts.problem)
    if not hasattr(case, "training"):
        raise InputError(f"{opts.problem}: calibrate measures its serial step; give resnet-1024 or resnet-4096")
    say(f"written: {records.save(record.with_changes(baseline=serial_seconds(case)))}")


def _calibrate_blocks(opts, case, progress) -> None:
    from tests.benchmarks.scaling.block_costs import BLOCKS, calibrate_blocks, count_block_errors

    cases = {name: other for name, other in BLOCKS.items() if other.kind == case.kind}
    for made in calibrate_blocks(cases, repeats=opts.repeats or 7, progress=progress):
        progress(f"gradient errors of {made.problem}")
        say(f"written: {records.save(made.with_changes(gradient_errors=count_block_errors(cases[made.problem])))}")


def _validate(opts) -> None:
    from tests.benchmarks.scaling.network_costs import compare_layers

    case, record = _case(opts.problem, True), records.load(opts.problem)
    if not hasattr(case, "training"):
        raise InputError(f"{opts.problem}: its steps are predicted only, give resnet-1024 or resnet-4096")
    for row in compare_layers(record, case, nlayers=opts.steps, repeats=opts.repeats or 25):
        if MPI.COMM_WORLD.rank == 0:
            say(
                f"{opts.problem}, {row.steps} layers, {row.ranks} ranks, {row.task}: measured {row.measured:.4g} s, "
                f"predicted {row.predicted:.4g} s, error {row.error:+.1%} (kernels, timed in turn with it, took "
                f"{row.slower:.2f} times as long as calibrated)"
            )


def _validate_map(opts) -> None:
    from tests.benchmarks.scaling.map_validation import compare_map

    case, record = _case(opts.problem, False).case, records.load(opts.problem)
    for row in compare_map(record, case, repeats=opts.repeats or 5):
        if MPI.COMM_WORLD.rank == 0:
            say(
                f"{opts.problem}, {row.ranks} ranks, {row.task}: measured {row.measured:.4g} s, predicted "
                f"{row.predicted:.4g} s, error {row.error:+.1%} (steps of the adjoint, timed in turn with it, took "
                f"{row.slower:.2f} times as long as calibrated)"
            )


def _count(opts) -> None:
    from tests.benchmarks.scaling.cases import SERIAL
    from tests.benchmarks.scaling.inversions import count_inversion

    study, record = _case(opts.problem, False), records.load(opts.problem)
    for options in study.inversions:
        say(f"counting an inversion: {options}")
        case, given = study.case, dict(gtol=study.gtol, rtol=min(study.case.rtol))
        found = count_inversion(case.smaller or case.pose, study.inversion_steps, options, **given)
        others = [c for c in record.inversions if c["options"] != found["options"]]
        record = record.with_changes(inversions=[*others, found])
    if study.with_sensors:
        found = count_inversion(
            study.with_sensors, study.inversion_steps, SERIAL, gtol=study.gtol, rtol=min(study.case.rtol)
        )
        record = record.with_changes(with_sensors=found)
    say(f"written: {records.save(record)}")


def _pyadjoint(opts) -> None:
    from tests.benchmarks.scaling.pyadjoint_costs import pyadjoint_seconds

    study, record = _case(opts.problem, False), records.load(opts.problem)
    say(f"written: {records.save(record.with_changes(baseline=pyadjoint_seconds(study.serial)))}")


COMMANDS = {
    "report": _report, "plan": _plan, "calibrate": _calibrate, "validate": _validate, "count": _count,
    "pyadjoint": _pyadjoint, "validate-map": _validate_map, "serial": _serial,
}  # fmt: skip

if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
