"""What a program writes at its end: files, of which one that cannot be written costs none of the others, and the last
lines, which name them.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
from mpi4py import MPI

from pint_fem.cli import last_lines, waiting
from pint_fem.collective import collectively, on_first_rank
from pint_fem.errors import InputError
from pint_fem.files import as_input_error, write_whole

__all__ = ["Outputs", "checked_folder", "load_firedrake", "output_folder", "write_json"]

_BEGUN: dict[Path, int] = {}
"""The file system's time, in nanoseconds, at which a folder was checked: later files are those of this run."""


def load_firedrake() -> None:
    """Import Firedrake, which takes seconds, with a status line."""
    with waiting("loading Firedrake"):
        importlib.import_module("firedrake")


def checked_folder(path: Path, what: str) -> Path:
    """Make a folder for results where it is missing, and return it.

    Raises
    ------
    InputError
        Beginning with ``what``, if it cannot be made or no files can be made in it.
    """
    with as_input_error(f"{what} {path}", "give a folder that can be written"):
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{socket.gethostname()}-{os.getpid()}"
        probe.write_bytes(b"x")
        _BEGUN[path.resolve()] = probe.stat().st_mtime_ns
        probe.unlink()
    return path


def output_folder(path: Path, comm=MPI.COMM_WORLD) -> None:
    """Make the folder of the results and find out whether files can be made in it, before anything is computed.

    Raises
    ------
    InputError
        On every rank, where they cannot.
    """
    on_first_rank(comm, "", checked_folder, path, "--out")


class Outputs:
    """Writes what it is given; what cannot be written is reported at the end, on all ranks.

    Parameters
    ----------
    comm
        All ranks of the program.
    """

    def __init__(self, comm=MPI.COMM_WORLD):
        self.comm, self.problems = comm, []

    def __call__(self, what: str, work: Callable, *args) -> None:
        """Call ``work(*args)`` on every rank (collective); ``what`` names its files where it does not do so itself."""

        def guarded():
            with waiting(f"writing {what}"), as_input_error(f"{what} cannot be written"):
                work(*args)

        try:
            collectively(self.comm, "", guarded)
        except InputError as error:
            self.problems.append(str(error))

    def on_root(self, what: str, work: Callable, *args) -> None:
        """The same for what the first rank alone writes."""
        self(what, work if self.comm.rank == 0 else _nothing, *args)

    def finish(self, folder: Path, next_step: str) -> None:
        """Print what was written where, and what to do next; report what could not be written (collective).

        Parameters
        ----------
        folder
            The checked folder of the results.
        next_step
            An imperative sentence.

        Raises
        ------
        InputError
            On every rank, with all of it in one line.
        """
        if self.problems:
            raise InputError(f"the run is complete, but {'; '.join(dict.fromkeys(self.problems))}")
        last_lines(folder, on_first_rank(self.comm, "", _written, folder), next_step)


def _written(folder: Path) -> list[str]:
    """What this run has written to a folder: its files, and its folders with their numbers of files."""
    begun, found = _BEGUN.get(folder.resolve(), 0), []
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_mtime_ns >= begun:
            found.append(path.name)
        elif path.is_dir():
            own = sum(inner.is_file() and inner.stat().st_mtime_ns >= begun for inner in path.rglob("*"))
            found += [f"{path.name}/ ({own} files)"] * (own > 0)
    return found


def _nothing(*args) -> None:
    """What the other ranks do."""


def write_json(path: Path, data: dict) -> None:
    """Write the summary of a run; numbers that are not finite become ``null``, and other objects their text.

    Raises
    ------
    InputError
        Where it cannot be written; an earlier file is then unchanged.
    """

    def plain(x):
        if isinstance(x, dict):
            return {str(k): plain(v) for k, v in x.items()}
        if isinstance(x, (list, tuple, np.ndarray)):
            return [plain(v) for v in x]
        if isinstance(x, np.generic):
            x = x.item()
        if isinstance(x, float) and not np.isfinite(x):
            return None
        return x if x is None or isinstance(x, (str, int, float, bool)) else str(x)

    with as_input_error(f"{path} cannot be written"):
        write_whole(path, (json.dumps(plain(data), indent=2) + "\n").encode())
