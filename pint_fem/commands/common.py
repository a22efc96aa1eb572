"""What the commands share: their parsers, a user's objects by ``MODULE:NAME``, and files of results."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mpi4py import MPI

from pint_fem.cli import ProgramParser
from pint_fem.collective import on_first_rank
from pint_fem.errors import InputError
from pint_fem.files import as_input_error, require_output, write_whole

__all__ = ["choose", "named_object", "parser_of", "require_file", "write_file"]


def choose(name: str, commands: Sequence[str], what: str) -> None:
    """Raise ``InputError`` where a name is none of the commands."""
    if name not in commands:
        raise InputError(f"{what} {name!r}: give one of {', '.join(commands)}")


def parser_of(name: str, about: str | None, **options: Any) -> ProgramParser:
    """The parser of a command, with its name and description."""
    return ProgramParser(prog=f"pint-fem {name}", description=about, **options)


def named_object(text: str, what: str) -> Any:
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


def require_file(path: Path) -> None:
    """Raise on every rank, before any measurement, where the file of the results cannot be written."""
    on_first_rank(MPI.COMM_WORLD, "", partial(require_output, path, "--out", makes_folder=True))


def write_file(path: Path, text: str) -> None:
    """Write a result on the first rank, whole, or raise ``InputError`` on every rank and leave the last one."""

    def write() -> None:
        with as_input_error(f"--out {path} cannot be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text.encode())

    on_first_rank(MPI.COMM_WORLD, "", write)
