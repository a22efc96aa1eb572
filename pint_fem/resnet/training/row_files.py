"""Stacked arrays of all layers in ``.npy`` files, of which every rank writes and reads the rows of its own layers.

Row ``n`` of ``NAME.npy`` belongs to layer ``n``; its checksum (CRC-32) is entry ``n`` of ``NAME.crc32.npy``. Files of
the first version have no checksums. No file is mapped into memory: writing to a mapped file on a full disk ends the
process by a signal (SIGBUS).
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from pint_fem import files

__all__ = ["create_rows", "read_rows", "write_rows"]

_CHECKS = np.dtype("<u4")


def _sums_of(path: Path) -> Path:
    """File of the checksums of an array."""
    return path.with_name(f"{path.stem}.crc32.npy")


def _header(shape: tuple[int, ...], kind: np.dtype) -> bytes:
    """Header of a ``.npy`` file."""
    out = io.BytesIO()
    description = np.lib.format.dtype_to_descr(kind)
    np.lib.format.write_array_header_1_0(out, {"descr": description, "fortran_order": False, "shape": shape})
    return out.getvalue()


def create_rows(path: Path, shape: tuple[int, ...], kind: np.dtype) -> None:
    """Make the files of an array of a shape and type and of its checksums, with reserved space; on one rank.

    Raises
    ------
    OSError
        If the disk is full or a file cannot be made.
    """
    for name, size, dtype in ((path, shape, np.dtype(kind)), (_sums_of(path), shape[:1], _CHECKS)):
        header = _header(size, dtype)
        files.create(name, len(header) + int(np.prod(size, dtype=object)) * dtype.itemsize)
        files.write_at(name, [(0, header)])


def write_rows(path: Path, first: int, rows: np.ndarray, count: int) -> None:
    """Write consecutive rows from number ``first`` on, of ``count`` in all, and their checksums.

    Raises
    ------
    OSError
        If they cannot be written.
    """
    rows = np.ascontiguousarray(rows)
    if not rows.size:
        return
    for name, part in ((path, rows), (_sums_of(path), files.checksums(rows))):
        start = len(_header((count, *part.shape[1:]), part.dtype))
        files.write_at(name, [(start + first * (part.nbytes // len(part)), part)])


def read_rows(
    path: Path, first: int, last: int, shape: tuple[int, ...], kind: np.dtype, *, checked: bool
) -> np.ndarray:
    """Rows ``first .. last - 1`` of an array of a shape and type; ``checked`` against their checksums.

    Raises
    ------
    ValueError
        If the file is missing or has another shape, type or size, or a checksum differs.
    OSError
        If it cannot be read.
    """
    rows = _read(path, first, last, shape, np.dtype(kind))
    if checked:
        files.require_checksums(path.name, rows, _read(_sums_of(path), first, last, shape[:1], _CHECKS), first)
    return rows


def _read(path: Path, first: int, last: int, shape: tuple[int, ...], kind: np.dtype) -> np.ndarray:
    """Rows of one file, whose header has to have the shape and the type."""
    if not files.require_regular(path, "array", "give another folder to start anew"):
        raise ValueError(f"{path.name} is missing")
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        found, fortran, dtype = read(file)
        if found != shape or dtype != kind or fortran:
            raise ValueError(f"{path.name} is {dtype} {found}, not {kind} {shape}")
        width = int(np.prod(shape[1:], dtype=int))
        file.seek(first * width * kind.itemsize, io.SEEK_CUR)
        values = np.fromfile(file, kind, (last - first) * width)
    if values.size != (last - first) * width:
        raise ValueError(f"{path.name} ends within its values")
    return values.reshape(last - first, *shape[1:])
