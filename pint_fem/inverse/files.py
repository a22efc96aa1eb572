"""Maps from controls to readings in HDF5 files, written and read by all ranks.

The file has the readings at zero controls; for each static control one row per reading, sensor after sensor; and for
controls with one value per step the responses of each sensor at each lag. Each rank writes the rows of its own sensors
and the columns of its own unknowns, and reads those that it owns in the run that loads the file, so that nothing is
gathered and the number of ranks in time may be another. A file is complete or not there, and each row has a checksum
(:mod:`pint_fem.array_file`).

A map is that of a problem: of its evolution, integrator, controls, sensors and times of readings. Their description is
stored, and a file of another problem is refused. What was measured, noise and regularisation are no part of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
from firedrake import Function

from pint_fem import files
from pint_fem.array_file import Piece, Place, read_head, read_part, write_file
from pint_fem.collective import collectively, on_first_rank, require_same
from pint_fem.digests import differences
from pint_fem.errors import InputError
from pint_fem.kernels.arrays import as_rows, own_size

if TYPE_CHECKING:
    from pint_fem.inverse.map import ParameterToObservable
    from pint_fem.inverse.response_rows import StepTerm

__all__ = ["load_map", "require_same_map", "save_map"]

_VERSION = 1
_WHAT = "map from controls to readings"
_MOST = 5
"""Differences that a message names."""


def save_map(F: ParameterToObservable, path: str | Path, numbers: Mapping) -> None:
    """Write a map (collective).

    Parameters
    ----------
    F
        The map.
    path
        The file; its folder has to exist.
    numbers
        Description of the map's problem, numbers and texts by name, for JSON.

    Raises
    ------
    InputError
        On every rank, if the file cannot be written, or is being written by another run; one of the same name is left
        as it is.
    """
    path, comm = Path(path), F.spacetime.comm
    require_same(comm, path=str(path))
    lock = files.FileLock(path, _WHAT)

    def checked() -> None:
        files.require_output(path, _WHAT)
        lock.acquire()

    pieces = [Piece("offset", _offset_place(F), F.offset if comm.rank == 0 else None)]
    pieces += [Piece(name, place, F.layout.part(F.rows, control)) for name, control, place in _places(F)]
    terms = [] if F.steps is None else F.steps.terms
    pieces += [Piece(name, place, as_rows(values)) for name, values, place in _step_places(F, terms)]
    head = {"version": _VERSION, "what": _WHAT, "problem": dict(numbers)}
    on_first_rank(comm, "", checked)
    try:
        write_file(comm, path, _WHAT, head, pieces)
    finally:
        lock.release()


def load_map(
    F: ParameterToObservable, path: str | Path, numbers: Mapping, terms: Sequence[StepTerm] = ()
) -> np.ndarray:
    """Read the own rows of a map into ``F.rows`` and the own responses of controls with one value per step, and return
    the readings at zero controls ``(m,)`` (collective).

    Parameters
    ----------
    F
        The map, with rows of the right shape.
    path
        The file.
    numbers
        Description of the problem of this run.
    terms
        Of the controls with one value per step, with responses to be filled.

    Raises
    ------
    InputError
        On every rank, if the file cannot be read, is damaged, is no map or that of another problem; the message names
        the differences.
    """
    path, places, steps = Path(path), _places(F), _step_places(F, terms)

    def read() -> np.ndarray:
        advice = "give another file, or make the map again"
        if not files.require_regular(path, _WHAT, links=True):
            raise InputError(f"{_WHAT} {path}: there is no such file")
        with files.refuse_unreadable(f"{_WHAT} {path}", advice), h5py.File(path, locking=False) as file:
            head = read_head(file)
            if head.get("what") != _WHAT or head.get("version") != _VERSION:
                raise InputError(f"{path} is no {_WHAT} of this version: {advice}")
            require_same_map(head["problem"], numbers, f"{_WHAT} {path} is that of another problem", advice)
            for name, control, place in places:
                F.layout.part(F.rows, control)[...] = read_part(file, name, place)
            for name, values, step in steps:
                values[...] = read_part(file, name, step).reshape(values.shape)
            return read_part(file, "offset", _offset_place(F))

    return collectively(F.spacetime.comm, "", read)


def require_same_map(stored: Mapping, given: Mapping, what: str, advice: str) -> None:
    """Refuse a map whose problem is not that of this run.

    Parameters
    ----------
    stored, given
        Descriptions of the problems.
    what, advice
        Beginning and end of the message.

    Raises
    ------
    InputError
        With the names of the first differences.
    """
    names = [name for name in {**given, **stored} if differences({0: stored.get(name)}, {0: given.get(name)})]
    if names:
        pairs = [(name, _short(stored.get(name)), _short(given.get(name))) for name in names[:_MOST]]
        shown = [f"{name} ({before}, in this run {now})" for name, before, now in pairs]
        more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
        raise InputError(f"{what}: other {', '.join(shown)}{more}; {advice}")


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _offset_place(F: ParameterToObservable) -> Place:
    return Place((F.table.size,), (slice(0, F.table.size),), (0, 1))


def _places(F: ParameterToObservable) -> list[tuple[str, Function, Place]]:
    """Of each static control its name in the file, and the place of this rank's rows and columns (collective)."""
    controls = F.layout.evolution
    first = F.spacetime.time_comm.exscan(len(F.numbers)) or 0
    rows = slice(first, first + len(F.numbers))
    return [
        (f"rows/{i}", control, _columns(F, control, F.table.size, rows))
        for i, control in enumerate(controls.controls)
        if control not in controls.stepwise
    ]


def _step_places(F: ParameterToObservable, terms: Sequence[StepTerm]) -> list[tuple[str, np.ndarray, Place]]:
    """Of each term and each control with one value per step the name in the file, the own responses ``(sensors, lags,
    nz)``, and their place: a row for each sensor and lag (collective).
    """
    controls = F.layout.evolution
    found, stepwise = [], [c for c in controls.parameters if c in controls.stepwise]
    ends = np.cumsum([0, *(own_size(c.function_space()) for c in stepwise)])
    first = F.spacetime.time_comm.exscan(len(F.sensors)) or 0
    for number, term in enumerate(terms):
        lags = term.responses.shape[1]
        rows = slice(first * lags, (first + len(F.sensors)) * lags)
        for control, a, b in zip(stepwise, ends, ends[1:], strict=False):
            place = _columns(F, control, F.table.sensors * lags, rows)
            found.append((f"steps/{number}/{controls.controls.index(control)}", term.responses[..., a:b], place))
    return found


def _columns(F: ParameterToObservable, control: Function, count: int, rows: slice) -> Place:
    """The place of own rows of an array with ``count`` rows, and of a control's own columns."""
    space, spacetime = control.function_space(), F.spacetime
    start, _ = space.dof_dset.layout_vec.getOwnershipRange()
    shape = (count, space.dof_dset.layout_vec.getSize())
    columns = slice(start, start + own_size(space))
    return Place(shape, (rows, columns), (spacetime.space_comm.rank, spacetime.space_size))
