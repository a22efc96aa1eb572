"""Programs on many ranks: their arguments, how much they print, errors as one line, and waiting without load.

Bad input raises :class:`~pint_fem.errors.InputError` on every rank; :func:`run` prints it once and every rank exits
with status 2. Every program has ``--quiet`` (errors only) and ``--verbose`` (also what was waited for, with its
seconds), prints by :func:`say`, and ends with :func:`last_lines`. This module has to be imported before Firedrake.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mpi4py import MPI

from pint_fem.errors import InputError, SolverFailure
from pint_fem.petsc_options.spelling import PREFIXES, nearest, refuse_near_misses
from pint_fem.progress import Verbosity, erase, say, show, verbosity, waiting
from pint_fem.requirements import missing

__all__ = ["ProgramParser", "file_name", "last_lines", "positive", "run", "say", "wait_quietly", "waiting"]

# the program's own options are in PETSc's database, too, which would report them as unused
os.environ.setdefault("PETSC_OPTIONS", "-options_left no")


class ProgramParser(argparse.ArgumentParser):
    """A parser of arguments that raises :class:`InputError` instead of printing and exiting on every rank.

    Options with one dash (``-mgrit_rtol 1e-6``, ``-pint_ksp_view``) are PETSc's and stay in its database; those whose
    spelling is close to an option of the program or of this package are refused.

    Parameters
    ----------
    petsc
        Whether the program reads PETSc's options; otherwise all options with one dash are refused.
    next_step
        What a user may do after the run, for :func:`last_lines`: ``opts.next_step``.
    **kwargs
        As for :class:`argparse.ArgumentParser`.
    """

    def __init__(self, *, petsc: bool = True, next_step: str = "", **kwargs: Any):
        self._petsc = petsc
        super().__init__(
            allow_abbrev=False, add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )
        self.add_argument("-h", "--help", action="store_true", help="show this and exit")
        self.add_argument("--quiet", action="store_true", help="print errors only")
        self.add_argument(
            "--verbose", action="store_true", help="print what is waited for with its seconds, and tracebacks of errors"
        )
        self.set_defaults(next_step=next_step)

    def error(self, message: str) -> NoReturn:
        """Raise :class:`InputError` with the message, where ``argparse`` exits."""
        raise InputError(message)

    def read(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse arguments, and set how much the program prints.

        Parameters
        ----------
        arguments
            Words of the command line; default: the program's.

        Returns
        -------
        argparse.Namespace
            Values by the names of the options.

        Raises
        ------
        InputError
            On an unknown option or a bad value.
        SystemExit
            After ``--help``.
        """
        words = sys.argv[1:] if arguments is None else list(arguments)
        if {"-h", "--help"} & set(words):
            if MPI.COMM_WORLD.rank == 0:
                self.print_help()
            raise SystemExit(0)
        options, rest = self.parse_known_args(words)
        own_options, previous_is_petsc = list(self._option_string_actions), False
        for word in rest:
            is_petsc = word.startswith("-") and not word.startswith("--") and word[1:2].isalpha()
            if not is_petsc and not (previous_is_petsc and not word.startswith("--")):
                name = word.split("=")[0]
                if name.lstrip("-").startswith(PREFIXES):
                    own_options = [*own_options, f"-{name.lstrip('-')}"]
                near = difflib.get_close_matches(name, own_options, n=1)
                hint = f"did you mean {near[0]}?" if near else "see --help"
                raise InputError(f"unknown argument {word!r}: {hint}")
            if is_petsc:
                self._check_one_dash(word.split("=")[0], own_options)
            previous_is_petsc = is_petsc
        if options.quiet and options.verbose:
            raise InputError("--quiet and --verbose: give one of them")
        _set_verbosity(Verbosity(1 + options.verbose - options.quiet))
        return options

    def _check_one_dash(self, word: str, own_options: Sequence[str]) -> None:
        """Refuse an option with one dash that the program has with two dashes, or that nothing reads."""
        name = word[1:]
        own = [name, name.partition("_")[2]] if not self._petsc else [name]
        near = [
            found for n in own if n and (found := nearest(f"--{n}".replace("_", "-"), own_options, int(len(n) > 3)))
        ]
        if near and name != "help":  # PETSc has an option of that name, too
            raise InputError(f"unknown argument {word!r}: did you mean {near[0]}?")
        if not self._petsc:
            raise InputError(f"unknown argument {word!r}: this program has no options of PETSc's; see --help")
        refuse_near_misses([name])


_LOGGERS = ("pint_fem", "firedrake", "pyop2")
_levels: dict[str, int] = {}
"""Levels of the loggers before a program was quiet."""


def _set_verbosity(level: Verbosity) -> None:
    """Set what this process prints, by its logs and warnings, too."""
    show(level, first_rank=MPI.COMM_WORLD.rank == 0)
    for name, before in _levels.items():
        logging.getLogger(name).setLevel(before)
    _levels.clear()
    if level == Verbosity.QUIET:
        for logger in map(logging.getLogger, _LOGGERS):
            _levels[logger.name] = logger.level
            logger.setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")


def last_lines(where: Path | None = None, written: Sequence[str] = (), next_step: str = "") -> None:
    """Print what was written where, and what to do next, at the end of a program.

    Parameters
    ----------
    where
        Folder of the files, or the file itself.
    written
        Names of the files in the folder.
    next_step
        An imperative sentence.
    """
    if where is not None:
        say(f"written: {where.resolve()}{': ' if written else ''}{', '.join(written)}")
    if next_step:
        say(f"next: {next_step}")


def positive(kind: type, *, zero: bool = False) -> Callable[[str], float]:
    """A type for ``argparse``: positive numbers of a kind, ``int`` or ``float``, and zero where ``zero`` is set."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
        if not (value > 0 or (zero and value == 0)) or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not {'zero or ' if zero else ''}positive")
        return value

    return convert


def file_name(text: str) -> str:
    """A type for ``argparse``: names of files, which must not be empty as from an unset variable of a shell."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name of the file is empty: give one, or leave the option out")
    return text


def run(main: Callable[[], None], comm: MPI.Comm = MPI.COMM_WORLD) -> None:
    """Call ``main`` on every rank and exit.

    The status is 0, 2 after bad input (with one line on stderr), 130 after an interrupt, and 1 after another failure.
    An exception that not every rank meets ends the others, too: no rank is left waiting.

    Parameters
    ----------
    main
        The program, without arguments.
    comm
        Its ranks.
    """
    try:
        main()
        code = 0
    except InputError as error:
        code = _leave(comm, 2, f"error: {_one_line(error)}\n")
    except SystemExit as stop:
        text = "" if isinstance(stop.code, int | None) else f"error: {stop.code}\n"
        code = _leave(comm, 1 if text else int(stop.code or 0), text)
    except KeyboardInterrupt as stop:
        if getattr(stop, "raised_on_ranks", 1) < comm.size:
            sys.stderr.write(f"rank {comm.rank}: interrupted\n")
            comm.Abort(130)
        code = _leave(comm, 130, "interrupted\n")
    except BaseException as error:
        absent = missing(error, "this program") if isinstance(error, ImportError) else None
        shown = os.environ.get("PINT_FEM_TRACEBACK") or verbosity() == Verbosity.VERBOSE
        lines = traceback.format_exc() if shown or not (absent or _is_expected(error)) else ""
        name = "" if absent else f"{type(error).__name__}: "
        code = _leave(comm, 1, f"{lines}error: {name}{_one_line(absent or error)}\n")
    sys.stdout.flush()
    sys.exit(code)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _is_expected(error: BaseException) -> bool:
    """Whether the message of an exception is enough to understand it."""
    from pint_fem.optimize.protocol import NonFiniteError

    return isinstance(error, (SolverFailure, NonFiniteError))


def _leave(comm: MPI.Comm, code: int, text: str) -> int:
    """Print once if all ranks call this; abort the run if some have not after 20 s."""
    erase()
    request, start = comm.Ibarrier(), time.monotonic()
    while not request.Test():
        if time.monotonic() - start > 20:
            sys.stderr.write(text or f"error: rank {comm.rank} left alone\n")
            sys.stderr.flush()
            comm.Abort(code or 1)
        time.sleep(0.01)
    if comm.rank == 0:
        sys.stderr.write(text)
        sys.stderr.flush()
    return code


def wait_quietly(comm: MPI.Comm) -> None:
    """Wait for all ranks without using a core, while another rank does long serial work (collective)."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.02)
