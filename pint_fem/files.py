"""Files that a run writes: checked before the run, written completely or not at all, by one run at a time.

A full disk, a folder that is missing or a name that belongs to a folder, a FIFO or a device is the user's mistake, so
it becomes an :class:`~pint_fem.errors.InputError` with one line that names the file. Nothing communicates: a rank that
works for others calls these functions inside :func:`pint_fem.collective.collectively`.

A file is written in full beside its final place and renamed when it is on the disk. Its space is reserved first: a
full disk is found before anything is written, and no byte goes through a memory map, where a full disk is a signal
(SIGBUS) instead of an error. Symbolic links are not followed where a file is written: a link left in a shared folder
would choose which file is overwritten. Rows of arrays and heads of files carry checksums (CRC-32).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from pint_fem.errors import InputError

__all__ = [
    "FileLock",
    "as_input_error",
    "checked_folder",
    "checksums",
    "create",
    "force_to_disk",
    "refuse_unreadable",
    "replace",
    "require_checksums",
    "require_output",
    "require_regular",
    "reserve_space",
    "write_at",
    "write_whole",
]

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


# -- errors and checks -----------------------------------------------------------------------------------------------
@contextmanager
def as_input_error(
    what: str, advice: str = "", errors: type[Exception] | tuple[type[Exception], ...] = OSError
) -> Iterator[None]:
    """Turn an error of the operating system into an :class:`InputError` that begins with ``what``.

    Parameters
    ----------
    what
        Subject and predicate, such as ``"checkpoint run.h5 cannot be written"``.
    advice
        What the user can do.
    errors
        Classes of the exceptions that are turned into it; an ``InputError`` passes as it is.
    """
    try:
        yield
    except InputError:
        raise
    except errors as error:
        reason = getattr(error, "strerror", None) or str(error)
        if reason.endswith(" written"):  # numpy reports numbers of values only
            reason += " (a full disk?)"
        raise InputError(f"{what}: {reason}" + (f"; {advice}" if advice else "")) from error


@contextmanager
def refuse_unreadable(what: str, advice: str) -> Iterator[None]:
    """Turn any exception but an :class:`InputError` into one that reports that ``what`` cannot be read, and why."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} cannot be read ({type(error).__name__}: {error}); {advice}") from error


def require_regular(
    path: Path, what: str, advice: str = "give the name of a regular file", *, links: bool = False
) -> bool:
    """Whether a file exists; anything else of that name is refused before it is opened (a FIFO would block).

    Parameters
    ----------
    path, what
        The file, and what it is for: ``"checkpoint"``.
    advice
        What the user can do.
    links
        Whether a symbolic link to a regular file is accepted, as for files that are only read.

    Raises
    ------
    InputError
        For a folder, a symbolic link, a FIFO, a socket or a device, and for a folder of the path that cannot be read.
    """
    try:
        mode = (path.stat() if links else path.lstat()).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise InputError(f"{what} {path} is {kind}: {advice}")
    return True


def require_output(path: str | Path, what: str, *, makes_folder: bool = False) -> None:
    """Check before a run that a file can be written at its end; the disk is left as it was.

    Parameters
    ----------
    path, what
        The file, and what it is for.
    makes_folder
        Whether missing folders will be made when the file is written.

    Raises
    ------
    InputError
        If the folder is missing or cannot be written to, or the name is that of no regular file.
    """
    path = Path(path)
    exists = require_regular(path, what)
    if not path.parent.is_dir():
        above = next(p for p in path.absolute().parents if p.exists())
        if not makes_folder or not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            why = "make it" if above.is_dir() and not makes_folder else f"and {above} is no folder that can be written"
            raise InputError(f"{what} {path}: there is no such folder {path.parent}, {why}; or give another name")
        return
    with as_input_error(f"{what} {path} cannot be written"):
        with _opened(path, os.O_WRONLY | os.O_NOFOLLOW if exists else _NEW):
            pass
        if not exists:
            os.unlink(path)


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
        probe.unlink()
    return path


# -- checksums -------------------------------------------------------------------------------------------------------
def checksums(rows: np.ndarray) -> np.ndarray:
    """CRC-32 of each row of a C-contiguous array, as little-endian unsigned 32-bit integers."""
    return np.array([zlib.crc32(row) for row in rows], "<u4")


def require_checksums(name: str, rows: np.ndarray, expected: np.ndarray, first: int | None) -> None:
    """Compare the checksums of rows of an array with ``expected``, those of the rows that were written.

    Raises
    ------
    ValueError
        Where one differs, with the array's ``name`` and the row's number, if that of the ``first`` one is given.
    """
    bad = np.flatnonzero(expected != checksums(rows))
    if len(bad):
        row = "" if first is None else f" in row {first + bad[0]}"
        raise ValueError(f"{name} is damaged{row}: the checksum is another")


# -- writing ---------------------------------------------------------------------------------------------------------
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """The descriptor of a file that is closed at the end of the block."""
    handle = os.open(path, flags, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def create(path: Path, size: int) -> None:
    """Make a new file of ``size`` bytes whose space on the disk is reserved, in place of one of the same name.

    Raises
    ------
    OSError
        If the disk is full, a limit on the size of files is exceeded, or the file cannot be made; then there is none.
    """
    with suppress(FileNotFoundError):
        path.unlink()
    with _opened(path, _NEW) as handle:
        try:
            if size:
                os.posix_fallocate(handle, 0, size)
        except OSError:
            path.unlink()
            raise


def reserve_space(path: Path) -> None:
    """Reserve the space on the disk of all bytes of a file that has gaps.

    Raises
    ------
    OSError
        If the disk is full.
    """
    with _opened(path, os.O_WRONLY | os.O_NOFOLLOW) as handle:
        if size := os.fstat(handle).st_size:
            os.posix_fallocate(handle, 0, size)


def write_at(path: Path, parts: Iterable[tuple[int, memoryview | bytes | np.ndarray]]) -> None:
    """Write pieces of a file that exists and force them to the disk.

    Parameters
    ----------
    path
        The file, made by :func:`create`.
    parts
        Offsets in bytes, each with a contiguous buffer.

    Raises
    ------
    OSError
        If a piece cannot be written.
    """
    with _opened(path, os.O_WRONLY | os.O_NOFOLLOW) as handle:
        for offset, buffer in parts:
            rest = memoryview(buffer).cast("B")
            while len(rest):
                done = os.pwrite(handle, rest, offset)
                offset, rest = offset + done, rest[done:]
        os.fsync(handle)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place, force it to the disk and rename it: it is complete, or as it was before.

    Raises
    ------
    OSError
        If it cannot be written; a file of the same name is left as it is.
    """
    part = path.with_name(path.name + ".part")
    create(part, len(content))
    try:
        write_at(part, [(0, content)] if content else [])
        replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def replace(new: Path, path: Path) -> None:
    """Give a file that is on the disk its final name, and force the folder to the disk."""
    os.replace(new, path)
    force_to_disk(path.parent)


def force_to_disk(path: Path) -> None:
    """Force a file or a folder to the disk."""
    with _opened(path, os.O_RDONLY) as handle:
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some file systems cannot force folders
                raise


# -- one run at a time -----------------------------------------------------------------------------------------------
_held: dict[Path, tuple[int, int]] = {}
"""Locks of this process: file descriptor and number of holders by the resolved path of the lock file."""


class FileLock:
    """The right to write a file or folder, held by one process at a time; it ends with the process.

    Several objects in one process share it. On file systems without locks every process gets it.

    Parameters
    ----------
    path
        The file, or the folder: the lock is on a hidden file beside it, or in the folder.
    what
        What it is for, in the message.
    """

    def __init__(self, path: Path, what: str):
        inside = path.is_dir()
        self._lock = (path / ".lock") if inside else path.with_name(f".{path.name}.lock")
        self._what, self._path, self._key = what, path, None

    def acquire(self) -> None:
        """Acquire the lock, if this object does not hold it already.

        Raises
        ------
        InputError
            If another process holds it, with that process's number and machine.
        """
        if self._key is not None:
            return
        key = self._lock.resolve().parent / self._lock.name
        handle, holders = _held.get(key, (None, 0))
        if handle is None:
            handle = self._open()
        _held[key], self._key = (handle, holders + 1), key

    def _open(self) -> int:
        with as_input_error(f"{self._what} {self._path} cannot be written"):
            while True:
                handle = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
                    os.close(handle)
                    raise InputError(
                        f"{self._what} {self._path} is being written by another run ({holder or 'unnamed process'}): "
                        "end it, or give another name"
                    ) from None
                except OSError as error:
                    if error.errno not in _NO_LOCKS:
                        os.close(handle)
                        raise
                try:
                    if os.fstat(handle).st_ino == os.stat(self._lock).st_ino:
                        break
                except FileNotFoundError:
                    pass
                os.close(handle)  # its last holder has removed it in between
        with suppress(OSError):  # a full disk: the lock holds without the name of its holder
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        return handle

    def release(self) -> None:
        """Release the lock; the last holder of the process removes the lock file."""
        if self._key is None:
            return
        key, self._key = self._key, None
        handle, holders = _held.pop(key)
        if holders > 1:
            _held[key] = (handle, holders - 1)
            return
        with suppress(OSError):
            key.unlink()
        os.close(handle)

    def __del__(self) -> None:
        """Release the lock with the object."""
        if getattr(self, "_key", None) is not None:
            self.release()
