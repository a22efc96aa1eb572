"""Limits of time, which turn hangs into failures, and how slow this machine is: ``python -m tests.limits``."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

__all__ = ["HANG", "patience", "slowness", "time_limit"]

GRACE = 20.0
"""Seconds until a rank ends that its signal cannot interrupt, as it waits inside MPI."""
HANG = 240.0
"""Seconds after which a test without a limit of its own is taken for a hang."""


def patience() -> float:
    """What limits of time are multiplied by: the environment variable ``PINT_FEM_TEST_PATIENCE``."""
    return float(os.environ.get("PINT_FEM_TEST_PATIENCE", "1"))


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
    seconds *= patience()

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


REFERENCE = 0.2
"""Seconds of :func:`fixed_work` where the whole suite takes some ten minutes."""


def fixed_work() -> float:
    """Calls of small array operations from Python, as most tests do: the seconds they take."""
    start, x, A = time.perf_counter(), np.ones(100), np.eye(100)
    for _ in range(40_000):
        x = 0.5 * (A @ x) + 0.5
    assert np.all(x == 1)
    return time.perf_counter() - start


def slowness() -> float:
    """How many times longer than there the fixed work takes here and now; at least 1."""
    return max(1.0, min(fixed_work() for _ in range(3)) / REFERENCE)


if __name__ == "__main__":
    print(f"{slowness():.2f}")
