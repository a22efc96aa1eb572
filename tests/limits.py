"""A limit of time for tests that hang where the code is wrong: the hang becomes a failure."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["time_limit"]

GRACE = 20.0
"""Seconds until a rank ends that its signal cannot interrupt, as it waits inside MPI."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Fail what runs inside after some seconds; use it as a decorator or in a ``with`` statement.

    Python code is interrupted by ``TimeoutError``. A process that waits inside MPI or PETSc does not see the signal: it
    prints all tracebacks and exits, which ends the other ranks of an MPI run, too.

    Parameters
    ----------
    seconds
        Wall-clock time, scaled by the environment variable ``PINT_FEM_TEST_PATIENCE`` on slow machines.
    """
    seconds *= float(os.environ.get("PINT_FEM_TEST_PATIENCE", "1"))

    def stop(signum, frame):
        raise TimeoutError(f"not done after {seconds:g} s: a hang, or a much slower machine")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
