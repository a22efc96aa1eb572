"""Maps from controls to readings in HDF5 files, written and read by all ranks.

The file has the readings at zero controls and, for each static control, one row per reading, sensor after sensor; for
each control with one value per step and each term of its load, one row per sensor and lag. Each
rank writes the rows of its own sensors and the columns of its own unknowns, and reads those that it owns in the run
that loads the file, so that nothing is gathered and the number of ranks in time may be another. A file is complete or
not there, and each row has a checksum (:mod:`pint_fem.array_file`).

A map is that of a problem: of its evolution, integrator, controls, sensors and times of readings. Their description is
stored, and a file of another problem is refused. What was measured, noise and regularisation are no part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
from firedrake import Function

from pint_fem import files
from pint_fem.array_file import Piece, Place, read_head, read_part, write_file
from pint_fem.collective import collectively, on_first_rank
from pint_fem.digests import differences
from pint_fem.errors import InputError
from pint_fem.inverse.response_rows import StepTerm
from pint_fem.kernels.arrays import as_rows, own_size, split_values

if TYPE_CHECKING:
    from pint_fem.inverse.map import ParameterToObservable

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
    lock = files.FileLock(path, _WHAT)

    def checked() -> None:
        files.require_output(path, _WHAT)
        lock.acquire()

    pieces = [Piece("offset", _offset_place(F), F.offset if comm.rank == 0 else None)]
    pieces += [Piece(name, place, F.layout.part(F.rows, control)) for name, control, place in _places(F)]
    if F.steps is not None:
        pieces += [Piece(name, place, as_rows(responses)) for name, responses, place in _step_places(F, F.steps.terms)]
    head = {"version": _VERSION, "what": _WHAT, "problem": dict(numbers)}
    on_first_rank(comm, "", checked)
    try:
        write_file(comm, path, _WHAT, head, pieces)
    finally:
        lock.release()


def load_map(F: ParameterToObservable, path: str | Path, numbers: Mapping, terms: Sequence[StepTerm]) -> np.ndarray:
    """Read the own rows of a map into ``F.rows`` and the own responses into those of ``terms``, and return the readings
    at zero controls ``(m,)`` (collective).

    Parameters
    ----------
    F
        The map, with rows of the right shape.
    path
        The file.
    numbers
        Description of the problem of this run.
    terms
        Terms of controls with one value per step.

    Raises
    ------
    InputError
        On every rank, if the file cannot be read, is damaged, is no map or that of another problem; the message names
        the differences.
    """
    path, places, step_places = Path(path), _places(F), list(_step_places(F, terms))

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
            for name, responses, place in step_places:
                responses[...] = read_part(file, name, place).reshape(responses.shape)
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
    return list(_each_place(F))


def _each_place(F: ParameterToObservable) -> Iterator[tuple[str, Function, Place]]:
    spacetime, controls = F.spacetime, F.layout.evolution
    first = spacetime.time_comm.exscan(len(F.numbers)) or 0
    rows = slice(first, first + len(F.numbers))
    for i, control in enumerate(controls.controls):
        if control not in controls.stepwise:
            space = control.function_space()
            start, _ = space.dof_dset.layout_vec.getOwnershipRange()
            shape = (F.table.size, space.dof_dset.layout_vec.getSize())
            columns = slice(start, start + own_size(space))
            yield f"rows/{i}", control, Place(shape, (rows, columns), (spacetime.space_comm.rank, spacetime.space_size))


def _step_places(F: ParameterToObservable, terms: Sequence[StepTerm]) -> Iterator[tuple[str, np.ndarray, Place]]:
    """Of each term and each control with one value per step its name in the file, views of this rank's responses
    ``(sensors, lags, own columns)``, and the place of these, one row per sensor and lag (collective).
    """
    spacetime, ev = F.spacetime, F.layout.evolution
    stepwise = [c for c in ev.parameters if c in ev.stepwise]
    for number, term in enumerate(terms):
        sensors, lags, _ = term.responses.shape
        first = (spacetime.time_comm.exscan(sensors) or 0) * lags
        for i, (control, part) in enumerate(zip(stepwise, split_values(term.responses, stepwise), strict=True)):
            layout = control.function_space().dof_dset.layout_vec
            start, end = layout.getOwnershipRange()
            where = slice(first, first + sensors * lags), slice(start, end)
            shape = (F.table.sensors * lags, layout.getSize())
            yield f"steps/{number}/{i}", part, Place(shape, where, (spacetime.space_comm.rank, spacetime.space_size))
