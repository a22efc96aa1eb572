"""``pint-fem scaling``: measure the costs of a problem, and validate predictions from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from mpi4py import MPI

from pint_fem.cli import last_lines, positive, say, waiting
from pint_fem.collective import on_first_rank
from pint_fem.commands.common import choose, named_object, parser_of, require_file, write_file
from pint_fem.errors import InputError

__all__ = ["scaling_command"]

PARTS = ("costs", "cycles", "map")


def scaling_command(arguments: Sequence[str]) -> None:
    """Measure the costs of a problem, or validate predictions from them."""
    commands = {"calibrate": _calibrate, "validate": _validate}
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        for own, work in commands.items():
            say(f"pint-fem scaling {own}    {work.__doc__}")
        return
    choose(name, list(commands), "scaling command")
    commands[name](rest)


def _case(text: str | None) -> Any:
    """The problem ``MODULE:NAME``, a ``Case`` or a function without arguments that returns one."""
    from pint_fem.scaling.calibrate import Case

    if text is None:
        raise InputError("--case: give the problem, module:name of a pint_fem.scaling.calibrate.Case")
    found = named_object(text, "case")
    found = found() if not isinstance(found, Case) and callable(found) else found
    if not isinstance(found, Case):
        raise InputError(f"--case {text}: give a pint_fem.scaling.calibrate.Case, not {type(found).__name__}")
    return found


def _calibrate(arguments: Sequence[str]) -> None:
    """Measure the costs of a problem's arithmetic and count cycles; write a calibration."""
    from pint_fem.scaling import calibrate as measure
    from pint_fem.scaling.costs import load

    parser = parser_of("scaling calibrate", _calibrate.__doc__)
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
    require_file(path)
    if opts.only in ("", "costs"):
        cycles = () if made is None else made.cycles
        progress = lambda text: say(f"measuring: {text}")
        made = measure.calibrate(case, comm=comm, repeats=opts.repeats, progress=progress)
        made = made and made.with_changes(cycles=cycles)
    if opts.only in ("", "cycles") and case.menu:
        with waiting(f"counting the cycles of {len(case.menu)} solvers to {len(case.rtol)} tolerances"):
            cycles = on_first_rank(comm, "", measure.count_cycles, case)
        made = made and made.with_changes(cycles=cycles)
    if opts.only == "map":
        with waiting("measuring the map from controls to readings"):
            made = on_first_rank(comm, "", partial(measure.measure_map, case, made, repeats=opts.repeats))
    write_file(path, "" if made is None else made.to_json())
    last_lines(path, next_step=f"pint-fem plan {path} --ranks P")


def _validate(arguments: Sequence[str]) -> None:
    """Time solves on all ranks, and compare the times with the predicted ones."""
    from pint_fem.scaling.costs import load
    from pint_fem.scaling.validation import compare

    parser = parser_of("scaling validate", _validate.__doc__)
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
        require_file(opts.out)
    grid = opts.grid
    if grid == "auto":
        from pint_fem.scaling.grid_choice import choose_grid

        measure = lambda st: case.pose(st, opts.steps, {"time_solver": "serial"})
        made = choose_grid(measure, solver_parameters={"mgrit": dict(options or case.solver)})
        grid = made.grid
        say(made.why)
    given = dict(rtol=opts.rtol, grid=grid, repeats=opts.repeats)
    with waiting(f"timing solves of {opts.steps} steps, {opts.repeats} times each"):
        rows = compare(calibration, case.pose, options or case.solver, opts.steps, **given)
    for row in rows:
        say(
            f"{case.name}, {row.steps} steps, {row.space}x{row.ranks} ranks, {row.task}: measured {row.measured:.4g} "
            f"s, predicted {row.predicted:.4g} s, error {row.error:+.1%} (kernels, timed in turn with it, took "
            f"{row.slower:.2f} times as long as calibrated)"
        )
    if opts.out:
        write_file(opts.out, json.dumps([{**asdict(row), "error": row.error} for row in rows], indent=1))
    advice = "where errors are large, measure the costs on this machine: pint-fem scaling calibrate"
    last_lines(opts.out, next_step=advice)
