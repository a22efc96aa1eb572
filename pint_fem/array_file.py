"""An HDF5 file of distributed arrays: a head, the arrays, and a checksum for each of their rows.

The first rank creates the file: it reserves the space on the disk, writes the head (a dataset of bytes) and declares
the arrays, contiguous and without values. Every rank then writes its own rows and columns at their places in the file.
No call of HDF5 is collective, so no rank waits for one that fails, and a full disk is an error on the first rank before
anything is written.

Row ``i`` of an array has one checksum (CRC-32) for each rank in space, of that rank's columns, in ``checks/<name>``. So
a file can be checked by any number of time ranks. Files of earlier versions have no checksums and keep their head in an
attribute (of at most 64 KiB); they are read as well.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from mpi4py import MPI

from pint_fem import files
from pint_fem.collective import collectively, on_first_rank
from pint_fem.errors import InputError

__all__ = ["Piece", "Place", "create_file", "read_head", "read_part", "write_file", "write_parts"]

_OVERHEAD = 4096  # upper bound of the bytes that HDF5 adds to an array


class Place(NamedTuple):
    """Shape of a distributed array, this rank's part of it, and its column among all columns of checksums."""

    shape: tuple[int, ...]
    where: tuple[slice, ...]
    column: tuple[int, int]

    @property
    def checks(self) -> tuple[tuple[int, int], tuple[slice, slice]]:
        """The shape of the array of checksums and this rank's part of it."""
        index, count = self.column
        rows = self.where[0] if len(self.shape) == 2 else slice(0, 1)
        return (self.shape[0] if len(self.shape) == 2 else 1, count), (rows, slice(index, index + 1))


class Piece(NamedTuple):
    """An array of the file and this rank's part of its values; ``None`` where another rank writes them."""

    name: str
    place: Place
    values: np.ndarray | None


def create_file(path: Path, head: dict, pieces: Sequence[Piece]) -> dict[str, int]:
    """Create a file with a head and arrays whose values are not written yet; on one rank.

    Returns
    -------
    dict
        Offset of each array in the file, in bytes.

    Raises
    ------
    OSError, RuntimeError
        If the disk is full, or the file cannot be created.
    """
    text = json.dumps(head).encode()
    arrays = [(p.name, p.place.shape, "<f8") for p in pieces]
    arrays += [(f"checks/{p.name}", p.place.checks[0], "<u4") for p in pieces]
    size = len(text) + sum(int(np.prod(shape)) * int(kind[2]) + _OVERHEAD for _, shape, kind in arrays) + _OVERHEAD
    files.create(path, size)  # a full disk raises here rather than while HDF5 closes a file
    offsets = {}
    with h5py.File(path, "w", locking=False) as file:
        data = file.create_dataset("head", data=np.frombuffer(text, np.uint8))
        data.attrs["crc32"] = zlib.crc32(text)
        for name, shape, kind in arrays:
            properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            data = file.create_dataset(name, shape, kind, dcpl=properties)
            offsets[name] = data.id.get_offset() or 0
    files.reserve_space(path)
    return offsets


def write_parts(path: Path, offsets: dict[str, int], pieces: Sequence[Piece]) -> None:
    """Write this rank's part of each array and its checksums, and force them to the disk.

    Raises
    ------
    OSError
        If a part cannot be written.
    """
    parts = []
    for name, place, values in pieces:
        if values is None or not values.size:
            continue
        rows = np.ascontiguousarray(values, "<f8").reshape(-1, values.shape[-1])
        sums = files.checksums(rows)[:, None]
        parts += _placed(offsets[name], rows, place.shape[-1], place.where)
        shape, where = place.checks
        parts += _placed(offsets[f"checks/{name}"], sums, shape[1], where)
    files.write_at(path, parts)


def _placed(offset: int, rows: np.ndarray, width: int, where: tuple[slice, ...]):
    """Offsets in the file and buffers of rows ``(k, w)`` in an array of ``width`` columns: one where ``w == width``."""
    first, column = (where[0].start if len(where) == 2 else 0), where[-1].start
    if rows.shape[1] == width:
        return [(offset + first * width * rows.itemsize, rows)]
    return [(offset + ((first + i) * width + column) * rows.itemsize, row) for i, row in enumerate(rows)]


def write_file(comm: MPI.Comm, path: Path, what: str, head: dict, pieces: Sequence[Piece]) -> None:
    """Write a file beside its final place and rename it when it is complete and on the disk (collective).

    Parameters
    ----------
    comm
        Communicator of all ranks.
    path, what
        The file, and what it is for: ``"checkpoint"``.
    head, pieces
        The head, for JSON, and the arrays with this rank's parts of their values.

    Raises
    ------
    InputError
        On every rank, if the file cannot be written; one of the same name is left as it is.
    """
    new = path.with_name(path.name + ".new")

    def guarded(work: Callable, *args: Any):
        errors = (OSError, RuntimeError)  # HDF5 raises either
        with files.as_input_error(f"{what} {path} cannot be written", errors=errors):
            return work(*args)

    try:
        offsets = on_first_rank(comm, "", guarded, create_file, new, head, pieces)
        collectively(comm, "", guarded, write_parts, new, offsets, pieces)
        on_first_rank(comm, "", guarded, files.replace, new, path)
    except InputError:  # on all ranks: none of them is about to open it any more
        if comm.rank == 0:
            with suppress(OSError):
                os.unlink(new)  # on a full disk it would be in the way
        raise


def read_head(file: h5py.File) -> dict:
    """The head of a file of this or an earlier version.

    Raises
    ------
    ValueError
        If it is damaged.
    """
    if "head" in file.attrs:  # earlier versions
        return json.loads(bytes(file.attrs["head"]))
    text = file["head"][()].tobytes()
    if zlib.crc32(text) != file["head"].attrs["crc32"]:
        raise ValueError("its head is damaged: the checksum is another")
    return json.loads(text)


def read_part(file: h5py.File, name: str, place: Place) -> np.ndarray:
    """This rank's part of an array, checked.

    Raises
    ------
    ValueError
        If the array has another shape or type, or a checksum is another.
    """
    data = file[name]
    if data.shape != place.shape or data.dtype != np.dtype("<f8"):
        raise ValueError(f"{name} is {data.dtype.name} {data.shape}, not float64 {place.shape}")
    values = data[place.where]
    if "checks" in file and values.size:  # the first rank in space owns all real numbers
        _, where = place.checks
        rows = np.ascontiguousarray(values).reshape(-1, values.shape[-1])
        first = where[0].start if len(place.shape) == 2 else None
        files.require_checksums(name, rows, file[f"checks/{name}"][where].ravel(), first)
    return values
