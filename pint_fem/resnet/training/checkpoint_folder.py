"""The folder of a checkpoint: numbered folders, of which the small file ``latest`` names the one that is complete.

``latest`` is replaced in one step after everything in the numbered folder is on the disk, and has the checksum of its
``head.json``. Functions here do not communicate, except :func:`reserve_checkpoint`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from pathlib import Path

from pint_fem import files
from pint_fem.collective import on_first_rank
from pint_fem.errors import InputError
from pint_fem.resnet.grid import Grid

__all__ = ["ANEW", "finish", "is_latest", "next_folder", "read_head", "reserve_checkpoint"]

ANEW = "give another folder to start anew"
_NEEDED = ("network", "arrays", "iterations", "progress")
_locks: dict[Path, files.FileLock] = {}
"""Locks of this process, by the folder; they last as long as the process."""


def reserve_checkpoint(path: str | Path, grid: Grid) -> None:
    """Check before a training that a checkpoint can be written, and keep other processes from it (collective).

    The folder is made where it is missing. The right to write it lasts as long as this process.

    Parameters
    ----------
    path
        A folder for this checkpoint alone.
    grid
        Process grid of the network.

    Raises
    ------
    InputError
        On every rank, if the folder cannot be made or written to, or another run writes it.
    """
    on_first_rank(grid.comm, "", _reserve, Path(path))


def _reserve(path: Path) -> None:
    """Make the folder and acquire its lock."""
    _check_folder(path)
    with files.as_input_error(f"checkpoint {path} cannot be written"):
        path.mkdir(parents=True, exist_ok=True)
    _locks.setdefault(path.resolve(), files.FileLock(path, "checkpoint")).acquire()


def _check_folder(path: Path) -> bool:
    """Whether the folder exists; a link and anything else of that name is refused."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        kind = "a symbolic link" if path.is_symlink() else "no folder"
        raise InputError(f"checkpoint {path} is {kind}: give the name of a folder of its own")
    return path.exists()


def _latest(path: Path) -> tuple[str, int | None] | None:
    """Number of the complete checkpoint and the checksum of its head, ``None`` where there is none."""
    if not _check_folder(path) or not files.require_regular(path / "latest", "checkpoint's file", ANEW):
        return None
    with files.as_input_error(f"checkpoint {path}: its file 'latest' cannot be read", ANEW):
        text = (path / "latest").read_bytes().decode("latin-1").strip()
    match = re.fullmatch(r"(\d+)(?: ([0-9a-f]{8}))?", text)
    if not match:
        raise InputError(
            f"checkpoint {path}: its file 'latest' is damaged, it has {text[:40]!r} instead of a number; {ANEW}"
        )
    return match[1], None if match[2] is None else int(match[2], 16)


def read_head(path: Path) -> tuple[str, dict] | None:
    """Number and head of the complete checkpoint, ``None`` where there is none.

    Raises
    ------
    InputError
        Where it is damaged or cannot be read.
    """
    latest = _latest(path)
    if latest is None:
        return None
    name, crc = latest
    file = path / name / "head.json"
    if file.parent.is_symlink() or not file.parent.is_dir() or not files.require_regular(file, "head", ANEW):
        raise InputError(f"checkpoint {path}: 'latest' names {name}, where there is no head.json; {ANEW}")
    with files.as_input_error(f"checkpoint {file} cannot be read", ANEW):
        text = file.read_bytes()
    if crc is not None and zlib.crc32(text) != crc:
        raise InputError(f"checkpoint {file} is damaged: the checksum is another; {ANEW}")
    with files.as_input_error(f"checkpoint {file} is damaged", ANEW, (ValueError, TypeError)):
        head = json.loads(text)
        missing = [key for key in _NEEDED if key not in head]
    if missing or not isinstance(head, dict):
        raise InputError(f"checkpoint {file} is damaged: it has no {', '.join(missing)}; {ANEW}")
    return name, head


def next_folder(path: Path) -> str:
    """Make the next numbered folder; its name.

    Raises
    ------
    OSError
        If it cannot be made.
    """
    name = str(1 + max((int(p.name) for p in _numbered(path)), default=0))
    (path / name).mkdir()
    return name


def _numbered(path: Path) -> list[Path]:
    """The numbered folders of a checkpoint."""
    return [p for p in path.iterdir() if p.name.isdecimal() and p.name.isascii()]


def finish(path: Path, folder: Path, head: dict) -> None:
    """Write the head, make the folder the latest one and remove the others.

    Raises
    ------
    OSError, TypeError, ValueError
        If the head cannot be written; the last checkpoint stays.
    """
    text = json.dumps(head).encode()
    files.write_whole(folder / "head.json", text)
    files.force_to_disk(folder)
    files.write_whole(path / "latest", f"{folder.name} {zlib.crc32(text):08x}".encode())
    for other in _numbered(path):
        if other.name != folder.name:
            if other.is_symlink():
                os.unlink(other)
            else:
                shutil.rmtree(other, ignore_errors=True)


def is_latest(path: Path, folder: Path) -> bool:
    """Whether ``latest`` names a folder."""
    try:
        return (_latest(path) or ("",))[0] == folder.name
    except InputError:
        return False
