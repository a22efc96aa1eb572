"""Files that a run writes: found fit before the run, written whole or not at all, by one run at a time.

A disk that is full, a folder that is missing or a name that belongs to a folder, a FIFO or a device is the user's
mistake, so everything here raises :class:`~pint_fem.errors.InputError` with one line that names the file. Nothing
communicates: a rank that works for others calls these functions inside :func:`pint_fem.collective.collectively`.

A file is written in full beside its final place and renamed when it is on the disk. Its space is reserved first: a
full disk is found before anything is written, and no byte goes through a memory map, where a full disk is a signal
(SIGBUS) instead of an error. Symbolic links are not followed where a file is written: a link left in a shared folder
would choose which file is overwritten.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pint_fem.errors import InputError

__all__ = [
    "FileLock",
    "checked_folder",
    "create",
    "naming",
    "replace",
    "require_output",
    "require_regular",
    "reserve",
    "to_disk",
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


@contextmanager
def naming(what: str, advice: str = "") -> Iterator[None]:
    """Turn an error of the operating system into an :class:`InputError` that begins with ``what``.

    Parameters
    ----------
    what
        Subject and predicate, such as ``"checkpoint run.h5 cannot be written"``.
    advice
        What would do.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or f"{error} (a full disk?)"  # numpy counts what it could write, and that is all
        raise InputError(f"{what}: {reason}" + (f"; {advice}" if advice else "")) from error


def require_regular(
    path: Path, what: str, advice: str = "give the name of a regular file", *, links: bool = False
) -> bool:
    """Whether a file is there; what is there but no regular file is refused before it is opened (a FIFO would block).

    Parameters
    ----------
    path
        The file.
    what
        What it is for, in the message: ``"checkpoint"``.
    advice
        What would do.
    links
        Whether a symbolic link to a regular file will do, as for files that are only read.

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
    """Find out before a run whether a file can be written at its end; nothing is left behind.

    Parameters
    ----------
    path
        The file; it may be there already and is not changed.
    what
        What it is for, in the message.
    makes_folder
        Whether folders that are missing will be made by who writes the file.

    Raises
    ------
    InputError
        If the folder is missing or cannot be written to, or the name is taken by what is no regular file.
    """
    path = Path(path)
    there = require_regular(path, what)
    if not path.parent.is_dir():
        there = next(p for p in path.absolute().parents if p.exists())
        if not makes_folder or not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            why = "make it" if there.is_dir() and not makes_folder else f"and {there} is no folder that can be written"
            raise InputError(f"{what} {path}: there is no such folder {path.parent}, {why}; or give another name")
        return
    with naming(f"{what} {path} cannot be written"):
        if there:
            os.close(os.open(path, os.O_WRONLY | os.O_NOFOLLOW))
        else:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
            os.unlink(path)


def checked_folder(path: Path, what: str) -> Path:
    """Make a folder for results where it is missing, and find out whether files can be made in it.

    Raises
    ------
    InputError
        If it cannot be made or written to.
    """
    with naming(f"{what} {path}", "give a folder that can be written"):
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{socket.gethostname()}-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    return path


# -- writing ---------------------------------------------------------------------------------------------------------
def create(path: Path, size: int) -> None:
    """Make a new file of some bytes whose space on the disk is reserved; what has the name already is removed.

    Raises
    ------
    OSError
        If the disk is full, a limit on the size of files is exceeded, or the file cannot be made; nothing is left.
    """
    with suppress(FileNotFoundError):
        path.unlink()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        if size:
            os.posix_fallocate(handle, 0, size)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(handle)


def reserve(path: Path) -> None:
    """Reserve the space on the disk of all bytes that a file has, where it has gaps.

    Raises
    ------
    OSError
        If the disk is full.
    """
    handle = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        size = os.fstat(handle).st_size
        if size:
            os.posix_fallocate(handle, 0, size)
    finally:
        os.close(handle)


def write_at(path: Path, parts) -> None:
    """Write pieces of an existing file and force them to the disk.

    Parameters
    ----------
    path
        The file, made by :func:`create`.
    parts
        Pairs of an offset and a contiguous buffer.

    Raises
    ------
    OSError
        If a piece cannot be written.
    """
    handle = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        for offset, buffer in parts:
            rest = memoryview(buffer).cast("B")
            while len(rest):
                done = os.pwrite(handle, rest, offset)
                offset, rest = offset + done, rest[done:]
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place, force it to the disk and rename it: it is there whole or as it was before.

    Raises
    ------
    OSError
        If it cannot be written; the last file is left as it is.
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
    to_disk(path.parent)


def to_disk(path: Path) -> None:
    """Force a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems have no folders to force
            raise
    finally:
        os.close(handle)


# -- one run at a time -----------------------------------------------------------------------------------------------
_held: dict[Path, tuple[int, int]] = {}
"""Locks of this process: file descriptor and number of holders, by the resolved path of the lock file."""


class FileLock:
    """The right to write a file, held by one process at a time; the operating system ends it with the process.

    Several holders in one process share it. On file systems without locks everybody has it.

    Parameters
    ----------
    path
        What is locked: a hidden file beside it, or in it where it is a folder, carries the lock.
    what
        What it is for, in the message.
    """

    def __init__(self, path: Path, what: str):
        inside = path.is_dir()
        self._lock = (path / ".lock") if inside else path.with_name(f".{path.name}.lock")
        self._what, self._path, self._key = what, path, None

    def acquire(self) -> None:
        """Take the lock, if it is not held here already.

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
        with naming(f"{self._what} {self._path} cannot be written"):
            while True:
                handle = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    who = os.pread(handle, 200, 0).decode(errors="replace").strip()
                    os.close(handle)
                    raise InputError(
                        f"{self._what} {self._path} is being written by another run ({who or 'unnamed process'}): "
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
        with suppress(OSError):  # a full disk: the name of the holder is a courtesy
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        return handle

    def release(self) -> None:
        """Give the lock back; the last holder of the process removes the lock file."""
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

    def __del__(self):
        """Give the lock back with the object."""
        if getattr(self, "_key", None) is not None:
            self.release()
