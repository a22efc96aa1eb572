"""ParaView files of trajectories: each time rank writes its own states, and one file lists those of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np
from firedrake import Function, VTKFile
from firedrake.functionspaceimpl import WithGeometry
from mpi4py import MPI

from pint_fem.collective import collectively, raise_collectively
from pint_fem.errors import InputError
from pint_fem.files import as_input_error, write_whole
from pint_fem.kernels.arrays import put
from pint_fem.spacetime import Slab, SpaceTime

__all__ = ["write_fields", "write_functions"]


def write_fields(
    folder: Path,
    name: str,
    states: Iterable[tuple[int, np.ndarray]],
    space: WithGeometry,
    slab: Slab,
    spacetime: SpaceTime,
    times: np.ndarray,
    *,
    points: Iterable[int] | None = None,
) -> Path:
    """Write states for ParaView: each time rank its own, and one ``NAME.pvd`` that lists them all.

    Parameters
    ----------
    folder, name
        Folder of the files, and their common name.
    states
        Blocks of local points in the order of time: number of the first point and states ``(b, n)``, as
        :meth:`pint_fem.adjoint.problem.ReducedProblem.states` yields them.
    space, slab, spacetime
        Function space of the states, own steps and process grid.
    times
        Times of all points, ``(N + 1,)``.
    points
        Numbers of the points whose states are written; default: about 17, spread over the time axis.

    Returns
    -------
    Path
        The file that lists all.

    Raises
    ------
    InputError
        On every rank, where a file cannot be written, as on a full disk.
    """
    rank, root = spacetime.time_comm.rank, spacetime.comm.rank == 0
    what, part = f"fields in {folder} cannot be written", f"{name}_part{rank}"
    _written(spacetime.comm, what, partial((folder / part).mkdir, parents=True, exist_ok=True))
    written = np.linspace(0, slab.nsteps, 17).round().astype(int) if points is None else list(points)
    own = [n for n in np.unique(written).tolist() if slab.lo < n <= slab.hi or (n == 0 and slab.is_first)]
    problem = None
    try:  # by the ranks that share a state; a failure is raised on all time ranks below
        comm = spacetime.space_comm
        sheet = _written(comm, what, partial(VTKFile, str(folder / f"{part}.pvd"), comm=comm))
        f = Function(space, name=name)
        for first, block in states:
            for n in own:
                if 0 <= n - slab.lo - first < len(block):
                    put(f, block[n - slab.lo - first])
                    _written(comm, what, partial(sheet.write, *f.subfunctions, time=times[n]))
    except InputError as error:
        problem = error
    raise_collectively(spacetime.comm, problem)
    extension = "vtu" if spacetime.space_comm.size == 1 else "pvtu"
    entries = spacetime.time_comm.gather(
        [(float(times[n]), f"{part}/{part}_{i}.{extension}") for i, n in enumerate(own)]
    )
    path = folder / f"{name}.pvd"
    _written(spacetime.comm, what, partial(_write_collection, path, entries) if root else lambda: None)
    if spacetime.space_comm.rank == 0:
        (folder / f"{part}.pvd").unlink(missing_ok=True)
    return path


def write_functions(path: Path, functions: Sequence[Function], comm: MPI.Comm) -> None:
    """Write functions of one space, named as they are, to a ``.pvd`` file (collective over ``comm``).

    Raises
    ------
    InputError
        On every rank, where a file cannot be written.
    """
    what = f"{path} cannot be written"
    _written(comm, what, partial(path.with_suffix("").mkdir, parents=True, exist_ok=True))
    sheet = _written(comm, what, partial(VTKFile, str(path), comm=comm))
    _written(comm, what, partial(sheet.write, *functions))


def _written(comm: MPI.Comm, what: str, work: Callable):
    """The result of ``work``; an error of the operating system on one rank is an ``InputError`` on all (collective).

    Firedrake's writer communicates before it writes to files and not afterwards, once its folder exists.
    """

    def guarded():
        with as_input_error(what):
            return work()

    return collectively(comm, "", guarded)


def _write_collection(path: Path, entries) -> None:
    """The file that lists the files of all time ranks."""
    rows = [
        f'<DataSet timestep="{t}" part="0" file={quoteattr(file)}/>' for rank_rows in entries for t, file in rank_rows
    ]
    head = '<?xml version="1.0"?>\n<VTKFile type="Collection" version="0.1" byte_order="LittleEndian">\n<Collection>\n'
    write_whole(path, (head + "\n".join(rows) + "\n</Collection>\n</VTKFile>\n").encode())
