"""``pint-fem demo``: a first run that needs no clone of the repository; a program is copied to a folder and run."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from mpi4py import MPI

from pint_fem.cli import last_lines, say, waiting
from pint_fem.collective import on_first_rank
from pint_fem.commands.common import parser_of
from pint_fem.errors import InputError
from pint_fem.files import as_input_error, write_whole
from pint_fem.progress import ErasingStream
from pint_fem.requirements import how_to_install

__all__ = ["demo_command"]

PROGRAMS = {
    "heat_source": "the heat source of a plate and its standard deviation from readings of sensors, with Firedrake",
    "heat_in_numpy": "the steps of a heat equation at once, by the solver core: numpy and mpi4py only",
}
"""Programs by name, with what they compute."""
FOLDER = Path(__file__).parent / "programs"


def demo_command(arguments: Sequence[str]) -> None:
    """Run a small program of the package, and leave it in a folder as a beginning of your own."""
    comm = MPI.COMM_WORLD
    parser = parser_of("demo", f"{demo_command.__doc__}\n\n{_table()}")
    parser.add_argument("program", nargs="?", choices=list(PROGRAMS), help="default: the first that can be run here")
    parser.add_argument("--out", type=Path, default=Path("pint_fem_demo"), help="folder (pint_fem_demo)")
    opts = parser.read(arguments)
    name = opts.program or ("heat_source" if _has_firedrake() else "heat_in_numpy")
    if name == "heat_source" and not _has_firedrake():
        raise InputError(
            f"pint-fem demo heat_source: {how_to_install('firedrake')}; or run pint-fem demo heat_in_numpy"
        )
    path = opts.out / f"{name}.py"
    on_first_rank(comm, "", _copy, FOLDER / path.name, path)
    say(f"running {path}: {PROGRAMS[name]}")
    before = on_first_rank(comm, "", _files, opts.out)
    stream: Any = StringIO() if opts.quiet else ErasingStream(sys.stdout)
    with waiting(f"running {path.name}"), redirect_stdout(stream):
        runpy.run_path(str(path), run_name="__main__")
    written = on_first_rank(comm, "", lambda: [n for n, t in _files(opts.out).items() if before.get(n) != t])
    further = "" if _has_firedrake() else f"; for inverse problems with finite elements {how_to_install('firedrake')}"
    look = "open the picture, " if any(n.endswith(".png") for n in written) else ""
    last_lines(opts.out, sorted({path.name, *written}), f"{look}change {path} and run it: python {path}{further}")


def _table() -> str:
    return "\n".join(f"  {name:16}{about}" for name, about in PROGRAMS.items())


def _has_firedrake() -> bool:
    """Whether Firedrake and Irksome can be imported."""
    absent = [n for n in ("firedrake", "irksome") if sys.modules.get(n, n) is None or not _found(n)]
    return not absent


def _found(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


def _files(folder: Path) -> dict[str, int]:
    """Files of a folder with the times of their last change."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}


def _copy(source: Path, path: Path) -> None:
    """Copy a program unless it is there; one that a user has changed is kept, and refused."""
    with as_input_error(f"--out {path.parent}", "give a folder that can be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_bytes()
        if path.is_file() and path.read_bytes() != text:
            raise InputError(f"{path} has been changed: run it by python {path}, or give another folder by --out")
        write_whole(path, text)
