"""Command line of the package: a first inversion, plans, measurements, the check of an evolution, what is installed.

pint-fem demo                      recover a heat source from sensor readings, with its standard deviation: a picture,
                                   and a program to begin with; without Firedrake the solver core, in numpy
pint-fem plan PROBLEM --ranks P    the fastest grid, levels and solver by predicted times, and alternatives; a whole
                                   linear inversion by the map from controls to readings
pint-fem scaling calibrate --case MODULE:NAME    measure a problem's costs (mpiexec -n 2: network and space ranks, too)
pint-fem scaling validate --case MODULE:NAME     time solves on the available ranks, beside the predictions
pint-fem check MODULE:FUNCTION     check steps, derivatives and transfers of an evolution or a reduced functional
pint-fem info                      versions of the libraries, and what PETSc is built with

All have --quiet (errors only, and of plan and info the result) and --verbose (what was waited for, with its seconds).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import partial

from pint_fem.cli import run, say
from pint_fem.commands.common import choose
from pint_fem.commands.plan import demo_arguments
from pint_fem.errors import InputError
from pint_fem.requirements import missing

__all__ = ["command", "demo_arguments", "main"]

COMMANDS = ("demo", "plan", "scaling", "check", "info")


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
        On every rank, on an unknown command, option or value, and where a library is missing.
    SystemExit
        With status 1 where a check has failed.
    """
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        say(__doc__.strip())
        return
    choose(name, COMMANDS, "command")
    work = getattr(importlib.import_module(f"pint_fem.commands.{name}"), f"{name}_command")
    try:
        work(rest)
    except ModuleNotFoundError as error:
        absent = missing(error, f"pint-fem {name}")
        if absent is None:
            raise
        raise InputError(str(absent)) from error
