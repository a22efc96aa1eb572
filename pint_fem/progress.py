"""Lines that programs print, and the status of long work: what is being waited for, and how far it is.

The package wraps long work in ``with waiting("..."):``, which does nothing until a program calls :func:`show`, as
:class:`~pint_fem.cli.ProgramParser` does. A program then has one status line, on the first rank, where standard error
is a terminal; it is erased before anything else is printed. There are three levels: with ``QUIET`` nothing is printed
but errors, with ``NORMAL`` the results and the status line, with ``VERBOSE`` also a line on each wait when it is over,
terminal or not.
"""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, TextIO

__all__ = ["ErasingStream", "Verbosity", "Wait", "erase", "say", "show", "update", "verbosity", "waiting"]


class Verbosity(IntEnum):
    """How much a program prints."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


class Wait:
    """A wait in progress.

    Attributes
    ----------
    text : str
        What is being waited for.
    start : float
        When it began, by ``time.perf_counter()``.
    """

    def __init__(self, text: str):
        self.text, self.start, self.detail, self.compiled = text, time.perf_counter(), "", _display.compiled

    def update(self, detail: str) -> None:
        """Show how far the work is, in place of what was shown before."""
        self.detail = detail
        _display.refresh()

    __call__ = update


class _Display:
    """The waits of this process and the line on its terminal."""

    def __init__(self) -> None:
        self.level, self.prints = Verbosity.NORMAL, True
        self.terminal: TextIO | None = None
        self.waits: list[Wait] = []
        self.compiled = 0
        self._lock = threading.RLock()
        self._drawn, self._ticking = False, False

    def refresh(self) -> None:
        """Draw the line anew, or erase it where nothing is waited for."""
        _CompilationFilter.watch()
        if self.terminal is None:
            return
        with self._lock:
            if not self.waits:
                self.erase()
                return
            wait = self.waits[-1]
            text = f"{wait.text}{': ' if wait.detail else ''}{wait.detail} ({time.perf_counter() - wait.start:.0f} s)"
            self._write(f"\r\x1b[2K{text[: shutil.get_terminal_size().columns - 1]}")
            self._drawn = True
            if not self._ticking:
                self._ticking = True
                threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        """Count the seconds while something is waited for."""
        while True:
            time.sleep(1)
            with self._lock:
                if not self.waits or self.terminal is None:
                    self._ticking = False
                    return
                self.refresh()

    def erase(self) -> None:
        """Erase the line before something else is printed."""
        with self._lock:
            if self._drawn:
                self._write("\r\x1b[2K")
                self._drawn = False

    def _write(self, text: str) -> None:
        if self.terminal is None:
            return
        try:
            self.terminal.write(text)
            self.terminal.flush()
        except (OSError, ValueError):  # the terminal is closed: the run goes on
            self.terminal = None


_display = _Display()


def show(level: Verbosity, *, first_rank: bool = True) -> None:
    """Set what this process prints from now on.

    Parameters
    ----------
    level
        How much.
    first_rank
        Whether this rank prints at all.
    """
    _display.erase()
    _display.level, _display.prints = level, first_rank
    terminal = first_rank and level > Verbosity.QUIET and sys.stderr.isatty()
    _display.terminal = sys.stderr if terminal else None
    if first_rank and level > Verbosity.QUIET:
        _CompilationFilter.install()


def verbosity() -> Verbosity:
    """How much the program prints."""
    return _display.level


def say(text: str = "", *, result: bool = False) -> None:
    """Print a line on standard output at once, on the first rank, unless the program is quiet.

    Parameters
    ----------
    text
        The line.
    result
        Whether it is what the program is called for, which is printed where it is quiet, too.
    """
    if _display.prints and (result or _display.level > Verbosity.QUIET):
        _display.erase()
        print(text, flush=True)
        _display.refresh()


def erase() -> None:
    """Erase the status line, before another module prints."""
    _display.erase()


class ErasingStream:
    """A stream for the prints of a user's program, before which the status line is erased.

    Parameters
    ----------
    stream
        Where they go, such as ``sys.stdout``.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text."""
        erase()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def waiting(text: str) -> Iterator[Wait]:
    """Show what is being waited for while the block runs; the wait's ``update`` shows how far it is."""
    wait = Wait(text)
    _display.waits.append(wait)
    _display.refresh()
    try:
        yield wait
    finally:
        if wait in _display.waits:
            _display.waits.remove(wait)
        _display.refresh()
    if _display.level == Verbosity.VERBOSE:
        count, depth = _display.compiled - wait.compiled, len(_display.waits)
        kernels = f", {count} kernels compiled, which later runs find in the cache" if count and not depth else ""
        say(f"{'  ' * depth}{text}: {time.perf_counter() - wait.start:.2f} s{kernels}")


def update(detail: str) -> None:
    """Show how far the work is that is being waited for, if any."""
    if _display.waits:
        _display.waits[-1].update(detail)


class _CompilationFilter(logging.Filter):
    """Shows that PyOP2 compiles a kernel, Firedrake's or one of this package, by PyOP2's own log.

    Records below the level that the logger had are not passed on.
    """

    _installed: _CompilationFilter | None = None

    def __init__(self) -> None:
        super().__init__()
        self._level = logging.NOTSET
        self._wait: Wait | None = None

    @classmethod
    def install(cls) -> None:
        """Add the filter to PyOP2's logger once."""
        if cls._installed is None:
            cls._installed = cls()
            logging.getLogger("pyop2").addFilter(cls._installed)
        cls.watch()

    @classmethod
    def watch(cls) -> None:
        """Have the logger make the records on compilation, also after Firedrake has set its level on import."""
        logger = logging.getLogger("pyop2")
        if (
            cls._installed is not None
            and _display.level > Verbosity.QUIET
            and logger.getEffectiveLevel() > logging.INFO
        ):
            cls._installed._level = logger.getEffectiveLevel()
            logger.setLevel(logging.INFO)

    def filter(self, record: logging.LogRecord) -> bool:
        """Take the records on compilation; whether the record is passed on."""
        if str(record.msg).lstrip().startswith("Compiling wrapper"):
            self._stop()
            if not str(record.msg).endswith("done"):
                _display.compiled += 1
                self._wait = Wait("first run: compiling kernels, which are kept for later runs")
                self._wait.detail = f"number {_display.compiled}"
                _display.waits.append(self._wait)
            _display.refresh()
        return record.levelno >= self._level

    def _stop(self) -> None:
        if self._wait in _display.waits:
            _display.waits.remove(self._wait)
        self._wait = None
